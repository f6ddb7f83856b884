"""What instruments cost and whether they tell the truth, beside transformers and two peers.

``python benchmarks/instruments.py --python PATH`` prints one table; the README here says how to
read it. All run the same weights, those of a seeded random model. Peers run by themselves in
`peers.py`, in the interpreter that PATH names; a peer that is not there has an empty column.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peers
import torch
from clock import Cell, check_equal, floats, ratios
from peers import Task
from safetensors.torch import save_file
from table import layout, verdict
from torch import Tensor

import llama4_lab as l4
from llama4_lab import edits as E

CONFIG = l4.Llama4Config(
    vocab_size=1024,
    hidden_size=256,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=256,
    intermediate_size_mlp=256,
    num_local_experts=16,
    attention_chunk_size=128,
    floor_scale=128,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
SELECTION = [
    f"layers.*.{part}"
    for part in ("resid_pre", "attn.rot_q", "attn.rot_k", "attn.v", "attn.z", "resid_mid")
] + ["layers.*.router.*", "layers.*.experts.out"]

POOLED = """
import sys, time, torch
from pathlib import Path
from llama4_lab.analysis.attention import tiles

tokens = int(sys.argv[1])
torch.manual_seed(0)
q, k = 2 * torch.randn(2, tokens, 128)  # the width of Scout's heads, scores some four wide
start = time.process_time()
pooled = tiles(q, k, None, block=(tokens // 256, tokens // 256))
seconds = time.process_time() - start
assert abs(pooled.mean.sum() * (tokens // 256) / 256 - 1) < 1e-4  # a query's shares sum to one
most = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
print(seconds, int(most) * 1024)
"""

ROWS = {  # cell: what, target, the most that it may be
    "plain": ("a plain forward pass", "", None),
    "routers": ("every router traced", "≤ 1.01", 1.01),
    "everything": ("every point without an N² axis traced", "≤ 1.15", 1.15),
    "everything_floats": ("… floats kept, in d per token and layer", "no N²", None),
    "selection": ("what the other points follow from, traced", "≤ 1.15", 1.15),
    "selection_floats": ("… floats kept, in d per token and layer", "≤ 6, no N²", 6.0),
    "resume": ("resumed at the last layer: last hidden states", "≤ 0.17", 0.17),
    "resume_logits": ("resumed at the last layer: all logits", "≤ 0.17", 0.17),
    "heads": ("every head of every layer ablated, logits of each", "≤ 0.6", 0.6),
    "counterfactual": ("last token to every expert of every layer", "≤ 2", 2.0),
    "tiles": ("131,072 tokens of one NoPE head pooled, CPU seconds", "≤ 60", 60.0),
    "tiles_memory": ("… most memory that the process takes, GB", "≤ 1.5", 1.5),
    "honesty": ("edited points that silently change nothing", "0", 0.0),
    "exactness": ("largest difference to transformers' logits", "≤ 1e-5", 1e-5),
}


@dataclass(frozen=True)
class Lab:
    """Our side of the table: each method checks its outputs, then times them."""

    model: l4.Llama4
    ids: Tensor
    repeats: int

    @cached_property
    def task(self) -> Task:
        config = self.model.config
        counts = config.num_hidden_layers, config.num_attention_heads, config.num_local_experts
        return Task(*counts, tokens=self.ids.shape[1])

    @cached_property
    def logits(self) -> Tensor:
        return self.model(self.ids)

    @cached_property
    def replay(self) -> l4.Replay:
        return l4.Replay(self.model, self.ids)

    def plain(self) -> Tensor:
        return self.model(self.ids)

    def in_full(self, edits: Sequence[E.Edit]) -> Tensor:
        with E.edited(self.model, edits):
            return self.model(self.ids)

    def traced(self, names: list[str], ids: Tensor | None = None) -> dict[str, Tensor]:
        with l4.trace(self.model, names) as cache:
            logits = self.model(self.ids if ids is None else ids)
        return {**cache, "logits": logits}

    @property
    def linear_points(self) -> list[str]:
        """Every point whose size is not quadratic in the number of tokens."""
        points = l4.points(self.model.config)
        return [name for name, axes in points.items() if "s" not in axes.split()]

    @property
    def resumption(self) -> list[E.Edit]:
        return [E.Scale(f"layers.{self.task.layers - 1}.resid_pre", self.task.factor)]

    def expected(self) -> dict[str, Tensor]:
        """Return what the peers must find, made by whole forward passes."""
        task, last = self.task, f"layers.{self.task.layers - 1}.resid_pre"
        values = self.traced(["layers.*.router.logits", last])
        routers = [values[f"layers.{i}.router.logits"] for i in range(task.layers)]
        logits = torch.cat(routers)
        is_best = logits == logits.amax(dim=-1, keepdim=True)
        return {
            "ids": self.ids,
            "router_logits": logits,
            "router_scores": logits.sigmoid() * is_best,
            "last_input": values[last],
            "logits": values["logits"],
            "resumed": self.in_full(self.resumption),
            "headless": self.in_full([E.AblateHead(task.layer, task.head)]),
            "forced": self.in_full([E.Route(task.layer, task.tokens - 1, task.expert)]),
        }

    # ---- rows

    def routers(self) -> dict[str, Cell]:
        names = ["layers.*.router.*"]
        check_equal("routers traced", self.traced(names)["logits"], self.logits, 0.0)
        calls = {"routers": lambda: self.traced(names)}
        return ratios(self.plain, calls, 10 * self.repeats)

    def everything(self) -> dict[str, Cell]:
        asked = {"everything": self.linear_points, "selection": SELECTION}
        cells = {}
        for what, names in asked.items():
            check_equal(f"{what} traced", self.traced(names)["logits"], self.logits, 1e-5)
            kept = [self.kept(names, ids) for ids in (self.ids, self.ids.repeat(1, 2))]
            cells[f"{what}_floats"] = peers.kept_cell(self.task.tokens, kept)
        calls = {what: lambda names=names: self.traced(names) for what, names in asked.items()}
        return cells | ratios(self.plain, calls, 3 * self.repeats)

    def kept(self, names: list[str], ids: Tensor) -> float:
        """Return the floats that the layers' points take, in d per token and layer."""
        values = self.traced(names, ids)
        size = floats(value for name, value in values.items() if name.startswith("layers."))
        return size / (ids.shape[1] * self.task.layers * self.model.config.hidden_size)

    def resume(self) -> dict[str, Cell]:
        whole = self.in_full(self.resumption)[0]
        check_equal("resume", self.replay.edited(self.resumption).logits, whole, 1e-5)
        calls = {
            "resume": lambda: self.replay.edited(self.resumption).hidden,
            "resume_logits": lambda: self.replay.edited(self.resumption).logits,
        }
        return ratios(self.plain, calls, 3 * self.repeats)

    def heads(self) -> dict[str, Cell]:
        task = self.task
        runs = [[E.AblateHead(i, h)] for i in range(task.layers) for h in range(task.heads)]
        self._check_each("head", runs)

        def ablate() -> None:
            for run in self.replay.many(runs):
                run.logits_of(slice(None))

        return ratios(self.plain, {"heads": ablate}, max(3, self.repeats // 2), per=len(runs))

    def counterfactual(self) -> dict[str, Cell]:
        task = self.task
        last = task.tokens - 1
        places = [(i, e) for i in range(task.layers) for e in range(task.experts)]
        runs = [[E.Route(i, last, e)] for i, e in places]
        self._check_each("route", runs)

        def reroute() -> None:
            for run in self.replay.many(runs):
                run.logits_of(slice(None))

        return ratios(self.plain, {"counterfactual": reroute}, self.repeats)

    def _check_each(self, what: str, runs: Sequence[Sequence[E.Edit]]) -> None:
        for edits, run in zip(runs, self.replay.many(runs), strict=True):
            check_equal(f"{what} {edits}", run.logits, self.in_full(edits)[0], 1e-5)

    def tiles(self, tokens: int = 131_072) -> dict[str, Cell]:
        """Pool a long head's pattern in a process of its own, on one thread."""
        done = subprocess.run(
            [sys.executable, "-c", POOLED, str(tokens)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        seconds, size = map(float, done.stdout.split())
        return {
            "tiles": Cell(f"{seconds:.1f}", seconds),
            "tiles_memory": Cell(f"{size / 1e9:.2f}", size / 1e9),
        }

    def honesty(self) -> dict[str, Cell]:
        ids = self.ids[:, : peers.FEW]

        def edit(point: str) -> Tensor:
            with l4.intervene(self.model, {point: peers.nudge}):
                return self.model(ids)

        points = l4.points(self.model.config)
        edits = {point: lambda point=point: edit(point) for point in points}
        return {"honesty": peers.honesty_cell(edits, self.model(ids))}

    def share(self) -> str:
        """Return a table of costs by first layer and first token, in units of the share."""
        task = self.task
        firsts = [task.tokens * part // 16 for part in (0, 4, 8, 12, 15)]
        lines = ["first layer |" + "".join(f"{f'token {first}':>23}" for first in firsts)]

        def add(what: str, layer: int, calls: dict[str, Callable[[], Any]]) -> None:
            costs = ratios(lambda: self.model.hidden(self.ids), calls, self.repeats)
            line = f"{what:>11} |"
            for first in firsts:
                fair = (1 - layer / task.layers) * (1 - first / task.tokens)
                cost = costs[str(first)].value or 0.0
                line += f"{cost:.3f} = {cost / fair:.2f} × {fair:.3f}".rjust(23)
            lines.append(line)

        for layer in range(0, task.layers, max(1, task.layers // 4)):
            calls = {}
            for first in firsts:
                tokens = range(first, task.tokens)
                edits = [E.Scale(f"layers.{layer}.resid_pre", task.factor, tokens=tokens)]
                found = self.replay.edited(edits).logits
                check_equal(f"share of {edits[0].point}", found, self.in_full(edits)[0], 1e-5)
                calls[str(first)] = lambda edits=edits: self.replay.edited(edits).hidden
            add(str(layer), layer, calls)
        alone = {str(i): lambda i=i: self.model.hidden(self.ids[:, i:]) for i in firsts}
        add("tokens only", 0, alone)
        return "\n".join(lines)


# ---- the table


def ask(name: str, python: str, folder: Path, only: list[str], repeats: int) -> dict[str, Any]:
    """Measure a peer in an interpreter of its own; return its version and cells."""
    script = str(Path(peers.__file__).resolve())
    options = ["--only", ",".join(only), "--repeats", str(repeats)]
    done = subprocess.run(
        [python, script, name, str(folder), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{name} in {python} failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"cells": {row: Cell(*cell) for row, cell in found["cells"].items()}}


def table(ours: dict[str, Cell], theirs: dict[str, dict[str, Any]]) -> str:
    """Lay out the rows that anyone has, and the notes below."""
    columns = {"llama4_lab": ours} | {name: found["cells"] for name, found in theirs.items()}
    lines = [["what", "llama4_lab", "target", *theirs]]
    notes = []
    for row, (what, target, most) in ROWS.items():
        if not any(row in cells for cells in columns.values()):
            continue
        found = {name: cells.get(row, Cell("–")) for name, cells in columns.items()}
        for name, found_by in theirs.items():
            if not found_by["version"]:
                found[name] = Cell("not installed")
        for name, cell in found.items():
            if cell.note:
                notes.append(f"[{len(notes) + 1}] {name}: {cell.note}")
                found[name] = cell._replace(text=f"{cell.text} [{len(notes)}]")
        text = [cell.text for cell in found.values()]
        value = found["llama4_lab"].value
        if most is not None and value is not None:
            text[0] += verdict(value <= most)
        lines.append([what, text[0], target, *text[1:]])
    return "\n".join([layout(lines), "", *notes])


def head(lab: Lab, theirs: dict[str, dict[str, Any]]) -> str:
    versions = {name: version(name) for name in ("llama4-lab", "torch")}
    versions |= {name: found["version"] or "not installed" for name, found in theirs.items()}
    task, config = lab.task, lab.model.config
    count = sum(parameter.numel() for parameter in lab.model.parameters()) / 1e6
    return f"""\
{date.today()}: {", ".join(f"{name} {number}" for name, number in versions.items())}
Python {platform.python_version()}, one thread, float32, load {os.getloadavg()[0]:.1f}
{count:.1f} M parameters, {task.layers} layers, width {config.hidden_size}, {task.heads} heads, \
{task.experts} experts, chunks of {config.attention_chunk_size}; {task.tokens} tokens
times are CPU times in units of a library's own plain forward pass: of minima (of medians)
"""


def interpreters(given: list[str]) -> dict[str, str]:
    """Return each peer's interpreter from arguments ``PATH`` (for all) and ``NAME=PATH``."""
    found = dict.fromkeys(peers.PEERS, sys.executable)
    for one in given:
        name, _, path = one.rpartition("=")
        found |= {name: path} if name else dict.fromkeys(found, path)
    return found


def prepare(config: l4.Llama4Config, tokens: int, folder: Path, repeats: int) -> Lab:
    """Write the model, and what every library must find with it, to a folder."""
    l4.save(l4.random(config), folder)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (1, tokens), generator=generator)
    lab = Lab(l4.load(folder), ids, repeats)
    save_file(lab.expected(), folder / peers.EXPECTED)
    return lab


OURS = ("tiles", "share")  # what peers do not have
MEASURES = (*peers.MEASURES, *OURS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(MEASURES), help="rows, with commas")
    parser.add_argument("--peer", choices=peers.PEERS, help="print one peer's cells as JSON")
    parser.add_argument(
        "--python", action="append", default=[], help="interpreter of the peers; or NAME=PATH"
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=512)
    given = parser.parse_args()
    only = given.only.split(",")
    if unknown := [row for row in only if row not in MEASURES]:
        parser.error(f"unknown row {unknown[0]!r}; choose from {', '.join(MEASURES)}")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        lab = prepare(CONFIG, given.tokens, Path(folder), given.repeats)
        theirs = {
            name: ask(name, python, Path(folder), [r for r in only if r not in OURS], given.repeats)
            for name, python in interpreters(given.python).items()
            if given.peer in (None, name)
        }
    if given.peer:
        print(json.dumps(theirs[given.peer], indent=1, ensure_ascii=False))
        return
    ours: dict[str, Cell] = {}
    for found in theirs.values():
        if peers.OURS in found["cells"]:
            ours["exactness"] = found["cells"][peers.OURS]
    for row in only:
        if row not in ("exactness", "share"):
            ours |= getattr(lab, row)()
    print(head(lab, theirs), table(ours, theirs), sep="\n")
    if "share" in only:
        print(
            "\nedited runs from a layer and token on: time = multiple × their share of layers and "
            "tokens (target: ≤ 1.5 ×);\ntokens only: a plain pass of just so many tokens"
        )
        print(lab.share())


if __name__ == "__main__":
    main()
