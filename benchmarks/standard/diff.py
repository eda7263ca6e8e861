"""Two results of one machine side by side: what is slower, larger or worse than noise explains.

A stage's turns are compared at the speed that the reference kernel had at the same moment. A
machine that is slower as a whole, or for a while, is therefore no regression. What is left is
noise: a ratio counts as slower if its whole bootstrap interval lies beyond MARGIN, because two
processes on one machine differ by a few per cent for good (where their memory happens to lie).

The kernel and the runtime may be slowed differently. So a stage is also compared with the other
stages: where they have become faster, or slower by more than the margin, it must be slower than
they have become. All stages together are "everything", reported from twice the margin on.
"""

import statistics
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tiny_align.benchmarks.standard.harness import KERNEL, Samples, main_parts
from tiny_align.benchmarks.standard.markdown import grid
from tiny_align.benchmarks.standard.pipelines import OURS
from tiny_align.benchmarks.standard.stages import STAGES
from tiny_align.runtime.errors import DataError

MARGIN = 0.08
LEVEL = 0.95  # of the bootstrap interval
RESAMPLES = 1000
STILL = 0.02  # standard deviation of the kernel's logarithm below which its turns tell little
MAX_MEMORY_RATIO = 1.10
MAX_ROUGE_LOSS = 0.02
EVERYTHING = "everything"


@dataclass(frozen=True)
class Change:
    """B over A of something that should be small."""

    what: str
    ratio: float
    low: float  # of the interval
    high: float
    regression: bool


class Interval(NamedTuple):
    """A ratio and its bootstrap interval."""

    ratio: float
    low: float
    high: float


def ratio_interval(a: Samples, b: Samples, part: str) -> Interval:
    """Seconds of `b` over those of `a` at one speed of the machine: an analysis of covariance.

    A part need not slow down as much as the kernel does: a copy of memory and a matrix product
    differ. How closely it follows (the slope of their logarithms, within each result) is learnt
    from the turns themselves. Where the kernel stood still it cannot be learnt, and is taken as
    proportional.
    """
    rng = np.random.default_rng(0)
    kernel_a, seconds_a = _resample(np.log([a[KERNEL], a[part]]), rng)
    kernel_b, seconds_b = _resample(np.log([b[KERNEL], b[part]]), rng)

    kernel = np.concatenate([_centre(kernel_a), _centre(kernel_b)], axis=1)
    seconds = np.concatenate([_centre(seconds_a), _centre(seconds_b)], axis=1)
    still = kernel.shape[1] * STILL**2
    slope = ((kernel * seconds).sum(1) + still) / ((kernel**2).sum(1) + still)

    level_a = np.median(seconds_a - slope[:, None] * kernel_a, axis=1)
    level_b = np.median(seconds_b - slope[:, None] * kernel_b, axis=1)
    ratios = np.exp(level_b - level_a)
    low, high = np.quantile(ratios[1:], ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(float(ratios[0]), float(low), float(high))


def _resample(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(2, n) -> (2, 1 + RESAMPLES, n): as they are, then drawn with replacement."""
    n = values.shape[1]
    return values[:, np.vstack([np.arange(n), rng.integers(0, n, (RESAMPLES, n))])]


def _centre(values: np.ndarray) -> np.ndarray:
    return values - np.median(values, axis=1, keepdims=True)


def speed_changes(a: Samples, b: Samples) -> list[Change]:
    """Every stage that is not small, and everything together."""
    stages = main_parts({stage: a[stage] for stage in STAGES})
    intervals = {stage: ratio_interval(a, b, stage) for stage in stages}
    changes = []
    for stage, interval in intervals.items():
        baseline = _baseline([found.ratio for name, found in intervals.items() if name != stage])
        regression = interval.low / baseline > 1 + MARGIN
        changes.append(Change(stage, *interval, regression))
    together = Interval(*(statistics.median(values) for values in zip(*intervals.values())))
    changes.append(Change(EVERYTHING, *together, together.low > 1 + 2 * MARGIN))
    return changes


def _baseline(other_ratios: list[float]) -> float:
    """The ratio that a stage's own is compared with: that of the others, where it is not noise."""
    others = statistics.median(other_ratios or [1.0])
    if others > 1 + MARGIN:
        return others
    return min(1.0, max(1 / (1 + MARGIN), others))


def compare(a: dict, b: dict) -> dict[str, Any]:
    """Two results -> every change and the regressions among them.

    Raises:
        DataError: they do not measure the same on the same machine.
    """
    check_comparable(a, b)
    parts_a = a["parts"]
    parts_b = b["parts"]
    common = parts_a.keys() & parts_b.keys()
    changes = []
    if "inference" in common:
        timings_a = parts_a["inference"]["timings"][OURS]
        timings_b = parts_b["inference"]["timings"][OURS]
        changes += speed_changes(timings_a, timings_b)
    if "memory" in common:
        changes.append(memory_change(parts_a["memory"], parts_b["memory"]))
    if "quality" in common:
        changes.append(quality_change(parts_a["quality"], parts_b["quality"]))
    if not changes:
        raise DataError("the two results have no part in common: run the same parts twice")
    return {
        "changes": [vars(change) for change in changes],
        "regressions": [change.what for change in changes if change.regression],
    }


def check_comparable(a: dict, b: dict) -> None:
    """Raise DataError unless the results are of one machine and of the same settings."""
    for name in ("processor", "jetson", "cores"):
        value_a = a["machine"].get(name)
        value_b = b["machine"].get(name)
        if value_a != value_b:
            raise DataError(
                f"the results are of two machines ({name} {value_a} and {value_b}): "
                "compare two of one machine"
            )
    for name in ("threads", "short", "data"):
        value_a = a["setting"][name]
        value_b = b["setting"][name]
        if value_a != value_b:
            raise DataError(
                f"the results have different settings ({name} {value_a} and {value_b}): "
                "run both alike"
            )


def memory_change(a: dict, b: dict) -> Change:
    ratio = b["peak_bytes"] / a["peak_bytes"]
    return Change("peak memory", ratio, ratio, ratio, ratio > MAX_MEMORY_RATIO)


def quality_change(a: dict, b: dict) -> Change:
    """ROUGE-L of A over B: here more is worse, as for seconds and bytes."""
    before = a["rougeL"]
    after = b["rougeL"]
    ratio = before / after if after else float("inf")
    return Change("quality, A / B", ratio, ratio, ratio, before - after > MAX_ROUGE_LOSS)


def table(result: dict[str, Any]) -> str:
    """What `compare` found, as a table."""
    rows = []
    for change in result["changes"]:
        interval = f"{change['low']:.3f} to {change['high']:.3f}"
        mark = "regression" if change["regression"] else ""
        rows.append([change["what"], f"{change['ratio']:.3f}", interval, mark])
    return grid(["", "B / A", "interval", ""], rows)
