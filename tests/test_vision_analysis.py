"""Image tokens stand for exact places, and maps over them show what was planted there."""

import re
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from tiny import CONFIG, VISION

import llama4_lab as l4
from llama4_lab import edits as E
from llama4_lab.analysis import vision
from llama4_lab.analysis.attention import keys_and_queries
from llama4_lab.analysis.routing import routing_of
from llama4_lab.analysis.vision import (
    Patches,
    causal_map,
    encoder_slots,
    experts_of,
    from_text,
    grounding,
    masking_effects,
    patches_of,
    sinks,
    to_text,
    without_sinks,
)
from llama4_lab.model.vision import pixel_shuffle
from llama4_lab.prompt import Prompt, Tiling, build_prompt
from llama4_lab.prompt.images import cut_tiles, image_tokens, place
from llama4_lab.replay import Replay
from llama4_lab.train.scenes import World, sample

SIZES = [(24, 24), (48, 48), (1, 1), (7, 31), (50, 24), (49, 97), (10, 200), (121, 13), (600, 37)]
"""Height and width: smaller and larger than a tile, whole tiles, long strips, odd ones."""
TILINGS = [
    Tiling(VISION.image_size, VISION.patch_size, VISION.pixel_shuffle_ratio),
    Tiling(48, 4, 0.5, max_tiles=4),
    Tiling(28, 14, 0.5, max_tiles=1),
]
COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)


def layout_of(height: int, width: int, tiling: Tiling) -> Patches:
    """The tokens of one picture that follows one token of text."""
    layout = place(height, width, tiling)
    at = [i for i, (_, _, patch) in enumerate(image_tokens(layout, tiling), start=1) if patch >= 0]
    return Patches(layout, tiling, np.reshape(at, (-1, tiling.grid, tiling.grid)))


PICTURES = [layout_of(*size, tiling) for tiling in TILINGS for size in SIZES]


