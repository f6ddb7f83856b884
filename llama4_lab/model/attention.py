"""Causal attention inside chunks (RoPE layers) or over the whole past (NoPE layers).

`attention_kernel` holds a faster path for many queries on a CPU; it is imported, and compiled, at
first use.
"""

from functools import cache, partial
from itertools import product

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from llama4_lab.experts import probe
from llama4_lab.loading import Loading
from llama4_lab.packed import are_only_values
from llama4_lab.points import Tap

_MANY = 32  # queries from which the kernel is faster
_FEWEST = 256  # that it is called for, if there are as many: each call packs the keys anew
_AT_ONCE = 4096  # that it is called for: after a call, what runs can be interrupted


def attend(
    q: Float[Tensor, "b h t dh"],
    k: Float[Tensor, "b k t dh"],
    v: Float[Tensor, "b k t dh"],
    past_k: Float[Tensor, "b k p dh"],
    past_v: Float[Tensor, "b k p dh"],
    chunk: int | None = None,
) -> Float[Tensor, "b h t dh"]:
    """Attend causally, inside chunks of `chunk` tokens if it is given, without ever making a mask.

    The new tokens first complete the chunk that the past began. Whole chunks behind it are folded
    into the batch, because no chunk sees another, and the tail is a batch of its own.
    """
    t, seen = k.shape[2], past_k.shape[2]
    is_shared = seen > 0 and len(q) > 1 and past_k.stride(0) == past_v.stride(0) == 0
    # Explicit scores are smaller than a copy of the past for each row up to so many new tokens.
    if is_shared and t <= q.shape[-1] // 2 and (chunk is None or seen + t <= chunk):
        return after_shared_past(q, k, v, past_k[0], past_v[0])
    if seen:
        k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
    if chunk is None or seen + t <= chunk:
        return causal(q, k, v)
    parts = []
    if seen:
        head = chunk - seen
        parts.append(causal(q[:, :, :head], k[:, :, :chunk], v[:, :, :chunk]))
        q, k, v = q[:, :, head:], k[:, :, chunk:], v[:, :, chunk:]
    if whole := q.shape[2] // chunk * chunk:
        folded = (
            rearrange(x[:, :, :whole], "b h (n c) dh -> (b n) h c dh", c=chunk) for x in (q, k, v)
        )
        parts.append(rearrange(causal(*folded), "(b n) h c dh -> b h (n c) dh", b=len(q)))
    if whole < q.shape[2]:
        parts.append(causal(q[:, :, whole:], k[:, :, whole:], v[:, :, whole:]))
    return torch.cat(parts, dim=2)


def after_shared_past(
    q: Float[Tensor, "b h t dh"],
    k: Float[Tensor, "b k t dh"],
    v: Float[Tensor, "b k t dh"],
    past_k: Float[Tensor, "k p dh"],
    past_v: Float[Tensor, "k p dh"],
) -> Float[Tensor, "b h t dh"]:
    """Attend causally behind a past that all rows share, which is read once and never copied."""
    b, t, seen, heads = len(q), q.shape[2], past_k.shape[1], len(past_k)
    q = rearrange(q * q.shape[-1] ** -0.5, "b (k g) t dh -> k b (g t) dh", k=heads)
    k, v = (rearrange(x, "b k t dh -> k b t dh") for x in (k, v))
    own = q @ k.mT
    if t > 1:
        later = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
        own = own.unflatten(2, (-1, t)).masked_fill(later, float("-inf")).flatten(2, 3)
    past = (q.flatten(1, 2) @ past_k.mT).unflatten(1, (b, -1))
    pattern = torch.cat([past, own], dim=-1).softmax(dim=-1)
    z = (pattern[..., :seen].flatten(1, 2) @ past_v).unflatten(1, (b, -1)) + pattern[..., seen:] @ v
    return rearrange(z, "k b (g t) dh -> b (k g) t dh", t=t)


def causal(
    q: Float[Tensor, "b h t dh"], k: Float[Tensor, "b k s dh"], v: Float[Tensor, "b k s dh"]
) -> Float[Tensor, "b h t dh"]:
    """Attend from the last t of s positions to all positions up to their own."""
    t, s = q.shape[2], k.shape[2]
    if _is_for_kernel(q, k, v):
        return _by_kernel(q, k, v, before=s - t)
    k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
    mask = None
    if 1 < t < s:
        from torch.nn.attention.bias import causal_lower_right  # imports triton where there is one

        mask = causal_lower_right(t, s)
    if t == s > 1:  # a branch, because torch.compile takes no symbolic flag
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def full(
    q: Float[Tensor, "b h t dh"], k: Float[Tensor, "b k s dh"], v: Float[Tensor, "b k s dh"]
) -> Float[Tensor, "b h t dh"]:
    """Attend from all positions to all others."""
    if _is_for_kernel(q, k, v):
        return _by_kernel(q, k, v, before=k.shape[2])
    heads = q.shape[1]
    return F.scaled_dot_product_attention(q, expand_heads(k, heads), expand_heads(v, heads))


