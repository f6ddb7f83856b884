"""A vision encoder's first lesson: name what stands in the place of every image token.

The language model learns to use what an encoder sees far more slowly than the encoder learns to see
when it is asked directly. So it is asked first, through linear heads that are thrown away.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from llama4_lab.model import Llama4
from llama4_lab.points import NO_TAP
from llama4_lab.precision import mixed
from llama4_lab.train.muon import Muon
from llama4_lab.train.scenes import Scene, sample
from llama4_lab.train.shapes import COLOURS, PLACES, SHAPES, draw

LOOKS = {"shape": SHAPES, "colour": COLOURS, "place": PLACES}


def names(scenes: Sequence[Scene], attribute: str, grid: int) -> Int[Tensor, "tiles p"]:
    """Number what each image token of one-tile scenes shows; 0 is nothing, n the nth of `LOOKS`.

    The attribute "place" is that of the token itself, whether something stands there or not.
    """
    known = LOOKS[attribute]
    found = torch.zeros(len(scenes), len(PLACES), dtype=torch.long)
    for row, scene in zip(found, scenes, strict=True):
        if attribute == "place":
            row[:] = torch.arange(1, len(PLACES) + 1)
        for thing in scene.objects:
            row[PLACES.index(thing.place)] = 1 + known.index(getattr(thing, attribute))
    third = torch.arange(grid) * 3 // grid
    return found[:, (3 * third[:, None] + third).flatten()]


def teach_patches(
    model: Llama4, steps: int, seed: int = 0, rows: int = 48, lr: float = 0.02
) -> dict[str, float]:
    """Train the vision encoder and the projector alone; return the shares of right names at last.

    What is read out are the projector's features, normalised as a decoder layer does. The learning
    rates are constant for half of the steps and then fall linearly to zero. The shares are a moving
    mean over the last ten steps or so, on pictures that were new to it.
    """
    config = model.config
    assert config.vision_config is not None
    grid = int(config.vision_config.tokens_per_tile**0.5)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        heads = nn.ModuleDict(
            {name: nn.Linear(config.hidden_size, len(looks) + 1) for name, looks in LOOKS.items()}
        ).to(model.device)
    encoder = nn.ModuleList([model.vision_model, model.multi_modal_projector])
    matrices, rest = [], [*heads.parameters()]
    for name, parameter in encoder.named_parameters():
        inner = parameter.ndim >= 2 and not name.endswith(
            ("embedding_vlm", "patch_embedding.linear.weight")
        )
        (matrices if inner else rest).append(parameter)
    optimisers = [Muon(matrices, lr=lr), torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95))]
    rates = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    right = dict.fromkeys(LOOKS, 0.0)
    bar = tqdm(range(steps), desc="teach the vision encoder", unit="step")
    for step in bar:
        rng = np.random.default_rng((seed, step))
        scenes = [sample(rng, "caption").scenes[0] for _ in range(rows)]
        features = see(model, scenes)
        losses = []
        for name, head in heads.items():
            logits, target = head(features), names(scenes, name, grid).to(model.device)
            losses.append(F.cross_entropy(logits.flatten(0, 1), target.flatten()))
            shown = names(scenes, "shape", grid) > 0
            hits = (logits.argmax(-1) == target)[shown].float().mean().item()
            right[name] += 0.1 * (hits - right[name])
        torch.stack(losses).sum().backward()
        for optimiser, rate in zip(optimisers, rates, strict=True):
            optimiser.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - step / steps))
            optimiser.step()
            optimiser.zero_grad()
        bar.set_postfix({name: f"{share:.0%}" for name, share in right.items()})
    return right


def see(model: Llama4, scenes: Sequence[Scene]) -> Float[Tensor, "tiles p d"]:
    """Return the normalised features of one-tile scenes."""
    pixels = torch.from_numpy(np.stack([draw(scene) for scene in scenes])).to(model.device)
    values = rearrange(pixels.float() / 127.5 - 1, "tiles h w c -> tiles c h w")
    with mixed(model.device):
        features = model.vision_model(values, NO_TAP)
        features = model.multi_modal_projector["linear_1"](features)
    return F.rms_norm(features.float(), features.shape[-1:])
