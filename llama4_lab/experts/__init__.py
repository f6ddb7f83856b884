"""Mixture of experts in three steps: route, sort, apply.

`loop` is the readable apply and the oracle of the tests; every other backend is a function of the
same signature that must equal it on any routing. Weights are stored once, contraction axis last:
``gate_up [e, 2f, d]`` (gate rows first) and ``down [e, d, f]``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llama4_lab.experts import grouped, loop, padded
from llama4_lab.points import NO_TAP, Tap

BACKENDS: dict[str, Callable[..., Tensor]] = {
    "loop": loop.apply,
    "grouped": grouped.apply,
    "padded": padded.apply,
}
_INSIDE = ("experts.in", "experts.hidden", "experts.out")


def route(
    logits: Float[Tensor, "n e"], topk: int = 1, record: Tap = NO_TAP
) -> tuple[Int[Tensor, "n topk"], Float[Tensor, "n topk"]]:
    """Choose each token's experts by their raw logits; the score is the logit's sigmoid.

    Every score is independent: they are not renormalised, and do not sum to one. The sigmoid is
    taken in float32 (Meta's reference takes it in the working dtype; they differ in bfloat16 only).

    >>> expert, score = route(torch.tensor([[0.0, -1.0], [1.0, 2.0]]))
    >>> expert.flatten().tolist(), [round(s, 3) for s in score.flatten().tolist()]
    ([0, 1], [0.5, 0.881])
    """
    expert = record("router.indices", logits.topk(topk, dim=-1).indices)
    score = logits.gather(-1, expert).float().sigmoid().to(logits.dtype)
    return expert, record("router.scores", score)


def sort(
    expert: Int[Tensor, "n topk"], num_experts: int
) -> tuple[Int[Tensor, " m"], Int[Tensor, " ends"]]:
    """Order the token slots by expert, stably.

    Slot ``i * topk + j`` is token i's j-th choice; expert e owns
    ``order[offsets[e]:offsets[e + 1]]``.

        >>> order, offsets = sort(torch.tensor([[1], [0], [1]]), 2)
        >>> order.tolist(), offsets.tolist()
        ([1, 0, 2], [0, 1, 3])
    """
    slots = expert.flatten()
    order = slots.argsort(stable=True)
    load = torch.zeros(num_experts, dtype=torch.long, device=slots.device)
    load.scatter_add_(0, slots, torch.ones_like(slots))
    return order, F.pad(load.cumsum(0), (1, 0))


def choose_backend(x: Tensor) -> str:
    """Return the backend that ``"auto"`` stands for: the fastest that runs on this tensor."""
    fast = (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x.device) >= (9, 0)
    )
    return "grouped" if fast else "loop"


def moe(
    x: Float[Tensor, "n d"],
    router: Float[Tensor, "e d"],
    experts: tuple[Float[Tensor, "e f2 d"], Float[Tensor, "e d f"]],
    shared: Callable[[Tensor], Tensor],
    *,
    topk: int = 1,
    backend: str = "auto",
    record: Tap = NO_TAP,
) -> Float[Tensor, "n d"]:
    """Send each token through its experts and the shared expert, and add the two.

    Watching a value inside the experts switches this call to the readable backend.

    Args:
        experts: ``gate_up`` and ``down``.
        shared: the shared expert, applied to every token.
        record: sees ``router.{logits, indices, scores}``, ``experts.{in, hidden, out}`` and
            ``shared.out``, with the tokens flattened to n.

    Raises:
        ValueError: a backend that does not exist.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose auto, {', '.join(BACKENDS)}")
    logits = record("router.logits", F.linear(x, router))
    expert, score = route(logits, topk, record)
    order, offsets = sort(expert, len(router))
    if any(record.watches(name) for name in _INSIDE):
        routed = loop.apply(x, order, offsets, score, *experts, record=record)
    else:
        apply = BACKENDS[choose_backend(x) if backend == "auto" else backend]
        routed = apply(x, order, offsets, score, *experts)
    return record("shared.out", shared(x)) + routed
