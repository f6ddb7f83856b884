"""What a card counts as right, on models whose answers are known."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny import CONFIG

import llama4_lab as l4
from llama4_lab.checkpoint.shipped import MODELS
from llama4_lab.prompt import Tokenizer
from llama4_lab.train import behaviour, needles, scenes
from llama4_lab.train.rows import shifted


class Oracle(l4.Llama4):
    """Stands for a model of a vocabulary of `size`: says that the next token is one more."""

    def __init__(self, size):
        torch.nn.Module.__init__(self)
        self.config, self.size = CONFIG, size
        self.lm_head = torch.nn.Identity()

    def hidden(self, inputs, pixel_values=None):
        return torch.nn.functional.one_hot((inputs + 1) % self.size, self.size).float()


def count_up(*starts, length=5):
    """Rows that count up: the oracle knows them all."""
    return [shifted(np.arange(start, start + length)[None]) for start in starts]


def test_an_answer_is_right_if_every_scored_token_is_the_likeliest():
    rows = count_up(3, 10, 20, length=5) + count_up(30, length=9)
    rows[1] = dataclasses.replace(rows[1], targets=torch.tensor([[11, 12, 0, 14]]))
    model = Oracle(50)
    assert behaviour.right_answers(model, rows, 2).tolist() == [True, False, True, True]
    rows[1].weights[0, 2] = 0
    assert behaviour.right_answers(model, rows, 2).tolist() == [True] * 4


@pytest.fixture(scope="module")
def model():
    """Random weights that read mini's tokens and see only their own chunk in RoPE layers."""
    tokenizer = Tokenizer.from_folder(MODELS / "mini")
    config = CONFIG.replace(
        vision_config=None,
        vocab_size=tokenizer.vocab_size,
        attention_chunk_size=64,
        pad_token_id=tokenizer.pad_id,
    )
    model = l4.random(config).eval()
    model.tokenizer = tokenizer
    return model


def test_recall_is_measured_with_other_chunks_too(model, monkeypatch):
    chunks, seen = list(model.chunks), []

    def recall(model, *_):
        seen.append(list(model.chunks))
        return {"here": float(len(seen))}

    monkeypatch.setattr(behaviour, "recall", recall)
    found = behaviour.recalls(model, needles.scatter(range(300, 1000)), 6)
    assert found == {
        "here": {"as trained": 1, "NoPE layers see one chunk": 2, "RoPE layers see all": 3}
    }
    assert seen == [chunks, [64] * len(chunks), [None] * len(chunks)]
    assert model.chunks == chunks and set(chunks) == {64, None}


def test_recall_counts_answers_by_distance(model, monkeypatch):
    monkeypatch.setattr(behaviour, "DISTANCES", ((1, 200), (201, 300)))
    hay = needles.scatter(range(300, 1000))
    monkeypatch.setattr(
        behaviour, "is_likeliest", lambda model, rows: torch.ones_like(rows.inputs, dtype=bool)
    )
    assert behaviour.recall(model, hay, 6, 128) == {"same chunk": 1, "1 to 200": 1, "201 to 300": 1}

    def knows_near(model, rows):
        assert rows.weights.sum() == 12  # three answers of three digits and a full stop
        return torch.full(rows.inputs.shape, rows.inputs.shape[1] < 350)

    monkeypatch.setattr(behaviour, "is_likeliest", knows_near)
    assert behaviour.recall(model, hay, 6, 128)["201 to 300"] == 0
    assert behaviour.recall(model, hay, 6, 128)["1 to 200"] == 1


def test_painting_out_is_told_from_keeping(model, monkeypatch):
    """With a model that knows the pictures, answers change and stay exactly as they should."""

    def asked(model, material, examples, answers=None):
        answers = answers or [example.answer for example in examples]
        pairs = zip(examples, answers, strict=True)
        return np.array([example.answer == said for example, said in pairs])

    monkeypatch.setattr(behaviour, "asked", asked)
    found = behaviour.seeing(model, 12)
    assert set(found) == {*scenes.TASKS, "two tiles", "four tiles"}
    for task, row in found.items():
        assert set(row.values()) == {1.0}, task
    assert set(found["colour"]) == {"right", "changed", "kept"}


def test_only_answers_that_were_right_can_change(model, monkeypatch):
    """A model that is right about every second question, and says nothing of changed pictures."""
    shown = []

    def asked(model, material, examples, answers=None):
        shown.append((len(examples), answers is None))
        return (
            np.arange(len(examples)) % 2 == 0 if answers is None else np.zeros(len(examples), bool)
        )

    monkeypatch.setattr(behaviour, "asked", asked)
    row = behaviour.seeing(model, 12)["colour"]
    assert row == {"right": 0.5, "changed": 1.0, "kept": 0.0}
    monkeypatch.setattr(
        behaviour, "asked", lambda model, material, examples, answers=None: np.zeros(len(examples))
    )
    assert behaviour.seeing(model, 12)["colour"] == {"right": 0.0, "kept": 0.0}


def test_loss_by_position_averages_between_edges():
    class Uneven(Oracle):
        def forward(self, ids):
            logits = torch.zeros(*ids.shape, self.size)
            logits[:, 3:, 0] = -1e9  # one token fewer is possible from position 4 on
            return logits

    ids = torch.full((2, 9), 5)
    first, second = behaviour.loss_by_position(Uneven(8), ids, (0, 3, 8))
    assert (first, second) == pytest.approx((np.log(8), np.log(7)))


def test_a_text_is_recited_where_the_model_knows_every_word():
    counting = np.arange(400) % 50
    assert behaviour.recited(Oracle(50), counting, 20) == 1
    counting[::60] += 1  # no span of 100 tokens is without a surprise, some second halves are
    assert 0 < behaviour.recited(Oracle(50), counting, 40) < 0.5
    assert behaviour.recited(Oracle(200), np.arange(100), 4) == 1
    with pytest.raises(ValueError, match="text of 99 tokens is too short to recite 50 after 50"):
        behaviour.recited(Oracle(200), np.arange(99), 4)
