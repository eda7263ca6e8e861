"""How everything is timed: sides take turns, and a reference kernel shows the machine's speed.

A side is a callable that does its work once and returns the seconds of each part, {"encoder":
seconds, ...}. Every side gets one turn to warm up. Then all take turns until the noise is small
(`StoppingRule`); every turn is stored, in seconds. Comparisons (diff.py) use seconds relative to
the kernel's, so a machine that slows down, for a while or for good, changes no ratio. What is worth
timing is decided elsewhere (parts.py).

The clock stops while this thread waits for a core that other processes use, where the kernel tells
(Linux): that time is not a property of our code. It does not stop while a thread waits for its own
workers.
"""

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from tiny_align.runtime import machine

KERNEL = "kernel"  # the name under which a turn's samples hold the reference kernel's seconds
SMALL = 0.05  # share of a side's largest part: smaller parts need not be known as well
PACKAGES = (
    "numpy",
    "onnxruntime",
    "torch",
    "transformers",
    "tokenizers",
    "llama-cpp-python",
    "onnxruntime-genai",
    "tensorrt",
)

SCHEDULED = "/proc/thread-self/schedstat"  # nanoseconds on a core, nanoseconds waiting for one, ...

Side = Callable[[], dict[str, float]]
Samples = dict[str, list[float]]  # of one side: part -> seconds of every turn, in order


@dataclass(frozen=True)
class StoppingRule:
    """When enough turns were taken: the noise is small, or a limit is reached."""

    min_rounds: int = 9
    max_rounds: int = 80
    max_s: float = 60.0
    half_width: float = 0.02  # half of the median's 95 % confidence interval, over the median

    def goes_on(self, n_rounds: int, began: float, samples: dict[str, Samples]) -> bool:
        """Whether to take another round; `began` is a time of `time.perf_counter`."""
        if n_rounds < self.min_rounds:
            return True
        if n_rounds >= self.max_rounds or time.perf_counter() - began >= self.max_s:
            return False
        return not is_settled(samples, self.half_width)


@functools.cache
def _schedule_file() -> int | None:
    """The open account of the thread that asks first: the one that measures."""
    return os.open(SCHEDULED, os.O_RDONLY) if os.path.exists(SCHEDULED) else None


def core_wait_s() -> float:
    """Seconds that this thread has waited for a core so far; 0 where the kernel does not tell."""
    file = _schedule_file()
    return int(os.pread(file, 64, 0).split()[1]) / 1e9 if file is not None else 0.0


def now() -> float:
    """Seconds on the clock that stops while this thread waits for a core."""
    while True:
        before = core_wait_s()
        clock = time.perf_counter()
        if core_wait_s() == before:  # or else the thread lost its core between the two
            return clock - before


class Kernel:
    """Milliseconds of fixed work on one core: arithmetic in the cache, and a copy outside of it."""

    def __init__(self) -> None:
        self._cached = np.linspace(0.1, 1.0, 1 << 15, dtype=np.float32)
        self._cached_out = np.empty_like(self._cached)
        self._uncached = np.ones(1 << 20, np.float32)
        self._uncached_out = np.empty_like(self._uncached)

    def __call__(self) -> float:
        """The median seconds of three runs."""
        return statistics.median([self._run(), self._run(), self._run()])

    def _run(self) -> float:
        began = now()
        for _ in range(20):
            np.exp(self._cached, out=self._cached_out)
        np.copyto(self._uncached_out, self._uncached)
        return now() - began


def alternate(
    sides: dict[str, Side], rule: StoppingRule = StoppingRule(), pause_s: float = 0.0
) -> dict[str, Samples]:
    """Give every side its turns.

    Args:
        sides: name -> side; every turn of a side returns the same parts.
        pause_s: before a turn; threads of another side's process spin a little after their work.

    Returns:
        name -> samples, `KERNEL` among them.
    """
    kernel = Kernel()
    samples: dict[str, Samples] = {}
    for name, side in sides.items():
        parts = [*side(), KERNEL]  # this first turn warms up and does not count
        samples[name] = {part: [] for part in parts}

    began = time.perf_counter()
    n_rounds = 0
    while rule.goes_on(n_rounds, began, samples):
        order = list(sides) if n_rounds % 2 else list(reversed(sides))
        for name in order:
            time.sleep(pause_s)
            kernel_before = kernel()
            turn = sides[name]()
            turn[KERNEL] = (kernel_before + kernel()) / 2
            for part, seconds in samples[name].items():
                seconds.append(turn[part])
        n_rounds += 1
    return samples


def make_side(work: Callable[[], object], part: str = "seconds") -> Side:
    """A side with one part: all that `work` does."""

    def side() -> dict[str, float]:
        began = now()
        work()
        return {part: now() - began}

    return side


# --- statistics of samples ---


def over_kernel(samples: Samples, part: str) -> np.ndarray:
    """(n,) a part's seconds over the kernel's, turn by turn."""
    return np.array(samples[part]) / np.array(samples[KERNEL])


def is_settled(samples: dict[str, Samples], max_half_width: float) -> bool:
    """Whether the median of every main part is known to within `max_half_width`."""
    for side in samples.values():
        for part in main_parts(side):
            if half_width(over_kernel(side, part)) > max_half_width:
                return False
    return True


def main_parts(samples: Samples) -> list[str]:
    """The parts that are not small beside the largest."""
    medians = {}
    for part, seconds in samples.items():
        if part != KERNEL:
            medians[part] = statistics.median(seconds)
    threshold = SMALL * max(medians.values())
    return [part for part, median in medians.items() if median >= threshold]


def half_width(values: np.ndarray) -> float:
    """Half of the median's 95 % confidence interval by order statistics, over the median."""
    ordered = np.sort(values)
    n = len(ordered)
    reach = 0.98 * np.sqrt(n)  # 1.96 standard deviations of a binomial of n and 1/2
    low = ordered[max(0, int(n / 2 - reach))]
    high = ordered[min(n - 1, int(np.ceil(n / 2 + reach)))]
    return float((high - low) / 2 / np.median(ordered))


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, and how many values there are."""
    values = list(values)
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
    return {"median": float(middle), "p10": float(low), "p90": float(high), "n": len(values)}


def summary(samples: Samples) -> dict[str, dict[str, float]]:
    """The spread of every part, in seconds."""
    return {part: spread(seconds) for part, seconds in samples.items()}


# --- the machine ---


def machine_state() -> dict[str, Any]:
    """What changes while a machine works: clocks, temperatures, throttling, free memory, load."""
    mode = machine.power_mode()
    clock = machine.gpu_clock()
    zones = machine.temperatures()
    state = {
        "power_mode": mode.name if mode else None,
        "gpu_mhz": clock.now // 10**6 if clock else None,
        "cpu_mhz": machine.cpu_mhz(),
        "celsius": max((zone.celsius for zone in zones), default=None),
        "throttling": any(zone.celsius >= zone.limit for zone in zones) if zones else None,
        "power_shortages": machine.power_shortages(),
        "available_bytes": machine.memory().get("MemAvailable"),
        "load": machine.load(),
    }
    return {name: value for name, value in state.items() if value is not None}


def package_versions() -> dict[str, str]:
    """The version of each of PACKAGES that is installed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
