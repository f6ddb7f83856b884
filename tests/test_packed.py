"""Packed weights: what comes out is what went in, to half a step."""

import pytest
import torch

from llama4_lab.packed import KINDS, Packed, pack, pack_nibbles, unpack_nibbles


def weight(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


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
