"""Products with packed weights beside those with plain ones, on one CPU thread.

``python benchmarks/packed.py`` prints a table; the README here says how to read it.
"""

import argparse
import os
import platform
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from clock import check_equal, ratios
from table import layout
from torch import Tensor

from llama4_lab.packed import Packed, linear, pack

OUT, WIDTH, MATRICES = 8192, 5120, 4  # of one of Scout's experts; the caches hold no four
TOKENS = (1, 2, 4, 8, 16, 64)
PACKED = ("int8", "int4")


def in_turn(weights: list[Any], x: Tensor, product: Callable[[Tensor, Any], Tensor]) -> None:
    for weight in weights:
        product(x, weight)


def row(
    tokens: int,
    plain: list[Tensor],
    halves: list[Tensor],
    packed: dict[str, list[Packed]],
    repeats: int,
) -> list[str]:
    """Check the packed products, then let all take turns; return the cells of the table."""
    x = torch.randn(tokens, plain[0].shape[1])
    for kind, weights in packed.items():
        expected = x @ weights[0].unpack().mT
        error = (linear(x, weights[0]) - expected).norm() / expected.norm()
        check_equal(f"{kind}, {tokens} tokens", error, torch.zeros(()), 1e-5)
    calls = {kind: partial(in_turn, weights, x, linear) for kind, weights in packed.items()}
    calls["bfloat16"] = partial(in_turn, halves, x.bfloat16(), F.linear)
    found = ratios(partial(in_turn, plain, x, F.linear), calls, repeats)
    seconds = found["plain"].value or 0.0

    def cell(name: str) -> str:
        share = found[name].value or 0.0
        return f"{seconds * share / len(plain) * 1e3:.2f} ms, {1 / share:.2f} ×"

    names = ("bfloat16", *packed)
    return [str(tokens), f"{seconds / len(plain) * 1e3:.2f} ms", *map(cell, names)]


def table(out: int, width: int, tokens: list[int], repeats: int) -> str:
    generator = torch.Generator().manual_seed(0)
    plain = [torch.randn(out, width, generator=generator) / width**0.5 for _ in range(MATRICES)]
    packed = {kind: [pack(weight, kind) for weight in plain] for kind in PACKED}
    halves = [weight.bfloat16() for weight in plain]
    head = ["tokens", "float32", "bfloat16", *PACKED]
    return layout([head, *(row(n, plain, halves, packed, repeats) for n in tokens)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    print(
        f"{date.today()}: torch {version('torch')}, numba {version('numba')}, Python "
        f"{platform.python_version()}; one thread, load {os.getloadavg()[0]:.1f}\n"
        f"a weight of {OUT} x {WIDTH}, not in the cache; minima of CPU time, times as fast as "
        "float32\n"
    )
    print(table(OUT, WIDTH, [int(n) for n in given.tokens.split(",")], given.repeats))


if __name__ == "__main__":
    main()
