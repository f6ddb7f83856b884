"""Decoding in compiled code equals the readable path, and leaves to it whatever it cannot do."""

import inspect
import threading
from typing import Any

import pytest
import torch
from parity import pair, text_config
from test_parity import TEXT, TOLERANCE
from tiny import CONFIG, tiny
from torch import nn

import llama4_lab as l4
from llama4_lab import edits as E
from llama4_lab import loading
from llama4_lab.aliases import resolve
from llama4_lab.analysis.quantisation import swapped
from llama4_lab.cache import KVCache, SharedPast
from llama4_lab.generate import tokens as generated
from llama4_lab.model import one_token
from llama4_lab.packed import pack

IDS = torch.randint(4, 80, (1, 30), generator=torch.Generator().manual_seed(1))
FEW = IDS[:, :11]
MOST = 5e-6  # of the logits' size: float32 through six layers, against our readable path


@pytest.fixture(scope="module", autouse=True)
def compiled():
    one_token.compile()
    with torch.no_grad():
        yield


@pytest.fixture
def steps(monkeypatch):
    """Count the steps that compiled code makes."""
    made = []

    def forward(model, ids, cache, forward=one_token.forward):
        made.append(cache.slots)
        return forward(model, ids, cache)

    monkeypatch.setattr(one_token, "forward", forward)
    return made


def decode(model, ids=IDS, prompt=3, pieces=None):
    """Return the logits of a prompt, and of each later token (or piece) by itself."""
    cache, parts = model.new_cache(), [prompt, *(pieces or [1] * (ids.shape[1] - prompt))]
    return torch.cat([model(part, cache=cache) for part in ids.split(parts, dim=1)], dim=1)


def assert_sees(model, steps, ids=IDS):
    """Compiled steps were made, and equal one readable pass over all tokens."""
    steps.clear()
    logits, expected = decode(model, ids), model(ids)
    assert len(steps) == ids.shape[1] - 3
    assert_close(logits, expected)
    return logits


def assert_close(logits, expected):
    torch.testing.assert_close(logits, expected, atol=MOST * expected.std().item(), rtol=0)


@pytest.mark.parametrize("name", TEXT)
def test_decoding_equals_transformers(name, steps):
    hf, ours = pair(text_config(**TEXT[name]), seed=3)
    ids = torch.randint(3, 97, (1, 37), generator=torch.Generator().manual_seed(1))
    pieces = [*[1] * 14, 7, *[1] * 13]  # one cache for both paths, across chunk borders
    logits = decode(ours, ids, 3, pieces)
    assert len(steps) == 27
    torch.testing.assert_close(logits, hf(ids).logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": True}, {"vision_config": None}, {"num_hidden_layers": 1}]
)
def test_decoding_equals_one_pass(changes, steps):
    assert_sees(tiny(**changes), steps)


def test_the_first_token_of_all_needs_no_prompt(steps):
    model = tiny()
    logits = decode(model, IDS, 1)
    assert_close(logits, model(IDS))
    assert steps[0] == 0


# ---- what changes in the model is seen


def test_every_weight_is_read(steps):
    model = tiny(num_hidden_layers=2, attention_bias=True, vision_config=None)
    before = assert_sees(model, steps, FEW)
    for name, weight in model.named_parameters():
        with swapped({(model, name): weight + 0.3 * torch.randn(weight.shape)}):
            assert (assert_sees(model, steps, FEW) - before).abs().max() > 1e-3, name
        assert torch.equal(decode(model, FEW), before), name


@pytest.mark.parametrize("of", ["self_attn.q_proj", "self_attn.o_proj", "feed_forward.down_proj"])
def test_a_bias_that_the_config_does_not_know_is_left_to_the_readable_path(of, steps):
    model = tiny(interleave_moe_layer_step=2, vision_config=None)
    part = model.layers[0].get_submodule(of)
    part.bias = nn.Parameter(torch.ones(part.out_features))
    assert_close(decode(model, FEW), model(FEW))
    assert not steps
    model.lm_head.bias, part.bias = nn.Parameter(torch.ones(model.config.vocab_size)), None
    assert_close(decode(model, FEW), model(FEW))
    assert not steps


def test_weights_that_are_turned_in_their_place_are_seen(steps):
    model = tiny(vision_config=None, num_attention_heads=3, num_key_value_heads=1)
    weight = model.layers[1].self_attn.q_proj.weight
    assert weight.shape[0] == weight.shape[1]
    assert_sees(model, steps, FEW)
    weight.data = weight.data.t()
    assert_close(decode(model, FEW), model(FEW))


@pytest.mark.parametrize("ids", [torch.tensor([[5.7]]), torch.tensor([[True]]), [[5]]])
def test_what_is_no_id_is_left_to_who_refuses_it(ids):
    model = tiny()
    assert not inspect.unwrap(one_token.can_run)(model, ids, model.new_cache())


@pytest.mark.parametrize(
    "change", [{"num_attention_heads": 2, "num_key_value_heads": 1}, {"head_dim": 4}]
)
def test_a_cache_of_another_model_is_refused(change):
    model = tiny(vision_config=None)
    other = KVCache(model.config.replace(**change))
    with pytest.raises(ValueError, match=r"this cache is for .* make it with .* new_cache\(\)"):
        model(FEW[:, :1], cache=other)


