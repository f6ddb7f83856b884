"""What do image tokens show, which expert takes them, who looks at them, and which ones matter?"""

import base64
import io
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import ipywidgets
import numpy as np
from einops import rearrange
from jaxtyping import Int
from PIL import Image

from llama4_lab.analysis.routing import routing_of
from llama4_lab.analysis.vision import Patches, causal_map, masking_effects, patches_of
from llama4_lab.prompt import Prompt
from llama4_widgets.panels import Axis, Content, around_zero, experts
from llama4_widgets.patterns import attended, decades, in_decades
from llama4_widgets.slices import Work
from llama4_widgets.still import png, unpack
from llama4_widgets.view import View
from llama4_widgets.words import counted

_BYTES = 150_000  # of all pictures of an update
_OUT_OF_SIGHT = "none of it is in sight: it comes later, or lies in another chunk"
_SETS = 16  # of masked tokens in one step
_NONE = (
    "this prompt has no picture: in the lab press Picture or Scene above, or give one in code, as "
    "in app.run(text, [picture]) and model.prompt(text, [picture])"
)

Overlay = tuple[str, str, Any, str]  # the name of its array, title, scale and note
_BARE = {"kind": "category", "unit": "", "colours": [], "inks": []}


class ImageView(View):
    """Pictures as the model sees them, with their tokens: experts, attention, effects."""

    title = "Image"
    help = (
        "A picture is cut into tiles, and a tile into patches; pixel shuffle turns each block of "
        "patches into one image token (a cell), which stands in the text like a word: click one "
        "to follow it. A picture of several tiles is read once more as a whole, in the global "
        "tile; black is padding."
    )
    follows = ("layer", "token")

    def controls(self) -> list[ipywidgets.Widget]:
        self.work = Work(self, "Which patches matter?", self._steps)
        return [ipywidgets.HBox([self.work.begin, self.work.stop])]

    def content(self) -> Content:
        moment, pictures = self.moment, pictures_of(self.moment.prompt)
        if not pictures:
            return Content()
        names = _names(pictures)
        tokens = np.array([*names])
        content = Content({
            "patch": Axis("token", len(names), "token", [*names.values()], [*names]),
            "head": self.axes()["head"],
        })  # fmt: skip
        content.array("bare", np.full(len(tokens), np.nan), ("patch",))
        overlays = [
            ("bare", "as the model sees it", _BARE, ""),
            *self._experts(content, tokens),
            *self._attention(content, tokens),
            *self._effects(content, tokens, pictures),
        ]
        room = _BYTES // (len(pictures) * len(overlays) + len(pictures))
        starts = np.cumsum([0, *(one.position.size for one in pictures)])
        canvases, wholes = zip(
            *(drawn_pictures(moment.prompt, one) for one in pictures), strict=True
        )
        share = 1 / min(len(pictures), 5) if len(pictures) > 1 else None
        looks = [each for each in overlays if each[0].startswith("attention")][-1]
        drawn = [(overlay, i, False) for overlay in overlays for i in range(len(pictures))]
        drawn += [(looks, i, True) for i, one in enumerate(pictures) if one.layout.num_tiles > 1]
        for (array, title, scale, note), i, is_global in drawn:
            one = pictures[i]
            place = starts[i] + np.arange(one.position.size).reshape(one.position.shape)
            place = place[-1] if is_global else one.stitch(place)
            if array.startswith("attention") and not self._sees(content, array, place):
                note = _OUT_OF_SIGHT
            name = "Picture" + f" {i}" * (len(pictures) > 1) + ", global tile" * is_global
            add_picture(
                content, f"{array} {i}" + " global" * is_global, f"{name}: {title}", array, scale,
                place, (wholes if is_global else canvases)[i], room, note=note, share=share,
                opacity=0.55, boxes=self._boxes(one, i, is_global, array == "bare"),
            )  # fmt: skip
        return content

    def summary(self) -> str:
        moment, token = self.moment, self.selection.token
        if not (layouts := moment.prompt.spans.layouts):
            return _NONE
        sizes = [
            f"{at.width} × {at.height} pixels in {at.rows} × {at.cols} tiles"
            + " and a global one" * (at.num_tiles > 1)
            for at in layouts
        ]
        if len(sizes) > 1 and len({*sizes}) == 1:
            sizes = [f"each {sizes[0]}"]
        said = f"{counted(len(layouts), 'picture')}: {', '.join(sizes)}"
        if token in (names := _names(pictures_of(moment.prompt))):
            return f"{said}; token {token} shows {names[token]}"
        kind = "a special token" if moment.words[token].startswith("<|") else "text"
        return f"{said}; {moment.called(token)} is {kind}"

    # ---- what lies over the pictures

    def _experts(self, content: Content, tokens: np.ndarray) -> Iterator[Overlay]:
        routing, layer = self.moment.edited(routing_of), self.selection.layer
        if layer in routing.layers:
            chosen = routing.expert[routing.row(layer), tokens, 0]
            content.array("expert", chosen, ("patch",))
            scale = experts(routing.num_experts)
            yield "expert", f"expert in layer {layer}", scale, "of the strongest score"

    def _attention(self, content: Content, tokens: np.ndarray) -> Iterator[Overlay]:
        moment, layer, token = self.moment, self.selection.layer, self.selection.token
        count, heads = len(moment.words), moment.model.config.num_attention_heads
        is_whole = heads * count**2 <= 1 << 20
        for run, found in attended(moment, layer, is_whole):
            share = np.stack([found.row(head, token)[tokens] for head in range(heads)])
            name = f"attention {run}".strip()
            content.array(name, in_decades(share), ("head", "patch"))
            title = f"attention in layer {layer} from {moment.called(token)}"
            title += f", {run}" * bool(run)
            yield name, title, decades(count), "of the selected head"

    def _sees(self, content: Content, array: str, place: np.ndarray) -> bool:
        """Whether any head sees any of these places."""
        held = unpack(content.arrays[array])
        return bool(np.isfinite(held[:, place.ravel()]).any())

    def _effects(
        self, content: Content, tokens: np.ndarray, pictures: list[Patches]
    ) -> Iterator[Overlay]:
        if causal_map not in self.moment.kept:
            return
        maps, answer = self.moment.kept[causal_map]  # what masking each patch costs, by picture
        values = np.full(len(tokens), np.nan)
        for one, found in zip(pictures, maps, strict=True):
            values[np.searchsorted(tokens, one.stitch(one.position))] = found
        content.array("effect", values, ("patch",))
        where = ", in the global tile too," * any(one.layout.num_tiles > 1 for one in pictures)
        note = f"log-probability of ‘{answer}’ lost when the patch{where} is the mean one"
        yield "effect", "effect on the answer", around_zero(values, "nats", 0), note

    def _boxes(self, one: Patches, i: int, is_global: bool, is_named: bool) -> list[list[Any]]:
        """Return the frames of a picture's tiles, and of what it shows."""
        at, side = one.layout, one.tiling.image_size
        fit = (side, side) if is_global else (at.fit_width, at.fit_height)
        boxes: list[list[Any]] = []
        for tile in range(at.rows * at.cols if at.num_tiles > 1 and not is_global else 0):
            y, x = (side * n for n in divmod(tile, at.cols))
            boxes.append([x, y, x + side, y + side, f"tile {tile}" * is_named, "l4-tile"])
        for left, top, right, bottom, name in self.moment.boxes if i == 0 else []:
            across, down = fit[0] / at.width, fit[1] / at.height
            edges = [left * across, top * down, right * across, bottom * down]
            boxes.append([*edges, name * is_named, ""])
        return boxes

    # ---- what masking patches costs the answer

    def _steps(self) -> Generator[str, None, None]:
        """Compute the maps of all pictures, some sets of tokens at a time."""
        moment, pictures = self.moment, pictures_of(self.moment.prompt)
        if not pictures:
            return  # the summary says it
        with moment.computing():
            answer = (int(moment.edited_run.logits_of(slice(-1, None)).argmax()),)
        wanted: list[list[Sequence[int]]] = []
        for one in pictures:
            causal_map(one, lambda sets: wanted.append(list(sets)) or np.zeros(len(sets)))
        count, done, maps = sum(map(len, wanted)), 0, []
        yield f"masking patches: 0 of {count}"
        for one, sets in zip(pictures, wanted, strict=True):
            parts = []
            for start in range(0, len(sets), _SETS):
                some = tuple(tuple(tokens) for tokens in sets[start : start + _SETS])
                # The edits are arguments here, so nothing has to stand around the call.
                parts.append(
                    moment.clean(masking_effects, answer, some, edits=moment.edits, progress=False)
                )
                done += len(some)
                yield f"masking patches: {done} of {count}"
            effects = np.concatenate(parts)
            maps.append(causal_map(one, lambda _, effects=effects: effects))
        moment.kept[causal_map] = maps, moment.word(answer[0])


