"""Packed weights: what comes out is what went in, to half a step."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import llama4_lab.packed
from llama4_lab import compiled
from llama4_lab.packed import KINDS, Packed, cat, linear, pack, pack_nibbles, unpack_nibbles


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


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_weights_behind_each_other_are_those_of_each(kind):
    plain = [weight(3, 40, 256), weight(1, 40, 256)]
    parts = [pack(each, kind) if kind else each for each in plain]
    whole = cat([parts[0], parts[1][0][None]])
    assert torch.equal(whole.float(), torch.cat([part.float() for part in parts]))
    with pytest.raises(ValueError, match=r"one packing, not int8, unpacked: pack them alike"):
        cat([plain[0], pack(plain[1], "int8")])


def test_what_cannot_be_packed_is_explained():
    with pytest.raises(ValueError, match=r"unknown kind 'int3'.*choose int8, int4, fp8"):
        pack(weight(2, 64), "int3")
    with pytest.raises(ValueError, match=r"rows of 64 weights.*groups of 48 for int8"):
        pack(weight(2, 64), "int8", group=48)
    with pytest.raises(ValueError, match=r"groups of 1 for int4: give a divisor that is even"):
        pack(weight(2, 63), "int4")


# ---- products


@pytest.mark.parametrize("rows", [(), (1,), (2,), (2, 3), (20,), (50,), (70,)])
@pytest.mark.parametrize("k", [384, 320, 96, 40])  # groups of 128, 64, 32 and 8
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
    packed, x, used = pack(weight(21, 256), kind), inputs(5, 256), []
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_inputs_are_as_exact_as_a_group_s_largest_allows(kind, dtype):
    # One of each 256 inputs is ten thousand times as large as the others, so in every other group.
    packed, x = pack(weight(9, 512), kind), inputs(6, 512)
    x[:, ::256] *= 1e4
    x[4], x[5] = 0.0, x[5] * 1e-20
    x = x.to(dtype)
    found = linear(x, packed).double()
    exact, most = (f(x.double()) @ f(packed.unpack(torch.float64)).mT for f in (lambda y: y, abs))
    largest = x.double().unflatten(-1, (-1, 128)).abs().amax(-1)
    weights = packed.unpack(torch.float64).unflatten(-1, (-1, 128)).abs().sum(-1)
    half_a_step = (
        largest @ weights.mT * (0.5 / {torch.float32: 2**30, torch.bfloat16: 2**15}[dtype])
    )
    rounding = {torch.float32: 2**-20 * most, torch.bfloat16: 2**-8 * exact.abs()}[dtype]
    assert ((found - exact).abs() <= 1.01 * half_a_step + rounding).all()
    assert found[4].abs().max() == 0.0 and found[5].abs().max() > 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_row_s_product_does_not_depend_on_the_others(kind, dtype):
    packed, x = pack(weight(6, 256), kind), inputs(32, 256).to(dtype)
    together = linear(x, packed)
    for i in (0, 1, 15, 16, 31):
        assert torch.equal(linear(x[i], packed), together[i])
    assert torch.equal(linear(x[:7], packed), together[:7])


@pytest.mark.parametrize("group", [4096, 8192])  # the second is above what sums have room for
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_largest_sums_of_a_group_are_right(kind, group):
    x = torch.ones(3, 8192)
    x[1], x[2, ::2] = -1.0, -1.0
    packed = pack(torch.ones(2, 8192), kind, group)
    expected = torch.tensor([8192.0, -8192.0, 0.0])[:, None].expand(3, 2)
    # A scale is rounded to bfloat16, 2**-9 of it; a sum too large for its lane is off by 2**32.
    for dtype in (torch.float32, torch.bfloat16):
        torch.testing.assert_close(linear(x.to(dtype), packed).float(), expected, atol=4, rtol=4e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_is_no_number_stays_none(kind, value):
    packed, x = pack(weight(5, 256), kind), inputs(2, 256)
    x[1, 7] = value
    expected = x @ packed.unpack().mT
    torch.testing.assert_close(linear(x, packed), expected, equal_nan=True)
    assert not expected[1].isfinite().any() and expected[0].isfinite().all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_bfloat16_blocks_are_those_of_float32_rounded(kind):
    packed = pack(weight(6, 96), kind)
    (found,) = llama4_lab.packed._blocks(packed, torch.bfloat16)
    assert torch.equal(found, packed.unpack().bfloat16())


def test_without_units_for_bfloat16_many_rows_are_multiplied_in_float32(monkeypatch):
    packed, x = pack(weight(7, 128), "int8"), inputs(33, 128).bfloat16()
    monkeypatch.setattr(llama4_lab.packed, "product_dtype", lambda device: torch.float32)
    expected = (x.float() @ packed.unpack().mT).bfloat16()
    torch.testing.assert_close(linear(x, packed), expected)


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


@pytest.mark.parametrize("width", [96, 130, 256])
def test_inputs_of_another_width_are_refused(width):
    with pytest.raises(ValueError, match=rf"\(3, {width}\) do not fit .* \(5, 128\): .* 128 num"):
        linear(inputs(3, width), pack(weight(5, 128), "int8"))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_second_derivatives_see_every_block(kind, monkeypatch):
    monkeypatch.setattr(llama4_lab.packed, "_BLOCK", 7 * 64)
    packed, x = pack(weight(50, 64), kind), inputs(9, 64).requires_grad_()

    def energy(product):
        return product(x).square().sum()

    def curvature(product):
        (slope,) = torch.autograd.grad(energy(product), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]

    found = curvature(lambda x: linear(x, packed))
    torch.testing.assert_close(
        found, curvature(lambda x: x @ packed.unpack().mT), rtol=1e-4, atol=1
    )


@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("kind", KINDS)
def test_a_view_of_a_packed_weight_is_multiplied_as_what_it_shows(kind, rows):
    packed, x = pack(weight(20, 256), kind), inputs(rows, 256)
    turned = Packed(kind, *(each.t().contiguous().t() for each in (packed.codes, packed.scales)))
    for shown, plain in ((packed[::2], packed.unpack()[::2]), (turned, packed.unpack())):
        y = x.clone().requires_grad_()
        assert torch.equal(shown.unpack(), plain)
        torch.testing.assert_close(linear(x, shown), x @ plain.mT, atol=1e-3, rtol=1e-4)
        given = weight(rows, len(shown))
        linear(y, shown).backward(given)
        torch.testing.assert_close(y.grad, given @ plain, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_see_the_unpacked_weight(kind):
    packed, x, bias = pack(weight(7, 128), kind), inputs(3, 128), weight(7)

    def ours(x):
        return linear(x, packed, bias)

    def plain(x):
        return F.linear(x, packed.unpack(), bias)

    def forward(product, x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(product(forward_ad.make_dual(x, x))).tangent

    for transform in (
        lambda product: torch.func.vmap(product)(x),
        lambda product: torch.func.grad(lambda x: product(x).square().sum())(x),
        lambda product: torch.func.jvp(product, (x,), (x,))[1],
        lambda product: torch.func.jacrev(product)(x[0]),
        lambda product: forward(product, x),
    ):
        torch.testing.assert_close(transform(ours), transform(plain), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [1e-37, 1e-35, 1e-30, 1e31, 1e37])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_inputs_beyond_what_factors_can_hold_take_the_unpacked_weight(kind, size):
    packed, x = pack(weight(9, 256), kind), inputs(2, 256)
    for extreme in (x * size, torch.cat([x[:, :128] * size, x[:, 128:]], dim=1)):
        assert torch.equal(linear(extreme, packed), F.linear(extreme, packed.unpack()))
    x[:, :128] = 0
    assert llama4_lab.packed._product_of_codes(x, packed) is not None


# ---- plain weights


@pytest.fixture(autouse=True, scope="module")
def is_prepared():
    llama4_lab.packed.prepare()
    yield
    llama4_lab.packed._is_prepared.clear()


def test_a_small_plain_weight_is_multiplied_as_ever():
    x, w, bias = inputs(3, 16), weight(5, 16), weight(5)
    assert torch.equal(linear(x, w), F.linear(x, w))
    assert torch.equal(linear(x, w, bias), F.linear(x, w, bias))


@pytest.fixture(params=[True, False], ids=["units", "no units"])
def has_units(request, monkeypatch):
    """Whether the CPU multiplies bfloat16 itself; weights are small enough for tests."""
    monkeypatch.setattr(llama4_lab.packed, "_LEAST", 1)
    dtype = torch.bfloat16 if request.param else torch.float32
    monkeypatch.setattr(llama4_lab.packed, "product_dtype", lambda device: dtype)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(), (1,), (2,), (3,), (8,), (2, 16), (5, 7), (0, 4)])
@pytest.mark.parametrize(("out", "k"), [(9, 40), (1, 7), (50, 128)])
def test_plain_weights_are_multiplied_as_exactly(has_units, out, k, rows, dtype, monkeypatch):
    monkeypatch.setattr(llama4_lab.packed, "_BLOCK", 7 * 128)
    x, w, bias = inputs(*rows, k).to(dtype), weight(out, k).to(dtype), weight(out).to(dtype)
    exact, most = (f(x.double()) @ f(w.double()).mT for f in (lambda y: y, torch.abs))
    found, rounding = linear(x, w), {torch.float32: 2**-20, torch.bfloat16: 2**-8}[dtype]
    assert found.dtype == dtype and found.shape == (*rows, out)
    assert ((found.double() - exact).abs() <= rounding * exact.abs() + 2**-20 * most).all()
    shifted, exact_shifted = linear(x, w, bias), exact + bias.double()
    allowed = rounding * (exact.abs() + exact_shifted.abs())
    assert ((shifted.double() - exact_shifted).abs() <= allowed + 2**-20 * most).all()


@pytest.mark.parametrize("threads", [2, 3, 60])
def test_several_threads_multiply_plain_weights_alike(threads, monkeypatch):
    monkeypatch.setattr(llama4_lab.packed, "_LEAST", 1)
    monkeypatch.setattr(llama4_lab.packed, "product_dtype", lambda device: torch.float32)
    x, w, used = inputs(5, 64).bfloat16(), weight(50, 64).bfloat16(), []
    alone, beside = linear(x, w), compiled.beside

    def note(calls):
        calls = list(calls)
        used.append(len(calls))
        beside(calls)

    monkeypatch.setattr(compiled, "beside", note)
    monkeypatch.setattr(compiled, "_PRODUCTS_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(linear(x, w), alone) and used == [min(threads, 50)]  # outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [2, 40])
def test_plain_weights_pass_gradients_as_ever(has_units, rows, dtype):
    x, w = inputs(rows, 64).to(dtype).requires_grad_(), weight(7, 64).to(dtype)
    given = weight(rows, 7).to(dtype)
    for trained in (False, True):
        x.grad = None
        w = w.detach().requires_grad_(trained)
        linear(x, w).backward(given)
        torch.testing.assert_close(x.grad, given @ w.detach())
    torch.testing.assert_close(w.grad, given.mT @ x.detach())


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 40])
def test_which_products_with_plain_weights_are_the_library_s(rows, monkeypatch):
    x, w, calls = inputs(rows, 1024), weight(1024, 1024), []
    monkeypatch.setattr(
        llama4_lab.packed, "_product", lambda x, w: calls.append(x.dtype) or F.linear(x, w)
    )
    for units in (torch.float32, torch.bfloat16):  # what bfloat16 is multiplied in
        monkeypatch.setattr(llama4_lab.packed, "product_dtype", lambda device, units=units: units)
        calls.clear()
        linear(x, w)
        linear(x.bfloat16(), w.bfloat16())
        # Two rows are the least that take longer than to begin.
        assert (torch.float32 in calls) == (2 <= rows <= 8)
        assert (torch.bfloat16 in calls) == (rows == 2 or (rows > 2 and units == torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_observers_and_transforms_see_products_of_plain_weights(has_units, dtype):
    x, w, bias = (y.to(dtype) for y in (inputs(2, 64), weight(7, 64), weight(7)))
    with FlopCounterMode(display=False) as counter:
        linear(x, w)
    assert counter.get_total_flops() == 2 * 2 * 64 * 7
    each = torch.func.vmap(lambda row: linear(row, w))(x)
    torch.testing.assert_close(each, F.linear(x, w))
    _, slope = torch.func.jvp(lambda x: linear(x, w, bias), (x,), (x,))
    torch.testing.assert_close(slope, F.linear(x, w))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        torch.testing.assert_close(forward_ad.unpack_dual(linear(dual, w)).tangent, F.linear(x, w))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w).dtype == torch.bfloat16
    strided = weight(64, 7).to(dtype).mT
    torch.testing.assert_close(linear(x, strided), F.linear(x, strided))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        linear(x[:, :60], w)


def test_a_product_is_seen_as_a_torch_function(monkeypatch):
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append((func, args))
            return func(*args, **(kwargs or {}))

    x, packed = inputs(1, 32), pack(weight(4, 32), "int4")
    with Watch():
        linear(x, packed)
    assert (linear, (x, packed, None)) in seen
    seen.clear()
    x, plain = x.bfloat16(), packed.unpack(torch.bfloat16)
    monkeypatch.setattr(llama4_lab.packed, "_LEAST", 1)
    with Watch():
        linear(x, plain)
    assert (linear, (x, plain, None)) in seen


@pytest.fixture
def by_onednn(monkeypatch):
    """Have a machine on which oneDNN is ahead, and note what it multiplies."""
    noted, onednn = [], llama4_lab.packed.onednn

    def note(*given):
        noted.append(given)
        return onednn(*given)

    ahead = threading.Event()
    ahead.set()
    monkeypatch.setattr(llama4_lab.packed, "_is_onednn_ahead", ahead)
    monkeypatch.setattr(llama4_lab.packed, "onednn", note)
    return noted


@pytest.mark.parametrize("bias", [None, weight(40)])
def test_many_rows_are_multiplied_by_the_library_that_is_ahead(by_onednn, bias):
    w = weight(40, 24)
    for shape in ((32, 24), (2, 16, 24), (1, 3, 50, 24)):
        x = inputs(*shape)
        torch.testing.assert_close(linear(x, w, bias), F.linear(x, w, bias), atol=1e-5, rtol=1e-5)
    assert len(by_onednn) == 3
    linear(inputs(31, 24), w, bias)
    assert len(by_onednn) == 3


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_many_rows_meet_unpacked_weights_in_the_library_that_is_ahead(by_onednn, kind, monkeypatch):
    monkeypatch.setattr(llama4_lab.packed, "_BLOCK", 64 * 5)  # three rows of weights at a time
    x, w, bias = inputs(40, 64).requires_grad_(), pack(weight(15, 64), kind), weight(15)
    found = linear(x, w, bias)
    assert len(by_onednn) == 3
    torch.testing.assert_close(found, F.linear(x, w.unpack(), bias), atol=2e-5, rtol=1e-5)
    (slope,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(slope, w.unpack().sum(0).expand(40, -1), atol=2e-5, rtol=1e-5)


def test_many_rows_are_left_to_pytorch_where_more_than_values_is_wanted(by_onednn):
    x, w, bias = inputs(50, 24), weight(40, 24), weight(40)
    for wanted in (x, w, bias):
        wanted.requires_grad_()
        (slope,) = torch.autograd.grad(linear(x, w, bias).sum(), wanted)
        assert slope.any() and not by_onednn
        wanted.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w, bias).dtype == torch.bfloat16
    for dtype in (torch.float64, torch.bfloat16):
        assert linear(x.to(dtype), w.to(dtype), bias.to(dtype)).dtype == dtype
    _, slope = torch.func.jvp(lambda x: linear(x, w, bias), (x,), (x,))
    torch.testing.assert_close(slope, F.linear(x, w), atol=1e-5, rtol=1e-5)
    with FlopCounterMode(display=False) as counter:
        linear(x, w)
    assert counter.get_total_flops() == 2 * 50 * 24 * 40
    strided = weight(24, 50).T
    torch.testing.assert_close(linear(strided, w, bias), F.linear(strided, w, bias))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        linear(x[:, :20].contiguous(), w)
    assert not by_onednn
    llama4_lab.packed._is_onednn_ahead.clear()
    linear(x, w, bias)
    assert not by_onednn
    llama4_lab.packed.prefer_onednn()
    linear(x, w, bias)
    assert len(by_onednn) == 1


def test_what_watches_torchs_functions_sees_the_other_library(by_onednn):
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.extend(args)
            return func(*args, **(kwargs or {}))

    x, w = inputs(50, 24), weight(40, 24)
    with Watch():
        linear(x, w)
    assert by_onednn and any(x is y for y in seen) and any(w is y for y in seen)
