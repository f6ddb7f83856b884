"""Properties of the model that no single number shows."""

import inspect

import pytest
import torch
from tiny import CONFIG, tiny

import llama4_lab as l4
from llama4_lab.cache import KVCache
from llama4_lab.model.attention import attend
from llama4_lab.model.static import StaticDecoder

pytestmark = pytest.mark.usefixtures("no_grad")


def some_ids(rows=2, length=37, seed=0):
    return torch.randint(4, 89, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pieces", [[1] * 37, [8, 8, 8, 8, 5], [5, 11, 1, 20], [36, 1]])
def test_decoding_equals_one_full_pass(pieces):
    model, ids = tiny(), some_ids()
    cache = model.new_cache(2)
    parts = [model(part, cache=cache) for part in ids.split(pieces, dim=1)]
    # Different shapes of the same products: rounding only.
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [8, 100])
def test_buffers_that_grow_keep_what_they_hold(chunk):
    model, ids = tiny(attention_chunk_size=chunk), some_ids(2, 300)
    cache, sizes = model.new_cache(2), set()
    parts = []
    for part in ids.split([60, 10, *[1] * 70, 100, 60], dim=1):
        parts.append(model(part, cache=cache))
        sizes.add(tuple(layer.buffer.shape[3] for layer in cache.layers))
    assert len(sizes) > 2
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("slots", [16, 18, 21])  # in the chunk of 8 that is under way
def test_a_cache_that_is_set_back_has_forgotten_what_came_last(slots):
    model, ids = tiny(), some_ids()
    cache = model.new_cache(2)
    for part in (*ids[:, :slots].split(5, dim=1), some_ids(seed=1)[:, slots:23]):
        model(part, cache=cache)
    cache.slots = slots
    found = model(ids[:, slots:], cache=cache)
    torch.testing.assert_close(found, model(ids)[:, slots:], atol=1e-5, rtol=0)


def test_a_cache_of_wider_numbers_changes_nothing():
    model, ids = tiny().bfloat16(), some_ids(1)
    cache, wide = model.new_cache(), KVCache(CONFIG)
    assert wide.layers[0].buffer.dtype == torch.float32
    for part in ids.split([11, 1, 25], dim=1):
        assert torch.equal(model(part, cache=wide), model(part, cache=cache))


def test_decoding_with_ragged_left_padding_equals_each_row_alone():
    # Without temperature: with it, transformers counts padding slots, and so do we.
    model, ids = tiny(attn_temperature_tuning=False), some_ids(3)
    pad = [0, 5, 12]
    mask = torch.stack([torch.arange(37) >= count for count in pad]).long()
    cache, parts, done = model.new_cache(3), [], 0
    for size in (4, 3, 6, 1, 1, 9, 13):
        end = done + size
        # The mask may cover everything so far, or only the new slots.
        part = mask[:, :end] if size % 2 else mask[:, done:end]
        parts.append(model(ids[:, done:end], attention_mask=part, cache=cache))
        done = end
    logits = torch.cat(parts, dim=1)
    for row, count in enumerate(pad):
        alone = model(ids[row : row + 1, count:])
        torch.testing.assert_close(logits[row : row + 1, count:], alone, atol=1e-5, rtol=0)


# Compiled experts take two tokens of an expert at once, so that the rounding of a token depends on
# who shares its expert: less than 1e-6 of logits of order 1. The loop is exact.
ROUNDING = {"loop": 0.0, "numba": 1e-6}


@pytest.mark.parametrize("backend", ROUNDING)
def test_a_later_token_never_changes_an_earlier_logit(backend):
    model, ids = tiny(), some_ids(1)
    model.backend = backend
    before = model(ids)
    changed = ids.clone()
    changed[0, 20] = (ids[0, 20] + 1) % 80 + 4
    after = model(changed)
    assert (before - after)[:, :20].abs().max() <= ROUNDING[backend]
    assert (before - after)[:, 20:].abs().max() > 1e-3


