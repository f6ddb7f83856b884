"""Small scenes of coloured shapes with their ground truth: drawing, questions, counterfactuals.

A picture is a canvas of one to four tiles, divided into three rows and three columns of places;
an object stands inside one place, so objects never touch and painting one out is exact.
`sample` makes training rows; everything below it works on scenes made by hand, too.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from llama4_lab.train.shapes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    TILE,
    Scene,
    Thing,
    draw,
    erase,
)

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0), "still": (0, 0)}
"""Places moved from one frame to the next: rows, columns."""
NUMBERS = ("zero", "one", "two", "three", "four")
ORDINALS = ("first", "second", "third", "fourth")
NONE = "none"
_SMALLEST = 12  # pixels; smaller stars and hearts are hard to tell from circles

_SINGLE = (("shape",), ("colour",), ("colour", "shape"))
_NAMED: dict[str, tuple[tuple[str, ...], ...]] = {
    "scan": ((),),
    "caption": ((),),
    "colour": (("shape",),),
    "shape": (("colour",),),
    "place": _SINGLE,
    "colour_at": (("place",),),
    "shape_at": (("place",),),
    "object_at": (("place",),),
    "count": ((), ("shape",), ("colour",)),
    "exists": _SINGLE,
    "motion": ((), ("shape",), ("colour",)),
    "picture": _SINGLE,
}
"""Task -> the attributes that its question may name."""
TASKS = tuple(_NAMED)
_SEVERAL = ("motion", "picture")
ONE_PICTURE = tuple(task for task in TASKS if task not in _SEVERAL)
"""The tasks about a single picture; the others have two to four."""
WORDINGS = {
    "scan": ("Name every place.",),
    "caption": ("Describe the picture.", "What is in the picture?"),
    "colour": ("What colour is the {one}?", "What color is the {one}?"),
    "shape": ("What shape is the {one}?", "Which shape is {colour}?"),
    "place": ("Where is the {one}?",),
    "colour_at": ("What colour is {at}?", "What colour is the object {at}?"),
    "shape_at": ("What shape is {at}?", "What shape is the object {at}?"),
    "object_at": ("What is {at}?", "Which object is {at}?"),
    "count": ("How many {many} are there?", "How many {many} are in the picture?"),
    "exists": ("Is there {a}?", "Is there {a} in the picture?"),
    "motion": ("Which way did {it} move?", "Where did {it} move?"),
    "picture": ("Which picture has the {one}?", "Which image has the {one}?"),
}
"""Task -> ways to ask; the first is the plain one."""
_PLURALS = {name: name + ("es" if name.endswith("s") else "s") for name in (*SHAPES, "object")}


def _vocabulary() -> tuple[str, ...]:
    phrases = [*SHAPES, *COLOURS, *PLACES, *DIRECTIONS, *NUMBERS, *ORDINALS, *_PLURALS.values()]
    phrases += [wording for wordings in WORDINGS.values() for wording in wordings]
    phrases += ["a", "an", "and", "at the", "in the", "it", "object", "yes", "no", NONE]
    words = (word.strip(".?,").lower() for phrase in phrases for word in phrase.split())
    return tuple(dict.fromkeys(word for word in words if not word.startswith("{")))


WORDS: tuple[str, ...] = _vocabulary()
"""Every word of questions and answers in lower case; a tokenizer should give each one token."""


@dataclass(frozen=True)
class Query:
    """What is asked: a task and the attributes that the question names."""

    task: str
    shape: str | None = None
    colour: str | None = None
    place: str | None = None
    places: tuple[str, ...] = PLACES
    """What a scan lists."""

    def names(self, thing: Thing) -> bool:
        """Whether the question's attributes fit the object."""
        return (
            self.shape in (None, thing.shape)
            and self.colour in (None, thing.colour)
            and self.place in (None, thing.place)
        )


