"""Rows of tokens whose end can only be known from far back: echoes and needles in a haystack.

Teach them in this order, after some ordinary text: `echo` of few different tokens until its
accuracy jumps, then `plant` with `word_facts` in `scatter`, then in `passages` of real text and
over longer distances. `token_facts` of the whole vocabulary were not learnt in this way.
Positions count from the start of the row, so chunk c holds positions from c * chunk on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int64, Integer

_KEYS = """
apple bread bridge castle chair church cloud coffee dog dream engine fish flower forest garden gold
horse island king lake lamp milk moon mountain queen river ship silver snow stone tree window
"""
KEYS = tuple(_KEYS.split())
"""Things that `word_facts` gives codes to; a tokenizer should give each one token."""

Ids = Sequence[int] | Integer[np.ndarray, " _"]
Encode = Callable[[str], Sequence[int]]
Fill = Callable[[np.random.Generator, int], Int64[np.ndarray, " n"]]
"""Gives that many tokens of hay."""


@dataclass(frozen=True)
class Fact:
    """A needle in tokens: planted as `said` `value` `closed`, asked as `asked` `value` `ended`."""

    said: tuple[int, ...]
    value: tuple[int, ...]
    closed: tuple[int, ...]
    asked: tuple[int, ...]
    ended: tuple[int, ...] = ()

    @property
    def statement(self) -> tuple[int, ...]:
        return self.said + self.value + self.closed

    @property
    def query(self) -> tuple[int, ...]:
        return self.asked + self.value + self.ended


@dataclass(frozen=True)
class Form:
    """How a needle is said and asked in words; the value stands between the two parts of each.

    For chat, `asked` ends in the assistant's header and `ended` is the end of its turn.
    """

    said: str = " The code of {key} is "
    closed: str = "."
    asked: str = " The code of {key} is "
    ended: str = "."


@dataclass(frozen=True)
class Answer:
    """Where an answer stands (`start` to `stop`, exclusive) and where its value was planted."""

    start: int
    stop: int
    planted: int
    chunk: int

    @property
    def distance(self) -> int:
        """Tokens from the planted value's start to the answer's start."""
        return self.start - self.planted

    @property
    def planted_chunk(self) -> int:
        return self.planted // self.chunk

    @property
    def query_chunk(self) -> int:
        """The chunk of the position that predicts the answer's first token."""
        return (self.start - 1) // self.chunk

    @property
    def is_across(self) -> bool:
        return self.planted_chunk != self.query_chunk


@dataclass(frozen=True)
class Row:
    """Tokens with the loss weight of predicting each of them, and where the answers are."""

    tokens: Int64[np.ndarray, " t"]
    weights: Float32[np.ndarray, " t"]
    answers: tuple[Answer, ...]


