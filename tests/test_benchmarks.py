"""The benchmark scripts run, and time nothing whose output is not equal."""

import itertools
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import llama4_lab as l4
from llama4_lab.packed import Packed, linear

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import clock
import experts as layers
import instruments
import model as whole_model
import packed as packed_weights
import peers

TINY = instruments.CONFIG.replace(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=8,
    intermediate_size=24,
    num_local_experts=3,
    attention_chunk_size=8,
)
THEIRS = [row for row in instruments.MEASURES if row not in instruments.OURS]


@pytest.fixture(scope="module", autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmark") / "model"


@pytest.fixture(scope="module")
def lab(folder, no_grad):
    return instruments.prepare(TINY, 16, folder, repeats=1)


@pytest.fixture
def no_clock(monkeypatch):
    def ratios(*args, **kwargs):
        raise AssertionError("a clock was started")

    monkeypatch.setattr(instruments, "ratios", ratios)
    monkeypatch.setattr(peers, "ratios", ratios)


@pytest.mark.parametrize("row", [row for row in THEIRS if row not in ("honesty", "exactness")])
def test_every_row_of_ours_gives_cells_of_the_table(lab, row):
    cells = getattr(lab, row)()
    assert cells
    assert cells.keys() <= instruments.ROWS.keys()


def test_a_long_pattern_is_pooled_in_a_process_of_its_own(lab):
    cells = lab.tiles(tokens=2048)
    assert cells.keys() <= instruments.ROWS.keys()
    assert 0 < cells["tiles"].value < 60
    assert 0.05 < cells["tiles_memory"].value < 1
    text = instruments.table({"tiles": clock.Cell("61.0", 61.0)}, {})
    assert "61.0 ✗" in text


@pytest.mark.slow
def test_the_shares_are_those_of_layers_and_tokens(lab):
    lines = lab.share().splitlines()
    assert [line.split("|")[0].strip() for line in lines[1:]] == [*"0123", "tokens only"]
    assert lines[1].count("× 0.750") == 1
    assert lines[3].endswith("× 0.031")  # half of the layers, a sixteenth of the tokens


@pytest.mark.slow
def test_transformers_fills_its_column_in_an_interpreter_of_its_own(lab, folder):
    found = instruments.ask("transformers", sys.executable, folder, THEIRS, repeats=1)
    cells = found["cells"]
    assert [cell.note for cell in cells.values() if cell.text == "failed"] == []
    assert {"routers", "everything", "heads", "counterfactual", peers.OURS} <= cells.keys()
    assert cells["exactness"].value == 0
    text = instruments.table({"exactness": cells[peers.OURS]}, {"transformers": found})
    assert "largest difference to transformers' logits" in text


def test_a_peer_that_is_not_installed_has_rows_that_say_so(folder, monkeypatch, capsys):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["peers.py", "nnsight", str(folder)])
    peers.main()
    found = {"version": "", "cells": {}}
    assert peers.json.loads(capsys.readouterr().out) == found
    text = instruments.table({"honesty": clock.Cell("0")}, {"nnsight": found})
    assert "not installed" in text


@pytest.mark.parametrize("row", ["routers", "everything", "resume", "heads", "counterfactual"])
def test_nothing_of_ours_is_timed_that_is_not_equal(lab, row, no_clock, monkeypatch):
    with pytest.raises(AssertionError, match="clock"):
        getattr(lab, row)()
    in_full = instruments.Lab.in_full
    monkeypatch.setattr(instruments.Lab, "in_full", lambda lab, edits: in_full(lab, edits) + 0.01)
    monkeypatch.setitem(lab.__dict__, "logits", lab.logits + 0.01)
    with pytest.raises(ValueError, match=r"differs by .* it is not timed"):
        getattr(lab, row)()


@pytest.mark.parametrize(
    ("row", "value"),
    [("routers", "router_logits"), ("heads", "headless"), ("counterfactual", "forced")],
)
def test_nothing_of_a_peer_is_timed_that_is_not_equal(lab, folder, row, value, no_clock):
    peer = peers.Transformers(folder)
    with pytest.raises(AssertionError, match="clock"):
        peers.MEASURES[row](peer, 1)
    peer.expected[value] += 0.01
    with pytest.raises(ValueError, match=r"differs by .* it is not timed"):
        peers.MEASURES[row](peer, 1)


