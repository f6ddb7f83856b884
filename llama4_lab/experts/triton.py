"""Backend on Triton kernels: weights plain or in int8, int4 or fp8, read once, unpacked on chip.

Everything has static shapes and no host sync, so that CUDA graphs hold it:

- `apply` is the backend. Slots are sorted by expert; program (i, j) takes tile i of the sorted
  slots, whose expert it finds from the offsets on the device, and block j of the output rows.
- `linear` and `moe` are the parts of a decode step. Up to 8 tokens nothing is sorted: a MoE block
  is four launches (router; gate and up; down; the sum over choices with the residual). The
  shared expert is number e of the stack, which every token visits with score one (`stack_shared`).

A norm is begun by what writes its input and ended by what reads it: `Half` says how. The kernels of
a step overlap on Hopper: each is started before the one ahead has ended, and then waits for it
(programmatic dependent launch).

Weights are a Tensor ``[e, out, in]`` or a `Packed` of that shape; `llama4_lab.packed` says how. In
int4 ``gate_up [e, 2f, d]`` is ``codes [e, 2f, d / 2]`` of bytes, group after group along d: byte j
of a group holds inputs j and ``j + group / 2``, so that a run of bytes meets two runs of inputs.
Its scales are ``[e, 2f, d / group]``.

``TRITON_INTERPRET=1``, set before this module is imported, runs all of it on the CPU.
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingImports=false
# (triton is not in every environment, and its decorators hide what they return)

from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from llama4_lab.experts import grouped
from llama4_lab.experts import triton_kernels as kernels
from llama4_lab.packed import Packed, cat

FEW = 8  # tokens that tensor cores take at the least; so many meet an expert in one go
_NARROW = 128  # output rows up to which a program owns a single one: routers
_NARROW_STEP, _NARROW_WARPS = 8192, 8
_STEP = 64  # inputs an iteration, where no group of scales says otherwise
_SMALLEST_GROUP = 32  # tensor cores multiply 16 inputs at a time, and int4 has two halves
_LARGEST_TILE = 64


class Shape(NamedTuple):
    """How a program of a tile of tokens is cut."""

    rows: int
    split: int  # groups that are multiplied at a time
    warps: int
    stages: int  # iterations that are loaded ahead


# By the tokens of a tile, or more; and for a single token by the rows, or more, that it meets.
SHAPES = {64: Shape(64, 1, 4, 4), 2: Shape(32, 4, 4, 3)}
_OF_ONE = {1 << 16: Shape(32, 4, 4, 4), 1 << 13: Shape(16, 4, 4, 4), 0: Shape(16, 8, 8, 3)}


class Half(NamedTuple):
    """Rows in the middle of a norm: multiplied by its gain, not yet over their root mean square."""

    rows: Float[Tensor, "n k"]
    squares: Float[Tensor, "n parts"]  # float32; sums over parts of the rows before the gain
    eps: float


Norm = tuple[Tensor, float]  # gain and eps


class _Weight(NamedTuple):
    """What the kernels need of a Tensor or a Packed."""

    codes: Tensor
    scales: Tensor  # of a plain tensor: the codes once more, never read
    kind: str
    group: int

    def cut(self, k: int, shape: Shape) -> tuple[str, int, int, bool, int]:
        """Return the kernels' arguments about a product of k inputs."""
        even = k % (self.group * shape.split) == 0
        return self.kind, self.group, shape.split, even, shape.rows

    @classmethod
    def of(cls, weight: "Tensor | Packed") -> "_Weight":
        if isinstance(weight, Tensor):
            return cls(weight.detach(), weight.detach(), "plain", _STEP)
        group = _STEP if weight.kind == "fp8" else weight.group
        if not _fits(weight):
            raise ValueError(
                f"{weight.kind} weights in groups of {group} do not fit the Triton kernels: "
                f"pack them in groups of 2^i, {_SMALLEST_GROUP} at least"
            )
        return cls(weight.codes, weight.scales, weight.kind, group)


def can_run(x: Tensor, *weights: "Tensor | Packed") -> bool:
    """Whether the kernels take this: on a GPU or interpreted, no gradients, groups of 2^i ≥ 32."""
    # The interpreter multiplies bfloat16 tiles wrongly (numpy has no such numbers).
    on = x.is_cuda or (triton.knobs.runtime.interpret and x.dtype != torch.bfloat16)
    needs_grad = torch.is_grad_enabled() and any(
        y.requires_grad for y in (x, *weights) if isinstance(y, Tensor)
    )
    return on and not needs_grad and all(isinstance(w, Tensor) or _fits(w) for w in weights)


def _fits(weight: Packed) -> bool:
    group = weight.group
    return weight.kind == "fp8" or (group >= _SMALLEST_GROUP and group & (group - 1) == 0)


