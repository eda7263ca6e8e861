"""Two results of one machine side by side: what is slower, larger or worse than noise explains.

A stage's turns are compared at the speed that the reference kernel had at the same moment, so that a machine that is
slower as a whole, or for a while, is no regression. What is left is noise: a ratio is believed as far as its bootstrap
interval reaches, and MARGIN beyond, because two processes on one machine differ by a few per cent for good (where
memory happens to lie). Where the other stages have become faster, or slower by more than the margin, the kernel and
the runtime were slowed differently: a stage counts as far as it is slower than the others have become, and all of them
are "everything", reported from twice the margin on.
"""

import statistics
from dataclasses import dataclass

import numpy as np

from tiny_align.benchmarks.standard.harness import KERNEL, Samples, weighty
from tiny_align.benchmarks.standard.pipelines import OURS
from tiny_align.benchmarks.standard.stages import STAGES
from tiny_align.runtime.errors import DataError

MARGIN = 0.08
LEVEL, RESAMPLES = 0.95, 1000
STILL = 0.02  # deviation of the kernel's logarithm; one that varies less tells little of how it is followed
MORE_MEMORY, LESS_ROUGE = 1.10, 0.02
EVERYTHING = "everything"


@dataclass(frozen=True)
class Change:
    """B over A of something that should be small."""

    what: str
    ratio: float
    low: float  # of the interval
    high: float
    regression: bool


def interval(a: Samples, b: Samples, part: str) -> tuple[float, float, float]:
    """What `b` takes over `a` at one speed of the machine, and its bootstrap interval: an analysis of covariance.

    How far a part follows the reference kernel (the slope of their logarithms, within each result) is learnt from the
    turns themselves: a copy of memory and a matrix product do not slow down alike. Where the kernel stood still it
    cannot be learnt, and is taken as proportional.
    """
    rng = np.random.default_rng(0)
    kernels, seconds = zip(
        *(_resampled(np.log([taken[KERNEL], taken[part]]), rng) for taken in (a, b))
    )
    within, follows = (
        np.concatenate([_centred(v) for v in values], axis=1) for values in (kernels, seconds)
    )
    still = within.shape[1] * STILL**2
    slope = ((within * follows).sum(1) + still) / ((within**2).sum(1) + still)
    levels = [
        np.median(took - slope[:, None] * kernel, axis=1) for took, kernel in zip(seconds, kernels)
    ]
    ratios = np.exp(levels[1] - levels[0])
    low, high = np.quantile(ratios[1:], ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(ratios[0]), float(low), float(high)


def _resampled(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(2, n) -> (2, 1 + RESAMPLES, n): as they are, then drawn with replacement."""
    n = values.shape[1]
    return values[:, np.vstack([np.arange(n), rng.integers(0, n, (RESAMPLES, n))])]


def _centred(values: np.ndarray) -> np.ndarray:
    return values - np.median(values, axis=1, keepdims=True)


def slower(a: Samples, b: Samples) -> list[Change]:
    """Every stage that matters, and everything together."""
    told = {part: interval(a, b, part) for part in weighty({stage: a[stage] for stage in STAGES})}
    medians = {part: ratio for part, (ratio, _, _) in told.items()}
    changes = []
    for part, (ratio, low, high) in told.items():
        others = statistics.median([r for other, r in medians.items() if other != part] or [1.0])
        alike = others if others > 1 + MARGIN else min(1.0, max(1 / (1 + MARGIN), others))
        changes.append(Change(part, ratio, low, high, low / alike > 1 + MARGIN))
    together = [statistics.median(values) for values in zip(*told.values())]
    return [*changes, Change(EVERYTHING, *together, together[1] > 1 + 2 * MARGIN)]


def compare(a: dict, b: dict) -> dict:
    """Two results -> every change and the regressions among them.

    Raises:
        DataError: they do not measure the same on the same machine.
    """
    same(a, b)
    changes = (
        _speed(a["parts"], b["parts"])
        + _size(a["parts"], b["parts"])
        + _quality(a["parts"], b["parts"])
    )
    if not changes:
        raise DataError("the two results have no part in common: run the same parts twice")
    shown = [vars(change) for change in changes]
    return {"changes": shown, "regressions": [c.what for c in changes if c.regression]}


def same(a: dict, b: dict) -> None:
    for name in ("processor", "jetson", "cores"):
        one, other = a["machine"].get(name), b["machine"].get(name)
        if one != other:
            raise DataError(
                f"the results are of two machines ({name} {one} and {other}): compare two of one machine"
            )
    for name in ("threads", "short", "data"):
        one, other = a["setting"][name], b["setting"][name]
        if one != other:
            raise DataError(
                f"the results have different settings ({name} {one} and {other}): run both alike"
            )


def _speed(a: dict, b: dict) -> list[Change]:
    if "inference" not in a or "inference" not in b:
        return []
    return slower(*(parts["inference"]["timings"][OURS] for parts in (a, b)))


def _size(a: dict, b: dict) -> list[Change]:
    if "memory" not in a or "memory" not in b:
        return []
    ratio = b["memory"]["peak_bytes"] / a["memory"]["peak_bytes"]
    return [Change("peak memory", ratio, ratio, ratio, ratio > MORE_MEMORY)]


def _quality(a: dict, b: dict) -> list[Change]:
    if "quality" not in a or "quality" not in b:
        return []
    before, after = a["quality"]["rougeL"], b["quality"]["rougeL"]
    ratio = before / after if after else float("inf")
    return [Change("quality, A / B", ratio, ratio, ratio, before - after > LESS_ROUGE)]


def table(result: dict) -> str:
    lines = ["| | B / A | interval | |", "|---|---|---|---|"]
    for row in result["changes"]:
        mark = "regression" if row["regression"] else ""
        lines.append(
            f"| {row['what']} | {row['ratio']:.3f} | {row['low']:.3f} to {row['high']:.3f} | {mark} |"
        )
    return "\n".join(lines)
