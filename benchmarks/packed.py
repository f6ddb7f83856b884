"""Products and whole steps with packed weights beside those with plain ones, on the CPU.

``python benchmarks/packed.py`` prints a table; the README here says how to read it.
"""

import argparse
import os
import platform
from collections.abc import Callable
from copy import deepcopy
from datetime import date
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from clock import Cell, check_equal, ratios
from table import layout
from torch import Tensor

import llama4_lab as l4
from llama4_lab.checkpoint.quantised import packable
from llama4_lab.packed import Packed, linear, pack, prepare

OUT, WIDTH, MATRICES = 8192, 5120, 4  # of one of Scout's experts; the caches hold no four
TOKENS = (1, 2, 4, 8, 16, 64)
PACKED = ("int8", "int4")
HALF = "of bfloat16"  # inputs and activations, else of float32
OURS = ("bfloat16", *PACKED, *(f"{kind} {HALF}" for kind in PACKED))
LIBRARY = "float32 by the library", "bfloat16 by the library"
COLUMNS = LIBRARY[1], "float32", *OURS  # beside the library's float32
LAYERS = l4.SCOUT.replace(  # of two experts, of which a token reads one
    num_hidden_layers=2, num_local_experts=2, vocab_size=16384, vision_config=None
)
PROMPT, STEPS = 16, 4  # tokens before those that are timed, and tokens of one call


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
    half = x.bfloat16()
    calls = {LIBRARY[1]: partial(in_turn, halves, half, F.linear)}
    for name, y, weights, most in (
        ("float32", x, plain, 1e-5),
        ("bfloat16", half, halves, 1e-2),
    ):
        expected = F.linear(y, weights[0])
        check_near(f"{name}, {tokens} tokens", linear(y, weights[0]), expected, most)
        calls[name] = partial(in_turn, weights, y, linear)
    for kind, weights in packed.items():
        for name, y, most in ((kind, x, 1e-5), (f"{kind} {HALF}", half, 1e-2)):
            expected = y.float() @ weights[0].unpack().mT
            found = linear(y, weights[0]).float()
            check_near(f"{name}, {tokens} tokens", found, expected, most)
            calls[name] = partial(in_turn, weights, y, linear)
    found = ratios(partial(in_turn, plain, x, F.linear), calls, repeats)
    return [str(tokens), *cells(found, len(plain), COLUMNS)]


def check_near(what: str, found: Tensor, expected: Tensor, most: float) -> None:
    """Refuse to go on if more than a share of what is expected is missing."""
    check_equal(what, (found - expected).norm() / expected.norm(), torch.zeros(()), most)


def cells(found: dict[str, Cell], per: int, columns: tuple[str, ...] = OURS) -> list[str]:
    """Return the columns of what was timed, `per` times in each call."""
    seconds = (found["plain"].value or 0.0) / per

    def cell(name: str) -> str:
        share = found[name].value or 0.0
        return f"{seconds * share * 1e3:.2f} ms, {1 / share:.2f} ×"

    return [f"{seconds * 1e3:.2f} ms", *map(cell, columns)]


def table(out: int, width: int, tokens: list[int], repeats: int) -> str:
    generator = torch.Generator().manual_seed(0)
    plain = [torch.randn(out, width, generator=generator) / width**0.5 for _ in range(MATRICES)]
    packed = {kind: [pack(weight, kind) for weight in plain] for kind in PACKED}
    halves = [weight.bfloat16() for weight in plain]
    head = ["tokens", LIBRARY[0], *COLUMNS]
    return layout([head, *(row(n, plain, halves, packed, repeats) for n in tokens)])


def steps(config: l4.Llama4Config, repeats: int) -> str:
    """Check each packed model against the one with rounded weights, then time a token of all."""
    plain = l4.random(config).eval()
    rounded, models = deepcopy(plain), {"plain": plain, "bfloat16": deepcopy(plain).bfloat16()}
    ids = torch.randint(config.vocab_size, (1, PROMPT + STEPS))
    for kind in PACKED:
        models[kind] = model = deepcopy(plain)
        unpacked = packable(rounded)
        for name, (module, part) in packable(model).items():
            weight = pack(getattr(module, part), kind)
            module.put(part, weight)
            getattr(*unpacked[name]).copy_(weight.unpack())
        models[f"{kind} {HALF}"] = half = deepcopy(model).bfloat16()
        expected = decoder(rounded, ids)()
        check_near(f"{kind}, decoded", decoder(model, ids)(), expected, 1e-5)
        check_near(f"{kind} {HALF}, decoded", decoder(half, ids)().float(), expected, 5e-2)
    calls = {name: decoder(model, ids) for name, model in models.items()}
    found = ratios(calls.pop("plain"), calls, repeats)
    return layout([["tokens", "float32", *OURS], ["1", *cells(found, STEPS)]])


def decoder(model: l4.Llama4, ids: Tensor) -> Callable[[], Tensor]:
    """Return what goes on from a prompt by the same `STEPS` tokens at each call."""
    cache = model.new_cache()
    model(ids[:, :PROMPT], cache=cache)
    tokens = ids[:, PROMPT:].split(1, dim=1)
    return lambda: torch.cat([model(token, cache=cache) for token in tokens], dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    prepare()
    print(
        f"{date.today()}: torch {version('torch')}, numba {version('numba')}, Python "
        f"{platform.python_version()}; {given.threads} thread(s), load {os.getloadavg()[0]:.1f}\n"
        "minima, and times as fast as float32"
    )
    if tokens := [int(n) for n in given.tokens.split(",") if n]:
        print(f"\na weight of {OUT} x {WIDTH}, not in the cache\n")
        print(table(OUT, WIDTH, tokens, given.repeats))
    print(
        f"\n{LAYERS.num_hidden_layers} of Scout's layers, {LAYERS.num_local_experts} experts each,"
        f" and a read-out of {LAYERS.vocab_size:,} words\n"
    )
    print(steps(LAYERS, given.repeats))


if __name__ == "__main__":
    main()
