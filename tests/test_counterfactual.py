"""Counterfactual routing: one shared set of passes says what separate whole runs say."""

import dataclasses

import numpy as np
import pytest
import torch
from test_edits import some_prompt
from tiny import CONFIG, tiny

import llama4_lab as l4
from llama4_lab.analysis.counterfactual import counterfactual


@pytest.fixture(scope="module")
def model():
    return tiny(num_experts_per_tok=1)


@pytest.fixture(scope="module")
def replay(model):
    return l4.Replay(model, some_prompt(0))


@pytest.mark.parametrize("gate", ["own", "winner", "one"])
@pytest.mark.parametrize(("token", "read"), [(-1, -1), (13, -1), (13, 20)])
@torch.no_grad()
def test_a_map_equals_separate_forced_runs(model, replay, gate, token, read):
    found = counterfactual(replay, token, gate=gate, read=read)
    assert found.layers == (1, 3, 5)
    assert (found.token, found.read, found.gate) == (token % 29, read % 29, gate)
    for layer, chosen in zip(found.layers, found.chosen, strict=True):
        assert chosen.tolist() == replay.experts[layer][token].tolist()
    clean = model(**some_prompt(0))[0, read].double().log_softmax(-1)
    for row, layer in enumerate(found.layers):
        for expert in range(CONFIG.num_local_experts):
            edit = l4.edits.Route(layer, token % 29, expert, gate)
            with l4.edits.edited(model, [edit]):
                expected = model(**some_prompt(0))[0, read].double().log_softmax(-1)
            np.testing.assert_allclose(found.logprobs[row, expert], expected, atol=1e-5, rtol=0)
            kl = float((clean.exp() * (clean - expected)).sum())
            assert found.kl[row, expert] == pytest.approx(kl, abs=1e-5)
            assert found.top[row, expert] == int(expected.argmax())
            assert found.change(7)[row, expert] == pytest.approx(
                float(expected[7] - clean[7]), abs=2e-5
            )


def test_sending_a_token_where_it_goes_anyway_changes_nothing(replay):
    found = counterfactual(replay, -1)
    assert found.is_choice.sum(axis=1).tolist() == [1, 1, 1]
    assert found.kl[found.is_choice].max() < 1e-6
    assert found.kl[~found.is_choice].min() > 1e-6
    assert (found.chosen[:, 0] == found.is_choice.argmax(axis=1)).all()


@pytest.mark.parametrize(
    ("token", "read", "sentence"),
    [
        (29, -1, r"token 29 is out of range: this prompt has 29 tokens \(0 to 28\)"),
        (13, 12, "position 12 comes before token 13 and cannot change with it"),
    ],
)
def test_positions_that_make_no_sense_are_refused(replay, token, read, sentence):
    with pytest.raises(ValueError, match=sentence):
        counterfactual(replay, token, read=read)


def test_a_model_that_routes_nothing_is_refused():
    dense = l4.Replay(tiny(moe_layers=()), {"input_ids": torch.arange(4, 9)[None]})
    with pytest.raises(ValueError, match="this model routes nothing: all its 6 layers are dense"):
        counterfactual(dense, 0)


def test_a_map_tells_its_progress_and_can_be_stopped(model, replay):
    heard = []
    counterfactual(replay, -1, on_run=lambda done, count: heard.append((done, count)))
    count = 3 * CONFIG.num_local_experts
    assert heard == [(i, count) for i in range(1, count + 1)]

    class Stopped(Exception):
        pass

    def stop(done, count):
        raise Stopped

    before = model(**some_prompt(0))
    with pytest.raises(Stopped):
        counterfactual(replay, -1, on_run=stop)
    assert torch.equal(model(**some_prompt(0)), before)


def test_words_that_the_clean_run_cannot_say_add_nothing_to_a_distance(replay):
    found = counterfactual(replay, 3)
    clean, logprobs = found.clean.copy(), found.logprobs.copy()
    clean[7] = logprobs[0, :, 7] = -np.inf  # both cannot say it; then only the clean run
    given = dataclasses.replace(found, clean=clean, logprobs=logprobs)
    p, others = np.exp(clean), np.arange(len(clean)) != 7
    expected = (p * (clean - logprobs))[..., others].sum(-1)
    np.testing.assert_allclose(given.kl, expected.clip(min=0), atol=1e-5)
