"""Attributions by captum: closed forms, completeness, and our gates beside captum's own inputs."""

import re

import numpy as np
import pytest
import torch
import tqdm.std
from PIL import Image
from tiny import CONFIG

import llama4_lab as l4
from llama4_lab.analysis import attribution
from llama4_lab.analysis.attribution import METHODS, attribute, conductance
from llama4_lab.analysis.captum_models import for_captum
from llama4_lab.analysis.expert_features import decision_features, expert_features
from llama4_lab.analysis.features import Features, Target, patch_features, token_features
from llama4_lab.edits import (
    AblateExpert,
    Route,
    RouterBias,
    RouterTemperature,
    Scale,
    SkipLayer,
    TopK,
    edited,
)
from llama4_lab.prompt import Prompt, build_prompt

TEXT = "The user asks"
GRADIENTS = "integrated_gradients"


@pytest.fixture(scope="module")
def model(tokenizer) -> l4.Llama4:
    return opened(tokenizer)


def opened(tokenizer, **changes) -> l4.Llama4:
    """A tiny model with the tokenizer's ids."""
    config = CONFIG.replace(
        vocab_size=336,
        bos_token_id=tokenizer.bos_id,
        pad_token_id=tokenizer.pad_id,
        image_token_index=tokenizer.patch_id,
        num_hidden_layers=4,
        **changes,
    )
    model = l4.random(config, seed=3).eval()
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="module")
def prompt(tokenizer) -> Prompt:
    return build_prompt(tokenizer, TEXT)


@pytest.fixture(scope="module")
def picture(tokenizer) -> Prompt:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    return build_prompt(tokenizer, "is it", [image], image_size=24, patch_size=4, shuffle_ratio=0.5)


def toy(value, count: int) -> Features:
    places = np.arange(count)[:, None]
    labels = [f"part {i}" for i in range(count)]
    return Features(
        ("part",), places, labels, lambda on, _: value(on), Target(0, 0), torch.device("cpu")
    )


@torch.no_grad()
def log_probability(model, prompt, position=-1):
    return model(**prompt)[0, position].log_softmax(dim=-1)


@pytest.mark.parametrize("method", METHODS)
def test_of_a_weighted_sum_each_part_gets_its_weight(method):
    weights = torch.tensor([3.0, -1.0, 0.0, 0.5])
    found = attribute(toy(lambda on: 7 + on @ weights, 4), method, samples=2)
    np.testing.assert_allclose(found.values, weights, atol=1e-6)
    assert (found.all_off, found.all_on) == (7.0, 9.5)
    assert found.completeness_error < 1e-6


