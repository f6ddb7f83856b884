"""What image tokens show: places on the picture, maps of experts, attention and effects, scores.

`patches_of` says where the tokens of a picture stand and what they show. Its `grid` turns anything
counted over the prompt's tokens into maps ``[tiles, rows, cols]``, the global tile last, and
`stitch` lays the tiles together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from tqdm.auto import tqdm

from llama4_lab.analysis.attention import KeysAndQueries, rows
from llama4_lab.analysis.positions import from_start
from llama4_lab.analysis.routing import Routing
from llama4_lab.edits import AblateEmbedding, Edit, Patch, edited
from llama4_lab.edits.base import CLEAN
from llama4_lab.model import Llama4
from llama4_lab.prompt import Layout, Prompt, Tiling, tokens_of
from llama4_lab.replay import Replay

Place = Sequence[int]
"""Tile of a picture, row and column of a token in its tile."""
Box = Sequence[int | float | Fraction]
"""Left, top, right, bottom in pixels of the picture as given; pixel i reaches from i to i + 1."""
Effects = Callable[[Sequence[Sequence[int]]], Float[np.ndarray, " sets"]]
"""Takes sets of tokens to mask, and returns what masking each of them costs."""


@dataclass(frozen=True, eq=False)
class Patches:
    """The image tokens of one picture: where they stand in the prompt, and what they show.

    The picture's tiles are counted from 0, row by row; the global one comes last. A token shows a
    square of its tile, which bilinear resizing blurs by less than one pixel of the tile.
    """

    layout: Layout
    tiling: Tiling
    position: Int[np.ndarray, "tiles rows cols"]  # of each token in the prompt

    def places(self, x: int, y: int) -> list[tuple[int, int, int]]:
        """Find the tokens that show a pixel: one of the local tiles, then one of the global tile.

        It is the tokens in which the pixel's centre lies. A picture of a single tile has one.

        Raises:
            ValueError: a pixel outside the picture.
        """
        at, grid = self.layout, self.tiling.grid
        if not (0 <= x < at.width and 0 <= y < at.height):
            raise ValueError(
                f"pixel ({x}, {y}) is outside the picture of {at.width}x{at.height} pixels: "
                f"x goes from 0 to {at.width - 1}, y from 0 to {at.height - 1}"
            )
        side = self.tiling.image_size
        down, row = divmod((2 * y + 1) * at.fit_height * grid // (2 * at.height * side), grid)
        along, col = divmod((2 * x + 1) * at.fit_width * grid // (2 * at.width * side), grid)
        found = [(down * at.cols + along, row, col)]
        if at.num_tiles > 1:
            whole = (2 * y + 1) * grid // (2 * at.height), (2 * x + 1) * grid // (2 * at.width)
            found.append((at.num_tiles - 1, *whole))
        return found

    def place(self, token: int) -> tuple[int, int, int]:
        """Return the tile, row and column of a token of the prompt.

        Raises:
            ValueError: a token that shows nothing of this picture.
        """
        found = np.argwhere(self.position == token)
        if not len(found):
            raise ValueError(
                f"token {token} shows nothing of this picture, whose {self.position.size} image "
                f"tokens stand between {self.position.min()} and {self.position.max()}"
            )
        tile, row, col = found[0].tolist()
        return tile, row, col

    def box(self, place: Place) -> tuple[Fraction, Fraction, Fraction, Fraction]:
        """Return the part of the picture that a token shows, exactly; empty if it shows padding."""
        tile, row, col = place
        (left, right, across), (top, bottom, down) = self._edges()
        return (
            Fraction(int(left[tile, col]), across),
            Fraction(int(top[tile, row]), down),
            Fraction(int(right[tile, col]), across),
            Fraction(int(bottom[tile, row]), down),
        )

    def cover(self, box: Box) -> Float[np.ndarray, "tiles rows cols"]:
        """Return the share of what each token shows that lies in a box; 0 for padding."""
        shares = []
        for (begin, end, unit), low, high in zip(self._edges(), box[:2], box[2:], strict=True):
            inside = np.minimum(end, float(high * unit)) - np.maximum(begin, float(low * unit))
            shares.append(inside.clip(0) / (end - begin).clip(1))
        across, down = shares
        return down[:, :, None] * across[:, None, :]

    def tokens(self, box: Box) -> list[int]:
        """List the tokens, of all tiles, that show anything inside a box."""
        return self.position[self.cover(box) > 0].tolist()

    def grid(self, values: Shaped[np.ndarray, "*axes n"]) -> Shaped[np.ndarray, "*axes t r c"]:
        """Lay values of the prompt's tokens (last axis) on the tiles, rows and columns."""
        return values[..., self.position]

    def stitch(self, maps: Shaped[np.ndarray, "*axes t r c"]) -> Shaped[np.ndarray, "*axes h w"]:
        """Lay the local tiles together as they lie on the canvas; the global tile stays away."""
        local = maps[..., : self.layout.rows * self.layout.cols, :, :]
        return rearrange(
            local, "... (down along) r c -> ... (down r) (along c)", along=self.layout.cols
        )

    def _edges(self) -> list[tuple[np.ndarray, np.ndarray, int]]:
        """For x, then y: where tokens begin and end ``[tiles, grid]``, as multiples of 1/unit px.

        Of the local tiles cell i begins at i · side/grid pixels of the canvas, each of which is
        length/fit of the picture's; of the global tile at i · length/grid.
        """
        at, grid = self.layout, self.tiling.grid
        tile = np.arange(at.rows * at.cols)
        edges = []
        for length, fit, nth in (
            (at.width, at.fit_width, tile % at.cols),
            (at.height, at.fit_height, tile // at.cols),
        ):
            unit = grid * fit
            cell = nth[:, None] * grid + np.arange(grid + 1)
            cuts = np.minimum(cell * self.tiling.image_size * length, length * unit)
            if at.num_tiles > 1:
                cuts = np.concatenate([cuts, np.arange(grid + 1)[None] * length * fit])
            edges.append((cuts[:, :-1], cuts[:, 1:], unit))
        return edges


def patches_of(prompt: Prompt, image: int = 0) -> Patches:
    """Find the tokens of one picture of a prompt of one row.

    Raises:
        ValueError: a picture that the prompt does not have, or a prompt of several rows.
    """
    tokens = tokens_of(prompt)
    spans, count = prompt.spans, len(prompt.spans.layouts)
    assert len(tokens) == spans.patch.shape[1]
    if not 0 <= image < count or spans.tiling is None:
        raise ValueError(f"picture {image} is not in this prompt: it has {count}, counted from 0")
    at = np.flatnonzero((spans.image[0] == image) & (spans.patch[0] >= 0))
    tile, patch = spans.tile[0].numpy()[at], spans.patch[0].numpy()[at]
    grid = spans.tiling.grid
    position = np.full((spans.layouts[image].num_tiles, grid, grid), -1)
    position[tile - tile.min(), patch // grid, patch % grid] = at
    return Patches(spans.layouts[image], spans.tiling, position)


def encoder_slots(tiling: Tiling) -> Int[np.ndarray, "rows cols block block"]:
    """Return the patch slots of the vision encoder that pixel shuffle puts into each token.

    They count the axes t and s of the points ``vision.layers.*``.

    >>> encoder_slots(Tiling(336, 14, 0.5))[0, 1].tolist()
    [[2, 3], [26, 27]]
    """
    side = tiling.image_size // tiling.patch_size
    slots = np.arange(side**2).reshape(side, side)
    return rearrange(slots, "(r dy) (c dx) -> r c dy dx", r=tiling.grid, c=tiling.grid)


def experts_of(
    routing: Routing, patches: Patches, choice: int = 0
) -> Int[np.ndarray, "l tiles rows cols"]:
    """Map the expert that each image token chose; `choice` 0 is its strongest."""
    return patches.grid(routing.expert[..., choice])


def from_text(
    layers: Sequence[KeysAndQueries], patches: Patches, tokens: Sequence[int]
) -> Float[np.ndarray, "l h q tiles rows cols"]:
    """Map how much of each asked token's attention (shares in [0, 1]) the image tokens get.

    Only tokens behind the picture, and on RoPE layers in the same chunk, see any of it. `layers`
    are what `llama4_lab.analysis.attention.keys_and_queries` reads.
    """
    return patches.grid(_rows(layers, tokens))


def to_text(
    layers: Sequence[KeysAndQueries], patches: Patches, tokens: Sequence[int]
) -> Float[np.ndarray, "l h s tiles rows cols"]:
    """Map how much of each image token's attention (shares in [0, 1]) the asked tokens get.

    Only tokens before the picture, and on RoPE layers in the same chunk, are seen from it.

    Raises:
        ValueError: a token that the prompt does not have.
    """
    shares = _rows(layers, patches.position.ravel().tolist())
    shares = shares[..., [from_start(token, shares.shape[-1]) for token in tokens]]
    return np.moveaxis(shares, -1, 2).reshape(*shares.shape[:2], -1, *patches.position.shape)


def _rows(layers: Sequence[KeysAndQueries], queries: Sequence[int]) -> Float[np.ndarray, "l h q s"]:
    heads = [[rows(*kept.head(i), queries) for i in range(len(kept.q))] for kept in layers]
    return torch.stack([torch.stack(layer) for layer in heads]).cpu().numpy()


def sinks(
    shares: Float[np.ndarray, "*maps q tiles rows cols"], factor: float = 10.0
) -> Bool[np.ndarray, "*maps tiles rows cols"]:
    """Say which patches get more than `factor` times the median patch's share from every query.

    Such patches are looked at whatever is asked (Kang et al. 2025, "See what you are told"): give
    several queries, for of one alone they are also what it looks for. Queries that see less than
    half of the picture have no say. Registers (Darcet et al. 2024) are found in the same way from
    the norms of ``projector.out``, handed in as one query.
    """
    flat = rearrange(shares, "... tiles rows cols -> ... (tiles rows cols)")
    median = np.median(flat, axis=-1, keepdims=True)
    asks = median > 0
    found = ((flat > factor * median) | ~asks).all(axis=-2) & asks.any(axis=-2)
    return found.reshape(*shares.shape[:-4], *shares.shape[-3:])


def without_sinks(
    shares: Float[np.ndarray, "*maps q tiles rows cols"],
    found: Bool[np.ndarray, "*maps tiles rows cols"],
) -> Float[np.ndarray, "*maps q tiles rows cols"]:
    """Give the shares of sinks to the other patches, in proportion; each map keeps its sum."""
    kept = np.where(found[..., None, :, :, :], 0, shares)
    all_shares, others = (x.sum(axis=(-3, -2, -1), keepdims=True) for x in (shares, kept))
    return kept * np.divide(all_shares, others, out=np.zeros_like(others), where=others > 0)


@torch.no_grad()
def masking_effects(
    model: Llama4,
    prompt: Prompt,
    answer: Sequence[int],
    sets: Sequence[Sequence[int]],
    *,
    fill: str | int = "mean",
    edits: Sequence[Edit] = (),
    max_tokens: int = 2048,
    progress: bool = True,
) -> Float[np.ndarray, " sets"]:
    """Return what masking each set of image tokens costs the answer: nats of log-probability.

    Positive if the tokens speak for the answer, which is given as ids that follow the prompt. The
    masked runs are replays, which begin at the first masked token; under edits of pictures or of
    `embed`, painted ones are whole runs.

    Args:
        fill: ``"mean"`` puts the mean image token of the prompt in the tokens' place, ``"zero"``
            nothing. The vision encoder has let tokens of a tile see each other before. A grey
            level, 0 to 255, paints over the tokens' pixels and takes them away from all; the
            vision encoder runs again for each set.
        edits: the model as it is to be asked, masked or not.
        max_tokens, progress: as for `Replay`.

    Raises:
        ValueError: an empty answer, an unknown fill, tokens that show no picture, or edits that
            model or prompt cannot have.
    """
    if not len(answer):
        raise ValueError("the answer is empty: give the ids of the tokens that should follow")
    if fill not in ("mean", "zero", *range(256)):
        raise ValueError(f'fill {fill!r} is unknown: give "mean", "zero" or a grey level, 0 to 255')
    known = np.flatnonzero(prompt.spans.patch[0] >= 0).tolist()
    if strange := {token for some in sets for token in some}.difference(known):
        raise ValueError(
            f"token {min(strange)} shows no picture: mask tokens that "
            "patches_of(prompt, image).position holds"
        )
    prompt, said = prompt.to(model.device), torch.tensor(list(answer), device=model.device)
    ids = torch.cat([prompt.input_ids, said[None, :-1]], dim=1)
    asked = {"input_ids": ids, "pixel_values": prompt.pixel_values}
    painted, runs = {}, [[*edits]]  # the first one masks nothing
    for i, some in enumerate(sets):
        runs.append([*edits])
        if isinstance(fill, str):
            mask = AblateEmbedding(tuple(some), fill)
        else:
            painted[name := f"painted {i}"] = asked | {"pixel_values": _painted(prompt, some, fill)}
            mask = Patch("embed", name, _in_reach(prompt, some))
        if len(some):
            runs[-1].append(mask)

    def log_prob(logits: Float[Tensor, "n v"]) -> float:
        return logits.float().log_softmax(dim=-1).gather(-1, said[:, None]).sum().item()

    log_probs = np.zeros(len(runs))
    replay = Replay(model, asked, painted, max_tokens=max_tokens, progress=progress)
    if painted and any(edit.touches(model.config).layer < 0 for edit in edits):
        # A patch of `embed` would put what is painted in place of what these edits do.
        log_probs[:] = log_prob(replay.edited(edits).logits[-len(said) :])
        with edited(model, edits, {CLEAN: asked}):
            for i in tqdm(range(len(sets)), desc="painted runs", delay=2, disable=not progress):
                if len(sets[i]):
                    log_probs[i + 1] = log_prob(model(**painted[f"painted {i}"])[0, -len(said) :])
        return log_probs[0] - log_probs[1:]
    for i, run in replay.stream(runs):
        begins_before = len(run.hidden) >= len(said)
        logits = (
            run.logits_of(slice(-len(said), None)) if begins_before else run.logits[-len(said) :]
        )
        log_probs[i] = log_prob(logits)
    return log_probs[0] - log_probs[1:]


def _in_reach(prompt: Prompt, tokens: Sequence[int]) -> tuple[int, ...]:
    """Return the image tokens that see some in the vision encoder: all of the same tiles."""
    tile = prompt.spans.tile[0]
    in_reach = (prompt.spans.patch[0] >= 0) & torch.isin(tile, tile[list(tokens)])
    return tuple(np.flatnonzero(in_reach).tolist())


def _painted(
    prompt: Prompt, tokens: Sequence[int], grey: int
) -> Float[Tensor, "tiles c height width"]:
    """Paint over the pixels of some tokens, each in its own tile."""
    spans = prompt.spans
    assert prompt.pixel_values is not None and spans.tiling is not None
    pixels, side = prompt.pixel_values.clone(), spans.tiling.image_size // spans.tiling.grid
    for token in tokens:
        row, col = divmod(int(spans.patch[0, token]), spans.tiling.grid)
        down, along = (slice(side * i, side * (i + 1)) for i in (row, col))
        pixels[spans.tile[0, token], :, down, along] = grey / 127.5 - 1
    return pixels


def causal_map(patches: Patches, effects: Effects, window: int = 1) -> Float[np.ndarray, "h w"]:
    """Map over the stitched tiles what masking a window of ``window²`` tokens costs (nats).

    Masked are the tokens of all tiles that show anything of the window's part of the picture, the
    global tile's among them; a token gets the mean over the windows that hold it. `effects` takes
    the sets of tokens: ``partial(masking_effects, model, prompt, answer)``. For one token of one
    tile at a time, call that with ``patches.position.reshape(-1, 1).tolist()``.

    Raises:
        ValueError: a window that does not fit.
    """
    place = patches.stitch(np.indices(patches.position.shape))
    height, width = place.shape[1:]
    if not 1 <= window <= min(height, width):
        raise ValueError(
            f"a window of {window} tokens does not fit a map of {height}x{width}: "
            f"give 1 to {min(height, width)}"
        )

    def tokens(top: int, left: int) -> list[int]:
        first = patches.box(place[:, top, left].tolist())
        last = patches.box(place[:, top + window - 1, left + window - 1].tolist())
        return patches.tokens((*first[:2], *last[2:]))

    corners = [(y, x) for y in range(height - window + 1) for x in range(width - window + 1)]
    total, count = np.zeros((2, height, width))
    for (y, x), effect in zip(corners, effects([tokens(*at) for at in corners]), strict=True):
        total[y : y + window, x : x + window] += effect
        count[y : y + window, x : x + window] += 1
    return total / count


@dataclass(frozen=True, eq=False)
class Grounding:
    """How well maps point to an object; each in [0, 1], one number a map.

    A token of which the box covers a part counts as so many pixels inside and outside.
    """

    pointing: Float[np.ndarray, "*maps"]  # share of the strongest token inside (Zhang et al. 2018)
    mass: Float[np.ndarray, "*maps"]  # share of positive values inside (Wang et al. 2020)
    roc_area: Float[np.ndarray, "*maps"]  # a pixel inside beats one outside; a tie counts half
    precision: Float[np.ndarray, "*maps"]  # average precision: mean over the pixels inside


def grounding(maps: Float[np.ndarray, "*maps n"], cover: Float[np.ndarray, " n"]) -> Grounding:
    """Score maps over tokens against the share of each token that a box covers (`Patches.cover`).

    A uniform map scores the box's share of the area, and 0.5 for the ROC area; a map equal to a
    mask of zeros and ones scores 1. Several strongest tokens share the point.

    >>> float(grounding(np.array([0.1, 0.6, 0.3]), np.array([0.0, 1.0, 0.0])).mass)
    0.6

    Raises:
        ValueError: a box that covers nothing or everything.
    """
    if not (cover > 0).any() or (cover >= 1).all():
        what = "no token" if not (cover > 0).any() else "every token whole"
        raise ValueError(f"the box covers {what}: there is nothing to tell apart")
    scores = np.apply_along_axis(_scores, -1, maps, cover)
    return Grounding(*(scores[..., i] for i in range(4)))


def _scores(values: Float[np.ndarray, " n"], cover: Float[np.ndarray, " n"]) -> list[float]:
    """Score one map, over groups of equal values, the strongest first."""
    _, group = np.unique(-values, return_inverse=True)
    size, inside = np.bincount(group), np.bincount(group, cover)
    outside, found = size - inside, inside.cumsum()
    positive = values.clip(0)
    return [
        inside[0] / size[0],
        (positive * cover).sum() / (positive.sum() or 1.0),
        (outside * (found - inside / 2)).sum() / (outside.sum() * inside.sum()),
        (inside * found / size.cumsum()).sum() / inside.sum(),
    ]
