"""Which products are fastest on this machine: measured once, in about a second, and kept.

The `numba` backend asks `best`, and other products are told of the library. What is found lies in
the user's cache folder, one file for each CPU, number of torch's threads and version of torch and
numba; without a file that can be read or written, every process measures for itself, and where
`LLAMA4_LAB_BACKEND` names a backend, nothing is measured at all. Kernels are compiled and measured
in the background, the first time on a machine by another process: until they are there, "auto" is
the loop.
"""

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4_lab import packed
from llama4_lab.loading import Loading

CHOSEN = os.environ.get("LLAMA4_LAB_BACKEND", "auto")  # what "auto" stands for
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # tokens of an expert
_ALL = 1 << 40  # of them: where no library is faster
_EXPERTS, _ROUNDS = 8, 4
_KERNELS = 3  # counted up when they get faster: what was measured of others is not theirs


@dataclass(frozen=True)
class Best:
    """What is fastest: compiled kernels up to so many tokens an expert, and a library above."""

    rows: int
    library: str


# ``x @ weight.T``. On AMD, oneDNN uses vectors twice as wide as MKL does; on Intel, MKL is ahead of
# it, and for some tens of tokens best when asked for the transposed product.
LIBRARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "transposed": lambda x, weight: torch.mm(weight, x.T).T,
    "onednn": packed.onednn,
}
DEFAULT = {torch.float32: Best(_ALL, "linear"), torch.bfloat16: Best(2, "linear")}


def best(dtype: torch.dtype) -> Best:
    """Return what is fastest for this dtype; the same all through a process."""
    return (DEFAULT if CHOSEN != "auto" else _measured())[dtype]


@cache
def _measured() -> dict[torch.dtype, Best]:
    path = _path()
    try:
        kept = json.loads(path.read_bytes())
        found = {dtype: Best(**kept[str(dtype)]) for dtype in DEFAULT}
        if all(each.library in LIBRARY for each in found.values()):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no file yet, or a damaged one: it is written anew
    found = {dtype: measure(dtype) for dtype in DEFAULT}
    with suppress(OSError):  # where nothing can be written, every process measures
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({str(dtype): asdict(each) for dtype, each in found.items()})
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(text.encode())
        os.replace(file.name, path)  # whole or not at all, whoever else writes
    return found


def _path() -> Path:
    """Return the file for this CPU, its threads and these versions, in the user's cache folder."""
    home = Path.home()
    folder = {
        "darwin": home / "Library/Caches",
        "win32": Path(os.environ.get("LOCALAPPDATA", home)),
    }
    base = os.environ.get("XDG_CACHE_HOME") or folder.get(sys.platform, home / ".cache")
    threads = torch.get_num_threads()
    key = f"{_KERNELS} {_cpu()} {threads} torch {torch.__version__} numba {version('numba')}"
    return Path(base) / "llama4_lab" / f"{sha256(key.encode()).hexdigest()[:16]}.json"


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line
    return platform.processor()


def measure(dtype: torch.dtype) -> Best:
    """Time compiled kernels against libraries, with experts that all get as many tokens."""
    from llama4_lab.experts import numba

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / 16).to(dtype)

    gate_up, down = random(_EXPERTS, 1024, 256), random(_EXPERTS, 256, 512)
    # Others' work on this machine does not count, but Windows counts a thread's in steps of 16 ms.
    clock = time.perf_counter if sys.platform == "win32" else time.thread_time

    def seconds(best: Best, x: Tensor) -> float:
        order, offsets = torch.arange(len(x)), torch.arange(_EXPERTS + 1) * (len(x) // _EXPERTS)
        score, times = x.new_ones(len(x), 1), []
        for _ in range(_ROUNDS):
            start = clock()
            numba.run(x, order, offsets, score, gate_up, down, best)
            times.append(clock() - start)
        return min(times)

    times: dict[str, list[float]] = {name: [] for name in LIBRARY if _exists(name, dtype)}
    rows: list[float] = []
    for count in _COUNTS:
        x = random(_EXPERTS * count, 256)
        rows.append(seconds(Best(count, "linear"), x))
        for name, found in times.items():
            found.append(seconds(Best(0, name), x))
    library = min(times, key=lambda name: times[name][-1])

    def total(wins: int) -> float:  # a slip of the clock moves a sum less than a comparison
        return sum(rows[:wins]) + sum(times[library][wins:])

    wins = min(range(len(rows) + 1), key=total)
    return Best(rows=(0, *_COUNTS[:-1], _ALL)[wins], library=library)


def _prepare() -> None:
    """Compile, or load, what `numba` runs in float32, and measure."""
    from llama4_lab.experts import numba

    numba.prepare()
    if best(torch.float32).library == "onednn":
        packed.prefer_onednn()


def _is_kept() -> bool:
    from llama4_lab.compiled import is_kept
    from llama4_lab.experts import numba

    return is_kept(numba.block)


LOADING = Loading("compiling the experts", _prepare, _is_kept)


def _exists(name: str, dtype: torch.dtype) -> bool:
    """Whether this torch has the operator; oneDNN's is a private one."""
    try:
        LIBRARY[name](torch.ones(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype))
    except (RuntimeError, AttributeError):
        return False
    return True
