"""Echoes and needles: distances, chunks, weights and hay are what was asked for."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from llama4_lab.train.needles import (
    KEYS,
    Fact,
    Form,
    echo,
    passages,
    plant,
    scatter,
    token_facts,
    word_facts,
)

CHUNK = 128
HAY = scatter(range(500, 900))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def words():
    """A word-level tokenizer that splits digits, as the shipped one does, and a text."""
    ids, texts = {}, []

    def encode(text):
        pieces = re.findall(r" ?[A-Za-z]+|\d| |[^\w\s]", text)
        assert "".join(pieces) == text
        for piece in pieces:
            if piece not in ids:
                ids[piece] = len(ids)
                texts.append(piece)
        return [ids[piece] for piece in pieces]

    def decode(tokens):
        return "".join(texts[token] for token in tokens)

    text = encode(" The cat sat on a mat. It saw the sea, and slept. Rain fell." * 150)
    ends = [i + 1 for i, token in enumerate(text) if token == ids["."]]
    return SimpleNamespace(encode=encode, decode=decode, text=text, ends=ends)


def test_an_echo_repeats_distinct_tokens_with_one_period(rng):
    tokens, weights = echo(rng, range(7, 71), rows=8, length=200, period=37, prefix=[3])
    assert tokens.shape == weights.shape == (8, 200)
    assert (tokens[:, 0] == 3).all()
    np.testing.assert_array_equal(tokens[:, 38:], tokens[:, 1:-37])
    assert all(len(set(row)) == 37 for row in tokens[:, 1:38].tolist())
    assert set(tokens[:, 1:].flat) <= set(range(7, 71))
    assert len({tuple(row) for row in tokens.tolist()}) == 8


def test_an_echo_weighs_just_what_can_be_known(rng):
    tokens, weights = echo(rng, range(64), rows=4, length=100, period=10)
    for row, weight in zip(tokens.tolist(), weights, strict=True):
        known = [i > 0 and row[i - 1] in row[: i - 1] for i in range(100)]
        np.testing.assert_array_equal(weight, np.array(known, np.float32))


def check(row, facts, asked, length):
    """Everything that must hold for any planted row."""
    tokens = row.tokens.tolist()
    assert len(tokens) == len(row.weights) == length
    assert len(row.answers) == asked
    wanted = np.zeros(length)
    for fact, found in zip(facts, row.answers, strict=False):
        start = found.start - len(fact.asked)
        stop = start + len(fact.query)
        planted = found.planted - len(fact.said)
        assert tuple(tokens[start:stop]) == fact.query
        assert tuple(tokens[planted : planted + len(fact.statement)]) == fact.statement
        assert tuple(tokens[found.start : found.stop]) == fact.value
        assert planted // CHUNK == (planted + len(fact.statement) - 1) // CHUNK
        assert start // CHUNK == (stop - 1) // CHUNK
        assert found.distance == found.start - found.planted
        assert (found.planted_chunk, found.query_chunk) == (planted // CHUNK, start // CHUNK)
        wanted[found.start : stop] = 1
    np.testing.assert_array_equal(row.weights, wanted)


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("length", [256, 300, 512])
def test_needles_lie_in_the_wanted_chunk(rng, across, length):
    for _ in range(50):
        facts = token_facts(rng, range(10, 40), range(40, 70), 4)
        row = plant(rng, facts, HAY, length, asked=4, across=across)
        check(row, facts, 4, length)
        assert [answer.is_across for answer in row.answers] == [across] * 4


@pytest.mark.parametrize("distance", [2, 40, 126, 128, 500, 1500, 2045])
def test_distances_are_exact(rng, distance):
    for _ in range(5):
        facts = token_facts(rng, range(10, 40), range(40, 70), 1)
        row = plant(rng, facts, HAY, 2048, distance=(distance, distance))
        check(row, facts, 1, 2048)
        [value] = facts[0].value
        first, second = np.flatnonzero(row.tokens == value)
        assert second - first == row.answers[0].distance == distance


def test_a_fact_moves_within_its_range_rather_than_straddle_two_chunks(rng):
    facts = token_facts(rng, range(10, 40), range(40, 70), 1)
    with pytest.raises(ValueError, match="no room for a fact at a distance of 127 to 127 tokens"):
        plant(rng, facts, HAY, 2048, distance=(127, 127))
    distances = {
        plant(rng, facts, HAY, 2048, distance=(126, 128)).answers[0].distance for _ in range(30)
    }
    assert distances == {126, 128}


def test_unasked_needles_are_hidden_too_and_each_once(rng):
    facts = token_facts(rng, range(10, 40), range(40, 70), 6)
    tokens = plant(rng, facts, HAY, 256, asked=2).tokens.tolist()
    for i, fact in enumerate(facts):
        assert tokens.count(fact.said[0]) == (2 if i < 2 else 1)
        where = tokens.index(fact.said[0])
        assert tokens[where + 1] == fact.value[0]


def test_keys_and_values_of_a_row_all_differ(rng, words):
    for facts in (
        token_facts(rng, range(10, 40), range(40, 70), 30),
        word_facts(rng, words.encode, 30),
    ):
        assert len({fact.said for fact in facts}) == len({fact.value for fact in facts}) == 30


@pytest.mark.parametrize("across", [True, False, None])
def test_needles_in_words_read_as_sentences_between_sentences(rng, words, across):
    fill = passages(words.text, words.ends)
    for _ in range(20):
        facts = word_facts(rng, words.encode, 3)
        row = plant(rng, facts, fill, 512, across=across, prefix=words.encode(" mat"))
        check(row, facts, 1, 512)
        text = words.decode(row.tokens.tolist())
        [answer] = row.answers
        code = words.decode(row.tokens[answer.start : answer.stop].tolist())
        sentences = re.findall(r"\. The code of (\w+) is (\d{3})(?=\.)", text)
        asked, said = sentences[-1]
        assert said == code
        assert (asked, said) in sentences[:-1]
        assert len(sentences) == 4


def test_the_pieces_of_a_needle_are_the_tokens_of_the_whole_sentence(rng, words):
    [fact] = word_facts(rng, words.encode, 1, digits=4)
    assert len(fact.value) == 4
    whole = words.encode(words.decode(fact.statement))
    assert list(fact.statement) == whole


def test_a_question_for_chat_is_asked_in_its_own_form(rng, words):
    form = Form(asked=" What is the code of {key}? It is ", ended="!")
    facts = word_facts(rng, words.encode, 1, form, keys=["moon"])
    row = plant(rng, facts, passages(words.text, words.ends), 128, across=False)
    check(row, facts, 1, 128)
    text = words.decode(row.tokens.tolist())
    code = words.decode(facts[0].value)
    assert text.endswith(f" What is the code of moon? It is {code}!")
    assert row.weights.sum() == 4  # three digits and the end


def test_hay_can_be_weighed_without_weighing_needles_or_prefix(rng):
    facts = token_facts(rng, range(10, 40), range(40, 70), 2)
    row = plant(rng, facts, HAY, 128, prefix=[3, 4], background=0.25)
    assert set(row.weights[row.tokens >= 500]) == {0.25}
    assert row.weights[row.tokens < 500].sum() == 1


def test_passages_are_pieces_of_the_text_that_stop_at_an_end(rng, words):
    fill = passages(words.text, words.ends)
    whole = words.decode(words.text)
    for count in (1, 7, 300):
        piece = words.decode(fill(rng, count).tolist())
        assert piece.endswith(".")
        assert piece in whole
    assert len(passages(words.text)(rng, len(words.text))) == len(words.text)


def test_the_same_seed_gives_the_same_row():
    rows = []
    for seed in (0, 0, 1):
        rng = np.random.default_rng(seed)
        facts = token_facts(rng, range(10, 40), range(40, 70), 4)
        rows.append(plant(rng, facts, HAY, 256).tokens.tolist())
    assert rows[0] == rows[1] != rows[2]


def test_the_keys_are_different_plain_words():
    assert len(set(KEYS)) == len(KEYS) >= 32
    assert all(re.fullmatch("[a-z]+", key) for key in KEYS)


def test_wrong_wishes_are_refused_with_what_is_possible(rng, words):
    facts = token_facts(rng, range(10, 40), range(40, 70), 2)
    with pytest.raises(ValueError, match="period 65 must be between 2 and the 64 tokens of the"):
        echo(rng, range(64), 1, 200, 65)
    with pytest.raises(
        ValueError,
        match="length 11 has no room for a repeat: 0 prefix tokens and period 10 need at least 12",
    ):
        echo(rng, range(64), 1, 11, 10)
    with pytest.raises(ValueError, match="31 facts need as many keys and values; only 30 given"):
        token_facts(rng, range(10, 40), range(40, 70), 31)
    with pytest.raises(ValueError, match="asked 3 must be between 1 and the 2 facts given"):
        plant(rng, facts, HAY, 256, asked=3)
    with pytest.raises(ValueError, match="2 queries do not fit into 3 tokens: use a longer row"):
        plant(rng, facts, HAY, 3, asked=2)
    with pytest.raises(
        ValueError,
        match="no room for a fact across chunks at a distance of 2 to 9 tokens in a row of 256 "
        "tokens with chunks of 128: change the length or the distance, or give fewer facts",
    ):
        plant(rng, facts, HAY, 256, across=True, distance=(2, 9))
    with pytest.raises(ValueError, match="no room for a fact in the query's chunk in a row of 130"):
        plant(rng, facts, HAY, 130, across=False)
    with pytest.raises(ValueError, match="no room for a fact in a row of 2 tokens with chunks of"):
        plant(rng, [Fact((1,), (2,), (), (1,))], HAY, 2)
    with pytest.raises(
        ValueError,
        match="the text of 3 tokens has no 4 tokens before an end: give a longer text or more ends",
    ):
        passages([1, 2, 3])(rng, 4)
    with pytest.raises(ValueError, match="ends 2 to 9 must lie within the text of 3 tokens"):
        passages([1, 2, 3], [2, 9])
