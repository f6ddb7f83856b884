"""What is taught: text, echoes, needles, sums and pictures, each a maker of `Rows`.

A lesson is data: how many rows of which kind are its part of one step. `draw` makes them, the same
ones for the same generator.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from llama4_lab.config import VisionConfig
from llama4_lab.prompt import Prompt, Tokenizer, build_prompt
from llama4_lab.prompt.chat import encode_chat
from llama4_lab.train import arithmetic, needles, scenes
from llama4_lab.train.mixture import Mixture
from llama4_lab.train.rows import Rows, answers_of, padded, shifted
from llama4_lab.train.shapes import PLACES, Scene

Message = dict[str, Any]
ATTRIBUTES = ("shape", "shape", "shape", "colour", "row", "column")
"""What image tokens are asked to name, the hardest most often."""
OF_SEVERAL = {"picture": ("picture",), "motion": ("picture", "motion", "motion")}
"""What they are asked just as often if the pictures are several, by task."""
NEEDLES = ("tokens", "words", "prose")
"""Kinds of `Needle`."""


@dataclass(frozen=True)
class Material:
    """What lessons draw from: a corpus folder with its tokenizer, and the size of tiles."""

    folder: Path
    vision: VisionConfig | None = None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.folder)

    @cached_property
    def words(self) -> Int[np.ndarray, " n"]:
        """The ids of all tokens that are text."""
        return np.arange(min(self.tokenizer.special.values()))

    @cached_property
    def prose(self) -> needles.Fill:
        """Hay of English sentences."""
        path = self.folder / "english.train.bin"
        if path.is_file() and not path.stat().st_size:
            raise ValueError(
                f"{path} is empty, and a needle lesson of kind 'prose' hides its needles in that "
                "text: build the corpus with every licence, or give the lesson another kind"
            )
        text = np.memmap(path, dtype=np.uint16, mode="r")
        (stop,) = self.tokenizer.encode(".")
        return needles.passages(text, np.flatnonzero(text == stop) + 1)

    def prompt(
        self, messages: str | list[Message], images: list[np.ndarray] | None = None
    ) -> Prompt:
        """Build what the model reads, as `Llama4.prompt` does."""
        tile = self.vision.tile if self.vision else {}
        return build_prompt(self.tokenizer, messages, images or [], **tile)


@dataclass(frozen=True)
class Lesson:
    """`rows` rows a step, whose mean loss counts `weight` times."""

    rows: int
    weight: float = 1.0
    label: str = ""  # in the log; the kind of lesson if empty

    @property
    def name(self) -> str:
        return self.label or type(self).__name__.lower()

    def draw(self, rng: np.random.Generator, material: Material) -> Rows:
        raise NotImplementedError


@dataclass(frozen=True)
class Text(Lesson):
    """Pieces of documents; `domains` are shares of rows."""

    domains: dict[str, float] = field(default_factory=dict)
    length: int = 512

    def draw(self, rng: np.random.Generator, material: Material) -> Rows:
        return shifted(Mixture(material.folder, self.domains).batch(rng, self.rows, self.length))


@dataclass(frozen=True)
class Echo(Lesson):
    """Random tokens that repeat: only what stood one period earlier tells what comes next.

    The loss falls in one jump, when attention has learnt to look for what followed last time
    (Olsson et al. 2022, "In-context Learning and Induction Heads"). Needles need that first. With
    few different tokens it comes early: then each of them is met often enough to be told apart.
    """

    length: int = 256
    periods: tuple[int, int] = (8, 64)
    vocabulary: int | None = None  # how many tokens are used at all, the same ones in every step

    def draw(self, rng: np.random.Generator, material: Material) -> Rows:
        period = int(rng.integers(self.periods[0], self.periods[1] + 1))
        words = np.random.default_rng(0).permutation(material.words)[: self.vocabulary]
        return shifted(*needles.echo(rng, words, self.rows, self.length + 1, period))


@dataclass(frozen=True)
class Needle(Lesson):
    """Several things are said in `length` tokens and asked for at the end.

    `kind` is "tokens" (one random token belongs to another, among random tokens), "words" (codes
    in words, among random tokens) or "prose" (codes in words, among sentences). Rows that are not
    read `in_chunks` teach the RoPE layers to leave alone what they meet beyond a chunk.
    """

    length: int = 512
    kind: str = "tokens"
    facts: tuple[int, int] = (2, 6)
    in_chunks: bool = True

    def __post_init__(self) -> None:
        if self.kind not in NEEDLES:
            raise ValueError(f"unknown kind {self.kind!r} of needles; choose from {NEEDLES}")

    def draw(self, rng: np.random.Generator, material: Material) -> Rows:
        rows = [self.row(rng, material) for _ in range(self.rows)]
        drawn = shifted(
            np.stack([row.tokens for row in rows]), np.stack([row.weights for row in rows])
        )
        return dataclasses.replace(drawn, in_chunks=self.in_chunks)

    def row(self, rng: np.random.Generator, material: Material) -> needles.Row:
        count = int(rng.integers(self.facts[0], self.facts[1] + 1))
        keys, values, hay = np.split(rng.permutation(material.words), (64, 128))
        if self.kind == "tokens":
            facts = needles.token_facts(rng, keys.tolist(), values.tolist(), count)
        else:
            facts = needles.word_facts(rng, material.tokenizer.encode, count)
        fill = material.prose if self.kind == "prose" else needles.scatter(hay)
        return needles.plant(rng, facts, fill, self.length + 1, asked=count)


@dataclass(frozen=True)
class Sums(Lesson):
    """Arithmetic, half of the rows as lines of text and half as questions in a chat.

    Only answers are scored: the numbers of a problem cannot be known. A kind that stands in `kinds`
    several times is drawn as much more often.
    """

    length: int = 128
    kinds: tuple[str, ...] = arithmetic.KINDS

    def draw(self, rng: np.random.Generator, material: Material) -> Rows:
        rows = [
            self.chat(rng, material) if i % 2 else self.lines(rng, material.tokenizer)
            for i in range(self.rows)
        ]
        return padded(rows, material.tokenizer.pad_id, self.length)

    def lines(self, rng: np.random.Generator, tokenizer: Tokenizer) -> Rows:
        tokens: list[int] = []
        weights: list[float] = []
        while len(tokens) <= self.length:
            problem = arithmetic.sample(rng, scenes.pick(rng, self.kinds))
            asked, said = tokenizer.encode(problem.prompt), tokenizer.encode(problem.answer + "\n")
            tokens += asked + said
            weights += [0.0] * len(asked) + [1.0] * len(said)
        stop = self.length + 1
        return shifted(np.array([tokens[:stop]]), np.array([weights[:stop]]))

    def chat(self, rng: np.random.Generator, material: Material) -> Rows:
        kinds = (scenes.pick(rng, self.kinds) for _ in itertools.repeat(None))
        problems = (arithmetic.sample(rng, kind) for kind in kinds)
        questions = ((problem.question, problem.answer) for problem in problems)
        return chat(material, [], questions, self.length)[0]


@dataclass(frozen=True)
class Pictures(Lesson):
    """Chats about scenes, several questions to each; a task that stands in `tasks` several times
    is asked as much more often.

    Beside the answers, each image token is scored on naming what it shows (see `patch_labels`):
    what is to be said stands ready then where it is looked for. `patch_weight` is the weight of
    one against a word of an answer.
    """

    length: int = 128
    world: scenes.World = scenes.WORLD
    tasks: tuple[str, ...] = scenes.ONE_PICTURE
    tiles: tuple[tuple[int, int], ...] = ((1, 1),)
    questions: int = 6  # to each scene, at most
    patch_weight: float = 0.1

    def draw(self, rng: np.random.Generator, material: Material) -> Rows:
        rows = [self.row(rng, material) for _ in range(self.rows)]
        return padded(rows, material.tokenizer.pad_id, self.length)

    def row(self, rng: np.random.Generator, material: Material) -> Rows:
        world = dataclasses.replace(self.world, tiles=scenes.pick(rng, self.tiles))
        example = scenes.sample(rng, scenes.pick(rng, self.tasks), world)
        questions = {example.question: example.answer}
        for _ in range(self.questions):
            more = scenes.another(rng, example, world, self.tasks)
            questions[more.question] = more.answer
        rows, prompt = chat(material, example.images, questions.items(), self.length)
        attributes = ATTRIBUTES
        if (more := OF_SEVERAL.get(example.query.task)) and rng.random() < 0.5:
            attributes = more
        attribute = scenes.pick(rng, attributes)
        labels = patch_labels(attribute, prompt, example.scenes, material.tokenizer)
        seen = labels >= 0
        return Rows(
            rows.inputs,
            torch.where(seen, labels, rows.targets),
            torch.where(seen, self.patch_weight, rows.weights),
            rows.pixel_values,
        )


def chat(
    material: Material,
    images: list[np.ndarray],
    questions: Iterable[tuple[str, str]],
    length: int,
) -> tuple[Rows, Prompt]:
    """Ask about the images, in one conversation, as many of the questions as `length` allows."""
    messages: list[Message] = []
    room = length + 1
    for question, answer in questions:
        content: list[Message] = [{"type": "image"} for _ in ([] if messages else images)]
        content.append({"type": "text", "text": question})
        turn: list[Message] = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ]
        if not messages:
            needed = material.prompt(turn, images).input_ids.shape[1]
        else:
            needed = len(encode_chat(material.tokenizer, turn, add_bos=False).ids)
        if needed > room:
            break
        room -= needed
        messages += turn
    if not messages:
        raise ValueError(f"{length} tokens have no room for a question and its answer")
    prompt = material.prompt(messages, images)
    rows = shifted(prompt.input_ids.numpy(), answers_of(prompt, material.tokenizer).numpy())
    return dataclasses.replace(rows, pixel_values=prompt.pixel_values), prompt


def patch_labels(
    attribute: str,
    prompt: Prompt,
    pictures: tuple[Scene, ...],
    tokenizer: Tokenizer,
) -> Int[Tensor, "1 t"]:
    """Name what each image token of a prompt shows; -1 for all other tokens.

    `attribute` is the "shape" or the "colour" of the object in the same place; the "row" or the
    "column" of the place itself; which "picture" it belongs to; or the object's "motion" since the
    frame before, where there is one and the object can be told from the others.
    """
    spans = prompt.spans
    assert spans.tiling is not None
    grid = spans.tiling.grid
    labels = torch.full_like(prompt.input_ids, -1)
    first_tile = 0
    for image, (layout, scene) in enumerate(zip(spans.layouts, pictures, strict=True)):
        if attribute == "row":
            names = [("top", "middle", "bottom")[i // 3] for i in range(9)]
        elif attribute == "column":
            names = [("left", "middle", "right")[i % 3] for i in range(9)]
        elif attribute == "picture":
            names = [scenes.ORDINALS[image]] * 9
        elif attribute == "motion":
            names = [scenes.moved(pictures[max(image - 1, 0) : image + 1], i) for i in PLACES]
        else:
            there = {thing.place: getattr(thing, attribute) for thing in scene.objects}
            names = [there.get(place, scenes.NONE) for place in PLACES]
        ids = [-1 if name is None else tokenizer.encode(" " + name)[0] for name in names]
        at = (spans.image[0] == image) & (spans.patch[0] >= 0)
        tile = spans.tile[0, at] - first_tile
        is_whole = tile == layout.num_tiles - 1
        rows, cols = torch.where(is_whole, 1, layout.rows), torch.where(is_whole, 1, layout.cols)
        row, col = (torch.where(is_whole, 0, n) for n in (tile // layout.cols, tile % layout.cols))
        down = (row + (spans.patch[0, at] // grid + 0.5) / grid) / rows
        along = (col + (spans.patch[0, at] % grid + 0.5) / grid) / cols
        place = 3 * (3 * down).long() + (3 * along).long()
        labels[0, at] = torch.tensor(ids)[place]
        first_tile += layout.num_tiles
    return labels[:, :-1]
