"""Attention by compiled code: what it gives, and when it is left to PyTorch."""

import threading

import pytest
import torch
from tiny import tiny
from torch.overrides import TorchFunctionMode

from llama4_lab import compiled, loading
from llama4_lab.experts import probe
from llama4_lab.model import attention

T, WIDTH = 70, 12


def heads(b=2, h=4, kv=2, t=T, s=T, dh=WIDTH, layout="b t h dh"):
    """Return random q, k and v, whose numbers lie in memory in the order of the layout."""
    found = []
    for count, length in ((h, t), (kv, s), (kv, s)):
        if layout == "b t h dh":
            found.append(torch.randn(b, length, count, dh).transpose(1, 2))
        else:
            found.append(torch.randn(b, count, length, dh))
    return found


def exact(q, k, v, before):
    """Return what the definition says, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    query, key = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    return (scores.masked_fill(key > before + query, -torch.inf).softmax(dim=-1) @ v).float()


@pytest.fixture
def calls(monkeypatch):
    """Let this machine have what the kernel asks for, and note each call of it."""
    noted = []

    def note(*given, **named):
        noted.append(given)
        return by_kernel(*given, **named)

    by_kernel = attention._by_kernel
    monkeypatch.setattr(attention, "_has_wide_vectors", lambda: True)
    monkeypatch.setattr(attention, "_by_kernel", note)
    return noted


@pytest.mark.parametrize("layout", ["b t h dh", "b h t dh"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"t": 1, "s": 1},
        {"t": 1, "s": 9},
        {"t": 32, "s": 32},
        {"t": 33, "s": 70, "kv": 4},
        {"t": 100, "s": 100, "kv": 1, "dh": 7},
        {"t": 40, "s": 600, "b": 1},  # several blocks of keys
        {"t": 300, "s": 300, "b": 1, "dh": 1},
        {"t": 258, "s": 515, "b": 3, "dh": 32},
    ],
)
@torch.no_grad()
def test_it_is_what_the_definition_says(sizes, layout):
    q, k, v = heads(**sizes, layout=layout)
    t, s = q.shape[2], k.shape[2]
    for before in {s - t, s, 0, 3}:  # causal at the end, everything, and causal at the beginning
        found = attention._by_kernel(q, k, v, before)
        torch.testing.assert_close(found, exact(q, k, v, before), atol=2e-6, rtol=2e-6)


@torch.no_grad()
def test_scores_may_be_large_and_grow_from_block_to_block():
    q, k, v = heads(b=1, t=600, s=600)
    k *= torch.arange(1, 601)[:, None]
    found = attention._by_kernel(q, k, v, 0)
    assert (q @ k.repeat_interleave(2, 1).mT).max() > 5000
    # Scores of 10⁴ are off by 10⁻³ in float32, and weights by as large a share.
    torch.testing.assert_close(found, exact(q, k, v, 0), atol=2e-3, rtol=0)
    torch.testing.assert_close(attention._by_kernel(0 * q, k, v, 0), exact(0 * q, k, v, 0))


@torch.no_grad()
def test_what_comes_later_changes_nothing_to_the_bit():
    q, k, v = heads(t=300, s=300)
    before = attention._by_kernel(q, k, v, 0)
    for at in (31, 32, 255, 299):
        changed = [x.index_fill(2, torch.arange(at, 300), 9.0) for x in (q, k, v)]
        assert torch.equal(attention._by_kernel(*changed, 0)[:, :, :at], before[:, :, :at])


@torch.no_grad()
def test_what_is_no_number_stays_none():
    q, k, v = heads()
    for x in (q, k, v):
        changed = [y.clone() for y in (q, k, v)]
        changed[[y is x for y in (q, k, v)].index(True)][0, :, 20] = torch.nan
        found = attention._by_kernel(*changed, 0)
        assert found[0, :, 20].isnan().all()
        assert found[1].isfinite().all()


@pytest.mark.parametrize("before", [0, 40, 600])
@pytest.mark.parametrize("threads", [1, 2, 5, 8])  # of 4 key heads: some share one
@torch.no_grad()
def test_several_threads_and_parts_give_what_one_gives_to_the_bit(threads, before, monkeypatch):
    q, k, v = heads(t=600, s=640)
    expected = attention._by_kernel(q, k, v, before)
    torch.testing.assert_close(expected, exact(q, k, v, before), atol=2e-6, rtol=2e-6)
    shares, beside = [], compiled.beside

    def note(calls):
        calls = list(calls)
        shares.append(len(calls))
        beside(calls)

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(compiled, "_PRODUCTS_A_THREAD", 1)
    monkeypatch.setattr(compiled, "beside", note)
    monkeypatch.setattr(attention, "_AT_ONCE", 224)
    assert torch.equal(attention._by_kernel(q, k, v, before), expected)
    assert shares == [threads]


@torch.no_grad()
def test_models_take_it_and_give_what_they_give_without(calls, monkeypatch):
    model, ids = tiny(attention_chunk_size=40), torch.randint(3, 89, (2, 130))
    ids[:, 1:10] = model.config.image_token_index
    pixels = torch.randn(2, 3, 24, 24)
    found = model(ids, pixels)
    # Of RoPE layers the 3 whole chunks at once, and 10 tokens behind them by PyTorch.
    patches, layers = [4 * 9 + 1] * 2, [40 if chunk else 130 for chunk in model.chunks]
    assert [given[0].shape[2] for given in calls] == patches + layers
    monkeypatch.setattr(probe, "CHOSEN", "loop")
    torch.testing.assert_close(model(ids, pixels), found, atol=1e-5, rtol=0)
    assert len(calls) == len(patches + layers)


@torch.no_grad()
def test_patches_attend_to_all_others_by_it(calls):
    q, k, v = heads(h=2, t=37, s=37)
    torch.testing.assert_close(attention.full(q, k, v), exact(q, k, v, 37), atol=2e-6, rtol=2e-6)
    assert len(calls) == 1
    q, k, v = heads(h=2, t=9, s=9)
    torch.testing.assert_close(attention.full(q, k, v), exact(q, k, v, 9), atol=2e-6, rtol=2e-6)
    assert len(calls) == 1


def test_it_is_left_to_pytorch_where_more_than_values_is_wanted(calls, monkeypatch):
    q, k, v = heads()
    expected = exact(q, k, v, 0)

    def check(*given, count=0):
        # Of bfloat16's eight bits; what matters here is who computes it.
        torch.testing.assert_close(attention.causal(*given).float(), expected, atol=2e-2, rtol=0)
        assert len(calls) == count

    for i in range(3):
        given = [q, k, v]
        given[i] = given[i].clone().requires_grad_()
        check(*given)
    with torch.autocast("cpu", torch.bfloat16):
        check(q, k, v)
    check(*(x.bfloat16() for x in (q, k, v)))
    check(*(x.double() for x in (q, k, v)))
    check(*(x.mT.contiguous().mT for x in (q, k, v)))
    check(torch.nn.Buffer(q), k, v, count=1)
    found, back = torch.func.vjp(lambda v: attention.causal(q, k, v), v)
    assert back(found)[0].any() and len(calls) == 1
    with monkeypatch.context() as m:
        m.setattr(probe, "CHOSEN", "padded")
        check(q, k, v, count=1)
    monkeypatch.setattr(attention, "_has_wide_vectors", lambda: False)
    check(q, k, v, count=1)


@torch.no_grad()
def test_what_watches_torchs_functions_sees_it(calls):
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.extend(x for x in args if isinstance(x, torch.Tensor))
            return func(*args, **(kwargs or {}))

    q, k, v = heads()
    with Watch():
        attention.causal(q, k, v)
    assert calls and all(any(x is y for y in seen) for x in (q, k, v))


@torch.no_grad()
def test_until_it_is_compiled_pytorch_attends(calls, monkeypatch):
    done = threading.Event()
    monkeypatch.setattr(probe, "CHOSEN", "auto")
    monkeypatch.setattr(loading, "_PATIENCE", 0.01)
    monkeypatch.setattr(attention, "LOADING", loading.Loading("a slow one", done.wait))
    given = heads()
    first = attention.causal(*given)
    assert not calls
    done.set()
    attention.LOADING.wait()
    torch.testing.assert_close(attention.causal(*given), first, atol=2e-6, rtol=2e-6)
    assert len(calls) == 1


def test_it_is_compiled_once_for_all_and_kept(monkeypatch):
    from llama4_lab.model import attention_kernel

    monkeypatch.setattr(attention, "_has_wide_vectors", lambda: True)
    attention._load()
    assert attention._is_kept()
    attention._by_kernel(*heads(), before=0)
    attention._by_kernel(*heads(layout="b h t dh"), before=0)
    assert len(attention_kernel.attend.signatures) == 1