@dataclass(frozen=True)
class Example:
    """A question about one or more scenes; `asked` holds pairs (scene, object) it is about."""

    query: Query
    scenes: tuple[Scene, ...]
    question: str
    answer: str
    asked: tuple[tuple[int, int], ...]

    @property
    def images(self) -> list[UInt8[np.ndarray, "height width 3"]]:
        """The scenes drawn with `TILE` pixels a tile."""
        return [draw(scene) for scene in self.scenes]

    def paint_out(self, pairs: Iterable[tuple[int, int]]) -> "Example":
        """The same question after removing the objects at pairs (scene, object).

        An object that is no longer there is answered with none, no or a smaller number.
        """
        gone = set(pairs)
        if strange := {picture for picture, _ in gone} - set(range(len(self.scenes))):
            raise ValueError(
                f"picture {min(strange)} is not in the example: it has {len(self.scenes)}, "
                "counted from 0"
            )
        scenes = tuple(
            erase(scene, *(i for p, i in gone if p == picture))
            for picture, scene in enumerate(self.scenes)
        )
        return _example(self.query, scenes, self.question)


@dataclass(frozen=True)
class World:
    """What scenes may hold; a smaller world makes an easier first lesson.

    `objects` is the fewest and the most in a picture, `tiles` the rows and columns of tiles.
    A scan lists just these `places`. Objects that move walk over all nine, whatever `places` says.
    """

    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = COLOURS
    places: tuple[str, ...] = PLACES
    objects: tuple[int, int] = (1, 4)
    tiles: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        for name, chosen, known in (
            ("shapes", self.shapes, SHAPES),
            ("colours", self.colours, COLOURS),
            ("places", self.places, PLACES),
        ):
            if strange := set(chosen) - set(known):
                raise ValueError(f"unknown {name} {sorted(strange)}; choose from {known}")
            if len(set(chosen)) < 2:
                raise ValueError(f"{name} {chosen} leave nothing to ask: give at least two")
        most = min(4, len(self.places) - 1)
        if not 1 <= self.objects[0] <= self.objects[1] <= most:
            raise ValueError(
                f"objects {self.objects} must be a fewest and a most between 1 and {most}: "
                f"of {len(self.places)} places one stays free"
            )
        rows, columns = self.tiles
        if rows < 1 or columns < 1 or rows * columns > 4:
            raise ValueError(f"tiles {self.tiles} must be rows and columns of 1 to 4 tiles in all")


WORLD = World()


def sample(rng: np.random.Generator, task: str | None = None, world: World = WORLD) -> Example:
    """Draw an unambiguous example of `task` (one of `TASKS`; any of them when None).

    About one question in ten is about something that is not there and is answered with none
    or zero; for "exists" it is every second one.

    >>> example = sample(np.random.default_rng(5), "colour")
    >>> example.question, example.answer, example.images[0].shape
    ('What colour is the circle?', 'yellow', (48, 48, 3))
    """
    if task is None:
        task = pick(rng, TASKS)
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose from {TASKS}")
    # Sizes, and what the question names, are settled before anything can be rejected:
    # ambiguity must favour neither small scenes nor easy questions.
    low, high = world.objects
    pictures = 1
    if task in _SEVERAL:
        pictures = int(rng.integers(2, 4 if task == "motion" else 5))
        high = max(low, min(high, 2))
    counts = [int(rng.integers(low, high + 1)) for _ in range(pictures)]
    is_crowd = task == "motion" and counts[0] > 1  # "it" would be any of them
    named = pick(rng, [names for names in _NAMED[task] if names or not is_crowd])
    missing = rng.random() < (0.5 if task == "exists" else 0.1)
    if missing and not named:
        counts = [0] * pictures
    repeats = task == "count" and rng.random() < 0.5
    crowd = _repetitive(rng, world) if repeats else world
    while True:
        if task == "motion":
            scenes = sequence(rng, pictures, counts[0], world)
        else:
            scenes = tuple(_scene(rng, count, crowd) for count in counts)
        query = _query(rng, task, named, scenes, missing, world)
        if not is_ambiguous(query, scenes) and bool(find(query, scenes)) != missing:
            return _example(query, scenes, ask(query, int(rng.integers(len(WORDINGS[task])))))