@pytest.mark.parametrize("backend", ROUNDING)
def test_rope_layers_do_not_see_past_their_chunk_and_nope_layers_do(backend):
    ids = some_ids(1)
    changed = ids.clone()
    changed[0, 3] = (ids[0, 3] + 1) % 80 + 4
    chunked = tiny(no_rope_layers=(1,) * 6)
    chunked.backend = backend
    difference = (chunked(ids) - chunked(changed)).abs().amax(-1)[0]
    assert difference[3:8].min() > 1e-5
    assert difference[8:].max() <= ROUNDING[backend]
    mixed = tiny()
    mixed.backend = backend
    assert (mixed(ids) - mixed(changed)).abs().amax(-1)[0, 8:].max() > 1e-5


def test_a_chunk_of_none_sees_the_whole_past():
    ids = some_ids(1)
    everything = tiny(attention_chunk_size=None)
    torch.testing.assert_close(
        everything(ids), tiny(attention_chunk_size=100)(ids), atol=1e-5, rtol=0
    )


def test_the_chunk_buffer_never_outgrows_one_chunk():
    model = tiny()
    cache = model.new_cache(1)
    for part in some_ids(1, 200).split(7, dim=1):
        model(part, cache=cache)
    sizes = [layer.buffer.shape[3] for layer in cache.layers]
    rope = [CONFIG.uses_rope(i) for i in range(6)]
    assert all(size <= 8 for size, uses_rope in zip(sizes, rope, strict=True) if uses_rope)
    assert all(size >= 200 for size, uses_rope in zip(sizes, rope, strict=True) if not uses_rope)
    assert cache.bytes() == sum(layer.buffer.numel() * 4 for layer in cache.layers)


def test_the_residual_stream_is_the_sum_of_its_contributions():
    model, ids = tiny(), some_ids()
    with l4.trace(model, "layers.*") as cache:
        model(ids)
    for i in range(6):
        at = {
            name.removeprefix(f"layers.{i}."): v
            for name, v in cache.items()
            if f"layers.{i}." in name
        }
        torch.testing.assert_close(at["resid_pre"] + at["attn.out"], at["resid_mid"])
        if CONFIG.is_moe(i):
            added = at["experts.out"].sum(2) + at["shared.out"]
        else:
            added = at["mlp.out"]
        torch.testing.assert_close(at["resid_mid"] + added, at["resid_post"])


def test_temperature_is_one_up_to_the_floor_and_follows_the_published_table():
    from llama4_lab.model.text import Step

    config = l4.SCOUT
    table = {
        0: 1.0,
        8190: 1.0,
        8191: 1.0693147,
        16382: 1.0693147,
        16383: 1.1098613,
        262143: 1.3496507,
    }
    cache = l4.KVCache(config.replace(num_hidden_layers=0))
    for slot, expected in table.items():
        cache.slots = slot
        step = Step.begin(config, 1, [0], cache, "cpu")
        assert step.temperature.item() == pytest.approx(expected, abs=1e-7)


def zeros_at(slots, where):
    """A mask of two rows with (row, zeros in front)."""
    mask = torch.ones(2, slots, dtype=torch.long)
    if where:
        mask[where[0], : where[1]] = 0
    return mask