def quadrants(height: int, width: int) -> np.ndarray:
    """Four colours, cut in the middle."""
    return COLOURS.repeat(height // 2, axis=0).repeat(width // 2, axis=1)


@pytest.fixture(scope="module")
def model() -> l4.Llama4:
    config = CONFIG.replace(vocab_size=336, attention_chunk_size=64, image_token_index=335)
    return l4.random(config).eval()


@pytest.fixture
def ask(tokenizer):
    def ask(*pictures: np.ndarray, text: str = "What's the colour?") -> Prompt:
        return build_prompt(
            tokenizer,
            text,
            list(pictures),
            image_size=VISION.image_size,
            patch_size=VISION.patch_size,
            shuffle_ratio=VISION.pixel_shuffle_ratio,
        )

    return ask


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# Places


@pytest.mark.parametrize("patches", PICTURES)
def test_a_pixel_goes_to_the_tokens_whose_boxes_hold_its_centre(patches):
    at = patches.layout
    boxes = {where: patches.box(where) for where in np.ndindex(patches.position.shape)}
    for y in (*range(min(at.height, 25)), at.height - 1):
        for x in (*range(min(at.width, 25)), at.width - 1):
            cx, cy = x + Fraction(1, 2), y + Fraction(1, 2)
            holding = [
                where
                for where, (left, top, right, bottom) in boxes.items()
                if left <= cx < right and top <= cy < bottom
            ]
            assert patches.places(x, y) == holding
            assert len(holding) == (2 if at.num_tiles > 1 else 1)


@pytest.mark.parametrize("patches", PICTURES)
def test_a_token_goes_to_its_place_and_back_without_error(patches):
    for where in np.ndindex(patches.position.shape):
        assert patches.place(int(patches.position[where])) == where


@pytest.mark.parametrize("patches", PICTURES)
def test_a_box_enlarged_like_the_picture_is_the_square_of_its_token(patches):
    at, side, grid = patches.layout, patches.tiling.image_size, patches.tiling.grid
    cell = Fraction(side, grid)
    for tile, row, col in np.ndindex(patches.position.shape):
        is_global = at.num_tiles > 1 and tile == at.num_tiles - 1
        down, along = (0, 0) if is_global else divmod(tile, at.cols)
        fits = (side, side) if is_global else (at.fit_width, at.fit_height)
        left, top, right, bottom = patches.box((tile, row, col))
        for (low, high), length, fit, begin in (
            ((left, right), at.width, fits[0], along * side + col * cell),
            ((top, bottom), at.height, fits[1], down * side + row * cell),
        ):
            scale = Fraction(fit, length)
            assert low * scale == min(begin, Fraction(fit))
            assert high * scale == min(begin + cell, Fraction(fit))


@pytest.mark.parametrize("patches", PICTURES)
def test_local_and_global_boxes_each_tile_the_picture_exactly_once(patches):
    at = patches.layout
    areas = np.zeros(at.num_tiles, dtype=object)
    for where in np.ndindex(patches.position.shape):
        left, top, right, bottom = patches.box(where)
        areas[where[0]] += (right - left) * (bottom - top)
    local = areas[: at.rows * at.cols]
    assert [local.sum(), *areas[len(local) :]] == [at.height * at.width] * (1 + (len(local) > 1))


def test_a_box_covers_its_own_token_whole_and_no_neighbour():
    for patches in PICTURES:
        for where in [
            (0, 0, 0),
            (0, 0, patches.tiling.grid - 1),
            (patches.layout.num_tiles - 1, 0, 0),
        ]:
            box = patches.box(where)
            cover = patches.cover(box)
            if box[0] == box[2]:
                assert not cover.any()
                continue
            assert cover[where] == 1
            assert cover[where[0]].sum() == 1
            assert int(patches.position[where]) in patches.tokens(box)


def test_cover_is_the_share_of_pixels_when_tokens_show_whole_pixels():
    patches = layout_of(48, 72, TILINGS[0])
    box = (5, 11, 40, 30)
    inside = np.zeros((48, 72))
    inside[11:30, 5:40] = 1
    cell = 24 // TILINGS[0].grid
    local = inside.reshape(48 // cell, cell, 72 // cell, cell).mean(axis=(1, 3))
    np.testing.assert_array_equal(patches.stitch(patches.cover(box)), local)
    coarse = inside.reshape(3, 16, 3, 24).mean(axis=(1, 3))
    np.testing.assert_allclose(patches.cover(box)[-1], coarse, rtol=1e-15)


def test_a_pixel_outside_and_a_foreign_token_are_explained():
    patches = layout_of(10, 20, TILINGS[0])
    sentence = "pixel (20, 3) is outside the picture of 20x10 pixels: x goes from 0 to 19, y from"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        patches.places(20, 3)
    sentence = "token 0 shows nothing of this picture, whose 9 image tokens stand between 3 and 11"
    with pytest.raises(ValueError, match=sentence):
        patches.place(0)


def test_patches_of_a_prompt_stand_where_its_spans_say(ask):
    prompt = ask(picture(24, 24), picture(40, 50))
    spans = prompt.spans
    for image, tiles in ((0, [0]), (1, [1, 2, 3, 4, 5, 6, 7])):
        patches = patches_of(prompt, image)
        assert patches.layout == spans.layouts[image]
        for (tile, row, col), token in np.ndenumerate(patches.position):
            assert prompt.tokens[token] == "<|patch|>"
            assert spans.image[0, token] == image
            assert spans.tile[0, token] == tiles[tile]
            assert divmod(int(spans.patch[0, token]), spans.tiling.grid) == (row, col)
    with pytest.raises(ValueError, match="picture 2 is not in this prompt: it has 2, counted from"):
        patches_of(prompt, 2)
    with pytest.raises(ValueError, match="picture 0 is not in this prompt: it has 0"):
        patches_of(ask())


def test_encoder_slots_are_what_pixel_shuffle_gathers():
    for tiling in TILINGS:
        slots = encoder_slots(tiling)
        x = torch.arange(slots.size, dtype=torch.float32)[None, :, None]
        tokens = pixel_shuffle(x, slots.shape[-1])[0].reshape(slots.shape)
        np.testing.assert_array_equal(tokens.numpy(), slots)


def test_stitched_maps_show_the_picture():
    """The local tiles' own pixels, averaged over tokens and stitched, are the shrunken canvas."""
    tiling = TILINGS[0]
    patches = layout_of(48, 72, tiling)
    levels = np.arange(48 * 72.0).reshape(48, 72)
    values = np.zeros(patches.position.max() + 1)
    for where in np.ndindex(patches.position.shape):
        left, top, right, bottom = map(int, patches.box(where))
        values[patches.position[where]] = levels[top:bottom, left:right].mean()
    shrunk = levels.reshape(6, 8, 9, 8).mean(axis=(1, 3))
    np.testing.assert_allclose(patches.stitch(patches.grid(values)), shrunk)
    batch = patches.stitch(patches.grid(np.stack([values, -values])))
    np.testing.assert_allclose(batch, [shrunk, -shrunk])


# Experts and attention


def test_experts_of_patches_are_those_of_their_tokens(model, ask):
    prompt = ask(picture(30, 50))
    patches, routing = patches_of(prompt), routing_of(model, prompt)
    for choice in (0, 1):
        experts = experts_of(routing, patches, choice)
        assert experts.shape == (3, *patches.position.shape)
        for where, token in np.ndenumerate(patches.position):
            chosen = routing.expert[:, token, choice]
            np.testing.assert_array_equal(experts[:, *where], chosen)


def test_attention_maps_are_cut_from_the_pattern(model, ask):
    prompt = ask(picture(30, 50))
    patches, last = patches_of(prompt), len(prompt.tokens) - 1
    names = [f"layers.{i}.attn.pattern" for i in range(6)]
    with torch.no_grad(), l4.trace(model, names) as cache:
        model(**prompt)
    layers = [keys_and_queries(model, prompt, i) for i in range(6)]
    texts = [last, last - 3]
    seen = from_text(layers, patches, texts)
    said = to_text(layers, patches, [0, 1])
    assert seen.shape == said.shape == (6, 6, 2, *patches.position.shape)
    for i, name in enumerate(names):
        pattern = cache[name][0].numpy()
        for where, token in np.ndenumerate(patches.position):
            np.testing.assert_allclose(seen[i, :, :, *where], pattern[:, texts, token], atol=1e-6)
            np.testing.assert_allclose(said[i, :, :, *where], pattern[:, token, :2], atol=1e-6)
    assert (seen[0, ..., 0, :, :] == 0).all()  # the chunk of the text begins behind the first tile
    assert (seen[3] > 0).all()
    with pytest.raises(ValueError, match=f"token {last + 1} is out of range: this prompt has"):
        to_text(layers, patches, [0, last + 1])


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (32, 64), (96, 32), (128, 128)])
def test_a_quadrant_of_constant_tokens_lights_in_all_tiles(tokenizer, size):
    """Tokens see only their own pixels, and the question's query meets one colour's keys."""
    vision = replace(VISION, image_size=32)
    model = l4.random(CONFIG.replace(vocab_size=336, image_token_index=335, vision_config=vision))
    model.vision_model.positional_embedding_vlm.data.zero_()
    blind = {f"vision.layers.*.{name}": torch.zeros_like for name in ("attn.out", "mlp.out")}

    def embedded(array: np.ndarray) -> tuple[Prompt, torch.Tensor]:
        prompt = build_prompt(
            tokenizer, "Where?", array, image_size=32, patch_size=4, shuffle_ratio=0.5
        )
        with torch.no_grad(), l4.intervene(model, blind):
            return prompt, model.embed(prompt.input_ids, prompt.pixel_values)[0]

    palette = []
    for colour in COLOURS.reshape(4, 3):
        prompt, x = embedded(np.full((32, 32, 3), colour))
        palette.append(x[patches_of(prompt).position.flat[0]])
    prompt, x = embedded(quadrants(*size))
    patches, last = patches_of(prompt), len(prompt.tokens) - 1
    nearest = torch.cdist(x, torch.stack(palette)).argmin(dim=1)
    for quadrant in range(4):
        key = (nearest == quadrant)[None, :, None, None] * 1.0
        changes = {
            "layers.3.attn.rot_k": lambda k, key=key: key.expand_as(k).contiguous(),
            "layers.3.attn.rot_q": lambda q: torch.full_like(q, 9.0),
        }
        with l4.intervene(model, changes):
            shares = from_text([keys_and_queries(model, prompt, 3)], patches, [last])
        lit = shares[0, 0, 0] > 1e-3
        for shown in (patches.stitch(lit), lit[-1]):
            height, width = (side // 2 for side in shown.shape)
            wanted = np.zeros_like(shown)
            down, along = divmod(quadrant, 2)
            wanted[down * height : (down + 1) * height, along * width : (along + 1) * width] = True
            np.testing.assert_array_equal(shown, wanted)


def test_sinks_are_found_where_every_query_looks():
    rng = np.random.default_rng(0)
    shares = rng.uniform(0.5, 1.5, (2, 3, 4, 5, 3, 3))  # l h q tiles rows cols
    shares[0, 1, :, 2, 1, 0] = 40  # in every query
    shares[1, 2, 1, 0, 0, 0] = 40  # in one
    shares[1, 0, :3, 1, 1, 1] = 40
    shares[1, 0, 3] = 0  # a query that sees nothing has no say
    shares[0, 0] = 0
    found = sinks(shares)
    wanted = np.zeros((2, 3, 5, 3, 3), bool)
    wanted[0, 1, 2, 1, 0] = wanted[1, 0, 1, 1, 1] = True
    np.testing.assert_array_equal(found, wanted)
    assert not sinks(shares, factor=100).any()


def test_norms_of_registers_are_found_as_sinks_of_one_query():
    norms = np.ones((1, 5, 3, 3))
    norms[0, 4, 0, 2], norms[0, 1, 1, 1] = 12, 9  # over and under ten times the median
    assert np.argwhere(sinks(norms)).tolist() == [[4, 0, 2]]


def test_without_sinks_the_others_keep_their_proportions_and_the_sum():
    rng = np.random.default_rng(0)
    shares = rng.random((2, 4, 5, 3, 3))
    found = np.zeros((2, 5, 3, 3), bool)
    found[0, 1, 2, 0] = found[0, 3, 0, 0] = True
    left = without_sinks(shares, found)
    assert (left[0, :, 1, 2, 0] == 0).all()
    np.testing.assert_allclose(left.sum(axis=(2, 3, 4)), shares.sum(axis=(2, 3, 4)))
    np.testing.assert_array_equal(left[1], shares[1])
    others = ~found[0]
    ratio = left[0][:, others] / shares[0][:, others]
    np.testing.assert_allclose(ratio, ratio[:, :1].repeat(others.sum(), axis=1))
    assert (without_sinks(shares, np.ones_like(found)) == 0).all()


# Masking


def log_prob(model, ids, answer, pixels=None, embed=None) -> float:
    """One row, one full pass, without any of the module's code."""
    ids = torch.cat([ids, torch.tensor([answer])], dim=1)
    with torch.no_grad(), l4.intervene(model, {} if embed is None else {"embed": embed}):
        logits = model(ids, pixels)[0]
    first = ids.shape[1] - len(answer)
    steps = logits[first - 1 : -1].log_softmax(dim=-1)
    return float(sum(step[idx] for step, idx in zip(steps, answer, strict=True)))


def masked_log_prob(model, prompt, answer, tokens, fill) -> float:
    """The same with image tokens masked."""
    image = prompt.spans.patch[0] >= 0
    pixels = prompt.pixel_values.clone()
    if fill == 128:
        for token in tokens:
            row, col = divmod(int(prompt.spans.patch[0, token]), 3)
            for y, x in np.ndindex(8, 8):
                pixels[prompt.spans.tile[0, token], :, 8 * row + y, 8 * col + x] = 1 / 255

    def embed(x):
        x = x.clone()
        if fill != 128:
            x[0, tokens] = x[0, : len(image)][image].mean(0) if fill == "mean" else 0.0
        return x

    return log_prob(model, prompt.input_ids, answer, pixels, embed)


@pytest.mark.parametrize("fill", ["mean", "zero", 128])
def test_effects_are_differences_of_full_passes(model, ask, fill):
    prompt = ask(picture(24, 24), picture(30, 40))
    answer = [70, 11, 3]
    first, second = patches_of(prompt), patches_of(prompt, 1)
    sets = [[int(first.position[0, 1, 2])], [], second.position[:, 0].ravel().tolist()]
    clean = log_prob(model, prompt.input_ids, answer, prompt.pixel_values)
    wanted = [clean - masked_log_prob(model, prompt, answer, tokens, fill) for tokens in sets]
    for max_tokens in (1, 300, 2048):
        found = masking_effects(model, prompt, answer, sets, fill=fill, max_tokens=max_tokens)
        np.testing.assert_allclose(found, wanted, atol=3e-5)
    assert found[1] == 0
    assert min(abs(found[0]), abs(found[2])) > 1e-4


@pytest.mark.parametrize("fill", ["mean", "zero", 128])
def test_effects_are_those_of_the_edited_model(model, ask, fill):
    prompt, answer = ask(picture(24, 24)), [70, 11, 3]
    sets = patches_of(prompt).position.reshape(-1, 1).tolist()
    behind = E.Scale("layers.1.attn.out", 3.0, tokens=[len(prompt.tokens) + 1])
    for edits in ([E.AblateHead(1, 0), behind], [behind]):
        found = masking_effects(model, prompt, answer, sets, fill=fill, edits=edits)
        with E.edited(model, edits):
            clean = log_prob(model, prompt.input_ids, answer, prompt.pixel_values)
            wanted = [clean - masked_log_prob(model, prompt, answer, each, fill) for each in sets]
        np.testing.assert_allclose(found, wanted, atol=3e-5)
        assert max(abs(found)) > 1e-3


def test_what_is_painted_goes_through_edits_of_pictures_and_embeddings(model, ask):
    prompt, answer = ask(picture(24, 24)), [70, 11, 3]
    every = patches_of(prompt).position.ravel().tolist()
    sets = [every[:1], [], every[:5]]
    for blind in (E.Scale("projector.out", 0.0), E.AblateEmbedding(every, "mean")):
        found = masking_effects(model, prompt, answer, sets, fill=128, edits=[blind])
        np.testing.assert_allclose(found, 0, atol=1e-6)
    edits = [E.Scale("vision.out", 2.0), E.AblateHead(1, 0)]
    found = masking_effects(model, prompt, answer, sets, fill=128, edits=edits)
    with E.edited(model, edits):
        clean = log_prob(model, prompt.input_ids, answer, prompt.pixel_values)
        wanted = [clean - masked_log_prob(model, prompt, answer, each, 128) for each in sets]
    np.testing.assert_allclose(found, wanted, atol=3e-5)
    assert max(abs(found)) > 1e-3


def test_effects_can_be_computed_without_a_bar(model, ask, monkeypatch):
    asked = []

    def replay(*given, progress, **options):
        asked.append(progress)
        return Replay(*given, progress=progress, **options)

    monkeypatch.setattr(vision, "Replay", replay)
    for progress in (True, False):
        masking_effects(model, ask(picture(24, 24)), [70], [[]], progress=progress)
    assert asked == [True, False]


def test_only_the_patch_that_the_model_can_see_has_an_effect(model, ask):
    prompt = ask(picture(24, 24))
    patches = patches_of(prompt)
    target = int(patches.position[0, 2, 1])
    hidden = [int(i) for i in patches.position.flat if i != target]

    effects = partial(masking_effects, model, prompt, [70], edits=[E.RemoveTokens(hidden)])
    found = causal_map(patches, effects)
    assert np.argwhere(abs(found) > 1e-5).tolist() == [[2, 1]]


def test_causal_maps_mask_what_shows_a_window_in_all_tiles():
    """Effects that count the picture's area: every window costs what its tokens show of it."""
    tiling = TILINGS[0]
    patches = layout_of(48, 72, tiling)  # 2 x 3 tiles, 6 x 9 tokens; 3 x 3 of the global tile
    asked = []

    def effects(sets):
        asked.extend(sets)
        return np.array([float(len(tokens)) for tokens in sets])

    found = causal_map(patches, effects)
    local = patches.stitch(patches.position)
    for (row, col), tokens in zip(np.ndindex(6, 9), asked, strict=True):
        assert tokens == [local[row, col], patches.position[-1, row // 2, col // 3]]
    assert (found == 2).all()
    asked.clear()
    found = causal_map(patches, effects, window=2)
    for (row, col), tokens in zip(np.ndindex(5, 8), asked, strict=True):
        window = np.s_[row : row + 2, col : col + 2]
        y, x = np.mgrid[window]
        whole = patches.position[-1, y // 2, x // 3]
        assert tokens == sorted({*local[window].flat, *whole.flat})
    # The corner is in one window, with one token of the global tile; its neighbour in two.
    counts = np.array([len(tokens) for tokens in asked]).reshape(5, 8)
    assert found[0, 0] == counts[0, 0] == 5
    assert found[1, 0] == counts[:2, 0].mean() == 5.5
    assert found[3, 3] == counts[2:4, 2:4].mean()


def test_a_window_on_padding_masks_nothing():
    patches = layout_of(12, 24, TILINGS[0])  # the lower half of the tile is black
    sizes = causal_map(patches, lambda sets: np.array([len(tokens) for tokens in sets]) * 1.0)
    np.testing.assert_array_equal(sizes, [[1, 1, 1], [1, 1, 1], [0, 0, 0]])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"answer": []}, "the answer is empty: give the ids of the tokens that should follow"),
        ({"fill": "median"}, 'fill \'median\' is unknown: give "mean", "zero" or a grey level'),
        ({"fill": 256}, "fill 256 is unknown: give"),
        ({"sets": [[3], [0]]}, "token 0 shows no picture: mask tokens that patches_of(prompt"),
    ],
)
def test_what_cannot_be_masked_is_explained(model, ask, changes, sentence):
    wish = {"answer": [5], "sets": [[3]], **changes}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        masking_effects(model, ask(picture(24, 24)), **wish)


