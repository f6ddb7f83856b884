"""Coloured shapes on a grey canvas: their exact boxes, drawing them and painting them out.

`llama4_lab.train.scenes` makes and asks about such scenes at random.
"""

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

TILE = 48
"""Pixels on a side of one tile; boxes are measured in these pixels."""

PLACES = (
    *("top left", "top", "top right"),
    *("left", "middle", "right"),
    *("bottom left", "bottom", "bottom right"),
)
"""The nine places of a canvas in reading order."""
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "diamond")
PALETTE = {
    "red": (192, 8, 16),
    "orange": (240, 144, 40),
    "yellow": (255, 226, 30),
    "green": (40, 184, 104),
    "blue": (60, 104, 255),
    "purple": (132, 44, 160),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
"""sRGB; on the greys of `BACKGROUNDS` all stay apart for colour-blind people, too."""
COLOURS = tuple(PALETTE)
BACKGROUNDS = (104, 140)
"""Darkest and lightest grey of a canvas."""


@dataclass(frozen=True)
class Thing:
    """One object: `box` is left, top, right, bottom in pixels, the last two exclusive."""

    shape: str
    colour: str
    place: str
    box: tuple[int, int, int, int]

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Objects in reading order on a grey canvas of `tiles` rows and columns of tiles."""

    objects: tuple[Thing, ...]
    background: int = BACKGROUNDS[0]
    tiles: tuple[int, int] = (1, 1)


def draw(scene: Scene, size: int = TILE) -> UInt8[np.ndarray, "height width 3"]:
    """Draw with `size` pixels on a side of each tile, edges smoothed.

    Boxes are exact when `size` is a multiple of `TILE` and rounded to whole pixels otherwise.
    """
    if size < 16:
        raise ValueError(f"size {size} is too small to tell shapes apart: use 16 pixels or more")
    height, width = (size * count for count in scene.tiles)
    image = np.full((height, width, 3), scene.background, np.uint8)
    for thing in scene.objects:
        left, top, right, bottom = (round(edge * size / TILE) for edge in thing.box)
        cover = _coverage(thing.shape, bottom - top, right - left)
        paint = np.asarray(PALETTE[thing.colour], np.float32) - scene.background
        image[top:bottom, left:right] = np.rint(scene.background + cover * paint)
    return image


def erase(scene: Scene, *objects: int) -> Scene:
    """Paint out objects by index: the same scene without them."""
    for i in objects:
        if not 0 <= i < len(scene.objects):
            raise ValueError(
                f"object {i} is not in the scene: it has {len(scene.objects)}, counted from 0"
            )
    rest = tuple(thing for i, thing in enumerate(scene.objects) if i not in objects)
    return dataclasses.replace(scene, objects=rest)


@functools.cache
def _coverage(shape: str, height: int, width: int) -> Float32[np.ndarray, "height width 1"]:
    """Share of each pixel that the shape covers, from 8x8 samples a pixel; it fills its box."""
    samples = 8
    y, x = (
        (np.arange(n * samples, dtype=np.float32) + 0.5) * (2 / (n * samples)) - 1
        for n in (height, width)
    )
    inside = _inside(shape, x[None, :], y[:, None])
    blocks = inside.reshape(height, samples, width, samples)
    return blocks.mean((1, 3), dtype=np.float32)[..., None]


def _inside(
    shape: str, x: Float[np.ndarray, "1 columns"], y: Float[np.ndarray, "rows 1"]
) -> Bool[np.ndarray, "rows columns"]:
    """Whether points of the square from -1 to 1 (y downwards) belong to the shape."""
    match shape:
        case "circle":
            return x**2 + y**2 <= 1
        case "square":
            return (abs(x) <= 1) & (abs(y) <= 1)
        case "triangle":
            return abs(x) <= (y + 1) / 2
        case "cross":
            return (abs(x) <= 0.36) | (abs(y) <= 0.36)
        case "ring":
            return abs(np.hypot(x, y) - 0.77) <= 0.23
        case "diamond":
            return abs(x) + abs(y) <= 1
        case "heart":
            return ((abs(x) - 0.5) ** 2 + (y + 0.5) ** 2 <= 0.25) | (
                (abs(x) <= (1 - y) / 1.5) & (y >= -0.5)
            )
        case "star":  # one wedge of 36 degrees, mirrored; the unit star is 1.902 wide, 1.809 high
            x, y = x * 0.951, (y + 1) * 0.9045 - 1
            angle = np.pi / 5 - abs(np.arctan2(x, -y) % (2 * np.pi / 5) - np.pi / 5)
            radius, inner = np.hypot(x, y), 0.45
            slope = inner * np.sin(np.pi / 5) / (1 - inner * np.cos(np.pi / 5))
            return radius * (np.sin(angle) + slope * np.cos(angle)) <= slope
    raise ValueError(f"unknown shape {shape!r}; choose from {SHAPES}")
