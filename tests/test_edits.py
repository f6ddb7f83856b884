"""Edits: each does what its formula says, is refused where it cannot be, and survives a file."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from tiny import CONFIG, tiny

import llama4_lab as l4
from llama4_lab import edits as E
from llama4_lab.edits.base import HOW, See, has_tokens, layer_of
from llama4_lab.points import INSIDE, PICTURE
from llama4_lab.replay import Replay

pytestmark = pytest.mark.usefixtures("no_grad")

MOE, DENSE, NOPE = 3, 2, 3
ALL = [
    E.SkipLayer(2),
    E.SkipLayer(3, tokens=(7, 20)),
    E.AblateHead(3, 1),
    E.AblateHead(1, 4, "mean", tokens=(9, 20)),
    E.AblateHead(0, 2, "resample", "other", tokens=(13,)),
    E.AblateAttention(3),
    E.AblateMLP(4),
    E.AblateShared(1, "mean"),
    E.AblateExpert(3, 1),
    E.AblateExpert(3, 1, "mean"),
    E.AblateExpert(3, 1, "resample", "other", tokens=tuple(range(5, 29))),
    E.DropExpert(3, 1),
    E.DropExpert(5, 1, tokens=(13, 14)),
    E.Route(3, 13, 4),
    E.Route(3, 13, 2, "one"),
    E.Route(5, 28, 2, "winner"),
    E.TopK(3, 1),
    E.RouterTemperature(3, 3.0),
    E.RouterBias(3, 1, 2.0),
    E.RouterBias(3, 1, 2.0, gated=True),
    E.Rope(0, on=False),
    E.Rope(3, on=True),
    E.Chunk(1, 16),
    E.Chunk(3, 8),
    E.Chunk(2, None),
    E.AttentionTemperature(3, scale=0.0),
    E.AttentionTemperature(3, floor_scale=2),
    E.KnockOut((20, 21), (3, 4, 5)),
    E.KnockOut((14, 15), (12, 13), layer=3, head=1),
    E.RemoveTokens((3, 4, 5)),
    E.RemoveTokens((13, 18)),
    E.ReplaceToken(14, 33),
    E.AblateEmbedding((3, 4), "mean"),
    E.AblateEmbedding((13,), "resample", "other"),
    E.Patch("layers.2.resid_pre", "other", tokens=(13,), source_tokens=(20,)),
    E.Patch("layers.3.attn.z", "other", tokens=(12, 13), head=2),
    E.Patch("projector.out", "other"),
    E.Patch("vision.layers.1.attn.z", "other", head=1),
    E.Scale("vision.out", 0.0),
    E.Scale("vision.layers.0.attn.v", 0.5),
    E.Scale("layers.1.attn.pattern", 0.5),
    E.Scale("layers.5.experts.hidden", 0.5, tokens=(20,)),
    E.Steer("layers.4.resid_mid", tuple(0.5 + 0.1 * i for i in range(48)), 2.0, tokens=(17,)),
    E.Steer("projector.out", (0.5,) * 48),
    E.Scale("final_norm", 2.0, tokens=(13,)),
    E.Scale("logits", 2.0, tokens=(13,)),
]


def some_prompt(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 89, (1, 29), generator=generator)
    ids[:, 3:12] = CONFIG.image_token_index
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 24, 24, generator=generator)}


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def prompt():
    return some_prompt(0)


@pytest.fixture(scope="module")
def sources(prompt):
    return {"clean": prompt, "other": some_prompt(1)}


@pytest.fixture(scope="module")
def replay(model, prompt, sources):
    return Replay(model, prompt, sources)


def in_full(model, prompt, sources, edits):
    with E.edited(model, edits, sources):
        return model(**prompt)[0]


def rows_of(model, names, prompt, edits=(), sources=None):
    with E.edited(model, edits, sources), l4.trace(model, names) as cache:
        model(**prompt)
    return cache


def same(one, other):
    """Equal to rounding: with tokens of another shape, products may sum in another order."""
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), atol=1e-5)


# --- every edit ------------------------------------------------------------------


@pytest.mark.parametrize("edit", ALL, ids=repr)
def test_an_edit_moves_the_logits_and_leaves_nothing_behind(model, prompt, sources, edit):
    plain = model(**prompt)[0]
    edited = in_full(model, prompt, sources, [edit])
    assert (edited - plain).abs().max() > 1e-4
    first = edit.touches(CONFIG).token
    torch.testing.assert_close(edited[:first], plain[:first], atol=1e-5, rtol=0)  # rounding only
    assert torch.equal(model(**prompt)[0], plain)


@pytest.mark.parametrize("edit", ALL, ids=repr)
def test_an_edit_holds_token_by_token(model, prompt, sources, edit):
    expected = in_full(model, prompt, sources, [edit])
    ids, pixels = prompt.values()
    with E.edited(model, [edit], sources):
        cache = model.new_cache()
        parts = [model(ids[:, :12], pixels, cache=cache)]
        parts += [model(part, cache=cache) for part in ids[:, 12:].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1)[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "edit",
    # Two pictures are no place for the values of one.
    [
        *(e for e in ALL if not isinstance(e, E.Patch) or not e.point.startswith(PICTURE)),
        E.Patch("layers.3.attn.pattern", "other"),
    ],
    ids=repr,
)
def test_an_edit_is_the_same_in_each_row_of_a_batch(model, prompt, sources, edit):
    prompts = [prompt, some_prompt(2)]
    both = {name: torch.cat([each[name] for each in prompts]) for name in prompt}
    with E.edited(model, [edit], sources):
        together = model(**both)
    for row, each in zip(together, prompts, strict=True):
        expected = in_full(model, each, sources, [edit])
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("edit", ALL, ids=repr)
def test_a_replayed_edit_equals_the_whole_run(model, prompt, sources, replay, edit):
    again = replay.edited([edit])
    expected = in_full(model, prompt, sources, [edit])
    torch.testing.assert_close(again.logits, expected, atol=1e-5, rtol=0)
    assert not again.effect.unseen
    assert all(found.used_by for found in again.evidence.values())
    assert not again.evidence or any(found.changed > 0 for found in again.evidence.values())
    changes = E.changes_of([edit], CONFIG).items()
    changed = {p for p, along in changes if not all(isinstance(each, See) for each in along)}
    assert again.evidence.keys() == changed - {"logits"}  # which nothing in the model reads


@pytest.mark.parametrize("edit", ALL, ids=repr)
def test_nothing_differs_before_the_point_and_token_that_an_edit_touches(
    model, prompt, sources, edit
):
    names, touch = list(l4.points(CONFIG)), edit.touches(CONFIG)
    plain, mine = rows_of(model, "*", prompt), rows_of(model, "*", prompt, [edit], sources)
    differing = [name for name in names if not same(plain[name], mine[name])]
    assert names.index(differing[0]) >= names.index(touch.point)
    assert touch.layer == layer_of(CONFIG, touch.point)
    if edit != E.KnockOut((20, 21), (3, 4, 5)):  # RoPE layers did not see these keys anyway
        assert layer_of(CONFIG, differing[0]) == touch.layer
    for name in differing:
        if touch.token and has_tokens(name, CONFIG):
            assert same(plain[name][:, : touch.token], mine[name][:, : touch.token]), name


@pytest.mark.parametrize("edit", ALL, ids=repr)
def test_an_edit_comes_back_from_json_as_it_was(edit):
    (again,) = E.loads(E.dumps([edit]))
    assert again == edit
    assert type(again) is type(edit)


def test_every_kind_of_edit_is_in_these_tests():
    assert {type(edit) for edit in ALL} == set(E.KINDS.values())


# --- what they mean --------------------------------------------------------------


def test_a_skipped_layer_hands_on_what_it_was_given(model, prompt):
    names = ["layers.2.resid_pre", "layers.2.resid_post"]
    cache = rows_of(model, names, prompt, [E.SkipLayer(2)])
    assert torch.equal(*(cache[name] for name in names))


def test_a_silenced_expert_adds_exactly_nothing(model, prompt):
    names = ["layers.3.router.indices", "layers.3.experts.out"]
    plain = rows_of(model, names, prompt)
    silent = rows_of(model, names, prompt, [E.AblateExpert(3, 1)])
    there = plain[names[0]] == 1
    assert there.any()
    assert torch.equal(silent[names[0]], plain[names[0]])
    assert (silent[names[1]][there] == 0).all()
    torch.testing.assert_close(silent[names[1]][~there], plain[names[1]][~there])


def test_edits_may_read_a_run_before_its_layers_and_inside_them(model, prompt, sources):
    edits = [E.AblateEmbedding((4, 20), "mean", "other"), E.AblateHead(3, 1, "mean", "other")]
    names = ["embed", "layers.3.attn.z"]
    theirs = rows_of(model, names, sources["other"])
    found = rows_of(model, names, prompt, edits, sources)
    is_image = sources["other"]["input_ids"][0] == CONFIG.image_token_index
    for token, kind in ((4, is_image), (20, ~is_image)):
        torch.testing.assert_close(found["embed"][0, token], theirs["embed"][0, kind].mean(0))
    mean = theirs["layers.3.attn.z"][0, :, 1].mean(0)
    torch.testing.assert_close(found["layers.3.attn.z"][0, :, 1], mean.expand(29, -1))


def test_the_mean_is_that_of_the_tokens_that_go_to_the_expert(model, prompt, sources):
    names = ["layers.3.router.indices", "layers.3.experts.out"]
    plain = rows_of(model, names, prompt)
    edited = rows_of(model, names, prompt, [E.AblateExpert(3, 1, "mean")], sources)
    there = plain[names[0]] == 1
    mean = plain[names[1]][there].mean(dim=0)
    torch.testing.assert_close(edited[names[1]][there], mean.expand(int(there.sum()), -1))


def test_resampling_gives_the_outputs_of_another_runs_tokens_in_turn(model, prompt, sources):
    names = ["layers.3.router.indices", "layers.3.experts.out"]
    plain, theirs = (rows_of(model, names, each) for each in (prompt, sources["other"]))
    edit = E.AblateExpert(3, 1, "resample", "other", tokens=tuple(range(5, 29)))
    edited = rows_of(model, names, prompt, [edit], sources)
    outputs = theirs[names[1]][theirs[names[0]] == 1]
    expected, count = plain[names[1]].clone(), 0
    for _, position, slot in (plain[names[0]] == 1).nonzero().tolist():
        if position >= 5:
            expected[0, position, slot] = outputs[position % len(outputs)]
            count += 1
    assert count > 1 and len(outputs) > 1
    torch.testing.assert_close(edited[names[1]], expected)
    assert torch.equal(edited[names[0]], plain[names[0]])


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("kind", "point", "at"),
    [
        (E.AblateAttention, "layers.3.attn.out", (3,)),
        (E.AblateMLP, "layers.2.mlp.out", (2,)),
        (E.AblateShared, "layers.3.shared.out", (3,)),
        (E.AblateHead, "layers.3.attn.z", (3, 4)),
    ],
)
def test_an_ablated_part_is_nothing_its_mean_or_another_runs(
    model, prompt, sources, how, kind, point, at
):
    plain, theirs = (rows_of(model, point, each)[point] for each in (prompt, sources["other"]))
    edit = kind(*at, how, "other", tokens=(9, 20))
    found = rows_of(model, point, prompt, [edit], sources)[point]
    put = {"zero": 0 * theirs, "mean": theirs.mean(1, keepdim=True), "resample": theirs}[how]
    expected = plain.clone()
    where = (slice(None), [9, 20]) + ((4,) if kind is E.AblateHead else ())
    expected[where] = put.expand_as(theirs)[where]
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, plain)


def test_a_dropped_expert_leaves_its_tokens_to_the_next_best(model, prompt):
    names = ["layers.3.router.logits", "layers.3.router.indices"]
    plain, edited = (
        rows_of(model, names, prompt),
        rows_of(model, names, prompt, [E.DropExpert(3, 1)]),
    )
    logits = plain[names[0]].clone()
    logits[..., 1] = float("-inf")
    assert torch.equal(edited[names[1]], logits.topk(2).indices)


@pytest.mark.parametrize("gate", ["own", "winner", "one"])
@pytest.mark.parametrize("expert", range(5))
def test_a_routed_token_goes_where_it_is_sent_with_the_stated_gate(model, prompt, expert, gate):
    names = [f"layers.3.router.{part}" for part in ("logits", "indices", "scores")]
    plain = rows_of(model, names, prompt)
    edited = rows_of(model, names, prompt, [E.Route(3, 13, expert, gate)])
    (logits, indices, scores), (_, before, _) = (
        [cache[name][0, 13] for name in names] for cache in (edited, plain)
    )
    assert indices[0] == expert
    second = before[0] if expert in before.tolist() else before[1]
    assert indices[1] == (before[1] if expert == before[0] else second)
    own = {"own": logits[expert].sigmoid(), "winner": logits.max().sigmoid(), "one": 1.0}
    assert float(scores[0]) == pytest.approx(float(own[gate]))
    assert torch.equal(edited[names[1]][0, :13], plain[names[1]][0, :13])


def test_a_bias_for_the_choice_alone_leaves_scores_as_they_are(model, prompt):
    names = [f"layers.3.router.{part}" for part in ("logits", "indices", "scores")]
    own = rows_of(model, names, prompt)[names[0]]
    edited = rows_of(model, names, prompt, [E.RouterBias(3, 1, 5.0)])
    assert (edited[names[1]] == 1).any(-1).all()
    torch.testing.assert_close(edited[names[2]], own.gather(-1, edited[names[1]]).sigmoid())
    gated = rows_of(model, names, prompt, [E.RouterBias(3, 1, 5.0, gated=True)])
    biased = own.clone()
    biased[..., 1] += 5.0
    torch.testing.assert_close(gated[names[2]], biased.gather(-1, gated[names[1]]).sigmoid())


def test_other_rules_equal_a_model_that_was_made_with_them(model, prompt):
    def made(**changes):
        other = l4.random(CONFIG.replace(**changes), 0).eval()
        other.load_state_dict(model.state_dict())
        return other(**prompt)[0]

    moe = [i for i in range(6) if CONFIG.is_moe(i)]
    rope = [i for i in range(6) if CONFIG.uses_rope(i)]
    for edits, changes in (
        ([E.TopK(i, 3) for i in moe], {"num_experts_per_tok": 3}),
        ([E.TopK(i, 5) for i in moe], {"num_experts_per_tok": 5}),
        ([E.Chunk(i, 13) for i in rope], {"attention_chunk_size": 13}),
        ([E.AttentionTemperature(3, 0.0)], {"attn_temperature_tuning": False}),
        ([E.AttentionTemperature(3, 0.7, 2)], {"attn_scale": 0.7, "floor_scale": 2}),
    ):
        torch.testing.assert_close(
            in_full(model, prompt, {}, edits), made(**changes), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("use_qk_norm", [True, False])
def test_a_layer_switched_to_rope_is_one_of_a_model_that_was_made_with_it(prompt, use_qk_norm):
    model = tiny(use_qk_norm=use_qk_norm)
    other = tiny(use_qk_norm=use_qk_norm, no_rope_layers=(1,) * 6)
    other.load_state_dict(model.state_dict())
    found = in_full(model, prompt, {}, [E.Rope(NOPE, on=True), E.Chunk(NOPE, 8)])
    torch.testing.assert_close(found, other(**prompt)[0], atol=1e-5, rtol=0)


def test_a_layer_with_rope_switched_off_cannot_tell_the_order_of_its_keys(model):
    ids = torch.randint(4, 89, (1, 8), generator=torch.Generator().manual_seed(2))
    swapped = ids[:, [1, 0, 2, 3, 4, 5, 6, 7]]
    edits = [E.Rope(0, on=False)]
    first, second = (
        rows_of(model, "layers.0.attn.z", {"input_ids": x}, edits)["layers.0.attn.z"]
        for x in (ids, swapped)
    )
    torch.testing.assert_close(first[:, 2:], second[:, 2:], atol=1e-6, rtol=0)
    first, second = (
        rows_of(model, "layers.0.attn.z", {"input_ids": x})["layers.0.attn.z"]
        for x in (ids, swapped)
    )
    assert (first[:, 2:] - second[:, 2:]).abs().max() > 1e-3


def test_knocked_out_keys_get_nothing_and_the_rest_of_the_pattern_grows(model, prompt):
    name = "layers.3.attn.pattern"
    plain = rows_of(model, name, prompt)[name][0]
    edited = rows_of(model, name, prompt, [E.KnockOut((20, 21), (3, 4, 5), layer=3)])[name][0]
    expected = plain.clone()
    expected[:, 20:22, 3:6] = 0
    expected /= expected.sum(-1, keepdim=True)
    torch.testing.assert_close(edited, expected)
    knocked = E.KnockOut((20, 21), (3, 4, 5), layer=3, head=1)
    one = rows_of(model, name, prompt, [knocked])[name][0]
    torch.testing.assert_close(one, torch.cat([plain[:1], expected[1:2], plain[2:]]))


@pytest.mark.parametrize("point", ["vision.layers.1.attn.z", "layers.3.attn.z"])
def test_an_edit_of_one_head_leaves_the_others_as_they_are(model, prompt, sources, point):
    plain, theirs = (rows_of(model, point, each)[point] for each in (prompt, sources["other"]))
    for edit, put in (
        (E.Scale(point, 0.5, head=1), plain * 0.5),
        (E.Patch(point, "other", head=1), theirs),
    ):
        expected = plain.clone()
        expected[:, :, 1] = put[:, :, 1]
        found = rows_of(model, point, prompt, [edit], sources)[point]
        torch.testing.assert_close(found, expected)
        again = Replay(model, prompt, sources).edited([edit]).logits
        torch.testing.assert_close(
            again, in_full(model, prompt, sources, [edit]), atol=1e-5, rtol=0
        )


def test_removed_tokens_are_seen_by_themselves_alone(model, prompt):
    for layer in range(6):
        name = f"layers.{layer}.attn.pattern"
        pattern = rows_of(model, name, prompt, [E.RemoveTokens((3, 4))])[name][0]
        assert (pattern[:, 5:, 3:5] == 0).all()
        assert (pattern[:, 4, 3] == 0).all()
        assert (pattern[:, 3, 3] > 0).all()


def test_a_replaced_token_is_as_if_it_had_stood_there(model, prompt):
    ids = prompt["input_ids"].clone()
    ids[0, 14] = 33
    expected = model(ids, prompt["pixel_values"])[0]
    found = in_full(model, prompt, {}, [E.ReplaceToken(14, 33)])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_blanked_patch_becomes_the_mean_patch_and_a_blanked_word_the_mean_word(
    model, prompt, sources
):
    plain = rows_of(model, "embed", prompt)["embed"][0]
    edits = [E.AblateEmbedding((4, 20), "mean")]
    found = rows_of(model, "embed", prompt, edits, sources)["embed"][0]
    is_image = prompt["input_ids"][0] == CONFIG.image_token_index
    torch.testing.assert_close(found[4], plain[is_image].mean(0))
    torch.testing.assert_close(found[20], plain[~is_image].mean(0))


def test_text_behind_the_clean_run_is_blanked_as_text(model, prompt, sources):
    ids, pixels = prompt.values()
    longer = {"input_ids": torch.cat([ids, ids[:, -2:]], dim=1), "pixel_values": pixels}
    edits = [E.AblateEmbedding((4, 30), "mean")]
    found = rows_of(model, "embed", longer, edits, sources)["embed"][0]
    plain = rows_of(model, "embed", prompt)["embed"][0]
    torch.testing.assert_close(found[30], plain[ids[0] != CONFIG.image_token_index].mean(0))


def test_a_cache_made_before_an_edit_of_chunks_is_refused(model, prompt):
    ids, pixels = prompt.values()
    cache = model.new_cache()
    model(ids[:, :14], pixels, cache=cache)
    with (
        E.edited(model, [E.Chunk(1, None)]),
        pytest.raises(ValueError, match=r"keeps chunks of \[8, 8, 8, None.* new_cache\(\), inside"),
    ):
        model(ids[:, 14:], cache=cache)
    model(ids[:, 14:], cache=cache)


def test_a_run_patched_in_whole_becomes_the_other_run(model, prompt, sources):
    found = in_full(model, prompt, sources, [E.Patch("layers.0.resid_pre", "other")])
    torch.testing.assert_close(found, model(**sources["other"])[0], atol=1e-6, rtol=0)


def test_a_value_may_come_from_farther_on_in_a_source_than_the_prompt_is_long(model, prompt):
    source = torch.randint(4, 89, (1, 40), generator=torch.Generator().manual_seed(4))
    edit = E.Patch("embed", "long", tokens=(20,), source_tokens=(35,))
    found = Replay(model, prompt, {"long": source}).edited([edit]).logits
    ids = prompt["input_ids"].clone()
    ids[0, 20] = source[0, 35]
    torch.testing.assert_close(found, model(ids, prompt["pixel_values"])[0], atol=1e-5, rtol=0)


def test_edits_at_one_point_happen_in_the_order_given(model, prompt):
    steer = E.Steer("layers.2.resid_mid", (1.0,) * 48)
    scale = E.Scale("layers.2.resid_mid", 3.0)
    name = "layers.2.resid_mid"
    plain = rows_of(model, name, prompt)[name]
    first = rows_of(model, name, prompt, [steer, scale])[name]
    second = rows_of(model, name, prompt, [scale, steer])[name]
    torch.testing.assert_close(first, (plain + 1) * 3)
    torch.testing.assert_close(second, plain * 3 + 1)


def test_edits_of_nested_blocks_are_those_of_one_and_end_with_their_own(model, prompt, sources):
    outer = [E.Scale("layers.2.resid_mid", 3.0), E.Chunk(1, 12), E.Chunk(1, 16), E.TopK(5, 1)]
    inner = [E.Steer("layers.2.resid_mid", (1.0,) * 48), E.DropExpert(3, 1), E.Chunk(1, 4)]
    alone = in_full(model, prompt, sources, outer)
    together = in_full(model, prompt, sources, [*inner[:2], *outer, inner[2]])
    plain = model(**prompt)
    for _ in range(2):
        with E.edited(model, outer):
            with E.edited(model, inner):  # the innermost changes first, and its rules hold
                torch.testing.assert_close(model(**prompt)[0], together, atol=1e-5, rtol=0)
            assert torch.equal(model(**prompt)[0], alone)
        assert torch.equal(model(**prompt), plain)


@pytest.mark.parametrize(
    ("inner", "outer", "what"),
    [
        (E.AblateExpert(MOE, 1), E.Route(MOE, 13, 1), "indices"),
        (E.Route(MOE, 13, 4, "one"), E.Route(MOE, 13, 2), "indices"),
        (E.RouterBias(MOE, 1, 20.0), E.Route(MOE, 13, 4), "indices"),
        (E.RouterBias(MOE, 1, 20.0), E.RouterTemperature(MOE, 4.0), "logits"),
    ],
)
def test_edits_that_look_at_what_a_block_around_changes_are_refused(
    model, prompt, inner, outer, what
):
    sentence = rf"around this one changes layers\.3\.router\.{what} behind .* in one list, or put"
    with E.edited(model, [outer]), pytest.raises(ValueError, match=sentence):
        in_full(model, prompt, {}, [inner])
    expected = in_full(model, prompt, {}, [outer, inner])
    with E.edited(model, [inner]):  # which looks at what came of the other
        assert same(in_full(model, prompt, {}, [outer]), expected)


def test_a_block_around_may_look_at_a_choice_but_not_change_it_as_well(model, prompt):
    looks, inner = E.AblateExpert(MOE, 0), E.AblateExpert(MOE, 1)
    outer = E.edited(model, [looks, E.Route(MOE, 13, 1)])
    with outer, pytest.raises(ValueError, match=r"changes layers\.3\.router\.indices behind"):
        in_full(model, prompt, {}, [inner])
    with E.edited(model, [looks]):
        found = in_full(model, prompt, {}, [inner])
    assert torch.equal(found, in_full(model, prompt, {}, [looks, inner]))


def test_edits_hold_while_text_is_generated(model):
    ids = torch.randint(4, 89, (1, 21), generator=torch.Generator().manual_seed(3))
    edits = [E.Chunk(1, 16), E.DropExpert(3, 1), E.AblateHead(0, 2), E.RemoveTokens((4, 5))]
    with E.edited(model, edits):
        whole = model(ids)
        cache = model.new_cache()
        parts = [model(part, cache=cache) for part in ids.split(5, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=0)


def test_rules_are_as_before_after_an_exception(model, prompt):
    plain = model(**prompt)
    with pytest.raises(KeyboardInterrupt), E.edited(model, [E.Chunk(1, 16), E.TopK(3, 1)]):
        raise KeyboardInterrupt
    assert torch.equal(model(**prompt), plain)


# --- what is refused -------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (E.SkipLayer(6), r"layer 6 is out of range: this model has 6 layers \(0 to 5\)"),
        (E.AblateHead(0, 6), r"head 6 is out of range: this model has 6 heads \(0 to 5\)"),
        (E.DropExpert(3, 5), r"expert 5 is out of range: this model has 5 experts \(0 to 4\)"),
        (E.Route(2, 1, 1), r"layer 2 is a dense layer; MoE layers are 1, 3, 5"),
        (E.AblateMLP(3), r"layer 3 is a MoE layer; dense layers are 0, 2, 4"),
        (E.SkipLayer(1, tokens=(29,)), r"no token 29: the prompt has 29 \(0 to 28\)"),
        (E.Route(3, -1, 1), r"there is no token -1"),
        (E.TopK(3, 6), r"k must be 1 to 5, all experts"),
        (E.AttentionTemperature(2), r"layer 2 is a RoPE layer in this run; NoPE layers are 3$"),
        (E.Scale("layers.2.attn.y", 0.0), r"'layers.2.attn.y': did you mean 'layers.2.attn.\w'\?"),
        (E.Scale("blocks.2.attn.hook_z", 0.0), r"one point, such as 'layers.2.attn.z'"),
        (E.Scale("layers.9.attn.z", 0.0), r"'layers.9.attn.z': this model has 6 layers \(0 to 5\)"),
        (E.Scale("layers.2.mlp.out", 0.0, head=1), r"mlp.out has no axis of query heads"),
        (E.Scale("vision.out", 0.0, tokens=(1,)), r"vision.out has no axis of text tokens"),
        (E.Scale("vision.layers.0.mlp.out", 0.0, tokens=(1,)), r"mlp.out has no axis of text tok"),
        (
            E.Scale("vision.layers.0.attn.z", 0.0, head=2),
            r"head 2 is out of .* has 2 heads \(0 to 1",
        ),
        (E.Scale("layers.3.router.indices", 0.0), r"use Route or DropExpert"),
        (E.Steer("layers.2.mlp.out", (1.0, 2.0)), r"a vector of 2 numbers does not fit"),
        (E.Patch("embed", "other", (1, 2), (3,)), r"2 tokens cannot take the values of 1"),
        (E.Patch("embed", "short", (20,)), r"source 'short' has 5 tokens"),
        (E.Patch("embed", "short", (2,), (-1,)), r"there is no token -1"),
        (
            E.Patch("vision.out", "short"),
            r"the run 'short' has no picture, so it has no vision.out",
        ),
        (
            E.Patch("layers.1.attn.pattern", "short"),
            r"shape \(1, 6, 29, 29\), and in source 'short' \(1, 6, 5, 5\)",
        ),
        (E.Patch("embed", "batch"), r"the source 'batch' has 2 rows: give one row without padding"),
        (E.AblateHead(0, 1, "mean", "padded"), r"the source 'padded' has 1 row with padding: give"),
        (E.AttentionTemperature(3, floor_scale=0), r"floor_scale counts tokens, so it must be 1"),
    ],
    ids=repr,
)
def test_an_impossible_edit_is_refused_with_what_is_possible(model, prompt, replay, edit, sentence):
    short = torch.arange(5, 10)[None]
    sources = {"clean": prompt, "other": prompt, "short": short, "batch": short.expand(2, -1)}
    sources["padded"] = {"input_ids": short, "attention_mask": (short > 5).long()}
    with pytest.raises(ValueError, match=sentence):
        Replay(model, prompt, sources).edited([edit])


@pytest.mark.parametrize(
    "edit", [each for each in ALL if "Scale(point='vision" in str(each)], ids=repr
)
def test_an_edit_of_a_picture_that_is_not_there_is_refused(model, edit):
    ids = torch.arange(5, 17)[None]
    with pytest.raises(ValueError, match=f"this prompt has no picture, so it has no {edit.point}"):
        Replay(model, ids).edited([edit])
    with pytest.warns(UserWarning, match=f"'{edit.point}' was never made"), E.edited(model, [edit]):
        model(ids)


def test_a_missing_source_is_named(model, prompt, replay):
    edit = E.AblateHead(0, 1, "resample", "elsewhere")
    with pytest.raises(KeyError, match="the run 'elsewhere', and given are 'clean', 'other'"):
        replay.edited([edit])


def test_an_expert_that_nobody_visits_has_no_mean(model, prompt):
    ids = torch.tensor([[5]])
    chosen = rows_of(model, "layers.3.router.indices", {"input_ids": ids})
    absent = next(e for e in range(5) if e not in chosen["layers.3.router.indices"])
    sources = {"lonely": ids}
    with (
        pytest.raises(ValueError, match="no token of 'lonely' goes to this expert"),
        E.edited(model, [E.AblateExpert(3, absent, "resample", "lonely")], sources),
    ):
        model(**prompt)


def test_too_few_experts_left_are_refused(replay):
    with pytest.raises(ValueError, match="4 of 5 experts dropped in layer 3 leave 1, and each"):
        replay.edited([E.DropExpert(3, e) for e in range(4)])
    some = [E.DropExpert(3, e, tokens=(7, 8 + e)) for e in range(3)]
    with pytest.raises(ValueError, match="4 of 5 experts dropped in layer 3 leave 1, and each"):
        replay.edited([*some, E.DropExpert(3, 3)])


def test_experts_dropped_for_different_tokens_are_counted_token_by_token(replay):
    run = replay.edited([E.DropExpert(3, e, tokens=(7 + e,)) for e in range(5)])
    chosen = run.router(3, "indices")
    assert all(e not in chosen[7 + e] for e in range(5))


def test_a_layer_has_a_temperature_to_change_where_it_does_not_rotate_in_this_run(model, prompt):
    edits = [E.AttentionTemperature(3, 0.0), E.Rope(3, on=True), E.Rope(1, on=False)]
    with pytest.raises(ValueError, match=r"layer 3 is a RoPE layer in this run; .* layers are 1$"):
        in_full(model, prompt, {}, edits)
    with pytest.raises(ValueError, match=r"NoPE layers are none$"):
        in_full(model, prompt, {}, edits[:2])
    in_full(model, prompt, {}, [edits[0], E.Rope(3, on=False)])
    names = ["layers.1.attn.q", "layers.1.attn.rot_q"]
    q, tempered = rows_of(model, names, prompt, [E.AttentionTemperature(1, 0.0), edits[2]]).values()
    torch.testing.assert_close(tempered, q)
    assert not torch.allclose(rows_of(model, names[1:], prompt, edits[2:])[names[1]], q)


def test_edits_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="resample takes values of another run"):
        E.AblateHead(0, 0, "resample")
    with pytest.raises(ValueError, match=r"how='half' is unknown; choose from \('zero'"):
        E.AblateHead(0, 0, "half")
    with pytest.raises(ValueError, match=r"gate='two' is unknown; choose from \('own'"):
        E.Route(0, 0, 0, "two")
    with pytest.raises(ValueError, match=r"RouterTemperature\(.*: the temperature must be above 0"):
        E.RouterTemperature(3, 0.0)
    with pytest.raises(ValueError, match=r"RouterTemperature\(.*above 0, and finite"):
        E.RouterTemperature(3, float("inf"))
    with pytest.raises(ValueError, match="a chunk of 0 tokens is impossible"):
        E.Chunk(0, 0)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nonsense", r'must be JSON, such as \[{"edit": "SkipLayer", "layer": 3}]: Expecting'),
        ('{"edit": "SkipLayer"}', r'must be a JSON list of objects, such as \[{"edit'),
        ('[{"edit": "Fly"}]', "unknown edit 'Fly'; choose from SkipLayer"),
        ('[{"edit": ["SkipLayer"], "layer": 1}]', r"unknown edit \['SkipLayer'\]; choose from"),
        ('[{"edit": "SkipLayer"}]', "SkipLayer needs layer as well"),
        ('[{"edit": "SkipLayer", "layer": 1, "x": 2}]', "SkipLayer has no x; it has layer, tokens"),
        ('[{"edit": "SkipLayer", "layer": "one"}]', "layer"),
        ('[{"edit": "Scale", "factor": NaN}]', "edits take finite numbers, and NaN is none"),
        ('[{"edit": "Scale", "factor": -1e400}]', "edits take finite numbers, and -1e400 is none"),
    ],
)
def test_json_that_is_no_edit_is_refused(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        E.loads(text)


def test_what_json_cannot_say_is_not_written():
    with pytest.raises(ValueError, match=r"finite numbers only, and these are edits: \[Scale"):
        E.dumps([E.Scale("logits", float("inf"))])


def test_edits_are_values():
    assert E.SkipLayer(1, tokens=range(3)) == E.SkipLayer(1, tokens=(0, 1, 2))
    assert len({E.SkipLayer(1), E.SkipLayer(1)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        E.SkipLayer(1).layer = 2


# --- what people hand in -----------------------------------------------------------

HANDED_IN = """
import numpy as np, torch
import llama4_lab as l4
from llama4_lab import edits as E
from llama4_lab.analysis.attention import keys_and_queries
from llama4_lab.analysis.counterfactual import counterfactual
from llama4_lab.analysis.decomposition import decompose_logit
from llama4_lab.analysis.features import Target, token_features
from llama4_lab.analysis.lens import logit_lens
from llama4_lab.analysis.patching import logit_difference
from llama4_lab.analysis.routing import routing_of
from llama4_lab.analysis.vision import patches_of