def expand_heads(x: Float[Tensor, "b k s dh"], heads: int) -> Float[Tensor, "b h s dh"]:
    """Repeat key/value head j for the query heads j·h/k … (j+1)·h/k − 1."""
    groups = heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def visible(
    q_position: Int[Tensor, "b t"], k_position: Int[Tensor, "b s"], chunk: int | None
) -> Bool[Tensor, "b t s"]:
    """Say which key each query may see; positions count real tokens, padding is negative."""
    q, k = q_position[:, :, None], k_position[:, None, :]
    seen = (k <= q) & (k >= 0)
    return seen if chunk is None else seen & (k // chunk == q // chunk)


def observed(
    q: Float[Tensor, "b h t dh"],
    k: Float[Tensor, "b k s dh"],
    v: Float[Tensor, "b k s dh"],
    mask: Bool[Tensor, "b t s"] | None,
    tap: Tap,
) -> Float[Tensor, "b h t dh"]:
    """Attend with explicit scores and pattern, so that they can be watched and changed.

    Needs memory for ``b h t s`` numbers. A query that sees nothing (padding) gets zeros.
    """
    k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
    scores = torch.einsum("bhtx,bhsx->bhts", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    scores = tap("attn.scores", scores)
    pattern = tap("attn.pattern", scores.softmax(dim=-1).nan_to_num(0.0))
    return pattern @ v


# ---- by compiled code


def _is_for_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel takes these and is faster than PyTorch."""
    given = q, k, v
    return (
        q.shape[2] >= _MANY
        and all(x.dtype == torch.float32 and x.stride(-1) == 1 for x in given)
        and are_only_values(*given)
        and not torch.is_autocast_enabled("cpu")
        and (LOADING.is_done() if probe.CHOSEN == "auto" else probe.CHOSEN == "numba")
        and _has_wide_vectors()
    )


def _by_kernel(q: Tensor, k: Tensor, v: Tensor, before: int) -> Tensor:
    """Attend by compiled code; the first query sees `before` keys and the one behind them."""
    if has_torch_function_unary(q):  # what watches torch's functions sees this as one of them
        return handle_torch_function(_by_kernel, (q, k, v), q, k, v, before)
    from llama4_lab.compiled import beside, threads
    from llama4_lab.model.attention_kernel import attend

    (b, heads, t, dh), (_, kv_heads, s, _) = q.shape, k.shape
    out = torch.empty(b, t, heads, dh, dtype=torch.float32, device="cpu").transpose(1, 2)
    given = q, k, v, out
    places = tuple(x.data_ptr() for x in given)
    strides = tuple(x.stride()[:3] for x in given)
    sizes = heads // kv_heads, s, dh
    pairs, shares = list(product(range(b), range(kv_heads))), threads(b * heads * t * s * dh)
    step = _AT_ONCE if shares <= len(pairs) else _FEWEST
    parts = [(*pair, i, min(i + step, t)) for i in range(0, t, step) for pair in pairs]

    def some(parts: list[tuple[int, int, int, int]]) -> None:
        for part in parts:
            attend(places, strides, sizes, before, *part)

    beside(partial(some, parts[i::shares]) for i in range(min(shares, len(parts))))
    return out


@cache
def _has_wide_vectors() -> bool:
    """Whether vectors have 512 bits.

    With half of them, exponentials take as much time as is gained where heads are narrow: narrowed
    to that, a machine took 0.8 to 1.4 times PyTorch's speed for heads of 16 to 64.
    """
    from llama4_lab.compiled import LANES

    return LANES == 16


def _load() -> None:
    if not _has_wide_vectors():
        return
    x = torch.zeros(1, 1, _MANY, 2, dtype=torch.float32, device="cpu")
    _by_kernel(x, x, x, before=0)


def _is_kept() -> bool:
    from llama4_lab.compiled import is_kept
    from llama4_lab.model.attention_kernel import attend

    return is_kept(attend) or not _has_wide_vectors()


LOADING = Loading("compiling attention", _load, _is_kept)
