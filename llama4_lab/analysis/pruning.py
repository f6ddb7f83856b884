"""Fewer experts: take them out or merge them, by load or by similarity, and see the loss."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from llama4_lab import experts
from llama4_lab.analysis.quantisation import Ids, count_predicted, swapped
from llama4_lab.analysis.routing import moe_layers
from llama4_lab.checkpoint.quantised import require_plain, require_whole
from llama4_lab.edits import DropExpert, edited
from llama4_lab.experts import loop
from llama4_lab.model import Llama4
from llama4_lab.packed import Packed
from llama4_lab.trace import trace

Stack = Float[Tensor, "e _ _"] | Packed

HOW = ("remove", "merge")
BY = ("load", "similarity")


@dataclass(frozen=True, eq=False)
class Survey:
    """How much each expert of a model does and how alike any two are; l runs over `layers`."""

    layers: tuple[int, ...]  # all MoE layers
    load: Int[np.ndarray, "l e"]  # choices
    similarity: Float[np.ndarray, "l e e"]  # cosine of two experts' outputs, in [-1, 1]

    def order(self, layer: int, by: str) -> Int[np.ndarray, " e"]:
        """Return the experts of a layer of the model, the first one to go first.

        By "load" that is the least used one; by "similarity" the less used one of the two most
        similar ones that are left.

        Raises:
            ValueError: a layer without experts, or none of this model; an unknown order.
        """
        _check_choice("by", by, BY)
        load, alike = self.load[self._row(layer)], self.similarity[self._row(layer)].copy()
        if by == "load":
            return np.argsort(load, kind="stable")
        np.fill_diagonal(alike, -np.inf)
        gone: list[int] = []
        while len(gone) < len(load) - 1:
            pair = divmod(int(alike.argmax()), len(load))
            gone.append(min(pair, key=load.__getitem__))
            alike[gone[-1]] = alike[:, gone[-1]] = -np.inf
        (last,) = set(range(len(load))) - set(gone)
        return np.array([*gone, last])

    def heirs(self, layer: int, keep: int, by: str) -> Int[np.ndarray, " e"]:
        """Return who each expert is merged into: who is kept, into itself; else the most similar.

        Raises:
            ValueError: as `order`; a number of experts to keep that the layer cannot have.
        """
        order = self.order(layer, by)
        if not 1 <= keep <= len(order):
            raise ValueError(f"keep={keep} experts: keep 1 to {len(order)} of them")
        kept = order[-keep:]
        heirs = kept[self.similarity[self._row(layer)][:, kept].argmax(axis=1)]
        heirs[kept] = kept
        return heirs

    def shares(self, layer: int, keep: int, by: str) -> Float[np.ndarray, "e e"]:
        """Return by row how much of each expert is in what takes an expert's place.

        Experts are merged by their load; those of a group that is never used count alike.

        Raises:
            ValueError: as `heirs`.
        """
        heirs, load = self.heirs(layer, keep, by), self.load[self._row(layer)]
        together = heirs[:, None] == heirs
        weight = np.where((together @ load > 0)[:, None], together * load, together)
        return weight / weight.sum(axis=1, keepdims=True)

    def _row(self, layer: int) -> int:
        if layer not in self.layers:
            known = ", ".join(map(str, self.layers))
            raise ValueError(f"layer {layer} has no experts: the MoE layers are {known}")
        return self.layers.index(layer)


@dataclass(frozen=True, eq=False)
class Pruning:
    """The loss with fewer experts in each of `layers`, which are pruned together."""

    how: str
    by: str
    layers: tuple[int, ...]
    kept: Int[np.ndarray, " counts"]  # experts left in a layer
    loss: Float[np.ndarray, " counts"]  # nats per token


@torch.no_grad()
def survey(model: Llama4, batches: Iterable[Ids]) -> Survey:
    """Run batches of token ids without padding, and look at every expert of every MoE layer.

    Two experts are compared by what both make of each input that any of the layer's experts got,
    the score multiplied in: the cosine of all their outputs, taken as two long vectors. Unlike
    weights, outputs do not depend on the order of hidden units (Chen et al. 2024, "Retraining-Free
    Merging of Sparse MoE via Hierarchical Clustering", who average them over tokens first). Every
    batch runs through all experts: it takes their outputs, ``e n d`` floats, at a time.

    Raises:
        ValueError: a model without MoE layers or divided among ranks, or no batch.
    """
    require_whole(model, "a survey of experts")
    layers, e = moe_layers(model), model.config.num_local_experts
    load = np.zeros((len(layers), e), dtype=np.int64)
    product = np.zeros((len(layers), e, e))
    for ids in tqdm(batches, desc="survey of experts", unit="batch", delay=2):
        with trace(model, ["layers.*.experts.in", "layers.*.router.indices"]) as cache:
            model.hidden(ids.to(model.device))
        for row, i in enumerate(layers):
            chosen = cache[f"layers.{i}.router.indices"].flatten()
            load[row] += torch.bincount(chosen, minlength=e).cpu().numpy()
            outputs = _outputs(cache[f"layers.{i}.experts.in"].flatten(0, 2), *_weights(model, i))
            product[row] += torch.einsum("e n d, k n d -> e k", outputs, outputs).cpu().numpy()
    if not load.any():
        raise ValueError("the survey was given no token: a generator of batches runs only once")
    size = np.sqrt(np.diagonal(product, axis1=1, axis2=2))
    both = size[:, :, None] * size[:, None]
    return Survey(layers, load, np.divide(product, both, where=both > 0, out=np.zeros_like(both)))


@torch.no_grad()
def pruning(
    model: Llama4,
    batches: Sequence[Ids],
    found: Survey,
    *,
    how: str = "remove",
    by: str = "load",
    layers: Sequence[int] | None = None,
    keep: Sequence[int] | None = None,
) -> Pruning:
    """Measure the loss against how many experts are left.

    Batches are token ids without padding; better others than those of the survey. `how`, `by` and
    `layers` are those of `pruned`; `keep` counts experts, by default all down to the fewest.

    Raises:
        ValueError: as `pruned`; nothing to predict.
    """
    config, scored = model.config, count_predicted(batches)
    least = config.num_experts_per_tok if how == "remove" else 1
    kept = [*range(config.num_local_experts, least - 1, -1)] if keep is None else [*keep]
    losses = []
    for count in tqdm(kept, desc=f"{how} by {by}", unit="run", delay=2):
        with pruned(model, found, count, how=how, by=by, layers=layers):
            losses.append(_nats(model, batches) / scored)
    layers = found.layers if layers is None else tuple(layers)
    return Pruning(how, by, layers, np.array(kept), np.array(losses))


@contextmanager
def pruned(
    model: Llama4,
    found: Survey,
    keep: int,
    *,
    how: str = "remove",
    by: str = "load",
    layers: Sequence[int] | None = None,
) -> Iterator[None]:
    """Let MoE layers, all of them unless given, make do with `keep` experts inside the block.

    The experts go in the order of `Survey.order`. A removed one's tokens go to the next best.
    Merged experts compute with the mean of their weights by load, and the router stays: what went
    to any of them goes to the mean, with the score it had (Li et al. 2023, "Merge, Then Compress";
    by load, the most used stay and the others join the most similar of them, as there). Hidden
    units are averaged as they stand; there they are aligned before, which on `nano` is worth 0.004
    to 0.041 nats per token.

    Raises:
        ValueError: an unknown `how` or `by`, a layer without experts, or a number of experts to
            keep that the layer cannot have; to merge, a model whose weights are packed or divided
            among ranks.
    """
    _check_choice("how", how, HOW)
    e, topk = model.config.num_local_experts, model.config.num_experts_per_tok
    least = topk if how == "remove" else 1
    if not least <= keep <= e:
        why = f", as each token chooses {topk}" if least > 1 else ""
        raise ValueError(f"keep={keep} experts: to {how}, keep {least} to {e}{why}")
    layers = found.layers if layers is None else layers
    if how == "remove":
        gone = {i: found.order(i, by)[: e - keep].tolist() for i in layers}
        with edited(model, [DropExpert(i, expert) for i in layers for expert in gone[i]]):
            yield
        return
    require_whole(model, "merging experts")
    require_plain(model, "merging experts")
    weights = {}
    for i in layers:
        share = torch.from_numpy(found.shares(i, keep, by))
        block: Any = model.layers[i]
        for name, old in block.feed_forward.experts.named_parameters():
            mean = torch.tensordot(share.to(old.device, torch.float32), old.detach().float(), 1)
            weights[block.feed_forward.experts, name] = mean.to(old.dtype)
    with swapped(weights):
        yield


def _weights(model: Llama4, layer: int) -> tuple[Stack, Stack]:
    block: Any = model.layers[layer]
    return block.feed_forward.experts.gate_up_proj, block.feed_forward.experts.down_proj


def _outputs(x: Float[Tensor, "n d"], gate_up: Stack, down: Stack) -> Float[Tensor, "e n d"]:
    """Return what every expert makes of every input."""
    order, offsets = experts.sort(torch.zeros(len(x), 1, dtype=torch.long, device=x.device), 1)
    one = x.new_ones(len(x), 1)
    return torch.stack(
        [
            loop.apply(x, order, offsets, one, gate_up[i : i + 1], down[i : i + 1]).float()
            for i in range(len(gate_up))
        ]
    )


def _nats(model: Llama4, batches: Sequence[Ids]) -> float:
    """Return the loss of all tokens but each row's first, in nats."""
    nats = 0.0
    for ids in batches:
        ids = ids.to(model.device)
        logits = model(ids[:, :-1]).float().flatten(0, 1)
        nats += F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").item()
    return nats


def _check_choice(name: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ValueError(f"{name}={given!r} is unknown; choose from {', '.join(known)}")
