"""What costs grow with: length of audio and context, the speech vocabulary, the number of users.

Each cost is measured over a range of one size with everything else fixed. The exponent is the slope
of the straight line through the logarithms: 1 is proportional, 0 is no growth. Fixed costs at the
small end make it smaller.
"""

import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tiny_align.benchmarks.standard.harness import (
    KERNEL,
    StoppingRule,
    alternate,
    make_side,
    spread,
)
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.users import write_user_record
from tiny_align.runtime.files import link_file
from tiny_align.runtime.llm import Cache, LanguageModel

AUDIO_S = (1, 2, 4, 8, 16, 30)
CONTEXT_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 15 / 16)
SPEECH_VOCABULARIES = (500, 1000, 2000, 4000, 8000, 16_000)  # tokens
N_USERS = (1, 4, 16, 64)

Works = dict[float, Callable[[], object]]  # size -> the work whose time is measured


def measure(bundle: Path, threads: int, rule: StoppingRule) -> dict[str, dict]:
    """Every curve under its name: the cost, " over ", and the size that varies."""
    with Assistant.load(bundle, threads=threads) as assistant:
        rng = np.random.default_rng(0)
        curves = {
            "encoder over seconds of audio": curve(encoding(assistant, rng), rule),
            "prefill over positions": curve(prefilling(assistant, rng), rule),
            "a token over positions before it": curve(decoding(assistant, rng), rule),
            "readout over tokens that are heard": curve(reading_out(assistant, rng), rule),
        }
        with tempfile.TemporaryDirectory() as folder:
            works = loading_users(assistant.bundle, threads, Path(folder))
            curves["loading a person over persons kept"] = curve(works, rule)
    return curves


def curve(works: Works, rule: StoppingRule) -> dict[str, Any]:
    """Let all sizes take turns: the median seconds of each with their spread, and the exponent."""
    samples = alternate({str(size): make_side(work) for size, work in works.items()}, rule)
    points = []
    for size in works:
        points.append({"size": size, **spread(samples[str(size)]["seconds"])})
    kernel_s = np.concatenate([side[KERNEL] for side in samples.values()])
    medians = [point["median"] for point in points]
    return {
        "points": points,
        "exponent": exponent(list(works), medians),
        "kernel_s": float(np.median(kernel_s)),
    }


def exponent(sizes: list[float], costs: list[float]) -> float:
    """p of cost = a * size ** p, by least squares over the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


# --- the works ---


def encoding(assistant: Assistant, rng: np.random.Generator) -> Works:
    """Encode noise of so many seconds."""
    works: Works = {}
    for length_s in AUDIO_S:
        if length_s <= assistant.max_speech_s:
            noise = 0.1 * rng.standard_normal(round(length_s * assistant.sample_rate))
            works[length_s] = functools.partial(assistant.features, noise.astype(np.float32))
    return works


def prefilling(assistant: Assistant, rng: np.random.Generator) -> Works:
    """Prefill a random prompt of so many positions."""
    llm = assistant.llm

    def prefill(prompt: np.ndarray, cache: Cache) -> None:
        llm.rewind(cache, 0)
        llm.prefill(prompt, cache)

    works: Works = {}
    for n in context_positions(llm):
        prompt = llm.embed(rng.integers(llm.spec.vocabulary, size=n))
        works[n] = functools.partial(prefill, prompt, Cache())
    return works


def decoding(assistant: Assistant, rng: np.random.Generator) -> Works:
    """Decode one token after so many random positions."""
    llm = assistant.llm
    token = llm.embed([0])

    def decode(cache: Cache, past: int) -> None:
        llm.rewind(cache, past)
        llm.prefill(token, cache)

    works: Works = {}
    for n in context_positions(llm):
        cache = Cache()
        llm.prefill(llm.embed(rng.integers(llm.spec.vocabulary, size=n)), cache)
        works[n] = functools.partial(decode, cache, n)
    return works


def context_positions(llm: LanguageModel) -> list[int]:
    """CONTEXT_SHARES of the LLM's context, in positions."""
    return [round(share * llm.spec.max_context) for share in CONTEXT_SHARES]


def reading_out(assistant: Assistant, rng: np.random.Generator) -> Works:
    """Collapse four seconds of vectors, each of them a word, over a table of so many tokens."""
    from tiny_align.runtime.readout import collapse, ctc_scale

    hidden_size = assistant.bundle.manifest.llm.hidden_size

    def read_out(vectors: np.ndarray, table: np.ndarray) -> np.ndarray:
        return collapse(vectors, table, ctc_scale(table[:500]))

    works: Works = {}
    for n in SPEECH_VOCABULARIES:
        table = rng.standard_normal((n, hidden_size), dtype=np.float32)
        words = table[rng.integers(n, size=50)]
        vectors = np.pad(words, ((0, 0), (0, 1)))  # the blank's logit is 0
        works[n] = functools.partial(read_out, vectors, table)
    return works


def loading_users(bundle: Bundle, threads: int, folder: Path) -> Works:
    """Load one user of a bundle that has so many; the copies of the bundle are made in `folder`."""
    works: Works = {}
    for n in N_USERS:
        copy = folder / str(n)
        shutil.copytree(bundle.path, copy, ignore=shutil.ignore_patterns("users", "engines", ".*"))
        make_users(Bundle.open(copy, verify=False), n)
        works[n] = functools.partial(load_user, copy, threads)
    return works


def make_users(bundle: Bundle, n: int) -> None:
    """Give the bundle `n` users, each with the general projector's weights."""
    graph = bundle.graph("projector")
    weights = graph.with_name(f"{graph.name}.data")
    for i in range(n):
        folder = bundle.user_folder(f"user-{i}")
        folder.mkdir(parents=True)
        link_file(graph, folder / graph.name)
        link_file(weights, folder / weights.name)
        write_user_record(folder, bundle.manifest, {"steps": 0})


def load_user(bundle: Path, threads: int) -> None:
    with Assistant.load(bundle, "user-0", threads=threads):
        pass
