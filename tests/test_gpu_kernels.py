"""The GPU's kernels equal the readable code; without a GPU they run in Triton's interpreter.

The interpreter must be asked for before torch first imports triton, so it has a run of its own:
``./lab test`` starts it, with ``TRITON_INTERPRET=1``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA GPU, or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from llama4_lab import experts, packed_triton
from llama4_lab.experts import loop, triton
from llama4_lab.model import flash_decode
from llama4_lab.model.static import StaticDecoder, attend_live
from llama4_lab.model.text import Router, rotate, turns, unit_rms
from llama4_lab.packed import Packed, pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # no bfloat16 tiles interpreted
KINDS = ("plain", "int8", "int4", "fp8")
ROUTINGS = {
    "random": lambda n, e: torch.randn(n, e),
    "all to the last": lambda n, e: torch.arange(e).float().expand(n, e) / e,
    "few of many": lambda n, e: torch.randn(n, e) - 9.0 * (torch.arange(e) >= max(2, e // 4)),
}


def weight(*shape, kind="plain", dtype=torch.float32):
    """A weight as the kernels take it, and as the loop does."""
    plain = (torch.randn(*shape) * shape[-1] ** -0.5).to(DEVICE, dtype)
    if kind == "plain":
        return plain, plain
    packed = pack(plain, kind)
    return packed, packed.unpack(dtype)


def close(ours, expected, dtype=torch.float32):
    """Sums are taken in another order; half precision keeps eight or eleven bits of each step."""
    atol, rtol = {torch.float32: (2e-5, 1e-4), torch.float16: (4e-3, 4e-3)}.get(dtype, (0.03, 0.03))
    torch.testing.assert_close(ours.float(), expected, atol=atol, rtol=rtol)


def sizes(kind):
    return (37, 23) if kind == "plain" else (96, 64)  # packed in groups of 32 and 64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 4, 1), (33, 16, 2), (50, 128, 1), (140, 3, 2)])
def test_sorted_tiles_equal_the_loop(kind, routing, shape):
    (n, e, topk), (d, width) = shape, sizes(kind)
    chosen, score = experts.route(ROUTINGS[routing](n, e).to(DEVICE), topk)
    order, offsets = experts.sort(chosen, e)
    gate_up, plain_gate_up = weight(e, 2 * width, d, kind=kind)
    down, plain_down = weight(e, d, width, kind=kind)
    x = torch.randn(n, d, device=DEVICE)
    expected = loop.apply(x, order, offsets, score, plain_gate_up, plain_down)
    close(triton.apply(x, order, offsets, score, gate_up, down), expected)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("routing", ["random", "all to the last"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 128, 2), (4, 5, 2), (8, 3, 1), (19, 16, 1)])
def test_the_fused_block_equals_norm_router_experts_and_sum(dtype, kind, routing, shape):
    (n, e, topk), (d, width) = shape, sizes(kind)
    stacks = [weight(e + 1, *s, kind=kind, dtype=dtype) for s in ((2 * width, d), (d, width))]
    x = torch.randn(n, d).to(DEVICE, dtype)
    gain = (torch.rand(d) + 0.5).to(DEVICE, dtype)
    router = torch.linalg.lstsq(x.float().cpu(), ROUTINGS[routing](n, e)).solution.T
    router = router.to(DEVICE, dtype).contiguous()
    kept = torch.full((n, e), torch.nan, device=DEVICE, dtype=dtype)
    _, half = triton.half_norm(x[:, None], (gain, 1e-3))
    then = (torch.rand(d) + 0.5).to(DEVICE, dtype)
    ours, normed = triton.moe(
        half, router, stacks[0][0], stacks[1][0], topk=topk, residual=x, norm=(then, 1e-2),
        logits=kept,
    )  # fmt: skip
    is_like_the_sum(normed, ours, then)

    chosen, score = experts.route(kept, topk)
    order, offsets = experts.sort(chosen, e)
    x, score, router, gain = (y.float() for y in (x, score, router, gain))
    gate_up, down = (plain.float() for _, plain in stacks)
    normed = F.rms_norm(x, (d,), gain, eps=1e-3)
    close(kept, F.linear(normed, router), dtype)
    gate, up = F.linear(normed, gate_up[e]).chunk(2, dim=-1)
    shared = F.linear(F.silu(gate) * up, down[e])
    close(
        ours, x + loop.apply(normed, order, offsets, score, gate_up[:e], down[:e]) + shared, dtype
    )


@pytest.mark.parametrize(("n", "out"), [(1, 177), (4, 177), (5, 177), (70, 177), (3, 77), (9, 77)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_linear_of_few_rows_equals_the_unpacked_one(n, out, kind):
    ours, plain = weight(out, sizes(kind)[0], kind=kind)
    x, residual = torch.randn(n, plain.shape[1], device=DEVICE), torch.randn(n, out, device=DEVICE)
    gain, then = torch.rand(plain.shape[1], device=DEVICE), torch.rand(out, device=DEVICE)
    close(triton.linear(x, ours), F.linear(x, plain))
    expected = F.linear(F.rms_norm(x, x.shape[1:], gain, 1e-2), plain)
    _, half = triton.half_norm(x[:, None], (gain, 1e-2))
    close(triton.linear(half, ours), expected)
    total, begun = triton.linear(half, ours, residual=residual, norm=(then, 1e-3))
    close(total, expected + residual)
    is_like_the_sum(begun, total, then)
    # Many parts of squares, as a product in many blocks leaves them.
    parts = x.square().unflatten(1, (-1, plain.shape[1] // parts_of(plain.shape[1]))).sum(2)
    close(triton.linear(half._replace(squares=parts.contiguous()), ours), expected)


@pytest.mark.parametrize("n", [1, 3, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_whole_groups_need_no_masks_and_equal_the_unpacked_ones(n, kind):
    ours, plain = weight(40, 1024, kind=kind)  # every warp has groups of its own, as in Scout
    x = torch.randn(n, 1024, device=DEVICE)
    close(triton.linear(x, ours, residual=x[:, :40].contiguous()), F.linear(x, plain) + x[:, :40])


def parts_of(k):
    return next(p for p in (32, 37) if k % p == 0)


def is_like_the_sum(half, total, gain):
    """Whether a norm was begun of what is stored."""
    dtype = total.dtype
    close(half.rows, total.float() * gain.float(), dtype)
    close(half.squares.sum(1), total.float().square().sum(1), torch.float32)


def test_slots_and_residual_are_added_and_their_norm_begun():
    slots, residual = torch.randn(3, 2, 77, device=DEVICE), torch.randn(3, 77, device=DEVICE)
    gain = torch.rand(77, device=DEVICE)
    total, half = triton.half_norm(slots, (gain, 1e-3), residual)
    close(total, slots.sum(1) + residual)
    is_like_the_sum(half, total, gain)


@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 4, 1), (64, 16, 1), (21, 5, 2)])
def test_routing_and_sorting_in_one_launch_equal_the_plain_steps(shape):
    n, e, topk = shape
    logits = torch.randn(n, e, device=DEVICE)
    order, offsets, score = triton.sort_logits(logits, topk)
    rows, squares = torch.randn(n, 8, device=DEVICE), torch.rand(n, 3, device=DEVICE)
    normed = triton.sort_logits(logits, topk, triton.Half(rows, squares, 0.01))
    assert torch.equal(normed[0], order) and torch.equal(normed[1], offsets)
    over = (squares.sum(1) / 8 + 0.01).rsqrt().repeat_interleave(topk + 1)
    close(normed[2], score * over)
    chosen, expected = experts.route(logits, topk)
    shared = torch.full((n, 1), e, device=DEVICE)
    plain = experts.sort(torch.cat([chosen, shared], dim=1), e + 1)
    assert (order.tolist(), offsets.tolist()) == (plain[0].tolist(), plain[1].tolist())
    close(score.view(n, -1), torch.cat([expected, torch.ones_like(expected[:, :1])], dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(3, 5, 96), (2, 128), (300, 256)])
def test_weights_are_unpacked_in_one_pass_bit_for_bit(dtype, kind, shape):
    packed = pack(torch.randn(*shape), kind)
    expected = packed.unpack(dtype)  # on the CPU: torch's own steps
    assert packed_triton.can_unpack(kind, packed.group)
    for ours, right in (packed, expected), (packed[1:], expected[1:]):
        codes, scales = ours.codes.to(DEVICE), ours.scales.to(DEVICE)
        assert torch.equal(packed_triton.unpack(codes, scales, ours.group, dtype).cpu(), right)
    assert not packed_triton.can_unpack("fp8", 256) and not packed_triton.can_unpack("int8", 96)


def test_the_shared_expert_stands_behind_the_routed_ones():
    routed, shared = torch.randn(3, 8, 64), torch.randn(8, 64)
    stack = triton.stack_shared(routed, shared)
    assert torch.equal(stack[:3], routed) and torch.equal(stack[3], shared)
    packed = triton.stack_shared(pack(routed, "int4"), pack(shared, "int4"))
    assert isinstance(packed, Packed)
    assert torch.equal(packed.unpack(), pack(stack, "int4").unpack())


def test_what_the_kernels_cannot_run_goes_elsewhere():
    small = pack(torch.randn(2, 8, 16), "int4")
    x = torch.randn(2, 16, device=DEVICE)
    assert small.group == 16 and not triton.can_run(x, small)
    assert triton.can_run(x, pack(torch.randn(2, 8, 32), "int4"))
    needs_grad = torch.randn(2, 8, 16, requires_grad=True)
    assert not triton.can_run(x, needs_grad)
    with torch.no_grad():
        assert triton.can_run(x, needs_grad)


def attention_problem(b, heads, kv_heads, dh, size, dtype=torch.float32):
    x = torch.randn(b, (heads + 2 * kv_heads) * dh).to(DEVICE, dtype)
    angle = 3 * torch.rand(dh // 2, device=DEVICE)
    buffer = torch.randn(2, b, kv_heads, size, dh).to(DEVICE, dtype)
    return x, angle, torch.tensor(1.7, device=DEVICE), buffer


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("rule", ["rope and norm", "rope", "temperature"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "places"),
    [(5, 1, 3, [0]), (6, 2, 200, [199, 0, 130]), (4, 4, 1000, [777])],
)
def test_split_attention_equals_the_plain_one(dtype, rule, heads, kv_heads, size, places):
    b, dh = len(places), 16
    qkv, angle, factor, buffer = attention_problem(b, heads, kv_heads, dh, size, dtype)
    place = torch.tensor(places, device=DEVICE)
    kept = buffer.clone()
    ours = flash_decode.attend(
        qkv, angle.cos(), angle.sin(), factor, place, kept, heads=heads, eps=1e-3,
        rotates="rope" in rule, norms="norm" in rule,
    )  # fmt: skip

    q, k, v = qkv.float().view(b, 1, -1, dh).split([heads, kv_heads, kv_heads], dim=2)
    if "rope" in rule:
        turn = turns(angle[None])
        q, k = rotate(q, turn), rotate(k, turn)
        if "norm" in rule:
            q, k = unit_rms(q, 1e-3), unit_rms(k, 1e-3)
    else:
        q = q * factor
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    expected_buffer = buffer.float()
    z = attend_live(q, k, v, expected_buffer, place, None)
    close(kept, expected_buffer, dtype)
    close(ours, z.flatten(1), dtype)


@pytest.mark.parametrize("kind", ["plain", "int4"])
@pytest.mark.parametrize("b", [1, 9])  # at once, sorted
def test_fused_decoding_equals_the_model_across_chunks(kind, b):
    model = tiny(  # a dense RoPE layer, one with experts, and one without RoPE
        hidden_size=64, intermediate_size=32, intermediate_size_mlp=96, num_hidden_layers=3,
        no_rope_layer_interval=3,
    ).to(DEVICE)  # fmt: skip
    if kind != "plain":
        for module in model.layers.modules():
            for name, x in [*module.named_parameters(recurse=False)]:
                if x.ndim > 1 and not isinstance(module, Router):
                    module.put(name, pack(x, kind))
    model.backend = "loop"
    ids = torch.randint(90, (b, 10), device=DEVICE)  # chunks of 8
    cache = model.new_cache(b)
    with torch.no_grad():
        model(ids[:, :6], cache=cache)
        expected = [model(ids[:, t : t + 1], cache=cache)[:, 0] for t in range(6, 10)]
        decoder = StaticDecoder(model, b, max_len=10, kernels="triton")
        decoder.prefill(ids[:, :6])
        for t in range(6, 10):
            torch.testing.assert_close(
                decoder.step(ids[:, t]), expected[t - 6], atol=1e-4, rtol=1e-3
            )
        # The joined weights are still the model's.
        torch.testing.assert_close(model(ids)[:, -1], expected[-1], atol=1e-4, rtol=1e-3)


def test_every_kernel_compiles_for_hopper():
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("for_hopper.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
