"""The stages in order, each bounded in time, in a process of their own.

A stage that crashes or overruns takes no other stage's figures with it: what is known is told as
soon as it is known, and the stages behind it go on in a new process.
"""

import gc
import importlib.metadata
import multiprocessing
import os
import pickle
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from llama4_lab.bench import layers, steps
from llama4_lab.bench.base import Bench, Row
from llama4_lab.bench.clock import copy_rate, matrix_rate
from llama4_lab.config import Llama4Config

_START = 60.0  # seconds that a new process may take until it has measured the rates


def rates(bench: Bench) -> Iterator[Row]:
    """Measure the copy bandwidth and the matrix rate that all rooflines of this run use."""
    copied = copy_rate(bench.clock, bench.scale.copied)
    multiplied = matrix_rate(bench.clock, bench.scale.square)
    # fp8 units are twice as fast by their data sheets.
    bench.gpu = replace(bench.gpu, bandwidth=copied, bf16=multiplied, fp8=2 * multiplied)
    yield Row("copy, bytes read and written", copied / 1e12, "TB/s")
    yield Row("product in bfloat16", multiplied / 1e12, "TFLOP/s")


# What a stage does, and the share of the whole time that it may take.
STAGES: dict[str, tuple[Callable[[Bench], Iterator[Row]], float]] = {
    "layer-rows": (layers.layer_rows, 0.25),
    "layer-prompt": (layers.layer_prompt, 0.2),
    "build": (steps.build, 0.25),
    "decode": (steps.decode, 0.3),
    "prefill": (steps.prefill, 0.25),
    "long": (steps.long, 0.2),
    "recorded": (steps.recorded, 0.15),
    "pictures": (steps.pictures, 0.1),
}


@dataclass
class Results:
    """What a run has found so far; `failures` says of a stage why it has no figures, or not all."""

    machine: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` writes."""
        rows = [asdict(row) | {"is_met": row.is_met} for row in self.rows]
        return {"machine": self.machine, "rows": rows, "failures": self.failures}

    def summary(self) -> str:
        goals = [row for row in self.rows if row.goal]
        missed = [row.what for row in goals if not row.is_met]
        lines = [f"{len(goals) - len(missed)} of {len(goals)} goals met"] if goals else []
        lines += [f"missed: {what}" for what in missed]
        return "\n".join(lines + [f"{name}: {why}" for name, why in self.failures.items()])


@dataclass(frozen=True)
class Job:
    """What the processes are to run."""

    config: Llama4Config
    kind: str
    scale: str
    device: str
    minutes: float


def run(job: Job, only: list[str], report: Callable[[Results, str], None]) -> Results:
    """Run stages, and call `report` with what is known so far and what is new.

    Args:
        only: names of `STAGES`; empty for all.
    """
    results = Results(machine(torch.device(job.device)))
    end = time.monotonic() + 60 * job.minutes
    todo = [name for name in STAGES if name in only or not only]
    while todo:
        if time.monotonic() >= end:
            results.failures |= dict.fromkeys(todo, "not run, the time was up")
            break
        _run_child(job, todo, end, results, report)
    return results


def _run_child(
    job: Job, todo: list[str], end: float, results: Results, report: Callable[[Results, str], None]
) -> None:
    """Take from `todo` what one process runs, up to and including what breaks it."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit CUDA's state
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(pickle.dumps(job), list(todo), theirs))
    with _interrupts_ignored():  # which the child inherits: we end it
        child.start()
    theirs.close()
    try:
        for stage in ["rates", *todo]:
            limit = _START if stage == "rates" else 60 * job.minutes * STAGES[stage][1]
            is_known = stage == "rates" and bool(results.rows)
            kind, content = "", ""
            deadline = min(time.monotonic() + limit, end)
            while kind not in ("done", "failed", "broken"):
                kind, content = _next(ours, child, deadline)
                if kind == "row" and not is_known:
                    results.rows.append(content)
                    report(results, str(content))
            if kind != "done":
                results.failures[stage] = content
                report(results, f"{stage}: {content}")
            if stage != "rates":
                todo.remove(stage)
            elif kind != "done":
                results.failures |= dict.fromkeys(todo, "not run, the rates could not be measured")
                todo.clear()
            if kind == "broken" or not todo:
                return
    finally:
        child.kill()
        child.join()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # others may not say so
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _next(end: Any, child: Any, deadline: float) -> tuple[str, Any]:
    """Return the child's next message; "broken" if there is none in time, or never will be."""
    try:
        if end.poll(max(0.0, deadline - time.monotonic())):
            return end.recv()
        return "broken", "stopped, it took too long"
    except EOFError:
        child.join()
        return "broken", f"its process ended with code {child.exitcode}"


@torch.no_grad()
def _work(pickled: bytes, names: list[str], out: Any) -> None:
    """Run stages and send their rows; in a process of its own."""
    job: Job = pickle.loads(pickled)
    bench = Bench(job.config, job.kind, job.scale, torch.device(job.device))
    for name in ["rates", *names]:
        stage = rates if name == "rates" else STAGES[name][0]
        try:
            for row in stage(bench):
                out.send(("row", row))
            out.send(("done", None))
        except Exception as error:
            what = f"{type(error).__name__}: {str(error).strip()[:500]}"
            try:
                bench.clock.wait()  # raises if the device is lost to this process
            except RuntimeError:
                out.send(("broken", what))
                return
            out.send(("failed", what))
        gc.collect()


def machine(device: torch.device) -> dict[str, str]:
    """Say what the figures were measured on."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"  # on Windows
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "load": f"{load} on {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    for package in ("triton", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
