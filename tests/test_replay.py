"""Replay: runs from the middle equal whole runs, and say what they changed."""

import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tqdm.auto
from test_edits import ALL, in_full, rows_of, some_prompt
from tiny import CONFIG, tiny
from torch.overrides import _get_current_function_mode_stack

import llama4_lab as l4
from llama4_lab import edits as E
from llama4_lab.analysis.routing import routing_in
from llama4_lab.points import NO_TAP
from llama4_lab.replay import Replay
from llama4_lab.replay.variants import Rows
from llama4_lab.witness import Witness


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def prompt():
    return some_prompt(0)


@pytest.fixture(scope="module")
def replay(model, prompt):
    return Replay(model, prompt, {"other": some_prompt(1)})


@torch.no_grad()
def test_many_runs_at_once_equal_each_by_itself(model, prompt, replay):
    runs = [[edit] for edit in ALL] + [[], [E.SkipLayer(1), E.DropExpert(3, 2)]]
    together = replay.many(runs)
    sources = {"clean": prompt, "other": some_prompt(1)}
    for edits, found in zip(runs, together, strict=True):
        assert found.edits == tuple(edits)
        expected = in_full(model, prompt, sources, edits)
        torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_run_knows_what_its_routers_decided(model, prompt, replay):
    sources = {"clean": prompt, "other": some_prompt(1)}
    tokens = [str(i) for i in range(len(replay))]
    for edits in [[], *([edit] for edit in ALL)]:
        found = routing_in(replay.edited(edits), tokens)
        points = [f"layers.{i}.router.*" for i in found.layers]
        expected = rows_of(model, points, prompt, edits, sources)
        for row, layer in enumerate(found.layers):
            for name, mine in (("indices", found.expert), ("scores", found.score)):
                theirs = expected[f"layers.{layer}.router.{name}"][0].numpy()
                shown = mine[row, :, : theirs.shape[1]]
                np.testing.assert_allclose(shown, theirs, atol=1e-5, err_msg=f"{edits} {name}")
            logits = expected[f"layers.{layer}.router.logits"][0].numpy()
            np.testing.assert_allclose(found.logits[row], logits, atol=1e-5, err_msg=f"{edits}")


@torch.no_grad()
def test_a_run_tells_the_values_that_it_was_asked_to_keep(model, prompt):
    sources = {"clean": prompt, "other": some_prompt(1)}
    names = [
        name
        for name, axes in l4.points(model.config).items()
        if axes.startswith("b t") and not name.startswith("vision.")
    ]
    assert {"embed", "layers.1.experts.out", "layers.5.attn.rot_q", "logits"} <= {*names}
    for edits in [[], *([edit] for edit in ALL)]:
        found = Replay(model, prompt, sources).edited(edits, keep=names)
        expected = rows_of(model, names, prompt, edits, sources)
        for name in names:
            mine = found.value(name)
            torch.testing.assert_close(
                mine, expected[name], atol=2e-5, rtol=0, equal_nan=True, msg=f"{edits} {name}"
            )


@torch.no_grad()
def test_keeping_values_is_seen_by_nobody_and_changes_no_run(model, prompt):
    replay = Replay(model, prompt)
    plain = replay.edited([E.DropExpert(3, 2)])
    with l4.trace(model, "embed") as seen:
        found = replay.edited([E.DropExpert(3, 2)], keep=["layers.3.experts.out"])
    assert not seen
    torch.testing.assert_close(found.logits, plain.logits, atol=1e-5, rtol=0)
    for name in ("layers.1.experts.out", "layers.3.experts.out", "layers.5.resid_pre"):
        with pytest.raises(KeyError, match=rf"{name} was not kept of this run: ask for"):
            plain.value(name)  # though the clean run has it
    theirs = rows_of(model, "final_norm", prompt, [E.DropExpert(3, 2)])["final_norm"]
    torch.testing.assert_close(plain.value("final_norm"), theirs, atol=1e-5, rtol=0)
    assert found.value("layers.3.experts.out").shape[:2] == (1, len(replay))
    for name in ("layers.0.attn.pattern", "vision.embed", "projector.out", "layers.9.resid_mid"):
        with pytest.raises(ValueError, match=f"'{name}' cannot be kept: it has no axes b t"):
            replay.edited([], keep=[name])


