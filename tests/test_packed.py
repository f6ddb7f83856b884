"""Packed weights: what comes out is what went in, to half a step."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

import llama4_lab.packed
from llama4_lab import compiled
from llama4_lab.packed import KINDS, Packed, linear, pack, pack_nibbles, unpack_nibbles


def weight(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(*shape):
    return weight(*shape, seed=1)


@pytest.mark.parametrize("shape", [(6, 256), (3, 5, 128), (2, 96)])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_every_weight_is_within_half_a_step(kind, shape):
    given = weight(*shape)
    packed = pack(given, kind)
    assert packed.shape == given.shape and packed.group == min(128, shape[-1] & -shape[-1])
    grouped = given.unflatten(-1, (-1, packed.group))
    step = grouped.abs().amax(-1, keepdim=True) / {"int8": 127, "int4": 7}[kind]
    off = (packed.unpack().view_as(grouped) - grouped).abs()
    # Half a step, and the rounding of the scale to bfloat16: 2**-9 of a number.
    assert (off <= step * 0.5 + grouped.abs() * 2**-8 + 1e-6).all()
    assert off.max() > step.min() * 0.4  # it does round


def test_fp8_keeps_three_bits_behind_the_point():
    given = weight(4, 64)
    off = (pack(given, "fp8").unpack() - given).abs()
    least = given.abs().amax(-1, keepdim=True) / 448 * 2**-6  # below it numbers are subnormal
    assert (off <= given.abs().maximum(least) / 16 + 1e-9).all()
    assert off.max() > 0.01


def test_nibbles_of_a_group_are_its_two_halves():
    codes = torch.arange(-8, 8, dtype=torch.int8)[None]
    packed = pack_nibbles(codes, group=8)
    in_pairs = [(0, 4), (1, 5), (2, 6), (3, 7), (8, 12), (9, 13), (10, 14), (11, 15)]
    assert packed.tolist() == [[low + 16 * high for low, high in in_pairs]]
    assert torch.equal(unpack_nibbles(packed, group=8), codes)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_indexing_picks_experts(kind):
    given = weight(3, 4, 64)
    given[1] = 0.0
    packed = pack(given, kind)
    assert isinstance(packed, Packed) and len(packed) == 3
    assert packed[1].unpack().abs().max() == 0.0
    assert torch.equal(packed[2].unpack(), packed.unpack()[2])


@pytest.mark.parametrize(
    ("kind", "bytes_per_weight"), [("int8", 1 + 2 / 128), ("int4", 0.5 + 2 / 128), ("fp8", 1.0)]
)
def test_sizes_are_as_announced(kind, bytes_per_weight):
    packed = pack(weight(8, 2048), kind)
    scales_of_fp8 = 8 * 4 if kind == "fp8" else 0
    assert packed.nbytes == 8 * 2048 * bytes_per_weight + scales_of_fp8


def test_what_cannot_be_packed_is_explained():
    with pytest.raises(ValueError, match=r"unknown kind 'int3'.*choose int8, int4, fp8"):
        pack(weight(2, 64), "int3")
    with pytest.raises(ValueError, match=r"rows of 64 weights.*groups of 48 for int8"):
        pack(weight(2, 64), "int8", group=48)
    with pytest.raises(ValueError, match=r"groups of 1 for int4: give a divisor that is even"):
        pack(weight(2, 63), "int4")


# ---- products


@pytest.mark.parametrize("rows", [(), (1,), (2,), (2, 3), (20,), (50,)])
@pytest.mark.parametrize("k", [384, 96, 40])  # groups of 128, 32 and 8
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_the_unpacked_weight(kind, k, rows):
    packed, x = pack(weight(7, k), kind), inputs(*rows, k)
    expected = x.double() @ packed.unpack(torch.float64).mT
    torch.testing.assert_close(linear(x, packed).double(), expected, atol=1e-5, rtol=1e-5)
    # In bfloat16 each weight and each sum is off by 2**-9 of itself, or half of its last bit.
    x, found = x.bfloat16().double(), linear(x.bfloat16(), packed)
    exact, most = (f(x) @ f(packed.unpack(torch.float64)).mT for f in (lambda y: y, torch.abs))
    assert found.dtype == torch.bfloat16 and found.shape == (*rows, 7)
    assert ((found.double() - exact).abs() <= 2**-9 * (exact.abs() + most) * 1.01).all()


@pytest.mark.parametrize("threads", [2, 3, 9])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_several_threads_give_what_one_gives_to_the_bit(kind, threads, monkeypatch):
    packed, x, used = pack(weight(21, 96), kind), inputs(5, 96), []
    alone, beside = linear(x, packed), compiled.beside

    def note(calls):
        calls = list(calls)
        used.append(len(calls))
        beside(calls)

    monkeypatch.setattr(compiled, "beside", note)
    monkeypatch.setattr(compiled, "_PRODUCTS_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(linear(x, packed), alone)
    assert used == [min(threads, 6)]  # four outputs at a time


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.008), ("int4", 0.14), ("fp8", 0.04)])
def test_a_product_is_as_near_to_the_exact_one_as_the_codes_allow(kind, bound):
    # Rounding to steps s is noise of variance s²/12; of 128 normal numbers the largest is near 2.7,
    # so that s/sqrt(12) is 0.006 (int8) or 0.11 (int4) of their spread. fp8 has steps of 2**-3 of
    # a number's power of two.
    exact, x = weight(64, 1024), inputs(5, 1024)
    off = linear(x, pack(exact, kind)) - x @ exact.mT
    assert bound / 3 < off.std() / (x @ exact.mT).std() < bound


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_through_a_packed_weight(kind):
    packed, x = pack(weight(7, 64), kind), inputs(2, 3, 64).requires_grad_()
    given = weight(2, 3, 7)
    linear(x, packed).backward(given)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, given @ packed.unpack(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_large_weights_are_cut_into_blocks(kind, monkeypatch):
    packed, x = pack(weight(50, 64), kind), inputs(9, 64)
    whole = linear(x, packed)
    monkeypatch.setattr(llama4_lab.packed, "_BLOCK", 7 * 64)
    monkeypatch.setattr(llama4_lab.packed, "_PACKED_AT_ONCE", 3 * 64)
    blocks = [block.clone() for block in llama4_lab.packed._blocks(packed, torch.float32)]
    assert [len(block) for block in blocks] == [7] * 7 + [1]
    assert torch.equal(torch.cat(blocks), packed.unpack())
    torch.testing.assert_close(linear(x, packed), whole)
    assert torch.equal(pack(weight(50, 64), kind).unpack(), packed.unpack())


def test_a_plain_weight_is_multiplied_as_ever():
    x, w = inputs(3, 16), weight(5, 16)
    assert torch.equal(linear(x, w), torch.nn.functional.linear(x, w))


def test_a_product_is_seen_as_a_torch_function():
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append((func, args))
            return func(*args, **(kwargs or {}))

    x, packed = inputs(1, 32), pack(weight(4, 32), "int4")
    with Watch():
        linear(x, packed)
    assert (linear, (x, packed)) in seen
