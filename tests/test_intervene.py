"""Changing: every advertised point can be changed, and the model goes on with the change."""

import re
import warnings

import pytest
import torch
from tiny import CONFIG, tiny
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import register_parametrization

import llama4_lab as l4
from llama4_lab import experts
from llama4_lab.points import NO_TAP

pytestmark = pytest.mark.usefixtures("no_grad")

POINTS = list(l4.points(CONFIG))


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


# --- nothing is silent -------------------------------------------------------------


@pytest.mark.parametrize("name", ["vision.out", "vision.layers.*.attn.z", "projector.out"])
def test_a_change_of_a_picture_that_is_not_there_is_told(model, prompt, name):
    sentence = f"the change of {re.escape(repr(name))} was never made: no forward pass inside the"
    with pytest.warns(UserWarning, match=sentence), l4.intervene(model, {name: other}):
        model(torch.arange(5, 17)[None])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with l4.intervene(model, {name: other, "*": torch.clone}):
            model(**prompt)
        with l4.intervene(model, {"*": torch.clone}):
            model(torch.arange(5, 17)[None])


def test_where_no_pass_came_to_its_end_there_is_no_warning(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with l4.intervene(model, {"embed": other}):
            pass
        with pytest.raises(KeyboardInterrupt), l4.intervene(model, {"embed": other}):
            raise KeyboardInterrupt


# --- every backend -----------------------------------------------------------------

OF_EXPERTS = ["router.logits", "router.indices", "router.scores", "shared.out"]
OF_EXPERTS += ["experts.in", "experts.hidden", "experts.out"]


@pytest.mark.parametrize("point", [None, *OF_EXPERTS])
def test_every_backend_shows_and_honours_what_the_readable_one_does(prompt, point):
    model, ids = tiny(), prompt["input_ids"]
    names = [f"layers.*.{name}" for name in ("resid_*", "router.*", "shared.out")]
    names += [f"layers.5.{name}" for name in OF_EXPERTS]  # inside the experts of this layer alone
    changes = {} if point is None else {f"layers.3.{point}": other}
    plain, found = {}, {}
    for model.backend in experts.BACKENDS:
        plain[model.backend] = model(ids)
        with l4.intervene(model, changes), l4.trace(model, names) as cache:
            found[model.backend] = {"logits": model(ids), **cache}
    for backend, values in found.items():
        assert values.keys() == found["loop"].keys()
        for name, value in values.items():
            torch.testing.assert_close(value, found["loop"][name], atol=1e-4, rtol=1e-5)
        difference = (values["logits"] - plain[backend]).abs().max()
        assert difference < 1e-5 if point is None else difference > 1e-4


@pytest.mark.parametrize("backend", experts.BACKENDS)
def test_watching_experts_leaves_the_logits_of_every_backend_as_they_are(prompt, backend):
    model = tiny()
    model.backend = backend
    plain = model(**prompt)
    names = [f"layers.*.{part}" for part in ("router.*", "shared.out", "resid_*", "experts.*")]
    with l4.trace(model, names):
        assert torch.equal(model(**prompt), plain)
    with l4.intervene(model, dict.fromkeys(names, lambda value: value)):
        assert torch.equal(model(**prompt), plain)


# ---- gradients of what is changed


@pytest.fixture
def frozen():
    model = tiny(num_hidden_layers=3, vision_config=None)
    with torch.enable_grad():
        yield model.requires_grad_(False)


BACKENDS = ["auto", *(name for name in experts.BACKENDS if name != "triton")]
TOKENS = torch.arange(4, 24)[None]
INSIDE = ["experts.in", "experts.hidden", "experts.out"]


def gradient(model, point, backend, change):
    """Return that of a logit with respect to what `change` mixes into a value."""
    model.backend = backend
    with torch.no_grad(), l4.trace(model, point) as cache:
        model(TOKENS)
    mixed = torch.zeros_like(cache[point], requires_grad=True)
    with l4.intervene(model, {point: lambda value: change(value, mixed)}):
        logits = model(TOKENS)
    return torch.autograd.grad(logits[0, -1, 5], mixed)[0]


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("name", ["router.logits", "router.scores", "shared.out", *INSIDE])
def test_a_change_has_the_same_gradient_in_every_backend(frozen, name, backend):
    """Also one that changes nothing yet, which is where attribution begins."""
    for change in (lambda value, mixed: value * 1.5 + mixed, lambda value, mixed: value + mixed):
        expected = gradient(frozen, f"layers.1.{name}", "loop", change)
        assert expected.abs().max() > 1e-4
        found = gradient(frozen, f"layers.1.{name}", backend, change)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("name", ["router.logits", "router.scores", "shared.out", *INSIDE])
def test_what_is_kept_with_its_graph_is_part_of_it(name, backend):
    model = tiny(num_hidden_layers=3, vision_config=None)
    model.backend, point = backend, f"layers.1.{name}"
    with torch.enable_grad():
        with l4.trace(model, point, detach=False) as cache:
            logits = model(TOKENS)
        (found,) = torch.autograd.grad(logits[0, -1, 5], cache[point])
        expected = gradient(model, point, "loop", lambda value, mixed: value + mixed)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_derivatives_forward_are_whole(frozen):
    tangent = torch.randn(1, TOKENS.shape[1], frozen.config.hidden_size)

    def derivative(backend):
        frozen.backend = backend
        with (
            sdpa_kernel(SDPBackend.MATH),
            forward_ad.dual_level(),
            l4.intervene(frozen, {"embed": lambda value: forward_ad.make_dual(value, tangent)}),
        ):
            return forward_ad.unpack_dual(frozen(TOKENS)).tangent

    torch.testing.assert_close(derivative("numba"), derivative("loop"), atol=1e-4, rtol=1e-4)


def test_parts_of_a_block_that_are_not_called_say_so(frozen):
    shared = frozen.layers[1].feed_forward.shared_expert
    handle = shared.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="a hook on shared_expert of a MoE block is not called"):
        frozen(TOKENS)
    handle.remove()
    shared.down_proj.bias = torch.nn.Parameter(torch.ones(frozen.config.hidden_size))
    with pytest.raises(ValueError, match=r"shared_expert\.down_proj of a MoE block has a bias"):
        frozen(TOKENS)


