"""A faster path for decoding: one new token on the CPU, through all layers in one compiled call.

`can_run` says whether a step is such a one; all others take the readable path, of which this is the
same mathematics. `one_token_kernel` holds it; it is imported, and compiled, at first use.
"""

from collections.abc import Sequence
from itertools import repeat
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from llama4_lab.cache import KVCache, LayerCache
from llama4_lab.config import Llama4Config
from llama4_lab.loading import Loading
from llama4_lab.model import text
from llama4_lab.model.linear import Embedding, Linear

# What the kernel is told of a layer and of the whole: addresses, sizes, rules. Zero is for none.
_ADDRESSES = (
    *("input_norm", "q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias", "feed_norm"),
    *("gate", "up", "down", "router", "routed_gate_up", "routed_down", "cache"),
)
_SIZES = ("e", "f", "topk", "chunk", "capacity", "uses_rope", "use_qk_norm")
_EPS = ("input_norm_eps", "feed_norm_eps", "qk_eps")
_WHOLE = (
    *("embed", "norm", "head", "d", "dh", "heads", "kv_heads", "v", "longest", "widest"),
    "floor_scale",
)
LAYER = np.dtype([(name, "i8") for name in _ADDRESSES + _SIZES] + [(name, "f8") for name in _EPS])
MODEL = np.dtype([(name, "i8") for name in _WHOLE] + [("norm_eps", "f8"), ("attn_scale", "f8")])

_ROUTING = ("router.logits", "router.scores", "router.indices")
_ROUTED = ("e", "topk", "topk")  # how many of each
_RULES = {  # attributes that the mathematics depends on
    text.RMSNorm: ("eps",),
    text.Attention: ("uses_rope", "use_qk_norm", "chunk", "head_dim", "eps", "layer"),
    text.MoEBlock: ("topk",),
}
_KNOWN = {
    *(Linear, Embedding, text.RMSNorm, text.MLP, text.DenseBlock, text.Attention),
    *(text.Router, text.Experts, text.MoEBlock, text.DecoderLayer, nn.ModuleList),
}
_MOST_BYTES = 1 << 28  # weights read for a token; beyond, many of torch's threads beat this one


def can_run(model: Any, input_ids: Int[Tensor, "b t"], cache: KVCache) -> bool:
    """Whether `forward` can make this step.

    It takes one row of one token, float32 weights on the CPU, no gradients, an unpadded cache, the
    backend "auto" or "numba", and no observers but traces of the routers. Modules that were
    replaced, packed, hooked or patched are left to the readable path. The first call in a process
    loads the compiled code; what was never compiled on this machine is compiled in the background.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.long, torch.int):
        return False
    if input_ids.shape != (1, 1) or not input_ids.is_cpu:
        return False
    if model.backend not in ("auto", "numba") or model.ranks.size > 1 or _is_observed(model):
        return False
    if (asked := model.tap.records()) is None:
        return False
    if type(cache) is not KVCache or cache.batch_size > 1 or cache.pad != [0]:
        return False
    if not 0 <= input_ids.item() < model.config.vocab_size:
        return False
    table = _table(model)
    if (
        not table.fits
        or not table.known.issuperset(asked)
        or (table.bytes > _MOST_BYTES and torch.get_num_threads() > 1)
    ):
        return False
    if len(cache.layers) != len(table.chunks):
        return False
    usable = map(_is_usable, cache.layers, table.chunks, repeat(table.cached))
    return all(usable) and LOADING.is_done()


def forward(model: Any, input_ids: Int[Tensor, "1 1"], cache: KVCache) -> Float[Tensor, "1 1 v"]:
    """Return the next token's logits and add its keys and values to the cache.

    They are the readable path's up to rounding. `can_run` must have agreed just before.
    """
    from llama4_lab.model import one_token_kernel

    table, position = _TABLES[model], cache.slots
    model.first_slot = position
    layers, whole = table.layers.copy(), table.whole.copy()  # threads may share the model
    for layer in cache.layers:
        layer.reserve(1 + (position if layer.chunk is None else position % layer.chunk))
    layers["cache"] = [layer.buffer.data_ptr() for layer in cache.layers]
    layers["capacity"] = [layer.buffer.shape[3] for layer in cache.layers]
    whole["longest"] = position + 1
    most = len(layers), table.topk
    routing = (
        np.empty((len(layers), table.num_experts), np.float32),
        np.empty(most, np.float32),
        np.empty(most, np.int64),
    )
    logits = torch.empty(1, 1, model.config.vocab_size, dtype=torch.float32, device="cpu")
    one_token_kernel.forward(
        input_ids.item(), position, whole, layers, table.frequency, logits.numpy()[0, 0], *routing
    )
    cache.slots += 1
    if asked := model.tap.records():
        seen: dict[str, Tensor] = {}
        for names, values, sizes in zip(table.names, routing, table.sizes, strict=True):
            rows = torch.from_numpy(values[:, None, None]).unbind()
            if sizes is not None:
                rows = (row[:, :, :size] for row, size in zip(rows, sizes, strict=True))
            seen.update(zip(names, rows, strict=True))
        if len(asked) < len(seen):
            seen = {name: row for name, row in seen.items() if name in asked}
        model.tap.hear(seen)
    return logits


def compile() -> None:
    """Load the compiled code, or compile it first and keep it on disk, which takes seconds."""
    LOADING.wait()


# ---- whether anybody looks


def _is_observed(model: Any) -> bool:
    """Whether someone but a trace could miss what this path does not show, or change it."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch.is_autocast_enabled("cpu")
        or bool(hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks)
        or not vars(model).keys().isdisjoint(("hidden", "embed"))  # patched methods
    )


