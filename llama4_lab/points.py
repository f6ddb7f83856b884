"""The named values inside the model, and the object through which they are watched.

The model hands every value that has a name to a `Tap`, and goes on with what the tap returns.
`points` lists the names with their axes; `llama4_lab.trace` is how people use them.
"""

from collections.abc import Collection, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from llama4_lab.config import Llama4Config


class Point(NamedTuple):
    axes: str
    meaning: str


_RESID_PRE = Point("b t d", "the residual stream that the layer reads")
_RESID_MID = Point("b t d", "the residual stream between attention and feed-forward")
_RESID_POST = Point("b t d", "the residual stream that the layer leaves")
_ATTENTION = {
    "attn.q": Point("b t h dh", "queries, straight from the projection"),
    "attn.k": Point("b t k dh", "keys, straight from the projection"),
    "attn.v": Point("b t k dh", "values, straight from the projection"),
    "attn.rot_q": Point(
        "b t h dh",
        "queries as they enter the scores: rotated; on text's RoPE layers normalised too, on its "
        "NoPE layers only tempered",
    ),
    "attn.rot_k": Point(
        "b t k dh",
        "keys as they enter the scores: rotated; on text's RoPE layers normalised too, on its NoPE "
        "layers as they were",
    ),
    "attn.scores": Point("b h t s", "logits before the softmax; -inf where the mask forbids"),
    "attn.pattern": Point("b h t s", "shares of attention; each query's sum to one"),
    "attn.z": Point("b t h dh", "what each head gathers: its pattern times the values"),
    "attn.out": Point("b t d", "what attention adds to the residual stream"),
}
_MLP = {
    "mlp.hidden": Point("b t f", "neurons: what the down projection reads"),
    "mlp.out": Point("b t d", "what the MLP adds to the residual stream"),
}
_MOE = {
    "router.logits": Point("b t e", "the router's logit for each expert"),
    "router.indices": Point("b t topk", "the chosen experts, strongest first"),
    "router.scores": Point(
        "b t topk", "sigmoid of the chosen logits; they multiply the expert's input"
    ),
    "experts.in": Point(
        "b t topk d", "what each chosen expert reads: the score times the normalised stream"
    ),
    "experts.hidden": Point("b t topk f", "neurons of each chosen expert"),
    "experts.out": Point("b t topk d", "what each chosen expert adds to the residual stream"),
    "shared.out": Point("b t d", "what the shared expert adds to the residual stream"),
}
PICTURE = ("vision.", "projector.")  # begin the names of what only pictures have
INSIDE = ("experts.in", "experts.hidden", "experts.out")
"""The values inside routed experts."""


def points(config: Llama4Config) -> dict[str, str]:
    """Return the name of every value that can be watched, with its axes.

    Letters: b batch, t query position, s key position (the last t of them are the queries' own),
    d model width, h query heads, k key/value heads, dh head width, e experts, topk chosen experts,
    f expert or MLP width, v vocabulary. In the vision encoder b counts tiles, t and s are patch
    slots (the class token last), and p are the image tokens of a tile.

        >>> from llama4_lab import SCOUT
        >>> points(SCOUT)["layers.3.router.logits"]
        'b t e'
    """
    if not isinstance(config, Llama4Config):
        raise TypeError(
            f"points are those of a config, not of a {type(config).__name__}: give model.config"
        )
    return {name: point.axes for name, point in described(config).items()}


@lru_cache(maxsize=16)
def described(config: Llama4Config) -> Mapping[str, Point]:
    """Return every point with axes and meaning, in the order of a forward pass."""
    names: dict[str, Point] = {}
    if config.vision_config is not None:
        names["vision.embed"] = Point(
            "b t d", "patches and class token with their places, normalised"
        )
        for layer in range(config.vision_config.num_hidden_layers):
            names |= _block(f"vision.layers.{layer}.", _MLP)
        names["vision.out"] = Point(
            "b p d", "image tokens, a block of patches each, as the projector reads them"
        )
        names["projector.out"] = Point("b p d", "image tokens as they are put among the text's")
    names["embed"] = Point("b t d", "token embeddings, image tokens in their places")
    for layer in range(config.num_hidden_layers):
        names |= _block(f"layers.{layer}.", _MOE if config.is_moe(layer) else _MLP)
    names["final_norm"] = Point("b t d", "the last residual stream, normalised and weighted")
    names["logits"] = Point("b t v", "next-token logits, before any temperature")
    return MappingProxyType(names)


def _block(prefix: str, feed_forward: dict[str, Point]) -> dict[str, Point]:
    attention = {"resid_pre": _RESID_PRE} | _ATTENTION | {"resid_mid": _RESID_MID}
    whole = attention | feed_forward | {"resid_post": _RESID_POST}
    return {prefix + name: point for name, point in whole.items()}


class Tap:
    """Receives each named value of a forward pass and returns the one to go on with.

    This one watches nothing. A value that costs memory is only made when `watches` says so.
    """

    def watches(self, name: str) -> bool:
        return False

    def __call__(self, name: str, value: Tensor) -> Tensor:
        return value

    def hear(self, values: Mapping[str, Tensor]) -> None:
        """Receive values that nothing goes on with, many at once."""
        for name, value in values.items():
            self(name, value)

    def records(self) -> Collection[str] | None:
        """Return the whole names that it records; None if it may change values or want others."""
        return () if type(self) is Tap else None

    def alters(self, name: str) -> bool:
        """Whether it may put another value in the place of this one."""
        return self.records() is None and self.watches(name)

    def scope(self, prefix: str) -> "Tap":
        """Return a tap that puts `prefix` before every name."""
        return self if type(self) is Tap else _Scoped(self, prefix)


class _Scoped(Tap):
    def __init__(self, tap: Tap, prefix: str):
        self._tap = tap
        self._prefix = prefix

    def watches(self, name: str) -> bool:
        return self._tap.watches(self._prefix + name)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        return self._tap(self._prefix + name, value)

    def records(self) -> Collection[str] | None:
        return self._tap.records()

    def alters(self, name: str) -> bool:
        return self._tap.alters(self._prefix + name)


NO_TAP = Tap()
