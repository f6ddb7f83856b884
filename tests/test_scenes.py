"""Scenes: pixels, answers and counterfactuals agree, checked from the picture and the words."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from llama4_lab.train.scenes import (
    DIRECTIONS,
    NUMBERS,
    ORDINALS,
    TASKS,
    WORDS,
    Query,
    World,
    answer,
    ask,
    find,
    is_ambiguous,
    sample,
    sequence,
)
from llama4_lab.train.shapes import (
    BACKGROUNDS,
    COLOURS,
    PALETTE,
    PLACES,
    SHAPES,
    TILE,
    Scene,
    Thing,
    draw,
    erase,
)

CANVASES = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (3, 1)]


def examples(count, task=None, seed=0, **world):
    rng = np.random.default_rng(seed)
    return [sample(rng, task, World(**world)) for _ in range(count)]


def look(image):
    """Read place, colour and box of every object from the pixels alone."""
    grey = np.bincount(image[image.min(-1) == image.max(-1)][:, 0], minlength=256)
    background = BACKGROUNDS[0] + grey[BACKGROUNDS[0] : BACKGROUNDS[1] + 1].argmax()
    height, width = image.shape[0] // 3, image.shape[1] // 3
    seen = {}
    for i, place in enumerate(PLACES):
        top, left = i // 3 * height, i % 3 * width
        cell = image[top : top + height, left : left + width].astype(int)
        painted = (cell != background).any(-1)
        if painted.any():
            rows, columns = np.flatnonzero(painted.any(1)), np.flatnonzero(painted.any(0))
            box = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
            seen[place] = (full_colour(cell), tuple(map(int, box)))
    return seen


def full_colour(pixels):
    """The palette's colour that most pixels have exactly."""
    return max(COLOURS, key=lambda name: (pixels == PALETTE[name]).all(-1).sum())


def asked_words(question):
    words = re.findall("[a-z]+", question.lower())
    colour = next((word for word in words if word in COLOURS), None)
    shape = next((s for s in SHAPES for word in words if word in (s, s + "s", s + "es")), None)
    return colour, shape


@pytest.mark.parametrize("tiles", CANVASES)
def test_pixels_show_every_object_where_its_box_and_place_say(tiles):
    for example in examples(30, tiles=tiles):
        for scene, image in zip(example.scenes, example.images, strict=True):
            assert image.shape == (TILE * tiles[0], TILE * tiles[1], 3)
            assert look(image) == {t.place: (t.colour, t.box) for t in scene.objects}


@pytest.mark.parametrize("task", ["colour", "colour_at"])
def test_the_asked_box_contains_the_answered_colour(task):
    for example in examples(80, task):
        for picture, i in example.asked:
            left, top, right, bottom = example.scenes[picture].objects[i].box
            pixels = example.images[picture][top:bottom, left:right]
            assert full_colour(pixels) == example.answer


def test_a_place_is_answered_as_the_pixels_show_it():
    for example in examples(80, "place"):
        colour, _ = asked_words(example.question)
        places = [place for place, (shown, _) in look(example.images[0]).items() if shown == colour]
        if colour and asked_words(example.question)[1] is None:
            assert places == ([] if example.answer == "none" else [example.answer])


def test_counts_are_right_by_the_pixels():
    for example in examples(120, "count"):
        colour, shape = asked_words(example.question)
        shown = look(example.images[0]).values()
        if not shape:
            count = sum(colour in (None, name) for name, _ in shown)
            assert example.answer == NUMBERS[count]


@pytest.mark.parametrize("task", ["colour", "shape", "place", "picture", "exists", "count"])
def test_answers_follow_from_the_words_of_the_question(task):
    for example in examples(120, task):
        colour, shape = asked_words(example.question)
        fits = [
            (picture, thing)
            for picture, scene in enumerate(example.scenes)
            for thing in scene.objects
            if colour in (None, thing.colour) and shape in (None, thing.shape)
        ]
        assert len(example.asked) == len(fits)
        if task == "exists":
            assert example.answer == ("yes" if fits else "no")
        elif task == "count":
            assert example.answer == NUMBERS[len(fits)]
        elif not fits:
            assert example.answer == "none"
        else:
            [(picture, thing)] = fits  # unambiguous
            picture_name = ORDINALS[picture]
            right = picture_name if task == "picture" else getattr(thing, task)
            assert example.answer == right


