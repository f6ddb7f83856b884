"""Mixture of experts in three steps: route, sort, apply.

`loop` is the readable apply and the oracle of the tests; every other backend is a function of the
same signature that must equal it on any routing. Weights are stored once, contraction axis last:
``gate_up [e, 2f, d]`` (gate rows first) and ``down [e, d, f]``.
"""

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llama4_lab.experts import gather, grouped, loop, padded, probe
from llama4_lab.experts.mapped import Mapped
from llama4_lab.packed import Packed, linear
from llama4_lab.points import INSIDE, NO_TAP, Tap


def _numba() -> ModuleType:
    from llama4_lab.experts import numba  # not before it is needed: it takes half a second

    return numba


def _triton() -> ModuleType:
    try:
        from llama4_lab.experts import triton  # comes with torch's CUDA builds
    except ImportError:
        return grouped
    return triton


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "loop": loop.apply,
    "numba": lambda *arguments: _numba().apply(*arguments),
    "gather": gather.apply,
    "grouped": grouped.apply,
    "padded": padded.apply,
    "triton": lambda *arguments: _triton().apply(*arguments),
}
# Tokens up to which "auto" can be traced as one graph anywhere; the loop's depends on the routing.
_TRACED = 8
# Tokens up to which products that read codes beat unpacking all experts first; an estimate.
_STREAMED = 512


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


def choose_backend(x: Tensor, weights: object = None) -> str:
    """Return the backend that ``"auto"`` stands for: the fastest that runs on this tensor.

    Few tokens on a GPU meet `weights` in int8 or int4 in the kernels that read these as they are.

    The environment variable LLAMA4_LAB_BACKEND, read when we are imported, can name another one.
    """
    if probe.CHOSEN != "auto":
        return probe.CHOSEN
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return "numba" if probe.LOADING.is_done() else "loop"
    in_groups = isinstance(weights, Packed) and weights.kind in ("int8", "int4")
    if x.is_cuda and in_groups and len(x) <= _STREAMED and not torch.compiler.is_compiling():
        return "triton"
    if grouped.has_fast_kernels(x):
        return "grouped"
    return _traceable(x) if torch.compiler.is_compiling() else "loop"


def _traceable(x: Tensor) -> str:
    return "gather" if len(x) <= _TRACED else "loop"


def backend_for(x: Tensor, asked: str, weights: object = None) -> str:
    """Return the backend that is asked for, or of "auto" the one that it stands for.

    Raises:
        ValueError: a backend that does not exist.
    """
    backend = choose_backend(x, weights) if asked == "auto" else asked
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose auto, {', '.join(BACKENDS)}")
    if backend == "numba" and torch.compiler.is_compiling():
        return _traceable(x)  # numba's kernels are not
    return backend


def moe(
    x: Float[Tensor, "n d"],
    router: Float[Tensor, "e d"],
    experts: tuple[
        Float[Tensor, "e f2 d"] | Packed | Mapped, Float[Tensor, "e d f"] | Packed | Mapped
    ],
    shared: tuple[
        Float[Tensor, "f d"] | Packed, Float[Tensor, "f d"] | Packed, Float[Tensor, "d f"] | Packed
    ],
    *,
    topk: int = 1,
    backend: str = "auto",
    record: Tap = NO_TAP,
) -> Float[Tensor, "n d"]:
    """Send each token through its experts and the shared expert, and add the two.

    Values inside the experts come from `loop` (who only watches them is shown `numba`'s own). The
    result is `loop`'s if one of them was changed, if the experts are in a file, or if gradients are
    recorded, so that what is shown is part of the graph; else it is that of `backend`.

    Args:
        experts: ``gate_up`` and ``down``.
        shared: the shared expert's ``gate``, ``up`` and ``down``; it is applied to every token.
        record: sees ``router.{logits, indices, scores}``, ``experts.{in, hidden, out}`` and
            ``shared.out``, with the tokens flattened to n.

    Raises:
        ValueError: a backend that does not exist, weights that do not fit, or a topk that cannot
            be.
    """
    _check_sizes(x, router, experts, shared, topk)
    backend = backend_for(x, backend, experts[0])
    if not len(x):
        backend = "loop"  # kernels expect a token
    on_disk = isinstance(experts[0], Mapped)
    inside = on_disk or any(record.watches(name) for name in INSIDE)
    # Kernels have no way back for the gradient of a value that is put in the place of theirs.
    has_gradients = torch.is_grad_enabled() and record.records() is None
    weights = router, *experts, *shared
    if backend == "numba" and not (on_disk or has_gradients) and _numba().takes(x, *weights):
        return _numba().moe(x, router, experts, shared, topk, record)
    logits = record("router.logits", F.linear(x, router))
    expert, score = route(logits, topk, record)
    order, offsets = sort(expert, len(router))
    noting = loop.Noting(record)
    routed = loop.apply(x, order, offsets, score, *experts, record=noting) if inside else None
    if routed is None or not (noting.has_changed or backend == "loop" or on_disk):
        routed = BACKENDS[backend](x, order, offsets, score, *experts)
    gate, up, down = shared
    hidden = F.silu(linear(x, gate)) * linear(x, up)
    return record("shared.out", linear(hidden, down)) + routed


def _check_sizes(
    x: Tensor,
    router: Tensor,
    experts: tuple[Tensor | Packed | Mapped, Tensor | Packed | Mapped],
    shared: tuple[Tensor | Packed, Tensor | Packed, Tensor | Packed],
    topk: int,
) -> None:
    """Refuse what compiled kernels would read beyond its end."""
    (_, d), e, f = x.shape, len(router), experts[1].shape[-1]
    found = [w.shape for w in (router, *experts, *shared)]
    fitting = [(e, d), (e, 2 * f, d), (e, d, f), (f, d), (f, d), (d, f)]
    if found != fitting:
        names = ("router", "gate_up", "down", "shared gate", "shared up", "shared down")
        wrong = next(i for i in range(6) if found[i] != fitting[i])
        raise ValueError(
            f"{names[wrong]} of shape {tuple(found[wrong])} does not fit {e} experts of width {f} "
            f"and tokens of width {d}: it must be {fitting[wrong]}"
        )
    if not 1 <= topk <= e:
        raise ValueError(f"topk={topk} is impossible with {e} experts: choose 1 to {e}")