given = [
    E.Route(np.int64(3), torch.tensor(13), np.int32(4)),
    E.SkipLayer(np.int64(2), torch.tensor([7, 20])),
    E.RouterTemperature(3, np.float64(3.0), range(3)),
    E.Rope(3, np.True_),
    E.Steer("logits", torch.ones(3), np.float32(0.5), np.array([2])),
]
assert E.loads(E.dumps(given)) == given == [
    E.Route(3, 13, 4),
    E.SkipLayer(2, (7, 20)),
    E.RouterTemperature(3, 3.0, (0, 1, 2)),
    E.Rope(3, True),
    E.Steer("logits", (1.0, 1.0, 1.0), 0.5, (2,)),
]

model = l4.load("nano")
replay = l4.Replay(model, "one two")
run, ids = replay.edited, torch.ones(1, 3, dtype=torch.long)
prompt = model.prompt("one two")

def changed(change):
    with l4.intervene(model, {"embed": change}):
        model(ids)

assert l4.generate(model, ids, 4, seed=np.int64(3)) == l4.generate(model, ids, 4, seed=3)
assert counterfactual(replay, torch.tensor(-1)).token == len(replay) - 1
lens = logit_lens(model, model.prompt("one two"), [np.int64(-1)], target=np.int64(5))
assert (lens.target == 5).all() and lens.positions.tolist() == [len(replay) - 1]
for wish in (
    lambda: E.SkipLayer(1.5),
    lambda: E.DropExpert(1, None),
    lambda: E.AblateHead(1, True),
    lambda: E.SkipLayer(1, 3),
    lambda: E.SkipLayer(1, "12"),
    lambda: E.SkipLayer(1, torch.tensor([True])),
    lambda: E.Chunk("1", 4),
    lambda: run(E.SkipLayer(1)),
    lambda: run(["SkipLayer"]),
    lambda: E.SkipLayer(1, {}),
    lambda: E.dumps(E.SkipLayer(1)),
    lambda: E.dumps(["a"]),
    lambda: l4.generate(model, ids, 4, seed=1.5),
    lambda: l4.generate(model, ids, 4, stop=3),
    lambda: l4.generate(model, ids, 4, stop="e"),
    lambda: l4.generate(model, ids, 4, stop=[1.5]),
    lambda: l4.load(None),
    lambda: l4.random("nano"),
    lambda: l4.run_with_cache(model, ids, "logits", dtype="float16"),
    lambda: l4.run_with_cache(model, ids, ["logits", 3]),
    lambda: model([1, 2]),
    lambda: model(ids.float()),
    lambda: model(prompt),
    lambda: l4.points(model),
    lambda: changed(0),
    lambda: logit_lens(model, "one two"),
    lambda: decompose_logit(model, ids),
    lambda: routing_of(model, "one two"),
    lambda: keys_and_queries(model, "one two", 0),
    lambda: token_features(model, "one two"),
    lambda: patches_of("one two"),
    lambda: logit_lens(model, prompt, target=" three"),
    lambda: decompose_logit(model, prompt, versus=" three"),
    lambda: logit_difference(" three", " four"),
    lambda: token_features(model, prompt, Target(token=" three")),
    lambda: model.prompt(b"bytes"),
    lambda: model.prompt("text", images=torch.zeros(3, 8, 8)),
):
    try:
        wish()
    except TypeError as error:
        print(error)
    else:
        raise AssertionError("it was not refused")