def filled(mask):
    """A cache of two rows that holds 20 slots."""
    model = tiny()
    cache = model.new_cache(2)
    model(some_ids(2)[:, :20], None, mask, cache)
    return cache


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (lambda: (torch.zeros(1, 0, dtype=torch.long),), "input_ids holds no token"),
        (lambda: (some_ids(1), None, None, None, 0), "keep_last 0 keeps no position: give 1 or"),
        (
            lambda: (torch.tensor([[5, 97]]),),
            "input_ids hold 5 to 97; this vocabulary has ids 0 to 96",
        ),
        (
            lambda: (some_ids(1), torch.zeros(1, 3, 20, 24)),
            r"tiles of shape \(3, 20, 24\) do not fit this model, which takes \(3, 24, 24\)",
        ),
        (
            lambda: (some_ids(1), torch.zeros(1, 3, 24, 24)),
            "1 tiles make 9 image tokens, but input_ids hold 0 tokens with id 90",
        ),
        (
            lambda: (some_ids(1), None, torch.ones(1, 5, dtype=torch.long)),
            r"attention_mask of shape \(1, 5\) does not fit 1 rows of 37 new and 0 cached slots",
        ),
        (
            lambda: (
                some_ids(1),
                None,
                torch.ones(1, 37, dtype=torch.long).index_fill(1, torch.tensor(9), 0),
            ),
            "attention_mask has a 0 behind a 1: only left padding is supported",
        ),
        (
            lambda: (some_ids(2)[:, :8], None, zeros_at(8, (1, 2)), filled(zeros_at(20, ()))),
            "row 1 holds 20 tokens behind 0 of padding, and the mask puts 2 more behind it; keep",
        ),
        (
            lambda: (some_ids(2)[:, :8], None, zeros_at(28, (0, 3)), filled(None)),
            "row 0 holds 20 tokens behind 0 of padding, and the mask begins with 3; keep the padd",
        ),
        (
            lambda: (some_ids(2)[:, :8], None, zeros_at(28, ()), filled(zeros_at(20, (1, 3)))),
            "row 1 holds 17 tokens behind 3 of padding, and the mask begins with 0; keep the padd",
        ),
        (
            lambda: (some_ids(1), None, None, tiny().new_cache(2)),
            "a cache for 2 rows was given 1 rows",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny()(*arguments())


def test_a_row_may_begin_behind_others_that_are_cached():
    model, ids = tiny(attn_temperature_tuning=False), some_ids(2)
    first, rest = zeros_at(20, (1, 20)), zeros_at(17, (1, 3))
    alone = model(ids[1:, 23:])
    for mask in (rest, torch.cat([first, rest], dim=1)):
        cache = model.new_cache(2)
        model(ids[:, :20], None, first, cache)
        again = model(ids[:, 20:], None, mask, cache)
        torch.testing.assert_close(again[1:, 3:], alone, atol=1e-5, rtol=0)
        assert cache.pad == [0, 23]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_ids_of_any_whole_numbers_will_do(dtype):
    ids, model = some_ids(1), tiny()
    assert torch.equal(model(ids), model(ids.to(dtype)))


def test_a_text_model_refuses_pictures_and_a_model_without_tokenizer_refuses_texts():
    with pytest.raises(ValueError, match="no vision encoder; leave pixel_values out"):
        tiny(vision_config=None)(some_ids(1), torch.zeros(1, 3, 24, 24))
    with pytest.raises(ValueError, match="this model has no tokenizer"):
        tiny().prompt("hello")


def test_random_weights_are_the_same_for_a_seed_and_keep_the_stream_in_range():
    a, b, c = tiny(0).state_dict(), tiny(0).state_dict(), tiny(1).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])
    logits = tiny()(some_ids())
    assert 0.3 < logits.std() < 3


@pytest.mark.parametrize("t", [1, 4])
def test_a_shared_past_is_attended_to_like_copies_of_it(t):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, t, 8, generator=generator) for heads in (4, 2, 2))
    past_k, past_v = torch.randn(2, 1, 2, 5, 8, generator=generator).expand(-1, 3, -1, -1, -1)
    copied = attend(q, k, v, past_k.clone(), past_v.clone())
    shared = attend(q, k, v, past_k, past_v)
    torch.testing.assert_close(shared, copied, atol=1e-6, rtol=0)
    later = attend(q, k, v.index_fill(2, torch.tensor([t - 1]), 9.0), past_k, past_v)
    assert torch.equal(later[:, :, : t - 1], shared[:, :, : t - 1])  # causal among the new ones