@torch.no_grad()
def test_small_passes_give_the_same(model, prompt, replay):
    runs = [[E.AblateHead(layer, head)] for layer in range(6) for head in range(6)]
    one_each = Replay(model, prompt, max_tokens=1).many(runs)
    for a, b in zip(replay.many(runs), one_each, strict=True):
        torch.testing.assert_close(a.logits, b.logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_pass_is_as_full_as_it_may_be(model, prompt, monkeypatch):
    replay, passes = Replay(model, prompt, max_tokens=60), []
    run = replay._run
    monkeypatch.setattr(
        replay,
        "_run",
        lambda variants, keep: (
            passes.append((variants[0].first, len(variants))) or run(variants, keep)
        ),
    )
    heads = range(CONFIG.num_attention_heads)
    late = [[E.AblateHead(4, head, tokens=(20,))] for head in heads]  # 9 tokens each
    replay.many([*late, *([E.AblateHead(4, head)] for head in heads)])  # 29 tokens each
    assert sorted(passes) == [(0, 2), (0, 2), (0, 2), (20, 6)]


@torch.no_grad()
def test_runs_that_begin_at_near_tokens_share_a_pass(model, prompt, monkeypatch):
    """Each still says nothing of what stands before its own first token."""
    replay, passes = Replay(model, prompt), []
    run = replay._run
    monkeypatch.setattr(
        replay, "_run", lambda variants, keep: passes.append(variants) or run(variants, keep)
    )
    tokens = [12, 3, 5, 4, len(replay) - 1]
    edits = [[E.ReplaceToken(token, 7)] for token in tokens] + [[E.SkipLayer(2)]]
    together = replay.many(edits)
    assert len(passes) == 1
    for token, found, edit in zip([*tokens, 0], together, edits, strict=True):
        alone = replay.edited(edit)
        assert (found.first, len(found.hidden)) == (token, len(replay) - token)
        torch.testing.assert_close(found.logits, alone.logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.effect.kl, alone.effect.kl, atol=1e-6, rtol=0)
        assert found.effect.flips == alone.effect.flips
    passes.clear()
    monkeypatch.setattr("llama4_lab.replay._SPARE_TOKENS", 1)
    replay.many(edits)
    assert [len(variants) for variants in passes] == [1, 2, 1, 1, 1]  # only 4 joins 3


@torch.no_grad()
def test_a_stream_holds_one_pass_at_a_time(model, prompt):
    runs = [[E.AblateHead(layer, head)] for layer in (4, 1) for head in range(6)]
    replay = Replay(model, prompt, max_tokens=1)
    expected, seen, alive = replay.many(runs), set(), []
    for i, found in replay.stream(runs):
        torch.testing.assert_close(found.logits, expected[i].logits, atol=1e-5, rtol=0)
        seen.add(i)
        alive.append(weakref.ref(found))
        del found
        assert sum(each() is not None for each in alive) <= 1
    assert seen == set(range(len(runs)))


@pytest.mark.parametrize("chunk", [4, 8, 64])
@pytest.mark.parametrize("backend", ["loop", "grouped", "padded"])
@torch.no_grad()
def test_every_first_token_and_backend_equals_the_whole_run(prompt, chunk, backend):
    model = tiny(attention_chunk_size=chunk)
    model.backend = backend
    replay = Replay(model, prompt)
    for token in range(0, 29, 3):
        edit = E.Steer("layers.2.mlp.out", (0.5,) * 48, tokens=(token,))
        torch.testing.assert_close(
            replay.edited([edit]).logits, in_full(model, prompt, {}, [edit]), atol=1e-5, rtol=0
        )


def test_only_what_comes_after_the_edit_is_run_again(model, replay):
    seen = []
    original = [(layer.self_attn.mix, layer.feed_forward.forward) for layer in model.layers]
    try:
        for i, layer in enumerate(model.layers):
            mix, feed = original[i]

            def watched_mix(x, *rest, i=i, mix=mix):
                seen.append((i, "attention", x.shape[1]))
                return mix(x, *rest)

            def watched_feed(x, *rest, i=i, feed=feed):
                seen.append((i, "experts", x.shape[1]))
                return feed(x, *rest)

            layer.self_attn.mix, layer.feed_forward.forward = watched_mix, watched_feed
        replay.edited([E.AblateShared(3, tokens=(20,))])
        assert seen == [
            (3, "experts", 9),
            *((i, part, 9) for i in (4, 5) for part in ("attention", "experts")),
        ]
        seen.clear()
        replay.edited([E.AblateHead(5, 0)])
        assert seen == [(5, "experts", 29)]
        seen.clear()
        replay.edited([E.Scale("final_norm", 2.0)])
        assert seen == []
    finally:
        for layer, (mix, feed) in zip(model.layers, original, strict=True):
            layer.self_attn.mix, layer.feed_forward.forward = mix, feed


@torch.no_grad()
def test_the_effect_is_what_its_formulas_say(model, prompt, replay):
    edit = E.SkipLayer(3, tokens=(15, 16))
    effect = replay.edited([edit]).effect
    clean, mine = (
        logits.double().log_softmax(-1)
        for logits in (model(**prompt)[0], in_full(model, prompt, {}, [edit]))
    )
    ids = prompt["input_ids"][0]
    assert effect.positions.tolist() == list(range(15, 29))
    kl = (clean.exp() * (clean - mine)).sum(-1)[15:]
    torch.testing.assert_close(effect.kl.double(), kl, atol=1e-6, rtol=1e-3)
    rise = [float(clean[t, ids[t + 1]] - mine[t, ids[t + 1]]) for t in range(15, 28)]
    assert effect.loss_change[:-1].tolist() == pytest.approx(rise, abs=1e-5)
    assert effect.loss_change[-1].isnan()
    assert torch.equal(effect.top_changed, (clean.argmax(-1) != mine.argmax(-1))[15:])


@torch.no_grad()
def test_the_effect_of_a_model_in_half_precision_is_computed_in_full(prompt):
    replay = Replay(tiny().bfloat16(), prompt)
    run = replay.edited([E.SkipLayer(3)])
    clean, mine = (logits.double().log_softmax(-1) for logits in (replay.logits, run.logits))
    kl = (clean.exp() * (clean - mine)).sum(-1)
    torch.testing.assert_close(run.effect.kl.double(), kl, atol=1e-6, rtol=1e-3)


def test_logits_that_are_no_numbers_have_no_divergence(replay):
    effect = replay.edited([E.Scale("layers.1.attn.out", float("nan"), tokens=(15,))]).effect
    assert effect.kl.isnan().all()
    certain = replay.edited([E.Scale("logits", float("inf"), tokens=(15,))]).effect
    assert not certain.kl[0] < 1


@torch.no_grad()
def test_routing_flips_are_counted_layer_by_layer(model, prompt, replay):
    edit = E.SkipLayer(2)
    names = [f"layers.{i}.router.indices" for i in (1, 3, 5)]
    with l4.trace(model, names) as clean:
        model(**prompt)
    with E.edited(model, [edit]), l4.trace(model, names) as mine:
        model(**prompt)
    expected = {
        layer: int((clean[n].sort().values != mine[n].sort().values).any(-1).sum())
        for layer, n in zip((1, 3, 5), names, strict=True)
    }
    assert replay.edited([edit]).effect.flips == expected
    assert expected[1] == 0 < expected[3]
    assert replay.edited([E.TopK(5, 1)]).effect.flips == {1: 0, 3: 0, 5: 29}


def test_a_change_that_the_model_does_not_read_is_called_unseen(model, prompt, monkeypatch):
    replay = Replay(model, prompt)
    honest = Rows.__call__

    def ignored(self, name, value):
        honest(self, name, value)
        return value  # what an edit that nobody reads looks like

    monkeypatch.setattr(Rows, "__call__", ignored)
    effect = replay.edited([E.AblateHead(3, 1)]).effect
    assert effect.unseen == ["layers.3.attn.z"]
    assert "NOT SEEN by the model: layers.3.attn.z" in str(effect)
    assert effect.kl.max() < 1e-6


def test_a_value_counts_as_read_only_with_the_checksum_that_it_was_handed_out_with():
    def read_by(between):
        witness, value = Witness(), torch.arange(6.0).view(2, 3)
        witness.follow("x", value, instead_of=torch.zeros(2, 3))
        try:
            F.silu(between(value))
        finally:
            witness.close()
        return witness.used_by.get("x")

    assert read_by(lambda x: x) == "silu"
    assert read_by(lambda x: torch.cat([x.T, x.T])[1:]) == "silu"  # through views and joins
    assert read_by(lambda x: x.fill_(7.0)) is None
    assert read_by(lambda x: x.view(6).fill_(7.0) is not None and x) is None
    assert read_by(lambda x: x.__setitem__(0, 7.0) or x) is None
    assert read_by(torch.clone) == "clone"
    assert read_by(lambda x: torch.ones(2, 3)) is None


def test_an_edit_that_changes_nothing_says_so(replay):
    effect = replay.edited([E.Scale("layers.2.resid_mid", 1.0)]).effect
    assert effect.evidence["layers.2.resid_mid"].changed == 0
    assert effect.unseen == []
    assert effect.kl.max() < 1e-9


def test_a_change_is_measured_where_both_values_are_finite(model, prompt, replay):
    name, edit = "layers.3.attn.scores", E.Scale("layers.3.attn.scores", 0.5)
    with torch.no_grad():
        plain = rows_of(model, name, prompt)[name]
    changed = replay.edited([edit]).effect.evidence[name].changed
    assert plain.isinf().any()  # keys that come later
    assert changed == pytest.approx(float(plain[plain.isfinite()].abs().max() / 2), rel=1e-4)
    broken = replay.edited([E.Scale(name, float("nan"))]).effect.evidence[name].changed
    assert math.isnan(broken)


def test_a_text_tells_the_effect_in_units(replay):
    effect = replay.edited([E.SkipLayer(3)]).effect
    text, last = str(effect), int(effect.positions[-1])
    assert f"KL from the clean run: mean {effect.kl.mean():.4f} over tokens 0 to {last}, " in text
    assert "routing flips; loss" in text
    assert text.endswith("nats a token")


def test_nothing_stays_behind_after_an_interrupt(model, prompt, replay, monkeypatch):
    plain = model(**prompt)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model.norm), "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        replay.edited([E.SkipLayer(3, tokens=(20,)), E.Chunk(1, 16)])
    monkeypatch.undo()
    assert model.tap is NO_TAP
    assert model.first_slot == 0
    assert not _get_current_function_mode_stack()  # no witness looks on
    assert torch.equal(model(**prompt), plain)


