"""Experts and routing decisions as features: removed by hand, they leave the same prediction."""

import re
from itertools import combinations, permutations
from math import factorial

import numpy as np
import pytest
import torch
from small_tokenizer import small_tokenizer
from tiny import CONFIG

import llama4_lab as l4
from llama4_lab.analysis.attribution import attribute
from llama4_lab.analysis.expert_features import decision_features, expert_features
from llama4_lab.analysis.features import Target
from llama4_lab.prompt import Prompt, build_prompt

TARGET = Target(token=7)
GRADIENTS = "integrated_gradients"


@pytest.fixture(scope="module")
def prompt(tmp_path_factory) -> Prompt:
    return build_prompt(small_tokenizer(tmp_path_factory.mktemp("tokenizer")), "The user asks")


def opened(seed: int = 3, **changes) -> l4.Llama4:
    return l4.random(CONFIG.replace(vocab_size=336, num_hidden_layers=4, **changes), seed).eval()


@pytest.fixture(scope="module")
def model() -> l4.Llama4:
    return opened()


@pytest.fixture(scope="module")
def toy() -> l4.Llama4:
    """Four experts, in the second of three layers."""
    return opened(num_local_experts=4, moe_layers=(1,), num_experts_per_tok=2)


@torch.no_grad()
def log_probability(model, prompt, changes=()) -> float:
    with l4.intervene(model, dict(changes)):
        return float(model(**prompt)[0, -1].log_softmax(dim=-1)[TARGET.token])


@torch.no_grad()
def without_experts(model, prompt, pairs, changes=()) -> float:
    """Remove experts by emptying their matrices."""
    whole = model.state_dict()
    kept = {name: weight.clone() for name, weight in whole.items()}
    for layer, expert in pairs:
        whole[f"layers.{layer}.feed_forward.experts.down_proj"][expert] = 0
    try:
        return log_probability(model, prompt, changes)
    finally:
        model.load_state_dict(kept)


def by_orders(worth, players) -> dict:
    """Average what a player adds over all orders in which players can arrive."""
    total = dict.fromkeys(players, 0.0)
    for order in permutations(players):
        for i, player in enumerate(order):
            total[player] += worth(order[: i + 1]) - worth(order[:i])
    return {player: gain / factorial(len(players)) for player, gain in total.items()}


def test_exact_shapley_values_of_four_experts_equal_brute_force(toy, prompt):
    players = [(1, expert) for expert in range(4)]
    worth = {
        frozenset(kept): without_experts(toy, prompt, set(players) - set(kept))
        for size in range(5)
        for kept in combinations(players, size)
    }
    expected = by_orders(lambda kept: worth[frozenset(kept)], players)
    found = attribute(expert_features(toy, prompt, TARGET), "shapley", batch_size=3)
    assert found.axes == ("layer", "expert")
    assert [tuple(place) for place in found.places.tolist()] == players
    np.testing.assert_allclose(found.values, list(expected.values()), atol=1e-5)
    assert np.abs(found.values).max() > 1e-2
    assert found.completeness_error < 1e-3


def test_sampled_shapley_values_come_close_to_the_exact_ones(toy, prompt):
    features = expert_features(toy, prompt, TARGET)
    exact = attribute(features, "shapley").values
    sampled = attribute(features, samples=100, batch_size=4).values
    np.testing.assert_allclose(sampled, exact, atol=0.1 * np.abs(exact).max())


def test_ablation_of_an_expert_equals_emptying_its_matrix(model, prompt):
    found = attribute(expert_features(model, prompt, TARGET), "feature_ablation")
    assert len(found.values) == 2 * 5
    clean = log_probability(model, prompt)
    for (layer, expert), value in zip(found.places.tolist(), found.values, strict=True):
        without = without_experts(model, prompt, [(layer, expert)])
        assert value == pytest.approx(clean - without, abs=1e-5)


def test_later_routers_follow_the_ablation_of_an_expert_unless_they_are_fixed(prompt):
    loud = opened()
    with torch.no_grad():
        loud.state_dict()["layers.1.feed_forward.experts.down_proj"].mul_(30)
    pairs, name = [(1, expert) for expert in range(5)], "layers.3.router.indices"
    with torch.no_grad(), l4.trace(loud, name) as cache:
        loud(**prompt)
    clean, held = log_probability(loud, prompt), {name: lambda _: cache[name]}
    features = expert_features(loud, prompt, TARGET, pairs=pairs)
    expected = {
        is_fixed: [clean - without_experts(loud, prompt, [pair], changes) for pair in pairs]
        for is_fixed, changes in ((False, ()), (True, held))
    }
    assert np.abs(np.subtract(*expected.values())).max() > 1e-3  # some experts change
    for is_fixed, values in expected.items():
        found = attribute(features, "feature_ablation", fixed_routing=is_fixed)
        np.testing.assert_allclose(found.values, values, atol=1e-4)


