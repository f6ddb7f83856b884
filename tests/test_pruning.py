"""Fewer experts: exact where nothing can change, and equal to models edited by hand."""

import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny

import llama4_lab as l4
from llama4_lab.analysis.pruning import BY, HOW, Survey, pruned, pruning, survey


def batches(*sizes: tuple[int, int], seed: int = 1) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 80, size, generator=draw) for size in sizes]


def one_layer(load: list[int], similarity: np.ndarray | None = None) -> Survey:
    alike = np.eye(len(load)) if similarity is None else similarity
    return Survey((1,), np.array([load]), alike[None])


def state(model: l4.Llama4) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: l4.Llama4, before: dict[str, torch.Tensor]) -> set[str]:
    return {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}


def expert(model: l4.Llama4, layer: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights = model.layers[layer].feed_forward.experts
    return weights.gate_up_proj[index], weights.down_proj[index]


# 0 and 1 are the most alike, then 2 and 3; 4 is nearest to 2.
PAIRS = np.array(
    [
        [1.0, 0.9, 0.1, 0.2, 0.0],
        [0.9, 1.0, 0.3, 0.1, 0.0],
        [0.1, 0.3, 1.0, 0.8, 0.5],
        [0.2, 0.1, 0.8, 1.0, 0.4],
        [0.0, 0.0, 0.5, 0.4, 1.0],
    ]
)
LOAD = [5, 9, 2, 7, 1]


@torch.no_grad()
def test_a_survey_counts_choices_and_compares_outputs_on_the_same_inputs():
    model, given = tiny(), batches((2, 9), (3, 5))
    found = survey(model, given)
    assert found.layers == (1, 3, 5)
    for row, layer in enumerate(found.layers):
        chosen, outputs = [], []
        for ids in given:
            with l4.trace(model, f"layers.{layer}.*") as cache:
                model(ids)
            chosen.append(cache[f"layers.{layer}.router.indices"].flatten())
            x = cache[f"layers.{layer}.experts.in"].flatten(0, 2).double()
            gate_ups, downs = zip(*(expert(model, layer, i) for i in range(5)), strict=True)
            halves = [(x @ w.double().T).chunk(2, -1) for w in gate_ups]
            out = [F.silu(g) * u @ w.double().T for (g, u), w in zip(halves, downs, strict=True)]
            outputs.append(torch.stack(out))
        assert found.load[row].tolist() == torch.bincount(torch.cat(chosen), minlength=5).tolist()
        long = torch.cat(outputs, dim=1).flatten(1)
        expected = F.cosine_similarity(long[:, None], long, dim=-1)
        np.testing.assert_allclose(found.similarity[row], expected, atol=1e-5)


def test_experts_whose_hidden_units_are_reordered_are_the_same_expert():
    model = tiny()
    (gate_up, down), shuffle = expert(model, 1, 0), torch.randperm(40)
    weights = model.layers[1].feed_forward.experts
    weights.gate_up_proj.data[3] = torch.cat([half[shuffle] for half in gate_up.chunk(2)])
    weights.down_proj.data[3] = down[:, shuffle]
    assert survey(model, batches((2, 9))).similarity[0, 0, 3] == pytest.approx(1, abs=1e-5)


def test_an_expert_that_says_nothing_is_like_no_other():
    model = tiny()
    model.layers[1].feed_forward.experts.down_proj.data[2] = 0
    np.testing.assert_array_equal(survey(model, batches((2, 9))).similarity[0, 2], 0)


def test_the_least_used_goes_first_by_load():
    assert one_layer(LOAD).order(1, "load").tolist() == [4, 2, 0, 3, 1]


def test_the_less_used_of_the_most_alike_goes_first_by_similarity():
    assert one_layer(LOAD, PAIRS).order(1, "similarity").tolist() == [0, 2, 4, 3, 1]


def test_experts_that_are_all_unlike_go_in_order_too():
    unlike = np.array([[1, -0.1, -0.5], [-0.1, 1, -0.6], [-0.5, -0.6, 1]])
    assert one_layer([9, 5, 1], unlike).order(1, "similarity").tolist() == [1, 2, 0]


def test_the_experts_that_go_join_the_most_similar_one_left():
    found = one_layer(LOAD, PAIRS)
    assert found.heirs(1, 3, "similarity").tolist() == [1, 1, 3, 3, 4]
    assert found.heirs(1, 3, "load").tolist() == [0, 1, 3, 3, 3]
    assert found.heirs(1, 5, "load").tolist() == [0, 1, 2, 3, 4]
    assert found.heirs(1, 1, "load").tolist() == [1, 1, 1, 1, 1]


def test_who_is_kept_stays_itself_even_if_nothing_tells_it_from_another():
    for alike in (np.zeros((5, 5)), np.ones((5, 5))):
        heirs = one_layer(LOAD, alike).heirs(1, 3, "load")
        assert heirs[[0, 1, 3]].tolist() == [0, 1, 3]


def test_a_group_is_mixed_by_load_and_evenly_if_never_used():
    shares = one_layer([5, 15, 0, 0, 1], PAIRS).shares(1, 3, "similarity")
    expected = np.zeros((5, 5))
    expected[:2, :2] = [0.25, 0.75]
    expected[2:4, 2:4] = 0.5
    expected[4, 4] = 1
    np.testing.assert_allclose(shares, expected)


@torch.no_grad()
@pytest.mark.parametrize("topk", [1, 2])
def test_merging_two_identical_experts_changes_nothing(topk):
    model, (ids,) = tiny(num_experts_per_tok=topk), batches((2, 11))
    for part in model.layers[1].feed_forward.experts.parameters():
        part[3] = part[0]
    found = survey(model, [ids])
    clean = model(ids)
    assert (found.heirs(1, 4, "similarity") == np.arange(5)).sum() == 4
    with pruned(model, found, 4, how="merge", by="similarity", layers=[1]):
        # The shares of two equal weights round: a part in a million of the largest logit.
        atol = 1e-6 * float(clean.abs().max())
        torch.testing.assert_close(model(ids), clean, atol=atol, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("by", BY)
def test_if_all_experts_are_equal_no_merging_changes_anything(by):
    model, given = tiny(), batches((2, 11), (1, 7))
    for i in (1, 3, 5):
        for part in model.layers[i].feed_forward.experts.parameters():
            part[:] = part[:1].clone()
    found = pruning(model, given, survey(model, given), how="merge", by=by)
    assert found.kept.tolist() == [5, 4, 3, 2, 1]
    np.testing.assert_allclose(found.loss, found.loss[0], atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("how", HOW)
def test_experts_that_no_token_chose_can_go_without_a_trace(how):
    model, given = tiny(), batches((2, 11))
    model.layers[1].feed_forward.router.weight[3] = 0
    model.layers[1].feed_forward.router.weight[3] -= 100 * _direction(model, given[0])
    found = survey(model, given)
    assert found.load[0, 3] == 0
    clean = model(given[0])
    with pruned(model, found, 4, how=how, layers=[1]):
        assert found.order(1, "load")[0] == 3
        if how == "remove":
            assert torch.equal(model(given[0]), clean)
        else:  # its heir keeps all of its own weights
            torch.testing.assert_close(model(given[0]), clean, atol=1e-6, rtol=0)


def _direction(model: l4.Llama4, ids: torch.Tensor) -> torch.Tensor:
    """Return a direction that every input of layer 1's router has a positive part in."""
    with l4.trace(model, "layers.1.resid_mid") as cache:
        model(ids)
    x = model.layers[1].post_attention_layernorm(cache["layers.1.resid_mid"]).flatten(0, 1)
    direction = torch.linalg.lstsq(x, torch.ones(len(x), 1)).solution[:, 0]
    assert (x @ direction > 0).all()
    return direction


@torch.no_grad()
def test_removed_experts_are_as_if_they_had_never_been():
    model, given = tiny(), batches((2, 11), (1, 7))
    found = survey(model, given)
    smaller = tiny(num_local_experts=3)
    weights = model.state_dict()
    for i in (1, 3, 5):
        left = torch.tensor(np.sort(found.order(i, "similarity")[-3:]))
        for name in ("router.weight", "experts.gate_up_proj", "experts.down_proj"):
            name = f"layers.{i}.feed_forward.{name}"
            weights[name] = weights[name][left]
    smaller.load_state_dict(weights)
    losses = pruning(model, given, found, by="similarity", keep=[3, 5]).loss
    np.testing.assert_allclose(losses, [mean_loss(smaller, given), mean_loss(model, given)], 1e-5)


@torch.no_grad()
def test_merged_experts_are_the_mean_of_their_weights_by_load():
    model, given = tiny(), batches((2, 11), (1, 7))
    found = survey(model, given)
    merged = copy.deepcopy(model)
    heirs, load = found.heirs(3, 2, "load"), found.load[1]
    for part in merged.layers[3].feed_forward.experts.parameters():
        old = part.clone()
        for heir in set(heirs.tolist()):
            group = [i for i in range(5) if heirs[i] == heir]
            part[group] = sum(old[i] * load[i] for i in group) / sum(load[i] for i in group)
    measured = pruning(model, given, found, how="merge", layers=[3], keep=[2])
    assert (measured.how, measured.by, measured.layers) == ("merge", "load", (3,))
    assert measured.loss[0] == pytest.approx(mean_loss(merged, given), rel=1e-5)
    assert measured.loss[0] != pytest.approx(mean_loss(model, given), rel=1e-5)


def mean_loss(model: l4.Llama4, given: list[torch.Tensor]) -> float:
    rows = [row for ids in given for row in ids]
    losses = [F.cross_entropy(model(r[None, :-1])[0], r[1:], reduction="none") for r in rows]
    return torch.cat(losses).mean().item()


@torch.no_grad()
def test_the_loss_of_bfloat16_logits_is_summed_exactly():
    model, given = tiny().bfloat16(), batches((3, 40))
    losses = pruning(model, given, survey(model, given), keep=[5]).loss
    logits = model(given[0][:, :-1]).double().flatten(0, 1)
    exact = F.cross_entropy(logits, given[0][:, 1:].flatten())
    assert losses[0] == pytest.approx(float(exact), abs=1e-5)


@pytest.mark.parametrize("how", HOW)
def test_the_model_is_unchanged_afterwards_and_after_an_interrupt(how):
    model, given = tiny(), batches((2, 9))
    parameters, before = dict(model.named_parameters()), state(model)
    found = survey(model, given)
    assert pruning(model, given, found, how=how).kept[-1] == (2 if how == "remove" else 1)
    clean = model(given[0])
    with pytest.raises(KeyboardInterrupt), pruned(model, found, 2, how=how):
        assert not torch.equal(model(given[0]), clean)
        raise KeyboardInterrupt
    assert not changed(model, before)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert torch.equal(model(given[0]), clean)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"how": "drop"}, "how='drop' is unknown; choose from remove, merge"),
        ({"by": "size"}, "by='size' is unknown; choose from load, similarity"),
        ({"layers": [2]}, "layer 2 has no experts: the MoE layers are 1, 3, 5"),
        (
            {"keep": [1]},
            "keep=1 experts: to remove, keep 2 to 5, as each token chooses 2",
        ),
        ({"keep": [6], "how": "merge"}, "keep=6 experts: to merge, keep 1 to 5"),
        ({"keep": [0], "how": "merge"}, "keep=0 experts: to merge, keep 1 to 5"),
    ],
)
def test_errors_say_what_can_be_pruned(options, sentence):
    model, given = tiny(), batches((1, 6))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        pruning(model, given, survey(model, given), **options)