class Adapted(torch.nn.Module):
    """A linear layer with something beside it, as adapters of low rank are."""

    def __init__(self, base):
        super().__init__()
        self.weight = base.weight

    def forward(self, x):
        return x @ self.weight.T + 1


def test_a_part_of_a_block_whose_own_forward_would_not_be_called_is_refused(frozen):
    shared = frozen.layers[1].feed_forward.shared_expert
    plain, shared.gate_proj = shared.gate_proj, Adapted(shared.gate_proj)
    with pytest.raises(
        ValueError, match=r"shared_expert\.gate_proj of a MoE block has a forward of"
    ):
        frozen(TOKENS)
    shared.gate_proj, shared.forward = plain, torch.zeros_like
    with pytest.raises(ValueError, match=r"shared_expert of a MoE block has a forward of its own"):
        frozen(TOKENS)
    del shared.forward
    before = frozen(TOKENS)
    register_parametrization(plain, "weight", torch.nn.Tanh())
    assert not torch.equal(frozen(TOKENS), before)


def test_a_hook_on_attention_says_that_it_is_not_called(frozen):
    attention = frozen.layers[1].self_attn
    handle = attention.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="a hook on self_attn, .* is not called: the layer calls"):
        frozen(TOKENS)
    handle.remove()
    attention.forward = torch.zeros_like
    with pytest.warns(UserWarning, match="use llama4_lab.trace or intervene, or a hook on the lay"):
        frozen(TOKENS)


def test_a_trace_sees_the_last_change_and_last_blocks_nest(model, prompt):
    name, seen = "layers.3.resid_mid", []

    def change(factor):
        return {name: lambda value: seen.append(factor) or factor * value}

    with l4.trace(model, name) as plain:
        model(**prompt)
    with (
        l4.intervene(model, change(3)),
        l4.trace(model, name) as outside,
        l4.intervene(model, change(5), last=True),
        l4.intervene(model, change(7), last=True),
        l4.intervene(model, change(2)),
        l4.trace(model, name) as inside,
    ):
        model(**prompt)
    assert seen == [2, 3, 5, 7]
    for cache in (outside, inside):
        torch.testing.assert_close(cache[name], 210 * plain[name])
    assert model.tap is NO_TAP