def test_a_peer_with_other_weights_is_refused(lab, folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    values = load_file(folder / peers.EXPECTED)
    save_file(values | {"logits": values["logits"] + 0.01}, other / peers.EXPECTED)
    with pytest.raises(ValueError, match="logits: differs"):
        peers.measure("transformers", other, THEIRS, 1)


def test_an_edit_is_silent_only_without_change_warning_and_error():
    plain = torch.zeros(2)

    def warned():
        peers.warnings.warn("discarded", stacklevel=1)
        return plain

    def refused():
        raise ValueError("no such point")

    edits = {"a.3.x": lambda: plain, "b": lambda: plain + 1, "c": warned, "d": refused}
    cell = peers.honesty_cell(edits, plain)
    assert (cell.text, cell.value) == ("1 of 4", 1)
    assert cell.note == "2 of 4 edits refused or warned of; silent: a.*.x"


def test_a_nudge_changes_every_number():
    floats, whole = torch.randn(5), torch.tensor([0, 0])
    changed = peers.nudge((floats, [whole], torch.tensor([True]), "name"))
    assert (changed[0] != floats).all()
    assert (changed[1][0] != whole).all()
    assert not changed[2].any()
    assert changed[3] == "name"


def test_shared_memory_is_counted_once():
    x = torch.zeros(6)
    assert clock.floats([x, x[:2], x.view(2, 3), torch.zeros(4)]) == 10


def test_every_point_is_edited(lab):
    assert lab.honesty()["honesty"].text == f"0 of {len(l4.points(TINY))}"


def test_interpreters_are_named_for_all_or_one():
    found = instruments.interpreters(["python3", "nnsight=other"])
    assert found == {"transformers": "python3", "transformer_lens": "python3", "nnsight": "other"}


# ---- model.py


@pytest.fixture(scope="module")
def bench(tmp_path_factory, no_grad):
    config = TINY.replace(num_local_experts=5)
    return whole_model.prepare(config, 160, tmp_path_factory.mktemp("whole"), repeats=1)


@pytest.mark.parametrize("measure", whole_model.MEASURES)
def test_every_measure_of_the_model_gives_rows_of_the_table(bench, measure):
    cells = getattr(bench, measure)()
    assert cells
    assert cells.keys() <= whole_model.ROWS.keys()
    assert all(cell.value > 0 for cell in cells.values())


@pytest.mark.parametrize("measure", ["decode", "prefill", "routers"])
def test_nothing_of_the_model_is_timed_that_is_not_equal(bench, measure, monkeypatch):
    def ratios(*args):
        raise AssertionError("a clock was started")

    monkeypatch.setattr(whole_model, "ratios", ratios)
    with pytest.raises(AssertionError, match="clock"):
        getattr(bench, measure)()
    wrong = itertools.count(1)
    with (
        bench.ours.register_forward_hook(lambda _, ids, logits: logits + next(wrong)),
        pytest.raises(ValueError, match=r"differs by .* it is not timed"),
    ):
        getattr(bench, measure)()


def test_targets_of_the_model_are_held_against_their_columns():
    cells = {"decode": clock.Cell("20", 20.0), "load": clock.Cell("20", 20.0)}
    lines = whole_model.table({16: cells, 128: cells}).splitlines()
    assert [part.strip() for part in lines[2].split("|")[1:]] == ["20 × ✓", "20 × ✗", "≥ 18, 90"]
    assert [part.strip() for part in lines[3].split("|")[1:]] == ["20 ms ✓", "20 ms ✓", "≤ 30"]


@pytest.fixture(scope="module")
def moe_layer():
    return layers.Layer(num_experts=3, width=16, hidden=24)


def test_a_row_of_the_layer_benchmark_has_every_column(moe_layer):
    cells = layers.row(moe_layer, tokens=2, repeats=1)
    assert len(cells) == len(layers.COLUMNS)
    assert cells[0] == "3 experts, 2 tokens"
    assert layers.table([cells]).count("≥ 0") == 2


def test_a_layer_that_is_not_equal_is_not_timed(moe_layer, monkeypatch):
    monkeypatch.setattr(layers.Layer, "loop", lambda layer, x: layer.ours(x) * 1.001)
    monkeypatch.setattr(layers, "ratios", None)
    with pytest.raises(ValueError, match=r"loop, 2 tokens: differs by .* it is not timed"):
        layers.row(moe_layer, tokens=2, repeats=1)


def test_the_table_of_packed_weights_has_a_row_for_each_number_of_tokens():
    head, _, *rows = packed_weights.table(24, 32, [1, 3], repeats=1).splitlines()
    assert [part.strip() for part in head.split("|")] == [
        *("tokens", "float32 by the library", "bfloat16 by the library", "float32", "bfloat16"),
        *("int8", "int4", "int8 of bfloat16", "int4 of bfloat16"),
    ]
    assert [row.split()[0] for row in rows] == ["1", "3"]
    assert all(row.count("×") == 7 for row in rows)


def test_a_packed_model_decodes_what_the_rounded_one_does():
    head, _, row = packed_weights.steps(TINY, repeats=1).splitlines()
    assert head.split()[0] == "tokens" and row.split()[0] == "1"
    assert row.count("ms") == 6 and row.count("×") == 5


def test_a_packed_model_that_is_not_equal_is_not_timed(monkeypatch):
    monkeypatch.setattr(packed_weights, "decoder", lambda model, ids: lambda: torch.rand(3))
    monkeypatch.setattr(packed_weights, "ratios", None)
    with pytest.raises(ValueError, match=r"int8, decoded: differs by .* it is not timed"):
        packed_weights.steps(TINY, repeats=1)


@pytest.mark.parametrize(("kind", "name"), [(Tensor, "float32"), (Packed, "int8")])
def test_a_product_that_is_not_equal_is_not_timed(kind, name, monkeypatch):
    def product(x, w):
        return linear(x, w) * (1.001 if isinstance(w, kind) else 1)

    monkeypatch.setattr(packed_weights, "linear", product)
    monkeypatch.setattr(packed_weights, "ratios", None)
    with pytest.raises(ValueError, match=rf"^{name}, 2 tokens: differs by .* it is not timed"):
        packed_weights.table(24, 32, [2], repeats=1)
