"""Pictures to tiles and tokens, against the published rules and torch's own resizing."""

import inspect
import io
import math
import random

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from llama4_lab.prompt.images import (
    Layout,
    Tiling,
    choose_canvas,
    cut_tiles,
    image_tokens,
    open_picture,
    place,
)

LLAMA4 = Tiling(336, 14, 0.5)
SMALL = Tiling(48, 4, 0.5)
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def tiles_of(picture: Image.Image, tiling: Tiling = SMALL) -> torch.Tensor:
    return cut_tiles(picture, place(picture.height, picture.width, tiling), tiling)


@pytest.mark.parametrize(
    ("width", "height", "rows", "cols"),
    [
        (512, 512, 2, 2),
        (100, 80, 1, 1),
        (1000, 300, 1, 3),
        (300, 2000, 6, 1),
        (337, 336, 1, 2),
        (5000, 4000, 4, 4),
        (336, 336, 1, 1),
        (10_000, 1, 1, 16),
    ],
)
def test_canvas_equals_the_published_table(width, height, rows, cols):
    assert choose_canvas(height, width, LLAMA4) == (rows, cols)
    tokens = image_tokens(place(height, width, LLAMA4), LLAMA4)
    assert len(tokens) == (147 if rows * cols == 1 else 145 * rows * cols + 147)


def test_sixteen_tiles_take_2467_tokens():
    assert len(image_tokens(place(4000, 5000, LLAMA4), LLAMA4)) == 2467


def published_fit(height: int, width: int, rows: int, cols: int, tile: int) -> tuple[int, int]:
    """The rule of transformers' image processor, whose canvases are rows of a tensor."""
    canvas = torch.tensor([rows * tile, cols * tile])
    target_height, target_width = (
        min(max(side, tile), most) for side, most in zip((height, width), canvas, strict=True)
    )
    scale_w, scale_h = target_width / width, target_height / height
    if scale_w < scale_h:
        fit = min(math.floor(height * scale_w), target_height), target_width
    else:
        fit = target_height, min(math.floor(width * scale_h), target_width)
    return max(int(fit[0]), 1), max(int(fit[1]), 1)


@pytest.mark.parametrize("max_tiles", [1, 4, 16])
def test_pictures_get_the_sizes_that_are_published(max_tiles):
    tiling, draws = Tiling(336, 14, 0.5, max_tiles=max_tiles), random.Random(0)
    sizes = [(1600, 1200), (1863, 2484), (1917, 2982), (2001, 2668)]  # others in float64
    sizes += [(draws.randint(1, 6000), draws.randint(1, 6000)) for _ in range(1500)]
    for height, width in sizes:
        layout = place(height, width, tiling)
        found = layout.fit_height, layout.fit_width
        assert found == published_fit(height, width, layout.rows, layout.cols, 336), layout
    assert place(1600, 1200, LLAMA4).fit_width == 1007


def test_a_picture_smaller_than_a_tile_grows_to_its_side():
    assert place(80, 100, LLAMA4) == Layout(80, 100, 268, 336, 1, 1)


def test_a_picture_larger_than_a_tile_does_not_grow():
    assert place(512, 512, LLAMA4) == Layout(512, 512, 512, 512, 2, 2)
    assert place(400, 300, LLAMA4) == Layout(400, 300, 400, 300, 2, 1)
    assert place(300, 400, LLAMA4) == Layout(300, 400, 300, 400, 1, 2)


def test_a_hair_stays_visible():
    assert place(1, 10_000, LLAMA4) == Layout(1, 10_000, 1, 5376, 1, 16)


def test_layouts_keep_proportions_and_fit_their_canvas():
    draw = random.Random(0)
    for _ in range(300):
        height, width = draw.randint(1, 6000), draw.randint(1, 6000)
        layout = place(height, width, LLAMA4)
        assert layout.rows * layout.cols <= 16
        assert layout.fit_height <= layout.rows * 336
        assert layout.fit_width <= layout.cols * 336
        scale = max(layout.fit_height / height, layout.fit_width / width)
        assert abs(layout.fit_height - scale * height) < 1 or layout.fit_height == 1
        assert abs(layout.fit_width - scale * width) < 1 or layout.fit_width == 1


def test_fewer_tiles_are_used_when_asked():
    few = Tiling(336, 14, 0.5, max_tiles=4)
    assert choose_canvas(4000, 5000, few) == (2, 2)
    assert choose_canvas(300, 2000, few) == (1, 4)


