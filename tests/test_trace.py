"""Watching: every point exists, has its announced shape, and leaves the logits alone."""

import gc
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import CONFIG, VISION, tiny

import llama4_lab as l4
from llama4_lab.points import NO_TAP, Tap
from llama4_lab.prompt import Prompt, Spans
from llama4_lab.trace import run_with_cache

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def prompt():
    ids = torch.randint(4, 89, (2, 29), generator=torch.Generator().manual_seed(0))
    ids[:, 3:12] = CONFIG.image_token_index
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 24, 24)}


def test_every_point_exists_with_its_announced_axes(prompt):
    model = tiny()
    with l4.trace(model, "*") as cache:
        model(**prompt)
    names = l4.points(CONFIG)
    assert list(names) == sorted(cache, key=list(names).index)
    text = {"b": 2, "t": 29, "s": 29, "d": 48, "h": 6, "k": 2, "dh": 16, "e": 5, "topk": 2, "v": 97}
    vision = {"b": 2, "t": 37, "s": 37, "d": 24, "h": 2, "k": 2, "dh": 12, "f": 96, "p": 9}
    for name, axes in names.items():
        sizes = dict(vision if name.startswith(("vision", "projector")) else text)
        sizes |= {"vision.out": {"d": VISION.vision_output_dim}, "projector.out": {"d": 48}}.get(
            name, {}
        )
        if "f" in axes.split():
            sizes.setdefault("f", 56 if "mlp" in name else 40)
        assert cache[name].shape == tuple(sizes[axis] for axis in axes.split()), name


def test_watching_leaves_logits_bit_identical(prompt):
    model = tiny()
    plain = model(**prompt)
    exact = [name for name in l4.points(CONFIG) if not name.endswith(("scores", "pattern"))]
    exact = [name for name in exact if ".experts." not in name]
    with l4.trace(model, exact) as cache:
        assert torch.equal(model(**prompt), plain)
    assert torch.equal(cache["logits"], plain)
    with l4.trace(model, "layers.*.router.*"):
        assert torch.equal(model(**prompt), plain)
    with l4.trace(model, "*"):
        torch.testing.assert_close(model(**prompt), plain, atol=1e-5, rtol=0)


def test_patterns_are_the_attention_that_the_model_uses(prompt):
    model = tiny()
    with l4.trace(model, ["layers.*.attn.*"]) as cache:
        model(**prompt)
    for i in range(6):
        at = {
            name.split("attn.")[1]: value for name, value in cache.items() if f"layers.{i}." in name
        }
        torch.testing.assert_close(at["pattern"].sum(-1), torch.ones(2, 6, 29))
        torch.testing.assert_close(at["scores"].softmax(-1), at["pattern"])
        values = at["v"].repeat_interleave(3, dim=2)
        torch.testing.assert_close(torch.einsum("bhts,bshd->bthd", at["pattern"], values), at["z"])
        allowed = torch.ones(29, 29, dtype=torch.bool).tril()
        if CONFIG.uses_rope(i):
            chunk = torch.arange(29) // 8
            allowed &= chunk[:, None] == chunk
        assert torch.equal(at["pattern"][0, 0] > 0, allowed)


def test_patterns_with_padding_and_cache_equal_one_pass():
    model = tiny(attn_temperature_tuning=False, vision_config=None)
    ids = torch.randint(4, 89, (2, 29), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    plain = model(ids, attention_mask=mask)
    with l4.trace(model, "layers.*.attn.pattern") as whole:
        torch.testing.assert_close(
            model(ids, attention_mask=mask)[mask.bool()], plain[mask.bool()], atol=1e-5, rtol=0
        )
    patterns = dict(whole)
    cache = model.new_cache(2)
    model(ids[:, :13], attention_mask=mask[:, :13], cache=cache)
    with l4.trace(model, "layers.*.attn.pattern") as rest:
        logits = model(ids[:, 13:], attention_mask=mask, cache=cache)
    torch.testing.assert_close(logits, plain[:, 13:], atol=1e-5, rtol=0)
    for name, pattern in rest.items():
        width = pattern.shape[-1]
        torch.testing.assert_close(pattern, patterns[name][:, :, 13:, -width:], atol=1e-5, rtol=0)


def test_nothing_stays_behind_and_traces_nest(prompt):
    model = tiny()
    with l4.trace(model, "embed") as outer, l4.trace(model, "logits") as inner:
        model(**prompt)
    assert list(outer) == ["embed"]
    assert list(inner) == ["logits"]
    with pytest.raises(RuntimeError), l4.trace(model, "embed"):
        raise RuntimeError
    with l4.trace(model, "embed") as cache:
        pass
    model(**prompt)
    assert cache == {}


def test_nothing_stays_behind_after_an_interrupt(prompt, tmp_path):
    model = tiny()

    def interrupt(value):
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        l4.trace(model, "*", spill=tmp_path) as cache,
        l4.intervene(model, {"layers.3.attn.z": interrupt}),
    ):
        model(**prompt)
    assert model.tap is NO_TAP
    assert list(cache)[-1] == "layers.3.attn.pattern"
    assert {file.stem for file in tmp_path.iterdir()} == set(cache)


