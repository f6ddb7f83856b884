"""One MoE layer beside transformers' and beside a loop over the chosen experts, on the CPU.

``python benchmarks/experts.py`` prints one table; the README here says how to read it.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from clock import check_equal, ratios
from table import layout
from torch import Tensor

from llama4_lab import experts
from llama4_lab.experts import probe
from llama4_lab.points import Tap

WIDTH, HIDDEN, INPUTS = 256, 512, 8
GOALS = {  # tokens, experts: transformers / ours, loop / ours
    (1, 16): (25, 3.5),
    (1, 128): (180, 8),
    (32, 16): (10, 2.5),
    (32, 128): (65, 2.7),
    (512, 16): (18, 1.6),
    (512, 128): (85, 2),
    (4096, 16): (18, 1.7),
    (4096, 128): (120, 2),
}


class Recorder(Tap):
    """Keeps what the router says."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def watches(self, name: str) -> bool:
        return name.startswith("router.")

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if self.watches(name):
            self.kept[name] = value
        return value


@dataclass
class Layer:
    """A seeded MoE layer, three ways."""

    num_experts: int
    width: int = WIDTH
    hidden: int = HIDDEN

    @cached_property
    def theirs(self) -> Any:
        from transformers import Llama4TextConfig
        from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

        config = Llama4TextConfig(
            hidden_size=self.width,
            intermediate_size=self.hidden,
            num_local_experts=self.num_experts,
            num_experts_per_tok=1,
        )
        torch.manual_seed(0)
        layer = Llama4TextMoe(config).eval().requires_grad_(False)
        for parameter in layer.parameters():
            parameter.normal_(0, self.width**-0.5)
        return layer

    @cached_property
    def weights(self) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """Router, experts and shared expert; the experts' are stored the other way round."""
        theirs, shared = self.theirs, self.theirs.shared_expert
        pair = (theirs.experts.gate_up_proj, theirs.experts.down_proj)
        gate_up, down = (w.mT.contiguous() for w in pair)
        alone = (shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
        return theirs.router.weight, (gate_up, down), alone

    def transformers(self, x: Tensor) -> Tensor:
        return self.theirs(x[None])[0].view_as(x)

    def ours(self, x: Tensor) -> Tensor:
        return experts.moe(x, *self.weights)

    def recorded(self, x: Tensor) -> Tensor:
        return experts.moe(x, *self.weights, record=Recorder())

    def loop(self, x: Tensor) -> Tensor:
        """Run the chosen experts one after the other, as anyone would write it."""
        router, (gate_up, down), (gate, up, out) = self.weights
        logit, chosen = F.linear(x, router).max(dim=-1)
        score = logit.sigmoid()
        y = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), out)
        for e in chosen.unique().tolist():
            rows = (chosen == e).nonzero()[:, 0]
            inputs = x.index_select(0, rows) * score[rows, None]
            own_gate, own_up = F.linear(inputs, gate_up[e]).chunk(2, dim=-1)
            y.index_add_(0, rows, F.linear(F.silu(own_gate) * own_up, down[e]))
        return y

    def read(self, x: Tensor) -> None:
        """Read once what this input needs of the weights."""
        router, pair, shared = self.weights
        for e in F.linear(x, router).argmax(dim=-1).unique().tolist():
            for weight in pair:
                weight[e].sum()
        for weight in shared:
            weight.sum()

    def multiply(self, x: Tensor) -> None:
        """Make as many multiplications as this input needs, in as few large products as can be."""
        _, pair, _ = self.weights
        for weight in pair:
            F.linear(x.new_ones(2 * len(x), weight.shape[2]), weight[0])


