"""Changing: every advertised point can be changed, and the model goes on with the change."""

import pytest
import torch
from tiny import CONFIG, tiny

import llama4_lab as l4
from llama4_lab.points import NO_TAP

POINTS = list(l4.points(CONFIG))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def prompt():
    ids = torch.randint(4, 89, (2, 29), generator=torch.Generator().manual_seed(0))
    ids[:, 3:12] = CONFIG.image_token_index
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 24, 24)}


def other(value):
    """A value that is different everywhere and still possible."""
    if not value.is_floating_point():
        return (value + 1) % CONFIG.num_local_experts
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    return value + noise  # scores of -inf stay forbidden


@pytest.mark.parametrize("name", POINTS)
def test_a_change_at_every_point_moves_the_logits(model, prompt, name):
    with l4.trace(model, name):
        plain = model(**prompt)
    with l4.intervene(model, {name: other}):
        changed = model(**prompt)
    assert (changed - plain).abs().max() > 1e-4
    assert torch.isfinite(changed).all()


@pytest.mark.parametrize("name", POINTS)
def test_a_change_that_changes_nothing_leaves_logits_bit_identical(model, prompt, name):
    with l4.trace(model, name):
        plain = model(**prompt)
    with l4.intervene(model, {name: lambda value: value.clone()}):
        assert torch.equal(model(**prompt), plain)


def test_a_trace_sees_what_the_model_goes_on_with_however_the_blocks_nest(model, prompt):
    name = "layers.3.resid_mid"
    double = {name: lambda value: 2 * value}
    with l4.trace(model, name) as plain:
        model(**prompt)
    with l4.trace(model, name) as outside, l4.intervene(model, double):
        model(**prompt)
    with l4.intervene(model, double), l4.trace(model, name) as inside:
        model(**prompt)
    for cache in (outside, inside):
        assert torch.equal(cache[name], 2 * plain[name])


def test_nested_changes_apply_from_the_inside_out_and_patterns_reach_many_points(model, prompt):
    seen = []
    with (
        l4.intervene(model, {"layers.*.resid_post": lambda x: seen.append("outer") or x}),
        l4.intervene(model, {"layers.0.*post": lambda x: seen.append("inner") or x}),
    ):
        model(**prompt)
    assert seen == ["inner"] + ["outer"] * CONFIG.num_hidden_layers


def test_nothing_stays_behind_after_an_exception(model, prompt):
    plain = model(**prompt)

    def fail(value):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), l4.intervene(model, {"layers.2.mlp.out": fail}):
        model(**prompt)
    assert model.tap is NO_TAP
    assert torch.equal(model(**prompt), plain)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (lambda x: None, TypeError, "returned NoneType: return the tensor that the model is to go"),
        (lambda x: x[:, 1:], ValueError, r"returned shape \(2, 28, 48\) where \(2, 29, 48\) is"),
        (lambda x: x.double(), ValueError, "returned dtype torch.float64 where torch.float32 is"),
    ],
)
def test_a_change_that_does_not_fit_is_refused(model, prompt, change, error, sentence):
    with (
        pytest.raises(error, match=f"the change of 'layers.2.mlp.out' {sentence}"),
        l4.intervene(model, {"layers.2.mlp.out": change}),
    ):
        model(**prompt)


def test_a_point_that_does_not_exist_is_refused_before_anything_runs(model):
    with (
        pytest.raises(KeyError, match="layer 2 is a dense layer; MoE layers are 1, 3, 5"),
        l4.intervene(model, {"layers.2.router.logits": other}),
    ):
        pass
    assert model.tap is NO_TAP
