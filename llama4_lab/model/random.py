"""Seeded weights of the right shapes, for tests, benchmarks and training from nothing."""

import torch
from torch import Tensor, nn

from llama4_lab.config import Llama4Config
from llama4_lab.model.llama4 import Llama4
from llama4_lab.precision import device_of


@torch.no_grad()
def random(
    config: Llama4Config,
    seed: int = 0,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Llama4:
    """Return a model with seeded weights, scaled so that every layer keeps its input's size.

    Matrices are normal with variance 1/inputs (those that write to the residual stream smaller by
    ``sqrt(2 * layers)``, as in GPT-2), embeddings have unit variance, norms are one.

    Raises:
        TypeError: no config.
        ValueError: a device that this machine does not have.
    """
    if not isinstance(config, Llama4Config):
        raise TypeError(f"{config!r:.80} is no config: give one, such as load('nano').config")
    device = device_of(device)
    with torch.device("meta"):
        model = Llama4(config)
    model = model.to_empty(device=device).to(dtype)
    model.tie_weights()
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        seed_parameter(name, parameter, config, generator)
    return model


def seed_parameter(
    name: str, parameter: Tensor, config: Llama4Config, generator: torch.Generator
) -> None:
    """Fill a parameter with what `random` draws for it, next in its order."""
    if name.endswith("bias"):
        parameter.zero_()
    elif "norm" in name:
        parameter.fill_(1.0)
    else:
        writes = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
        depth = (2 * config.num_hidden_layers) ** -0.5 if writes else 1.0
        std = 1.0 if name == "embed_tokens.weight" else parameter.shape[-1] ** -0.5 * depth
        nn.init.normal_(parameter, std=std, generator=generator)
