"""Lessons: what is asked is scored, what cannot be known is not, and patches are named rightly."""

import numpy as np
import pytest
import torch

from llama4_lab.checkpoint.shipped import MODELS
from llama4_lab.config import VisionConfig
from llama4_lab.train import scenes
from llama4_lab.train.lessons import (
    Echo,
    Material,
    Needle,
    Pictures,
    Sums,
    Text,
    chat,
    patch_labels,
)
from llama4_lab.train.rows import padded, shifted

VISION = VisionConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=48,
    patch_size=4,
    projector_input_dim=24,
    projector_output_dim=24,
    vision_output_dim=24,
)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Mini's tokenizer, and a corpus of one English sentence."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "tokenizer.json").write_bytes((MODELS / "mini" / "tokenizer.json").read_bytes())
    material = Material(folder, VISION)
    sentence = material.tokenizer.encode(" The ship left the harbour at dawn.")
    np.tile(np.array(sentence, "<u2"), 300).tofile(folder / "english.train.bin")
    return material


def said(material, rows, row=0):
    """The scored targets of a row, split where positions between them are not scored."""
    weights = rows.weights[row]
    text = [
        material.tokenizer.decode([idx]) if weight == 1 else "\0"
        for idx, weight in zip(rows.targets[row].tolist(), weights.tolist(), strict=True)
    ]
    return [piece for piece in "".join(text).split("\0") if piece]


@pytest.mark.parametrize(
    "lesson",
    [
        Text(2, domains={"english": 1.0}, length=40),
        Echo(2, length=64),
        Needle(2, length=256),
        Needle(2, kind="words", length=256),
        Needle(2, kind="prose", length=384),
        Sums(2, length=96),
        Pictures(2),
        Pictures(2, length=256, tiles=((2, 2),)),
        Pictures(2, length=256, tasks=("motion", "picture")),
    ],
    ids=lambda lesson: f"{lesson.name}-{getattr(lesson, 'kind', len(str(lesson)))}",
)
def test_a_lesson_is_of_its_length_and_depends_on_the_generator_only(material, lesson):
    rows, again = (lesson.draw(np.random.default_rng(3), material) for _ in range(2))
    assert rows.inputs.shape == rows.targets.shape == rows.weights.shape == (2, lesson.length)
    assert (rows.weights.sum(dim=1) > 0).all()
    assert torch.equal(rows.inputs, again.inputs)
    assert torch.equal(rows.weights, again.weights)
    other = lesson.draw(np.random.default_rng(4), material)
    assert not torch.equal(rows.targets, other.targets)
    if isinstance(lesson, Pictures):
        slots = (rows.inputs == material.tokenizer.id_of("<|patch|>")).sum()
        assert slots == len(rows.pixel_values) * VISION.tokens_per_tile


def test_pictures_ask_only_what_they_are_told(material):
    rows = Pictures(4, tasks=("colour", "count")).draw(np.random.default_rng(0), material)
    for row in rows.inputs:
        turns = material.tokenizer.decode(row.tolist()).split("<|header_start|>user<|header_end|>")
        questions = [turn.split("<|eot|>")[0].split("<|image_end|>")[-1].strip() for turn in turns]
        assert len(questions) > 1
        assert all(question.startswith(("What colo", "How many")) for question in questions[1:])


def test_what_needs_several_pictures_is_not_asked_about_one(material):
    rng = np.random.default_rng(0)
    example = scenes.sample(rng, "colour")
    asked = {scenes.another(rng, example, tasks=("picture", "count")).query.task for _ in range(20)}
    assert asked == {"count"}


def test_sums_score_answers_only(material):
    rows = Sums(2).draw(np.random.default_rng(0), material)
    line = material.tokenizer.decode(rows.inputs[0].tolist()).split("\n")[0]
    assert said(material, rows, 0)[0] == line.rpartition(" ")[2] + "\n"
    answers = said(material, rows, 1)
    assert all(answer.endswith("<|eot|>") for answer in answers[:-1])
    assert all(answer.removesuffix("<|eot|>").isdigit() for answer in answers)


def test_sums_are_of_the_kinds_that_are_asked_for(material):
    rows = Sums(2, kinds=("subtract",)).draw(np.random.default_rng(0), material)
    lines, chat = (material.tokenizer.decode(row.tolist()) for row in rows.inputs)
    assert all(" - " in line for line in lines.split("\n")[:-1])
    assert chat.count("What is") == chat.count(" - ") > 1


@pytest.mark.parametrize("kind", ["words", "prose"])
def test_codes_are_scored_where_they_are_asked_for(material, kind):
    rows = Needle(1, kind=kind, length=384, facts=(3, 3)).draw(np.random.default_rng(0), material)
    text = material.tokenizer.decode(rows.inputs[0].tolist())
    assert all(text.count(f" is {code}") == 2 for code in said(material, rows)[:2])
    assert len(said(material, rows)) == 3


def test_an_echo_of_few_tokens_uses_the_same_ones_in_every_step(material):
    lesson = Echo(8, length=64, periods=(9, 9), vocabulary=16)
    steps = [lesson.draw(np.random.default_rng(i), material).inputs for i in range(3)]
    assert len(torch.cat(steps).unique()) == 16


def test_a_chat_asks_as_much_as_has_room_and_scores_what_the_assistant_says(material):
    questions = [(f"Is this question {i}?", "yes") for i in range(50)]
    rows, prompt = chat(material, [], questions, 100)
    length = rows.inputs.shape[1]
    turn = (
        chat(material, [], questions[:2], 100)[0].inputs.shape[1]
        - (chat(material, [], questions[:1], 100)[0].inputs.shape[1])
    )
    assert 100 - turn < length <= 100
    assert set(said(material, rows)) == {"yes<|eot|>"}
    assert len(said(material, rows)) == prompt.spans.roles.count("assistant")
    with pytest.raises(ValueError, match="5 tokens have no room for a question and its answer"):
        chat(material, [], questions, 5)


