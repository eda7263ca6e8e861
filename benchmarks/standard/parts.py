"""The parts of the standard run, `tiny-align bench`: what each measures, in a process of its own.

A part gives plain data. What can be compared with another run lies in its `timings`: side -> samples (harness.py).
How long all of it takes is decided here, by `Setting`.
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tiny_align.align.evaluation.quality import rouge
from tiny_align.benchmarks.standard import growth as growing
from tiny_align.benchmarks.standard import limits as limiting
from tiny_align.benchmarks.standard.harness import (
    Patience,
    Samples,
    alternate,
    spread,
    summary,
    timed,
)
from tiny_align.benchmarks.standard.pipelines import LEFT_OUT, OURS, PIPELINES, Pipeline
from tiny_align.benchmarks.standard.processes import Served, apart, peak_memory_bytes
from tiny_align.benchmarks.standard.stages import ANSWER, answering, unexplained
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.errors import AudioError

STAGES_THREADS = 1  # of an answer's stages
STAGES_PATIENCE = Patience(most=120)  # more than for the rest: two results are compared by them
ALONE, THREADED = "encoder alone", "with a session's threads"
PATIENCE_S = 150.0  # for a peer to be made or to answer; compiling takes some


@dataclass(frozen=True)
class Setting:
    """What is measured, and how long."""

    bundle: str
    data: str  # recordings of one person
    threads: int
    short: bool = False  # a minute or two: to see that everything works, and large changes
    slow: tuple[tuple[str, float], ...] = ()  # stages and factors: slowed down on purpose

    @property
    def patience(self) -> Patience:
        return Patience(least=5, most=15, seconds=5.0) if self.short else Patience()

    @property
    def n_test(self) -> int:
        return 5 if self.short else 40

    @property
    def steps(self) -> int | None:
        """Of a person's training; None: as many as usual."""
        return 3 if self.short else None


def recordings(setting: Setting, split: str = "test") -> list:
    from tiny_align.align.data.datasets import load_dataset, split_of

    return split_of(load_dataset(Path(setting.data)), split)[: setting.n_test]