@pytest.mark.slow
def test_200_traces_leave_nothing_in_memory():
    model = tiny(num_hidden_layers=2, vision_config=None)
    ids = torch.tensor([[5, 6, 7]])

    def objects():
        return sum(issubclass(type(x), torch.Tensor | Tap) for x in gc.get_objects())

    def once():
        with l4.trace(model, "*", positions=-1) as cache, l4.intervene(model, {"*": torch.clone}):
            model(ids)
        return [weakref.ref(value) for value in cache.values()]

    once()
    gc.collect()
    gc.disable()  # values must go with their dict, not at the next collection
    try:
        before = objects()
        for _ in range(200):
            assert not any(ref() is not None for ref in once())
        assert objects() == before
    finally:
        gc.enable()


def test_values_keep_their_gradients_when_asked(prompt):
    model = tiny()
    with torch.enable_grad(), l4.trace(model, "layers.1.router.logits", detach=False) as cache:
        model(**prompt)
    assert cache["layers.1.router.logits"].requires_grad


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("layers.3.attn.patern", "did you mean 'layers.3.attn.pattern'"),
        ("layers.0.router.logits", "layer 0 is a dense layer; MoE layers are 1, 3, 5"),
        ("layers.1.mlp.out", "layer 1 is a MoE layer; dense layers are 0, 2, 4"),
        ("layers.9.attn.q", r"this model has 6 layers \(0 to 5\)"),
        ("nonsense*", "unknown point 'nonsense"),
    ],
)
def test_unknown_points_are_explained(name, sentence):
    with pytest.raises(KeyError, match=sentence), l4.trace(tiny(), name):
        pass


def test_a_text_model_has_no_vision_points():
    with (
        pytest.raises(KeyError, match="no vision encoder"),
        l4.trace(tiny(vision_config=None), "vision.out"),
    ):
        pass


# --- what is kept of a value -------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "places"),
    [
        (3, [3]),
        (-1, [28]),
        (slice(20, None), list(range(20, 29))),
        (slice(None, None, -7), [28, 21, 14, 7, 0]),
        ([0, -1, 5, 5], [0, 28, 5, 5]),
        (range(4), [0, 1, 2, 3]),
        (np.array([2, -2]), [2, 27]),
        (torch.tensor([1, 2]), [1, 2]),
        (np.int64(7), [7]),
        ([], []),
    ],
)
def test_positions_choose_places_of_the_query_axis_of_text(prompt, positions, places):
    model = tiny()
    with l4.trace(model, "*") as whole, l4.trace(model, "*", positions=positions) as part:
        model(**prompt)
    for name, axes in l4.points(CONFIG).items():
        expected = whole[name]
        if "t" in axes.split() and not name.startswith("vision."):
            expected = expected.index_select(axes.split().index("t"), torch.tensor(places).long())
        assert torch.equal(part[name], expected), name


def test_heads_choose_query_heads_and_leave_keys_and_values_whole(prompt):
    model = tiny()
    with (
        l4.trace(model, "*") as whole,
        l4.trace(model, "*", heads=[-1, 0], positions=slice(5)) as part,
    ):
        model(**prompt)
    sliced = {"q": 2, "rot_q": 2, "z": 2, "scores": 1, "pattern": 1}
    for name, value in whole.items():
        kind = name.rpartition("attn.")[2]
        if kind in sliced:
            last = value.shape[sliced[kind]] - 1
            value = value.index_select(sliced[kind], torch.tensor([last, 0]))
        if not name.startswith(("vision.", "projector.")):
            value = value[:, :, :5] if kind in ("scores", "pattern") else value[:, :5]
        assert torch.equal(part[name], value), name


def test_what_is_kept_of_a_slice_is_all_that_stays_in_memory(prompt):
    model = tiny()
    with l4.trace(model, "layers.*", positions=[3, 4], heads=1) as cache:
        model(**prompt)
    for name, value in cache.items():
        assert value.untyped_storage().nbytes() == value.nbytes, name


def test_dtype_concerns_floating_point_values_only(prompt):
    model = tiny()
    with (
        l4.trace(model, "*") as whole,
        l4.trace(model, "*", dtype=torch.bfloat16, device="cpu") as cache,
    ):
        model(**prompt)
    for name, value in whole.items():
        if value.is_floating_point():
            value = value.bfloat16()
        assert cache[name].dtype == value.dtype
        assert torch.equal(cache[name], value)


