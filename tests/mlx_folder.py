"""Write a model's weights as mlx-lm and mlx-vlm do: experts in three stacks, codes in groups.

Spelled out from the documentation of ``mlx.core.quantize``, so that it shares nothing with the
reader that it tests.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FLOATS = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits, group


def write_mlx(
    plain: Path,
    folder: Path,
    mode: str | None,
    bits: int = 4,
    group: int = 32,
    others: dict[str, int] | None = None,
) -> Path:
    """Quantise all matrices of transformers' folder but the vision encoder's; `mode` None keeps.

    `others` has the bits of modules whose names hold a text. Returns a folder in transformers'
    layout with the weights that the codes stand for.
    """
    folder.mkdir()
    rounded = folder.with_name(f"{folder.name}_rounded")
    rounded.mkdir()
    written, meant = {}, {}
    bits, group = FLOATS.get(mode or "", (bits, group))
    quantization = {"group_size": group, "bits": bits, "mode": mode}

    def put(name: str, weight: Tensor) -> Tensor:
        module = name.removesuffix(".weight")
        is_kept = weight.ndim < 2 or weight.shape[-1] % group or "vision" in name
        if mode is None or is_kept or "projector" in name:
            written[name] = weight.contiguous()
            return weight
        own = next((n for part, n in (others or {}).items() if part in module), bits)
        if own != bits:
            quantization[module] = {"group_size": group, "bits": own, "mode": mode}
        codes, held, rows = (_affine if mode == "affine" else _floats)(weight, mode, own, group)
        written[name] = torch.from_numpy(packed(codes.numpy(), own))
        written.update({f"{module}.{part}": tensor for part, tensor in held.items()})
        return rows

    for name, weight in load_file(plain / "model.safetensors").items():
        base, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            gate, up = weight.mT.chunk(2, dim=1)
            halves = put(f"{base}.gate_proj.weight", gate), put(f"{base}.up_proj.weight", up)
            meant[name] = torch.cat(halves, dim=1).mT.contiguous()
        elif ".experts." in name:
            meant[name] = put(f"{name}.weight", weight.mT).mT.contiguous()
        else:
            meant[name] = put(name, weight)
    save_file(written, folder / "model.safetensors", {"format": "mlx"})
    save_file(meant, rounded / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (rounded / "config.json").write_text(json.dumps(config))
    if mode is not None:
        config |= {"quantization": quantization, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return rounded


def _affine(
    weight: Tensor, _: str, bits: int, group: int
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    groups = weight.unflatten(-1, (-1, group))
    least, most = groups.amin(-1), groups.amax(-1)
    scales = (most - least) / (2**bits - 1)
    codes = ((groups - least[..., None]) / scales[..., None]).round()
    meant = (scales[..., None] * codes + least[..., None]).flatten(-2)
    return codes.flatten(-2), {"scales": scales, "biases": least}, meant


def _floats(
    weight: Tensor, mode: str, _: int, group: int
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Take the nearest of the numbers that a code can be."""
    values = torch.tensor([float_of(code, 4 if mode == "mxfp8" else 2) for code in range(256)])
    values = values if mode == "mxfp8" else values[:16]
    values = values.nan_to_num(1e9)
    groups = weight.unflatten(-1, (-1, group))
    largest = groups.abs().amax(-1) / (448 if mode == "mxfp8" else 6)
    if mode == "nvfp4":
        held = largest.to(torch.float8_e4m3fn)
        scales, kept = held.float(), held.view(torch.uint8)
    else:
        kept = (largest.log2().ceil() + 127).to(torch.uint8)
        scales = 2.0 ** (kept.float() - 127)
    codes = ((groups / scales[..., None])[..., None] - values).abs().argmin(-1)
    meant = (values[codes] * scales[..., None]).flatten(-2)
    return codes.flatten(-2).float(), {"scales": kept}, meant


def float_of(code: int, exponent_bits: int) -> float:
    """Return what a float of four or eight bits is, the highest bit of which is its sign."""
    mantissa_bits = 3 if exponent_bits == 4 else 1
    bias = 2 ** (exponent_bits - 1) - 1
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) & 1 else 1.0
    exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = (code & ((1 << mantissa_bits) - 1)) / 2**mantissa_bits
    if exponent_bits == 4 and code & 127 == 127:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias)
    return sign * (1 + mantissa) * 2.0 ** (exponent - bias)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Write all codes' bits one after the other, and 32 of them as a number."""
    each = np.unpackbits(codes.astype(np.uint8)[..., None], axis=-1, bitorder="little")[..., :bits]
    stream = each.reshape(*codes.shape[:-1], -1)
    return np.packbits(stream, axis=-1, bitorder="little").view(np.uint32)