def test_of_a_product_shapley_halves_what_ablation_gives_twice():
    product = toy(lambda on: on[:, 0] * on[:, 1], 3)
    np.testing.assert_allclose(attribute(product, "shapley").values, [0.5, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(attribute(product, GRADIENTS).values, [0.5, 0.5, 0], atol=1e-6)
    ablated = attribute(product, "feature_ablation")
    np.testing.assert_allclose(ablated.values, [1, 1, 0])
    assert ablated.completeness_error == 1.0
    less = attribute(toy(lambda on: -on[:, 0] * on[:, 1], 3), "feature_ablation")
    assert less.completeness_error == 1.0


def test_exact_shapley_values_take_so_many_features_and_no_more(monkeypatch):
    monkeypatch.setattr(attribution, "_MOST_EXACT", 3)
    assert len(attribute(toy(lambda on: on.sum(1), 3), "shapley").values) == 3
    with pytest.raises(ValueError, match="take at most 3 features, these are 4"):
        attribute(toy(lambda on: on.sum(1), 4), "shapley")


def test_completeness_of_nothing_is_perfect_and_of_something_from_nothing_hopeless():
    nothing = attribute(toy(lambda on: 0 * on.sum(dim=1), 2), "shapley")
    assert nothing.completeness_error == 0.0
    either = toy(lambda on: (on[:, 0] - on[:, 1]).abs(), 2)
    assert attribute(either, "feature_ablation").completeness_error == np.inf


def test_exact_shapley_values_run_each_coalition_once():
    asked = []

    def value(on):
        asked.extend(map(tuple, on.tolist()))
        return on.sum(dim=1)

    attribute(toy(value, 4), "shapley", batch_size=3)
    once = asked[2:]  # behind the two ends
    assert len(once) == len(set(once)) == 16


def test_sampled_shapley_values_come_from_the_seed_and_leave_generators_alone(monkeypatch):
    parts = toy(lambda on: on.cumprod(dim=1).sum(dim=1), 6)
    state = torch.random.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("a GPU was seeded"))
    one, again, other = (attribute(parts, samples=3, seed=seed).values for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_gradients_are_taken_inside_inference_mode_too(model, prompt, picture):
    def found():
        features = token_features(model, prompt), expert_features(model, prompt)
        asked = [attribute(each, GRADIENTS) for each in (*features, patch_features(model, picture))]
        return [each.values for each in (*asked, conductance(model, prompt, 1))]

    with torch.inference_mode():
        inside = found()
    for one, other in zip(found(), inside, strict=True):
        np.testing.assert_array_equal(one, other)


def test_integrated_gradients_find_a_narrow_rise():
    steep = toy(lambda on: torch.tanh(on.sum(dim=1) / 2e-4), 2)
    assert attribute(steep, GRADIENTS, max_pieces=1).completeness_error > 0.1
    found = attribute(steep, GRADIENTS)
    assert found.completeness_error < 0.005
    np.testing.assert_allclose(found.values, [0.5, 0.5], atol=0.003)


def test_the_way_is_cut_into_no_more_than_max_pieces():
    rows = []

    def jump(on):
        rows.append(len(on))
        return (on.sum(dim=1) > 0.3).float() + 0 * on.sum(dim=1)

    attribute(toy(jump, 2), GRADIENTS, max_pieces=3)
    evaluated = 5  # the whole, two halves, two quarters, each at 16 points
    assert sum(rows) == evaluated * (16 + 2) + 2 * 2  # and at the ends


@pytest.mark.parametrize("routing", [False, True])
def test_with_all_tokens_on_the_target_is_the_models(model, prompt, routing):
    logits = log_probability(model, prompt)
    features = token_features(model, prompt)
    off, on = features.ends(routing)
    assert features.target == Target(int(logits.argmax()), len(prompt.tokens) - 1)
    assert features.labels == prompt.tokens
    assert on == pytest.approx(float(logits.max()), abs=1e-5)
    assert off != on


def test_with_all_tokens_off_the_prompt_is_padding(model, prompt):
    target = Target(token=5, position=2, quantity="logit")
    off, _ = token_features(model, prompt, target).ends(False)
    with torch.no_grad():
        blank = model(torch.full_like(prompt.input_ids, model.config.pad_token_id))
    assert off == pytest.approx(float(blank[0, 2, 5]), abs=1e-5)


def test_ablation_of_a_token_is_the_change_of_log_probability(model, prompt):
    target = Target(token=9)
    found = attribute(
        token_features(model, prompt, target, positions=[1, -1], baseline=7), "feature_ablation"
    )
    for value, position in zip(found.values, (1, len(prompt.tokens) - 1), strict=True):
        ids = prompt.input_ids.clone()
        ids[0, position] = 7
        with torch.no_grad():
            without = model(ids)[0, -1].log_softmax(dim=-1)[9]
        assert value == pytest.approx(float(log_probability(model, prompt)[9] - without), abs=1e-5)
    assert found.places.tolist() == [[1], [len(prompt.tokens) - 1]]


@pytest.mark.parametrize("method", ["feature_ablation", "shapley_sampling", GRADIENTS])
def test_tokens_behind_the_position_get_nothing(model, prompt, method):
    features = token_features(model, prompt, Target(position=3))
    found = attribute(features, method, samples=2, batch_size=5)
    np.testing.assert_allclose(found.values[4:], 0, atol=1e-6)
    assert (found.values[:4] != 0).all()


@pytest.mark.parametrize("method", ["shapley_sampling", GRADIENTS])
def test_tokens_add_up_to_the_change(model, prompt, method):
    found = attribute(token_features(model, prompt), method, samples=2)
    assert found.fixed_routing == (method == GRADIENTS)
    assert found.completeness_error < (0.01 if method == GRADIENTS else 1e-4)


def test_gates_of_tokens_integrate_as_captum_does_at_the_embedding(tokenizer, prompt):
    from captum.attr import LayerIntegratedGradients

    dense = opened(tokenizer, interleave_moe_layer_step=0)
    found = attribute(token_features(dense, prompt, Target(5), baseline="bos"), GRADIENTS)
    captum = LayerIntegratedGradients(
        lambda ids: dense(ids)[:, -1].log_softmax(dim=-1), dense.embed_tokens
    )
    bos = torch.full_like(prompt.input_ids, dense.config.bos_token_id)
    values = captum.attribute(prompt.input_ids, bos, target=5, n_steps=200)[0].sum(dim=-1)
    np.testing.assert_allclose(found.values, values.numpy(), atol=0.01 * abs(values).max())


def test_fixed_routing_keeps_the_experts_of_the_clean_run(model, prompt):
    features = token_features(model, prompt)
    with l4.trace(model, "layers.*.router.indices") as clean:
        log_probability(model, prompt)
    for fixed in (True, False):
        with l4.trace(model, "layers.*.router.indices") as found:
            features.ends(fixed)
        kept = [torch.equal(found[name], x.expand_as(found[name])) for name, x in clean.items()]
        assert all(kept) == fixed


def test_a_baseline_may_be_an_embedding(model, prompt):
    embedding = model.embed_tokens.weight[7].detach()
    for given in (embedding, embedding.double()):
        found = token_features(model, prompt, baseline=given).ends(False)
        assert found == token_features(model, prompt, baseline=7).ends(False)


@pytest.mark.parametrize("layer", [0, 3])
def test_conductance_of_every_layer_adds_up_to_the_change(model, prompt, layer):
    found = conductance(model, prompt, layer, max_pieces=2)
    assert found.completeness_error < 0.01
    assert found.axes == ("token",)


def test_behind_the_last_layer_everything_passes_the_position_that_is_read(model, prompt):
    values = conductance(model, prompt, 3, Target(position=2)).values
    assert values[2] != 0
    np.testing.assert_allclose(np.delete(values, 2), 0, atol=1e-6)


def test_image_tokens_are_tokens(model, picture):
    at = picture.spans.tile[0].ge(0).nonzero().flatten().tolist()
    found = attribute(token_features(model, picture, positions=at), samples=2)
    assert found.labels == ["<|patch|>"] * 9
    assert found.completeness_error < 1e-4
    assert (found.values != 0).all()


@pytest.mark.parametrize("method", ["shapley_sampling", GRADIENTS])
def test_patches_add_up_to_the_change(model, picture, method):
    features = patch_features(model, picture)
    assert features.labels[5] == "tile 0, row 1, column 2"
    assert features.places[5].tolist() == [0, 1, 2]
    found = attribute(features, method, samples=2)
    assert found.all_on == pytest.approx(float(log_probability(model, picture).max()), abs=1e-5)
    assert found.completeness_error < (0.01 if method == GRADIENTS else 1e-4)


def test_ablation_of_a_patch_blanks_its_pixels_and_no_others(model, picture):
    features = patch_features(model, picture, Target(8), blank=-1.0)
    value = attribute(features, "feature_ablation").values[5]
    pixels = picture.pixel_values.clone()
    pixels[0, :, 8:16, 16:24] = -1.0
    with torch.no_grad():
        without = model(picture.input_ids, pixels)[0, -1].log_softmax(dim=-1)[8]
    assert value == pytest.approx(float(log_probability(model, picture)[8] - without), abs=1e-5)


def test_pixels_integrate_as_captum_does(tokenizer, picture):
    from captum.attr import IntegratedGradients

    dense = opened(tokenizer, interleave_moe_layer_step=0)
    found = attribute(patch_features(dense, picture, Target(8), side=1), GRADIENTS)

    def value(pixels):
        rows = picture.input_ids.expand(len(pixels), -1)
        return dense(rows, pixels.flatten(0, 1))[:, -1].log_softmax(dim=-1)

    pixels = picture.pixel_values[None]
    captum = IntegratedGradients(value).attribute(
        pixels, 0, target=8, n_steps=400, internal_batch_size=16
    )
    per_pixel = captum.sum(dim=2).flatten()
    np.testing.assert_allclose(found.values, per_pixel, atol=0.02 * float(per_pixel.abs().max()))


@pytest.mark.parametrize(
    "features", [token_features, patch_features, expert_features, decision_features]
)
@torch.no_grad()
def test_gates_serve_a_model_in_bfloat16(tokenizer, picture, features):
    model = opened(tokenizer).bfloat16()
    clean = model(**picture)[0, -1].float().log_softmax(dim=-1)[7].item()
    for fixed_routing in (False, True):
        off, on = features(model, picture, Target(token=7)).ends(fixed_routing)
        assert on == pytest.approx(clean, abs=0.01) != off


@torch.no_grad()
def test_a_gate_of_one_leaves_a_token_as_it_is_to_the_bit(tokenizer, prompt):
    model = opened(tokenizer).bfloat16()
    with l4.trace(model, "embed") as clean:
        model(**prompt)
    features = token_features(model, prompt)
    with l4.trace(model, "embed") as seen:
        features.ends(fixed_routing=False)
    off, on = seen["embed"]
    assert torch.equal(on, clean["embed"][0])
    assert torch.equal(off, model.embed_tokens.weight[tokenizer.pad_id].expand_as(off))


def test_captum_explains_text_through_the_adapter(model, prompt):
    from captum.attr import FeatureAblation, LLMAttribution, TextTemplateInput, TextTokenInput

    module, tokenizer = for_captum(model)
    explain = LLMAttribution(FeatureAblation(module), tokenizer)
    pad = model.config.pad_token_id
    text = TextTokenInput(TEXT, tokenizer, baselines=pad)
    assert text.values == prompt.tokens
    found = explain.attribute(text, target=" the", use_cached_outputs=False)
    token = model.tokenizer.encode(" the")[0]
    ours = attribute(token_features(model, prompt, Target(token)), "feature_ablation")
    np.testing.assert_allclose(found.token_attr[0], ours.values, atol=1e-5)

    slots = TextTemplateInput("The {} asks the {}", ["user", "system"], baselines=["circle", "red"])
    found = explain.attribute(slots, target=" the", use_cached_outputs=False)
    assert found.seq_attr.shape == (2,)
    assert (found.seq_attr != 0).all()


@pytest.mark.filterwarnings("ignore:.*input_ids", "ignore:Pretty tokens length")  # broken UTF-8
def test_captum_lets_the_model_write_what_is_explained(model, prompt):
    from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput

    module, tokenizer = for_captum(model)
    explain = LLMAttribution(FeatureAblation(module), tokenizer)
    text = TextTokenInput(TEXT, tokenizer, baselines=model.config.pad_token_id)
    found = explain.attribute(text, gen_args={"max_new_tokens": 2}, use_cached_outputs=False)
    likeliest = log_probability(model, prompt).argmax()
    written = module.generate(prompt.input_ids, max_new_tokens=2)
    assert written[0, :-1].tolist() == [*prompt.input_ids[0].tolist(), int(likeliest)]
    ours = attribute(token_features(model, prompt), "feature_ablation")
    np.testing.assert_allclose(found.token_attr[0], ours.values, atol=1e-5)


def test_captum_takes_gradients_through_the_adapter(tokenizer, prompt):
    from captum.attr import LayerIntegratedGradients, LLMGradientAttribution, TextTokenInput

    dense = opened(tokenizer, interleave_moe_layer_step=0)
    module, words = for_captum(dense)
    explain = LLMGradientAttribution(LayerIntegratedGradients(module, dense.embed_tokens), words)
    pad = dense.config.pad_token_id
    found = explain.attribute(
        TextTokenInput(TEXT, words, baselines=pad), target=" the", n_steps=200
    )
    token = tokenizer.encode(" the")[0]
    ours = attribute(token_features(dense, prompt, Target(token)), GRADIENTS)
    np.testing.assert_allclose(found.token_attr[0], ours.values, atol=0.02 * ours.values.max())


def test_the_adapters_tokenizer_reads_names_and_refuses_words_of_several_tokens(model):
    _, words = for_captum(model)
    bos, ids = model.tokenizer.bos_id, model.tokenizer.encode("Hello you")
    assert words.encode("Hello you", add_special_tokens=False) == ids
    assert words.encode("Hello you", return_tensors="pt").tolist() == [[bos, *ids]]
    places = words("Hello you")["offset_mapping"]
    assert ["Hello you"[i:j] for i, j in places] == [model.tokenizer.decode([idx]) for idx in ids]
    assert words.convert_tokens_to_ids(["<|begin_of_text|>"]) == [bos]
    assert words.convert_ids_to_tokens(bos) == "<|begin_of_text|>"
    with pytest.raises(ValueError, match="'xyz' is not one token: this tokenizer makes 3 of it"):
        words.convert_tokens_to_ids("xyz")


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (
            lambda m, p: token_features(m, p, Target(position=99)),
            "position 99 is out of range: this",
        ),
        (
            lambda m, p: token_features(m, p, Target(token=336)),
            "token 336 is out of range: this voc",
        ),
        (
            lambda m, p: token_features(m, p, Target(quantity="odds")),
            "unknown quantity 'odds'; choose log_probability or logit",
        ),
        (
            lambda m, p: token_features(m, p, positions=[99]),
            "token 99 is out of range: this prompt",
        ),
        (
            lambda m, p: token_features(m, p, positions=[]),
            "no token was given: name one part at least",
        ),
        (
            lambda m, p: token_features(m, p, positions=[2, -1, len(p.tokens) - 1]),
            "is given twice: a part has one gate, so name it once",
        ),
        (
            lambda m, p: token_features(m, p, baseline="mask"),
            "baseline 'mask' stands for no token: g",
        ),
        (
            lambda m, p: token_features(m, p, baseline=torch.zeros(1)),
            "a baseline of shape (1,) is no embedding of this model: give 48 numbers",
        ),
        (lambda m, p: patch_features(m, p), "this prompt has no image: use token_features for its"),
        (
            lambda m, p: attribute(token_features(m, p), "lime"),
            "unknown method 'lime'; choose feature_ablation, shapley, shapley_sampling, integ",
        ),
        (
            lambda m, p: attribute(toy(lambda on: on.sum(1), 9), "shapley"),
            "exact Shapley values take at most 8 features, these are 9: choose fewer, or",
        ),
        (lambda m, p: conductance(m, p, 4), "layer 4 is out of range: this model has 4 layers"),
    ],
)
def test_what_cannot_be_asked_is_explained(model, prompt, ask, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ask(model, prompt)


EDITS = [
    Scale("embed", 2.0),
    SkipLayer(2),
    TopK(1, 1),
    Route(1, 3, 2, "one"),
    RouterBias(1, 2, 5.0),
    RouterTemperature(1, 2.0),
]


def said_inside(model, prompt, edits, token):
    with edited(model, edits), torch.no_grad():
        return float(model(**prompt)[0, -1].log_softmax(-1)[token])


@pytest.mark.parametrize("edit", EDITS, ids=repr)
def test_features_of_an_edited_model_are_its_own(model, prompt, edit):
    with edited(model, [edit]):
        tokens, experts = token_features(model, prompt), expert_features(model, prompt)
        on = [each.ends(fixed)[1] for each in (tokens, experts) for fixed in (False, True)]
        only = expert_features(model, prompt, tokens.target, pairs=[(1, 2)])
        without = only.ends(False)[0]
    token = tokens.target.token
    assert on == pytest.approx([said_inside(model, prompt, [edit], token)] * 4, abs=1e-5)
    ablated = said_inside(model, prompt, [edit, AblateExpert(1, 2)], token)
    assert without == pytest.approx(ablated, abs=1e-5)


def test_a_side_that_does_not_divide_a_tile_is_explained(model, picture):
    with pytest.raises(ValueError, match="squares of 7 pixels do not divide a tile of 24 pixels"):
        patch_features(model, picture, side=7)


def test_a_model_without_tokenizer_has_no_adapter():
    with pytest.raises(ValueError, match="this model has no tokenizer to read text with: load it"):
        for_captum(l4.random(CONFIG))


def test_a_batch_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="this prompt has 2 rows: take one"):
        token_features(model, build_prompt(tokenizer, ["one", "two"]))


def test_a_change_of_almost_nothing_is_not_chased():
    runs = []

    def value(on, fixed_routing):
        runs.append(len(on))
        return 1e-6 * torch.sin(40 * on.sum(dim=1))

    parts = Features(
        ("part",), np.array([[0], [1]]), ["a", "b"], value, Target(), torch.device("cpu")
    )
    found = attribute(parts, "integrated_gradients")
    assert sum(runs) < 100
    assert abs(found.values.sum() - (found.all_on - found.all_off)) < 1e-5


def test_runs_that_take_long_are_counted(model, prompt, monkeypatch):
    done = []

    class Bar(tqdm.std.tqdm):
        def update(self, n=1):
            done.append((n, self.disable))
            return super().update(n)

    monkeypatch.setattr(attribution, "tqdm", Bar)
    features = token_features(model, prompt)
    attribute(features, "feature_ablation")
    assert done and sum(count for count, _ in done) <= len(features.labels) + 1
    assert not any(hidden for _, hidden in done)
    attribute(features, "feature_ablation", progress=False)
    assert done[-1][1]