def test_what_is_replaced_in_a_model_apart_stays_there():
    model = tiny(vision_config=None)
    ids = torch.arange(3, 40)[None]
    expected, apart = model(ids), model.apart()
    apart.norm.weight = torch.nn.Parameter(torch.zeros(model.config.hidden_size))
    apart.layers[0].register_forward_hook(lambda *given: 0 * given[-1])
    assert apart(ids).abs().max() == 0
    assert torch.equal(model(ids), expected)


def test_a_model_computes_where_it_is_whatever_torchs_default_device_is():
    model, ids = tiny(), some_ids(1, 12)
    ids[0, 2:11] = model.config.image_token_index
    pixels, mask, cache = torch.ones(1, 3, 24, 24), torch.ones_like(ids), model.new_cache()
    expected = model(ids, pixels)
    with torch.device("meta"):
        assert torch.equal(model(ids, pixels, mask), expected)
        model(ids[:, :11], pixels, cache=cache)
        step = model(ids[:, 11:], cache=cache)
    torch.testing.assert_close(step, expected[:, 11:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}, {"experts": "mmap"}])
def test_a_model_apart_is_converted_alone(options):
    model, ids = l4.load("nano", **options), torch.arange(3, 40)[None]
    expected, apart = model(ids), model.apart().bfloat16()
    assert (model.dtype, apart.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(model(ids), expected)
    assert not torch.equal(apart(ids), expected)
    tied = tiny(tie_word_embeddings=True).apart()
    assert tied.lm_head.weight is tied.embed_tokens.weight


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_model_apart_shares_weights_and_no_edits(quantize):
    model = l4.load("nano", quantize=quantize)
    apart, ids = model.apart(), torch.arange(3, 40)[None]
    expected = model(ids)
    assert torch.equal(apart(ids), expected)
    assert {x.data_ptr() for x in apart.parameters()} == {x.data_ptr() for x in model.parameters()}
    edits = [l4.edits.SkipLayer(1), l4.edits.Rope(0, False)]
    with l4.edits.edited(model, edits), l4.trace(apart, "logits") as cache:
        assert not torch.equal(model(ids), expected)
        assert torch.equal(apart(ids), expected) and torch.equal(cache["logits"], expected)
        with pytest.raises(ValueError, match="leave the block"):
            model.apart()
    cache = model.new_cache()
    written = torch.cat([apart(ids[:, :-1], cache=cache), apart(ids[:, -1:], cache=cache)], dim=1)
    # Decoding sums in another order than one pass.
    torch.testing.assert_close(written, expected, atol=1e-4, rtol=1e-4)


def test_a_model_without_a_layer_runs_and_says_what_its_cache_needs():
    model, ids = tiny(), some_ids(1, 12)
    del model.layers[1]
    with pytest.raises(ValueError) as caught:
        model(ids, cache=model.new_cache())
    assert str(caught.value) == (
        "the layers cache keys and values at [0, 2, 3, 4, 5]: after moving some, set each "
        "layers[i].self_attn.layer to i (a layer in two places needs a copy), or run without a "
        "cache"
    )
    expected = model(ids)
    for i, layer in enumerate(model.layers):
        layer.self_attn.layer = i
    cache = model.new_cache()
    parts = [model(part, cache=cache) for part in ids.split([5, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=0)


def test_a_static_decoder_refuses_what_the_model_refuses():
    model = tiny()
    with pytest.raises(ValueError, match=r"^max_len -1 has room for no token: give 1 or more$"):
        StaticDecoder(model, 1, -1)
    decoder = StaticDecoder(model, 1, 20, kernels="torch")
    decoder.prefill(some_ids(1, 5))
    for id in (97, -1):
        with pytest.raises(ValueError, match=rf"^ids hold {id} to {id}; this vocabulary has ids 0"):
            decoder.step(torch.tensor([id]))
    with pytest.raises(TypeError, match=r"^ids=tensor\(\[3\.\]\): give a tensor of whole numbers"):
        inspect.unwrap(StaticDecoder.step)(decoder, torch.tensor([3.0]))
    assert decoder.cache.slots == 5