def another(
    rng: np.random.Generator,
    example: Example,
    world: World = WORLD,
    tasks: Sequence[str] = ONE_PICTURE,
) -> Example:
    """Draw one more unambiguous question about the pictures of an example.

    About a single picture it is of one of those `tasks` that need no more, about several of the
    same task again. Some numbers and some answers are more frequent than others here: pictures that
    happen to fit a question are kept, and nothing is drawn again to make up for it.
    """
    scenes = example.scenes
    is_motion = example.query.task == "motion"
    is_single = example.query.task not in _SEVERAL
    tasks = [t for t in tasks if t not in _SEVERAL] if is_single else [example.query.task]
    is_crowd = is_motion and len(scenes[0].objects) > 1
    while True:
        task = pick(rng, tasks)
        named = pick(rng, [names for names in _NAMED[task] if names or not is_crowd])
        missing = bool(named) and rng.random() < (0.5 if task == "exists" else 0.1)
        query = _query(rng, task, named, scenes, missing, world)
        if not is_ambiguous(query, scenes) and (not named or bool(find(query, scenes)) != missing):
            return _example(query, scenes, ask(query, int(rng.integers(len(WORDINGS[task])))))


def sequence(
    rng: np.random.Generator, frames: int = 3, objects: int = 1, world: World = WORLD
) -> tuple[Scene, ...]:
    """Two or three frames in which every object goes its own way, one place a frame, or stays.

    Of four objects, ways that have no room together are drawn again.
    """
    if frames not in (2, 3):
        raise ValueError(f"frames must be 2 or 3 to fit into three places; got {frames}")
    if not 0 <= objects <= 4:
        raise ValueError(f"{objects} objects do not fit: a picture has 0 to 4")

    def draw_ways() -> list[tuple[int, int]]:
        return [pick(rng, tuple(DIRECTIONS.values())) for _ in range(objects)]

    ways = draw_ways()
    while True:
        start = _scene(rng, objects, dataclasses.replace(world, places=PLACES))
        movers = [start.objects[i] for i in rng.permutation(objects)]  # not in reading order
        paths = [_path(thing, way, frames, world) for thing, way in zip(movers, ways, strict=True)]
        moments = list(zip(*paths, strict=False)) if paths else [()] * frames
        apart = all(len({thing.place for thing in things}) == objects for things in moments)
        if len(moments) == frames and apart:
            return tuple(dataclasses.replace(start, objects=_sorted(m)) for m in moments)
        if objects == 4:  # three cross three frames side by side, a fourth may have no room
            ways = draw_ways()


def find(query: Query, scenes: tuple[Scene, ...]) -> tuple[tuple[int, int], ...]:
    """Pairs (scene, object) that the question is about."""
    return tuple(
        (picture, i)
        for picture, scene in enumerate(scenes)
        for i, thing in enumerate(scene.objects)
        if query.names(thing)
    )


def is_ambiguous(query: Query, scenes: tuple[Scene, ...]) -> bool:
    """Whether the question speaks of one object while several fit."""
    if query.task in ("scan", "caption", "count", "exists"):
        return False
    pictures = [picture for picture, _ in find(query, scenes)]
    if query.task == "motion":  # the same object is found once in every frame
        return len(pictures) != len(set(pictures))
    return len(pictures) > 1


def answer(query: Query, scenes: tuple[Scene, ...]) -> str:
    """The right answer to an unambiguous question."""
    found = find(query, scenes)
    things = [scenes[picture].objects[i] for picture, i in found]
    match query.task:
        case "scan":
            at = {thing.place: str(thing) for thing in things}
            return ", ".join(at.get(place, NONE) for place in query.places)
        case "count":
            return NUMBERS[len(things)]
        case "exists":
            return "yes" if things else "no"
    if not things:
        return NONE
    match query.task:
        case "caption":
            parts = [f"{_with_article(str(thing))} {_at(thing.place)}" for thing in things]
            return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
        case "motion":
            way = _way(things[0], things[-1])
            assert way is not None, "objects move along rows and columns"
            return way
        case "picture":
            return ORDINALS[found[0][0]]
        case "object_at":
            return str(things[0])
        case "colour" | "colour_at":
            return things[0].colour
        case "shape" | "shape_at":
            return things[0].shape
        case _:
            return things[0].place


def moved(frames: tuple[Scene, ...], place: str) -> str | None:
    """Which way the object at a place of the last of two frames came.

    None where there is nothing, nothing before, or several objects that look alike.
    """
    thing = next((thing for thing in frames[-1].objects if thing.place == place), None)
    if thing is None or len(frames) < 2:
        return None
    same = Query("motion", thing.shape, thing.colour)
    alike = [[other for other in frame.objects if same.names(other)] for frame in frames]
    return _way(alike[0][0], thing) if [*map(len, alike)] == [1, 1] else None


