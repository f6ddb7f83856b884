"""The bench: every stage at a tiny scale, and what it does when one breaks."""

import json
import re
import signal
from itertools import islice

import bench_workers
import pytest
import torch

import llama4_lab as l4
from llama4_lab import cli
from llama4_lab.bench import layers, run, steps
from llama4_lab.bench.base import Bench, Goal, Row, shrunk
from llama4_lab.bench.clock import Clock
from llama4_lab.bench.layers import Layer
from llama4_lab.bench.weights import seeded_model
from llama4_lab.packed import Packed
from llama4_lab.plan import weight_bytes

CPU = torch.device("cpu")
TINY = shrunk(l4.SCOUT)


@pytest.fixture
def bench(monkeypatch):
    made = Bench(TINY, "int4", "tiny", CPU)
    monkeypatch.setattr(
        made.clock, "compare", lambda calls, *_, **__: Clock.compare(made.clock, calls, 0.0, 1)
    )
    return made


@pytest.fixture
def measured(bench):
    list(run.rates(bench))
    return bench


# ---- stages


def test_the_rates_are_those_of_this_machine(bench):
    copied, multiplied = run.rates(bench)
    assert (copied.value, copied.unit) == (bench.gpu.bandwidth / 1e12, "TB/s")
    assert (multiplied.value, multiplied.unit) == (bench.gpu.bf16 / 1e12, "TFLOP/s")
    assert min(bench.gpu.bandwidth, bench.gpu.bf16) > 1e6


@pytest.mark.parametrize("name", [name for name in run.STAGES if not name.startswith("layer")])
def test_a_stage_of_the_whole_model_yields_its_figures(measured, name):
    with torch.no_grad():
        rows = list(run.STAGES[name][0](measured))
    expected = {"build": 1, "decode": 2, "prefill": 2, "long": 1, "recorded": 1, "pictures": 1}
    assert len(rows) == expected[name]
    assert all(row.value > 0 for row in rows)
    if name in ("decode", "prefill", "long"):
        assert all(row.share is not None and row.share > 0 for row in rows)


@pytest.mark.parametrize("name", run.STAGES)
def test_a_dense_model_is_measured_too(name):
    config = shrunk(l4.SCOUT.replace(moe_layers=()))
    assert config.routed_layers == ()
    made = Bench(config, "int4", "tiny", CPU)
    made.clock.compare = lambda calls, *_, **__: Clock.compare(made.clock, calls, 0.0, 1)
    list(run.rates(made))
    with torch.no_grad():
        rows = list(run.STAGES[name][0](made))
    assert bool(rows) == (name not in ("layer-rows", "layer-prompt", "recorded"))


def test_a_shrunk_model_keeps_its_kinds_of_layers():
    assert shrunk(l4.SCOUT).routed_layers == (0, 1, 2, 3)
    assert shrunk(l4.MAVERICK).routed_layers == (1, 3)
    assert shrunk(l4.SCOUT.replace(moe_layers=(0, 9))).routed_layers == (1, 3)
    assert shrunk(l4.SCOUT.replace(num_experts_per_tok=8)).num_experts_per_tok == 4


def test_a_layers_rows_name_the_fastest_path_and_the_others(measured, monkeypatch):
    monkeypatch.setattr(layers, "find_spec", lambda name: None)  # transformers: the slow test
    with torch.no_grad():
        found = [*run.STAGES["layer-prompt"][0](measured)]
        found += islice(run.STAGES["layer-rows"][0](measured), 3)
    rows = {row.what: row for row in found}
    for what in ("1 token, bf16", "1 token, int4", "32 tokens, bf16", "32 tokens, int4"):
        row = rows[f"MoE layer, {what}"]
        assert row.value > 0
        assert row.share > 0
        assert "loop" in row.note
    assert "MoE layer, 32 tokens, bf16, against eager grouped_mm" in rows


def test_a_path_that_gives_other_numbers_is_not_timed(measured, monkeypatch):
    def wrong(*arguments, **options):
        return torch.ones_like(arguments[0])

    monkeypatch.setattr(layers, "find_spec", lambda name: None)
    monkeypatch.setitem(layers.experts.BACKENDS, "grouped", wrong)
    with torch.no_grad():
        row = next(iter(layers.layer_rows(measured)))
    assert not row.note.startswith("grouped")
    assert "grouped: 100% of tokens are off by more than 2%; not timed" in row.note


