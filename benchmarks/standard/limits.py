"""How far each stage is from the machine's limit, and a prediction for a board that is not at hand.

The limit is the longer of two times: a stage's operations at the rate of a large FP32 matrix
product, and its bytes at the rate of reading memory. Work in fewer bits may beat the first, and
weights that stay in the cache the second; the share of the limit is then above one. The prediction
for a board is bytes over its memory's rate and nothing else.
"""

import multiprocessing
import time
from collections.abc import Callable
from threading import Barrier
from typing import Any

import numpy as np

from tiny_align.benchmarks.standard.counting import Cost, count
from tiny_align.benchmarks.standard.processes import numpy_threads
from tiny_align.runtime.bundle.bundle import Bundle

# the memory of an Orin Nano 8GB by power mode: NVIDIA's data sheet
ORIN_NANO_GB_S = {"68 GB/s": 68.0, "102 GB/s (Super)": 102.0}
REACHABLE = 0.8  # share of it that good software reaches
READ_FLOATS = 1 << 27
MATRIX = 1536  # rows and columns


def read_memory(barrier: Barrier, repeats: int = 8) -> float:
    """GB/s that this process reads while others do the same: the fastest of some dot products."""
    array = np.ones(READ_FLOATS, np.float32)
    return array.nbytes / _min_s(barrier, lambda: array @ array, repeats) / 1e9


def multiply(barrier: Barrier, repeats: int = 8) -> float:
    """GFLOP/s of this process while others do the same: the fastest of some matrix products."""
    matrix = np.ones((MATRIX, MATRIX), np.float32)
    return 2 * MATRIX**3 / _min_s(barrier, lambda: matrix @ matrix, repeats) / 1e9


def _min_s(barrier: Barrier, work: Callable[[], object], repeats: int) -> float:
    barrier.wait()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def sum_over_processes(n: int, work: Callable[[Barrier], float]) -> float:
    """The sum of what `n` processes, each of one thread, reach at the same time."""
    context = multiprocessing.get_context("spawn")
    with numpy_threads(1), context.Manager() as manager, context.Pool(n) as pool:
        return sum(pool.map(work, [manager.Barrier(n)] * n, chunksize=1))


def measure_bandwidth(threads: int) -> float:
    """GB/s read from memory."""
    return sum_over_processes(threads, read_memory)


def measure_products(threads: int) -> float:
    """GFLOP/s in FP32."""
    return sum_over_processes(threads, multiply)


def costs(bundle: Bundle, frames: int, features: int, prompt: int, answer: int) -> dict[str, Cost]:
    """What each graph does for one utterance.

    Args:
        frames: rows of the front end's output.
        features: rows of the encoder's output.
        prompt: positions.
        answer: tokens; a step of decoding is counted in the middle of the answer.
    """
    rows = bundle.manifest.graphs["encoder"].inputs[0].shape[1]
    encoder_sizes = {rows: frames} if isinstance(rows, str) else {}
    llm = bundle.graph("llm")
    step = count(llm, {"tokens": 1, "past": prompt + answer // 2})
    return {
        "encoder": count(bundle.graph("encoder"), encoder_sizes),
        "projector": count(bundle.graph("projector"), {"features": features}),
        "prefill": count(llm, {"tokens": prompt, "past": 0}),
        "decode": Cost(
            answer * step.operations, answer * step.weight_bytes, answer * step.other_bytes
        ),
    }


def limit_row(cost: Cost, seconds: float, gb_s: float, gflop_s: float) -> dict[str, Any]:
    """A stage's counts, its share of the machine's limit, and a prediction for a board.

    Args:
        seconds: that the stage took.
        gb_s: read from memory, of this machine.
        gflop_s: in FP32, of this machine.
    """
    memory_s = cost.bytes / gb_s / 1e9
    arithmetic_s = cost.operations / gflop_s / 1e9
    predicted_s = {}
    for board, rate in ORIN_NANO_GB_S.items():
        predicted_s[board] = cost.bytes / rate / REACHABLE / 1e9
    return cost.to_json() | {
        "seconds": seconds,
        "limited_by": "memory" if memory_s > arithmetic_s else "arithmetic",
        "share": max(memory_s, arithmetic_s) / seconds,
        "predicted_s": predicted_s,
    }
