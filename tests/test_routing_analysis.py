"""The routing of a prompt holds what the model's routers decided."""

import re

import numpy as np
import pytest
import torch
from small_tokenizer import small_tokenizer
from tiny import CONFIG

import llama4_lab as l4
from llama4_lab import edits as E
from llama4_lab.analysis.routing import Routing, routing_of
from llama4_lab.prompt import Prompt, build_prompt

TEXT = "The user asks the assistant:\n  what colour is it?"


@pytest.fixture
def prompt(tmp_path) -> Prompt:
    return build_prompt(small_tokenizer(tmp_path), TEXT)


def model(**changes) -> l4.Llama4:
    return l4.random(CONFIG.replace(vocab_size=336, **changes)).eval()


def test_routing_is_what_the_routers_decided(prompt):
    routed = model()
    routing = routing_of(routed, prompt)
    with torch.no_grad(), l4.trace(routed, "layers.*.router.*") as cache:
        routed(**prompt)
    assert routing.tokens == prompt.tokens
    assert routing.layers == (1, 3, 5)
    assert routing.num_experts == 5
    for row, layer in enumerate(routing.layers):
        logits = cache[f"layers.{layer}.router.logits"][0].numpy()
        best = np.argsort(-logits, axis=1)
        ranked = np.take_along_axis(logits, best, axis=1)
        np.testing.assert_array_equal(routing.logits[row], logits)
        np.testing.assert_array_equal(routing.expert[row], best[:, :2])
        np.testing.assert_array_equal(routing.runner_up[row], best[:, 2])
        np.testing.assert_array_equal(routing.margin[row], ranked[:, 1] - ranked[:, 2])
        np.testing.assert_allclose(routing.score[row], 1 / (1 + np.exp(-ranked[:, :2])), rtol=1e-5)


def test_layers_may_choose_different_numbers_of_experts(prompt):
    routed, clean = model(), routing_of(model(), prompt)
    with E.edited(routed, [E.TopK(3, 4), E.TopK(5, 1)]):
        routing = routing_of(routed, prompt)
    assert routing.expert.shape == (3, len(prompt.tokens), 4)
    np.testing.assert_array_equal(routing.expert[0, :, :2], clean.expert[0])
    assert (routing.expert[0, :, 2:] == -1).all() and np.isnan(routing.score[0, :, 2:]).all()
    assert (routing.expert[1] >= 0).all()
    assert (routing.expert[2, :, 0] >= 0).all() and (routing.expert[2, :, 1:] == -1).all()
    np.testing.assert_allclose(routing.load.sum(axis=1), 1)


def test_load_counts_the_choices_of_each_expert(prompt):
    routing = routing_of(model(), prompt)
    for row in range(3):
        count = np.bincount(routing.expert[row].ravel(), minlength=5)
        np.testing.assert_allclose(routing.load[row], count / (2 * len(prompt.tokens)))
    np.testing.assert_allclose(routing.load.sum(axis=1), 1)


def test_there_is_no_runner_up_when_all_experts_are_chosen(prompt):
    routing = routing_of(model(num_experts_per_tok=5), prompt)
    assert (routing.runner_up == -1).all()
    assert (routing.margin == np.inf).all()


def test_bfloat16_routers_are_read_exactly(prompt):
    routed = model().bfloat16()
    routing = routing_of(routed, prompt)
    with torch.no_grad(), l4.trace(routed, "layers.1.router.logits") as cache:
        routed(**prompt)
    assert routing.logits.dtype == np.float32
    assert torch.equal(
        torch.from_numpy(routing.logits[0]), cache["layers.1.router.logits"][0].float()
    )
    ranked = np.sort(routing.logits)
    np.testing.assert_array_equal(routing.margin, ranked[..., -2] - ranked[..., -3])


def test_a_model_without_experts_is_refused(prompt):
    sentence = "this model routes nothing: all its 6 layers are dense"
    with pytest.raises(ValueError, match=sentence):
        routing_of(model(interleave_moe_layer_step=0), prompt)


def test_a_batch_is_refused(tmp_path):
    batch = build_prompt(small_tokenizer(tmp_path), ["one", "two"])
    with pytest.raises(ValueError, match="this prompt has 2 rows: take one"):
        routing_of(model(), batch)


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda r: r.row(2), "layer 2 has no experts: the MoE layers are 1, 3, 5"),
        (lambda r: r.row(-1), "layer -1 has no experts: the MoE layers are 1, 3, 5"),
        (lambda r: r.position(99), "token 99 is out of range: this prompt has {n} tokens (0 to"),
        (lambda r: r.position(-99), "token -99 is out of range: this prompt has {n} tokens (0 to"),
        (lambda r: r.position(len(r.tokens)), "token {n} is out of range: this prompt has {n} "),
    ],
)
def test_a_place_that_does_not_exist_is_explained(prompt, ask, sentence):
    routing: Routing = routing_of(model(), prompt)
    n = len(prompt.tokens)
    assert routing.row(3) == 1
    assert [routing.position(i) for i in (0, n - 1, -1, -n)] == [0, n - 1, n - 1, 0]
    with pytest.raises(ValueError, match=re.escape(sentence.format(n=n))):
        ask(routing)
