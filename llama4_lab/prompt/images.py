"""Pictures for the vision encoder: the canvas, its tiles, and the tokens that stand for them.

A picture is fitted into the top left corner of a canvas of whole tiles. With more than one tile,
the whole picture squeezed into a square follows as a global tile. The rules are those of
transformers' ``Llama4ImageProcessor``; the pixels are float32, as in Meta's ``preprocess.py``,
where transformers rounds them to bfloat16. Read `llama4_lab.prompt` next.
"""

import io
import struct
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

Picture = Image.Image | np.ndarray | str | Path | bytes | io.BytesIO | io.BufferedReader
MODES = {1: "L", 3: "RGB"}  # PIL's name of a picture with so many channels
_OF_PIL = (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Tiling:
    """How a model cuts pictures: sizes in pixels, and the most tiles of one picture."""

    image_size: int  # of one tile's side
    patch_size: int
    shuffle_ratio: float  # image tokens per patch, along one side
    num_channels: int = 3
    max_tiles: int = 16

    def __post_init__(self) -> None:
        if self.grid * self.patch_size != self.image_size * self.shuffle_ratio:
            raise ValueError(
                f"a tile of {self.image_size} pixels does not hold a whole number of tokens with "
                f"patches of {self.patch_size} pixels and a pixel-shuffle ratio of "
                f"{self.shuffle_ratio}"
            )
        check_max_tiles(self.max_tiles)
        if self.num_channels not in MODES:
            raise ValueError(f"{self.num_channels} channels: pictures have 1 (grey) or 3 (RGB)")

    @property
    def grid(self) -> int:
        """Image tokens along one side of a tile."""
        return floor(self.image_size / self.patch_size * self.shuffle_ratio)


def check_max_tiles(max_tiles: object) -> None:
    if not isinstance(max_tiles, int) or max_tiles < 1:
        raise ValueError(
            f"max_tiles {max_tiles!r} is no number of tiles: give a whole number from 1 up"
        )


@dataclass(frozen=True)
class Layout:
    """Where a picture lies on its canvas of `rows` × `cols` tiles; other sizes in pixels."""

    height: int  # of the picture as given
    width: int
    fit_height: int  # of the picture as it lies in the top left corner of the canvas
    fit_width: int
    rows: int
    cols: int

    @property
    def num_tiles(self) -> int:
        """Tiles that the vision encoder sees, the global one among them."""
        return self.rows * self.cols + (self.rows * self.cols > 1)


def open_picture(picture: Picture, num_channels: int = 3) -> Image.Image:
    """Bring a PIL image, an array of uint8 ``(height, width, channels)`` or a file to 8-bit colour.

    A file is given by its name, its bytes, or open. Transparency lies on white; a file is turned
    upright as its EXIF data say.

    Raises:
        TypeError, ValueError: not a picture, or not of 8 bits.
        FileNotFoundError: no file of this name.
    """
    if isinstance(picture, bytes):
        picture = io.BytesIO(picture)
    if isinstance(picture, str | Path | io.BytesIO | io.BufferedReader | Image.Image):
        try:
            if isinstance(picture, Image.Image):
                picture.load()  # a file that was opened is read only here
            else:
                with Image.open(picture) as file:
                    picture = _upright(file)
        except FileNotFoundError:
            raise
        except (AssertionError, AttributeError) as error:  # PIL looks for the file that it read
            raise ValueError(f"{picture} was closed before it was read: open it again") from error
        except _OF_PIL as error:
            raise ValueError(f"{picture} is not a usable image file: {error}") from error
    elif isinstance(picture, np.ndarray):
        picture = _from_array(picture)
    else:
        raise TypeError(
            f"a picture is a PIL image, a uint8 array, or a file's name or bytes, not "
            f"{type(picture).__name__}"
        )
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"a picture of mode {picture.mode} has no 8-bit colours: convert it first")
    if not (picture.width and picture.height):
        raise ValueError(f"a picture of {picture.width}x{picture.height} pixels shows nothing")
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        picture = Image.new("RGB", rgba.size, "white")
        picture.paste(rgba, mask=rgba.getchannel("A"))
    return picture.convert(MODES[num_channels])


def _upright(file: Image.Image) -> Image.Image:
    file.load()
    try:
        return ImageOps.exif_transpose(file)
    except (SyntaxError, OSError, ValueError, struct.error):  # EXIF data that say nothing
        return file.copy()


def _from_array(array: np.ndarray) -> Image.Image:
    channels = 1 if array.ndim == 2 else array.shape[-1]
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ValueError(
            f"an array of {array.dtype} with shape {array.shape} is no picture: "
            "give uint8 (height, width, channels) with 1, 3 or 4 channels"
        )
    return Image.fromarray(array[..., 0] if array.ndim == 3 and channels == 1 else array)