@pytest.mark.parametrize(
    ("height", "width"), [(512, 512), (80, 100), (300, 1000), (337, 336), (97, 2000), (1200, 1500)]
)
def test_resizing_equals_antialiased_interpolation(height, width):
    """torchvision, which transformers resizes with, calls this function; both round twice."""
    picture = noise(height, width)
    layout = place(height, width, LLAMA4)
    tiles = cut_tiles(picture, layout, LLAMA4)

    def resize(size):
        values = rearrange(torch.from_numpy(np.array(picture)), "h w c -> 1 c h w")
        return torch.nn.functional.interpolate(values, size, mode="bilinear", antialias=True)[0]

    canvas = torch.zeros(3, layout.rows * 336, layout.cols * 336, dtype=torch.uint8)
    canvas[:, : layout.fit_height, : layout.fit_width] = resize(
        (layout.fit_height, layout.fit_width)
    )
    expected = rearrange(canvas, "c (r h) (q w) -> (r q) c h w", r=layout.rows, q=layout.cols)
    if layout.num_tiles > 1:
        expected = torch.cat([expected, resize((336, 336))[None]])
    assert tiles.shape == expected.shape == (layout.num_tiles, 3, 336, 336)
    difference = ((tiles + 1) / 2 * 255 - expected).abs().round()
    assert difference.max() <= 2
    assert (difference > 1).float().mean() < 1e-6
    assert difference.mean() < 0.01


def test_pixels_are_float32_between_minus_one_and_one():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    tiling = Tiling(16, 4, 0.5)
    tiles = tiles_of(open_picture(levels), tiling)
    assert tiles.dtype == torch.float32
    expected = (torch.arange(256, dtype=torch.float32) / 255 - 0.5) / 0.5
    assert torch.equal(tiles[0, 0].flatten(), expected)
    assert torch.equal(tiles[0, 0], tiles[0, 2])


def test_tiles_run_row_by_row_and_the_whole_picture_comes_last():
    colours = [[RED, GREEN], [BLUE, WHITE]]
    quarters = np.array(colours, dtype=np.uint8).repeat(48, axis=0).repeat(48, axis=1)
    tiles = tiles_of(open_picture(quarters))
    assert tiles.shape == (5, 3, 48, 48)
    for tile, colour in zip(tiles, [RED, GREEN, BLUE, WHITE], strict=False):
        expected = torch.tensor(colour) / 127.5 - 1
        assert torch.equal(tile, expected[:, None, None].expand_as(tile))
    whole = tiles[4, :, [0, 0, -1, -1], [0, -1, 0, -1]].T
    assert torch.equal(whole, torch.tensor([RED, GREEN, BLUE, WHITE]) / 127.5 - 1)


def test_a_picture_lies_in_the_top_left_corner_on_black():
    tiles = tiles_of(Image.new("RGB", (40, 20), "white"))
    assert tiles.shape == (1, 3, 48, 48)
    assert (tiles[:, :, :24] == 1).all()
    assert (tiles[:, :, 24:] == -1).all()


def test_transparency_lies_on_white():
    picture = Image.new("RGBA", (48, 48), (0, 0, 0, 0))
    picture.putpixel((1, 0), (0, 0, 0, 255))
    picture.putpixel((2, 0), (0, 0, 0, 128))
    pixels = open_picture(picture)
    assert [pixels.getpixel((x, 0)) for x in range(3)] == [WHITE, (0, 0, 0), (127, 127, 127)]


@pytest.mark.parametrize("mode", ["LA", "P"])
def test_every_kind_of_transparency_lies_on_white(mode):
    picture = Image.new(mode, (3, 3), 0)
    if mode == "P":
        picture.info["transparency"] = 0
    assert open_picture(picture).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
def test_arrays_are_pictures(shape):
    picture = open_picture(np.full(shape, 200, dtype=np.uint8))
    assert (picture.mode, picture.size) == ("RGB", (7, 5))


def test_a_file_is_turned_upright(tmp_path):
    path = tmp_path / "photo.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    Image.new("RGB", (30, 10)).save(path, exif=exif)
    assert open_picture(path).size == (10, 30)
    assert open_picture(str(path)).mode == "RGB"


def test_a_grey_model_gets_one_channel():
    tiling = Tiling(48, 4, 0.5, num_channels=1)
    assert cut_tiles(open_picture(noise(60, 60), 1), place(60, 60, tiling), tiling).shape[1] == 1


