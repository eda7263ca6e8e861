"""How far each stage is from what the machine could do at best, and what a board might do: counts over measured limits.

The best is the longer of two times: a stage's operations at the rate of a large FP32 matrix product, and its bytes at
the rate of reading memory. Work in fewer bits may beat the first, weights that stay in the cache the second: a share
above one says so. The prediction for a board that is not at hand is bytes over its memory's rate and nothing else.
"""

import multiprocessing
import time
from collections.abc import Callable

import numpy as np

from tiny_align.benchmarks.standard.counting import Cost, count
from tiny_align.benchmarks.standard.processes import numpy_threads
from tiny_align.runtime.bundle.bundle import Bundle

ORIN_NANO_GB_S = {
    "68 GB/s": 68.0,
    "102 GB/s (Super)": 102.0,
}  # its memory, by power mode: NVIDIA's data sheet
REACHED = 0.8  # of it, by good software
READ_FLOATS, MATRIX = 1 << 27, 1536


def read_memory(barrier, repeats: int = 8) -> float:
    """GB/s that this process reads, while others do the same: the best of some dot products."""
    array = np.ones(READ_FLOATS, np.float32)
    return array.nbytes / _best(barrier, lambda: array @ array, repeats) / 1e9


def multiply(barrier, repeats: int = 8) -> float:
    """GFLOP/s of this process, while others do the same: the best of some matrix products."""
    matrix = np.ones((MATRIX, MATRIX), np.float32)
    return 2 * MATRIX**3 / _best(barrier, lambda: matrix @ matrix, repeats) / 1e9


def _best(barrier, work: Callable[[], object], repeats: int) -> float:
    barrier.wait()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def together(threads: int, work: Callable[[object], float]) -> float:
    """The sum of what so many processes, each of one thread, reach at the same time."""
    context = multiprocessing.get_context("spawn")
    with numpy_threads(1), context.Manager() as manager, context.Pool(threads) as pool:
        return sum(pool.map(work, [manager.Barrier(threads)] * threads, chunksize=1))


def measure_bandwidth(threads: int) -> float:
    """GB/s read from memory."""
    return together(threads, read_memory)


def measure_products(threads: int) -> float:
    """GFLOP/s in FP32."""
    return together(threads, multiply)


def costs(bundle: Bundle, frames: int, features: int, prompt: int, answer: int) -> dict[str, Cost]:
    """What each graph does for one utterance: so many rows, features, prompt positions and tokens of the answer.

    A step of decoding is counted in the middle of the answer.
    """
    rows = bundle.manifest.graphs["encoder"].inputs[0].shape[1]
    size = {rows: frames} if isinstance(rows, str) else {}
    step = count(bundle.graph("llm"), {"tokens": 1, "past": prompt + answer // 2})
    return {
        "encoder": count(bundle.graph("encoder"), size),
        "projector": count(bundle.graph("projector"), {"features": features}),
        "prefill": count(bundle.graph("llm"), {"tokens": prompt, "past": 0}),
        "decode": Cost(
            *(answer * value for value in (step.operations, step.weight_bytes, step.other_bytes))
        ),
    }


def bound_s(cost: Cost, gb_s: float, gflop_s: float) -> float:
    """The least seconds that the machine could take."""
    return max(cost.bytes / gb_s, cost.operations / gflop_s) / 1e9


def against(cost: Cost, seconds: float, gb_s: float, gflop_s: float) -> dict:
    """A stage's counts, its share of the limit, and a board's least seconds by its memory alone."""
    predicted = {name: cost.bytes / rate / REACHED / 1e9 for name, rate in ORIN_NANO_GB_S.items()}
    return cost.to_json() | {
        "seconds": seconds,
        "limited_by": "memory" if cost.bytes / gb_s > cost.operations / gflop_s else "arithmetic",
        "share": bound_s(cost, gb_s, gflop_s) / seconds,
        "predicted_s": predicted,
    }