def choose_canvas(height: int, width: int, tiling: Tiling) -> tuple[int, int]:
    """Choose rows and columns of tiles for a picture of so many pixels.

    Of the canvases that enlarge the picture the one that does so least, otherwise the one that
    shrinks it least; of equal ones the smallest. Scales are compared as fractions; transformers
    compares them rounded to float32, which tells apart all scales below a million pixels a side.

    >>> choose_canvas(300, 1000, Tiling(336, 14, 0.5))
    (1, 3)
    """

    def badness(canvas: tuple[int, int]) -> tuple[bool, Fraction, int]:
        rows, cols = canvas
        scale = tiling.image_size * min(Fraction(rows, height), Fraction(cols, width))
        return scale < 1, scale if scale >= 1 else -scale, rows * cols

    most = tiling.max_tiles
    canvases = [(r, c) for r in range(1, most + 1) for c in range(1, most // r + 1)]
    return min(canvases, key=badness)


def place(height: int, width: int, tiling: Tiling) -> Layout:
    """Lay a picture out: it grows to the side of one tile at most, and keeps its proportions."""
    rows, cols = choose_canvas(height, width, tiling)
    box_height, down = _box(height, rows, tiling.image_size)
    box_width, across = _box(width, cols, tiling.image_size)
    if across < down:
        fit_height, fit_width = min(floor(height * across), box_height), box_width
    else:
        fit_height, fit_width = box_height, min(floor(width * down), box_width)
    return Layout(height, width, max(fit_height, 1), max(fit_width, 1), rows, cols)


def _box(side: int, tiles: int, tile: int) -> tuple[int, float | np.float32]:
    """Return how long a side may become, and how many times as long as it is.

    Where the canvas is the limit, transformers computes in float32: it keeps canvases in tensors.
    What is then rounded down to whole pixels can be one less or more than in float64.
    """
    grown, canvas = max(side, tile), tiles * tile
    if canvas < grown:
        return canvas, np.float32(canvas) / np.float32(side)
    return grown, grown / side


def cut_tiles(
    picture: Image.Image, layout: Layout, tiling: Tiling
) -> Float[Tensor, "tiles c height width"]:
    """Resize, pad with black and cut a picture into tiles of values in [-1, 1], row by row.

    The global tile comes last. Resizing differs from torchvision's by one level of 255 in less than
    one value of a hundred, by two in less than one of a million.
    """
    size = tiling.image_size
    canvas = Image.new(picture.mode, (layout.cols * size, layout.rows * size))
    fitted = picture.resize((layout.fit_width, layout.fit_height), Image.Resampling.BILINEAR)
    canvas.paste(fitted, (0, 0))
    pattern = "(rows h) (cols w) c -> (rows cols) c h w"
    tiles = [rearrange(_values(canvas), pattern, rows=layout.rows, cols=layout.cols)]
    if layout.num_tiles > 1:
        squeezed = picture.resize((size, size), Image.Resampling.BILINEAR)
        tiles.append(rearrange(_values(squeezed), pattern, rows=1, cols=1))
    return torch.cat(tiles)


def _values(picture: Image.Image) -> Float[Tensor, "height width c"]:
    levels = torch.from_numpy(np.array(picture, dtype=np.float32))
    return (levels.reshape(picture.height, picture.width, -1) / 255 - 0.5) / 0.5


def image_tokens(layout: Layout, tiling: Tiling) -> list[tuple[str, int, int]]:
    """List the tokens of one picture: name, tile and patch, -1 where a token has neither.

    Tiles are counted as `cut_tiles` orders them, patches row by row within their tile.

    >>> len(image_tokens(place(300, 1000, Tiling(336, 14, 0.5)), Tiling(336, 14, 0.5)))
    582
    """

    def patches(tile: int) -> list[tuple[str, int, int]]:
        return [("<|patch|>", tile, patch) for patch in range(tiling.grid**2)]

    tokens = [("<|image_start|>", -1, -1)]
    if layout.num_tiles > 1:
        for tile in range(layout.rows * layout.cols):
            tokens += patches(tile)
            ends_row = (tile + 1) % layout.cols == 0
            tokens.append(("<|tile_y_separator|>" if ends_row else "<|tile_x_separator|>", -1, -1))
    whole = layout.num_tiles - 1  # the global tile, or the only one
    return [*tokens, ("<|image|>", -1, -1), *patches(whole), ("<|image_end|>", -1, -1)]