def row(layer: Layer, tokens: int, repeats: int) -> list[str]:
    """Check that all are equal, then let them take turns; return the cells of the table."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(tokens, layer.width, generator=generator) for _ in range(INPUTS)]
    for x in inputs[: INPUTS if tokens < 512 else 1]:
        expected = layer.transformers(x)
        for name in ("ours", "loop", "recorded"):
            error = (getattr(layer, name)(x) - expected).norm() / expected.norm()
            check_equal(f"{name}, {tokens} tokens", error, torch.zeros(()), 1e-5)

    def turns(call: Callable[[Tensor], Any]) -> Callable[[], Any]:
        """Take all inputs in a row; from 512 tokens on, one at each call."""
        if tokens < 512:
            return lambda: [call(x) for x in inputs]
        rotating = cycle(inputs)
        return lambda: call(next(rotating))

    names = ("loop", "recorded", "read", "multiply")
    fast = ratios(turns(layer.ours), {n: turns(getattr(layer, n)) for n in names}, repeats)
    slow = ratios(
        turns(layer.ours), {"transformers": turns(layer.transformers)}, max(3, repeats // 10)
    )
    found = {**fast, **slow}
    value = {name: found[name].value or 0.0 for name in (*names, "transformers")}
    goals = GOALS.get((tokens, layer.num_experts), (0, 0))

    def against(name: str, goal: float) -> str:
        return f"{found[name].text} {'✓' if value[name] >= goal else '✗'} ≥ {goal}"

    floor = max(("read", "multiply"), key=lambda name: value[name])
    return [
        f"{layer.num_experts} experts, {tokens} tokens",
        f"{(found['plain'].value or 0) * 1e3 / (INPUTS if tokens < 512 else 1):.3f} ms",
        against("transformers", goals[0]),
        against("loop", goals[1]),
        f"{value[floor]:.0%} of {floor}",
        found["recorded"].text,
    ]


COLUMNS = ("", "ours", "transformers / ours", "loop / ours", "floor", "recording routers")


def table(rows: list[list[str]]) -> str:
    return layout([COLUMNS, *rows])


def memory(layer: Layer, tokens: int) -> int:
    """Return the bytes that one call takes above its weights and input; Linux counts them."""

    def kilobytes(key: str) -> int:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split(key + ":")[1].split()[0])

    x = torch.randn(tokens, layer.width)
    layer.ours(x[:600])  # loads every kernel and library
    Path("/proc/self/clear_refs").write_bytes(b"5")  # the peak starts again from here
    before = kilobytes("VmRSS")
    layer.ours(x)
    return (kilobytes("VmHWM") - before) * 1024


def warm_start(layer: Layer) -> float:
    """Return the seconds from here to the first result; kernels come from numba's cache."""
    start = time.perf_counter()
    layer.ours(torch.ones(1, layer.width))
    return time.perf_counter() - start


def alone(what: str, num_experts: int, tokens: int) -> float:
    """Measure in a fresh process."""
    command = [sys.executable, __file__, what, "--experts", str(num_experts)]
    done = subprocess.run(
        [*command, "--tokens", str(tokens)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "LLAMA4_LAB_BACKEND": "numba"},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=("memory", "warm"), help="one number, no table")
    parser.add_argument("--experts", default="16,128")
    parser.add_argument("--tokens", default="1,32,512,4096")
    parser.add_argument(
        "--repeats", type=int, default=100, help="of the smallest; others take less"
    )
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    counts, lengths = ([int(x) for x in y.split(",")] for y in (given.experts, given.tokens))
    torch.set_num_threads(given.threads)
    torch.set_grad_enabled(False)
    if given.what:
        layer = Layer(counts[0])
        _ = layer.weights
        print(memory(layer, lengths[0]) if given.what == "memory" else warm_start(layer))
        return
    probe.LOADING.wait()
    rows = []
    for count in counts:
        layer = Layer(count)
        for tokens in lengths:
            rows.append(row(layer, tokens, max(4, given.repeats // max(1, tokens // 16))))
    print(
        f"{date.today()}: torch {version('torch')}, transformers {version('transformers')}, "
        f"numba {version('numba')}, Python {platform.python_version()}; {given.threads} thread(s), "
        f"float32, load {os.getloadavg()[0]:.1f}\nwidth {WIDTH}, {HIDDEN} neurons an expert; "
        f"{probe.best(torch.float32)}\nratios are of minima (of medians)\n"
    )
    print(table(rows), "\n")
    for count in counts:
        for tokens in lengths:
            bound = 1.1 * tokens * (2 * WIDTH + 3 * HIDDEN) * 4
            print(
                f"memory above weights, {count} experts, {tokens} tokens: "
                f"{alone('memory', count, tokens) / bound:.2f} of 1.1·T·(2d+3f)·4 bytes"
            )
    print(f"warm start: {min(alone('warm', 16, 1) for _ in range(3)):.2f} s")


if __name__ == "__main__":
    main()