def test_tokens_of_two_rows_and_three_columns_stand_in_order():
    tokens = image_tokens(Layout(96, 144, 96, 144, 2, 3), SMALL)
    short = {"<|tile_x_separator|>": "x", "<|tile_y_separator|>": "y", "<|image|>": "i"}
    order = [(name, tile) for name, tile, patch in tokens if patch in (-1, 0)]
    assert "".join(short.get(name, str(tile)) for name, tile in order[1:-1]) == "0x1x2y3x4x5yi6"
    assert (order[0][0], order[-1][0]) == ("<|image_start|>", "<|image_end|>")
    for tile in range(7):
        assert [patch for _, t, patch in tokens if t == tile] == list(range(36))


def test_tokens_of_one_tile_have_no_separators():
    names = [name for name, _, _ in image_tokens(Layout(48, 48, 48, 48, 1, 1), SMALL)]
    assert names == ["<|image_start|>", "<|image|>", *["<|patch|>"] * 36, "<|image_end|>"]


@pytest.mark.parametrize(
    ("picture", "error", "message"),
    [
        (np.zeros((4, 4, 3)), ValueError, r"array of float64 with shape \(4, 4, 3\) is no picture"),
        (np.zeros((3, 4, 8), np.uint8), ValueError, r"shape \(3, 4, 8\) is no picture: give uint8"),
        (np.zeros(4, np.uint8), ValueError, r"shape \(4,\) is no picture"),
        (Image.new("I;16", (4, 4)), ValueError, "mode I;16 has no 8-bit colours"),
        (Image.new("F", (4, 4)), ValueError, "mode F has no 8-bit colours"),
        (Image.new("RGB", (0, 4)), ValueError, "a picture of 0x4 pixels shows nothing"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "a picture of 4x0 pixels shows nothing"),
        (
            7,
            TypeError,
            "a uint8 array, or a file's name or bytes, not int",
        ),
    ],
)
def test_what_is_no_picture_is_explained(picture, error, message):
    with pytest.raises(error, match=message):
        inspect.unwrap(open_picture)(picture)  # as users run it, without the types checked


def test_a_file_that_is_no_picture_is_named(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("no picture")
    with pytest.raises(ValueError, match=r"notes.png is not a usable image file"):
        open_picture(path)
    with pytest.raises(ValueError, match="is not a usable image file: invalid literal for int"):
        open_picture(b"P6\n4x 4\n255\n")
    with pytest.raises(FileNotFoundError):
        open_picture(tmp_path / "none.png")


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "half.png"
    noise(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"half.png is not a usable image file"):
        open_picture(path)
    with pytest.raises(ValueError, match=r"PngImageFile.* is not a usable image file"):
        open_picture(Image.open(path))


def test_a_picture_that_was_closed_before_it_was_read_is_named(tmp_path):
    noise(20, 30).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        pass
    with pytest.raises(ValueError, match=r"PngImageFile.* was closed before it was read: open it"):
        open_picture(picture)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_picture_with_exif_data_that_say_nothing_is_taken_as_it_is(tmp_path):
    picture = noise(20, 30)
    for exif in (b"garbage", b"MM\0*\0\0\0", b"II*\0\x08\0\0\0\xff\xff\x12\x01"):
        picture.save(tmp_path / "odd.png", exif=exif)
        assert open_picture(tmp_path / "odd.png").tobytes() == picture.tobytes()


def test_sizes_that_cannot_tile_are_refused():
    with pytest.raises(ValueError, match="50 pixels does not hold a whole number of tokens"):
        Tiling(50, 4, 0.5)
    with pytest.raises(ValueError, match=r"a pixel-shuffle ratio of 0\.5"):
        Tiling(36, 12, 0.5)
    with pytest.raises(ValueError, match="max_tiles 0 is no number of tiles: give a whole"):
        Tiling(48, 4, 0.5, max_tiles=0)
    with pytest.raises(ValueError, match=r"5 channels: pictures have 1 \(grey\) or 3 \(RGB\)"):
        Tiling(48, 4, 0.5, num_channels=5)


def test_a_file_may_be_given_as_it_was_read(tmp_path):
    picture = noise(20, 30)
    picture.save(tmp_path / "a.png")
    written = (tmp_path / "a.png").read_bytes()
    with (tmp_path / "a.png").open("rb") as file:
        for each in (written, io.BytesIO(written), file, file):
            assert np.array_equal(open_picture(each), picture)
    with pytest.raises(ValueError, match="is not a usable image file"):
        open_picture(b"no picture")
