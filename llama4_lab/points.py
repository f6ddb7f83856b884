"""The named values inside the model, and the object through which they are watched.

The model hands every value that has a name to a `Tap`, and goes on with what the tap returns.
`points` lists the names with their axes; `llama4_lab.trace` is how people use them.
"""

from torch import Tensor

from llama4_lab.config import Llama4Config

_ATTENTION = {
    "attn.q": "b t h dh",  # straight from the projection
    "attn.k": "b t k dh",
    "attn.v": "b t k dh",
    "attn.rot_q": "b t h dh",  # as they enter the scores: rotated, normalised, tempered
    "attn.rot_k": "b t k dh",
    "attn.scores": "b h t s",  # before the softmax; -inf where the mask forbids
    "attn.pattern": "b h t s",
    "attn.z": "b t h dh",
    "attn.out": "b t d",
}
_MLP = {"mlp.hidden": "b t f", "mlp.out": "b t d"}
_MOE = {
    "router.logits": "b t e",
    "router.indices": "b t topk",
    "router.scores": "b t topk",  # sigmoid of the chosen logits; they multiply the expert's input
    "experts.in": "b t topk d",
    "experts.hidden": "b t topk f",
    "experts.out": "b t topk d",
    "shared.out": "b t d",
}


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
    names: dict[str, str] = {}
    if config.vision_config is not None:
        names["vision.embed"] = "b t d"
        for layer in range(config.vision_config.num_hidden_layers):
            names |= _block(f"vision.layers.{layer}.", _MLP)
        names |= {"vision.out": "b p d", "projector.out": "b p d"}
    names["embed"] = "b t d"
    for layer in range(config.num_hidden_layers):
        names |= _block(f"layers.{layer}.", _MOE if config.is_moe(layer) else _MLP)
    return names | {"final_norm": "b t d", "logits": "b t v"}


def _block(prefix: str, feed_forward: dict[str, str]) -> dict[str, str]:
    stream = {"resid_pre": "b t d"} | _ATTENTION | {"resid_mid": "b t d"}
    return {
        prefix + name: axes
        for name, axes in (stream | feed_forward | {"resid_post": "b t d"}).items()
    }


class Tap:
    """Receives each named value of a forward pass and returns the one to go on with.

    This one watches nothing. A value that costs memory is only made when `watches` says so.
    """

    def watches(self, name: str) -> bool:
        return False

    def __call__(self, name: str, value: Tensor) -> Tensor:
        return value

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


NO_TAP = Tap()