def typical(setting: Setting, rate: int) -> np.ndarray:
    """The recording of median length, (S,) float32."""
    audios = sorted((u.load(rate) for u in recordings(setting)), key=len)
    return audios[len(audios) // 2]


# --- inference ---


def inference(setting: Setting) -> dict:
    """One answer on one core, stage by stage, and the encoder alone: in an answer it runs after the LLM's last turn.

    On more cores a stage of 2 ms takes 1 or 3, as workers happen to wake, which `diff` cannot tell from a regression.
    """
    with Assistant.load(setting.bundle, threads=STAGES_THREADS) as assistant:
        audio = typical(setting, assistant.sample_rate)
        rows = assistant.bundle.manifest.front_end(audio)
        sides = {
            OURS: answering(assistant, audio, dict(setting.slow)),
            ALONE: timed(lambda: assistant.encode(rows), "encoder"),
            THREADED: timed(lambda: list(assistant.stream(audio)), ANSWER),
        }
        samples = alternate(sides, setting.patience if setting.short else STAGES_PATIENCE)
        answer, features = assistant.answer(audio), assistant.features(audio)
        prompt = assistant.llm.assemble(assistant.soft_tokens(features))
    turns = [dict(zip(samples[OURS], turn)) for turn in zip(*samples[OURS].values())]
    return {
        "audio_s": len(audio) / assistant.sample_rate,
        "samples": len(audio),
        "features": len(features),
        "prompt_positions": len(prompt),
        "answer_tokens": len(answer.tokens),
        "unexplained": statistics.median(unexplained(turn) for turn in turns),
        "summary": {side: summary(taken) for side, taken in samples.items()},
        "timings": samples,
    }


def streaming(setting: Setting) -> dict:
    """What is left to do when somebody stops speaking, by length of the speech."""
    from tiny_align.benchmarks.standard import streaming as listening

    bundle = Bundle.open(setting.bundle, verify=False)
    audios = [u.load(bundle.manifest.front_end.sample_rate) for u in recordings(setting)]
    rows = listening.measure(
        bundle, audios, setting.threads, None, rounds=1 if setting.short else 5
    )
    return {"rows": rows, "ratios": listening.ratios(rows), "quality": {}}


# --- training and quality ---


def training(setting: Setting) -> dict:
    """A person's training on one core, and a step of it beside one through the LLM."""
    from tiny_align.benchmarks.standard import training_cost

    return apart(1, person, setting) | {"cost": training_cost.compare("reference", 1)}


def person(setting: Setting) -> dict:
    """A projector trained as `tiny-align align` does it, measured before and after."""
    from tiny_align.align.data.datasets import load_dataset
    from tiny_align.align.training.align_user import align_user
    from tiny_align.align.training.limits import TrainingLimits

    with tempfile.TemporaryDirectory() as users:
        limits = TrainingLimits(threads=1, steps=setting.steps)
        result, _, _ = align_user(
            Path(setting.bundle), load_dataset(Path(setting.data)), "bench", Path(users), limits
        )
    kept = {k: v for k, v in result.items() if k not in ("path", "user")}
    return kept | {"peak_bytes": peak_memory_bytes()}


def quality(setting: Setting) -> dict:
    """The general projector on a voice it never heard, between chance and the typed answers (1); silence."""
    from tiny_align.align.data.non_speech import non_speech
    from tiny_align.align.evaluation.quality import evaluate
    from tiny_align.reference import corpus

    with Assistant.load(setting.bundle, threads=setting.threads) as assistant:
        rng, n = np.random.default_rng(77), setting.n_test
        sentences = corpus.sentences(5 * n, 21, held_out=True)
        exact = sum(assistant.answer_text(s.text).text == s.answer for s in sentences) / len(
            sentences
        )
        heard = sum(
            is_answered(assistant, non_speech(rng, assistant.sample_rate)) for _ in range(n)
        )
        spoken = evaluate(assistant, recordings(setting), quiet=True)
    figures = {
        name: getattr(spoken, name)
        for name in ("rouge1", "rougeL", "rougeL_chance", "wer", "cer", "n")
    }
    return figures | {
        "typed_exact": exact,
        "typed": len(sentences),
        "wordless": n,
        "wordless_answered": heard,
    }


def is_answered(assistant: Assistant, sound: np.ndarray) -> bool:
    try:
        return assistant.answer(sound).heard
    except AudioError:  # refused, and that is no answer
        return False


# --- memory ---


def memory(setting: Setting, processes: int = 3) -> dict:
    """Resident memory and seconds from nothing to the answers, in a few new processes: medians."""
    runs = [apart(setting.threads, from_nothing, setting) for _ in range(processes)]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]} | {
        "bundle_bytes": sum(
            p.stat().st_size for p in Path(setting.bundle).iterdir() if p.is_file()
        ),
        "processes": processes,
    }


def from_nothing(setting: Setting, answers: int = 20) -> dict:
    """One process: memory before loading, after it, after an answer and after many; the first answer is a cold one."""
    before = resident_bytes()
    audio = typical(
        setting, Bundle.open(setting.bundle, verify=False).manifest.front_end.sample_rate
    )
    began = time.perf_counter()
    with Assistant.load(setting.bundle, threads=setting.threads) as assistant:
        load_s, loaded = time.perf_counter() - began, resident_bytes()
        cold, once = assistant.answer(audio), resident_bytes()
        warm = [assistant.answer(audio) for _ in range(answers)]
        return {
            "load_s": load_s,
            "cold_first_token_s": cold.ttft_s,
            "warm_first_token_s": statistics.median(answer.ttft_s for answer in warm),
            "before_bytes": before,
            "loaded_bytes": loaded,
            "answered_bytes": once,
            "after_many_bytes": resident_bytes(),
            "peak_bytes": peak_memory_bytes(),
        }


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


# --- beside the peers ---