@pytest.mark.parametrize("task", ["colour_at", "shape_at", "object_at"])
def test_what_is_at_a_place_is_what_stands_there(task):
    for example in examples(80, task):
        [place] = re.findall("(?:at|in) the ([a-z ]+)[?]", example.question)
        [right] = [
            {"colour_at": t.colour, "shape_at": t.shape, "object_at": f"{t.colour} {t.shape}"}[task]
            for t in example.scenes[0].objects
            if t.place == place
        ] or ["none"]
        assert example.answer == right


def test_a_scan_names_all_places_in_reading_order_and_a_caption_all_objects():
    for example in examples(100, "scan"):
        shown = look(example.images[0])
        cells = example.answer.split(", ")
        assert [cell.split()[0] for cell in cells] == [
            shown[place][0] if place in shown else "none" for place in PLACES
        ]
    for example in examples(100, "caption"):
        parts = re.split(", | and ", example.answer)
        told = [re.fullmatch(r"an? (\w+) (\w+) (?:at|in) the ([a-z ]+)", part) for part in parts]
        things = [(t.colour, t.shape, t.place) for t in example.scenes[0].objects]
        assert things == [match.groups() for match in told if match]
        assert things or example.answer == "none"


def test_motion_is_what_the_boxes_of_the_first_and_last_frame_show():
    for example in examples(120, "motion"):
        if example.answer == "none":
            assert not example.asked
            continue
        assert [picture for picture, _ in example.asked] == list(range(len(example.scenes)))
        first, *_, last = (example.scenes[picture].objects[i] for picture, i in example.asked)
        right = last.box[0] - first.box[0]
        down = last.box[1] - first.box[1]
        seen = {(1, 0): "right", (-1, 0): "left", (0, 1): "down", (0, -1): "up", (0, 0): "still"}
        assert example.answer == seen[np.sign(right), np.sign(down)]


def test_objects_of_a_sequence_move_one_place_a_frame_and_never_meet():
    rng = np.random.default_rng(0)
    for _ in range(50):
        frames = sequence(rng, frames=3, objects=2)
        assert len(frames) == 3
        assert all(len(look(draw(frame))) == 2 for frame in frames)
        assert len({frame.background for frame in frames}) == 1


def test_four_objects_find_ways_that_fit_into_three_frames():
    for seed in range(40):
        frames = sequence(np.random.default_rng(seed), frames=3, objects=4)
        assert [len(frame.objects) for frame in frames] == [4] * 3
    example = sample(np.random.default_rng(0), "motion", World(objects=(4, 4)))
    assert len(example.scenes[0].objects) == 4
    with pytest.raises(ValueError, match="5 objects do not fit: a picture has 0 to 4"):
        sequence(np.random.default_rng(0), objects=5)


def test_every_direction_is_as_frequent_as_every_other():
    answers = Counter(example.answer for example in examples(500, "motion"))
    assert min(answers[way] for way in DIRECTIONS) > 60


@pytest.mark.parametrize("task", TASKS)
def test_painting_out_the_asked_object_changes_answer_and_only_its_pixels(task):
    for example in examples(40, task):
        if not example.asked:
            continue
        painted = example.paint_out(example.asked)
        assert painted.answer != example.answer
        assert painted.asked == ()
        assert painted.question == example.question
        for picture, (before, after) in enumerate(zip(example.images, painted.images, strict=True)):
            scene = example.scenes[picture]
            for place, i in ((scene.objects[i].place, i) for p, i in example.asked if p == picture):
                left, top, right, bottom = scene.objects[i].box
                assert (after[top:bottom, left:right] == scene.background).all()
                assert place not in look(after)
                before[top:bottom, left:right] = scene.background
            np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"scan", "caption"}))
