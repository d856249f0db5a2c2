"""Time kernels as they will be used: warm clocks, cold caches, pre-passes and fills included."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_SAMPLE_US = 300.0  # clocks and launch overheads blur anything shorter
_BUDGET_US = 150_000.0
_MOST_SAMPLES, _FEWEST_SAMPLES = 40, 5
_WARM_UP_S = {"cpu": 0.02, "cuda": 0.05}
#: a candidate this much slower than the best so far is not worth an accurate time
_HOPELESS = 3.0


@dataclass(frozen=True)
class Timing:
    """Samples of one call's time, in microseconds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Microseconds."""
        return statistics.median(self.samples)

    @property
    def iqr(self) -> float:
        """Interquartile range, microseconds; 0 of a single sample."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return high - low

    def __add__(self, other: Timing) -> Timing:
        """The samples of both."""
        return Timing(self.samples + other.samples)


def copies_past_cache(size: int, device: torch.device) -> int:
    """How many sets of buffers of ``size`` bytes to rotate, so that each call finds the L2 cache cold.

    One on CPUs, where a layer's inputs normally do come out of the cache.
    """
    if device.type == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(32, math.ceil(2 * cache / size), free // 4 // size))


def measure(
    calls: Sequence[Callable[[], None]], device: torch.device, best_us: float | None = None
) -> Timing:
    """Time one call, given equal calls on different buffers, which are rotated.

    Args:
        calls: what to time; each starts its work on torch's current stream.
        device: where they run.
        best_us: the best time so far; something far slower is timed only roughly.
    """
    timer = _cuda_timer if device.type == "cuda" else _cpu_timer
    rough = timer(calls, device, 1)
    once = rough()
    start = time.perf_counter()
    while time.perf_counter() - start < _WARM_UP_S[device.type]:
        once = min(once, rough())
    if best_us is not None and once > _HOPELESS * best_us:
        return Timing((once, rough(), rough()))
    rounds = max(1, math.ceil(_SAMPLE_US / (once * len(calls))))
    per_sample = once * len(calls) * rounds
    count = max(_FEWEST_SAMPLES, min(_MOST_SAMPLES, int(_BUDGET_US / per_sample)))
    sample = timer(calls, device, rounds)
    sample()
    return Timing(tuple(sample() for _ in range(count)))


def _cpu_timer(calls: Sequence[Callable[[], None]], device: torch.device, rounds: int) -> Callable[[], float]:
    def sample() -> float:
        start = time.perf_counter()
        for _ in range(rounds):
            for call in calls:
                call()
        return 1e6 * (time.perf_counter() - start) / (rounds * len(calls))

    return sample


def _cuda_timer(
    calls: Sequence[Callable[[], None]], device: torch.device, rounds: int
) -> Callable[[], float]:
    """Replays of a CUDA graph between events: the device's time, without the host's."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for call in calls:  # loads modules, which a capture may not
                call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for call in calls:
                    call()

    def sample() -> float:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
        return 1e3 * float(begin.elapsed_time(end)) / (rounds * len(calls))

    return sample
