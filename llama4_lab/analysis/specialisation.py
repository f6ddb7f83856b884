"""Which experts prefer which kind of text, and how much of that is more than chance."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llama4_lab.model import Llama4
from llama4_lab.prompt import Prompt
from llama4_lab.trace import trace


@dataclass(frozen=True)
class Specialisation:
    """Share of each domain's choices that go to each expert, by MoE layer."""

    domains: tuple[str, ...]
    layers: tuple[int, ...]
    share: Float[np.ndarray, "domain l e"]  # each row over e sums to one

    @property
    def mixed(self) -> Float[np.ndarray, "l e"]:
        """Share of the mix in which every domain has the same weight."""
        return self.share.mean(axis=0)

    @property
    def mutual_information(self) -> Float[np.ndarray, " l"]:
        """Bits that an expert tells about the domain of its token, by layer."""
        return np.array([mutual_information(self.share[:, i]) for i in range(len(self.layers))])


def mutual_information(share: Float[np.ndarray, "domain e"]) -> float:
    """Return the mutual information of domain and expert in bits, all domains weighing the same.

    It is 0 when every domain spreads alike and at most ``log2(min(domains, experts))``.

    >>> mutual_information(np.eye(4)), mutual_information(np.full((4, 4), 0.25))
    (2.0, 0.0)
    """
    together = np.broadcast_to(share.mean(axis=0), share.shape)
    used = share > 0
    return float((share[used] * np.log2(share[used] / together[used])).sum() / len(share))


@torch.no_grad()
def specialisation(
    model: Llama4, rows: Mapping[str, Iterable[Tensor | tuple[Prompt, Bool[Tensor, "b t"]]]]
) -> Specialisation:
    """Count the experts chosen for each domain.

    A domain is given as batches ``[b, t]`` of token ids, or as prompts with a mask that says which
    of their tokens count.
    """
    layers = [i for i in range(model.config.num_hidden_layers) if model.config.is_moe(i)]
    names = [f"layers.{i}.router.indices" for i in layers]
    experts = model.config.num_local_experts
    share = []
    for batches in rows.values():
        count = np.zeros((len(layers), experts))
        for batch in batches:
            if isinstance(batch, Tensor):
                ids, pixels, counts = batch, None, slice(None)
            else:
                prompt, counts = batch
                ids, pixels = prompt.input_ids, prompt.to(model.device).pixel_values
            with trace(model, names) as cache:
                model.hidden(ids.to(model.device), pixels)
            for i, name in enumerate(names):
                chosen = cache[name][counts].flatten()
                count[i] += torch.bincount(chosen, minlength=experts).cpu().numpy()
        share.append(count / count.sum(axis=1, keepdims=True))
    return Specialisation(tuple(rows), tuple(layers), np.stack(share))
