"""Rounded weights against their formulas, and what they do to a run against plain runs."""

import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny

import llama4_lab as l4
from llama4_lab.analysis.quantisation import (
    GROUP,
    KINDS,
    quantisation,
    round_weight,
    rounded,
    swapped,
)


def batches(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(4, 80, size, generator=draw) for size in sizes]


def state(model: l4.Llama4) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: l4.Llama4, before: dict[str, torch.Tensor]) -> set[str]:
    return {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}


def test_int8_errs_by_half_a_step_of_its_row_at_most():
    weight = torch.randn(3, 7, 50) * torch.logspace(-3, 2, 7)[:, None]
    step = weight.abs().amax(-1, keepdim=True) / 127
    whole = round_weight(weight, "int8") / step
    assert ((round_weight(weight, "int8") - weight).abs() <= step / 2 * (1 + 1e-5)).all()
    torch.testing.assert_close(whole, whole.round(), atol=1e-4, rtol=0)
    assert whole.abs().amax(-1) == pytest.approx(127, abs=1e-3)


def test_int4_errs_by_half_a_step_of_its_group_at_most():
    weight = torch.randn(7, 2 * GROUP + 5) * torch.logspace(-3, 2, 2 * GROUP + 5)
    mine = round_weight(weight, "int4")
    assert mine.shape == weight.shape
    for part, old in zip(mine.split(GROUP, -1), weight.split(GROUP, -1), strict=True):
        step = old.abs().amax(-1, keepdim=True) / 7
        assert ((part - old).abs() <= step / 2 * (1 + 1e-5)).all()
        assert set((part / step).round().flatten().tolist()) <= set(range(-7, 8))


def test_ternary_weights_are_minus_the_mean_size_zero_or_it():
    weight = torch.randn(3, 7, 50) * torch.tensor([0.1, 1.0, 10.0])[:, None, None]
    mine = round_weight(weight, "ternary")
    for each, old in zip(mine, weight, strict=True):
        size = old.abs().sum() / old.numel()
        expected = torch.where(old.abs() > size / 2, size * old.sign(), 0.0)
        torch.testing.assert_close(each, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_a_format_stay_as_they_are(kind):
    zero = torch.zeros(2, 3, 40)
    assert torch.equal(round_weight(zero, kind), zero)
    signs = torch.randn(5, 40).sign() * 0.25
    torch.testing.assert_close(round_weight(signs, kind), signs)
    assert round_weight(signs.bfloat16(), kind).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("layer", "parts", "names"),
    [
        (1, ["router"], ["router.weight"]),
        (1, ["experts"], ["experts.gate_up_proj", "experts.down_proj"]),
        (1, ["shared"], [f"shared_expert.{x}_proj.weight" for x in ("gate", "up", "down")]),
        (2, ["mlp"], [f"{x}_proj.weight" for x in ("gate", "up", "down")]),
        (2, ["attention"], []),
    ],
)
def test_only_the_parts_that_were_named_are_rounded(layer, parts, names):
    model = tiny()
    before = state(model)
    expected = {f"layers.{layer}.feed_forward.{name}" for name in names}
    if parts == ["attention"]:
        expected = {f"layers.{layer}.self_attn.{x}_proj.weight" for x in "qkvo"}
    with rounded(model, layer, "int4", parts):
        assert changed(model, before) == expected
        for name in expected:
            assert torch.equal(model.state_dict()[name], round_weight(before[name], "int4"))
    assert not changed(model, before)


def test_without_parts_every_matrix_of_the_layer_is_rounded_and_no_norm_or_bias():
    model = tiny(attention_bias=True)
    for bias in (p for name, p in model.named_parameters() if name.endswith("bias")):
        torch.nn.init.normal_(bias)
    before = state(model)
    with rounded(model, 3, "ternary"):
        here = {name for name, value in before.items() if name.startswith("layers.3.")}
        assert changed(model, before) == {name for name in here if before[name].ndim > 1}


def test_rounding_nests_and_ends_with_an_exception():
    model = tiny()
    parameters, before = dict(model.named_parameters()), state(model)
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117
        with torch.inference_mode(), rounded(model, 1, "int8"), rounded(model, 1, "ternary"):
            raise KeyboardInterrupt
    assert not changed(model, before)
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_a_swap_that_fails_half_way_is_undone():
    model = tiny()
    before, weight = state(model), torch.zeros(97, 48)
    with (
        pytest.raises(AttributeError),
        swapped({(model, "lm_head.weight"): weight, (model, "x"): weight}),
    ):
        pass
    assert not changed(model, before)


def test_a_weight_that_is_swapped_under_two_names_comes_back():
    model = tiny()
    parameter, zero = model.lm_head.weight, torch.zeros(97, 48)
    with swapped({(model, "lm_head.weight"): zero, (model.lm_head, "weight"): zero + 1}):
        assert (model.lm_head.weight == 1).all()
    assert model.lm_head.weight is parameter