"""
REFUSED = """
SkipLayer: layer=1.5: give a whole number
DropExpert: expert=None: give a whole number
AblateHead: head=True: give a whole number
SkipLayer: tokens=3: give a sequence of numbers
SkipLayer: tokens='12': give a sequence of numbers
SkipLayer: tokens=tensor([True]): give a whole number
Chunk: layer='1': give a whole number
SkipLayer(layer=1, tokens=None) stands alone: give a list of edits
'SkipLayer' is no edit: they are SkipLayer, AblateHead
SkipLayer: tokens={}: give a sequence of numbers
SkipLayer(layer=1, tokens=None) stands alone: give a list of edits
'a' is no edit: they are SkipLayer, AblateHead
seed=1.5: give whole numbers
stop=3: give the ids of the tokens that end a text, as (3, 4)
stop='e': give the ids of the tokens that end a text, as (3, 4)
stop=1.5: give whole numbers
None is no model: give a name or a checkpoint folder
'nano' is no config: give one, such as load('nano').config
dtype='float16': give a dtype of torch, such as torch.float16
3 names no point: give names or patterns as text
input_ids=[1, 2]: give a tensor of whole numbers [b, t], or a prompt as model(**model.prompt(text))
input_ids=tensor([[1., 1., 1.]]): give a tensor of whole numbers [b, t]
input_ids=Prompt(
points are those of a config, not of a Llama4: give model.config
the change of 'embed' is a int: give a function of the value
'one two' is no Prompt: give what model.prompt makes of it
tensor([[1, 1, 1]]) is no Prompt: give what model.prompt makes of it
'one two' is no Prompt
'one two' is no Prompt
'one two' is no Prompt
'one two' is no Prompt
' three' is a text: give a number (model.tokenizer.encode tells a token's)
' three' is a text
' three' is a text
' three' is a text
b'bytes' is no prompt: give a text, a list of texts
a picture is a PIL image, a uint8 array, or a file's name or bytes, not Tensor
"""


def test_numbers_of_numpy_and_torch_serve_and_what_is_no_number_is_refused_in_words():
    # In a process of its own: here annotations are checked first.
    command = [sys.executable, "-c", HANDED_IN]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, expected = done.stdout.splitlines(), REFUSED.split("\n")[1:-1]
    for sentence, beginning in zip(said, expected, strict=True):
        assert sentence.startswith(beginning)


# --- edits of one router -----------------------------------------------------------


def gates(model, prompt, edits):
    """Experts and scores of one layer under edits."""
    cache = rows_of(model, f"layers.{MOE}.router.*", prompt, edits, {"clean": prompt})
    return (cache[f"layers.{MOE}.router.{part}"][0] for part in ("indices", "scores"))


@pytest.mark.parametrize(
    ("others", "temperature"),
    [
        ([], 1.0),
        ([E.RouterBias(MOE, 1, 20.0)], 1.0),
        ([E.RouterBias(MOE, 2, 30.0)], 1.0),
        ([E.RouterTemperature(MOE, 4.0)], 4.0),
        ([E.Route(MOE, 13, 4)], 1.0),
        ([E.Route(MOE, 13, 4, "winner"), E.Route(MOE, 14, 0)], 1.0),
    ],
)
def test_a_bias_for_the_choice_alone_enters_no_score(model, prompt, others, temperature):
    logits = rows_of(model, f"layers.{MOE}.router.logits", prompt).popitem()[1][0]
    biased = [E.RouterBias(MOE, 1, 40.0)]
    for edits in (biased + others, others + biased):
        expert, score = gates(model, prompt, edits)
        expected = (logits / temperature).gather(1, expert).sigmoid()
        if any(isinstance(edit, E.Route) and edit.gate == "winner" for edit in edits):
            expected[13, 0] = logits[13, 1].sigmoid()  # with the bias, expert 1 wins everywhere
        torch.testing.assert_close(score, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("gate", ["own", "winner", "one"])
def test_a_token_sent_to_a_silenced_expert_gets_nothing_in_either_order(model, prompt, gate):
    ablated, sent = E.AblateExpert(MOE, 4), E.Route(MOE, 13, 4, gate)
    for edits in ([ablated, sent], [sent, ablated]):
        expert, score = gates(model, prompt, edits)
        assert expert[13, 0] == 4 and score[13, 0] == 0


def test_a_later_route_or_bias_leaves_no_gate_of_an_earlier_route(model, prompt):
    sent, one = E.Route(MOE, 13, 2), E.Route(MOE, 13, 4, "one")
    for found, expected in zip(
        gates(model, prompt, [one, sent]), gates(model, prompt, [sent]), strict=True
    ):
        assert torch.equal(found, expected)
    for edits in ([one, E.RouterBias(MOE, 4, 1.0)], [E.RouterBias(MOE, 4, 1.0), one]):
        expert, score = gates(model, prompt, edits)
        assert (expert[13, 0], score[13, 0]) == (4, 1.0)


@pytest.mark.parametrize("how", ["mean", "resample"])
def test_a_skipped_layer_adds_nothing_whatever_its_experts_were_given_before(
    model, prompt, sources, how
):
    before = [E.AblateExpert(MOE, 1, how, "other"), E.Scale(f"layers.{MOE}.experts.in", 2.0)]
    more = E.Steer(f"layers.{MOE}.experts.hidden", (1.0,) * CONFIG.intermediate_size)
    expected = in_full(model, prompt, sources, [E.SkipLayer(MOE)])
    edits = [*before, more, E.SkipLayer(MOE)]
    assert torch.equal(in_full(model, prompt, sources, edits), expected)
    assert same(Replay(model, prompt, sources).edited(edits).logits, expected)


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_a_score_that_is_set_behind_a_skip_does_not_bring_the_layer_back(
    model, prompt, sources, how
):
    expected = in_full(model, prompt, sources, [E.SkipLayer(MOE)])
    scores = f"layers.{MOE}.router.scores"
    for again in (E.Patch(scores, "other"), E.Steer(scores, (1.0,) * CONFIG.num_experts_per_tok)):
        edits = [E.AblateExpert(MOE, 1, how), E.SkipLayer(MOE), again]
        assert torch.equal(in_full(model, prompt, sources, edits), expected)


@pytest.mark.parametrize("point", INSIDE)
def test_a_skipped_layer_adds_nothing_whatever_a_block_inside_changes(model, prompt, point):
    expected = in_full(model, prompt, {}, [E.SkipLayer(MOE)])
    with (
        E.edited(model, [E.SkipLayer(MOE)]),
        l4.intervene(model, {f"layers.{MOE}.{point}": lambda value: value + 1}),
    ):
        assert torch.equal(model(**prompt)[0], expected)


def test_experts_of_a_skipped_layer_are_not_opened(model):
    with E.edited(model, [E.SkipLayer(MOE)]):
        assert not any(model.tap.watches(f"layers.{MOE}.{point}") for point in INSIDE)
    skip, gate = E.SkipLayer(MOE), E.Route(MOE, 13, 4, "one")
    for edits in ([E.AblateExpert(MOE, 1), skip], [skip], [skip, gate], [gate, skip]):
        assert f"layers.{MOE}.experts.out" not in E.changes_of(edits, CONFIG)


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_scaling_leaves_masked_what_is_masked(model, prompt, factor):
    pattern = f"layers.{MOE}.attn.pattern"
    plain, edited = (
        rows_of(model, pattern, prompt, edits)[pattern][0]
        for edits in ([], [E.Scale(f"layers.{MOE}.attn.scores", factor)])
    )
    assert torch.equal(edited == 0, plain == 0)
    if factor == 0:
        expected = (plain > 0) / (plain > 0).sum(-1, keepdim=True)
    else:
        inverse = torch.where(plain > 0, 1 / plain, 0)
        expected = inverse / inverse.sum(-1, keepdim=True)
    torch.testing.assert_close(edited, expected, rtol=1e-4, atol=1e-6)
    dropped = [E.DropExpert(MOE, 1), E.Scale(f"layers.{MOE}.router.logits", factor)]
    expert, score = gates(model, prompt, dropped)
    assert (expert != 1).all() and score.isfinite().all()


def test_replays_of_rotated_values_warn_of_nothing(replay, recwarn):
    replay.edited([E.Scale("layers.1.attn.q", 0.5), E.Scale("layers.1.attn.k", 0.5)])
    assert not recwarn.list


def test_values_of_another_size_are_not_spread_over_others(model, prompt, sources):
    top_1 = tiny(num_experts_per_tok=1)
    edits = [E.TopK(MOE, 2), E.Patch(f"layers.{MOE}.experts.out", "other")]
    with pytest.raises(
        ValueError, match=r"\(1, 29, 2, 48\), and in source 'other' \(1, 29, 1, 48\)"
    ):
        in_full(top_1, prompt, sources, edits)
    ids = prompt["input_ids"].clone()
    ids[:, 14:23] = CONFIG.image_token_index
    two = {"input_ids": ids, "pixel_values": prompt["pixel_values"].repeat(2, 1, 1, 1)}
    with pytest.raises(ValueError, match=r"projector.out.*\(2, 9, 48\).*'other' \(1, 9, 48\)"):
        in_full(model, two, sources, [E.Patch("projector.out", "other")])


def test_a_run_without_a_picture_has_no_mean_patch(model, prompt):
    edit = E.AblateEmbedding((3, 14), "mean", "text")
    with pytest.raises(ValueError, match="the run 'text' has no image tokens to take the mean of"):
        in_full(model, prompt, {"clean": prompt, "text": torch.arange(5, 34)[None]}, [edit])


def test_a_bias_does_not_bring_back_a_skipped_layer(model, prompt, sources):
    skipped, biased = E.SkipLayer(MOE), E.RouterBias(MOE, 1, 40.0)
    expected = in_full(model, prompt, sources, [skipped])
    for edits in ([skipped, biased], [biased, skipped]):
        torch.testing.assert_close(
            in_full(model, prompt, sources, edits), expected, atol=1e-5, rtol=0
        )


def test_sources_read_inside_other_edits_do_not_depend_on_the_pass_before(model):
    ids = torch.randint(4, 89, (1, 20), generator=torch.Generator().manual_seed(2))

    def nested():
        scaled = E.edited(model, [E.Scale("embed", 5.0, tokens=(3,))])
        with scaled, E.edited(model, [E.AblateEmbedding((5,), "mean")], {"clean": ids}):
            return model(ids)

    expected, cache = nested(), model.new_cache()
    for part in ids.split(15, dim=1):
        model(part, cache=cache)
    assert torch.equal(nested(), expected)
    scaled, blank = E.Scale("embed", 5.0, tokens=(3,)), E.AblateEmbedding((5,), "mean")
    clean = rows_of(model, "embed", {"input_ids": ids}, [scaled])["embed"][0]
    with E.edited(model, [scaled]):  # whose tokens are those of the source as well
        found = rows_of(model, "embed", {"input_ids": ids}, [blank], {"clean": ids})["embed"][0]
    torch.testing.assert_close(found[5], clean.mean(0))


def test_a_temperature_without_a_scale_changes_nothing_where_the_model_has_none():
    untuned, ids = tiny(attn_temperature_tuning=False), torch.arange(5, 25)[None]
    plain = untuned(ids)
    for edit in (E.AttentionTemperature(3), E.AttentionTemperature(3, floor_scale=2)):
        with E.edited(untuned, [edit]):
            assert torch.equal(untuned(ids), plain)
    with E.edited(untuned, [E.AttentionTemperature(3, 0.5, 2)]):
        assert not torch.equal(untuned(ids), plain)
