"""The whole model: embed text and pictures into one stream, run the layers, read out logits."""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llama4_lab.cache import KVCache
from llama4_lab.config import Llama4Config
from llama4_lab.experts.mapped import ExpertMemory
from llama4_lab.model import one_token
from llama4_lab.model.linear import Embedding, Linear
from llama4_lab.model.text import DecoderLayer, RMSNorm, Step
from llama4_lab.model.vision import VisionModel
from llama4_lab.points import NO_TAP, Tap

_LOOKED_UP = (torch.int64, torch.int32)  # dtypes that an embedding takes as they are
_WHOLE = (*_LOOKED_UP, torch.int16, torch.int8, torch.uint8)


class Alone:
    """The processes that share a model: one. `llama4_lab.parallel` puts several in its place."""

    size = 1

    def mine(self, name: str, value: Tensor) -> Tensor:
        """Return what this process computes with of a named value."""
        return value

    def agreed(self, value: Tensor) -> Tensor:
        """Return what the first process has."""
        return value


class Llama4(nn.Module):
    """Llama 4 as `config` says; parameters are uninitialised until loaded or seeded.

    `backend` chooses how experts are computed (`llama4_lab.experts.BACKENDS`, or ``"auto"``).
    `tap` sees every named value; `llama4_lab.trace` sets it. `first_slot` is where the forward pass
    under way began: the slots that its cache held before.
    """

    def __init__(self, config: Llama4Config):
        super().__init__()
        self.config = config
        self.backend = "auto"
        self.tap: Tap = NO_TAP
        self.first_slot = 0
        self.expert_memory: ExpertMemory | None = None  # where experts are kept that stay on disk
        self.ranks = Alone()
        self.build_prompt: Callable[..., Any] | None = None
        self.tokenizer: Any = None
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        if (vision := config.vision_config) is not None:
            self.vision_model = VisionModel(vision)
            self.multi_modal_projector = nn.ModuleDict(
                {"linear_1": Linear(vision.vision_output_dim, config.hidden_size, bias=False)}
            )

    def tie_weights(self) -> None:
        """Make read-out and embedding one tensor again, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def apart(self) -> "Llama4":
        """Return the same model, weights shared, whose traces and edits are its own.

        Two threads can use the two, and neither sees what the other watches or changes. Weights
        written in place change in both; what one replaces, moves or converts stays in the other.

        Raises:
            ValueError: a block of `intervene` or `edited` around it.
        """
        if self.tap.records() is None:
            raise ValueError(
                "this stands inside a block of intervene or edited, whose changes a model apart "
                "would not have: leave the block"
            )
        model = cast(Llama4, _copied(self, {}))
        model.tap = NO_TAP
        return model

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def chunks(self) -> list[int | None]:
        """What each layer attends inside: chunks of so many tokens, or (None) the whole past."""
        return [cast(DecoderLayer, layer).self_attn.chunk for layer in self.layers]

    @property
    def places(self) -> list[int]:
        """Where in a cache each layer keeps its keys and values: at its own number."""
        return [cast(DecoderLayer, layer).self_attn.layer for layer in self.layers]

    def prompt(self, text: Any, images: Sequence[Any] = (), **options: Any) -> Any:
        """Turn a text, several texts, or chat messages (with images) into ``model(**prompt)``.

        Raises:
            ValueError: the model came without a tokenizer.
        """
        if self.build_prompt is None:
            raise ValueError(
                "this model has no tokenizer: load it from a folder that holds tokenizer.json or "
                "tokenizer.model, or pass input_ids"
            )
        return self.build_prompt(text, images, **options)

    def new_cache(self, batch_size: int = 1) -> KVCache:
        """Return an empty cache of this model's dtype (autocast's, where it is on), device, chunks
        and (here) heads."""
        heads = self.config.num_key_value_heads // self.ranks.size
        config = self.config.replace(num_attention_heads=heads, num_key_value_heads=heads)
        kind = self.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype
        return KVCache(config, batch_size, dtype=dtype, device=self.device, chunks=self.chunks)

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        pixel_values: Float[Tensor, "tiles c height width"] | None = None,
        attention_mask: Int[Tensor, "b slots"] | None = None,
        cache: KVCache | None = None,
        keep_last: int | None = None,
    ) -> Float[Tensor, "b kept v"]:
        """Return next-token logits for every position, or for the `keep_last` last ones.

        Args:
            pixel_values: all tiles of all images, in prompt order; their features replace the
                ``image_token_index`` tokens, whose number must fit exactly.
            attention_mask: 0 on left padding; it may cover the cached slots too. The temperature of
                NoPE layers counts padding, as transformers' does: from `floor_scale` slots on, a
                padded row's logits are a little other than those of the row alone.
            cache: keys and values of what came before; this call adds its own.

        Raises:
            TypeError: input_ids that are no tensor of whole numbers.
            ValueError: ids, tiles or a mask that do not fit the model or each other.
        """
        is_decoding = pixel_values is None and attention_mask is None and keep_last in (None, 1)
        if cache is not None and is_decoding and one_token.can_run(self, input_ids, cache):
            return one_token.forward(self, input_ids, cache)
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last {keep_last} keeps no position: give 1 or more, or None")
        x = self.hidden(input_ids, pixel_values, attention_mask, cache)
        if keep_last is not None:
            x = x[:, -keep_last:]
        return self.tap("logits", self.lm_head(x))

    def hidden(
        self,
        input_ids: Int[Tensor, "b t"],
        pixel_values: Float[Tensor, "tiles c height width"] | None = None,
        attention_mask: Int[Tensor, "b slots"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Return the final norm's output; `forward` without the read-out.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        input_ids = _rows_of_tokens(input_ids)
        b, t = input_ids.shape
        if cache is not None:
            _check_cache(self, cache, b)
        if attention_mask is not None or cache is None:
            pad = left_padding(attention_mask, b, t, cache)
        else:
            pad = cache.pad
        self.first_slot = cache.slots if cache is not None else 0
        x = self.tap("embed", self.embed(input_ids, pixel_values))
        step = Step.begin(self.config, t, pad, cache, x.device)
        for i, layer in enumerate(self.layers):
            x = layer(x, step, self.tap.scope(f"layers.{i}."), self.backend)
        if cache is not None:
            cache.slots, cache.pad = cache.slots + t, pad
        return self.tap("final_norm", self.norm(x))

    def embed(
        self,
        input_ids: Int[Tensor, "b t"],
        pixel_values: Float[Tensor, "tiles c height width"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Look up token embeddings and put image features where the patch tokens are."""
        _check_ids(input_ids, self.config.vocab_size)
        x = self.embed_tokens(input_ids)
        if pixel_values is None:
            return x
        is_image = input_ids == self.config.image_token_index
        _check_tiles(pixel_values, is_image, self.config)
        features = self.vision_model(pixel_values.to(x.dtype), self.tap.scope("vision."))
        features = self.tap("projector.out", self.multi_modal_projector["linear_1"](features))
        return x.masked_scatter(is_image[..., None], features.to(x.dtype))


