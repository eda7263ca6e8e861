"""The parts of the standard run, `tiny-align bench`: what each measures, in a process of its own.

A part returns plain data. What can be compared with another run lies in its `timings`: side ->
samples (harness.py). `Setting` decides how long all of it takes.
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tiny_align.align.evaluation.quality import rouge
from tiny_align.benchmarks.standard import growth as growth_curves
from tiny_align.benchmarks.standard.harness import (
    Samples,
    StoppingRule,
    alternate,
    make_side,
    summary,
)
from tiny_align.benchmarks.standard.limits import (
    costs,
    limit_row,
    measure_bandwidth,
    measure_products,
)
from tiny_align.benchmarks.standard.pipelines import LEFT_OUT, OURS, PIPELINES, Pipeline
from tiny_align.benchmarks.standard.processes import (
    PeerProcess,
    peak_memory_bytes,
    resident_bytes,
    run_in_process,
)
from tiny_align.benchmarks.standard.stages import ANSWER, answering, unexplained
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.errors import AudioError

if TYPE_CHECKING:
    from tiny_align.align.data.datasets import Utterance

STAGES_THREADS = 1  # of an answer's stages
STAGES_RULE = StoppingRule(max_rounds=120)  # longer than the rest: `diff` compares the stages
ENCODER_ALONE = "encoder alone"  # a side of `inference`
WITH_THREADS = "with a session's threads"  # another
PEER_TIMEOUT_S = 150.0  # for a peer to be made or to answer; compiling takes some
PEER_PAUSE_S = 0.02  # between the turns of two peers


@dataclass(frozen=True)
class Setting:
    """What is measured, and how long."""

    bundle: str
    data: str  # recordings of one user
    threads: int
    short: bool = False  # a minute or two: to see that everything works, and large changes
    slow: tuple[tuple[str, float], ...] = ()  # stages and factors: slowed down on purpose

    @property
    def rule(self) -> StoppingRule:
        if self.short:
            return StoppingRule(min_rounds=5, max_rounds=15, max_s=5.0)
        return StoppingRule()

    @property
    def n_test(self) -> int:
        return 5 if self.short else 40

    @property
    def steps(self) -> int | None:
        """Of a user's training; None: the command's default."""
        return 3 if self.short else None


def load_test_split(setting: Setting) -> list["Utterance"]:
    from tiny_align.align.data.datasets import load_dataset, split_of

    return split_of(load_dataset(Path(setting.data)), "test")[: setting.n_test]


def median_recording(setting: Setting, sample_rate: int) -> np.ndarray:
    """The recording of median length, (S,) float32."""
    recordings = [utterance.load(sample_rate) for utterance in load_test_split(setting)]
    return sorted(recordings, key=len)[len(recordings) // 2]


# --- inference ---


def inference(setting: Setting) -> dict[str, Any]:
    """One answer on one core, stage by stage, and the encoder alone.

    In an answer the encoder runs after the LLM's last turn. On more cores a stage of 2 ms takes 1
    or 3, as workers happen to wake, which `diff` cannot tell from a regression.
    """
    with Assistant.load(setting.bundle, threads=STAGES_THREADS) as assistant:
        audio = median_recording(setting, assistant.sample_rate)
        frames = assistant.bundle.manifest.front_end(audio)
        sides = {
            OURS: answering(assistant, audio, dict(setting.slow)),
            ENCODER_ALONE: make_side(lambda: assistant.encode(frames), "encoder"),
            WITH_THREADS: make_side(lambda: list(assistant.stream(audio)), ANSWER),
        }
        samples = alternate(sides, setting.rule if setting.short else STAGES_RULE)
        answer = assistant.answer(audio)
        features = assistant.features(audio)
        prompt = assistant.llm.assemble(assistant.soft_tokens(features))

    shares = []
    for seconds in zip(*samples[OURS].values()):  # turn by turn
        shares.append(unexplained(dict(zip(samples[OURS], seconds))))
    return {
        "audio_s": len(audio) / assistant.sample_rate,
        "samples": len(audio),
        "features": len(features),
        "prompt_positions": len(prompt),
        "answer_tokens": len(answer.tokens),
        "unexplained": statistics.median(shares),
        "summary": {side: summary(turns) for side, turns in samples.items()},
        "timings": samples,
    }


def streaming(setting: Setting) -> dict[str, Any]:
    """What is left to do at the end of speech, by length of the speech."""
    from tiny_align.benchmarks.standard.streaming import measure as measure_streaming
    from tiny_align.benchmarks.standard.streaming import ratios as streaming_ratios

    bundle = Bundle.open(setting.bundle, verify=False)
    sample_rate = bundle.manifest.front_end.sample_rate
    recordings = [utterance.load(sample_rate) for utterance in load_test_split(setting)]
    rounds = 1 if setting.short else 5
    rows = measure_streaming(bundle, recordings, setting.threads, None, rounds)
    return {"rows": rows, "ratios": streaming_ratios(rows), "quality": {}}


# --- training and quality ---


def training(setting: Setting) -> dict[str, Any]:
    """A user's training on one core, and a step of it beside one through the LLM."""
    from tiny_align.benchmarks.standard import training_cost

    result = run_in_process(1, train_user, setting)
    return result | {"cost": training_cost.compare("reference", 1)}