def compare(setting: Setting) -> dict:
    """Every pipeline that can be had here, taking turns on one recording, then its answers to all of them."""
    bundle = Path(setting.bundle)
    with Assistant.load(bundle, threads=setting.threads) as assistant:
        audio, rate = typical(setting, assistant.sample_rate), assistant.sample_rate
        said = [u.load(rate) for u in recordings(setting)]
        typed = [assistant.answer_text(u.text).text for u in recordings(setting)]
    peers = {name: served(name, bundle, setting.threads) for name in PIPELINES}
    for peer in peers.values():
        peer.measure(audio)  # and compiles what is compiled at the first answer
    alive = {name: peer for name, peer in peers.items() if peer.why is None}
    samples = alternate(
        {n: lambda p=p: ask(p, audio)["seconds"] for n, p in alive.items()}, setting.patience, 0.02
    )
    rows = {name: row_of(peer, samples[name], said, typed) for name, peer in alive.items()}
    missing = {
        name: peer.why.replace(str(bundle), "BUNDLE")
        for name, peer in peers.items()
        if name not in alive
    }
    for peer in peers.values():
        peer.close()
    return {
        "audio_s": len(audio) / rate,
        "recordings": len(said),
        "peers": {name: row | ratios(samples[name], samples[OURS]) for name, row in rows.items()},
        "missing": missing | LEFT_OUT,
        "timings": samples,
    }


def served(name: str, bundle: Path, threads: int) -> Served:
    return Served(Pipeline, name, bundle, threads, threads=threads, patience_s=PATIENCE_S)


def ask(peer: Served, audio: np.ndarray) -> dict:
    if (row := peer.measure(audio)) is None:
        raise ChildProcessError(f"a peer failed between two answers: {peer.why}")
    return row


def row_of(peer: Served, samples: Samples, said: list, typed: list[str]) -> dict:
    """A peer's figures: seconds of the one recording, quality over all."""
    rows = [ask(peer, audio) for audio in said]
    return {
        "seconds": {part: spread(seconds) for part, seconds in samples.items()},
        "rougeL": rouge(typed, [row["text"] for row in rows]),
        "load_s": rows[-1]["load_s"],
        "peak_bytes": rows[-1]["peak_bytes"],
    }


def ratios(theirs: Samples, own: Samples) -> dict[str, dict[str, float]]:
    """Their seconds over ours, turn by turn: the median. Above 1, ours is faster."""
    shares = {part: np.array(theirs[part]) / np.array(own[part]) for part in own}
    return {"ratios": {part: float(np.median(share)) for part, share in shares.items()}}


# --- limits and growth ---


def limits(setting: Setting) -> dict:
    """The machine's limits, what each graph must do, and the share of the limit that an answer's stages reach."""
    gb_s, gflop_s = (
        limiting.measure_bandwidth(STAGES_THREADS),
        limiting.measure_products(STAGES_THREADS),
    )
    measured = measure("inference", setting)
    bundle = Bundle.open(setting.bundle, verify=False)
    front_end = bundle.manifest.front_end
    frames = -(-measured["samples"] // front_end.row_samples)
    sizes = (frames, measured["features"], measured["prompt_positions"], measured["answer_tokens"])
    medians = {stage: told["median"] for stage, told in measured["summary"][OURS].items()}
    counted = limiting.costs(bundle, *sizes)
    return {
        "bandwidth_gb_s": gb_s,
        "products_gflop_s": gflop_s,
        "sizes": dict(zip(("frames", "features", "prompt_positions", "answer_tokens"), sizes)),
        "stages": {
            name: limiting.against(cost, medians[name], gb_s, gflop_s)
            for name, cost in counted.items()
        },
    }


def growth(setting: Setting) -> dict:
    """What costs grow with; each curve has a third of the usual time."""
    patience = replace(setting.patience, seconds=setting.patience.seconds / 3)
    return {"curves": growing.measure(Path(setting.bundle), setting.threads, patience)}


PARTS: dict[str, Callable[[Setting], dict]] = {
    "inference": inference,
    "streaming": streaming,
    "memory": memory,
    "compare": compare,
    "limits": limits,
    "growth": growth,
    "quality": quality,
    "training": training,
}
IN_ONE_PROCESS = ("inference", "streaming", "quality", "growth")  # the others start their own


@functools.cache
def measure(name: str, setting: Setting) -> dict:
    """One part's data; what was measured once is not measured again."""
    threads = STAGES_THREADS if name == "inference" else setting.threads
    return apart(threads, PARTS[name], setting) if name in IN_ONE_PROCESS else PARTS[name](setting)
