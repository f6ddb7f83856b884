"""Every backend equals the readable loop, whatever the routing."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from llama4_lab import experts
from llama4_lab.experts import grouped, loop, probe
from llama4_lab.packed import pack

D, FF = 16, 24


def weights(num_experts, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(num_experts, 2 * FF, D, generator=generator) / 4
    down = torch.randn(num_experts, D, FF, generator=generator) / 4
    return gate_up.to(dtype), down.to(dtype)


def shared_weights():
    return torch.randn(FF, D) / 4, torch.randn(FF, D) / 4, torch.randn(D, FF) / 4


def swiglu(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


ROUTINGS = {
    "random": lambda n, e, k: torch.rand(n, e).topk(k, dim=-1).indices,
    "all_to_the_last": lambda n, e, k: torch.arange(e - k, e).flip(0).expand(n, k),
    "some_experts_unused": lambda n, e, k: torch.rand(n, e // 2 + k).topk(k, dim=-1).indices,
}


@pytest.mark.parametrize("backend", [name for name in experts.BACKENDS if name != "loop"])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 16, 1), (7, 4, 1), (33, 16, 2), (50, 128, 1), (20, 3, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backend_equals_the_loop(backend, routing, shape, dtype):
    n, e, topk = shape
    chosen = ROUTINGS[routing](n, e, topk) % e
    order, offsets = experts.sort(chosen, e)
    arguments = (
        torch.randn(n, D).to(dtype),
        order,
        offsets,
        torch.rand(n, topk).to(dtype),
        *weights(e, dtype),
    )
    expected = loop.apply(*arguments)
    # bfloat16 keeps 8 bits; sums of outputs of order 1 may be rounded in another order.
    torch.testing.assert_close(
        experts.BACKENDS[backend](*arguments),
        expected,
        atol=1e-5 if dtype == torch.float32 else 0.05,
        rtol=0.02,
    )


@pytest.mark.parametrize("backend", experts.BACKENDS)
def test_gradients_equal_those_of_the_dense_formula(backend):
    gate_up, down = (w.requires_grad_() for w in weights(4))
    x = torch.randn(9, D, requires_grad=True)
    router = torch.randn(4, D, requires_grad=True)
    shared = shared_weights()
    leaves = (x, router, gate_up, down)

    def dense():
        logits = x @ router.T
        top = logits.topk(2)
        kept = torch.full_like(logits, -torch.inf).scatter(1, top.indices, top.values).sigmoid()
        gate, up = torch.einsum("ne,nd,efd->enf", kept, x, gate_up).chunk(2, dim=-1)
        return torch.einsum("enf,edf->nd", F.silu(gate) * up, down) + swiglu(x, *shared)

    ours = experts.moe(x, router, (gate_up, down), shared, topk=2, backend=backend)
    torch.testing.assert_close(ours, dense(), atol=1e-5, rtol=1e-5)
    target = torch.randn(9, D)
    expected = torch.autograd.grad((dense() * target).sum(), leaves)
    actual = torch.autograd.grad((ours * target).sum(), leaves)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_permuting_tokens_permutes_outputs():
    x, permutation = torch.randn(12, D), torch.randperm(12)
    router, pair, shared = torch.randn(4, D), weights(4), shared_weights()
    out = experts.moe(x, router, pair, shared)
    torch.testing.assert_close(experts.moe(x[permutation], router, pair, shared), out[permutation])


def test_the_score_multiplies_the_input_not_the_output():
    x, pair = torch.randn(1, D), weights(1)
    order, offsets = experts.sort(torch.zeros(1, 1, dtype=torch.long), 1)
    half = loop.apply(x, order, offsets, torch.tensor([[0.5]]), *pair)
    full = loop.apply(x, order, offsets, torch.ones(1, 1), *pair)
    torch.testing.assert_close(half, loop.apply(x / 2, order, offsets, torch.ones(1, 1), *pair))
    assert (half - full / 2).abs().max() > 0.01


def test_scores_are_taken_in_float32():
    logits = torch.tensor([[3.0, 5.0]], dtype=torch.bfloat16)
    _, score = experts.route(logits)
    assert score.item() == torch.sigmoid(torch.tensor(5.0)).bfloat16().item()


def test_sorting_is_stable_and_counts_every_slot():
    chosen = torch.tensor([[2, 0], [2, 1], [0, 2]])
    order, offsets = experts.sort(chosen, 4)
    assert order.tolist() == [1, 4, 3, 0, 2, 5]
    assert offsets.tolist() == [0, 2, 3, 6, 6]


def test_grouped_falls_back_where_torch_cannot_run():
    x = torch.zeros(1)
    assert grouped.can_run(weights(2)[0], x)
    assert not grouped.can_run(torch.zeros(2, 8, 5), x)
    assert not grouped.can_run(weights(2, torch.float64)[0], x.double())
    assert not grouped.can_run(weights(2)[0], x.double())
    order, offsets = experts.sort(torch.tensor([[1], [0]]), 2)
    odd = torch.randn(2, 10, 5), torch.randn(2, 5, 5)
    arguments = torch.randn(2, 5), order, offsets, torch.rand(2, 1), *odd
    torch.testing.assert_close(grouped.apply(*arguments), loop.apply(*arguments))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'fast'; choose auto, loop, numba"):
        experts.moe(
            torch.zeros(1, D), torch.zeros(2, D), weights(2), shared_weights(), backend="fast"
        )


@pytest.mark.parametrize("backend", experts.BACKENDS)
@torch.no_grad()
def test_no_tokens_make_no_output(backend):
    router, pair = torch.randn(3, D), weights(3)
    out = experts.moe(torch.randn(0, D), router, pair, shared_weights(), topk=2, backend=backend)
    assert out.shape == (0, D)


@pytest.mark.parametrize("backend", experts.BACKENDS)
@torch.no_grad()
def test_packed_experts_equal_unpacked_ones(backend):
    pair = tuple(pack(w, "int4", 2) for w in weights(3))
    x, router, shared = torch.randn(9, D), torch.randn(3, D), shared_weights()
    found = experts.moe(x, router, pair, shared, topk=2, backend=backend)
    unpacked = tuple(w.unpack() for w in pair)
    torch.testing.assert_close(
        found, experts.moe(x, router, unpacked, shared, topk=2, backend="loop"), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("backend", ["auto", *experts.BACKENDS])
@torch.no_grad()
def test_sizes_that_do_not_fit_are_refused(backend):
    x, router, (gate_up, down) = torch.randn(4, D), torch.randn(3, D), weights(3)
    gate, up, out = shared_weights()

    def refused(sentence, router=router, pair=(gate_up, down), shared=(gate, up, out), topk=1):
        moe = inspect.unwrap(experts.moe)  # without the checks that only tests make
        with pytest.raises(ValueError, match=sentence):
            moe(x, router, pair, shared, topk=topk, backend=backend)

    theirs = gate_up.mT.contiguous(), down.mT.contiguous()
    refused(rf"gate_up of shape \(3, {D}, {2 * FF}\) does not fit 3 experts", pair=theirs)
    refused(rf"router of shape \(3, 4\) .* of width {D}: it must be", router=torch.randn(3, 4))
    refused("shared down of shape", shared=(gate, up, gate))
    refused("topk=4 is impossible with 3 experts: choose 1 to 3", topk=4)
    refused("topk=0 is impossible", topk=0)


def test_few_tokens_on_a_gpu_read_packed_experts_as_they_are(monkeypatch):
    monkeypatch.setattr(probe, "CHOSEN", "auto")
    with FakeTensorMode():
        few, many = (torch.empty(n, 64, device="cuda:0") for n in (512, 513))
    plain = torch.randn(2, 64, 64)
    for kind in ("int8", "int4"):
        assert experts.choose_backend(few, pack(plain, kind)) == "triton"
        assert experts.choose_backend(many, pack(plain, kind)) == "loop"  # in float32
    for weights in (plain, pack(plain, "fp8")):
        assert experts.choose_backend(few, weights) == "loop"
