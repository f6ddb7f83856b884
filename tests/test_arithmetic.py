"""Arithmetic: every line and question says what is true, and test problems are never trained."""

import re

import numpy as np
import pytest

from llama4_lab.train.arithmetic import KINDS, Problem, lines, problems, sample


def solve(text):
    """Work out a problem from its words alone."""
    numbers = [int(number) for number in re.findall(r"(?<![\d])-?\d+|\d+", text)]
    if "larger" in text or "smaller" in text:
        return max(numbers) if "larger" in text else min(numbers)
    if "," in text:
        steps = set(np.diff(numbers))
        assert len(steps) == 1
        return numbers[-1] + steps.pop()
    [(a, sign, b)] = re.findall(r"(\d+) ([-+*]) (\d+)", text)
    return {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]


@pytest.mark.parametrize("kind", KINDS)
def test_lines_questions_and_answers_are_true(kind):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for _ in range(300):
            problem = sample(rng, kind, split)
            assert int(problem.answer) >= 0
            assert solve(problem.prompt) == int(problem.answer)
            assert solve(problem.question) == int(problem.answer)
            assert problem.line == problem.prompt + problem.answer


@pytest.mark.parametrize("kind", KINDS)
def test_splits_share_no_problem_and_samples_keep_to_theirs(kind):
    train, test = ({p.line for p in problems(kind, split)} for split in ("train", "test"))
    assert not train & test
    low, high = (0.02, 0.06) if kind == "multiply" else (0.08, 0.12)
    assert low < len(test) / (len(train) + len(test)) < high
    sizes = {"add": 100**2, "subtract": 5050, "multiply": 100, "larger": 9900, "smaller": 9900}
    assert len(train) + len(test) == sizes.get(kind, 1620)
    rng = np.random.default_rng(1)
    assert {sample(rng, kind, "train").line for _ in range(300)} <= train
    assert {sample(rng, kind, "test").line for _ in range(100)} <= test


def test_lines_of_text_keep_to_their_split():
    held_out = {p.line for kind in KINDS for p in problems(kind, "test", largest=30)}
    rng = np.random.default_rng(1)
    assert not held_out & set(lines(rng, 500, "train", largest=30).splitlines())
    assert held_out >= set(lines(rng, 100, "test", largest=30).splitlines())


@pytest.mark.parametrize("kind", ["add", "larger", "smaller"])
def test_a_problem_and_its_mirror_image_are_held_out_together(kind):
    for problem in problems(kind, "test"):
        assert Problem(kind, problem.b, problem.a).is_held_out


def test_the_mirror_image_of_a_held_out_product_is_trained():
    held_out = list(problems("multiply", "test"))
    assert held_out
    assert not any(Problem("multiply", p.b, p.a).is_held_out for p in held_out)


def test_the_held_out_problems_stay_the_same_for_ever():
    assert [p.line for p in problems("multiply", "test")] == [
        "1 * 0 = 0",
        "4 * 3 = 12",
        "8 * 7 = 56",
    ]
    first = [p.line for p in problems("add", "test")][:4]
    assert first == ["0 + 18 = 18", "0 + 83 = 83", "0 + 84 = 84", "0 + 85 = 85"]


def test_larger_operands_keep_the_small_ones_split():
    small = {p.line for p in problems("add", "test", largest=20)}
    large = {p.line for p in problems("add", "test", largest=30)}
    assert small == {line for line in large if max(map(int, re.findall(r"\d+", line)[:2])) <= 20}
    rng = np.random.default_rng(0)
    assert max(sample(rng, "add", largest=999).a for _ in range(50)) > 99
    assert max(sample(rng, "multiply", largest=999).a for _ in range(50)) == 9


def test_the_same_seed_gives_the_same_lines():
    texts = [lines(np.random.default_rng(seed), 50) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0].splitlines()) == 50


def test_wrong_wishes_are_refused_with_what_is_possible():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"unknown kind 'divide'; choose from \('add', "):
        sample(rng, "divide")
    with pytest.raises(ValueError, match=r"unknown kind 'divide'; choose from \('add', "):
        Problem("divide", 6, 2)
    with pytest.raises(ValueError, match=r"unknown split 'valid'; choose from \('train', 'test'\)"):
        list(problems("add", "valid"))
    with pytest.raises(ValueError, match="largest 3 leaves too few problems: use 9 or more"):
        lines(rng, 5, largest=3)