def _copied(module: nn.Module, made: dict[nn.Parameter, nn.Parameter]) -> nn.Module:
    """Return a module with parts of its own, whose parameters share the memory of the module's."""
    copied = copy(module)
    for name, value in vars(module).items():
        if name.startswith("_") and isinstance(value, dict):  # of parameters, buffers and hooks
            copied.__dict__[name] = value.copy()
    for name, old in module._parameters.items():
        if old is not None:
            new = made.setdefault(old, nn.Parameter(old.detach(), old.requires_grad))
            copied.__dict__["_parameters"][name] = new
    copied.__dict__["_modules"] = {
        name: part and _copied(part, made) for name, part in module._modules.items()
    }
    return copied


def _rows_of_tokens(input_ids: Tensor) -> Int[Tensor, "b t"]:
    """Return ids in a dtype that can be looked up; refuse what is no rows of tokens."""
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in _WHOLE:
        raise TypeError(
            f"input_ids={input_ids!r:.80}: give a tensor of whole numbers [b, t], or a prompt as "
            "model(**model.prompt(text))"
        )
    if input_ids.ndim != 2:
        shape = tuple(input_ids.shape)
        raise ValueError(f"input_ids have the shape {shape}: give [b, t], rows of tokens")
    if not input_ids.numel():
        raise ValueError("input_ids holds no token")
    return input_ids if input_ids.dtype in _LOOKED_UP else input_ids.long()


