"""Calls that take turns on one thread, and the check that comes before any clock starts."""

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Cell(NamedTuple):
    """A field of the table; `value` is what its target is held against."""

    text: str
    value: float | None = None
    note: str = ""


def ratios(
    plain: Callable[[], Any], calls: Mapping[str, Callable[[], Any]], repeats: int, per: float = 1.0
) -> dict[str, Cell]:
    """Return the time of calls in units of `per` plain ones: of minima, and (of medians).

    It is CPU time, or where torch uses several threads, that of the clock on the wall. The cell
    "plain" is what one plain call takes, its value in seconds. All take turns, in an order that is
    reversed each round, after a round that does not count.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    everyone = {"": plain, **calls}
    times: dict[str, list[float]] = {name: [] for name in everyone}
    for call in everyone.values():
        call()
    gc.collect()
    gc.disable()
    try:
        for i in range(repeats):
            for name in list(everyone)[:: -1 if i % 2 else 1]:
                start = clock()
                everyone[name]()
                times[name].append(clock() - start)
    finally:
        gc.enable()
    least = min(times[""])
    found = {"plain": Cell(f"{least * 1e3:.0f} ms", least)}
    for name in calls:
        ratio = min(times[name]) / least / per
        middle = median(times[name]) / median(times[""]) / per
        found[name] = Cell(f"{ratio:.3f} ({middle:.3f})", ratio)
    return found


def check_equal(what: str, found: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    """Refuse to go on to any timing of what is not equal.

    Raises:
        ValueError: how much differs, and how much may.
    """
    if found.shape != expected.shape:
        raise ValueError(
            f"{what}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}; it is not "
            "timed"
        )
    difference = (found.double() - expected.double()).abs().max().item()
    if not difference <= atol:
        raise ValueError(
            f"{what}: differs by {difference:.2g}, and {atol:.0e} is allowed; it is not timed"
        )


def floats(values: Iterable[Tensor]) -> float:
    """Count what tensors hold, in numbers of four bytes; shared memory counts once."""
    storages = (value.untyped_storage() for value in values)
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values()) / 4