def apply(
    x: Float[Tensor, "n d"],
    order: Int[Tensor, " m"],
    offsets: Int[Tensor, " ends"],
    score: Float[Tensor, "n topk"],
    gate_up: "Float[Tensor, 'e f2 d'] | Packed",
    down: "Float[Tensor, 'e d f'] | Packed",
) -> Float[Tensor, "n d"]:
    """Equal `loop.apply`; where the kernels cannot run, `grouped` does."""
    if not can_run(x, gate_up, down):
        return grouped.apply(x, order, offsets, score, gate_up, down)
    slots = _experts(x.contiguous(), order, offsets, score.flatten(), *_pair(gate_up, down))
    return slots.view(*score.shape, -1).sum(1) if score.shape[1] > 1 else slots


# ---- parts of a decode step


def half_norm(
    x: Float[Tensor, "n slots d"], norm: Norm, residual: Float[Tensor, "n d"] | None = None
) -> tuple[Float[Tensor, "n d"], Half]:
    """Return the sum of each token's slots and its residual, and begin a norm of it."""
    n, slots, d = x.shape
    out = x.new_empty(n, d)
    half = Half(torch.empty_like(out), out.new_empty(n, 1, dtype=torch.float32), norm[1])
    block = min(_NARROW_STEP, triton.next_power_of_2(d))
    kernels.half_norm[n,](
        x, out if residual is None else residual, norm[0], out, half.rows, half.squares, d, slots,
        residual is not None, block, **launch(x, _NARROW_WARPS),
    )  # fmt: skip
    return out, half


def linear(
    x: "Float[Tensor, 'n k'] | Half",
    weight: "Float[Tensor, 'out k'] | Packed",
    *,
    residual: Float[Tensor, "n out"] | None = None,
    norm: Norm | None = None,
    out: Float[Tensor, "n out"] | None = None,
) -> Any:
    """Return ``x @ weight.T``, plus the residual if there is one.

    A `Half` normed x is used as if its norm were done. With `norm`, return a pair: the sum, and it
    half normed.
    """
    w, (rows, *begun) = _Weight.of(weight), _input(x)
    (n, k), width = rows.shape, weight.shape[0]
    out = rows.new_empty(n, width) if out is None else out
    if width <= _NARROW and residual is None and norm is None and w.kind == "plain":
        block = min(_NARROW_STEP, triton.next_power_of_2(k))
        kernels.narrow[n, width](
            rows, begun[0], w.codes, out, k, *begun[1:4], block, begun[4],
            **launch(rows, _NARROW_WARPS),
        )  # fmt: skip
        return out
    shape, tile = _shape(n, width)
    blocks = triton.cdiv(width, shape.rows)
    added, end = _ending(out, residual, norm, blocks)
    kernels.linear[blocks, triton.cdiv(n, tile)](
        rows, begun[0], w.codes, w.scales, added, *end[:4], n, k, width, *begun[1:4],
        residual is not None, norm is not None, *w.cut(k, shape), tile, begun[4],
        **launch(rows, shape.warps, shape.stages),
    )  # fmt: skip
    return out if norm is None else (out, Half(end[2], end[3], norm[1]))


