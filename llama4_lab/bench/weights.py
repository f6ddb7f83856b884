"""Seeded weights on a device, packed as they are drawn: no layer is ever whole in bfloat16."""

import torch
from torch import Tensor, nn

from llama4_lab import packed
from llama4_lab.checkpoint.quantised import packable
from llama4_lab.config import Llama4Config
from llama4_lab.model import Llama4
from llama4_lab.model.random import seed_parameter
from llama4_lab.packed import Packed


@torch.no_grad()
def seeded_model(config: Llama4Config, kind: str, seed: int, device: torch.device) -> Llama4:
    """Return a model with seeded weights in bfloat16; those that quantisation packs, of `kind`.

    The kind ``"bf16"`` packs nothing.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.device("meta"):
        model = Llama4(config)
    packs = {} if kind == "bf16" else packable(model)
    for name, parameter in list(model.named_parameters()):
        if name in packs:
            module, part = packs[name]
            module.put(part, seeded_packed(name, parameter.shape, kind, config, generator))
        else:
            path, _, part = name.rpartition(".")
            weight = seeded(name, parameter.shape, config, generator)
            setattr(model.get_submodule(path), part, nn.Parameter(weight, requires_grad=False))
    model.tie_weights()
    return model.eval()


def seeded(
    name: str, shape: torch.Size, config: Llama4Config, generator: torch.Generator
) -> Tensor:
    weight = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    seed_parameter(name, weight, config, generator)
    return weight


def seeded_packed(
    name: str, shape: torch.Size, kind: str, config: Llama4Config, generator: torch.Generator
) -> Packed:
    """Draw and pack a weight; a stack of experts one by one."""
    whole = packed.empty(shape, kind, device=generator.device)
    for part in whole if len(shape) == 3 else [whole]:
        done = packed.pack(seeded(name, part.shape, config, generator), kind)
        part.codes.copy_(done.codes)
        part.scales.copy_(done.scales)
    return whole