def test_a_patched_method_of_the_model_is_called(steps):
    model = tiny(vision_config=None)
    old = model.hidden
    model.hidden = lambda *given: 0 * old(*given)
    assert decode(model, FEW)[:, 3:].abs().max() == 0
    assert not steps


def test_changed_weights_are_seen(steps):
    name = "layers.1.self_attn.o_proj.weight"
    model = tiny()
    before = assert_sees(model, steps, FEW)
    old = model.get_parameter(name).detach().clone()
    new = old + 0.3 * torch.randn(old.shape)
    model.load_state_dict({**model.state_dict(), name: new.clone()}, assign=True)
    after = assert_sees(model, steps, FEW)
    assert (after - before).abs().max() > 1e-3
    model.get_parameter(name).copy_(old)
    assert torch.equal(decode(model, FEW), before)
    model.get_parameter(name).data = new
    assert torch.equal(decode(model, FEW), after)


def test_fewer_experts_at_the_same_address_are_seen(steps):
    model = tiny()
    before = assert_sees(model, steps)
    for name, weight in model.named_parameters():
        if ".router." in name or ".experts." in name:
            weight.data = weight.data[:2]
    assert (assert_sees(model, steps) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    "edit",
    [
        *(E.Chunk(0, 5), E.Chunk(0, None), E.Chunk(3, 4), E.Rope(0, False), E.Rope(3, True)),
    ],
)
def test_changed_rules_are_seen(edit, steps):
    model = tiny()
    before = assert_sees(model, steps)
    with E.edited(model, [edit]):
        logits = decode(model)
        expected = model(IDS)
    assert_close(logits, expected)
    assert (logits - before).abs().max() > 1e-3
    assert_sees(model, steps)


def test_rules_set_by_hand_are_seen(steps):
    model = tiny()
    layer = model.layers[1]
    for owner, name, value in (
        (layer.self_attn, "chunk", 5),
        (layer.self_attn, "eps", 0.5),
        (layer.self_attn, "use_qk_norm", False),
        (layer.self_attn, "uses_rope", False),
        (layer.input_layernorm, "eps", 0.5),
        (layer.post_attention_layernorm, "eps", 0.5),
        (model.norm, "eps", 0.5),
        (layer.feed_forward, "topk", 1),
        (layer.feed_forward, "topk", 4),
    ):
        before = assert_sees(model, steps, FEW)
        setattr(owner, name, value)
        assert (assert_sees(model, steps, FEW) - before).abs().max() > 1e-4, name


# ---- what it leaves to the readable path


def test_watched_and_changed_values_are_honoured(steps):
    model = tiny()
    expected = model(FEW)[:, -1]
    seen = []
    with l4.trace(model, "layers.*.resid_post") as cache:
        decode(model, FEW)
    assert len(cache) == CONFIG.num_hidden_layers
    assert not steps
    with l4.intervene(model, {"layers.1.router.scores": lambda x: 0 * x}):
        assert (decode(model, FEW)[:, -1] - expected).abs().max() > 1e-3
        with l4.trace(model, "layers.*.router.logits"):
            decode(model, FEW)
    assert not steps
    handle = model.layers[2].register_forward_hook(lambda *_: seen.append(1))
    decode(model, FEW)
    handle.remove()
    assert len(seen) == FEW.shape[1] - 2
    assert not steps
    decode(model, FEW)
    assert steps


def test_patched_and_replaced_modules_are_left_alone(steps):
    model: Any = tiny()
    decode(model, FEW)
    steps.clear()
    norm = model.layers[0].input_layernorm
    norm.forward = lambda x: 0 * x
    changed = decode(model, FEW)
    assert_close(changed, model(FEW))
    del norm.forward
    model.layers[0].self_attn.attend = lambda q, *_: 0 * q
    decode(model, FEW)
    del model.layers[0].self_attn.attend
    model.layers[1].self_attn.o_proj = nn.Sequential(model.layers[1].self_attn.o_proj)
    decode(model, FEW)
    assert not steps


def with_packed_head(model):
    model.lm_head.put("weight", pack(model.lm_head.weight.detach(), "int8", 16))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "backend", "loop"),
        lambda model: model.to(torch.bfloat16),
        with_packed_head,
    ],
)
def test_other_models_are_left_alone(change):
    model = tiny()
    step = model, IDS[:, :1], model.new_cache()
    assert one_token.can_run(*step)
    change(model)
    assert not one_token.can_run(*step)