def test_a_replay_keeps_a_fixed_number_of_floats_a_token(model):
    def kept(t):
        ids = torch.randint(4, 89, (1, t), generator=torch.Generator().manual_seed(0))
        return Replay(model, ids).bytes()

    small, large = kept(40), kept(80)
    assert large <= 2 * small  # nothing grows with the square of the length
    d, kv = CONFIG.hidden_size, CONFIG.num_key_value_heads * CONFIG.head_dim
    heads = CONFIG.num_attention_heads * CONFIG.head_dim
    floats = CONFIG.num_hidden_layers * (2 * d + heads + 2 * kv) + 3 * d
    routing = 3 * CONFIG.num_experts_per_tok * 8
    assert large <= 80 * (4 * floats + routing)


def test_replays_inside_a_block_that_changes_the_model_are_refused(model, prompt, replay):
    sentence = "inside a block of intervene or edited, whose changes replayed runs would not have"
    for block in (
        l4.intervene(model, {"layers.2.resid_mid": torch.clone}),
        E.edited(model, [E.SkipLayer(2)]),
    ):
        with block:
            with pytest.raises(ValueError, match=sentence):
                Replay(model, prompt)
            with pytest.raises(ValueError, match=sentence):
                replay.edited([E.AblateHead(3, 1)])
            model(**prompt)