def echo(
    rng: np.random.Generator,
    vocabulary: Ids,
    rows: int,
    length: int,
    period: int,
    prefix: Sequence[int] = (),
) -> tuple[Int64[np.ndarray, "b t"], Float32[np.ndarray, "b t"]]:
    """Return rows in which `period` distinct random tokens repeat, and their loss weights.

    All rows of a batch share the period. The weight is 1 from the second repeated token on: that
    the first one comes again cannot be known.

    >>> tokens, weights = echo(np.random.default_rng(0), range(10, 20), 1, 7, period=3, prefix=[1])
    >>> tokens.tolist(), weights.tolist()
    ([[1, 14, 16, 12, 14, 16, 12]], [[0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]])
    """
    if not 2 <= period <= len(vocabulary):
        raise ValueError(
            f"period {period} must be between 2 and the {len(vocabulary)} tokens of the vocabulary"
        )
    known = len(prefix) + period + 1
    if length <= known:
        raise ValueError(
            f"length {length} has no room for a repeat: {len(prefix)} prefix tokens and period "
            f"{period} need at least {known + 1}"
        )
    order = rng.permuted(np.tile(np.asarray(vocabulary, np.int64), (rows, 1)), axis=1)
    repeats = -(-(length - len(prefix)) // period)
    cycle = np.tile(order[:, :period], (1, repeats))
    head = np.tile(np.asarray(prefix, np.int64), (rows, 1))
    tokens = np.concatenate([head, cycle], axis=1)[:, :length]
    weights = np.zeros(tokens.shape, np.float32)
    weights[:, known:] = 1
    return tokens, weights


def token_facts(
    rng: np.random.Generator, keys: Sequence[int], values: Sequence[int], count: int
) -> list[Fact]:
    """Return needles of one key token and one value token, with different keys and values.

    The hay should hold none of the keys.
    """
    chosen_keys, chosen_values = _choose(rng, keys, count), _choose(rng, values, count)
    return [
        Fact((key,), (value,), (), (key,))
        for key, value in zip(chosen_keys, chosen_values, strict=True)
    ]


def word_facts(
    rng: np.random.Generator,
    encode: Encode,
    count: int,
    form: Form = Form(),
    keys: Sequence[str] = KEYS,
    digits: int = 3,
) -> list[Fact]:
    """Return needles such as "The code of apple is 417.", with different keys and codes.

    The parts around the value are encoded on their own, as they are in whole sentences by a
    tokenizer that splits digits from letters and spaces.
    """
    codes = _choose(rng, range(10 ** (digits - 1), 10**digits), count)
    return [
        Fact(
            said=tuple(encode(form.said.format(key=key))),
            value=tuple(encode(str(code))),
            closed=tuple(encode(form.closed)),
            asked=tuple(encode(form.asked.format(key=key))),
            ended=tuple(encode(form.ended)),
        )
        for key, code in zip(_choose(rng, keys, count), codes, strict=True)
    ]


def scatter(vocabulary: Ids) -> Fill:
    """Return hay of independent random tokens."""
    tokens = np.asarray(vocabulary, np.int64)
    return lambda rng, count: tokens[rng.integers(len(tokens), size=count)]


def passages(tokens: Ids, ends: Ids | None = None) -> Fill:
    """Return hay cut from text; each piece stops just before one of the positions `ends`.

    Give the positions after sentences, so that a needle never splits one; None allows any.
    """
    text = np.asarray(tokens)
    stops = np.arange(len(text) + 1) if ends is None else np.sort(np.asarray(ends, np.int64))
    if len(stops) and not 0 <= stops[0] <= stops[-1] <= len(text):
        raise ValueError(
            f"ends {stops[0]} to {stops[-1]} must lie within the text of {len(text)} tokens"
        )

    def fill(rng: np.random.Generator, count: int) -> Int64[np.ndarray, " n"]:
        first = int(np.searchsorted(stops, count))
        if first == len(stops):
            raise ValueError(
                f"the text of {len(text)} tokens has no {count} tokens before an end: give a "
                "longer text or more ends"
            )
        stop = stops[rng.integers(first, len(stops))]
        return text[stop - count : stop].astype(np.int64)

    return fill


def plant(
    rng: np.random.Generator,
    facts: Sequence[Fact],
    fill: Fill,
    length: int,
    *,
    asked: int = 1,
    distance: tuple[int, int] | None = None,
    across: bool | None = None,
    chunk: int = 128,
    prefix: Sequence[int] = (),
    background: float = 0.0,
) -> Row:
    """Hide all facts in `length` tokens of hay and ask for the first `asked` of them at the end.

    `distance` is the least and the most for every asked fact, from value to answer. `across`
    places value and query in different chunks (True), in the same (False) or in any (None). No
    fact and no query straddles two chunks, so a range of distances narrower than a fact may hold
    no place for it. The weight is 1 on answers and what ends them, and `background` on the hay.
    """
    if not 1 <= asked <= len(facts):
        raise ValueError(f"asked {asked} must be between 1 and the {len(facts)} facts given")
    free = np.ones(length, bool)
    tokens = np.zeros(length, np.int64)
    weights = np.full(length, background, np.float32)
    free[: len(prefix)] = False
    tokens[: len(prefix)] = prefix
    weights[: len(prefix)] = 0

    def put(start: int, piece: Sequence[int], weighted_from: int) -> None:
        stop = start + len(piece)
        free[start:stop] = False
        tokens[start:stop] = piece
        weights[start:stop] = 0
        weights[start + weighted_from : stop] = 1

    queries, end = [], length
    for fact in reversed(facts[:asked]):
        starts = np.flatnonzero(_fits(free[:end], len(fact.query), chunk))
        if not len(starts):
            raise ValueError(f"{asked} queries do not fit into {length} tokens: use a longer row")
        end = int(starts[-1])
        put(end, fact.query, len(fact.asked))
        queries.insert(0, end)

    answers = []
    for fact, query in zip(facts[:asked], queries, strict=True):
        start = query + len(fact.asked)
        room = _fits(free[:end], len(fact.statement), chunk)
        starts = np.arange(len(room))
        gaps = start - starts - len(fact.said)
        if distance:
            room &= (distance[0] <= gaps) & (gaps <= distance[1])
        if across is not None:
            room &= (starts // chunk != query // chunk) == across
        where = {None: "", True: " across chunks", False: " in the query's chunk"}[across]
        wish = f" at a distance of {distance[0]} to {distance[1]} tokens" if distance else ""
        planted = _choose_start(rng, room, f"{where}{wish}", length, chunk)
        put(planted, fact.statement, len(fact.statement))
        value = planted + len(fact.said)
        answers.append(Answer(start, start + len(fact.value), value, chunk))
    for fact in facts[asked:]:
        room = _fits(free[:end], len(fact.statement), chunk)
        put(_choose_start(rng, room, "", length, chunk), fact.statement, len(fact.statement))

    edges = np.flatnonzero(np.diff(np.concatenate([[0], free.astype(np.int8), [0]])))
    for start, stop in edges.reshape(-1, 2):
        tokens[start:stop] = fill(rng, int(stop - start))
    return Row(tokens, weights, tuple(answers))


def _fits(free: Bool[np.ndarray, " t"], size: int, chunk: int) -> Bool[np.ndarray, " starts"]:
    """Starts at which `size` free tokens lie in one chunk."""
    starts = np.arange(max(len(free) - size + 1, 0))
    taken = np.concatenate([[0], np.cumsum(~free)])
    is_free = taken[starts + size] == taken[starts]
    return is_free & (starts // chunk == (starts + size - 1) // chunk)


def _choose_start(
    rng: np.random.Generator, room: Bool[np.ndarray, " starts"], wish: str, length: int, chunk: int
) -> int:
    starts = np.flatnonzero(room)
    if not len(starts):
        raise ValueError(
            f"no room for a fact{wish} in a row of {length} tokens with chunks of {chunk}: "
            "change the length or the distance, or give fewer facts"
        )
    return int(starts[rng.integers(len(starts))])


def _choose(rng: np.random.Generator, options: Sequence, count: int) -> list:
    """Return `count` different options."""
    if count > len(options):
        raise ValueError(f"{count} facts need as many keys and values; only {len(options)} given")
    return [options[int(i)] for i in rng.permutation(len(options))[:count]]
