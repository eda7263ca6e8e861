"""What costs grow with: length of the audio and of the context, the vocabulary that is heard, the number of persons.

Each is measured over a range of one thing with everything else as it is; the exponent is the slope of the straight line
through the logarithms, so that 1 is proportional and 0 is no growth. At the small end fixed costs make it smaller.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tiny_align.benchmarks.standard.harness import KERNEL, Patience, alternate, spread, timed
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.users import write_user_record
from tiny_align.runtime.files import link_file
from tiny_align.runtime.llm import Cache

AUDIO_S = (1, 2, 4, 8, 16, 30)
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 15 / 16)  # of the context
VOCABULARIES = (500, 1000, 2000, 4000, 8000, 16_000)  # tokens that speech is read as
N_USERS = (1, 4, 16, 64)


def exponent(sizes: list[float], costs: list[float]) -> float:
    """p of cost = a * size ** p, by least squares over the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def curve(works: dict[float, Callable[[], object]], patience: Patience) -> dict:
    """Size -> work, taking turns: the median seconds of each with their spread, and the exponent."""
    samples = alternate({str(size): timed(work) for size, work in works.items()}, patience)
    rows = [{"size": size, **spread(samples[str(size)]["seconds"])} for size in works]
    return {
        "points": rows,
        "exponent": exponent([row["size"] for row in rows], [row["median"] for row in rows]),
        "kernel_s": float(np.median([s for side in samples.values() for s in side[KERNEL]])),
    }


def measure(bundle: Path, threads: int, patience: Patience) -> dict[str, dict]:
    """Every curve, by what it is over."""
    with Assistant.load(bundle, threads=threads) as assistant:
        rng = np.random.default_rng(0)
        return {
            "encoder over seconds of audio": curve(over_audio(assistant, rng), patience),
            "prefill over positions": curve(over_prompt(assistant, rng), patience),
            "a token over positions before it": curve(over_context(assistant, rng), patience),
            "readout over tokens that are heard": curve(over_vocabulary(assistant, rng), patience),
            "loading a person over persons kept": over_persons(assistant.bundle, threads, patience),
        }


def over_audio(assistant: Assistant, rng) -> dict:
    lengths = [s for s in AUDIO_S if s <= assistant.max_speech_s]
    noise = {
        s: (0.1 * rng.standard_normal(round(s * assistant.sample_rate))).astype(np.float32)
        for s in lengths
    }
    return {s: lambda audio=audio: assistant.features(audio) for s, audio in noise.items()}


def over_prompt(assistant: Assistant, rng) -> dict:
    llm = assistant.llm
    prompts = {n: llm.embed(rng.integers(llm.spec.vocabulary, size=n)) for n in positions(llm)}
    caches = {n: Cache() for n in prompts}

    def read(n: int) -> None:
        llm.rewind(caches[n], 0)
        llm.prefill(prompts[n], caches[n])

    return {n: lambda n=n: read(n) for n in prompts}


def over_context(assistant: Assistant, rng) -> dict:
    llm, token = assistant.llm, assistant.llm.embed([0])

    def read(cache: Cache, n: int) -> None:
        llm.rewind(cache, n)
        llm.prefill(token, cache)

    works = {}
    for n in positions(llm):
        cache = Cache()
        llm.prefill(llm.embed(rng.integers(llm.spec.vocabulary, size=n)), cache)
        works[n] = lambda cache=cache, n=n: read(cache, n)
    return works


def positions(llm) -> list[int]:
    return [round(share * llm.spec.max_context) for share in SHARES]


def over_vocabulary(assistant: Assistant, rng) -> dict:
    """The readout of four seconds of speech in which a word is said every so often, over random tables."""
    from tiny_align.runtime.readout import collapse, ctc_scale

    size = assistant.bundle.manifest.llm.hidden_size

    def work(n: int) -> Callable[[], object]:
        table = rng.standard_normal((n, size), dtype=np.float32)
        frames = np.pad(
            table[rng.integers(n, size=50)], ((0, 0), (0, 1))
        )  # every frame a word, the blank's logit 0
        return lambda: collapse(frames, table, ctc_scale(table[:500]))

    return {n: work(n) for n in VOCABULARIES}


def over_persons(bundle: Bundle, threads: int, patience: Patience) -> dict:
    """Bundles with so many persons, each with the general projector's weights; one of them is loaded."""
    with tempfile.TemporaryDirectory() as temporary:
        works = {}
        for n in N_USERS:
            copy = Path(temporary) / str(n)
            shutil.copytree(
                bundle.path, copy, ignore=shutil.ignore_patterns("users", "engines", ".*")
            )
            make_users(Bundle.open(copy, verify=False), n)
            works[n] = lambda copy=copy: load(copy, threads)
        return curve(works, patience)


def make_users(bundle: Bundle, n: int) -> None:
    graph = bundle.graph("projector")
    for i in range(n):
        folder = bundle.user_folder(f"person-{i}")
        folder.mkdir(parents=True)
        for path in (graph, graph.with_name(f"{graph.name}.data")):
            link_file(path, folder / path.name)
        write_user_record(folder, bundle.manifest, {"steps": 0})


def load(bundle: Path, threads: int) -> None:
    with Assistant.load(bundle, "person-0", threads=threads):
        pass