def test_ablation_of_a_decision_leaves_the_token_without_routed_experts(model, prompt):
    pairs = [(3, 4), (1, 2), (3, 0)]
    found = attribute(decision_features(model, prompt, TARGET, pairs=pairs), "feature_ablation")
    assert found.labels == ["layer 3, token 4", "layer 1, token 2", "layer 3, token 0"]
    clean = log_probability(model, prompt)
    for (layer, token), value in zip(pairs, found.values, strict=True):
        keep = torch.ones(len(prompt.tokens), 1, 1)
        keep[token] = 0
        without = log_probability(
            model, prompt, {f"layers.{layer}.experts.out": lambda out, keep=keep: out * keep}
        )
        assert value == pytest.approx(clean - without, abs=1e-5)


@pytest.mark.parametrize("build", [expert_features, decision_features])
def test_with_all_off_only_the_shared_experts_are_left(model, prompt, build):
    off, on = build(model, prompt, TARGET).ends(False)
    assert on == pytest.approx(log_probability(model, prompt), abs=1e-5)
    bare = log_probability(model, prompt, {"layers.*.experts.out": torch.zeros_like})
    assert off == pytest.approx(bare, abs=1e-5)


@pytest.mark.parametrize("build", [expert_features, decision_features])
@pytest.mark.parametrize("method", ["shapley_sampling", GRADIENTS])
def test_attributions_add_up_to_the_change(model, prompt, build, method):
    found = attribute(build(model, prompt, TARGET), method, samples=2)
    assert found.completeness_error < (0.01 if method == GRADIENTS else 1e-3)


def test_integrated_gradients_of_experts_add_up_over_their_tokens_decisions(model, prompt):
    top1 = opened(num_experts_per_tok=1)
    pairs = [(layer, token) for layer in (1, 3) for token in range(len(prompt.tokens))]
    decisions = attribute(decision_features(top1, prompt, TARGET, pairs=pairs), GRADIENTS)
    experts = attribute(expert_features(top1, prompt, TARGET), GRADIENTS)
    with torch.no_grad(), l4.trace(top1, "layers.*.router.indices") as cache:
        top1(**prompt)
    for (layer, expert), value in zip(experts.places.tolist(), experts.values, strict=True):
        chosen = cache[f"layers.{layer}.router.indices"].flatten() == expert
        own = decisions.values.reshape(2, -1)[(1, 3).index(layer), chosen.numpy()]
        assert value == pytest.approx(own.sum(), abs=1e-4)


@pytest.mark.parametrize("method", ["feature_ablation", "shapley_sampling", GRADIENTS])
def test_experts_that_nobody_chose_and_decisions_that_nobody_reads_get_nothing(toy, prompt, method):
    routed = opened(num_local_experts=16, moe_layers=(3,), num_experts_per_tok=1)
    with torch.no_grad(), l4.trace(routed, "layers.3.router.indices") as cache:
        routed(**prompt)
    used = cache["layers.3.router.indices"][0, -1, 0].item()
    values = attribute(expert_features(routed, prompt, TARGET), method, samples=2).values
    assert values[used] != 0
    np.testing.assert_allclose(np.delete(values, used), 0, atol=1e-6)
    values = attribute(decision_features(routed, prompt, TARGET), method, samples=2).values
    assert values[-1] != 0
    np.testing.assert_allclose(values[:-1], 0, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "pair", "sentence"),
    [
        (
            expert_features,
            (1, 5),
            "no pair (layer 1, expert 5): MoE layers are 1, 3, experts 0 to 4",
        ),
        (expert_features, (2, 0), "no pair (layer 2, expert 0): MoE layers are 1, 3"),
        (
            decision_features,
            (3, 5),
            "no pair (layer 3, token 5): MoE layers are 1, 3, tokens 0 to 4",
        ),
    ],
)
def test_a_pair_that_does_not_exist_is_explained(model, prompt, build, pair, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        build(model, prompt, pairs=[pair])


def test_a_pair_that_is_given_twice_is_named(model, prompt):
    with pytest.raises(ValueError, match="layer 3, expert 2 is given twice: a part has one gate"):
        expert_features(model, prompt, pairs=[(3, 2), (1, 2), (3, 2)])


def test_a_model_without_experts_has_none_to_turn_off(prompt):
    with pytest.raises(ValueError, match="this model routes nothing: all its 4 layers are dense"):
        expert_features(opened(interleave_moe_layer_step=0), prompt)