def test_painting_out_other_objects_leaves_the_answer(task):
    for example in examples(40, task):
        others = {
            (picture, i)
            for picture, scene in enumerate(example.scenes)
            for i in range(len(scene.objects))
        } - set(example.asked)
        assert example.paint_out(others).answer == example.answer


def test_one_counted_object_less_makes_the_number_one_less():
    for example in examples(50, "count"):
        for pair in example.asked:
            fewer = example.paint_out([pair]).answer
            assert NUMBERS.index(fewer) == NUMBERS.index(example.answer) - 1


def test_words_are_exactly_those_of_the_scene_language():
    said = " ".join(f"{e.question} {e.answer}" for e in examples(2000)).lower()
    assert set(re.findall("[a-z]+", said)) == set(WORDS)
    assert len(WORDS) == len(set(WORDS))


def test_the_same_seed_gives_the_same_examples_and_pixels():
    for one, other in zip(examples(100, seed=3), examples(100, seed=3), strict=True):
        assert one == other
        for a, b in zip(one.images, other.images, strict=True):
            np.testing.assert_array_equal(a, b)
    assert examples(5, seed=3) != examples(5, seed=4)


def test_one_question_in_ten_is_about_nothing_and_every_second_existence_is_denied():
    for task in set(TASKS) - {"scan", "caption", "exists", "count"}:
        share = np.mean([not example.asked for example in examples(300, task)])
        assert 0.05 < share < 0.16
    assert 0.4 < np.mean([e.answer == "yes" for e in examples(400, "exists")]) < 0.6
    assert min(Counter(e.answer for e in examples(400, "count")).values()) > 20


def test_counting_one_kind_of_object_often_finds_several():
    named = [e for e in examples(300, "count") if "objects" not in e.question.split()[2]]
    assert np.mean([len(example.asked) > 1 for example in named]) > 0.25


def test_every_number_of_objects_is_equally_frequent_whatever_is_asked():
    for task in ("colour", "place"):
        sizes = Counter(len(e.scenes[0].objects) for e in examples(400, task))
        assert sorted(sizes) == [1, 2, 3, 4]
        assert min(sizes.values()) > 70


@pytest.mark.parametrize("task", TASKS)
def test_a_small_world_holds_only_what_it_lists(task):
    world = World(
        shapes=("circle", "star"), colours=("red", "blue"), places=PLACES[::2], objects=(2, 3)
    )
    rng = np.random.default_rng(0)
    for _ in range(30):
        for scene in sample(rng, task, world).scenes:
            for thing in scene.objects:
                assert thing.shape in world.shapes
                assert thing.colour in world.colours
                assert thing.place in world.places or task == "motion"


def test_drawing_larger_scales_every_box_exactly():
    for example in examples(30, "scan", tiles=(1, 2)):
        shown = look(draw(example.scenes[0], 3 * TILE))
        assert {p: box for p, (_, box) in shown.items()} == {
            t.place: tuple(3 * edge for edge in t.box) for t in example.scenes[0].objects
        }


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", np.pi / 4),
        ("square", 1),
        ("triangle", 1 / 2),
        ("diamond", 1 / 2),
        ("cross", 1 - 0.64**2),
        ("ring", np.pi / 4 * (1 - 0.54**2)),
        ("star", 5 * 0.45 * np.sin(np.pi / 5) / (1.902 * 1.809)),
        ("heart", (np.pi / 4 + 1.5 + 2 * 0.0265) / 4),
    ],
)
def test_each_shape_covers_the_area_that_geometry_says(shape, area):
    image = draw(Scene((Thing(shape, "white", "middle", (0, 0, 48, 48)),), 104), 192)
    assert (image[..., 0].astype(float) - 104).mean() / (255 - 104) == pytest.approx(area, abs=0.01)


