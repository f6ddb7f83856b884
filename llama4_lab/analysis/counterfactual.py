"""What a token would have led to, had the router sent it elsewhere."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama4_lab.analysis.positions import from_start
from llama4_lab.analysis.routing import moe_layers
from llama4_lab.edits import Edit, Route
from llama4_lab.replay import Edited, Replay, divergence


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """The prediction at one position, with a token sent to each expert of each layer in turn."""

    token: int  # the position that is sent
    read: int  # the position whose prediction is looked at
    gate: str
    layers: tuple[int, ...]  # MoE layers: the axis l
    chosen: Int[np.ndarray, "l topk"]  # what the router chose; -1 where a layer has fewer
    clean: Float[np.ndarray, " v"]  # log-probabilities with the router's own choices, in nats
    logprobs: Float[np.ndarray, "l e v"]  # with the token sent to expert e of layer l

    @property
    def kl(self) -> Float[np.ndarray, "l e"]:
        """Nats from the clean distribution to the one that would have come."""
        mine = torch.from_numpy(self.logprobs)
        return _numpy(divergence(mine, torch.from_numpy(self.clean).expand_as(mine)))

    @property
    def top(self) -> Int[np.ndarray, "l e"]:
        """The token that would have been the likeliest."""
        return self.logprobs.argmax(axis=-1)

    def change(self, target: int) -> Float[np.ndarray, "l e"]:
        """Return by how many nats a token's log-probability changes."""
        return self.logprobs[..., target] - self.clean[target]

    @property
    def is_choice(self) -> Bool[np.ndarray, "l e"]:
        """Whether the router itself sends the token there."""
        experts = np.arange(self.logprobs.shape[1])
        return (self.chosen[:, :, None] == experts).any(axis=1)


@torch.no_grad()
def counterfactual(
    replay: Replay,
    token: int,
    *,
    gate: str = "own",
    read: int = -1,
    edits: Sequence[Edit] = (),
    on_run: Callable[[int, int], None] | None = None,
) -> Counterfactual:
    """Send a token to every expert of every MoE layer, one at a time, in shared passes.

    `gate` is what multiplies the expert's input: the sigmoid of its "own" logit, that of the
    "winner", or "one" (see `llama4_lab.edits.Route`). `read` is the position whose prediction is
    compared, -1 the last one. All runs have the `edits`, and so has the one they are compared to.
    `on_run` hears after each run how many of how many are done, and may raise to stop the rest.

    Raises:
        ValueError: a position outside the prompt, or one that the token cannot reach; a model
            without MoE layers.
    """
    config, length = replay.model.config, len(replay)
    token, read = from_start(token, length), from_start(read, length)
    if read < token:
        raise ValueError(f"position {read} comes before token {token} and cannot change with it")
    layers = moe_layers(replay.model)
    runs = [
        [*edits, Route(layer, token, expert, gate)]
        for layer in layers
        for expert in range(config.num_local_experts)
    ]
    base = replay.edited(edits)
    clean = _logprobs(base, read)
    logprobs = clean.new_empty(len(runs), len(clean))
    for done, (i, run) in enumerate(replay.stream(runs), start=1):
        logprobs[i] = _logprobs(run, read)
        if on_run is not None:
            on_run(done, len(runs))
    return Counterfactual(
        token=token,
        read=read,
        gate=gate,
        layers=layers,
        chosen=_chosen(base, token),
        clean=_numpy(clean),
        logprobs=_numpy(logprobs).reshape(len(layers), config.num_local_experts, -1),
    )


def _logprobs(run: Edited, position: int) -> Float[Tensor, " v"]:
    at = position - run.first
    logits = run.replay.logits[position] if at < 0 else run.logits_of(slice(at, at + 1))[0]
    return F.log_softmax(logits.float(), dim=-1)


def _chosen(run: Edited, token: int) -> Int[np.ndarray, "l topk"]:
    """Return the experts of a token; -1 where a layer chooses fewer than another."""
    rows = [_numpy(run.router(layer, "indices")[token]) for layer in run.replay.experts]
    most = max(map(len, rows))
    return np.stack([np.pad(row, (0, most - len(row)), constant_values=-1) for row in rows])


def _numpy(x: Tensor) -> np.ndarray:
    return x.cpu().numpy()