@pytest.mark.parametrize("tiles", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_every_patch_is_named_after_what_its_pixels_show(material, tiles):
    """Where the pixels under an image token are not all alike, the label names an object."""
    rng = np.random.default_rng(1)
    for _ in range(4):
        example = scenes.sample(rng, "caption", scenes.World(tiles=tiles))
        _, prompt = chat(material, example.images, [(example.question, example.answer)], 512)

        def words(attribute, example=example, prompt=prompt):
            labels = patch_labels(attribute, prompt, example.scenes, material.tokenizer)
            assert (labels >= 0).sum() == len(prompt.pixel_values) * VISION.tokens_per_tile
            return [material.tokenizer.decode([i]).strip() for i in labels[labels >= 0].tolist()]

        # 8 x 8 pixels for each token; the global tile is blurred across places.
        patches = prompt.pixel_values.unfold(2, 8, 8).unfold(3, 8, 8)
        spread = patches.amax(dim=(1, -1, -2)) - patches.amin(dim=(1, -1, -2))
        shown = (spread > 0.01).flatten().tolist()[: 36 * tiles[0] * tiles[1]]
        for attribute in ("shape", "colour"):
            named = words(attribute)
            assert all(word != "none" for word, there in zip(named, shown, strict=False) if there)
            there = {getattr(thing, attribute) for thing in example.scenes[0].objects}
            assert set(named) - {"none"} == there
        whole = slice(-36, None)  # the global tile, or the only one
        assert words("row")[whole] == ["top"] * 12 + ["middle"] * 12 + ["bottom"] * 12
        assert words("column")[whole] == ["left", "left", "middle", "middle", "right", "right"] * 6
        first = {(1, 1): 3, (1, 2): 3, (2, 1): 2, (2, 2): 2}[tiles]  # rows of places in tile 0
        assert len(set(words("row")[:36])) == first


def test_image_tokens_of_frames_are_named_after_their_picture_and_what_moved(material):
    rng = np.random.default_rng(2)
    for _ in range(6):
        example = scenes.sample(rng, "motion")
        _, prompt = chat(material, example.images, [(example.question, example.answer)], 512)
        spans = prompt.spans

        def words(attribute, example=example, prompt=prompt):
            labels = patch_labels(attribute, prompt, example.scenes, material.tokenizer)
            return [
                material.tokenizer.decode([i]).strip() if i >= 0 else "" for i in labels[0].tolist()
            ]

        ordinals = [scenes.ORDINALS[i] if i >= 0 else "" for i in spans.image[0, :-1].tolist()]
        patches = (spans.patch[0, :-1] >= 0).tolist()
        assert words("picture") == [o if p else "" for o, p in zip(ordinals, patches, strict=True)]

        ways, shapes = words("motion"), words("shape")
        for image, scene in enumerate(example.scenes):
            for thing in scene.objects:
                query = scenes.Query("motion", thing.shape, thing.colour)
                if scenes.is_ambiguous(query, example.scenes):
                    continue
                here = [
                    way
                    for way, shape, i in zip(ways, shapes, spans.image[0].tolist(), strict=False)
                    if i == image and shape == thing.shape and way
                ]
                alike = [other.shape for other in scene.objects].count(thing.shape)
                if image == 0:
                    assert not here
                elif alike == 1:
                    assert set(here) == {scenes.answer(query, example.scenes)}


def test_an_object_that_cannot_be_told_from_another_has_no_known_motion():
    def frame(*places):
        things = (scenes.Thing("star", "red", place, (0, 0, 12, 12)) for place in places)
        return scenes.Scene(tuple(things), 0, (1, 1))

    assert scenes.moved((frame("top left"), frame("top")), "top") == "right"
    assert scenes.moved((frame("top"), frame("top")), "top") == "still"
    assert scenes.moved((frame("top"),), "top") is None
    assert scenes.moved((frame("top"), frame("bottom")), "top") is None
    assert scenes.moved((frame("top"), frame("left")), "left") is None
    assert scenes.moved((frame("top", "bottom"), frame("top")), "top") is None
    assert scenes.moved((frame(), frame("top")), "top") is None


def test_padding_is_on_the_right_and_not_scored():
    rows = padded([shifted(np.array([[1, 2, 3]])), shifted(np.array([[4, 5, 6, 7]]))], 9, 8)
    assert rows.inputs.tolist() == [[1, 2, *[9] * 6], [4, 5, 6, *[9] * 5]]
    assert rows.targets.tolist() == [[2, 3, *[9] * 6], [5, 6, 7, *[9] * 5]]
    assert rows.weights.tolist() == [[1, 1, *[0] * 6], [1, 1, 1, *[0] * 5]]


def test_a_kind_of_needles_that_is_unknown_is_refused():
    with pytest.raises(
        ValueError, match=r"unknown kind 'prosa' of needles; choose from \('tokens'"
    ):
        Needle(1, kind="prosa")


def test_prose_needles_without_english_text_name_the_lesson_and_the_file(material, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(material.tokenizer.file.read_bytes())
    (tmp_path / "english.train.bin").touch()
    with pytest.raises(
        ValueError, match=r"english\.train\.bin is empty, and a needle lesson of ki"
    ):
        Needle(1, kind="prose", length=384).draw(np.random.default_rng(0), Material(tmp_path))