def test_a_window_that_does_not_fit_is_refused():
    patches = layout_of(24, 24, TILINGS[0])
    with pytest.raises(ValueError, match="a window of 4 tokens does not fit a map of 3x3: give 1"):
        causal_map(patches, lambda sets: np.zeros(len(sets)), window=4)


# Scores against boxes


def test_a_map_equal_to_the_mask_scores_one_and_a_uniform_map_the_area():
    mask = (np.arange(40) % 5 == 0) * 1.0
    right = grounding(mask, mask)
    assert (right.pointing, right.mass, right.roc_area, right.precision) == (1, 1, 1, 1)
    wrong = grounding(-mask, mask)
    assert (wrong.pointing, wrong.mass, wrong.roc_area) == (0, 0, 0)
    for cover in (mask, np.random.default_rng(0).random(40)):
        even = grounding(np.full(40, 0.3), cover)
        np.testing.assert_allclose(
            [even.pointing, even.mass, even.precision], cover.mean(), rtol=1e-12
        )
        np.testing.assert_allclose(even.roc_area, 0.5, rtol=1e-12)


def test_scores_equal_counting_pixels_by_brute_force():
    """A token that a box covers by k/8 is eight pixels of equal value, k of them inside."""
    rng = np.random.default_rng(0)
    maps = rng.integers(-2, 6, (2, 3, 30)).astype(float)  # many ties
    parts = rng.integers(0, 9, 30) * (rng.random(30) < 0.5)
    scores = grounding(maps, parts / 8)
    inside = (np.arange(8) < parts[:, None]).ravel()
    for which in np.ndindex(2, 3):
        pixels = maps[which].repeat(8)
        yes, no = pixels[inside][:, None], pixels[~inside]
        positive = pixels.clip(0)
        above = [pixels >= value for value in pixels[inside]]
        wanted = {
            "pointing": inside[pixels == pixels.max()].mean(),
            "mass": positive[inside].sum() / positive.sum(),
            "roc_area": ((yes > no) + 0.5 * (yes == no)).mean(),
            "precision": np.mean([inside[some].mean() for some in above]),
        }
        for name, value in wanted.items():
            np.testing.assert_allclose(getattr(scores, name)[which], value, rtol=1e-12)