@torch.no_grad()
def test_each_run_is_compared_with_the_clean_one():
    model, given = tiny(), batches((2, 9), (1, 13))
    before = state(model)
    found = quantisation(model, given, "ternary", layers=[1, 2, 5])
    assert not changed(model, before)
    assert (found.kind, found.layers, found.routers) == ("ternary", (1, 2, 5), (1, 3, 5))

    def runs(of: l4.Llama4) -> tuple[torch.Tensor, torch.Tensor, list[list[set[int]]]]:
        logprobs, losses = [], []
        chosen: list[list[set[int]]] = [[], [], []]
        for row in (row for ids in given for row in ids):
            with l4.trace(of, "layers.*.router.indices") as cache:
                logits = of(row[None, :-1])[0].double()
            losses.append(F.cross_entropy(logits, row[1:], reduction="none"))
            logprobs.append(logits.log_softmax(-1))
            for i, layer in enumerate(found.routers):
                chosen[i] += map(set, cache[f"layers.{layer}.router.indices"][0].tolist())
        return torch.cat(logprobs), torch.cat(losses), chosen

    clean, clean_loss, clean_chosen = runs(model)
    assert found.loss == pytest.approx(clean_loss.mean().item(), rel=1e-5)
    for row, layer in enumerate(found.layers):
        other = copy.deepcopy(model)
        for weight in other.layers[layer].parameters():
            if weight.ndim > 1:
                weight.copy_(round_weight(weight, "ternary"))
        logprobs, loss, chosen = runs(other)
        kl = (clean.exp() * (clean - logprobs)).sum(-1).mean().item()
        assert found.kl[row] == pytest.approx(kl, rel=1e-4)
        assert found.change[row] == pytest.approx((loss - clean_loss).mean().item(), abs=1e-5)
        flips = [
            np.mean([a != b for a, b in zip(mine, theirs, strict=True)])
            for mine, theirs in zip(chosen, clean_chosen, strict=True)
        ]
        np.testing.assert_allclose(found.flips[row], flips)
    assert found.flips[0].all()  # all three routers come after, or in, layer 1
    assert not found.flips[1, 0] and not found.flips[2, :2].any()


def test_finer_formats_do_less():
    found = [quantisation(tiny(), batches((2, 9)), kind, layers=[1, 2]).kl for kind in KINDS]
    assert (found[0] < found[1]).all() and (found[1] < found[2]).all()


def test_layers_that_have_the_parts_are_taken_unless_named():
    model, given = tiny(), batches((1, 6))
    assert quantisation(model, given, "int8").layers == (0, 1, 2, 3, 4, 5)
    assert quantisation(model, given, "int8", ["experts"]).layers == (1, 3, 5)
    assert quantisation(model, given, "int8", ["attention", "mlp"]).layers == (0, 2, 4)
    assert quantisation(model, given, "int8", layers=[4]).layers == (4,)


def test_a_model_without_experts_has_no_flips():
    found = quantisation(tiny(interleave_moe_layer_step=0), batches((2, 6)), "ternary")
    assert found.routers == () and found.flips.shape == (6, 0)
    assert (found.kl > 0).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kind": "int3"}, "unknown kind 'int3': weights can be int8, int4, ternary"),
        (
            {"parts": ["experts"], "layers": [2]},
            "layer 2 is a dense layer and has no part 'experts': choose from attention, mlp",
        ),
        (
            {"parts": ["mlp"], "layers": [1]},
            "layer 1 is a MoE layer and has no part 'mlp': choose from attention, router, experts, "
            "shared",
        ),
        ({"layers": [6]}, "layer 6 is out of range: this model has 6 layers (0 to 5)"),
        (
            {"parts": ["expert"]},
            "layer 0 is a dense layer and has no part 'expert': choose from attention, mlp",
        ),
    ],
)
def test_errors_say_what_can_be_rounded(options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        quantisation(tiny(), batches((1, 6)), **({"kind": "int8"} | options))
    with pytest.raises(ValueError, match="unknown kind 'fp3'"), rounded(tiny(), 1, "fp3"):
        pass


def test_batches_without_a_next_token_are_refused():
    sentence = "batches of shapes (2, 4), (3, 1): each needs a row of two tokens or more"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        quantisation(tiny(), batches((2, 4), (3, 1)), "int8")
    with pytest.raises(ValueError, match="batches of shapes none"):
        quantisation(tiny(), [], "int8")


def test_no_parts_are_none_of_them():
    model = tiny()
    before = state(model)
    with rounded(model, 1, "ternary", ()):
        assert changed(model, before) == set()


def test_the_weights_of_a_divided_model_are_not_taken_for_the_whole(monkeypatch):
    model = tiny()
    monkeypatch.setattr(model, "ranks", SimpleNamespace(size=2))
    sentence = "rounding reads weights, of which this rank holds one part of 2: load the model"
    with pytest.raises(ValueError, match=sentence):
        quantisation(model, batches((1, 5)), "int8")
    with pytest.raises(ValueError, match=sentence), rounded(model, 1, "int8"):
        pass
