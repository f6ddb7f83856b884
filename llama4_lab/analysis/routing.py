"""Which experts the tokens of a prompt or of a batch chose, and how close each choice was."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama4_lab.analysis.positions import from_start
from llama4_lab.model import Llama4
from llama4_lab.prompt import Prompt, tokens_of
from llama4_lab.replay import Edited
from llama4_lab.trace import trace

Batch = Tensor | Prompt | tuple[Prompt, Tensor]


@dataclass(frozen=True, eq=False)
class Routing:
    """The routers' decisions about one prompt; the axis l runs over `layers`, MoE layers only."""

    tokens: list[str]
    layers: tuple[int, ...]
    logits: Float[np.ndarray, "l n e"]
    expert: Int[np.ndarray, "l n topk"]  # strongest first; -1 where a layer chooses fewer
    score: Float[np.ndarray, "l n topk"]  # sigmoid of the chosen logits, in (0, 1); nan for -1
    runner_up: Int[np.ndarray, "l n"]  # the best expert not chosen; -1 if all are chosen
    margin: Float[np.ndarray, "l n"]  # logits from the runner-up up to the weakest chosen expert

    @property
    def num_experts(self) -> int:
        return self.logits.shape[-1]

    @property
    def load(self) -> Float[np.ndarray, "l e"]:
        """Each expert's share of the prompt's choices, in [0, 1]; a layer's shares sum to one."""
        count = (self.expert[..., None] == np.arange(self.num_experts)).sum(axis=(1, 2))
        return count / count.sum(axis=1, keepdims=True)

    def row(self, layer: int) -> int:
        """Return where a layer of the model stands on the axis l.

        Raises:
            ValueError: a layer without experts, or none of this model.
        """
        if layer not in self.layers:
            known = ", ".join(map(str, self.layers))
            raise ValueError(f"layer {layer} has no experts: the MoE layers are {known}")
        return self.layers.index(layer)

    def position(self, token: int) -> int:
        """Return the position of a token; -1 is the last one.

        Raises:
            ValueError: a position outside the prompt.
        """
        return from_start(token, len(self.tokens))


@torch.inference_mode()
def routing_of(model: Llama4, prompt: Prompt) -> Routing:
    """Run a prompt of one row and keep what its routers decided.

    Raises:
        ValueError: a model without MoE layers, or a prompt of several rows.
    """
    tokens = tokens_of(prompt)
    layers = moe_layers(model)
    prompt = prompt.to(model.device)
    with trace(model, "layers.*.router.*") as cache:
        model.hidden(prompt.input_ids, prompt.pixel_values, prompt.attention_mask)
    return _routing(tokens, layers, lambda i, part: cache[f"layers.{i}.router.{part}"][0])


def routing_in(run: Edited, tokens: list[str]) -> Routing:
    """Return what the routers decided in an edited run, without running anything.

    Raises:
        ValueError: a model without MoE layers.
    """
    return _routing(tokens, moe_layers(run.replay.model), run.router)


def _routing(
    tokens: list[str], layers: tuple[int, ...], decided: Callable[[int, str], Tensor]
) -> Routing:
    """Put together what ``decided(layer, part)`` of each layer's router says, ``[n, …]``."""
    found: list[list[np.ndarray]] = []
    for i in layers:
        logits, expert = decided(i, "logits"), decided(i, "indices")
        found.append([_numpy(x) for x in (logits, expert, decided(i, "scores"))])
        found[-1] += [_numpy(x) for x in _next_best(logits.float(), expert)]
    topk = max(each[1].shape[-1] for each in found)
    for each in found:
        fewer = ((0, 0), (0, topk - each[1].shape[-1]))
        each[1] = np.pad(each[1], fewer, constant_values=-1)
        each[2] = np.pad(each[2], fewer, constant_values=np.nan)
    return Routing(tokens, layers, *map(np.stack, zip(*found, strict=True)))


@dataclass(frozen=True, eq=False)
class Choices:
    """What the routers decided about the n tokens of a batch that count, row after row."""

    expert: Int[np.ndarray, "l n topk"]  # strongest first
    logits: Float[np.ndarray, "l n e"]
    token: Int[np.ndarray, " n"]  # ids
    row: Int[np.ndarray, " n"]  # of the batch
    num_rows: int


@torch.inference_mode()
def choices(model: Llama4, batch: Batch) -> Choices:
    """Run a batch and keep what the routers decided about its tokens.

    A batch is token ids ``[b, t]``, a prompt, whose padding does not count (but moves long rows'
    choices a little, see `Llama4.forward`), or a prompt and a mask ``[b, t]`` of those that count.

    Raises:
        ValueError: a model without MoE layers, or whose layers choose different numbers of experts.
    """
    layers = moe_layers(model)
    uniform_topk(model)
    if isinstance(batch, Tensor):
        ids, pixels, mask, counts = batch, None, None, torch.ones_like(batch)
    elif not isinstance(batch, Prompt | tuple):
        raise TypeError(
            f"{batch!r:.80} is no batch: give token ids [b, t], or what model.prompt makes"
        )
    else:
        prompt, counts = batch if isinstance(batch, tuple) else (batch, batch.attention_mask)
        prompt = prompt.to(model.device)
        ids, pixels, mask = prompt.input_ids, prompt.pixel_values, prompt.attention_mask
    with trace(model, ["layers.*.router.logits", "layers.*.router.indices"]) as cache:
        model.hidden(ids.to(model.device), pixels, mask)
    counts = counts.bool().cpu().numpy()  # a tensor of one element would count as a number

    def stacked(name: str) -> np.ndarray:
        return np.stack([_numpy(cache[f"layers.{i}.router.{name}"])[counts] for i in layers])

    row = counts.nonzero()[0]
    arrays = (stacked("indices"), stacked("logits"), _numpy(ids)[counts], row)
    return Choices(*arrays, num_rows=len(ids))


def uniform_topk(model: Llama4) -> int:
    """Return how many experts a token chooses in each MoE layer.

    Raises:
        ValueError: edits let layers choose different numbers.
    """
    blocks: Any = model.layers
    found = {i: blocks[i].feed_forward.topk for i in moe_layers(model)}
    if len({*found.values()}) > 1:
        by_layer = ", ".join(f"layer {i}: {k}" for i, k in found.items())
        raise ValueError(
            f"layers choose different numbers of experts here ({by_layer}), and counts are of one: "
            "give every MoE layer the same TopK, or none"
        )
    return found[min(found)]


def moe_layers(model: Llama4) -> tuple[int, ...]:
    """Return the layers of a model that route.

    Raises:
        ValueError: a model without MoE layers.
    """
    config = model.config
    if not config.routed_layers:
        raise ValueError(
            f"this model routes nothing: all its {config.num_hidden_layers} layers are dense"
        )
    return config.routed_layers


def _next_best(
    logits: Float[Tensor, "n e"], expert: Int[Tensor, "n topk"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Find the best expert that was not chosen, and how far below the weakest chosen one it is."""
    weakest = logits.gather(-1, expert).amin(dim=-1)
    best, runner_up = logits.scatter(-1, expert, float("-inf")).max(dim=-1)
    return runner_up.masked_fill(best == float("-inf"), -1), weakest - best


def _numpy(x: Tensor) -> np.ndarray:
    return (x.float() if x.is_floating_point() else x).cpu().numpy()