def test_device_is_where_values_are_kept(prompt):
    model = tiny()
    with l4.trace(model, "layers.*", device="meta") as cache:
        model(**prompt)
    assert {value.device.type for value in cache.values()} == {"meta"}


def test_slices_keep_their_gradients_when_asked(prompt):
    model = tiny()
    name = "layers.3.resid_post"
    with torch.enable_grad(), l4.trace(model, name, detach=False, positions=-1) as cache:
        model(**prompt)
    assert cache[name].requires_grad
    assert cache[name].shape == (2, 1, 48)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (
            {"positions": 29},
            ValueError,
            r"position 29 is out of range: 'layers.0.resid_pre' has 29 tokens in this forward pass "
            r"\(0 to 28\)",
        ),
        ({"positions": [0, -30]}, ValueError, "position -30 is out of range"),
        (
            {"heads": 6},
            ValueError,
            r"head 6 is out of range: 'layers.0.attn.q' has 6 heads in this forward pass "
            r"\(0 to 5\)",
        ),
        (
            {"positions": torch.tensor([True, False])},
            TypeError,
            r"positions=tensor\(\[.*\]\): give an int, a slice or a sequence of ints",
        ),
        ({"heads": True}, TypeError, "heads=True: give an int, a slice or a sequence of ints"),
        ({"dtype": torch.int8}, ValueError, "cannot be kept as torch.int8: give a floating-point"),
        ({"spill": "x", "detach": False}, ValueError, "leave out device, detach"),
        ({"spill": "x", "device": "cpu"}, ValueError, "leave out device, detach"),
    ],
)
def test_impossible_options_are_explained(prompt, options, error, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny()
    with pytest.raises(error, match=sentence), l4.trace(model, "layers.*", **options):
        model(**prompt)
    assert model.tap is NO_TAP
    assert list(tmp_path.iterdir()) == []


# --- on disk -----------------------------------------------------------------------


def test_spilled_values_are_the_values_and_stay_on_disk(prompt, tmp_path):
    model = tiny().bfloat16()
    folder = tmp_path / "new" / "spill"
    with (
        l4.trace(model, "*") as memory,
        l4.trace(model, "*", spill=folder, positions=slice(1, None, 2)) as disk,
        l4.trace(model, "*", positions=slice(1, None, 2)) as part,
    ):
        model(**prompt)
    assert list(disk) == list(memory)
    assert {file.name for file in folder.iterdir()} == {f"{name}.safetensors" for name in memory}
    opened = l4.load_trace(folder)
    assert opened.keys() == disk.keys()
    for name, value in disk.items():
        assert torch.equal(value, part[name]) and torch.equal(value, opened[name])
        assert torch.equal(load_file(folder / f"{name}.safetensors")[name], part[name])
    if sys.platform == "linux":  # where a process can see its own mappings
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        assert all(str(folder / f"{name}.safetensors") in maps for name in disk)


def test_a_later_pass_replaces_spilled_values_and_leaves_old_tensors_readable(prompt, tmp_path):
    model = tiny()
    ids = prompt["input_ids"]
    with l4.trace(model, "embed", spill=tmp_path) as cache:
        first = model(ids[:, :5]) is not None and cache["embed"]
        kept = first.clone()
        model(ids[:, 5:])
    assert torch.equal(first, kept)
    assert torch.equal(cache["embed"], model.embed_tokens(ids[:, 5:]))
    cache["embed"].zero_()
    stored = load_file(tmp_path / "embed.safetensors")["embed"]
    assert torch.equal(stored, model.embed_tokens(ids[:, 5:]))


def test_what_holds_no_values_or_broken_ones_is_no_trace(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no values: give a folder that a trace"):
        l4.load_trace(tmp_path)
    (tmp_path / "embed.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(ValueError, match=r"embed\.safetensors is broken \(.*\): trace again"):
        l4.load_trace(tmp_path)


def test_mapped_values_give_way_to_later_ones(prompt, tmp_path, mapped_files_stay):
    model = tiny()
    ids = prompt["input_ids"]
    with l4.trace(model, "embed", spill=tmp_path) as cache:
        model(ids[:, :1])
        first = cache["embed"]  # this one alone stays mapped
        for i in (1, 2, 3):
            model(ids[:, i : i + 1])
    assert torch.equal(first, model.embed_tokens(ids[:, :1]))
    assert torch.equal(l4.load_trace(tmp_path)["embed"], model.embed_tokens(ids[:, 3:4]))
    assert len(list(tmp_path.iterdir())) <= 3


def test_a_folder_that_cannot_take_a_spill_is_refused(prompt, tmp_path):
    model = tiny()
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with l4.trace(model, "embed", spill=tmp_path / "spill"):
        model(**prompt)
    for folder, sentence in [
        ("file", "file is a file: give the name of a folder"),
        ("full", "full holds notes.txt: give a new or empty folder"),
        ("spill", "spill holds an earlier spill: give a new or empty folder"),
    ]:
        with (
            pytest.raises(FileExistsError, match=sentence),
            l4.trace(model, "embed", spill=tmp_path / folder),
        ):
            pass
    assert model.tap is NO_TAP


def test_a_value_that_cannot_be_written_is_named(prompt, tmp_path):
    model = tiny()
    with (
        pytest.raises(
            OSError, match=r"'embed' \(11,136 bytes\) could not be spilled to .*make room"
        ),
        l4.trace(model, "embed", spill=tmp_path / "spill"),
    ):
        (tmp_path / "spill").rmdir()
        model(**prompt)
    assert model.tap is NO_TAP


def test_an_interrupted_write_leaves_the_earlier_value_and_no_other_file(
    prompt, tmp_path, monkeypatch
):
    model = tiny()
    ids = prompt["input_ids"]

    def interrupted(tensors, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), l4.trace(model, "embed", spill=tmp_path) as cache:
        model(ids)
        monkeypatch.setattr("llama4_lab.spill.save_file", interrupted)
        model(ids[:, :5])
    assert [file.name for file in tmp_path.iterdir()] == ["embed.safetensors"]
    assert torch.equal(cache["embed"], model.embed_tokens(ids))


# --- run_with_cache ----------------------------------------------------------------


def test_run_with_cache_returns_logits_and_all_but_quadratic_values(prompt):
    model = tiny()
    logits, cache = run_with_cache(model, prompt)
    names = [name for name, axes in l4.points(CONFIG).items() if "s" not in axes.split()]
    assert list(cache) == names
    torch.testing.assert_close(logits, model(**prompt), atol=1e-5, rtol=0)
    assert torch.equal(cache["logits"], logits)


@pytest.mark.parametrize(
    ("names_filter", "names"),
    [
        ("embed", ["embed"]),
        (["layers.1.attn.*pattern", "logits"], ["layers.1.attn.pattern", "logits"]),
        ("blocks.1.attn.hook_pattern", ["blocks.1.attn.hook_pattern"]),
        (
            lambda name: name.endswith("1.resid_mid"),
            ["vision.layers.1.resid_mid", "layers.1.resid_mid"],
        ),
        (
            lambda name: name.endswith("hook_router_scores"),
            [f"blocks.{i}.mlp.hook_router_scores" for i in (1, 3, 5)],
        ),
    ],
)
def test_run_with_cache_keeps_the_spelling_that_was_asked_for(prompt, names_filter, names):
    _, cache = run_with_cache(tiny(), prompt, names_filter)
    assert list(cache) == names


def test_run_with_cache_takes_ids_prompts_and_the_options_of_trace(prompt):
    model = tiny()
    ids = prompt["input_ids"]
    plain = model(ids)
    whole = Prompt(ids, None, torch.ones_like(ids), [[]], Spans(ids, ids, ids, ids, [], [], None))
    for given in (ids, whole):
        logits, cache = run_with_cache(model, given, "logits", positions=-1, dtype=torch.float64)
        assert torch.equal(logits, plain)
        assert torch.equal(cache["logits"], plain[:, -1:].double())
    assert torch.equal(run_with_cache(model, ids[0], "logits")[0], model(ids[:1]))
    with pytest.raises(ValueError, match="this model has no tokenizer"):
        run_with_cache(model, "a text")


def test_run_with_cache_carries_gradients_only_when_asked(prompt):
    model = tiny()
    with torch.enable_grad():
        logits, cache = run_with_cache(model, prompt, "embed")
        assert not logits.requires_grad and not cache["embed"].requires_grad
        logits, cache = run_with_cache(model, prompt, "embed", detach=False)
    assert logits.requires_grad and cache["embed"].requires_grad
    with torch.no_grad():
        logits, cache = run_with_cache(model, prompt, "embed", detach=False)
    assert not logits.requires_grad and not cache["embed"].requires_grad


def test_a_filter_that_wants_nothing_is_refused(prompt):
    with pytest.raises(KeyError, match=r"names_filter wants none of this model's \d+ points"):
        run_with_cache(tiny(), prompt, lambda name: False)


def test_a_change_in_place_spares_what_was_kept_before(prompt):
    model = tiny()

    def zero(value):
        return value.zero_()

    with l4.trace(model, "layers.*.resid_*") as plain:
        model(**prompt)
    with (
        l4.trace(model, "layers.*.resid_*") as cache,
        l4.intervene(model, {"layers.3.resid_pre": zero}),
    ):
        model(**prompt)
    assert cache["layers.3.resid_pre"].count_nonzero() == 0
    assert torch.equal(cache["layers.2.resid_post"], plain["layers.2.resid_post"])
