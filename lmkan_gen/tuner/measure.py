"""Time kernels as they will be used: warm clocks, cold caches, pre-passes and fills included."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lmkan_gen.tuning_records import STEADY

_SAMPLE_US = 300.0  # clocks and launch overheads blur anything shorter
_BUDGET_US = 150_000.0
_MOST_SAMPLES, _FEWEST_SAMPLES = 40, 5
_WARM_UP_S = {"cpu": 0.02, "cuda": 0.05}
#: a candidate this much slower than the best so far is not worth an accurate time
_HOPELESS = 3.0
#: the part of their time that threads wait for a core, at most, where they have the cores to themselves
WAITED = 0.05
#: how often to take samples on a device that seems busy
_ATTEMPTS = 2
#: long against the resolution of events, short against a sample
_CYCLES = 200_000


@dataclass(frozen=True)
class Timing:
    """Samples of one call's time, in microseconds, and what is known of the device behind them.

    ``clock`` is a GPU's, in MHz; ``waited`` the part of a CPU's threads' time that others had their cores.
    """

    samples: tuple[float, ...]
    clock: float | None = field(default=None, compare=False)
    waited: float | None = field(default=None, compare=False)

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

    @property
    def spread(self) -> float:
        """The interquartile range as a part of the median."""
        return self.iqr / self.median

    @property
    def is_quiet(self) -> bool:
        """Whether neither samples nor cores show that anybody else used the device."""
        return self.spread <= STEADY and (self.waited or 0.0) <= WAITED

    @property
    def is_careful(self) -> bool:
        """Whether there are enough samples to tell how they spread."""
        return len(self.samples) >= _FEWEST_SAMPLES

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

    Returns:
        Of a few attempts, as long as others seem to use the device, the one whose samples spread least.
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
    attempts: list[Timing] = []
    while len(attempts) < _ATTEMPTS and not any(t.is_quiet for t in attempts):
        before = _scheduled()
        samples = tuple(sample() for _ in range(count))
        attempts.append(Timing(samples, _clock(device), _waited(device, before, _scheduled())))
    return min(attempts, key=lambda t: t.spread + (t.waited or 0.0))


def _scheduled() -> tuple[int, int]:
    """Nanoseconds that this process' threads have run, and that they have waited for a core; Linux knows."""
    run = waited = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread may end meanwhile
            words = path.read_text().split()
            run, waited = run + int(words[0]), waited + int(words[1])
    return run, waited


def _waited(device: torch.device, before: tuple[int, int], after: tuple[int, int]) -> float | None:
    run, waited = (now - then for now, then in zip(after, before, strict=True))
    return None if device.type != "cpu" or run <= 0 else max(0, waited) / (run + max(0, waited))


def _clock(device: torch.device) -> float | None:
    """MHz of a GPU's multiprocessors, which have just been at work; None of CPUs."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_CYCLES)  # the host has time to enqueue the rest, so that its launches do not count
        begin.record()
        torch.cuda._sleep(_CYCLES)
        end.record()
        end.synchronize()
    return _CYCLES / (1e3 * float(begin.elapsed_time(end)))


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
