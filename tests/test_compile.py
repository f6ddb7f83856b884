"""Decoding with static shapes: no graph breaks, and the plain model's logits."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny

import llama4_lab as l4
from llama4_lab import experts
from llama4_lab.experts import gather, grouped, loop
from llama4_lab.generate import tokens
from llama4_lab.model.static import StaticDecoder
from llama4_lab.packed import pack


def problem(n, e, topk, d=32, width=48, dtype=torch.float32):
    chosen, score = experts.route(torch.randn(n, e), topk)
    order, offsets = experts.sort(chosen, e)
    gate_up, down = torch.randn(e, 2 * width, d) / 6, torch.randn(e, d, width) / 7
    x = torch.randn(n, d).to(dtype)
    return x, order, offsets, score.to(dtype), gate_up.to(dtype), down.to(dtype)


# ---- the backends `gather` and `grouped`


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 16, 1), (7, 128, 2), (16, 3, 1), (17, 5, 1)])
@pytest.mark.parametrize("kind", [None, "int8", "int4", "fp8"])
def test_gather_equals_the_loop(shape, kind):
    x, order, offsets, score, *weights = problem(*shape)
    if kind is not None:
        weights = [pack(w, kind) for w in weights]
    plain = [w if kind is None else w.unpack() for w in weights]
    expected = loop.apply(x, order, offsets, score, *plain)
    ours = gather.apply(x, order, offsets, score, *weights)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_grouped_takes_packed_weights(kind):
    x, order, offsets, score, *weights = problem(9, 4, 2)
    weights = [pack(w, kind) for w in weights]
    assert all(grouped.can_run(w, x) for w in weights)
    expected = loop.apply(x, order, offsets, score, *(w.unpack() for w in weights))
    ours = grouped.apply(x, order, offsets, score, *weights)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_rows_in_fp8_carry_their_own_scales(monkeypatch):
    """`scaled` hands torch's kernel exactly what it needs to undo the rounding of both sides."""
    x, weights = torch.randn(6, 32), pack(torch.randn(3, 16, 32), "fp8")
    x[2] *= 1000
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)

    def kernel(a, b, scale_a, scale_b, *, offs, out_dtype):
        assert a.dtype == b.dtype == torch.float8_e4m3fn and b.stride(1) == 1
        return F.grouped_mm(a.float() * scale_a[:, None], b.float() * scale_b[:, None], offs=offs)

    monkeypatch.setattr(torch, "_scaled_grouped_mm", kernel)
    ours, expected = grouped.scaled(x, weights, ends), grouped.product(x, weights, ends)
    # Rounding a row to e4m3 moves each number by a sixteenth at most, most by far less.
    error = (ours - expected).norm(dim=1) / expected.norm(dim=1)
    assert (error > 0).all() and (error < 0.04).all(), error


def test_torch_accepts_the_layout_of_the_fp8_product():
    x = torch.empty(6, 32, device="meta", dtype=torch.bfloat16)
    weights = pack(torch.randn(3, 16, 32), "fp8").to("meta")
    out = grouped.scaled(x, weights, torch.empty(3, device="meta", dtype=torch.int32))
    assert out.shape == (6, 16) and out.dtype == torch.bfloat16


def test_rows_in_fp8_are_off_by_a_sixteenth_at_most():
    x = torch.cat([torch.randn(4, 64), torch.zeros(1, 64), 1e6 * torch.randn(1, 64)])
    codes, scales = grouped.in_fp8(x)
    error = (codes.float() * scales[:, None] - x).abs()
    assert (error <= x.abs() / 16 + scales[:, None] * 2**-10).all()  # half a step of the smallest


# ---- the sort in numba-cuda


@pytest.mark.slow
def test_the_sort_in_numba_cuda_equals_torchs():
    code = """
import torch
from llama4_lab import experts
from llama4_lab.experts import numba_cuda
torch.manual_seed(0)
for n, e, topk in [(1, 1, 1), (5, 128, 2), (130, 3, 1)]:
    for chosen in torch.randint(e, (n, topk)), torch.full((n, topk), e - 1):
        for ours, plain in zip(numba_cuda.sort(chosen, e), experts.sort(chosen, e)):
            assert ours.dtype == torch.int32 and ours.tolist() == plain.tolist(), (n, e, topk)
try:
    numba_cuda.sort(torch.zeros(1, 1), 129)
except ValueError as error:
    print(error)
"""
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "129 experts are more than this sort takes: 128\n"


# ---- the static decoder


def decode(decoder, model, ids, first, padding=0):
    """Compare each step with the plain model, whose cache grows; return the last logits."""
    mask = torch.ones(len(ids), first, dtype=torch.long)
    mask[-1, :padding] = 0
    cache = model.new_cache(len(ids))
    with torch.no_grad():
        expected = model(ids[:, :first], attention_mask=mask, cache=cache, keep_last=1)[:, 0]
        logits = decoder.prefill(ids[:, :first], attention_mask=mask)
        torch.testing.assert_close(logits, expected)
        for t in range(first, ids.shape[1]):
            with l4.trace(model, ["layers.*.router.logits"]) as seen:
                expected = model(ids[:, t : t + 1], cache=cache)[:, 0]
            logits = decoder.step(ids[:, t])
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    routed = torch.stack([x[:, 0] for x in seen.values()])
    torch.testing.assert_close(decoder.routed, routed, atol=2e-5, rtol=1e-4)
    return logits


