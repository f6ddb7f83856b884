"""Write a model's weights as compressed-tensors does: experts one by one, codes with scales."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from mlx_folder import float_of, packed
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 8  # neighbours that share a scale, of packed codes
BLOCK = (24, 32)  # rows and columns that share one, of "fp8 blocks"
LARGEST = {"fp8": 448.0, "int8": 127.0}
FORMATS = {
    "fp8": "float-quantized",
    "fp8 blocks": "float-quantized",
    "int8": "int-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}
HALVES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def write_compressed(plain: Path, folder: Path, kind: str, also: tuple[str, ...] = ()) -> Path:
    """Quantise routed experts, and weights whose names hold one of `also`, of transformers' folder.

    Kinds are those of `FORMATS`, and packed ones, as "int4" and "int4 zeros", of other bits, too.
    One scale serves all of a `q_proj`. Returns a folder in transformers' layout with the weights
    that the codes stand for.
    """
    folder.mkdir()
    rounded = folder.with_name(f"{folder.name}_rounded")
    rounded.mkdir()
    written, meant = {}, {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if name.endswith(tuple(HALVES)) and ".experts." in name:
            tensors, meant[name] = one_by_one(name, weight, partial(_coded, kind=kind))
            written |= tensors
        elif any(part in name for part in also):
            tensors, meant[name] = _coded(name, weight, kind)
            written |= tensors
            if "q_proj" in name:  # with a cache in few bits
                base = name.removesuffix("q_proj.weight")
                written |= {f"{base}{each}_scale": torch.ones(1) for each in "kv"}
        else:
            written[name] = meant[name] = weight
    save_file(written, folder / "model.safetensors", {"format": "pt"})
    save_file(meant, rounded / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (rounded / "config.json").write_text(json.dumps(config))
    scheme = {
        "num_bits": int("".join(filter(str.isdigit, kind))),
        "type": "float" if "fp" in kind else "int",
        "symmetric": "zeros" not in kind,
        **(
            {"strategy": "group", "group_size": GROUP}
            if kind not in FORMATS
            else {"strategy": "block", "block_structure": list(BLOCK)}
            if kind == "fp8 blocks"
            else {"strategy": "tensor_group", "group_size": 16}
            if kind == "nvfp4"
            else {"strategy": "channel"}
        ),
    }
    modules = {name.removesuffix(".weight") for name in written if name.endswith(".weight")}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": FORMATS.get(kind, "pack-quantized"),
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
        "ignore": sorted(m for m in modules if f"{m}.weight_scale" not in written),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return rounded


def one_by_one(
    name: str, stack: Tensor, coded: Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]
) -> tuple[dict[str, Tensor], Tensor]:
    """Return what is stored of transformers' stack expert by expert, and what it stands for."""
    base, _, last = name.rpartition(".")
    written, experts = {}, []
    for e, matrix in enumerate(stack):
        parts = zip(HALVES[last], matrix.T.chunk(len(HALVES[last])), strict=True)
        made = [coded(f"{base}.{e}.{half}.weight", rows) for half, rows in parts]
        for tensors, _ in made:
            written |= tensors
        experts.append(torch.cat([rows for _, rows in made]).T)
    return written, torch.stack(experts).contiguous()


def _coded(name: str, weight: Tensor, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return what is stored of a weight, and the weight that it stands for."""
    if kind == "fp8 blocks":
        return _in_blocks(name, weight)
    if "zeros" in kind:
        return _with_zeros(name, weight, int(kind[3]))
    if kind == "nvfp4":
        return _nvfp4(name, weight)
    bits = None if kind in FORMATS else int(kind[3])
    most = LARGEST[kind] if bits is None else 2 ** (bits - 1) - 1
    groups = weight.float().unflatten(-1, (-1, GROUP if bits else weight.shape[-1]))
    largest = groups.abs().amax(dim=-1, keepdim=True)
    if "q_proj" in name and bits is None:
        largest = largest.max().expand_as(largest)
    scales = (largest / most).to(weight.dtype)
    codes = (groups / scales.float()).clamp(-most, most)
    codes = codes.to(torch.float8_e4m3fn) if kind == "fp8" else codes.round().to(torch.int8)
    meant = (codes.float() * scales.float()).flatten(-2).to(weight.dtype)
    codes, scales = codes.flatten(-2).contiguous(), scales[..., 0]
    if bits is None:
        scales = scales[:1, 0] if "q_proj" in name else scales
        stem = name.removesuffix("weight")
        tensors = {name: codes, f"{name}_scale": scales.contiguous()}
        tensors |= {f"{stem}input_scale": torch.ones(1), f"{stem}input_zero_point": torch.ones(1)}
        return tensors, meant
    tensors = {
        f"{name}_packed": _packed(codes.long() + 2 ** (bits - 1), bits),
        f"{name}_scale": scales.contiguous(),
        f"{name}_shape": torch.tensor(weight.shape),
    }
    return tensors, meant


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Put a row's codes into int32s, one after the other and across their borders."""
    words = -(-codes.shape[-1] * bits // 32)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 32))
    return torch.from_numpy(packed(codes.numpy(), bits).view("int32"))[:, :words].contiguous()


def _in_blocks(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    down, across = BLOCK
    starts = range(0, weight.shape[0], down), range(0, weight.shape[1], across)
    codes, meant = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(weight.shape)
    scales = torch.empty(len(starts[0]), len(starts[1]))
    for i, top in enumerate(starts[0]):
        for j, left in enumerate(starts[1]):
            at = slice(top, top + down), slice(left, left + across)
            scales[i, j] = weight[at].abs().max() / LARGEST["fp8"]
            codes[at] = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[at] = codes[at].float() * scales[i, j]
    return {name: codes, f"{name}_scale": scales}, meant


def _with_zeros(name: str, weight: Tensor, bits: int) -> tuple[dict[str, Tensor], Tensor]:
    groups = weight.unflatten(-1, (-1, GROUP))
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    top = 2**bits - 1
    scales = (most - least) / top
    zeros = (-least / scales).round().clamp(0, top)
    codes = (groups / scales + zeros).round().clamp(0, top)
    tensors = {
        f"{name}_packed": _packed(codes.flatten(-2).long(), bits),
        f"{name}_scale": scales[..., 0].contiguous(),
        f"{name}_zero_point": _packed(zeros[..., 0].long().mT, bits).mT.contiguous(),
        f"{name}_shape": torch.tensor(weight.shape),
    }
    return tensors, ((codes - zeros) * scales).flatten(-2)


def _nvfp4(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    values = torch.tensor([float_of(code, 2) for code in range(16)])
    groups = weight.unflatten(-1, (-1, 16))
    largest = groups.abs().amax(-1)
    of_all = (448 * 6 / largest.max()).reshape(1)
    scales = (largest / 6 * of_all).to(torch.float8_e4m3fn)
    each = (scales.float() / of_all)[..., None]
    codes = ((groups / each)[..., None] - values).abs().argmin(-1)
    pairs = codes.flatten(-2).byte().unflatten(-1, (-1, 2))
    tensors = {
        f"{name}_packed": pairs[..., 0] + 16 * pairs[..., 1],
        f"{name}_scale": scales,
        f"{name}_global_scale": of_all,
        f"{name.removesuffix('weight')}input_global_scale": torch.ones(1),
    }
    return tensors, (values[codes] * each).flatten(-2)