def pictures_of(prompt: Prompt) -> list[Patches]:
    """Return where the tokens of each picture lie."""
    return [patches_of(prompt, i) for i in range(len(prompt.spans.layouts))]


def _names(pictures: Sequence[Patches]) -> dict[int, str]:
    """Name each image token by its tile, row and column."""
    found = {}
    for i, one in enumerate(pictures):
        for (tile, row, col), token in np.ndenumerate(one.position):
            is_global = one.layout.num_tiles > 1 and tile == one.layout.num_tiles - 1
            part = "global tile" if is_global else f"tile {tile}"
            name = f"picture {i}, " * (len(pictures) > 1) + f"{part}, row {row}, column {col}"
            found[int(token)] = name
    return found


def drawn_pictures(prompt: Prompt, one: Patches) -> tuple[Image.Image, Image.Image]:
    """Return the tiles of a picture as the model sees them, and the last one: the global tile."""
    assert prompt.pixel_values is not None
    at, first = one.layout, int(prompt.spans.tile[0, one.position[0, 0, 0]])
    tiles = prompt.pixel_values[first : first + at.num_tiles].float().cpu().numpy()
    tiles = np.rint((tiles + 1) * 127.5).clip(0, 255).astype(np.uint8)
    if tiles.shape[1] == 1:
        tiles = tiles.repeat(3, axis=1)
    local = rearrange(tiles[: at.rows * at.cols], "(r c) rgb y x -> (r y) (c x) rgb", c=at.cols)
    whole = Image.fromarray(rearrange(tiles[-1], "rgb y x -> y x rgb").copy())
    return Image.fromarray(local), whole


def add_picture(
    content: Content,
    name: str,
    title: str,
    array: str,
    scale: Mapping[str, Any],
    place: Int[np.ndarray, "r c"],
    picture: Image.Image,
    room: int,
    **options: Any,
) -> None:
    """Lay an array over a picture, of which a page gets at most `room` bytes.

    `place` says which index of the array's last axis each cell shows.
    """
    content.add(
        name, title, None, content.arrays[array]["axes"], scale, kind="picture", array=array,
        wide=False, source=data_url(picture, room), width=picture.width, height=picture.height,
        rows=place.shape[0], cols=place.shape[1], positions=place.ravel().tolist(), **options,
    )  # fmt: skip


def data_url(picture: Image.Image, room: int) -> str:
    """Write a picture as an address of its own: PNG, or a smaller JPEG where that needs room."""
    data, kind, side = png(picture), "png", 672
    while len(data) * 4 > room * 3 and side > 32:  # base64: four letters for three bytes
        smaller = picture.copy()
        smaller.thumbnail((side, side))
        written, side = io.BytesIO(), int(side * 0.7)
        smaller.save(written, "JPEG", quality=80)
        data, kind = written.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