def test_a_path_that_cannot_run_is_named_with_its_reason(measured, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("needs a GPU of 1999")

    monkeypatch.setattr(layers, "find_spec", lambda name: None)
    monkeypatch.setitem(layers.experts.BACKENDS, "grouped", broken)
    with torch.no_grad():
        row = next(iter(layers.layer_rows(measured)))
    assert "grouped: needs a GPU of 1999" in row.note


def test_all_ways_take_the_same_step(bench):
    ways = steps.Ways(bench, 3, 20)
    with torch.no_grad():
        expected = ways.model().float()
        for _ in range(2):  # and take it again when they are called again
            for way in (ways.launched, ways.replayed, ways.model):
                torch.testing.assert_close(way().float(), expected, rtol=0, atol=0.05)
    assert expected.std() > 0.5
    assert 1 <= ways.distinct() <= 3


def test_a_way_that_gives_other_logits_is_not_timed(bench):
    ways = steps.Ways(bench, 1, 20)
    ways.calls |= {"wrong": lambda: -ways.model(), "broken": lambda: torch.ones(2) @ torch.ones(3)}
    with torch.no_grad():
        ways.check()
    assert set(ways.calls) == {"model", "decoder without graph"}
    assert "wrong off by 2" in ways.notes
    assert any(note.startswith("broken: inconsistent tensor size") for note in ways.notes)


# ---- weights


@pytest.mark.parametrize("kind", ["int4", "fp8", "bf16"])
def test_seeded_models_hold_what_is_planned(kind):
    model = seeded_model(TINY, kind, 0, CPU)
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert held == weight_bytes(TINY, kind)["total"]
    again = seeded_model(TINY, kind, 0, CPU)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_a_seeded_model_without_packing_is_what_random_draws():
    ours, expected = seeded_model(TINY, "bf16", 3, CPU), l4.random(TINY, 3, dtype=torch.bfloat16)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=0)


def test_an_unpacked_layer_is_the_packed_one_in_bfloat16():
    layer = Layer.seeded(TINY, "int4", torch.Generator().manual_seed(0))
    assert isinstance(layer.gate_up, Packed)
    torch.testing.assert_close(
        layer.unpacked().gate_up, layer.gate_up.unpack(torch.bfloat16), rtol=0, atol=0
    )


# ---- goals and lines


def test_goals_are_set_for_the_whole_scout_in_int4_only(bench):
    assert bench.goal(1.0) is None
    full = Bench(l4.SCOUT, "int4", "full", CPU)
    assert full.goal(300) == Goal(300)
    assert Bench(l4.SCOUT, "int8", "full", CPU).goal(300) is None
    fewer = l4.SCOUT.replace(num_hidden_layers=8)
    assert Bench(fewer, "int4", "full", CPU).goal(300) is None


@pytest.mark.parametrize(
    ("row", "text", "is_met"),
    [
        (Row("a", 310.0, "tokens/s", 0.7, Goal(300)), "≥ 300 met", True),
        (Row("a", 15023.4, "tokens/s", 0.7, Goal(15000)), "a 15,023 tokens/s 70% ≥ 15,000", True),
        (Row("a", 310.0, "tokens/s", 0.7, Goal(0.75, of_share=True)), "≥ 75% missed", False),
        (Row("a", 1.004, "times", None, Goal(1.005, at_most=True)), "≤ 1.005 met", True),
        (Row("a", 1.006, "times", None, Goal(1.005, at_most=True)), "≤ 1.005 missed", False),
        (Row("a", 1.0, "s", peak=79.5e9, note="why"), "79.5 GB\n    why", None),
    ],
)
def test_a_line_holds_figure_goal_and_verdict(row, text, is_met):
    assert re.sub(" +", " ", text) in re.sub(" +", " ", str(row))
    assert row.is_met is is_met


# ---- when something breaks


def broken_run(monkeypatch, worker, minutes=1.0):
    monkeypatch.setattr(run, "_work", worker)
    seen = []
    job = run.Job(TINY, "int4", "tiny", "cpu", minutes)
    only = ["build", "decode", "prefill"]
    results = run.run(job, only, lambda results, line: seen.append(line))
    return results, seen