def train_user(setting: Setting) -> dict[str, Any]:
    """A projector trained as `tiny-align align` does it, measured before and after."""
    from tiny_align.align.data.datasets import load_dataset
    from tiny_align.align.training.align_user import align_user
    from tiny_align.align.training.limits import TrainingLimits

    utterances = load_dataset(Path(setting.data))
    limits = TrainingLimits(threads=1, steps=setting.steps)
    with tempfile.TemporaryDirectory() as users:
        result, _, _ = align_user(Path(setting.bundle), utterances, "bench", Path(users), limits)
    result = {name: value for name, value in result.items() if name not in ("path", "user")}
    return result | {"peak_bytes": peak_memory_bytes()}


def quality(setting: Setting) -> dict[str, Any]:
    """The general projector on a new voice, exact typed answers, and answers to non-speech."""
    from tiny_align.align.data.non_speech import non_speech
    from tiny_align.align.evaluation.quality import evaluate
    from tiny_align.reference import corpus

    rng = np.random.default_rng(77)
    n = setting.n_test
    sentences = corpus.sentences(5 * n, 21, held_out=True)
    with Assistant.load(setting.bundle, threads=setting.threads) as assistant:
        n_exact = 0
        for sentence in sentences:
            n_exact += assistant.answer_text(sentence.text).text == sentence.answer
        n_answered = 0
        for _ in range(n):
            n_answered += is_answered(assistant, non_speech(rng, assistant.sample_rate))
        spoken = evaluate(assistant, load_test_split(setting), quiet=True)
    return {
        "rouge1": spoken.rouge1,
        "rougeL": spoken.rougeL,
        "rougeL_chance": spoken.rougeL_chance,
        "wer": spoken.wer,
        "cer": spoken.cer,
        "n": spoken.n,
        "typed_exact": n_exact / len(sentences),
        "typed": len(sentences),
        "wordless": n,
        "wordless_answered": n_answered,
    }


def is_answered(assistant: Assistant, sound: np.ndarray) -> bool:
    try:
        return assistant.answer(sound).heard
    except AudioError:  # a refused recording has no answer
        return False


# --- memory ---


def memory(setting: Setting, processes: int = 3) -> dict[str, Any]:
    """Resident memory and seconds from loading to the answers, in a few new processes: medians."""
    runs = [run_in_process(setting.threads, start_cold, setting) for _ in range(processes)]
    result: dict[str, Any] = {}
    for name in runs[0]:
        result[name] = statistics.median(run[name] for run in runs)
    files = [path for path in Path(setting.bundle).iterdir() if path.is_file()]
    result["bundle_bytes"] = sum(path.stat().st_size for path in files)
    result["processes"] = processes
    return result


def start_cold(setting: Setting, n_answers: int = 20) -> dict[str, float]:
    """One process: memory before and after loading, after one answer (a cold one), after many."""
    before_bytes = resident_bytes()
    front_end = Bundle.open(setting.bundle, verify=False).manifest.front_end
    audio = median_recording(setting, front_end.sample_rate)
    began = time.perf_counter()
    with Assistant.load(setting.bundle, threads=setting.threads) as assistant:
        load_s = time.perf_counter() - began
        loaded_bytes = resident_bytes()
        cold = assistant.answer(audio)
        answered_bytes = resident_bytes()
        warm = [assistant.answer(audio) for _ in range(n_answers)]
        return {
            "load_s": load_s,
            "cold_first_token_s": cold.ttft_s,
            "warm_first_token_s": statistics.median(answer.ttft_s for answer in warm),
            "before_bytes": before_bytes,
            "loaded_bytes": loaded_bytes,
            "answered_bytes": answered_bytes,
            "after_many_bytes": resident_bytes(),
            "peak_bytes": peak_memory_bytes(),
        }


# --- beside the peers ---


