"""Sums, differences, products, comparisons and number sequences, with problems held out for tests.

A problem is one line of text (`37 + 48 = 85`) or a question and an answer for chat. Whether it
is held out depends on its kind and numbers alone, so training never sees a test problem, whatever
the seed. Problems that say the same, such as 37 + 48 and 48 + 37, are held out together.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

KINDS = ("add", "subtract", "multiply", "larger", "smaller", "sequence")
SPLITS = ("train", "test")
_HELD_OUT = 10  # one problem in so many
_STEPS = 9  # largest step of a sequence
_TERMS = 4  # numbers shown of a sequence


@dataclass(frozen=True)
class Problem:
    """One problem; `a` and `b` are the operands, of a sequence its first number and its step.

    >>> problem = Problem("add", 37, 48)
    >>> problem.line, problem.question, problem.answer
    ('37 + 48 = 85', 'What is 37 + 48?', '85')
    >>> Problem("sequence", 20, -3).line
    '20, 17, 14, 11, 8'
    """

    kind: str
    a: int
    b: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}; choose from {KINDS}")

    @property
    def answer(self) -> str:
        a, b = self.a, self.b
        match self.kind:
            case "add":
                return str(a + b)
            case "subtract":
                return str(a - b)
            case "multiply":
                return str(a * b)
            case "larger":
                return str(max(a, b))
            case "smaller":
                return str(min(a, b))
        return str(a + _TERMS * b)

    @property
    def prompt(self) -> str:
        """The line up to the answer, with the space before it."""
        match self.kind:
            case "sequence":
                return self._terms + ", "
            case "larger" | "smaller":
                return f"{self.kind}({self.a}, {self.b}) = "
        return f"{self._expression} = "

    @property
    def line(self) -> str:
        return self.prompt + self.answer

    @property
    def question(self) -> str:
        """The problem as a person would ask it."""
        match self.kind:
            case "sequence":
                return f"What comes next: {self._terms}?"
            case "larger" | "smaller":
                return f"Which is {self.kind}, {self.a} or {self.b}?"
        return f"What is {self._expression}?"

    @property
    def is_held_out(self) -> bool:
        """Whether the problem belongs to the test split.

        One-digit products are a table to remember, not a rule to find: of each held-out pair only
        one order is tested and the other trained, and squares are always trained.
        """
        a, b = self.a, self.b
        if self.kind == "multiply" and a <= b:
            return False
        if self.kind not in ("subtract", "sequence"):
            a, b = min(a, b), max(a, b)
        digest = hashlib.blake2b(f"{self.kind} {a} {b}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big") % _HELD_OUT == 0

    @property
    def _expression(self) -> str:
        sign = {"add": "+", "subtract": "-", "multiply": "*"}[self.kind]
        return f"{self.a} {sign} {self.b}"

    @property
    def _terms(self) -> str:
        return ", ".join(str(self.a + i * self.b) for i in range(_TERMS))


def sample(
    rng: np.random.Generator, kind: str | None = None, split: str = "train", largest: int = 99
) -> Problem:
    """Draw a problem of `kind` (one of `KINDS`; any of them when None) from a split.

    Operands run from 0 to `largest`, for products to 9; no answer is negative.
    """
    _check(kind, split, largest)
    kind = kind or KINDS[rng.integers(len(KINDS))]
    while True:
        if kind == "sequence":
            a, b = rng.integers(0, largest + 1), rng.integers(-_STEPS, _STEPS + 1)
        else:
            a, b = rng.integers(0, _largest(kind, largest) + 1, size=2)
        problem = Problem(kind, int(a), int(b))
        if _is_problem(problem) and problem.is_held_out == (split == "test"):
            return problem


def problems(kind: str, split: str, largest: int = 99) -> Iterator[Problem]:
    """Yield every problem of a kind and split, in order.

    >>> sum(1 for _ in problems("multiply", "train")) + sum(1 for _ in problems("multiply", "test"))
    100
    """
    _check(kind, split, largest)
    numbers = range(_largest(kind, largest) + 1)
    for a in numbers:
        for b in range(-_STEPS, _STEPS + 1) if kind == "sequence" else numbers:
            problem = Problem(kind, a, b)
            if _is_problem(problem) and problem.is_held_out == (split == "test"):
                yield problem


def lines(rng: np.random.Generator, count: int, split: str = "train", largest: int = 99) -> str:
    """Return `count` problems of all kinds as plain text, one a line."""
    return "".join(sample(rng, None, split, largest).line + "\n" for _ in range(count))


def _largest(kind: str, largest: int) -> int:
    return min(largest, 9) if kind == "multiply" else largest


def _is_problem(problem: Problem) -> bool:
    match problem.kind:
        case "subtract":
            return problem.a >= problem.b
        case "larger" | "smaller":
            return problem.a != problem.b
        case "sequence":
            return problem.b != 0 and problem.a + _TERMS * problem.b >= 0
    return True


def _check(kind: str | None, split: str, largest: int) -> None:
    if kind is not None and kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; choose from {KINDS}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose from {SPLITS}")
    if largest < 9:
        raise ValueError(f"largest {largest} leaves too few problems: use 9 or more")