def moe(
    x: "Float[Tensor, 'n d'] | Half",
    router: Float[Tensor, "e d"],
    gate_up: "Float[Tensor, 'stack f2 d'] | Packed",
    down: "Float[Tensor, 'stack d f'] | Packed",
    *,
    topk: int = 1,
    residual: Float[Tensor, "n d"] | None = None,
    norm: Norm | None = None,
    logits: Float[Tensor, "n e"] | None = None,
) -> Any:
    """Run a whole MoE block on few tokens: router, chosen experts, shared expert, sum.

    Args:
        x, residual, norm: as for `linear`.
        gate_up, down: the routed experts with the shared one behind them (`stack_shared`).
        logits: a buffer that keeps the router's logits; `experts.route` reads choices from it.
    """
    kept: Tensor = linear(x, router, out=logits)
    rows, *begun = _input(x)
    n, d = rows.shape
    if n > FEW:
        order, offsets, score = sort_logits(kept, topk, x if isinstance(x, Half) else None)
        slots = _experts(rows, order, offsets, score, *_pair(gate_up, down))
    else:
        w, e, width = _Weight.of(gate_up), len(router), gate_up.shape[1] // 2
        (shape, tile), block_e = _shape(n, 2 * width * (topk + 1)), triton.next_power_of_2(e)
        hidden, slots = (rows.new_empty(n * (topk + 1), size) for size in (width, d))
        kernels.gate_up[n * (topk + 1), triton.cdiv(width, shape.rows // 2)](
            rows, begun[0], kept, w.codes, w.scales, hidden, n, d, width, e, *begun[1:4], topk,
            *w.cut(d, shape), tile, block_e, begun[4], **launch(rows, shape.warps, shape.stages),
        )  # fmt: skip
        w, (shape, tile) = _Weight.of(down), _shape(n, d * (topk + 1))
        kernels.down[n * (topk + 1), triton.cdiv(d, shape.rows)](
            hidden, kept, w.codes, w.scales, slots, n, width, d, e, topk, *w.cut(width, shape),
            tile, block_e, **launch(rows, shape.warps, shape.stages),
        )  # fmt: skip
    slots = slots.view(n, topk + 1, d)
    if norm is not None:
        return half_norm(slots, norm, residual)
    return slots.sum(1) if residual is None else residual + slots.sum(1)


def stack_shared(
    routed: "Float[Tensor, 'e out k'] | Packed", shared: "Float[Tensor, 'out k'] | Packed"
) -> "Tensor | Packed":
    """Return the routed experts' weights with the shared expert's behind them."""
    return cat([routed, shared[None]])


def sort_logits(
    logits: Float[Tensor, "n e"], topk: int, half: Half | None = None
) -> tuple[Int[Tensor, " m"], Int[Tensor, " ends"], Float[Tensor, " m"]]:
    """Route and sort few tokens in one launch: order and offsets as `experts.sort`, and scores.

    Each token has topk + 1 slots; the last is the shared expert's, number e, with score one. Scores
    multiply an expert's input, and so they take over what is left of a `half` done norm.
    """
    e, m = logits.shape[1], len(logits) * (topk + 1)
    order, offsets = (
        torch.empty(size, dtype=torch.int32, device=logits.device) for size in (m, e + 2)
    )
    score = torch.empty(m, device=logits.device)
    squares, parts, eps, is_normed, block = _input(logits if half is None else half)[1:]
    kernels.sort_logits[1,](
        logits, squares, order, offsets, score, m, 0 if half is None else half.rows.shape[1], e,
        parts, eps, is_normed, topk, triton.next_power_of_2(m), triton.next_power_of_2(e + 1),
        block, **launch(logits, 8),
    )  # fmt: skip
    return order, offsets, score


# ---- launches


def _input(x: "Tensor | Half") -> tuple[Tensor, Tensor, int, float, bool, int]:
    """Return rows, and what kernels take to end a norm: squares, parts, eps, whether, block."""
    if isinstance(x, Tensor):
        return x, x, 1, 0.0, False, 1
    parts = x.squares.shape[1]
    return x.rows, x.squares, parts, x.eps, True, triton.next_power_of_2(parts)


def _ending(
    out: Tensor, residual: Tensor | None, norm: Norm | None, blocks: int
) -> tuple[Tensor, list[Tensor]]:
    """Return the residual, and gain, out, room for rows and squares; or stand-ins for them."""
    if norm is None:
        return out if residual is None else residual, [out, out, out, out]
    squares = torch.empty(len(out), blocks, device=out.device)
    return out if residual is None else residual, [norm[0], out, torch.empty_like(out), squares]


def _shape(n: int, rows: int = 0) -> tuple[Shape, int]:
    """Return the shape for n tokens that meet so many rows of weights, and the tokens of a tile."""
    tile = min(_LARGEST_TILE, triton.next_power_of_2(n))
    shapes, size = (SHAPES, tile) if tile > 1 else (_OF_ONE, rows)
    return next(shape for least, shape in shapes.items() if size >= least), tile


def launch(x: Tensor, warps: int, stages: int = 3) -> dict[str, Any]:
    """Return a launch's options: on Hopper it may begin before the kernel ahead of it has ended."""
    overlaps = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    options = {"OVERLAPS": overlaps, "num_warps": warps, "num_stages": stages}
    return options | {"launch_pdl": True} if overlaps else options


def _pair(
    gate_up: "Tensor | Packed", down: "Tensor | Packed"
) -> tuple[list[Tensor], str, list[int]]:
    first, second = _Weight.of(gate_up), _Weight.of(down)
    assert first.kind == second.kind
    return [*first[:2], *second[:2]], first.kind, [first.group, second.group]


@torch.library.custom_op("llama4_lab::experts", mutates_args=())
def _experts(
    x: Tensor, order: Tensor, offsets: Tensor, score: Tensor, weights: list[Tensor], kind: str,
    groups: list[int],
) -> Tensor:  # fmt: skip
    """Return each slot's expert output ``[m, d]``; an operator, so that torch.compile sees one."""
    gate_up = _Weight(weights[0], weights[1], kind, groups[0])
    down = _Weight(weights[2], weights[3], kind, groups[1])
    (n, d), m, e = x.shape, len(order), len(gate_up.codes)
    width = gate_up.codes.shape[1] // 2
    shape, tile = _shape(max(FEW, m // e))
    tiles = min(m, m // tile + e)  # no expert begins a tile it does not need
    block_e = triton.next_power_of_2(e)
    hidden, out = x.new_empty(m, width), x.new_empty(m, d)
    options = {"num_warps": shape.warps, "num_stages": shape.stages}
    kernels.gate_up_tiles[tiles, triton.cdiv(width, shape.rows // 2)](
        x, order, offsets, score, *gate_up[:2], hidden, d, width, e, m // n,
        *gate_up.cut(d, shape), tile, block_e, **options,
    )  # fmt: skip
    kernels.down_tiles[tiles, triton.cdiv(d, shape.rows)](
        hidden, order, offsets, *down[:2], out, width, d, e, *down.cut(width, shape), tile, block_e,
        **options,
    )  # fmt: skip
    return out


@_experts.register_fake
def _(x, order, offsets, score, weights, kind, groups):
    return x.new_empty(len(order), x.shape[1])
