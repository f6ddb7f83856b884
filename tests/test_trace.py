"""Watching: every point exists, has its announced shape, and leaves the logits alone."""

import pytest
import torch
from tiny import CONFIG, VISION, tiny

import llama4_lab as l4


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def prompt():
    ids = torch.randint(4, 89, (2, 29), generator=torch.Generator().manual_seed(0))
    ids[:, 3:12] = CONFIG.image_token_index
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 24, 24)}


def test_every_point_exists_with_its_announced_axes(prompt):
    model = tiny()
    with l4.trace(model, "*") as cache:
        model(**prompt)
    names = l4.points(CONFIG)
    assert list(names) == sorted(cache, key=list(names).index)
    text = {"b": 2, "t": 29, "s": 29, "d": 48, "h": 6, "k": 2, "dh": 16, "e": 5, "topk": 2, "v": 97}
    vision = {"b": 2, "t": 37, "s": 37, "d": 24, "h": 2, "k": 2, "dh": 12, "f": 96, "p": 9}
    for name, axes in names.items():
        sizes = dict(vision if name.startswith(("vision", "projector")) else text)
        sizes |= {"vision.out": {"d": VISION.vision_output_dim}, "projector.out": {"d": 48}}.get(
            name, {}
        )
        if "f" in axes.split():
            sizes.setdefault("f", 56 if "mlp" in name else 40)
        assert cache[name].shape == tuple(sizes[axis] for axis in axes.split()), name


def test_watching_leaves_logits_bit_identical(prompt):
    model = tiny()
    plain = model(**prompt)
    exact = [name for name in l4.points(CONFIG) if not name.endswith(("scores", "pattern"))]
    exact = [name for name in exact if ".experts." not in name]
    with l4.trace(model, exact) as cache:
        assert torch.equal(model(**prompt), plain)
    assert torch.equal(cache["logits"], plain)
    with l4.trace(model, "layers.*.router.*"):
        assert torch.equal(model(**prompt), plain)
    with l4.trace(model, "*"):
        torch.testing.assert_close(model(**prompt), plain, atol=1e-5, rtol=0)


def test_patterns_are_the_attention_that_the_model_uses(prompt):
    model = tiny()
    with l4.trace(model, ["layers.*.attn.*"]) as cache:
        model(**prompt)
    for i in range(6):
        at = {
            name.split("attn.")[1]: value for name, value in cache.items() if f"layers.{i}." in name
        }
        torch.testing.assert_close(at["pattern"].sum(-1), torch.ones(2, 6, 29))
        torch.testing.assert_close(at["scores"].softmax(-1), at["pattern"])
        values = at["v"].repeat_interleave(3, dim=2)
        torch.testing.assert_close(torch.einsum("bhts,bshd->bthd", at["pattern"], values), at["z"])
        allowed = torch.ones(29, 29, dtype=torch.bool).tril()
        if CONFIG.uses_rope(i):
            chunk = torch.arange(29) // 8
            allowed &= chunk[:, None] == chunk
        assert torch.equal(at["pattern"][0, 0] > 0, allowed)


def test_patterns_with_padding_and_cache_equal_one_pass():
    model = tiny(attn_temperature_tuning=False, vision_config=None)
    ids = torch.randint(4, 89, (2, 29), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    plain = model(ids, attention_mask=mask)
    with l4.trace(model, "layers.*.attn.pattern") as whole:
        torch.testing.assert_close(
            model(ids, attention_mask=mask)[mask.bool()], plain[mask.bool()], atol=1e-5, rtol=0
        )
    patterns = dict(whole)
    cache = model.new_cache(2)
    model(ids[:, :13], attention_mask=mask[:, :13], cache=cache)
    with l4.trace(model, "layers.*.attn.pattern") as rest:
        logits = model(ids[:, 13:], attention_mask=mask, cache=cache)
    torch.testing.assert_close(logits, plain[:, 13:], atol=1e-5, rtol=0)
    for name, pattern in rest.items():
        width = pattern.shape[-1]
        torch.testing.assert_close(pattern, patterns[name][:, :, 13:, -width:], atol=1e-5, rtol=0)


def test_nothing_stays_behind_and_traces_nest(prompt):
    model = tiny()
    with l4.trace(model, "embed") as outer, l4.trace(model, "logits") as inner:
        model(**prompt)
    assert list(outer) == ["embed"]
    assert list(inner) == ["logits"]
    with pytest.raises(RuntimeError), l4.trace(model, "embed"):
        raise RuntimeError
    with l4.trace(model, "embed") as cache:
        pass
    model(**prompt)
    assert cache == {}


def test_values_keep_their_gradients_when_asked(prompt):
    model = tiny()
    with torch.enable_grad(), l4.trace(model, "layers.1.router.logits", detach=False) as cache:
        model(**prompt)
    assert cache["layers.1.router.logits"].requires_grad


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("layers.3.attn.patern", "did you mean 'layers.3.attn.pattern'"),
        ("layers.0.router.logits", "layer 0 is a dense layer; MoE layers are 1, 3, 5"),
        ("layers.1.mlp.out", "layer 1 is a MoE layer; dense layers are 0, 2, 4"),
        ("layers.9.attn.q", r"this model has 6 layers \(0 to 5\)"),
        ("nonsense*", "unknown point 'nonsense"),
    ],
)
def test_unknown_points_are_explained(name, sentence):
    with pytest.raises(KeyError, match=sentence), l4.trace(tiny(), name):
        pass


def test_a_text_model_has_no_vision_points():
    with (
        pytest.raises(KeyError, match="no vision encoder"),
        l4.trace(tiny(vision_config=None), "vision.out"),
    ):
        pass
