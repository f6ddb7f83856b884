"""Decoding with static shapes: buffers that never move, one graph for every step.

    decoder = StaticDecoder(model, batch_size=1, max_len=4096)
    logits = decoder.prefill(ids)          # [b, v], the plain model writing to the static buffers
    logits = decoder.step(chosen)          # [b, v], chosen [b]; on CUDA a replayed graph
    decoder.routed                         # router logits of the last step, [moe layers, b, e]

A `StaticDecoder` also stands in for its model in `llama4_lab.generate`. A layer's buffer holds a
chunk or the whole length; positions live on the device, so a step is the same work every time.
``kernels="torch"`` runs the model's own layers, with attention as in `attend_live`; it compiles
into one graph (``compile=True``). ``kernels="triton"`` runs eight kernels a MoE layer: q, k and v;
two of attention; o with the residual; router; gate and up; down; the sum. What writes the residual
stream begins the norm that follows. Both equal the plain model token by token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llama4_lab.cache import KVCache
from llama4_lab.model import one_token
from llama4_lab.model.linear import Packable
from llama4_lab.model.llama4 import Llama4
from llama4_lab.model.text import (
    DecoderLayer,
    MoEBlock,
    RMSNorm,
    Step,
    rope_frequencies,
    temperature,
    turns,
)
from llama4_lab.packed import Packed, cat
from llama4_lab.points import Tap

KERNELS = ("torch", "triton")
_WARM_UP = 3  # steps before a graph is captured: libraries make their workspaces, Triton compiles


class StaticDecoder:
    """A model with a cache of fixed size that decodes `batch_size` rows, one token at a time.

    Args:
        max_len: tokens of a row, prompt included.
        kernels: None takes Triton's on a GPU, else torch's, and so for a model with a module that
            was replaced, hooked or patched: Triton's call none. They need a packing that all
            matrices of a layer share, and join them: the model's weights become views.
        compile: whether torch.compile makes the step one graph, for ``kernels="torch"``.
        graph: whether steps replay a CUDA graph; None does on CUDA.

    Raises:
        TypeError: a step's ids that are no whole numbers.
        ValueError: kernels that do not exist or cannot run this model, or a prompt or step that
            does not fit.
    """

    def __init__(
        self,
        model: Llama4,
        batch_size: int = 1,
        max_len: int = 4096,
        *,
        kernels: str | None = None,
        compile: bool = False,
        graph: bool | None = None,
    ):
        device, config = model.device, model.config
        if max_len < 1:
            raise ValueError(f"max_len {max_len} has room for no token: give 1 or more")
        parts = [*model.layers.modules(), model.norm, model.lm_head]
        if kernels is None:
            is_alone = device.type == "cuda" and model.ranks.size == 1
            kernels = "triton" if is_alone and one_token.are_as_written(parts) else "torch"
        if kernels not in KERNELS:
            raise ValueError(f"unknown kernels {kernels!r}; choose {', '.join(KERNELS)}")
        if kernels == "triton" and model.ranks.size > 1:
            raise ValueError(
                f"kernels='triton' do not add up what {model.ranks.size} ranks compute: choose "
                "kernels='torch'"
            )
        if kernels == "triton" and not one_token.are_as_written(parts):
            raise ValueError(
                "kernels='triton' read weights and call no module, and one of this model's was "
                "replaced, hooked or patched: undo that, or choose kernels='torch'"
            )
        self.model = model
        self.max_len = max_len
        self.cache = model.new_cache(batch_size)
        for layer in self.cache.layers:
            size = max_len if layer.chunk is None else min(max_len, layer.chunk)
            *shape, _, width = layer.buffer.shape
            layer.buffer = layer.buffer.new_zeros(*shape, size, width)
        self.ids = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.slot = torch.zeros((), dtype=torch.long, device=device)
        self.pad = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.told = 0, [0] * batch_size  # the cache's slots and padding, as the device has them
        self.frequencies = rope_frequencies(config).to(device)
        routers = sum(isinstance(layer.feed_forward, MoEBlock) for layer in _layers(model))
        shape = (routers, batch_size, config.num_local_experts)
        self.routed = torch.zeros(shape, dtype=model.dtype, device=device)
        for tensor in (self.ids, self.slot, self.pad, self.frequencies, self.routed):
            torch._dynamo.mark_static_address(tensor)
        for layer in self.cache.layers:
            torch._dynamo.mark_static_address(layer.buffer)
        if kernels == "triton":
            self.joined = [_Joined.of(layer) for layer in _layers(model)]
            self.run: Callable[[], Tensor] = self._fused
        else:
            self.run = torch.compile(self._plain, fullgraph=True) if compile else self._plain
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda" if graph is None else graph:
            self._capture()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)  # config, tokenizer, prompt, device, …

    def __call__(
        self, input_ids: Int[Tensor, "b t"], cache: KVCache | None = None, **given: Any
    ) -> Float[Tensor, "b 1 v"]:
        """As the model's forward, for `llama4_lab.generate`; the cache is the decoder's own."""
        if given.pop("keep_last", 1) != 1 or cache is not self.cache:
            raise ValueError("a StaticDecoder returns the last logits and has its own cache")
        if self.cache.slots and input_ids.shape[1] == 1 and not given:
            return self.step(input_ids[:, 0])[:, None]
        return self.prefill(input_ids, **given)[:, None]

    def new_cache(self, batch_size: int = 1) -> KVCache:
        """Empty the static cache and return it."""
        if batch_size != self.cache.batch_size:
            raise ValueError(
                f"this decoder is for {self.cache.batch_size} rows, not {batch_size}: make another"
            )
        self.cache.slots, self.cache.pad = 0, [0] * batch_size
        return self.cache

    @torch.no_grad()
    def prefill(self, input_ids: Int[Tensor, "b t"], **given: Any) -> Float[Tensor, "b v"]:
        """Run a prompt, or more of it, through the plain model; return the last logits."""
        self._make_room(input_ids.shape[1])
        return self.model(input_ids, cache=self.cache, keep_last=1, **given)[:, 0]

    @torch.no_grad()
    def step(self, ids: Int[Tensor, " b"]) -> Float[Tensor, "b v"]:
        """Feed each row's next token and return the logits; the next step overwrites them."""
        if type(self.model.tap) is not Tap:  # that of a copied model is not NO_TAP
            raise ValueError(
                "a static step is one fixed graph, whose values are neither watched nor changed: "
                "leave the block of trace, intervene or edited, or decode with the model itself"
            )
        if ids.shape != self.ids.shape:
            raise ValueError(
                f"ids of shape {tuple(ids.shape)}: give one for each of the {len(self.ids)} rows"
            )
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"ids={ids!r:.80}: give a tensor of whole numbers [b]")
        if ids.is_cpu:  # to look at those of a GPU would wait for it
            top = self.model.config.vocab_size - 1
            if ids.min() < 0 or ids.max() > top:
                raise ValueError(
                    f"ids hold {int(ids.min())} to {int(ids.max())}; "
                    f"this vocabulary has ids 0 to {top}"
                )
        self._make_room(1)
        self.ids.copy_(ids)
        slots, pad = self.told
        if slots != self.cache.slots:  # a prompt came, or a new text begins
            self.slot.fill_(self.cache.slots)
        if pad != self.cache.pad:
            self.pad.copy_(torch.tensor(self.cache.pad))
        if self.graph is None:
            self.logits = self.run()
        else:
            self.graph.replay()
        self.cache.slots += 1
        self.told = self.cache.slots, self.cache.pad
        return self.logits

    def _make_room(self, t: int) -> None:
        if self.cache.slots + t > self.max_len:
            raise ValueError(
                f"{self.cache.slots} + {t} tokens exceed max_len {self.max_len}: "
                "make the decoder with a larger one"
            )

    @torch.no_grad()
    def _capture(self) -> None:
        """Record one step; what the warm-up writes to the buffers is overwritten by a prompt."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self.run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.run()
        self.slot.zero_()

    def _plain(self) -> Float[Tensor, "b v"]:
        model, position = self.model, self.slot - self.pad
        step = Step(
            turn=turns(self.slot.float()[None, None] * self.frequencies),
            temperature=temperature(model.config, self.slot[None]),
            position=position[:, None],
            groups=[],
            cache=None,
            attend=lambda layer, q, k, v: attend_live(
                q, k, v, self.cache.layers[layer].buffer, position, self.cache.layers[layer].chunk
            ),
        )
        x, routers = model.embed_tokens(self.ids)[:, None], 0
        for layer in _layers(model):
            tap = Tap()
            if isinstance(layer.feed_forward, MoEBlock):
                tap, routers = _KeepRouting(self.routed[routers]), routers + 1
            x = layer(x, step, tap, model.backend)
        self.slot.add_(1)
        return model.lm_head(model.norm(x))[:, 0]

    def _fused(self) -> Float[Tensor, "b v"]:
        from llama4_lab.experts import triton
        from llama4_lab.model import flash_decode

        model, position = self.model, self.slot - self.pad
        angle = self.slot.float() * self.frequencies
        cos, sin = angle.cos(), angle.sin()
        factor = temperature(model.config, self.slot[None])[0]
        layers = _layers(model)
        norms = [
            _norm(norm)
            for layer in layers
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        after, routers = iter([*norms, _norm(cast(RMSNorm, model.norm))]), 0
        places = {c: position if c is None else position % c for c in set(model.chunks)}
        x, half = triton.half_norm(model.embed_tokens(self.ids)[:, None], next(after))
        for layer, joined, kept in zip(layers, self.joined, self.cache.layers, strict=True):
            attention = layer.self_attn
            z = flash_decode.attend(
                triton.linear(half, joined.qkv),
                cos,
                sin,
                factor,
                places[kept.chunk],
                kept.buffer,
                heads=model.config.num_attention_heads,
                rotates=attention.uses_rope,
                norms=attention.use_qk_norm,
                eps=attention.eps,
            )
            x, half = triton.linear(z, attention.o_proj.weight, residual=x, norm=next(after))
            if isinstance(block := layer.feed_forward, MoEBlock):
                x, half = triton.moe(
                    half,
                    block.router.weight,
                    joined.gate_up,
                    joined.down,
                    topk=block.topk,
                    residual=x,
                    norm=next(after),
                    logits=self.routed[routers],
                )
                routers += 1
            else:
                gate, up = triton.linear(half, joined.gate_up).chunk(2, dim=1)
                hidden = F.silu(gate) * up
                x, half = triton.linear(hidden, joined.down, residual=x, norm=next(after))
        self.slot.add_(1)
        return triton.linear(half, model.lm_head.weight)


class _KeepRouting(Tap):
    """Copies a router's logits to a place that stays, so that a graph keeps them."""

    def __init__(self, kept: Float[Tensor, "b e"]):
        self.kept = kept

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if name == "router.logits":
            self.kept.copy_(value[:, 0])
        return value