def test_models_and_batches_without_anything_to_prune_or_predict_are_refused():
    with pytest.raises(ValueError, match="this model routes nothing"):
        survey(tiny(interleave_moe_layer_step=0), batches((1, 6)))
    found = survey(tiny(), batches((1, 6)))
    sentence = re.escape("batches of shapes (1, 1): each needs a row of two tokens or more")
    with pytest.raises(ValueError, match=sentence):
        pruning(tiny(), batches((1, 1)), found)
    with pytest.raises(ValueError, match="the survey was given no token"):
        survey(tiny(), iter([]))


def test_the_weights_of_a_divided_model_are_not_taken_for_the_whole(monkeypatch):
    model, given = tiny(), batches((1, 5))
    found = survey(model, given)
    monkeypatch.setattr(model, "ranks", SimpleNamespace(size=2))
    sentence = "reads weights, of which this rank holds one part of 2: load the model whole on one"
    with pytest.raises(ValueError, match=f"a survey of experts {sentence}"):
        survey(model, given)
    with pytest.raises(ValueError, match=f"merging experts {sentence}"):
        pruning(model, given, found, how="merge")


@pytest.mark.parametrize("keep", [0, -1, 6])
def test_heirs_of_a_number_that_cannot_be_kept_are_refused(keep):
    with pytest.raises(ValueError, match=f"keep={keep} experts: keep 1 to 5 of them"):
        one_layer(LOAD, PAIRS).heirs(1, keep, "load")
