"""Write a model's weights as NVIDIA's ModelOpt does, in FP8 or NVFP4.

Spelled out from ``torch/export/unified_export_hf.py``, so that it shares nothing with the reader.
"""

import json
from pathlib import Path

import torch
from mlx_folder import float_of
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 16


def write_modelopt(plain: Path, folder: Path, algorithm: str, is_beside: bool = False) -> Path:
    """Quantise attention and MLPs of the text decoder in transformers' folder, experts too.

    `is_beside` puts what config.json says of it into a file of its own. Returns a folder in
    transformers' layout with the weights that the codes stand for.
    """
    folder.mkdir()
    rounded = folder.with_name(f"{folder.name}_rounded")
    rounded.mkdir()
    written, meant = {}, {}
    for name, weight in load_file(plain / "model.safetensors").items():
        is_stack = ".experts." in name
        if not is_stack and not ("language_model" in name and name.endswith("_proj.weight")):
            written[name] = meant[name] = weight
            continue
        stem = f"{name}_weight" if is_stack else name
        scaled = (_fp8 if algorithm == "FP8" else _nvfp4)(weight.mT if is_stack else weight)
        codes, scales, rows = scaled
        written[name] = (codes.mT if is_stack else codes).contiguous()
        for end, scale in scales.items():
            written[stem + end] = (scale.mT if is_stack and scale.ndim else scale).contiguous()
        written[f"{stem.removesuffix('weight')}input_scale"] = torch.tensor(0.1)
        meant[name] = (rows.mT if is_stack else rows).contiguous()
        if name.endswith("k_proj.weight"):
            written[f"{name.removesuffix('weight')}k_scale"] = torch.tensor(0.1)
    save_file(written, folder / "model.safetensors", {"format": "pt"})
    save_file(meant, rounded / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (rounded / "config.json").write_text(json.dumps(config))
    said = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8"}
    if is_beside:
        listing = {"producer": {"name": "modelopt"}, "quantization": said}
        (folder / "hf_quant_config.json").write_text(json.dumps(listing))
    else:
        config["quantization_config"] = said | {"quant_method": "modelopt"}
    (folder / "config.json").write_text(json.dumps(config))
    return rounded


def _fp8(weight: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return codes, {"_scale": scale}, codes.float() * scale


def _nvfp4(weight: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    values = torch.tensor([float_of(code, 2) for code in range(16)])
    groups = weight.unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1)
    of_all = largest.max() / (6 * 448)
    scales = (largest / 6 / of_all).to(torch.float8_e4m3fn)
    each = (scales.float() * of_all)[..., None]
    codes = ((groups / each)[..., None] - values).abs().argmin(-1)
    pairs = codes.flatten(-2).byte().unflatten(-1, (-1, 2))
    held = {"_scale": scales, "_scale_2": of_all}
    return pairs[..., 0] + 16 * pairs[..., 1], held, (values[codes] * each).flatten(-2)