def test_an_interrupt_is_left_to_who_started_it(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    _, seen = broken_run(monkeypatch, bench_workers.tells_what_interrupts_do)
    assert set(seen) == {"interrupts are ignored: True"}
    assert signal.getsignal(signal.SIGINT) == before


def test_a_machine_without_a_load_is_described(monkeypatch):
    monkeypatch.delattr("os.getloadavg")  # as on Windows
    assert run.machine(CPU)["load"].startswith("unknown on ")


def test_every_stage_is_told_once(monkeypatch):
    results, seen = broken_run(monkeypatch, bench_workers.well)
    assert seen == [f"a row of {name}" for name in ("rates", "build", "decode", "prefill")]
    assert results.failures == {}


def test_a_process_that_dies_leaves_the_others_figures(monkeypatch):
    results, seen = broken_run(monkeypatch, bench_workers.dies)
    assert results.rows == seen[:3] + seen[4:]
    assert seen[3] == "decode: its process ended with code 7"
    assert seen[4:] == ["a row of prefill"]
    assert results.failures == {"decode": "its process ended with code 7"}


def test_a_stage_that_takes_too_long_is_stopped(monkeypatch):
    monkeypatch.setitem(run.STAGES, "decode", (steps.decode, 0.002))
    results, seen = broken_run(monkeypatch, bench_workers.hangs)
    assert results.failures == {"decode": "stopped, it took too long"}
    assert seen[-1] == "a row of prefill"


def test_a_lost_device_starts_a_new_process_and_a_small_failure_does_not(monkeypatch):
    results, seen = broken_run(monkeypatch, bench_workers.fails)
    assert results.failures == {"build": "illegal address", "decode": "out of memory"}
    assert seen[-1] == "a row of prefill"
    assert seen.count("a row of rates") == 1


def test_without_rates_nothing_is_measured(monkeypatch):
    results, _ = broken_run(monkeypatch, bench_workers.has_no_rates)
    assert results.failures["rates"] == "no such device"
    assert results.failures["prefill"] == "not run, the rates could not be measured"
    assert results.rows == []


def test_when_the_time_is_up_the_rest_is_named(monkeypatch):
    results, _ = broken_run(monkeypatch, bench_workers.well, minutes=0.0)
    assert results.failures["build"] == "not run, the time was up"
    assert results.summary().startswith("build: not run, the time was up")


# ---- the command


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--scale", "tiny", "--only", "decoding"], "unknown stage 'decoding'; choose layer-rows,"),
        ([], "the full scale needs a GPU: add --scale tiny to --device cpu"),
    ],
)
def test_what_cannot_be_benched_says_what_can(arguments, sentence, capsys):
    assert cli.main(["bench", "--device", "cpu", *arguments]) == 1
    assert sentence in capsys.readouterr().err


def test_without_a_gpu_the_bench_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench"]) == 1
    expected = "no CUDA GPU was found: run this on a machine with one, or try the stages here with"
    assert expected in capsys.readouterr().err


def test_a_slow_plain_model_is_timed_once(bench, monkeypatch):
    monkeypatch.setattr(steps, "_PATIENCE", 0.0)
    ways = steps.Ways(bench, 1, 20)
    with torch.no_grad():
        ways.check()
    assert set(ways.calls) == {"decoder without graph"}
    assert "timed once" in ways.notes[0]


def test_a_run_that_lost_a_stage_fails_and_keeps_its_figures(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run, "_work", bench_workers.fails_at_once)
    file = tmp_path / "figures.json"
    arguments = ["--device", "cpu", "--scale", "tiny", "--only", "build,decode"]
    assert cli.main(["bench", *arguments, "--json", str(file)]) == 1
    assert "stages without all their figures: decode" in capsys.readouterr().err
    assert json.loads(file.read_text())["failures"] == {"decode": "out of memory"}


@pytest.mark.slow
def test_the_bench_runs_end_to_end_on_a_cpu(tmp_path, capsys):
    file = tmp_path / "figures.json"
    arguments = ["--device", "cpu", "--scale", "tiny", "--layers", "2", "--json", str(file)]
    assert cli.main(["bench", *arguments]) == 0
    out = capsys.readouterr().out
    saved = json.loads(file.read_text())
    assert saved["failures"] == {}
    assert saved["machine"]["device"] == "CPU"
    for row in saved["rows"]:
        assert row["what"] in out
    assert "against transformers'" in out
    assert len(saved["rows"]) > 15