def _check_ids(input_ids: Int[Tensor, "b t"], vocab_size: int) -> None:
    if input_ids.device.type == "meta" or torch.compiler.is_compiling():
        return  # their values are not known
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"input_ids hold {lowest} to {highest}; this vocabulary has ids 0 to {vocab_size - 1}"
        )


def _check_tiles(pixel_values: Tensor, is_image: Tensor, config: Llama4Config) -> None:
    """Refuse tiles that the vision encoder cannot read, or whose tokens do not fit the prompt."""
    if (vision := config.vision_config) is None:
        raise ValueError("this model has no vision encoder; leave pixel_values out")
    expected = (vision.num_channels, vision.image_size, vision.image_size)
    if tuple(pixel_values.shape[1:]) != expected:
        raise ValueError(
            f"tiles of shape {tuple(pixel_values.shape[1:])} do not fit this model, "
            f"which takes {expected}"
        )
    needed = len(pixel_values) * vision.tokens_per_tile
    if is_image.sum() != needed:
        raise ValueError(
            f"{len(pixel_values)} tiles make {needed} image tokens, but input_ids hold "
            f"{int(is_image.sum())} tokens with id {config.image_token_index} to put them on"
        )


def _check_cache(model: Llama4, cache: KVCache, b: int) -> None:
    """Refuse a cache that was made for other rows, chunks, heads or layers."""
    if cache.batch_size != b:
        raise ValueError(f"a cache for {cache.batch_size} rows was given {b} rows of input_ids")
    if (kept := [layer.chunk for layer in cache.layers]) != model.chunks:
        raise ValueError(
            f"this cache keeps chunks of {kept}, and the layers attend in {model.chunks}: make "
            "the cache with this model's new_cache(), inside the block of an edit of chunks"
        )
    own = model.config.num_key_value_heads // model.ranks.size, model.config.head_dim
    for layer in cache.layers:
        if (held := (layer.buffer.shape[2], layer.buffer.shape[4])) != own:
            raise ValueError(
                f"this cache is for {held[0]} heads of width {held[1]}, and the model has "
                f"{own[0]} of width {own[1]}: make it with this model's new_cache()"
            )
    if (places := model.places) != [*range(len(places))]:
        raise ValueError(
            f"the layers cache keys and values at {places}: after moving some, set each "
            "layers[i].self_attn.layer to i (a layer in two places needs a copy), or run "
            "without a cache"
        )


def left_padding(mask: Tensor | None, b: int, t: int, cache: KVCache | None) -> list[int]:
    """Count the padding before each row's first token; zeros behind it are refused."""
    if mask is None:
        return [0] * b
    first = cache.slots if cache is not None else 0
    if mask.shape not in ((b, first + t), (b, t)):
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} does not fit {b} rows of {t} new and "
            f"{first} cached slots"
        )
    pad = (mask == 0).sum(dim=1).tolist()
    if any((row == 0).sum() > (row.cumsum(0) == 0).sum() for row in mask.long()):
        raise ValueError(
            "attention_mask has a 0 behind a 1: only left padding is supported; put the padding in "
            "front, or, without a cache, leave the mask out for right padding (it changes nothing)"
        )
    is_whole = mask.shape[1] == first + t
    for row, old in enumerate(cache.pad if cache is not None and first else []):
        zeros = pad[row]
        if is_whole:
            cached, pad[row] = min(zeros, first), zeros
        elif zeros == 0:
            cached, pad[row] = old, min(old, first)
        else:  # padding goes on, so there is nothing else in the cache
            cached, pad[row] = first, first + zeros
        if cached != old:
            said = f"begins with {zeros}" if is_whole else f"puts {zeros} more behind it"
            raise ValueError(
                f"attention_mask contradicts the cache, whose row {row} holds {first - old} tokens "
                f"behind {old} of padding, and the mask {said}; keep the padding that the cache "
                "was filled with, and give rows as many new tokens each, or run them one by one"
            )
    return pad
