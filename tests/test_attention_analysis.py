"""Rows, tiles and summaries of attention say what the dense pattern says."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_tokenizer import small_tokenizer
from tiny import CONFIG
from torch.distributions import Categorical
from torch.utils._python_dispatch import TorchDispatchMode

import llama4_lab as l4
from llama4_lab.analysis import attention
from llama4_lab.analysis.attention import (
    KeysAndQueries,
    head_summaries,
    keys_and_queries,
    log_normaliser,
    rows,
    summarise,
    tiles,
)
from llama4_lab.edits import Chunk, edited
from llama4_lab.model.attention import visible
from llama4_lab.prompt import Prompt, build_prompt

TEXT = "The user asks the assistant:\n  what colour is it?"
ROPE, NOPE = 2, 3


@pytest.fixture
def prompt(tmp_path) -> Prompt:
    return build_prompt(small_tokenizer(tmp_path), TEXT)


def model(**changes) -> l4.Llama4:
    return l4.random(CONFIG.replace(vocab_size=336, **changes)).eval()


def drawn(n: int, dh: int = 16, sharpness: float = 4.0) -> torch.Tensor:
    """Queries and keys in float64 whose scores are `sharpness` wide."""
    return sharpness**0.5 * torch.randn(2, n, dh).double()


def dense(q, k, chunk) -> torch.Tensor:
    """The whole pattern: scores as the model takes them, the rest in float64."""
    position = torch.arange(len(q))[None]
    scores = (q @ k.T * q.shape[1] ** -0.5).double()
    mask = visible(position, position, chunk)[0]
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)


def pooled(pattern, queries, keys, block) -> tuple[torch.Tensor, torch.Tensor]:
    """The maximum and the mean of every tile, by torch's pooling."""
    window = pattern[slice(*queries), slice(*keys)][None]
    size = [min(pair) for pair in zip(block, window.shape[1:], strict=True)]
    options = {"kernel_size": size, "ceil_mode": True}
    mean = F.avg_pool2d(window, **options, count_include_pad=False)
    return F.max_pool2d(window, **options)[0], mean[0]


def small_blocks(monkeypatch):
    """Make the stream cut a short sequence often, and never where chunks or tiles end."""
    monkeypatch.setattr(attention, "_ROWS", 5)
    monkeypatch.setattr(attention, "_KEYS", 7)


def test_tiles_of_2048_tokens_are_the_pooled_pattern_of_the_model(prompt):
    n, long = 2048, model(attention_chunk_size=600, num_hidden_layers=4)
    ids = torch.randint(4, 89, (1, n))
    prompt = replace(prompt, input_ids=ids, attention_mask=torch.ones_like(ids), texts=[["."] * n])
    with torch.no_grad(), l4.trace(long, "layers.[23].attn.pattern") as cache:
        long.hidden(ids)
    for layer in (ROPE, NOPE):
        q, k, chunk = keys_and_queries(long, prompt, layer).head(5)
        check_pooled(q, k, chunk, cache[f"layers.{layer}.attn.pattern"][0, 5])


@pytest.mark.parametrize("chunk", [None, 600])
def test_tiles_of_2048_sharp_queries_are_the_pooled_pattern(chunk):
    q, k = drawn(2048, dh=128).float()
    check_pooled(q, k, chunk, dense(q, k, chunk))


def check_pooled(q, k, chunk, pattern):
    for block in ((32, 32), (100, 7), (500, 2048)):
        got = tiles(q, k, chunk, block=block)
        peak, mean = pooled(pattern, got.queries, got.keys, block)
        np.testing.assert_allclose(got.max, peak, rtol=0, atol=1e-6)
        np.testing.assert_allclose(got.mean, mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [None, 8, 1, 100])
@pytest.mark.parametrize("block", [(1, 1), (3, 4), (10, 2), (2, 16), (29, 29), (64, 1), (1, 64)])
@pytest.mark.parametrize(
    "window", [(None, None), ((3, 26), (6, 22)), ((9, 29), (2, 17)), ((4, 5), (20, 29))]
)
def test_tiles_of_any_window_and_zoom_are_the_pooled_pattern(monkeypatch, chunk, block, window):
    small_blocks(monkeypatch)
    q, k = drawn(29)
    queries, keys = window
    got = tiles(q, k, chunk, block=block, queries=queries, keys=keys)
    assert (got.queries, got.keys, got.block) == (queries or (0, 29), keys or (0, 29), block)
    pattern = dense(q, k, chunk)
    peak, mean = pooled(pattern, got.queries, got.keys, block)
    np.testing.assert_allclose(got.max, peak, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got.mean, mean, rtol=0, atol=1e-6)
    _, seen = pooled((pattern > 0).double(), got.queries, got.keys, block)
    np.testing.assert_allclose(got.visible, seen, rtol=0, atol=1e-6)
    assert (got.max[got.visible == 0] == 0).all()
    kept = log_normaliser(q, k, chunk)
    again = tiles(q, k, chunk, block=block, queries=queries, keys=keys, normaliser=kept)
    np.testing.assert_allclose(again.max, got.max, rtol=0, atol=1e-6)
    np.testing.assert_allclose(again.mean, got.mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [None, 8])
