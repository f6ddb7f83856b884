"""Time calls on a GPU or a CPU, in turns; capture them in CUDA graphs; watch memory."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

_WARM = 2  # calls of each that do not count


class Clock:
    """Measures on one device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.is_cuda = device.type == "cuda"

    def time(self, call: Callable[[], Any], seconds: float = 1.0, repeats: int = 100) -> float:
        """Return the seconds of a call: the median of as many as fit, and `repeats` at most."""
        return self.compare({"": call}, seconds, repeats)[""]

    def compare(
        self, calls: Mapping[str, Callable[[], Any]], seconds: float = 1.0, repeats: int = 100
    ) -> dict[str, float]:
        """Return the medians of several calls that take turns, each at least three times."""
        for call in list(calls.values()) * _WARM:
            call()
        self.wait()
        times: dict[str, list[float]] = {name: [] for name in calls}
        begin = time.perf_counter()
        for i in range(repeats):
            for name, call in calls.items():
                times[name].append(self._once(call))
            if i >= 2 and time.perf_counter() - begin > seconds:
                break
        return {name: median(seen) for name, seen in times.items()}

    def _once(self, call: Callable[[], Any]) -> float:
        if not self.is_cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def graphed(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Return a replay of a call's kernels without the time that Python takes to launch them.

        Needs CUDA. A call that waits for the GPU in between cannot be captured, and raises.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def forget_peak(self) -> None:
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> float | None:
        """Return the most bytes held since `forget_peak`, free blocks of the allocator included."""
        return float(torch.cuda.max_memory_reserved(self.device)) if self.is_cuda else None


def copy_rate(clock: Clock, size: int) -> float:
    """Return the bytes per second that a copy of `size` bytes reads and writes."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * size / clock.time(lambda: target.copy_(source), 0.5)


def matrix_rate(clock: Clock, size: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return the FLOP/s of a product of two random square matrices."""
    a, b = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / clock.time(lambda: torch.mm(a, b, out=out), 1.0)