def test_a_hook_that_replayed_runs_would_not_call_is_refused(prompt):
    model = tiny()
    replay = Replay(model, prompt)
    handle = model.layers[2].register_forward_hook(lambda *given: given[-1] + 1)
    for run in (lambda: Replay(model, prompt), lambda: replay.edited([E.AblateAttention(0)])):
        with pytest.raises(
            ValueError, match=r"^layers\.2 has a hook, .* replayed runs would not cal"
        ):
            run()
    handle.remove()
    replay.edited([E.AblateAttention(0)])


def test_a_trace_around_replayed_runs_sees_nothing(model, prompt):
    replay = Replay(model, prompt, {"other": {"input_ids": some_prompt(1)["input_ids"][:, 12:]}})
    with l4.trace(model, "*") as cache:
        model(input_ids=prompt["input_ids"][:, 12:])
        before = {name: value.clone() for name, value in cache.items()}
        replay.edited([E.AblateHead(3, 1)])
        replay.edited([E.Patch("layers.0.attn.z", "other", (14,), (1,))])
        replay.edited([E.Scale("vision.out", 0.5)])
        assert cache.keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in cache.items())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_token_ids_of_any_whole_numbers_are_replayed(model, prompt, dtype):
    ids = prompt["input_ids"]
    effects = [Replay(model, each).edited([E.SkipLayer(2)]).effect for each in (ids, ids.to(dtype))]
    assert str(effects[0]) == str(effects[1])


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (
            {"input_ids": torch.full((2, 5), 7)},
            "one row without padding can be replayed, not 2 rows",
        ),
        (
            {"input_ids": torch.full((1, 5), 7), "attention_mask": torch.tensor([[0, 1, 1, 1, 1]])},
            "not 1 row with padding",
        ),
    ],
)
def test_batches_and_padding_are_refused(model, inputs, sentence):
    with pytest.raises(ValueError, match=sentence):
        Replay(model, inputs)


