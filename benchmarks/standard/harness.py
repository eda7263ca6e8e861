"""How everything is timed: sides that take turns, beside a kernel that tells how fast the machine is just then.

A side is a callable that does its work once and says what took how long, {"encoder": seconds, ...}. Each gets a turn
before it counts; then all take turns until the noise is small (`Patience`) and every turn is kept. What is stored is
seconds; what is compared is seconds at one speed of the kernel, so that a machine that slows down, for a while or for
good, changes no ratio (diff.py). It does not say what is worth timing.

The clock stands still while this thread waits for a core that other processes use, where the kernel tells (Linux):
what they take is no property of ours. A thread that waits for its own workers goes on being timed.
"""

import functools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from tiny_align.runtime import machine

KERNEL = "kernel"  # beside every turn's seconds, those of the reference kernel around it
SMALL = 0.05  # of a side's largest part: parts below it need not be known as well
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
Samples = dict[str, list[float]]  # one side's: what was timed -> seconds of every turn, in order


@dataclass(frozen=True)
class Patience:
    """When enough turns were taken: the noise is small, or there were many."""

    least: int = 9  # rounds
    most: int = 80
    seconds: float = 60.0
    width: float = 0.02  # half of the median's 95 % confidence interval, over the median

    def lasts(self, n_rounds: int, began: float, samples: dict[str, Samples]) -> bool:
        if n_rounds < self.least:
            return True
        spent = time.perf_counter() - began
        return n_rounds < self.most and spent < self.seconds and not settled(samples, self.width)


@functools.cache
def _scheduled() -> int | None:
    """The kernel's account of the thread that asks first: the one that measures."""
    return os.open(SCHEDULED, os.O_RDONLY) if os.path.exists(SCHEDULED) else None


def waited() -> float:
    """Seconds that this thread has waited for a core so far; 0 where the kernel does not tell."""
    file = _scheduled()
    return int(os.pread(file, 64, 0).split()[1]) / 1e9 if file is not None else 0.0


def now() -> float:
    """Seconds on the clock that stands still while this thread waits for a core."""
    while True:
        before = waited()
        read = time.perf_counter()
        if waited() == before:  # or else it lost its core between the two
            return read - before


class Kernel:
    """A fixed piece of work of a few milliseconds on one core: arithmetic in the cache, and a copy outside of it."""

    def __init__(self):
        self._near, self._far = (
            np.linspace(0.1, 1.0, 1 << 15, dtype=np.float32),
            np.ones(1 << 20, np.float32),
        )
        self._near_out, self._far_out = np.empty_like(self._near), np.empty_like(self._far)

    def __call__(self) -> float:
        """Seconds of the middle one of three."""
        return statistics.median(self._once() for _ in range(3))

    def _once(self) -> float:
        began = now()
        for _ in range(20):
            np.exp(self._near, out=self._near_out)
        np.copyto(self._far_out, self._far)
        return now() - began


def alternate(
    sides: dict[str, Side], patience: Patience = Patience(), pause_s: float = 0.0
) -> dict[str, Samples]:
    """Give every side its turns.

    Args:
        sides: name -> side; every turn of one times the same parts.
        pause_s: before a turn; threads of another side's process spin a little after their work.
    Returns:
        name -> samples, `KERNEL` among them.
    """
    kernel = Kernel()
    samples = {
        name: {part: [] for part in (*side(), KERNEL)} for name, side in sides.items()
    }  # warms up
    began, n_rounds = time.perf_counter(), 0
    while patience.lasts(n_rounds, began, samples):
        order = list(sides) if n_rounds % 2 else list(reversed(sides))
        for name in order:
            time.sleep(pause_s)
            before = kernel()
            turn = sides[name]()
            turn[KERNEL] = (before + kernel()) / 2
            for part, seconds in samples[name].items():
                seconds.append(turn[part])
        n_rounds += 1
    return samples


def timed(work: Callable[[], object], part: str = "seconds") -> Side:
    """A side of one part: all that `work` does."""

    def side() -> dict[str, float]:
        began = now()
        work()
        return {part: now() - began}

    return side


# --- what samples say ---


def relative(samples: Samples, part: str) -> np.ndarray:
    """(n,) a part's seconds over the kernel's, turn by turn."""
    return np.array(samples[part]) / np.array(samples[KERNEL])


def settled(samples: dict[str, Samples], width: float) -> bool:
    """Whether the median of every part that matters is known to within `width`."""
    return all(
        half_width(relative(side, part)) <= width
        for side in samples.values()
        for part in weighty(side)
    )


def weighty(samples: Samples) -> list[str]:
    """The parts that are not small beside the largest."""
    medians = {
        part: statistics.median(seconds) for part, seconds in samples.items() if part != KERNEL
    }
    return [part for part, seconds in medians.items() if seconds >= SMALL * max(medians.values())]


def half_width(values: np.ndarray) -> float:
    """Half of the median's 95 % confidence interval by order statistics, over the median."""
    ordered, n = np.sort(values), len(values)
    reach = 0.98 * np.sqrt(n)  # 1.96 standard deviations of a binomial of n and 1/2
    low, high = (
        ordered[max(0, int(n / 2 - reach))],
        ordered[min(n - 1, int(np.ceil(n / 2 + reach)))],
    )
    return float((high - low) / 2 / np.median(ordered))


def summary(samples: Samples) -> dict[str, dict]:
    """Median, 10th and 90th percentile of every part, in seconds."""
    return {part: spread(seconds) for part, seconds in samples.items()}


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
    return {"median": float(middle), "p10": float(low), "p90": float(high), "n": len(values)}


# --- the machine ---


def state() -> dict:
    """What of the machine changes while it works: clocks, temperatures, what has slowed it down, free memory, load."""
    mode, clock, known = machine.power_mode(), machine.gpu_clock(), machine.temperatures()
    told = {
        "power_mode": mode.name if mode else None,
        "gpu_mhz": clock.now // 10**6 if clock else None,
        "cpu_mhz": machine.cpu_mhz(),
        "celsius": max((zone.celsius for zone in known), default=None),
        "throttling": any(zone.celsius >= zone.limit for zone in known) if known else None,
        "power_shortages": machine.power_shortages(),
        "available_bytes": machine.memory().get("MemAvailable"),
        "load": machine.load(),
    }
    return {name: value for name, value in told.items() if value is not None}


def versions() -> dict[str, str]:
    """Version of every package that is installed of those that matter."""
    return {name: found for name in PACKAGES if (found := _version(name))}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