def test_other_calls_are_left_alone(steps):
    model, one = tiny(), IDS[:, :1]
    cache = model.new_cache()
    model(one, cache=cache, attention_mask=torch.ones(1, 1, dtype=torch.long))
    model(one, cache=cache, keep_last=2)
    model(IDS[:, :2], cache=cache)
    model(IDS.view(-1, 1), cache=model.new_cache(IDS.shape[1]))
    padded = model.new_cache()
    model(IDS[:, :4], attention_mask=torch.tensor([[0, 1, 1, 1]]), cache=padded)
    model(one, cache=padded)
    with torch.enable_grad():
        assert model(one, cache=model.new_cache()).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        model(one, cache=model.new_cache())
    empty = [torch.empty(1, 2, 0, 16)] * 6
    model(one, cache=SharedPast(empty, empty, model.chunks, 0, 1))
    foreign = l4.KVCache(model.config, chunks=[4, None] * 3)
    assert not one_token.can_run(model, one, foreign)
    assert not steps
    with pytest.raises(ValueError, match="input_ids hold 97 to 97; this vocabulary has ids 0 to"):
        model(torch.tensor([[97]]), cache=model.new_cache())


def test_threads_are_for_large_models(monkeypatch):
    model = tiny()
    call = model, IDS[:, :1], model.new_cache()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert one_token.can_run(*call)
    monkeypatch.setattr(one_token, "_MOST_BYTES", 1000)
    assert not one_token.can_run(*call)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert one_token.can_run(*call)


def test_what_is_not_compiled_yet_does_not_keep_anybody_waiting(monkeypatch, steps):
    done = threading.Event()
    monkeypatch.setattr(loading, "_PATIENCE", 0.01)
    monkeypatch.setattr(one_token, "LOADING", loading.Loading("a slow one", done.wait))
    model = tiny()
    decode(model, FEW)
    done.set()
    assert not steps
    assert_close(decode(model, FEW), model(FEW))


# ---- what it shows


@pytest.mark.parametrize("changes", [{}, {"moe_layers": None, "interleave_moe_layer_step": 1}])
def test_traced_routers_do_not_change_the_path_and_are_what_they_are(steps, changes):
    model = tiny(**changes)
    cache = model.new_cache()
    model(IDS[:, :-1], cache=cache)
    plain = model(IDS[:, -1:], cache=cache)
    with l4.trace(model, "layers.*.router.*") as whole:
        model(IDS)
    names = "layers.1.router.logits", "*.router.*"
    for outer, inner in (names, names[::-1]):
        cache.slots -= 1
        with l4.trace(model, outer) as first, l4.trace(model, inner) as second:
            assert torch.equal(model(IDS[:, -1:], cache=cache), plain)
        one, every = sorted((first, second), key=len)
        assert every.keys() == whole.keys() and one.keys() == {names[0]}
        assert torch.equal(one[names[0]], every[names[0]])
        for name, value in every.items():
            assert value.dtype == whole[name].dtype
            torch.testing.assert_close(value, whole[name][:, -1:], atol=1e-5, rtol=0)
    assert len(steps) == 3


def test_traced_routers_are_kept_as_they_were_asked_for(steps, tmp_path):
    model = tiny()
    cache = model.new_cache()
    model(IDS[:, :-1], cache=cache)
    with l4.trace(model, "*.router.*") as plain:
        model(IDS[:, -1:], cache=cache)
    alias = "blocks.3.mlp.hook_expert_indices"
    for asked in (
        {"dtype": torch.float64},
        {"spill": tmp_path / "spilled"},
        {"positions": 0},
        {"names": alias},
    ):
        cache.slots -= 1
        with l4.trace(model, **({"names": "*.router.*"} | asked)) as found:
            model(IDS[:, -1:], cache=cache)
        assert len(found) == (1 if "names" in asked else len(plain))
        for name, value in found.items():
            point = resolve(model.config, name)[name]
            is_wider = "dtype" in asked and value.is_floating_point()
            assert value.dtype == (torch.float64 if is_wider else plain[point].dtype)
            assert torch.equal(value.to(plain[point].dtype), plain[point])
    assert len(steps) == 5 and (tmp_path / "spilled").is_dir()


def test_the_model_knows_where_the_step_began(steps):
    model = tiny()
    decode(model)
    assert model.first_slot == IDS.shape[1] - 1


def test_generated_tokens_are_the_same(steps):
    model = tiny(vision_config=None)
    prompt = {"input_ids": IDS[:, :5]}

    def tokens():
        return torch.cat([*generated(model, prompt, 20, seed=0, stop=())])

    fast = tokens()
    assert len(steps) == 19
    model.backend = "loop"
    assert torch.equal(tokens(), fast)


def test_layers_that_were_moved_cache_where_they_stand_or_not_at_all(steps):
    model = tiny()
    decode(model, FEW)
    cache = model.new_cache()
    model(FEW[:, :3], cache=cache)
    layers = model.layers
    layers[0], layers[1] = layers[1], layers[0]  # both attend in chunks
    steps.clear()
    with pytest.raises(ValueError, match=r"cache keys and values at \[1, 0, 2, 3, 4, 5\]: after"):
        model(FEW[:, 3:4], cache=cache)
    assert steps == []
    for i, layer in enumerate(layers):
        layer.self_attn.layer = i
    assert_sees(model, steps, FEW)
    layers[1].self_attn.layer = 0
    with pytest.raises(ValueError, match=r"at \[0, 0, 2, 3, 4, 5\]"):
        model(FEW[:, 3:4], cache=cache)