def test_shapes_of_one_size_differ_in_at_least_a_tenth_of_their_box():
    box = (0, 0, 12, 12)  # the smallest drawn
    cover = {
        shape: draw(Scene((Thing(shape, "white", "top left", box),), 104))[:12, :12, 0] / 151
        for shape in SHAPES
    }
    for one, other in itertools.combinations(SHAPES, 2):
        assert abs(cover[one] - cover[other]).mean() > 0.1, (one, other)


# Linear-RGB matrices of full dichromacy: Machado, Oliveira and Fernandes 2009, severity 1.0.
DICHROMATS = {
    "nobody": np.eye(3),
    "protanope": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranope": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanope": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lab(srgb, eye):
    """CIE L*a*b* under D65 of what an eye sees."""
    c = np.asarray(srgb) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    linear = (linear @ np.transpose(eye)).clip(0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = linear @ np.transpose(to_xyz) / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=-1
    )


@pytest.mark.parametrize("eye", DICHROMATS)
def test_colours_and_backgrounds_stay_apart_for_colour_blind_eyes(eye):
    greys = [(level,) * 3 for level in range(BACKGROUNDS[0], BACKGROUNDS[1] + 1)]
    colours = lab([*PALETTE.values(), *greys], DICHROMATS[eye])
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    distances[np.diag_indices(len(colours))] = np.inf
    # A difference of 2.3 is just noticeable.
    assert distances[: len(PALETTE)].min() > 20


def test_questions_with_two_fitting_objects_are_ambiguous():
    circles = [Thing("circle", c, p, (0, 0, 12, 12)) for c, p in (("red", "top"), ("blue", "left"))]
    scenes = (Scene(tuple(circles)),)
    assert is_ambiguous(Query("colour", shape="circle"), scenes)
    assert not is_ambiguous(Query("count", shape="circle"), scenes)
    assert not is_ambiguous(Query("place", colour="blue"), scenes)
    assert answer(Query("place", colour="blue"), scenes) == "left"
    assert find(Query("place", colour="blue"), scenes) == ((0, 1),)
    assert ask(Query("object_at", place="middle")) == "What is in the middle?"


def test_wrong_wishes_are_refused_with_what_is_possible():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"unknown task 'color'; choose from \('scan', "):
        sample(rng, "color")
    with pytest.raises(ValueError, match=r"unknown shapes \['oval'\]; choose from \('circle', "):
        World(shapes=("circle", "oval"))
    with pytest.raises(ValueError, match=r"colours \('red',\) leave nothing to ask: give at least"):
        World(colours=("red",))
    with pytest.raises(
        ValueError, match=r"objects \(0, 5\) must be .* between 1 and 4: of 9 places one stays free"
    ):
        World(objects=(0, 5))
    with pytest.raises(ValueError, match=r"objects \(1, 4\) must be .* between 1 and 3: of 4"):
        World(places=PLACES[:4])
    with pytest.raises(ValueError, match=r"tiles \(2, 3\) must be rows and columns of 1 to 4"):
        World(tiles=(2, 3))
    with pytest.raises(ValueError, match="frames must be 2 or 3 to fit into three places; got 4"):
        sequence(rng, frames=4)
    with pytest.raises(ValueError, match="size 8 is too small to tell shapes apart: use 16 pixels"):
        draw(Scene(()), 8)
    with pytest.raises(ValueError, match="object 1 is not in the scene: it has 1, counted from 0"):
        erase(Scene((Thing("star", "red", "top", (16, 0, 28, 12)),)), 1)
    with pytest.raises(ValueError, match="picture 1 is not in the example: it has 1, counted from"):
        sample(rng, "colour").paint_out([(1, 0)])
    with pytest.raises(ValueError, match=r"unknown shape 'oval'; choose from \('circle', "):
        draw(Scene((Thing("oval", "red", "top", (16, 0, 28, 12)),)))