def _is_usable(layer: LayerCache, chunk: int | None, heads: tuple[int, int]) -> bool:
    if type(layer) is not LayerCache or layer.chunk != chunk or not _is_plain(layer.buffer):
        return False
    two, rows, kv_heads, _, width = layer.buffer.shape
    return (two, rows, kv_heads, width) == (2, 1, *heads)


def _is_plain(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_cpu and x.is_contiguous()


# ---- what the kernel reads


class _Table:
    """Where a model's weights lie and what its rules are; `is_current` until either changes."""

    def __init__(self, model: Any):
        parts = [model.embed_tokens, *model.layers.modules(), model.norm, model.lm_head]
        held = [(model._modules, name) for name in ("embed_tokens", "layers", "norm", "lm_head")]
        held += [(vars(model), "config")]
        for part in parts:
            held += [(each, name) for each in (part._modules, part._parameters) for name in each]
            held += [(vars(part), name) for name in _RULES.get(type(part), ())]
        self._dicts, self._names = zip(*held, strict=True)
        self._values = [each[name] for each, name in held]
        self._weights = [x for x in self._values if isinstance(x, nn.Parameter)]
        self._places = self._now()
        self._hooks = [x for part in parts for x in (part._forward_hooks, part._forward_pre_hooks)]
        self._num_hooks = sum(map(len, self._hooks))
        self._attributes = [vars(part) for part in parts]
        self._num_attributes = sum(map(len, self._attributes))  # a patched method is one more
        self.bytes = 0
        self.fits = (
            are_as_written(parts) and _has_biases_where_expected(model) and self._read(model)
        )

    def is_current(self) -> bool:
        return (  # asked before every token, so in maps, which run in C
            all(map(is_, map(dict.get, self._dicts, self._names), self._values))
            and self._now() == self._places
            and sum(map(len, self._attributes)) == self._num_attributes
            and sum(map(len, self._hooks)) == self._num_hooks
        )

    def _now(self) -> list[list[Any]]:
        kinds = Tensor.data_ptr, Tensor.size, Tensor.is_contiguous
        return [list(map(kind, self._weights)) for kind in kinds]

    def _read(self, model: Any) -> bool:
        """Fill in the records; False where a weight is not a plain one of the config's shape."""
        config = model.config
        self.chunks = model.chunks
        self.cached = config.num_key_value_heads, config.head_dim  # of a position
        self.frequency = text.rope_frequencies(config).numpy()
        self.whole, self.layers = np.zeros(1, MODEL), np.zeros(len(model.layers), LAYER)
        fits = _put(self.whole[0], _model_fields(model))
        for i, (record, layer) in enumerate(zip(self.layers, model.layers, strict=True)):
            fits &= layer.self_attn.layer == i  # where its keys and values are cached
            fits &= layer.self_attn.head_dim == config.head_dim
            fits &= _put(record, _layer_fields(layer, config))
        self.whole["widest"] = self.layers["f"].max()
        self.num_experts, self.topk = self.layers["e"].max(), self.layers["topk"].max()
        count, sizes = len(self.layers), [self.layers[name].tolist() for name in _ROUTED]
        self.names = [[f"layers.{i}.{point}" for i in range(count)] for point in _ROUTING]
        self.known = frozenset(name for each in self.names for name in each)
        self.sizes = [each if len({*each}) > 1 else None for each in sizes]  # None: all alike
        self.bytes = sum(  # of each stack, a token reads as many matrices as it has experts
            x.nbytes // len(x) * self.topk if x.ndim > 2 else x.nbytes for x in self._weights
        )
        return fits


def are_as_written(parts: Sequence[nn.Module]) -> bool:
    """Whether a model's parts are its own, without hooks and patched methods."""
    return (
        {type(part) for part in parts} <= _KNOWN
        and not any(hasattr(type(part), name) for part in parts for name in vars(part))
        and not any(part._forward_hooks or part._forward_pre_hooks for part in parts)
    )


def _has_biases_where_expected(model: Any) -> bool:
    """Whether no other product has a bias than those of attention, if the config gives them one."""
    attention = [layer.self_attn for layer in model.layers]
    mine = {each for block in attention for each in block.children()}
    parts = *model.layers.modules(), model.lm_head
    products = (each for each in parts if isinstance(each, Linear))
    return all(
        (each.bias is not None) == (model.config.attention_bias and each in mine)
        for each in products
    )


def _put(record: Any, fields: dict[str, Any]) -> bool:
    """Note numbers, and the address of each ``(weight, shape)`` unless it is something else."""
    for name, value in fields.items():
        if isinstance(value, tuple):
            weight, shape = value
            if type(weight) is not nn.Parameter or weight.shape != shape or not _is_plain(weight):
                return False
            value = weight.data_ptr()
        record[name] = value
    return True


def _model_fields(model: Any) -> dict[str, Any]:
    config = model.config
    d, v = config.hidden_size, config.vocab_size
    return {
        "embed": (model.embed_tokens.weight, (v, d)),
        "norm": (model.norm.weight, (d,)),
        "head": (model.lm_head.weight, (v, d)),
        "d": d,
        "v": v,
        "dh": config.head_dim,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "norm_eps": model.norm.eps,
        "attn_scale": config.attn_scale if config.attn_temperature_tuning else 0,
        "floor_scale": config.floor_scale,
    }


def _layer_fields(layer: Any, config: Llama4Config) -> dict[str, Any]:
    attention, block = layer.self_attn, layer.feed_forward
    d, dh = config.hidden_size, config.head_dim
    h, k = config.num_attention_heads * dh, config.num_key_value_heads * dh
    shapes = {"q": (h, d), "k": (k, d), "v": (k, d), "o": (d, h)}
    projections = {name: getattr(attention, f"{name}_proj") for name in shapes}
    fields = {name: (projections[name].weight, shape) for name, shape in shapes.items()}
    if config.attention_bias:
        fields |= {f"{name}_bias": (projections[name].bias, shapes[name][:1]) for name in shapes}
    is_moe = isinstance(block, text.MoEBlock)
    mlp = block.shared_expert if is_moe else block
    f = mlp.gate_proj.out_features
    fields |= {
        "input_norm": (layer.input_layernorm.weight, (d,)),
        "input_norm_eps": layer.input_layernorm.eps,
        "feed_norm": (layer.post_attention_layernorm.weight, (d,)),
        "feed_norm_eps": layer.post_attention_layernorm.eps,
        "qk_eps": attention.eps,
        "uses_rope": attention.uses_rope,
        "use_qk_norm": attention.use_qk_norm,
        "chunk": attention.chunk or 0,
        "f": f,
        "gate": (mlp.gate_proj.weight, (f, d)),
        "up": (mlp.up_proj.weight, (f, d)),
        "down": (mlp.down_proj.weight, (d, f)),
    }
    if is_moe:
        e = len(block.router.weight)
        fields |= {
            "e": e,
            "topk": block.topk,
            "router": (block.router.weight, (e, d)),
            "routed_gate_up": (block.experts.gate_up_proj, (e, 2 * f, d)),
            "routed_down": (block.experts.down_proj, (e, d, f)),
        }
    return fields


_TABLES: WeakKeyDictionary[nn.Module, _Table] = WeakKeyDictionary()


def _table(model: nn.Module) -> _Table:
    table = _TABLES.get(model)
    if table is None or not table.is_current():
        table = _TABLES[model] = _Table(model)
    return table


# ---- whether the compiled code is there


def _load() -> None:
    from llama4_lab.model import one_token_kernel

    one_token_kernel.compile(MODEL, LAYER)


def _is_kept() -> bool:
    from llama4_lab.compiled import is_kept
    from llama4_lab.model.one_token_kernel import forward

    return is_kept(forward)


LOADING = Loading("compiling the decode step", _load, _is_kept)