def compare(setting: Setting) -> dict[str, Any]:
    """Every pipeline that runs here: turns on one recording, then its answers to all recordings."""
    bundle = Path(setting.bundle)
    utterances = load_test_split(setting)
    with Assistant.load(bundle, threads=setting.threads) as assistant:
        sample_rate = assistant.sample_rate
        audio = median_recording(setting, sample_rate)
        recordings = [utterance.load(sample_rate) for utterance in utterances]
        typed = [assistant.answer_text(utterance.text).text for utterance in utterances]

    peers = {name: start_peer(name, bundle, setting.threads) for name in PIPELINES}
    missing = {}
    sides = {}
    for name, peer in peers.items():
        peer.measure(audio)  # some compile at their first answer
        if peer.failure is None:
            sides[name] = functools.partial(answer_seconds, peer, audio)
        else:
            missing[name] = peer.failure.replace(str(bundle), "BUNDLE")

    samples = alternate(sides, setting.rule, PEER_PAUSE_S)
    rows = {}
    for name in sides:
        row = peer_row(peers[name], samples[name], recordings, typed)
        rows[name] = row | {"ratios": ratios(samples[name], samples[OURS])}
    for peer in peers.values():
        peer.close()
    return {
        "audio_s": len(audio) / sample_rate,
        "recordings": len(recordings),
        "peers": rows,
        "missing": missing | LEFT_OUT,
        "timings": samples,
    }


def start_peer(name: str, bundle: Path, threads: int) -> PeerProcess:
    return PeerProcess(Pipeline, name, bundle, threads, threads=threads, timeout_s=PEER_TIMEOUT_S)


def ask(peer: PeerProcess, audio: np.ndarray) -> dict[str, Any]:
    """What a peer measures of its answer.

    Raises:
        ChildProcessError: it failed, though it has answered before.
    """
    row = peer.measure(audio)
    if row is None:
        raise ChildProcessError(f"a peer failed between two answers: {peer.failure}")
    return row


def answer_seconds(peer: PeerProcess, audio: np.ndarray) -> dict[str, float]:
    """A side: one answer of the peer."""
    return ask(peer, audio)["seconds"]


def peer_row(
    peer: PeerProcess, samples: Samples, recordings: list[np.ndarray], typed: list[str]
) -> dict[str, Any]:
    """A peer's figures: seconds of the one recording, quality over all."""
    rows = [ask(peer, audio) for audio in recordings]
    return {
        "seconds": summary(samples),
        "rougeL": rouge(typed, [row["text"] for row in rows]),
        "load_s": rows[-1]["load_s"],
        "peak_bytes": rows[-1]["peak_bytes"],
    }


def ratios(theirs: Samples, ours: Samples) -> dict[str, float]:
    """Their seconds over ours, turn by turn: the median. Above 1, ours is faster."""
    medians = {}
    for part, seconds in ours.items():
        medians[part] = float(np.median(np.array(theirs[part]) / np.array(seconds)))
    return medians


# --- limits and growth ---


def limits(setting: Setting) -> dict[str, Any]:
    """The machine's limits, what each graph must do, and the share that its stage reaches."""
    gb_s = measure_bandwidth(STAGES_THREADS)
    gflop_s = measure_products(STAGES_THREADS)
    measured = measure("inference", setting)
    bundle = Bundle.open(setting.bundle, verify=False)
    row_samples = bundle.manifest.front_end.row_samples
    sizes = {
        "frames": -(-measured["samples"] // row_samples),
        "features": measured["features"],
        "prompt_positions": measured["prompt_positions"],
        "answer_tokens": measured["answer_tokens"],
    }
    stages = {}
    for name, cost in costs(bundle, *sizes.values()).items():
        seconds = measured["summary"][OURS][name]["median"]
        stages[name] = limit_row(cost, seconds, gb_s, gflop_s)
    return {
        "bandwidth_gb_s": gb_s,
        "products_gflop_s": gflop_s,
        "sizes": sizes,
        "stages": stages,
    }


def growth(setting: Setting) -> dict[str, Any]:
    """What costs grow with; each curve has a third of the usual time."""
    rule = replace(setting.rule, max_s=setting.rule.max_s / 3)
    return {"curves": growth_curves.measure(Path(setting.bundle), setting.threads, rule)}


PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
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
def measure(name: str, setting: Setting) -> dict[str, Any]:
    """One part's data, in a process of its own. A part that another one needs is measured once."""
    if name not in IN_ONE_PROCESS:
        return PARTS[name](setting)
    threads = STAGES_THREADS if name == "inference" else setting.threads
    return run_in_process(threads, PARTS[name], setting)
