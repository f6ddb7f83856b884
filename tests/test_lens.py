"""The lens reads what the model computes, and the parts of a logit add up to it."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import CONFIG

import llama4_lab as l4
from llama4_lab.analysis import lens as lens_module
from llama4_lab.analysis.decomposition import (
    Decomposition,
    decompose_logit,
    decompose_router,
    written,
)
from llama4_lab.analysis.lens import logit_lens
from llama4_lab.edits import (
    AblateAttention,
    AblateHead,
    KnockOut,
    RemoveTokens,
    Scale,
    SkipLayer,
    edited,
)
from llama4_lab.prompt import Prompt, build_prompt

pytestmark = pytest.mark.usefixtures("no_grad")

TEXT = "What's the colour of the circle? The circle is red."
STREAM = ["embed"] + [f"layers.{i}.resid_{at}" for i in range(6) for at in ("mid", "post")]
TOLERANCE = 1e-4  # logits, float32; what the toolkit promises


def sized(**changes) -> l4.Llama4:
    """A tiny model in which no weight has its neutral value."""
    sizes = {"vocab_size": 336, "image_token_index": 335, "attention_bias": True}
    model = l4.random(CONFIG.replace(**(sizes | changes))).eval()
    model.backend = "loop"  # that of watched experts, so that sums are compared to the bit
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def model() -> l4.Llama4:
    return sized()


@pytest.fixture(scope="module")
def prompt(tokenizer) -> Prompt:
    picture = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    images = [Image.fromarray(picture)]
    sizes = {"image_size": 24, "patch_size": 4, "shuffle_ratio": 0.5}
    return build_prompt(tokenizer, TEXT, images, **sizes)


@pytest.fixture(scope="module")
def patch(prompt) -> int:
    """A position of an image patch."""
    return int((prompt.spans.patch[0] >= 0).nonzero()[-1])


def traced(model, prompt, names):
    with l4.trace(model, names) as cache:
        logits = model(**prompt)
    return cache, logits


# The lens


def test_the_lens_at_the_last_point_is_what_the_model_says(model, prompt):
    lens = logit_lens(model, prompt, keep_logprobs=True, top=7)
    expected = model(**prompt)[0].log_softmax(-1)
    ranked = expected.topk(7)
    assert lens.points == STREAM
    np.testing.assert_array_equal(lens.positions, range(len(prompt.tokens)))
    np.testing.assert_allclose(lens.logprobs[-1], expected, atol=1e-5)
    np.testing.assert_allclose(lens.top_logprob[-1], ranked.values, atol=1e-5)
    np.testing.assert_array_equal(lens.top_token[-1], ranked.indices)
    np.testing.assert_array_equal(lens.target, ranked.indices[:, 0])
    np.testing.assert_allclose(lens.kl[-1], 0, atol=1e-6)
    assert (lens.target_rank[-1] == 0).all()


@pytest.mark.parametrize("edit", [SkipLayer(2), Scale("final_norm", 2.0), Scale("logits", 2.0)])
def test_the_lens_reads_a_run_that_was_kept(model, prompt, edit):
    with edited(model, [edit]):
        lens = logit_lens(model, prompt, [2, -1], target=[17, 200])
        kept = written(model, prompt)
    again = logit_lens(model, prompt, [2, -1], target=[17, 200], kept=kept)
    assert again.points == lens.points
    for name in ("positions", "target", "top_token", "top_logprob", "target_rank", "kl"):
        np.testing.assert_allclose(getattr(again, name), getattr(lens, name), atol=1e-5)
    clean = logit_lens(model, prompt, [2, -1])
    assert not np.allclose(clean.kl, again.kl, atol=0.01)


def test_each_point_is_read_through_the_final_norm(model, prompt):
    lens = logit_lens(model, prompt, [-1, 3], target=[17, 200], keep_logprobs=True)
    cache, logits = traced(model, prompt, STREAM)
    final = logits[0, [-1, 3]].log_softmax(-1)
    np.testing.assert_array_equal(lens.positions, [len(prompt.tokens) - 1, 3])
    for row, name in enumerate(STREAM):
        x = cache[name][0, [-1, 3]].double()
        x = x / (x.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps).sqrt()
        expected = (x.float() * model.norm.weight @ model.lm_head.weight.T).log_softmax(-1)
        kl = F.kl_div(expected, final, reduction="none", log_target=True).sum(-1)
        np.testing.assert_allclose(lens.logprobs[row], expected, atol=1e-5)
        np.testing.assert_allclose(lens.kl[row], kl, atol=1e-5)
        for at, token in enumerate([17, 200]):
            order = expected[at].argsort(descending=True).tolist()
            assert lens.target_rank[row, at] == order.index(token)
            np.testing.assert_array_equal(lens.top_token[row, at], order[:5])
            assert lens.target_logprob[row, at] == pytest.approx(
                expected[at, token].item(), abs=1e-5
            )
    assert lens.kl[0].min() > 0.1  # the points do differ


def test_the_lens_does_not_depend_on_how_many_positions_it_reads_at_once(
    model, prompt, monkeypatch
):
    target = [*range(9, 9 + len(prompt.tokens))]
    whole = logit_lens(model, prompt, target=target)
    monkeypatch.setattr(lens_module, "_LOGITS_AT_ONCE", 3 * 336)
    pieces = logit_lens(model, prompt, target=target)
    assert whole.logprobs is None
    np.testing.assert_array_equal(pieces.top_token, whole.top_token)
    np.testing.assert_array_equal(pieces.target_rank, whole.target_rank)
    np.testing.assert_array_equal(pieces.target, target)
    for name in ("top_logprob", "target_logprob", "kl"):
        one, other = getattr(pieces, name), getattr(whole, name)
        np.testing.assert_allclose(one, other, atol=1e-6, rtol=1e-6)  # a few float32 roundings


def test_the_lens_reads_the_points_that_are_asked_for(model, prompt):
    lens = logit_lens(model, prompt, [4], points="layers.*.resid_pre")
    usual = logit_lens(model, prompt, [4])
    assert lens.points == [f"layers.{i}.resid_pre" for i in range(6)]
    np.testing.assert_array_equal(lens.kl, usual.kl[:-1:2])
    np.testing.assert_array_equal(logit_lens(model, prompt, 4).kl, usual.kl)


def test_the_lens_keeps_the_whole_vocabulary_if_asked(model, prompt):
    lens = logit_lens(model, prompt, [4], top=336, target=9)
    np.testing.assert_allclose(np.exp(lens.top_logprob).sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal((lens.top_token == 9).argmax(-1), lens.target_rank)
    with pytest.raises(ValueError, match="top 337 is out of range: choose 1 to 336"):
        logit_lens(model, prompt, top=337)


def test_the_lens_may_read_nowhere(model, prompt):
    lens = logit_lens(model, prompt, [])
    assert lens.top_token.shape == (13, 0, 5)
    assert lens.kl.shape == (13, 0)


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        ({"positions": [0, 99]}, "position 99 is out of range: this prompt has {n} tokens (0 to"),
        ({"target": 336}, "token id 336 is out of range: this vocabulary has ids 0 to 335"),
        ({"target": [1, 2]}, "2 targets do not fit {n} positions: give one token id for all, or"),
        ({"top": 0}, "top 0 is out of range: choose 1 to 336"),
        ({"points": "layers.0.attn.out"}, "'layers.0.attn.out' is no point of the residual stream"),
        ({"points": "vision.layers.0.resid_mid"}, "'vision.layers.0.resid_mid' is no point of"),
    ],
)
def test_the_lens_explains_what_it_cannot_read(model, prompt, wish, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence.format(n=len(prompt.tokens)))):
        logit_lens(model, prompt, **wish)


# The parts of a logit


def rows_of(decomposition: Decomposition, kind: str, layer: int) -> dict[int, float]:
    """The values of one kind and layer by index."""
    parts = zip(
        decomposition.kind,
        decomposition.layer,
        decomposition.index.tolist(),
        decomposition.values.tolist(),
        strict=True,
    )
    return {index: value for k, at, index, value in parts if (k, at) == (kind, layer)}


@pytest.mark.parametrize("sources", [False, True])
def test_the_parts_of_a_logit_add_up_to_it(model, prompt, sources):
    logits = model(**prompt)[0]
    for position in range(0, len(prompt.tokens), 3):
        parts = decompose_logit(model, prompt, position, sources=sources)
        assert (parts.position, parts.target) == (position, logits[position].argmax())
        assert parts.total == pytest.approx(logits[position].max().item(), abs=TOLERANCE)
        assert parts.values.sum() == pytest.approx(parts.total, abs=TOLERANCE)
        assert parts.residual == abs(parts.values.sum() - parts.total)


def test_the_parts_add_up_without_dense_layers_and_biases_too(prompt):
    model = sized(interleave_moe_layer_step=1, num_experts_per_tok=1, attention_bias=False)
    parts = [decompose_logit(model, prompt), *(decompose_router(model, prompt, i) for i in (0, 5))]
    assert [len(part.kind) for part in parts] == [1 + 6 * 6 + 6 * 2, 1 + 6, 1 + 6 * 6 + 5 * 2]
    assert all(part.residual < TOLERANCE for part in parts)
    assert not any("bias" in part.kind for part in parts)


@pytest.mark.parametrize("sources", [False, True])
@pytest.mark.parametrize("edit", [SkipLayer(2), AblateAttention(3, "mean")])
def test_what_an_edit_takes_from_heads_is_a_part_of_its_own(model, prompt, edit, sources):
    runs = {"clean": prompt}
    with edited(model, [edit], runs), l4.trace(model, "layers.*.attn.out") as cache:
        parts = decompose_logit(model, prompt, sources=sources)
        kept = written(model, prompt)
    again = decompose_logit(model, prompt, target=parts.target, kept=kept)
    assert max(parts.residual, again.residual) < TOLERANCE
    assert parts.kind.count("edit") == again.kind.count("edit") == 1
    assert f"layer {edit.layer}: an edit of what its heads wrote" in parts.labels
    if edit == SkipLayer(2):
        assert parts.by_layer()[2] == pytest.approx(0, abs=TOLERANCE)
    assert len(cache) == 6


@pytest.mark.parametrize("sources", [False, True])
def test_what_an_edit_takes_from_a_routers_own_layer_is_a_part_too(model, prompt, sources):
    with edited(model, [AblateAttention(3, "mean")], {"clean": prompt}):
        parts = decompose_router(model, prompt, 3, sources=sources)
    assert parts.residual < TOLERANCE
    assert rows_of(parts, "edit", 3).keys() == {-1}


def test_two_logits_can_be_compared(model, prompt):
    logits = model(**prompt)[0, -1]
    best, second = logits.topk(2).indices.tolist()
    one, other, both = (
        decompose_logit(model, prompt, target=a, versus=b)
        for a, b in ((best, None), (second, None), (None, "runner_up"))
    )
    assert (both.target, both.versus) == (best, second)
    assert both.total == pytest.approx((logits[best] - logits[second]).item(), abs=TOLERANCE)
    np.testing.assert_allclose(both.values, one.values - other.values, atol=1e-5)
    third = logits.topk(3).indices[2]
    assert decompose_logit(model, prompt, target=second, versus="runner_up").versus == third


@pytest.mark.parametrize("sources", [False, True])
def test_the_parts_of_a_router_logit_add_up_to_it(model, prompt, patch, sources):
    for layer in (1, 3, 5):
        cache, _ = traced(model, prompt, f"layers.{layer}.router.*")
        for position in (0, patch, len(prompt.tokens) - 1):
            logits = cache[f"layers.{layer}.router.logits"][0, position]
            ranked = logits.argsort(descending=True).tolist()
            why = decompose_router(model, prompt, layer, position, sources=sources)
            assert why.target == ranked[0]
            assert why.total == logits.max()
            assert why.residual < TOLERANCE
            margin = decompose_router(
                model, prompt, layer, position, ranked[1], "runner_up", sources=sources
            )
            assert margin.versus == ranked[2]  # top-2: the best that was not chosen
            assert margin.total == logits[ranked[1]] - logits[ranked[2]]
            assert margin.residual < TOLERANCE


def zero(*where):
    def change(value):
        value = value.clone()
        value[(0, *where)] = 0
        return value

    return change


def lost(model, prompt, position, point, where, written):
    """What the stream at `written` loses at a position when a value is zero at `where`."""
    clean, _ = traced(model, prompt, [point, written])
    with l4.intervene(model, {point: zero(*where)}):
        changed, _ = traced(model, prompt, [point, written])
    return (clean[written] - changed[written])[0, position].double()


def frozen(model, prompt, read, norm, row):
    """What the stream at `read` is multiplied by at each position, for the logit of a row."""
    x = traced(model, prompt, read)[0][read][0].double()
    scale = (x.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps) ** -0.5
    return scale * norm.weight * row


@pytest.mark.parametrize("layer", [0, 3])  # a dense RoPE and a MoE NoPE layer
def test_each_part_is_what_the_stream_loses_without_it(model, prompt, patch, layer):
    at = f"layers.{layer}."
    direction = frozen(model, prompt, "layers.5.resid_post", model.norm, model.lm_head.weight[50])
    chosen = traced(model, prompt, "layers.3.router.indices")[0]["layers.3.router.indices"][0]
    falling = int((chosen[:, 0] > chosen[:, 1]).nonzero()[-1])  # experts in no order of numbers

    for position in (patch, falling, len(prompt.tokens) - 1):
        parts = decompose_logit(model, prompt, position, target=50)

        def share(point, *where, written="resid_post", position=position):
            change = lost(model, prompt, position, at + point, (position, *where), at + written)
            return (change @ direction[position]).item()

        expected = {("head", head): share("attn.z", head, written="resid_mid") for head in range(6)}
        if layer == 0:
            expected["mlp", -1] = share("mlp.out")
        else:
            expected["shared", -1] = share("shared.out")
            for slot, expert in enumerate(chosen[position].tolist()):
                expected["expert", expert] = share("experts.out", slot)
        found = {
            (kind, index): value
            for kind in ("head", "mlp", "shared", "expert")
            for index, value in rows_of(parts, kind, layer).items()
        }
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("layer", [1, 3])  # inside chunks of eight, and over all of the past
def test_a_source_is_what_the_heads_lose_without_its_values(model, prompt, patch, layer):
    position, block, at = patch + 3, model.layers[layer], f"layers.{layer}."
    parts = decompose_router(model, prompt, layer, position, sources=True)
    row = block.feed_forward.router.weight[parts.target]
    direction = frozen(model, prompt, at + "resid_mid", block.post_attention_layernorm, row)
    text, patches = (rows_of(parts, f"{kind}_source", layer) for kind in ("text", "patch"))
    first = position // 8 * 8 if layer == 1 else 0
    expected = {}
    for source in range(first, position + 1):
        change = lost(model, prompt, position, at + "attn.v", [source], at + "resid_mid")
        expected[source] = (change @ direction[position]).item()
    assert text | patches == pytest.approx(expected, abs=1e-5)
    is_patch = prompt.spans.patch[0] >= 0
    assert patches
    assert all(is_patch[list(patches)])
    assert not any(is_patch[list(text)])
    heads = rows_of(decompose_router(model, prompt, layer, position), "head", layer)
    assert sum(expected.values()) == pytest.approx(sum(heads.values()), abs=1e-5)


def test_sources_are_right_behind_padding(model, prompt):
    padded = replace(
        prompt,
        input_ids=F.pad(prompt.input_ids, (3, 0)),
        attention_mask=F.pad(prompt.attention_mask, (3, 0)),
        texts=[["<pad>"] * 3 + prompt.tokens],
    )
    for position in (3, 12, -1):
        parts = decompose_logit(model, padded, position, sources=True)
        assert parts.residual < TOLERANCE
        assert min(rows_of(parts, "text_source", 3)) == 3


def test_what_enters_is_named_for_what_it_is(model, prompt, patch):
    embed = traced(model, prompt, "embed")[0]["embed"][0].double()
    direction = frozen(model, prompt, "layers.5.resid_post", model.norm, model.lm_head.weight[50])
    expected = (embed * direction).sum(-1)
    for position, kind in ((patch, "patch"), (0, "embed")):
        found = rows_of(decompose_logit(model, prompt, position, 50), kind, -1)
        assert found == pytest.approx({position: expected[position].item()}, abs=1e-5)


def test_sums_and_labels_cover_all_parts(model, prompt):
    parts = decompose_logit(model, prompt)
    kinds = {"embed": 1, "head": 36, "bias": 6, "mlp": 3, "shared": 3, "expert": 6}
    assert {kind: parts.kind.count(kind) for kind in parts.by_kind()} == kinds
    assert list(parts.by_layer()) == [-1, 0, 1, 2, 3, 4, 5]
    for sums in (parts.by_kind(), parts.by_layer()):
        assert sum(sums.values()) == pytest.approx(parts.values.sum())
    heads = [kind == "head" for kind in parts.kind]
    assert parts.by_kind()["head"] == pytest.approx(parts.values[heads].sum())
    assert parts.by_layer()[2] == pytest.approx(parts.values[parts.layer == 2].sum())
    assert parts.labels[:2] == ["token embedding", "layer 0 head 0"]
    assert len(set(parts.labels)) == len(parts.labels)
    ranked = parts.strongest(5)
    sizes = np.sort(np.abs(parts.values))[::-1]
    np.testing.assert_allclose([abs(value) for _, value in ranked], sizes[:5])


def test_a_planted_head_is_the_first_reason_of_the_router(tokenizer):
    model = sized()
    prompt = build_prompt(tokenizer, TEXT)
    reader, writer, width = model.layers[3], model.layers[2].self_attn, CONFIG.head_dim
    wanted = reader.feed_forward.router.weight[4] * reader.post_attention_layernorm.weight
    head = slice(4 * width, 5 * width)  # head 4 reads key/value head 1
    writer.v_proj.bias[width : 2 * width] = 3.0
    writer.o_proj.weight[:, head] = 2 * wanted[:, None] / wanted.norm()
    why = decompose_router(model, prompt, 3)
    assert why.target == 4
    (first, value), (_, second) = why.strongest(2)
    assert first == "layer 2 head 4"
    assert value > 3 * abs(second)


def test_a_planted_patch_is_the_first_reason_of_a_logit(model, prompt, patch):
    """Values at one patch are turned into what the read-out of one token looks for."""
    position, target, last = patch + 2, 77, model.layers[5].self_attn
    wanted = model.lm_head.weight[target] * model.norm.weight
    write = last.o_proj.weight.unflatten(1, (2, 3, -1)).sum(dim=2)  # what all heads of a pair add
    value = torch.einsum("d, dkx -> kx", wanted, write)

    def plant(v):
        v = v.clone()
        v[0, patch] = 20 * value / value.norm()
        return v

    with l4.intervene(model, {"layers.5.attn.v": plant}):
        parts = decompose_logit(model, prompt, position, target, sources=True)
    assert parts.strongest(1)[0][0] == f"layer 5 from image patch at {patch}"
    assert parts.residual < TOLERANCE


def test_without_a_picture_there_are_no_patches(model, prompt, patch):
    for sources in (False, True):
        parts = decompose_logit(model, replace(prompt, pixel_values=None), patch, sources=sources)
        assert {"patch", "patch_source"}.isdisjoint(parts.kind)
        assert parts.residual < TOLERANCE


def test_bfloat16_says_how_much_its_rounding_took(prompt):
    model = sized().bfloat16()
    logits = model(**prompt)[0, -1]
    rounded = logits[17] - logits
    exact = logits[17].float() - logits.float()
    versus = int((rounded != exact).nonzero()[0])
    parts = decompose_logit(model, prompt, target=17, versus=versus)
    assert parts.total == exact[versus]
    assert 0 < parts.residual < 0.2
    assert parts.values.dtype == np.float64


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda m, p: decompose_logit(m, p, 99), "position 99 is out of range: this prompt has"),
        (
            lambda m, p: decompose_logit(m, p, target=-1),
            "token id -1 is out of range: this vocabulary has ids 0 to 335",
        ),
        (
            lambda m, p: decompose_router(m, p, 3, expert=0, versus=5),
            "expert 5 is out of range: layer 3 has experts 0 to 4",
        ),
        (
            lambda m, p: decompose_router(m, p, 2),
            "layer 2 has no experts: the MoE layers are 1, 3, 5",
        ),
        (
            lambda m, p: decompose_router(sized(num_experts_per_tok=5), p, 3, versus="runner_up"),
            "there is no runner-up, for all 5 are chosen: give the one to compare",
        ),
    ],
)
def test_a_decomposition_that_cannot_be_made_is_explained(model, prompt, ask, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ask(model, prompt)


def test_a_batch_is_refused(model, tokenizer):
    batch = build_prompt(tokenizer, ["one", "two"])
    for ask in (logit_lens, decompose_logit, lambda m, p: decompose_router(m, p, 1)):
        with pytest.raises(ValueError, match="this prompt has 2 rows: take one"):
            ask(model, batch)


def test_the_weights_of_a_divided_model_are_not_taken_for_the_whole(model, prompt, monkeypatch):
    monkeypatch.setattr(model, "ranks", SimpleNamespace(size=2))
    for ask in (decompose_logit, lambda m, p: decompose_router(m, p, 1)):
        with pytest.raises(ValueError, match="this rank holds one part of 2: load the model whole"):
            ask(model, prompt)


@pytest.mark.parametrize("edit", [RemoveTokens((2,)), KnockOut((4,), (2,)), AblateHead(3, 1)])
def test_heads_whose_patterns_are_changed_are_not_split_by_sources(model, prompt, edit):
    with edited(model, [edit]):
        with pytest.raises(ValueError, match=r"attn\.\w+ is changed here, and sources=True makes"):
            decompose_logit(model, prompt, sources=True)
        if edit == AblateHead(3, 1):  # behind what the router of layer 1 reads
            decompose_router(model, prompt, 1, sources=True)
            with pytest.raises(ValueError, match=r"layers\.3\.attn\.z is changed here"):
                decompose_router(model, prompt, 3, sources=True)
        assert decompose_logit(model, prompt).residual < TOLERANCE
