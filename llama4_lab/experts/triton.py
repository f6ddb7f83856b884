"""Backend on Triton kernels: weights plain or in int8, int4 or fp8, read once, unpacked on chip.

Two forms of the same products, both with static shapes and without a host sync, so that CUDA
graphs hold them:

- *rows*, for a decode step of few tokens: nothing is sorted. A program owns one token's choice and
  a block of output rows, finds its expert from the router's logits itself, and streams that
  expert's rows once. `moe_rows` is a whole MoE block in three launches (norm with router, gate and
  up, down with the sum over choices and the residual); the shared expert is number e of the stack,
  which every token visits with score one (`stack_shared`).
- *tiles*, for more tokens: slots sorted by expert. Program (i, j) takes tile i of the sorted slots,
  whose expert it finds from the offsets on the device, and tile j of the output rows. `apply` is
  the backend; `sort_logits` routes and sorts small batches in one launch.

Weights are a Tensor ``[e, out, in]`` or a `Packed` of that shape; `llama4_lab.packed` says how. In
int4 ``gate_up [e, 2f, d]`` is ``codes [e, 2f, d / 2]`` of bytes, group after group along d: byte j
of a group holds inputs j and ``j + group / 2``, so that a run of bytes meets two runs of inputs.
Its scales are ``[e, 2f, d / group]``.

``TRITON_INTERPRET=1``, set before this module is imported, runs all of it on the CPU.
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingImports=false
# (triton is not in every environment, and its decorators hide what they return)

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from jaxtyping import Float, Int
from torch import Tensor

from llama4_lab.experts import grouped
from llama4_lab.experts import triton_kernels as kernels
from llama4_lab.packed import Packed

FEW = 4  # up to so many tokens a decode step goes by rows; beyond, weights are shared by tiles
_ROWS, _GROUPS, _ROW_WARPS = 16, 4, 4  # output rows a program, groups of weights an iteration
_NARROW = 128  # output rows up to which a program owns a single one, and reads it at once: routers
_COLUMNS, _TILE_WARPS = 128, 8  # output rows a tile
_STEP = 64  # inputs an iteration of a tile, where no group of scales says otherwise
_SMALLEST_GROUP = 32  # tensor cores multiply 16 inputs at a time, and int4 has two halves


class _Weight(NamedTuple):
    """What the kernels need of a Tensor or a Packed."""

    codes: Tensor
    scales: Tensor  # of a plain tensor: the codes once more, never read
    kind: str
    group: int

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


def linear(
    x: Float[Tensor, "n k"],
    weight: "Float[Tensor, 'out k'] | Packed",
    *,
    gain: Float[Tensor, " k"] | None = None,
    eps: float = 0.0,
    residual: Float[Tensor, "n out"] | None = None,
    out: Float[Tensor, "n out"] | None = None,
) -> Float[Tensor, "n out"]:
    """Return ``x @ weight.T`` of few rows, x normed first if its norm's gain is given."""
    w, (n, k), width = _Weight.of(weight), x.shape, weight.shape[0]
    out = x.new_empty(n, width) if out is None else out
    added = out if residual is None else residual
    if n <= FEW or width <= _NARROW:
        rows = 1 if width <= _NARROW else _ROWS
        kernels.linear_rows[n, triton.cdiv(width, rows)](
            x, x if gain is None else gain, w.codes, w.scales, added, out, k, width, eps,
            gain is not None, residual is not None, w.kind, w.group, rows, _ROWS * _GROUPS // rows,
            num_warps=_ROW_WARPS,
        )  # fmt: skip
        return out
    if gain is not None:
        x = F.rms_norm(x, (k,), gain, eps)
    tile = min(64, max(16, triton.next_power_of_2(n)))
    kernels.linear_tiles[triton.cdiv(n, tile), triton.cdiv(width, _COLUMNS)](
        x, w.codes, w.scales, added, out, n, k, width, residual is not None, w.kind, w.group,
        tile, _COLUMNS, num_warps=_TILE_WARPS,
    )  # fmt: skip
    return out