def attend_live(
    q: Float[Tensor, "b h 1 dh"],
    k: Float[Tensor, "b k 1 dh"],
    v: Float[Tensor, "b k 1 dh"],
    buffer: Float[Tensor, "2 b k s dh"],
    position: Int[Tensor, " b"],
    chunk: int | None,
) -> Float[Tensor, "b h 1 dh"]:
    """Attend from each row's new token to the live prefix of its buffer, the token included.

    The query heads of a key/value head stand in for a query's positions: all see the same keys.
    """
    place = position if chunk is None else position % chunk
    index = place[:, None, None, None].expand_as(k)
    buffer[0].scatter_(2, index, k)
    buffer[1].scatter_(2, index, v)
    live: Bool[Tensor, "b s"] = torch.arange(buffer.shape[3], device=q.device) <= place[:, None]
    groups = rearrange(q, "b (k g) 1 dh -> b k g dh", k=k.shape[1])
    z = F.scaled_dot_product_attention(groups, *buffer, attn_mask=live[:, None, None])
    return rearrange(z, "b k g dh -> b (k g) 1 dh")


# ---- weights that one kernel reads together


class _Joined(NamedTuple):
    """A layer's weights, joined; the layer's own become views of them."""

    qkv: Tensor | Packed
    gate_up: Tensor | Packed  # of a MoE layer with the shared expert behind the routed ones
    down: Tensor | Packed

    @classmethod
    def of(cls, layer: DecoderLayer) -> "_Joined":
        attention, block = layer.self_attn, layer.feed_forward
        if attention.q_proj.bias is not None:
            raise ValueError('attention biases need kernels="torch"; Triton\'s have none')
        qkv = _join([(attention.q_proj, "weight"), (attention.k_proj, "weight"),
                     (attention.v_proj, "weight")])  # fmt: skip
        shared = block.shared_expert if isinstance(block, MoEBlock) else block
        gate_up = _join([(shared.gate_proj, "weight"), (shared.up_proj, "weight")])
        down = shared.down_proj.weight
        if isinstance(block, MoEBlock):
            width, experts = block.shared_expert.gate_proj.weight.shape[0], block.experts
            gate_up = _stack((experts, "gate_up_proj"), gate_up)
            down = _stack((experts, "down_proj"), down)
            _put((shared.gate_proj, "weight"), gate_up[-1][:width])
            _put((shared.up_proj, "weight"), gate_up[-1][width:])
            _put((shared.down_proj, "weight"), down[-1])
        return cls(qkv, gate_up, down)


Place = tuple[nn.Module, str]


def _join(places: list[Place]) -> Tensor | Packed:
    """Put weights of one width below each other."""
    weights = [getattr(module, name) for module, name in places]
    whole = cat(weights)
    end = 0
    for place, weight in zip(places, weights, strict=True):
        _put(place, whole[end : end + weight.shape[0]])
        end += weight.shape[0]
    return whole


def _stack(routed: Place, shared: Tensor | Packed) -> Tensor | Packed:
    """Put a shared expert's weight behind the routed ones."""
    whole = cat([getattr(*routed), shared[None]])
    _put(routed, whole[:-1])
    torch.cuda.empty_cache()  # what is freed is too small for the next layer's, and would be kept
    return whole


def _put(place: Place, weight: Tensor | Packed) -> None:
    module, name = place
    if isinstance(weight, Packed):
        cast(Packable, module).put(name, weight)
    else:
        getattr(module, name).data = weight


def _layers(model: Llama4) -> list[DecoderLayer]:
    return [cast(DecoderLayer, layer) for layer in model.layers]


def _norm(norm: RMSNorm) -> tuple[Tensor, float]:
    return norm.weight, norm.eps
