"""Activation patching: grids equal separate patched runs, and planted differences are found."""

import numpy as np
import pytest
import torch
from test_edits import some_prompt
from tiny import CONFIG, tiny

import llama4_lab as l4
from llama4_lab.analysis.patching import logit_difference, patch_heads, patch_positions

METRIC = logit_difference(7, 8)


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def prompts():
    clean = some_prompt(0)
    ids = clean["input_ids"].clone()
    ids[0, 14] = 5 if ids[0, 14] != 5 else 6
    return clean, {**clean, "input_ids": ids}


@torch.no_grad()
def test_a_grid_equals_separate_patched_runs(model, prompts):
    clean, corrupted = prompts
    found = patch_positions(model, clean, corrupted, METRIC, part="resid_mid", tokens=(14, 20, 28))
    assert found.metric.shape == (6, 3)
    assert found.clean == pytest.approx(float(METRIC(model(**clean)[0, -1])), abs=1e-5)
    assert found.corrupted == pytest.approx(float(METRIC(model(**corrupted)[0, -1])), abs=1e-5)
    for layer in range(6):
        name = f"layers.{layer}.resid_mid"
        with l4.trace(model, name) as cache:
            model(**clean)
        for column, token in enumerate(found.columns):

            def put(value, token=token, there=cache[name]):
                value = value.clone()
                value[:, token] = there[:, token]
                return value

            with l4.intervene(model, {name: put}):
                expected = float(METRIC(model(**corrupted)[0, -1]))
            assert found.metric[layer, column] == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_bfloat16_logits_are_subtracted_exactly(prompts):
    model = tiny().bfloat16()
    runs = {name: l4.Replay(model, prompt) for name, prompt in zip("ab", prompts, strict=True)}
    logits = runs["a"].logits[-1]
    right, wrong = int(logits.argmax()), int(logits.argmin())
    exact = [float(run.logits[-1, right]) - float(run.logits[-1, wrong]) for run in runs.values()]
    found = patch_positions(model, *prompts, logit_difference(right, wrong), tokens=(14,))
    assert [found.clean, found.corrupted] == exact
    assert found.metric[0, 0] == exact[0]  # all that differs was put back


def test_nothing_to_patch_is_refused(model, prompts):
    with pytest.raises(ValueError, match="no tokens were given: name one at least"):
        patch_positions(model, *prompts, METRIC, tokens=())
    with pytest.raises(ValueError, match="no tokens were given: name one at least"):
        patch_heads(model, *prompts, METRIC, tokens=())


def test_what_differs_is_carried_by_its_own_token_first_and_the_last_one_at_the_end(model, prompts):
    first = patch_positions(model, *prompts, METRIC).restored
    assert first.shape == (CONFIG.num_hidden_layers, 29)
    assert first[0, 14] == pytest.approx(1.0, abs=1e-3)
    np.testing.assert_allclose(first[:, :14], 0.0, atol=1e-3)  # nothing before it differs
    last = patch_positions(model, *prompts, METRIC, part="resid_post", tokens=(28,)).restored
    assert last[-1, 0] == pytest.approx(1.0, abs=1e-3)


@torch.no_grad()
def test_heads_are_patched_at_all_positions_or_at_some(model, prompts):
    clean, corrupted = prompts
    found = patch_heads(model, clean, corrupted, METRIC)
    assert found.columns == tuple(range(6))
    for layer, head in ((0, 0), (3, 4), (5, 1)):
        edit = l4.edits.Patch(f"layers.{layer}.attn.z", "clean", head=head)
        with l4.edits.edited(model, [edit], {"clean": clean}):
            expected = float(METRIC(model(**corrupted)[0, -1]))
        assert found.metric[layer, head] == pytest.approx(expected, abs=1e-5)
    before = patch_heads(model, clean, corrupted, METRIC, tokens=(2,))
    np.testing.assert_allclose(before.restored, 0.0, atol=1e-3)


def test_prompts_that_do_not_fit_are_refused(model, prompts):
    clean, corrupted = prompts
    with pytest.raises(ValueError, match="the clean prompt has 5 tokens and the corrupted one 29"):
        patch_heads(model, torch.arange(5, 10)[None], corrupted, METRIC)
    with pytest.raises(ValueError, match="in both runs, so there is nothing to restore"):
        patch_heads(model, clean, clean, METRIC)