def test_a_box_that_tells_nothing_apart_is_refused():
    with pytest.raises(ValueError, match="the box covers no token: there is nothing to tell apart"):
        grounding(np.ones(4), np.zeros(4))
    with pytest.raises(ValueError, match="the box covers every token whole"):
        grounding(np.ones(4), np.ones(4))


def test_the_box_of_a_scene_is_covered_by_tokens_that_show_the_object(ask):
    """Painting an object out changes only pixels of tokens that its box covers."""
    rng = np.random.default_rng(2)
    for tiles in ((1, 1), (2, 2), (1, 3)):
        example = sample(rng, "caption", World(tiles=tiles, objects=(2, 4)))
        thing = example.scenes[0].objects[0]
        tiling = Tiling(48, 4, 0.5)
        before, after = (
            cut_tiles(
                Image.fromarray(e.images[0]), place(48 * tiles[0], 48 * tiles[1], tiling), tiling
            )
            for e in (example, example.paint_out([(0, 0)]))
        )
        patches = layout_of(48 * tiles[0], 48 * tiles[1], tiling)
        moved = (before != after).any(dim=1).float()
        share = rearrange(moved, "n (r y) (c x) -> n r c (y x)", r=6, c=6).mean(dim=-1).numpy()
        cover = patches.cover(thing.box)
        local = slice(0, tiles[0] * tiles[1])
        assert (share[local][cover[local] == 0] == 0).all()
        assert (share[cover == 1] > 0).all()
        assert moved[local].sum() > 0
