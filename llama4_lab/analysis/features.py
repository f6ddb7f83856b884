"""Parts of a prompt as features that can be turned off, and the number that they are asked about.

A feature has a gate: 1 leaves it as it is, 0 turns it off. Tokens and image patches are here,
experts and router decisions in `llama4_lab.analysis.expert_features`;
`llama4_lab.analysis.attribution` divides the number among them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from llama4_lab.analysis.positions import from_start, refuse_words
from llama4_lab.model import Llama4
from llama4_lab.prompt import Prompt, tokens_of
from llama4_lab.trace import Change, intervene, trace

QUANTITIES = ("log_probability", "logit")


@dataclass(frozen=True)
class Target:
    """The number that is explained: how strongly the model expects a token after a position.

    The log-probability is in nats. None is the token that the model finds likeliest there.
    """

    token: int | None = None
    position: int = -1
    quantity: str = "log_probability"


NEXT_TOKEN = Target()


@dataclass(frozen=True, eq=False)
class Question:
    """A target of one prompt, to be computed for many changed runs of it at once."""

    model: Llama4
    prompt: Prompt  # one row, on the model's device
    target: Target  # with token, and a position counted from the start
    embedding: Float[Tensor, "1 t d"]
    chosen: dict[str, Int[Tensor, "1 t topk"]]  # the clean run's ``router.indices``, by point

    @classmethod
    @torch.inference_mode(False)  # what is kept may be asked for gradients
    def ask(cls, model: Llama4, prompt: Prompt, target: Target = NEXT_TOKEN) -> "Question":
        """Run the prompt once and fill in what the target leaves open.

        Raises:
            ValueError: a prompt of several rows, or a target that is not there.
        """
        count = len(tokens_of(prompt))
        position = from_start(target.position, count, "position")
        if target.quantity not in QUANTITIES:
            raise ValueError(
                f"unknown quantity {target.quantity!r}; choose {' or '.join(QUANTITIES)}"
            )
        size = model.config.vocab_size
        refuse_words(target.token)
        if target.token is not None and not 0 <= target.token < size:
            raise ValueError(
                f"token {target.token} is out of range: this vocabulary has ids 0 to {size - 1}"
            )
        prompt = prompt.to(model.device)
        layers = model.config.routed_layers
        names = ["embed", *(f"layers.{i}.router.indices" for i in layers)]
        with torch.no_grad(), trace(model, names) as chosen:
            logits = model(**prompt, keep_last=count - position)[0, 0]
        token = int(logits.argmax()) if target.token is None else target.token
        embedding = chosen.pop("embed")
        return cls(
            model, prompt, replace(target, token=token, position=position), embedding, chosen
        )

    def answer(
        self,
        rows: int,
        changes: Mapping[str, Change],
        fixed_routing: bool,
        pixel_values: Float[Tensor, "tiles c height width"] | None = None,
    ) -> Float[Tensor, " rows"]:
        """Compute the target in `rows` copies of the prompt, changed as for `intervene`.

        With `fixed_routing` every token keeps the experts that it has in the clean run. Pictures
        enter as the clean run's embeddings, unless `pixel_values` hold the tiles of all rows.
        Inside a block of edits the clean run is the edited one, and these changes come last.
        """
        fixed = self.chosen if fixed_routing else {}
        if pixel_values is None:
            changes = {"embed": lambda _: self.embedding.expand(rows, -1, -1), **changes}
        ids = self.prompt.input_ids.expand(rows, -1)
        mask = self.prompt.attention_mask.expand(rows, -1)
        held = {name: lambda _, x=x: x.expand(rows, -1, -1) for name, x in fixed.items()}
        target = self.target
        # Whom tokens choose is held before edits of scores look at it.
        with intervene(self.model, changes, last=True), intervene(self.model, held):
            keep = ids.shape[1] - target.position
            logits = self.model(ids, pixel_values, mask, keep_last=keep)[:, 0].float()
        if target.quantity == "log_probability":
            logits = logits.log_softmax(dim=-1)
        return logits[:, target.token]


@dataclass(frozen=True, eq=False)
class Features:
    """Parts that can be turned off, and the target as a function of their gates.

    ``value(on, fixed_routing)`` takes gates in [0, 1], one row a run, and returns one number a run.
    """

    axes: tuple[str, ...]  # what the columns of `places` count
    places: Int[np.ndarray, "k axes"]
    labels: list[str]
    value: Callable[[Float[Tensor, "rows k"], bool], Float[Tensor, " rows"]]
    target: Target
    device: torch.device

    def __post_init__(self) -> None:
        if not self.labels:
            raise ValueError(f"no {self.axes[-1]} was given: name one part at least")
        places, counts = np.unique(self.places, axis=0, return_counts=True)
        for place in places[counts > 1]:
            named = ", ".join(f"{name} {i}" for name, i in zip(self.axes, place, strict=True))
            raise ValueError(f"{named} is given twice: a part has one gate, so name it once")

    def ends(self, fixed_routing: bool) -> tuple[float, float]:
        """Compute the target with all features off, and with all on."""
        gates = torch.tensor([[0.0], [1.0]], device=self.device)
        with torch.no_grad():
            off, on = self.value(gates.expand(2, len(self.labels)), fixed_routing).tolist()
        return off, on


@torch.inference_mode(False)
def token_features(
    model: Llama4,
    prompt: Prompt,
    target: Target = NEXT_TOKEN,
    *,
    positions: Sequence[int] | None = None,
    baseline: str | int | Float[Tensor, " d"] = "pad",
) -> Features:
    """Let tokens of a prompt fade into a baseline; image tokens are tokens like all others.

    Gates mix embeddings: integrated gradients are those of captum's ``LayerIntegratedGradients`` at
    ``embed_tokens``, summed over the width.

    Args:
        positions: the features; other tokens always stay. None takes all.
        baseline: what an off token is: ``"pad"``, ``"bos"``, the id of a token, or an embedding.

    Raises:
        ValueError: a baseline or a position that is not there, a position given twice, and as
            `Question.ask`.
    """
    question = Question.ask(model, prompt, target)
    x = question.embedding
    off = _baseline_embedding(model, baseline).to(x)
    count = x.shape[1]
    given = range(count) if positions is None else positions
    at = torch.tensor([from_start(i, count) for i in given], dtype=torch.long)
    index = at.to(x.device)

    def value(on: Tensor, fixed_routing: bool) -> Tensor:
        shown = torch.lerp(off, x[:, index], on.to(x.dtype)[..., None])  # exact at both ends
        embedding = x.repeat(len(on), 1, 1).index_copy(1, index, shown)
        return question.answer(len(on), {"embed": lambda _: embedding}, fixed_routing)

    labels = [prompt.tokens[i] for i in at.tolist()]
    return Features(("token",), at[:, None].numpy(), labels, value, question.target, x.device)


def _baseline_embedding(
    model: Llama4, baseline: str | int | Float[Tensor, " d"]
) -> Float[Tensor, " d"]:
    config = model.config
    if isinstance(baseline, Tensor):
        if baseline.shape != (config.hidden_size,):
            raise ValueError(
                f"a baseline of shape {tuple(baseline.shape)} is no embedding of this model: give "
                f"{config.hidden_size} numbers"
            )
        return baseline
    ids = {"pad": config.pad_token_id, "bos": config.bos_token_id}
    idx = ids.get(baseline) if isinstance(baseline, str) else baseline
    if idx is None or not 0 <= idx < config.vocab_size:
        raise ValueError(
            f"baseline {baseline!r} stands for no token: give 'pad' ({ids['pad']} in this model), "
            f"'bos' ({ids['bos']}), an id from 0 to {config.vocab_size - 1}, or an embedding"
        )
    return model.embed_tokens.weight[idx].detach()


def patch_features(
    model: Llama4,
    prompt: Prompt,
    target: Target = NEXT_TOKEN,
    *,
    side: int | None = None,
    blank: float = 0.0,
) -> Features:
    """Let squares of the tiles' pixels fade into one value, before the vision encoder sees them.

    Features are in the order of ``prompt.pixel_values``: tile, row, column. Where a picture has a
    global tile, a part of it lies in two tiles and has two features.

    Args:
        side: of a square in pixels; None takes the square of one image token, so that feature
            ``tile * grid**2 + patch`` belongs to the token with these ``prompt.spans``; 1 gives
            each pixel a gate (its channels together), for integrated gradients.
        blank: an off pixel, in [-1, 1]; 0 is grey.

    Raises:
        ValueError: no pictures, a side that does not fit, and as `Question.ask`.
    """
    question = Question.ask(model, prompt, target)
    pixels = question.prompt.pixel_values
    if pixels is None:
        raise ValueError("this prompt has no image: use token_features for its tokens")
    size = pixels.shape[-1]
    if side is None:
        assert prompt.spans.tiling is not None
        side = size // prompt.spans.tiling.grid
    if side < 1 or size % side:
        raise ValueError(f"squares of {side} pixels do not divide a tile of {size} pixels")
    grid = size // side

    def value(on: Tensor, fixed_routing: bool) -> Tensor:
        rows = len(on)
        gates = rearrange(on.to(pixels.dtype), "rows (n y x) -> rows n y x", y=grid, x=grid)
        gates = repeat(gates, "rows n y x -> rows n 1 (y dy) (x dx)", dy=side, dx=side)
        shown = torch.lerp(pixels.new_tensor(blank), pixels, gates)
        return question.answer(rows, {}, fixed_routing, shown.flatten(0, 1))

    places = np.indices((len(pixels), grid, grid)).reshape(3, -1).T
    labels = [f"tile {tile}, row {row}, column {column}" for tile, row, column in places]
    axes = ("tile", "row", "column")
    return Features(axes, places, labels, value, question.target, pixels.device)
