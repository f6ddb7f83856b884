"""The text decoder's parts, in reading order: norm, RoPE, attention, MLP, experts, layer.

Parameters carry the names of Hugging Face's checkpoints. Formulas follow Meta's release of
Llama 4 as transformers runs it; a comment says where the two differ. `linear` has the linear
layers, whose weights may be packed.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from llama4_lab import experts
from llama4_lab.cache import KVCache, Rows
from llama4_lab.config import Llama4Config
from llama4_lab.model.attention import attend, observed, visible
from llama4_lab.model.linear import Linear, Packable
from llama4_lab.points import Tap


class RMSNorm(nn.Module):
    """Root mean square norm with a weight (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        if x.is_cuda and x.dtype == self.weight.dtype:  # one kernel, which rounds once
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return unit_rms(x, self.eps) * self.weight


def unit_rms(x: Float[Tensor, "*batch d"], eps: float) -> Float[Tensor, "*batch d"]:
    """Scale the last axis to a root mean square of one, in float32."""
    if x.is_cuda:  # its kernel computes in float32 whatever it is given
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def rope_frequencies(config: Llama4Config) -> Float[Tensor, " half"]:
    """Return radians per position of each pair of a head (Su et al. 2021, eq. 15).

    With scaling, wavelengths beyond the original context are stretched by `factor`, those well
    inside are kept, and a zone between ``original/high`` and ``original/low`` is interpolated.
    Scout has low = high: no zone; nor is there one where low is above high.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    freq = 1.0 / config.rope_theta ** (half / config.head_dim)
    if (scaling := config.rope_scaling) is None:
        return freq
    turns = scaling.original_max_position_embeddings * freq / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if low >= high:
        kept = (turns > low).float()
    else:
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept * freq + (1 - kept) * freq / scaling.factor


def turns(angle: Float[Tensor, "t half"]) -> Complex[Tensor, "t half"]:
    """Return what rotates by these radians: the complex numbers of length one."""
    return torch.polar(torch.ones_like(angle), angle)


def rotate(
    x: Float[Tensor, "b t heads dh"], turn: Complex[Tensor, "t half"]
) -> Float[Tensor, "b t heads dh"]:
    """Rotate neighbouring pairs ``(x[2m], x[2m+1])`` by ``turn[t, m]``, in float32."""
    pairs = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn[:, None]).flatten(-2).to(x.dtype)


def temperature(config: Llama4Config, position: Int[Tensor, " t"]) -> Float[Tensor, " t"]:
    """Return the factor of a NoPE layer's queries: one up to `floor_scale`, then slowly more."""
    if not config.attn_temperature_tuning:
        return torch.ones_like(position, dtype=torch.float32)
    steps = ((position.float() + 1.0) / config.floor_scale).floor()
    return 1.0 + config.attn_scale * steps.log1p()


class Group(NamedTuple):
    """Batch rows with equal left padding, in one forward pass."""

    rows: Rows
    skip: int  # padding slots at the start of this pass
    start: int  # position of the pass's first real token

    def real(self, x: Float[Tensor, "b h t dh"]) -> Float[Tensor, "rows h real dh"]:
        """Cut out these rows' real tokens."""
        return x[self.rows, :, self.skip :]


@dataclass(frozen=True)
class Step:
    """What all layers share in one forward pass over t slots."""

    turn: Complex[Tensor, "t half"]  # of RoPE
    temperature: Float[Tensor, " t"]
    position: Int[Tensor, "b t"]  # of the real tokens of a row, from 0; negative on padding
    groups: list[Group]
    cache: KVCache | None
    attend: Callable[[int, Tensor, Tensor, Tensor], Tensor] | None = None  # in groups' place

    @classmethod
    def begin(
        cls, config: Llama4Config, t: int, pad: list[int], cache: KVCache | None, device: Any
    ) -> "Step":
        first = cache.slots if cache is not None else 0
        slot = torch.arange(first, first + t, device=device)
        padded: dict[int, list[int]] = {}
        for row, count in enumerate(pad):
            padded.setdefault(count, []).append(row)
        return cls(
            turn=turns(slot.float()[:, None] * rope_frequencies(config).to(device)),
            # Counts slots, padding included, as transformers does (vLLM counts tokens). It is 1
            # below floor_scale, so only left-padded batches longer than that can tell.
            temperature=temperature(config, slot),
            position=slot - torch.tensor(pad, device=device)[:, None],
            groups=[
                Group(
                    rows=slice(None) if len(rows) == len(pad) else rows,
                    skip=min(max(count - first, 0), t),
                    start=max(first - count, 0),
                )
                for count, rows in padded.items()
            ],
            cache=cache,
        )


class Attention(nn.Module):
    """Grouped-query attention: rotated and chunked, or without positions and with a temperature."""

    def __init__(self, config: Llama4Config, layer: int):
        super().__init__()
        d, dh, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = Linear(d, config.num_attention_heads * dh, bias=bias)
        self.k_proj = Linear(d, config.num_key_value_heads * dh, bias=bias)
        self.v_proj = Linear(d, config.num_key_value_heads * dh, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * dh, d, bias=bias)
        self.layer = layer
        self.head_dim = dh
        self.uses_rope = config.uses_rope(layer)
        self.chunk = config.attention_chunk(layer)
        self.use_qk_norm = config.use_qk_norm and self.uses_rope  # never on NoPE layers
        self.eps = config.rms_norm_eps

    def mix(self, x: Float[Tensor, "b t d"], step: Step, tap: Tap) -> Float[Tensor, "b t h dh"]:
        """Return what each head gathers, before `write`."""
        if not torch.compiler.is_compiling():
            self._look_for_what_is_not_called()
        q, k, v = (
            rearrange(project(x), "b t (h dh) -> b t h dh", dh=self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = tap("attn.q", q), tap("attn.k", k), tap("attn.v", v)
        if self.uses_rope:
            q, k = rotate(q, step.turn), rotate(k, step.turn)
            if self.use_qk_norm:  # after the rotation, without weights, each head by itself
                q, k = unit_rms(q, self.eps), unit_rms(k, self.eps)
        else:
            q = (q * step.temperature[:, None, None]).to(q.dtype)
        q, k = tap("attn.rot_q", q), tap("attn.rot_k", k)
        q, k, v = (rearrange(y, "b t h dh -> b h t dh") for y in (q, k, v))
        watched = tap.watches("attn.scores") or tap.watches("attn.pattern")
        z = self.attend_watched(q, k, v, step, tap) if watched else self.attend(q, k, v, step)
        if step.cache is not None:
            cache = step.cache.layers[self.layer]
            for group in step.groups:
                cache.write(group.rows, group.start, group.real(k), group.real(v))
        return rearrange(z, "b h t dh -> b t h dh")

    def write(self, z: Float[Tensor, "b t h dh"], tap: Tap) -> Float[Tensor, "b t d"]:
        """Return what the heads add to the residual stream."""
        z = tap("attn.z", z)
        return tap("attn.out", self.o_proj(rearrange(z, "b t h dh -> b t (h dh)")))

    def past(self, k: Tensor, v: Tensor, step: Step, group: Group) -> tuple[Tensor, Tensor]:
        """Return the keys and values that a group of rows had before, ``[rows k s dh]``."""
        if step.cache is None:
            return k[group.rows, :, :0], v[group.rows, :, :0]
        keys, values = step.cache.layers[self.layer].live(group.rows, group.start)
        return keys.to(k.dtype), values.to(v.dtype)  # a cache may have another dtype

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """Return what queries ``[b h t dh]`` gather, each group with its past; padding zeros."""
        if step.attend is not None:
            return step.attend(self.layer, q, k, v)
        parts = []
        for group in step.groups:
            past_k, past_v = self.past(k, v, step, group)
            real_q, real_k, real_v = (group.real(x) for x in (q, k, v))
            parts.append(attend(real_q, real_k, real_v, past_k, past_v, self.chunk))
        if len(parts) == 1 and parts[0].shape == q.shape:
            return parts[0]
        z = torch.zeros_like(q)
        for group, part in zip(step.groups, parts, strict=True):
            z[group.rows, :, group.skip :] = part
        return z

    def attend_watched(self, q: Tensor, k: Tensor, v: Tensor, step: Step, tap: Tap) -> Tensor:
        """Attend through explicit scores; s ends with the step's own t slots."""
        pasts = [self.past(k, v, step, group) for group in step.groups]
        longest = max(past_k.shape[2] for past_k, _ in pasts)
        all_k, all_v = (F.pad(y, (0, 0, longest, 0)) for y in (k, v))
        before = torch.arange(-longest, 0, device=q.device) + step.position[:, :1]
        mask = visible(step.position, torch.cat([before, step.position], dim=1), self.chunk)
        for group, (past_k, past_v) in zip(step.groups, pasts, strict=True):
            # A row's past ends where its first real token begins; this step's padding is unseen.
            end = longest + group.skip
            begin = end - past_k.shape[2]
            all_k[group.rows, :, begin:end] = past_k
            all_v[group.rows, :, begin:end] = past_v
        return observed(q, all_k, all_v, mask, tap)

    def _look_for_what_is_not_called(self) -> None:
        if self._forward_hooks or self._forward_pre_hooks or "forward" in vars(self):
            warnings.warn(
                "a hook on self_attn, or a forward that was put there, is not called: the layer "
                "calls mix and write; use llama4_lab.trace or intervene, or a hook on the layer",
                stacklevel=3,
            )


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, eq. 6): ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = Linear(width, hidden, bias=False)
        self.up_proj = Linear(width, hidden, bias=False)
        self.down_proj = Linear(hidden, width, bias=False)

    def hidden(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch f"]:
        return F.silu(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return self.down_proj(self.hidden(x))


class DenseBlock(MLP):
    """The feed-forward part of a dense layer."""

    def forward(self, x: Float[Tensor, "b t d"], tap: Tap, backend: str) -> Float[Tensor, "b t d"]:
        return tap("mlp.out", self.down_proj(tap("mlp.hidden", self.hidden(x))))


class Router(nn.Module):
    """Holds ``weight [e, d]``; the logits are ``x @ weight.T``."""

    def __init__(self, num_experts: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width))


class Experts(Packable):
    """The routed experts' weights; the checkpoint stores both matrices transposed."""

    def __init__(self, num_experts: int, width: int, hidden: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * hidden, width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, hidden))


class MoEBlock(nn.Module):
    """The feed-forward part of a MoE layer: the chosen experts plus the shared expert.

    The weights of its parts are read, the parts themselves are not called: their values have points
    of their own, and hooks on them are warned of.
    """

    def __init__(self, config: Llama4Config):
        super().__init__()
        d, f, e = config.hidden_size, config.intermediate_size, config.num_local_experts
        self.router = Router(e, d)
        self.experts = Experts(e, d, f)
        self.shared_expert = MLP(d, f)
        self.topk = config.num_experts_per_tok

    def forward(self, x: Float[Tensor, "b t d"], tap: Tap, backend: str) -> Float[Tensor, "b t d"]:
        shared = self.shared_expert
        if not torch.compiler.is_compiling():
            self._look_for_what_is_not_read()
        out = experts.moe(
            x.flatten(0, 1),
            self.router.weight,
            (self.experts.gate_up_proj, self.experts.down_proj),
            (shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight),
            topk=self.topk,
            backend=backend,
            record=tap if type(tap) is Tap else _PerToken(tap, x.shape[:2]),
        )
        return out.view_as(x)

    def _look_for_what_is_not_read(self) -> None:
        read = {f"shared_expert.{name}": x for name, x in self.shared_expert._modules.items()}
        for name, part in (self._modules | read).items():
            assert part is not None
            if part._forward_hooks or part._forward_pre_hooks:
                warnings.warn(
                    f"a hook on {name} of a MoE block is not called: the block reads the weights "
                    "of its parts; use llama4_lab.trace or intervene, or a hook on the block",
                    stacklevel=2,
                )
            has_bias = getattr(part, "bias", None) is not None
            if has_bias or "forward" in vars(part) or type(part).forward not in _UNCALLED:
                what = "a bias" if has_bias else f"a forward of its own ({type(part).__name__})"
                raise ValueError(
                    f"{name} of a MoE block has {what}, and the block reads only weights: "
                    "remove it, parametrize the weight, or change shared.out by "
                    "llama4_lab.intervene"
                )


_UNCALLED = {part.forward for part in (nn.Module, nn.Linear, Linear, MLP)}  # what weights tell


class _PerToken(Tap):
    """Shows values of flattened tokens ``[n, …]`` to a tap as ``[b, t, …]``."""

    def __init__(self, tap: Tap, shape: torch.Size):
        self.tap = tap
        self.shape = shape
        self.watches, self.records, self.alters = tap.watches, tap.records, tap.alters

    def __call__(self, name: str, value: Tensor) -> Tensor:
        shown = value.unflatten(0, self.shape)
        given = self.tap(name, shown)
        # What is kept has to be what goes on, or it would have no gradient.
        return given.flatten(0, 1) if given is not shown or given.requires_grad else value


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each added to the residual stream after a norm of its input."""

    def __init__(self, config: Llama4Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = (
            MoEBlock(config)
            if config.is_moe(layer)
            else DenseBlock(config.hidden_size, config.intermediate_size_mlp)
        )

    def forward(
        self, x: Float[Tensor, "b t d"], step: Step, tap: Tap, backend: str
    ) -> Float[Tensor, "b t d"]:
        x, z = self.mix(x, step, tap)
        return self.feed(self.write(x, z, tap), tap, backend)

    # The three parts of `forward`; an edited run can begin at each of them.

    def mix(
        self, x: Float[Tensor, "b t d"], step: Step, tap: Tap
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b t h dh"]]:
        x = tap("resid_pre", x)
        return x, self.self_attn.mix(self.input_layernorm(x), step, tap)

    def write(
        self, x: Float[Tensor, "b t d"], z: Float[Tensor, "b t h dh"], tap: Tap
    ) -> Float[Tensor, "b t d"]:
        return x + self.self_attn.write(z, tap)

    def feed(self, x: Float[Tensor, "b t d"], tap: Tap, backend: str) -> Float[Tensor, "b t d"]:
        x = tap("resid_mid", x)
        x = x + self.feed_forward(self.post_attention_layernorm(x), tap, backend)
        return tap("resid_post", x)