def test_scores_far_beyond_the_range_of_exp_are_pooled_exactly(monkeypatch, chunk):
    small_blocks(monkeypatch)
    q, k = drawn(29, sharpness=1000.0)
    peak, _ = pooled(dense(q, k, chunk), (0, 29), (0, 29), (4, 4))
    np.testing.assert_allclose(tiles(q, k, chunk, block=(4, 4)).max, peak, rtol=0, atol=1e-6)
    assert log_normaliser(q, k, chunk).abs().max() > 1000
    assert np.isfinite(summarise(q, k, chunk).entropy).all()


class Largest(TorchDispatchMode):
    """Counts the numbers of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else (out,)
        self.numel = max(self.numel, *(x.numel() for x in made if isinstance(x, torch.Tensor)), 0)
        return out


@pytest.mark.parametrize("chunk", [None, 250])
@pytest.mark.parametrize("width", [16, 1, 800])  # keys in a tile
def test_no_array_grows_with_the_square_of_the_length(monkeypatch, chunk, width):
    monkeypatch.setattr(attention, "_ROWS", 64)
    monkeypatch.setattr(attention, "_KEYS", 64)
    n, dh = 800, 4
    q, k = drawn(n, dh)
    with Largest() as largest:
        tiles(q, k, chunk, block=(n, width))  # as many tiles across as their width makes
        summarise(q, k, chunk, border=100)
        log_normaliser(q, k, chunk)
    assert 64 * 64 <= largest.numel <= 3 * 64 * 64 < n**2 / 50


@pytest.mark.parametrize("chunk", [None, 8])
def test_rows_are_rows_of_the_pattern_and_forbidden_cells_exactly_zero(chunk):
    q, k = drawn(29)
    pattern = dense(q, k, chunk)
    got = rows(q, k, chunk, [0, 28, 7, 8])
    torch.testing.assert_close(got, pattern[[0, 28, 7, 8]], rtol=0, atol=1e-6)
    assert torch.equal(got == 0, pattern[[0, 28, 7, 8]] == 0)
    assert rows(q, k, chunk, []).shape == (0, 29)


@pytest.mark.parametrize("chunk", [None, 8])
def test_the_normaliser_turns_a_score_into_attention(monkeypatch, chunk):
    small_blocks(monkeypatch)
    q, k = drawn(29)
    score = (q @ k.T).diagonal() / 4
    share = (score - log_normaliser(q, k, chunk)).exp()
    torch.testing.assert_close(share, dense(q, k, chunk).diagonal(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [None, 8])
def test_summaries_are_moments_of_the_pattern(monkeypatch, chunk):
    small_blocks(monkeypatch)
    q, k = drawn(29)
    pattern = dense(q, k, chunk)
    p, entropy = pattern.numpy(), Categorical(pattern).entropy()
    query, key = np.arange(29)[:, None], np.arange(29)
    s = summarise(q, k, chunk, border=8)
    np.testing.assert_allclose(s.distance, (p * (query - key)).sum(1), atol=1e-5)
    np.testing.assert_allclose(s.entropy, entropy, atol=2e-6)
    first = 0 * key if chunk is None else key // chunk * chunk
    np.testing.assert_allclose(s.sink, p[key, first], atol=1e-6)
    np.testing.assert_allclose(s.crossing, (p * (key < query // 8 * 8)).sum(1), atol=1e-6)
    assert chunk is None or (s.crossing == 0).all()
    assert (summarise(q, k, chunk).crossing == 0).all()


@pytest.mark.parametrize("chunk", [None, 100])
def test_summaries_of_flat_attention_have_closed_forms(chunk):
    q = k = torch.zeros(1500, 4)
    s = summarise(q, k, chunk)
    back = np.arange(1500) % (chunk or 1500)
    np.testing.assert_allclose(s.distance, back / 2, rtol=1e-6)
    np.testing.assert_allclose(s.entropy, np.log1p(back), rtol=1e-6)
    np.testing.assert_allclose(s.sink, 1 / (1 + back), rtol=1e-6)


def test_bfloat16_is_read_as_the_numbers_it_holds():
    q, k = drawn(29).bfloat16()
    got = tiles(q, k, 8, block=(4, 4))
    np.testing.assert_array_equal(got.max, tiles(q.float(), k.float(), 8, block=(4, 4)).max)
    assert rows(q, k, 8, [5]).dtype == torch.float32


@pytest.mark.parametrize("layer", [ROPE, NOPE])
def test_keys_and_queries_make_the_pattern_of_every_head(prompt, layer):
    traced_model = model()
    traced = keys_and_queries(traced_model, prompt, layer)
    assert (traced.layer, traced.chunk) == (layer, CONFIG.attention_chunk(layer))
    with torch.no_grad(), l4.trace(traced_model, f"layers.{layer}.attn.pattern") as cache:
        traced_model(**prompt)
    pattern = cache[f"layers.{layer}.attn.pattern"][0]
    every = range(len(prompt.tokens))
    got = torch.stack([rows(*traced.head(head), every) for head in range(6)])
    torch.testing.assert_close(got, pattern, rtol=0, atol=1e-6)


def test_the_pattern_is_never_computed(prompt, monkeypatch):
    monkeypatch.setattr("llama4_lab.model.text.observed", None)
    assert head_summaries(model(), prompt).entropy.shape == (6, 6)


def test_head_summaries_are_averages_over_queries(prompt):
    summarised = model()
    got = head_summaries(summarised, prompt, [NOPE, ROPE])
    assert (got.layers, got.chunks, got.border) == ((NOPE, ROPE), (None, 8), 8)
    for row, layer in enumerate(got.layers):
        traced = keys_and_queries(summarised, prompt, layer)
        for head in range(6):
            s = summarise(*traced.head(head), border=8)
            for name in ("distance", "entropy", "sink", "crossing"):
                assert getattr(got, name)[row, head] == getattr(s, name).mean()
    assert (got.crossing[0] > 0).all()
    assert (got.crossing[1] == 0).all()
    assert head_summaries(summarised, prompt, []).distance.shape == (0, 6)


def test_borders_are_the_models_whatever_its_first_layer_may_see(prompt):
    summarised = model()
    with edited(summarised, [Chunk(0, None)]):
        got = head_summaries(summarised, prompt)
    assert got.border == 8
    assert got.chunks == (None, 8, 8, None, 8, 8)
    assert (got.crossing[[0, 3]] > 0).all()


def test_changes_of_queries_are_seen_and_changes_of_the_pattern_refused(prompt):
    changed = model()
    name = f"layers.{NOPE}.attn.rot_q"
    with l4.intervene(changed, {name: torch.zeros_like}):
        flat = head_summaries(changed, prompt, [NOPE])
    np.testing.assert_allclose(flat.distance, (len(prompt.tokens) - 1) / 4, rtol=1e-5)
    for point in ("scores", "pattern"):
        name = f"layers.{NOPE}.attn.{point}"
        with (
            l4.intervene(changed, {name: lambda x: x}),
            pytest.raises(ValueError, match=f"'{name}' is changed here, and queries"),
        ):
            keys_and_queries(changed, prompt, NOPE)


def test_a_trace_of_the_pattern_around_changes_nothing(prompt):
    traced = model()
    with l4.trace(traced, "layers.*.attn.pattern") as cache:
        got = keys_and_queries(traced, prompt, NOPE)
    pattern = rows(*got.head(0), range(len(prompt.tokens)))
    torch.testing.assert_close(pattern, cache[f"layers.{NOPE}.attn.pattern"][0, 0])


def test_prompts_of_several_rows_or_with_padding_are_refused(tmp_path, prompt):
    batch = build_prompt(small_tokenizer(tmp_path), ["one", "two"])
    with pytest.raises(ValueError, match="this prompt has 2 rows: take one"):
        keys_and_queries(model(), batch, 0)
    mask = prompt.attention_mask.clone()
    mask[:, :3] = 0
    sentence = f"this prompt of {len(prompt.tokens)} tokens has 3 of padding: build it as one row"
    with pytest.raises(ValueError, match=sentence):
        head_summaries(model(), replace(prompt, attention_mask=mask))


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda q: tiles(q, q, 0, block=(1, 1)), "a chunk of 0 tokens is empty: give 1 or more"),
        (lambda q: rows(q, q[:4], None, [0]), "9 queries and 4 keys: give both of the same tokens"),
        (lambda q: rows(q, q, None, [9]), "query 9 is out of range: this head has 9 queries (0 to"),
        (lambda q: rows(q, q, None, [-1]), "query -1 is out of range: this head has 9 queries"),
        (
            lambda q: tiles(q, q, None, block=(1, 1), queries=(5, 5)),
            "queries 5 to 5 are no window of 9 tokens: give (begin, end) with 0 <= begin < end",
        ),
        (
            lambda q: tiles(q, q, None, block=(1, 1), keys=(3, 10)),
            "keys 3 to 10 are no window of 9 tokens: give (begin, end)",
        ),
        (lambda q: tiles(q, q, None, block=(2, 0)), "a tile of 2 x 0 cells is empty: give 1"),
        (
            lambda q: tiles(q, q, None, block=(1, 1), normaliser=torch.zeros(4)),
            "a normaliser of 4 queries does not fit 9: take log_normaliser of this head",
        ),
        (
            lambda q: KeysAndQueries(3, torch.zeros(6, 9, 4), torch.zeros(2, 9, 4), None).head(6),
            "head 6 is out of range: layer 3 has 6 query heads (0 to 5)",
        ),
    ],
)
def test_what_cannot_be_is_explained(ask, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ask(torch.zeros(9, 4))


def test_a_layer_out_of_range_is_explained(prompt):
    for layer in (-1, 6):
        with pytest.raises(ValueError, match=f"layer {layer} is out of range: this model has 6"):
            head_summaries(model(), prompt, [0, layer])