def ask(query: Query, wording: int = 0) -> str:
    """The question in words, as `WORDINGS` has it.

    >>> ask(Query("count", colour="orange")), ask(Query("exists", shape="star", colour="orange"))
    ('How many orange objects are there?', 'Is there an orange star?')
    """
    noun, colour = query.shape or "object", f"{query.colour} " if query.colour else ""
    is_named = query.shape or query.colour
    return WORDINGS[query.task][wording].format(
        one=colour + noun,
        many=colour + _PLURALS[noun],
        a=_with_article(colour + noun),
        it=f"the {colour}{noun}" if is_named else "it",
        at=_at(query.place) if query.place else "",
        colour=query.colour,
    )


def _example(query: Query, scenes: tuple[Scene, ...], question: str) -> Example:
    return Example(query, scenes, question, answer(query, scenes), find(query, scenes))


def _scene(rng: np.random.Generator, count: int, world: World) -> Scene:
    places = rng.permutation(len(world.places))[:count]
    things = [
        _place(rng, pick(rng, world.shapes), pick(rng, world.colours), world.places[i], world)
        for i in places
    ]
    background = int(rng.integers(BACKGROUNDS[0], BACKGROUNDS[1] + 1))
    return Scene(_sorted(things), background, world.tiles)


def _place(rng: np.random.Generator, shape: str, colour: str, place: str, world: World) -> Thing:
    row, column = divmod(PLACES.index(place), 3)
    height, width = _place_size(world)
    side = int(rng.integers(_SMALLEST, min(height, width)))
    top = row * height + int(rng.integers(height - side + 1))
    left = column * width + int(rng.integers(width - side + 1))
    return Thing(shape, colour, place, (left, top, left + side, top + side))


def _path(thing: Thing, way: tuple[int, int], frames: int, world: World) -> list[Thing]:
    """The object in each frame, cut short where it would leave the canvas."""
    row, column = _cell(thing)
    height, width = _place_size(world)
    left, top, right, bottom = thing.box
    path = []
    for step in range(frames):
        down, along = step * way[0], step * way[1]
        if not (0 <= row + down < 3 and 0 <= column + along < 3):
            break
        x, y = along * width, down * height
        place = PLACES[3 * (row + down) + column + along]
        path.append(
            Thing(thing.shape, thing.colour, place, (left + x, top + y, right + x, bottom + y))
        )
    return path


def _query(
    rng: np.random.Generator,
    task: str,
    named: tuple[str, ...],
    scenes: tuple[Scene, ...],
    missing: bool,
    world: World,
) -> Query:
    """Name an object that is there, or mix attributes of what is there with others."""
    things = [thing for scene in scenes for thing in scene.objects]
    target = pick(rng, things) if things else None
    values = {}
    for name in named:
        if missing:
            target = pick(rng, things) if things and rng.random() < 0.5 else None
        values[name] = getattr(target, name) if target else pick(rng, getattr(world, name + "s"))
    return Query(task, places=world.places if task == "scan" else PLACES, **values)


def _repetitive(rng: np.random.Generator, world: World) -> World:
    """The same world with only two shapes and two colours, so that there is more to count."""
    few = {
        name: tuple(getattr(world, name)[i] for i in rng.permutation(len(getattr(world, name)))[:2])
        for name in ("shapes", "colours")
    }
    return dataclasses.replace(world, **few)


def _place_size(world: World) -> tuple[int, int]:
    """Height and width of one of the nine places in pixels."""
    return TILE * world.tiles[0] // 3, TILE * world.tiles[1] // 3


def _way(first: Thing, last: Thing) -> str | None:
    (row, column), (last_row, last_column) = _cell(first), _cell(last)
    way = (np.sign(last_row - row), np.sign(last_column - column))
    return next((name for name, direction in DIRECTIONS.items() if direction == way), None)


def _cell(thing: Thing) -> tuple[int, int]:
    return divmod(PLACES.index(thing.place), 3)


def _sorted(things: Iterable[Thing]) -> tuple[Thing, ...]:
    return tuple(sorted(things, key=lambda thing: PLACES.index(thing.place)))


def _at(place: str) -> str:
    return "in the middle" if place == "middle" else f"at the {place}"


def _with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def pick(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    """Draw one of the options."""
    return options[int(rng.integers(len(options)))]
