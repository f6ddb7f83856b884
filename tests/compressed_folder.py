"""Write a model's weights as compressed-tensors does: experts one by one, codes with scales."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 8  # neighbours that share a scale, of packed codes
LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}
FORMATS = {"fp8": "float-quantized", "int8": "int-quantized", "int4": "pack-quantized"}
HALVES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def write_compressed(plain: Path, folder: Path, kind: str, also: tuple[str, ...] = ()) -> Path:
    """Quantise routed experts, and weights whose names hold one of `also`, of transformers' folder.

    One scale serves all of a `q_proj`. Returns a folder in transformers' layout with the weights
    that the codes stand for.
    """
    folder.mkdir()
    rounded = folder.with_name(f"{folder.name}_rounded")
    rounded.mkdir()
    written, meant = {}, {}
    for name, weight in load_file(plain / "model.safetensors").items():
        base, _, last = name.rpartition(".")
        if last in HALVES and ".experts." in name:
            experts = []
            for e, matrix in enumerate(weight):
                halves = matrix.T.chunk(len(HALVES[last]))
                parts = zip(HALVES[last], halves, strict=True)
                made = [_coded(f"{base}.{e}.{half}.weight", rows, kind) for half, rows in parts]
                for tensors, _ in made:
                    written |= tensors
                experts.append(torch.cat([rows for _, rows in made]).T)
            meant[name] = torch.stack(experts).contiguous()
        elif any(part in name for part in also):
            tensors, meant[name] = _coded(name, weight, kind)
            written |= tensors
        else:
            written[name] = meant[name] = weight
    save_file(written, folder / "model.safetensors", {"format": "pt"})
    save_file(meant, rounded / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (rounded / "config.json").write_text(json.dumps(config))
    scheme = {
        "num_bits": 4 if kind == "int4" else 8,
        "type": "float" if kind == "fp8" else "int",
        "symmetric": True,
        **(
            {"strategy": "group", "group_size": GROUP}
            if kind == "int4"
            else {"strategy": "channel"}
        ),
    }
    modules = {name.removesuffix(".weight") for name in written if name.endswith(".weight")}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": FORMATS[kind],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
        "ignore": sorted(m for m in modules if f"{m}.weight_scale" not in written),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return rounded


def _coded(name: str, weight: Tensor, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return what is stored of a weight, and the weight that it stands for."""
    groups = weight.float().unflatten(-1, (-1, GROUP if kind == "int4" else weight.shape[-1]))
    largest = groups.abs().amax(dim=-1, keepdim=True)
    if "q_proj" in name and kind != "int4":
        largest = largest.max().expand_as(largest)
    scales = (largest / LARGEST[kind]).to(weight.dtype)
    codes = (groups / scales.float()).clamp(-LARGEST[kind], LARGEST[kind])
    codes = codes.to(torch.float8_e4m3fn) if kind == "fp8" else codes.round().to(torch.int8)
    meant = (codes.float() * scales.float()).flatten(-2).to(weight.dtype)
    codes, scales = codes.flatten(-2).contiguous(), scales[..., 0]
    if kind != "int4":
        scales = scales[:1, 0] if "q_proj" in name else scales
        return {name: codes, f"{name}_scale": scales.contiguous()}, meant
    shifts = torch.arange(0, 32, 4)
    nibbles = (codes.long() + 8).unflatten(-1, (-1, 8)) << shifts
    tensors = {
        f"{name}_packed": nibbles.sum(-1).to(torch.int32),
        f"{name}_scale": scales.contiguous(),
        f"{name}_shape": torch.tensor(weight.shape),
    }
    return tensors, meant