@torch.no_grad()
@pytest.mark.parametrize("edit", [E.RemoveTokens((28,)), E.Chunk(1, 500), E.Chunk(2, 29)])
def test_an_edit_that_begins_behind_the_prompt_changes_nothing(model, edit):
    prompt = some_prompt(0)
    short = tiny(attention_chunk_size=64)
    replay = Replay(short, prompt)
    run = replay.edited([edit])
    torch.testing.assert_close(run.logits, replay.logits, atol=1e-5, rtol=0)
    assert "0 routing flips" in str(run.effect)


def test_ids_can_be_replayed_and_what_was_not_routed_is_named(model):
    ids = torch.arange(5, 12)
    replay = Replay(model, ids)
    assert torch.equal(replay.logits, Replay(model, {"input_ids": ids[None]}).logits)
    with pytest.raises(ValueError, match=r"no layers.2.router.logits: MoE layers are 1, 3, 5"):
        replay.edited([]).router(2, "logits")


@pytest.mark.parametrize("backend", ["loop", "numba"])
def test_what_reads_an_edit_of_routing_is_an_operation_of_the_model(backend, prompt):
    model = tiny()
    model.backend = backend
    replay = Replay(model, prompt)
    layer = next(iter(replay.experts))
    for edit, point, reader in (
        (E.RouterTemperature(layer, 2.0), "router.logits", "topk"),
        (E.Route(layer, 3, 1), "router.indices", "gather"),
        (E.AblateShared(layer), "shared.out", "add"),
    ):
        seen = replay.edited([edit]).effect.evidence[f"layers.{layer}.{point}"]
        assert seen.used_by == (reader if backend == "loop" else "moe_block")


def test_the_clean_source_is_always_the_replayed_run(model, prompt, replay):
    edit = E.AblateHead(3, 1, "mean")
    mine = Replay(model, prompt, {"clean": some_prompt(1)}).edited([edit]).logits
    assert torch.equal(mine, replay.edited([edit]).logits)


@torch.no_grad()
def test_logits_of_some_positions_are_those_of_all(replay):
    for edits in ([E.Scale("logits", 2.0, tokens=(13, 20))], [E.SkipLayer(2, tokens=(9,))]):
        run = replay.edited(edits)
        for which in (slice(-1, None), slice(4, 9), slice(7, 8), slice(None, 3)):
            expected = run.logits[run.first :][which]
            torch.testing.assert_close(run.logits_of(which), expected, atol=1e-5, rtol=0)


def test_a_bar_is_shown_for_many_runs_unless_it_is_refused(model, prompt, monkeypatch):
    shown, honest = [], tqdm.auto.tqdm

    def bar(*args, disable, **options):
        shown.append(not disable)
        return honest(*args, disable=True, **options)

    monkeypatch.setattr("llama4_lab.replay.tqdm", bar)
    runs = [[E.SkipLayer(4)], [E.SkipLayer(5)]]
    for progress in (True, False):
        replay = Replay(model, prompt, progress=progress)
        replay.many(runs)
        replay.edited(runs[0])
    assert shown == [True, False, False, False]


def test_logits_of_a_slice_with_steps_are_refused(replay):
    with pytest.raises(ValueError, match=r"slice\(0, 10, 2\) has steps: give neighbours"):
        replay.edited([E.SkipLayer(1)]).logits_of(slice(0, 10, 2))


def test_a_run_is_shown_in_a_line(replay):
    run = replay.edited([E.SkipLayer(1)])
    assert repr(run) == f"Edited([SkipLayer(layer=1, tokens=None)]): {run.effect}"