def moe(
    x: Float[Tensor, "n d"],
    router: Float[Tensor, "e d"],
    gate_up: "Float[Tensor, 'stack f2 d'] | Packed",
    down: "Float[Tensor, 'stack d f'] | Packed",
    *,
    topk: int = 1,
    gain: Float[Tensor, " d"] | None = None,
    eps: float = 0.0,
    residual: Float[Tensor, "n d"] | None = None,
    logits: Float[Tensor, "n e"] | None = None,
) -> Float[Tensor, "n d"]:
    """Run a whole MoE block on few tokens: norm, router, chosen experts, shared expert, sum.

    Args:
        gate_up, down: the routed experts with the shared one behind them (`stack_shared`).
        gain: the norm's weight, where x comes before the norm.
        logits: a buffer that keeps the router's logits; `experts.route` reads choices from it.
    """
    n, d = x.shape
    if n > FEW and gain is not None:
        x, gain = F.rms_norm(x, (d,), gain, eps), None
    logits = linear(x, router, gain=gain, eps=eps, out=logits)
    if n > FEW:
        order, offsets, score = sort_logits(logits, topk)
        slots = _experts(x, order, offsets, score, *_pair(gate_up, down))
        y = slots.view(n, topk + 1, d).sum(1)
        return y if residual is None else residual + y
    w, e, width = _Weight.of(gate_up), len(router), gate_up.shape[1] // 2
    block_e = triton.next_power_of_2(e)
    hidden, out = x.new_empty(n * (topk + 1), width), torch.empty_like(x)
    kernels.gate_up_rows[n * (topk + 1), triton.cdiv(width, _ROWS)](
        x, x if gain is None else gain, logits, w.codes, w.scales, hidden, d, width, e, eps,
        gain is not None, topk, w.kind, w.group, _ROWS, _GROUPS, block_e, num_warps=_ROW_WARPS,
    )  # fmt: skip
    w = _Weight.of(down)
    kernels.down_rows[n, triton.cdiv(d, _ROWS)](
        hidden, logits, w.codes, w.scales, out if residual is None else residual, out, width, d, e,
        residual is not None, topk, w.kind, w.group, _ROWS, _GROUPS, block_e, num_warps=_ROW_WARPS,
    )  # fmt: skip
    return out


def stack_shared(
    routed: "Float[Tensor, 'e out k'] | Packed", shared: "Float[Tensor, 'out k'] | Packed"
) -> "Tensor | Packed":
    """Return the routed experts' weights with the shared expert's behind them."""
    if isinstance(routed, Packed) and isinstance(shared, Packed):
        codes = torch.cat([routed.codes, shared.codes[None]])
        return Packed(routed.kind, codes, torch.cat([routed.scales, shared.scales[None]]))
    assert isinstance(routed, Tensor) and isinstance(shared, Tensor)
    return torch.cat([routed, shared[None]])


def sort_logits(
    logits: Float[Tensor, "n e"], topk: int
) -> tuple[Int[Tensor, " m"], Int[Tensor, " ends"], Float[Tensor, " m"]]:
    """Route and sort few tokens in one launch: order and offsets as `experts.sort`, and scores.

    Each token has topk + 1 slots; the last is the shared expert's, number e, with score one.
    """
    e, m = logits.shape[1], len(logits) * (topk + 1)
    order, offsets = (
        torch.empty(size, dtype=torch.int32, device=logits.device) for size in (m, e + 2)
    )
    score = logits.new_empty(m)
    kernels.sort_logits[1,](
        logits, order, offsets, score, m, e, topk, triton.next_power_of_2(m),
        triton.next_power_of_2(e + 1), num_warps=_TILE_WARPS,
    )  # fmt: skip
    return order, offsets, score


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
    gate_up, gate_up_scales, down, down_scales = weights
    (n, d), m, e, width = x.shape, len(order), len(gate_up), gate_up.shape[1] // 2
    tile = min(128, max(16, triton.next_power_of_2(m // e)))
    tiles = min(m, m // tile + e)  # no expert begins a tile it does not need
    block_e = triton.next_power_of_2(e)
    hidden, out = x.new_empty(m, width), x.new_empty(m, d)
    kernels.gate_up_tiles[tiles, triton.cdiv(width, _COLUMNS)](
        x, order, offsets, score, gate_up, gate_up_scales, hidden, d, width, e, m // n,
        kind, groups[0], tile, _COLUMNS, block_e, num_warps=_TILE_WARPS,
    )  # fmt: skip
    kernels.down_tiles[tiles, triton.cdiv(d, _COLUMNS)](
        hidden, order, offsets, down, down_scales, out, width, d, e, kind,
        groups[1], tile, _COLUMNS, block_e, num_warps=_TILE_WARPS,
    )  # fmt: skip
    return out


@_experts.register_fake
def _(x, order, offsets, score, weights, kind, groups):
    return x.new_empty(len(order), x.shape[1])