@pytest.mark.parametrize("shape", [(1, 1, 0), (3, 5, 3)])
def test_static_steps_equal_the_plain_model_across_chunks(shape):
    b, first, padding = shape
    model = tiny()
    model.backend = "gather"
    ids = torch.randint(90, (b, 27))  # chunks of 8
    decode(StaticDecoder(model, b, max_len=27), model, ids, first, padding)


@pytest.mark.slow
def test_decoding_and_prefill_compile_without_graph_breaks():
    script = Path(__file__).with_name("one_graph.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_generating_with_a_static_decoder_gives_the_models_tokens():
    model, ids = tiny(), torch.randint(90, (2, 6))
    model.backend = "gather"
    decoder = StaticDecoder(model, 2, max_len=40)
    options = {"max_new_tokens": 20, "temperature": 0, "stop": ()}
    expected = torch.stack(list(tokens(model, {"input_ids": ids}, **options)))
    for _ in range(2):  # the second run starts from a used cache
        ours = torch.stack(list(tokens(decoder, {"input_ids": ids}, **options)))
        assert torch.equal(ours, expected)


def test_an_emptied_static_cache_begins_at_the_first_position():
    model, ids = tiny(), torch.randint(90, (2, 9))
    decoder = StaticDecoder(model, 2, max_len=12)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    decoder.prefill(ids, attention_mask=mask)
    decoder.new_cache(2)
    with torch.no_grad():
        expected = model(ids[:, :1])[:, 0]
    torch.testing.assert_close(decoder.step(ids[:, 0]), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_static_decoder_goes_on_from_what_the_model_put_into_its_cache():
    model, ids = tiny(), torch.randint(90, (2, 12))
    decoder, mask = StaticDecoder(model, 2, max_len=12), torch.ones(2, 5, dtype=torch.long)
    mask[1, :3] = 0
    model(ids[:, :5], attention_mask=mask, cache=decoder.cache)
    decoder.step(ids[:, 5])
    model(ids[:, 6:9], cache=decoder.cache)
    cache = model.new_cache(2)
    model(ids[:, :5], attention_mask=mask, cache=cache)
    for logits in model(ids[:, 5:], cache=cache)[:, 4:].unbind(1):
        step = decoder.step(ids[:, decoder.cache.slots])
        torch.testing.assert_close(step, logits, atol=2e-5, rtol=1e-4)


def test_a_text_that_fills_a_static_decoder_is_kept():
    model, ids = tiny(vision_config=None), torch.randint(90, (1, 6))
    decoder, options = StaticDecoder(model, 1, max_len=8), {"temperature": 0, "stop": ()}
    with pytest.warns(UserWarning, match=r"ends after 3 tokens, for max_len 8 .* a larger one"):
        made = [int(step) for step in tokens(decoder, ids, 20, **options)]
    assert made == [int(step) for step in tokens(model, ids, 3, **options)]
    assert made == [int(step) for step in tokens(decoder, ids, 3, **options)]


def test_a_static_step_inside_a_trace_or_a_change_is_refused():
    model, ids = tiny(), torch.zeros(1, 2, dtype=torch.long)
    decoder = StaticDecoder(model, 1, max_len=8)
    decoder.prefill(ids)
    with l4.trace(model, "layers.*.router.logits"), pytest.raises(ValueError, match="fixed graph"):
        decoder.step(ids[:, 0])
    with (
        l4.intervene(model, {"layers.1.attn.z": torch.zeros_like}),
        pytest.raises(ValueError, match="leave the block of trace, intervene or edited"),
    ):
        decoder.step(ids[:, 0])
    assert decoder.cache.slots == 2
    decoder.step(ids[:, 0])


def test_a_static_decoder_says_what_does_not_fit():
    model = tiny()
    with pytest.raises(ValueError, match="unknown kernels 'cuda'; choose torch, triton"):
        StaticDecoder(model, kernels="cuda")
    decoder = StaticDecoder(model, 1, max_len=4)
    with pytest.raises(ValueError, match="for 1 rows, not 2: make another"):
        decoder.new_cache(2)
    with pytest.raises(ValueError, match="0 \\+ 5 tokens exceed max_len 4: make the decoder"):
        decoder.prefill(torch.zeros(1, 5, dtype=torch.long))
    decoder.prefill(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"ids of shape \(2,\): give one for each of the 1 rows"):
        decoder.step(torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="4 \\+ 1 tokens exceed max_len 4"):
        decoder.step(torch.zeros(1, dtype=torch.long))


def test_a_decoder_has_its_own_cache_and_the_last_logits():
    model = tiny()
    decoder = StaticDecoder(model, 1, max_len=8)
    for given in ({"cache": model.new_cache()}, {"cache": decoder.cache, "keep_last": 2}):
        with pytest.raises(ValueError, match="returns the last logits and has its own cache"):
            decoder(torch.ones(1, 3, dtype=torch.long), **given)


def test_a_copied_model_decodes_in_static_steps():
    model = tiny()
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        decode(StaticDecoder(each, 1, max_len=9), model, torch.randint(90, (1, 9)), 5)


@pytest.mark.parametrize("name", ["layers.1.self_attn.o_proj", "layers.2", "norm", "lm_head"])
def test_kernels_that_would_not_call_a_hook_are_refused(name):
    model, seen = tiny(vision_config=None), []
    handle = model.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(ValueError, match=r"call no module, and .* hooked .* kernels='torch'"):
        StaticDecoder(model, kernels="triton")
    StaticDecoder(model, max_len=4, kernels="torch").step(torch.zeros(1, dtype=torch.long))
    assert seen == [1]
    handle.remove()
    StaticDecoder(model, max_len=4, kernels="triton")
