"""What is left to do at the end of speech, by its length: streaming, and encoding all at once.

Speech is pushed in pieces of 100 ms, and every piece is finished before the next one arrives, as it
is where windows keep up with the speech (`late` counts the pieces that would not). `whole` is the
same bundle without windows: it gets all speech at its end. Both sides take turns.

    python -m benchmarks.standard.streaming [--bundle DIR] [--threads 1 2] [--digits FOLDER]
    python -m benchmarks.standard.streaming --bundle work/full_size/bundle --pace 2.5
    python -m benchmarks.standard.streaming --soak-hours 2

`--pace` is for an untrained bundle: so many soft tokens per second of speech. `--soak-hours`
measures memory, threads and handles over hundreds of turns instead.

The last line is a JSON document; `ratios` are the worst over the numbers of threads.
"""

import argparse
import dataclasses
import os
import random
import statistics
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from tiny_align.align.data.datasets import load_dataset
from tiny_align.align.evaluation.quality import evaluate
from tiny_align.benchmarks import finish, new_parser, stamp
from tiny_align.benchmarks.standard.markdown import grid
from tiny_align.benchmarks.standard.processes import resident_bytes
from tiny_align.benchmarks.standard.speakers import speakers_of
from tiny_align.runtime import Assistant, Decoding
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.shipped import shipped
from tiny_align.runtime.errors import AudioError
from tiny_align.runtime.projectors import LoadedProjector
from tiny_align.runtime.readout import Reader
from tiny_align.runtime.session import Session

RESULTS = Path(__file__).parents[1] / "results" / "streaming.json"
FULL_SIZE = RESULTS.with_name("streaming-full-size.json")
SOAK = RESULTS.with_name("streaming-soak.json")
COMMAND = "python -m benchmarks.standard.streaming"
LENGTHS_S = (2, 3, 5, 10, 20, 30)
CHUNK_S = 0.1
ONE_TOKEN = Decoding(max_tokens=1)


class PacedReader:
    """A reader for an untrained projector: a fixed number of soft tokens per vector."""

    def __init__(self, table: np.ndarray, vectors_per_token: float):
        self._table = table
        self._vectors_per_token = vectors_per_token
        self._n_vectors = 0
        self._n_tokens = 0

    def push(self, vectors: np.ndarray) -> np.ndarray:
        self._n_vectors += len(vectors)
        tokens = np.arange(self._n_tokens, int(self._n_vectors / self._vectors_per_token))
        self._n_tokens += len(tokens)
        return self._table[tokens % len(self._table)]

    def finish(self) -> np.ndarray:
        return self._table[:0]


class PacedAssistant(Assistant):
    """An assistant whose readers are paced."""

    table: np.ndarray  # (K, D)
    vectors_per_token: float

    def reader(self, projector: LoadedProjector | None = None) -> Reader:
        return PacedReader(self.table, self.vectors_per_token)


def load_assistant(bundle: Bundle, windows: bool, threads: int, pace: float | None) -> Assistant:
    """The bundle with its windows or without.

    Args:
        pace: soft tokens per second of speech, for an untrained projector; None: its own.
    """
    manifest = bundle.manifest if windows else dataclasses.replace(bundle.manifest, windows=None)
    chosen = Bundle(bundle.path, manifest)
    if not pace:
        return Assistant.load(chosen, threads=threads)
    assistant = PacedAssistant.load(chosen, threads=threads)
    assistant.table = assistant.llm.embed(np.arange(100))
    vectors_per_s = assistant.sample_rate / bundle.manifest.windows.vector_samples
    assistant.vectors_per_token = vectors_per_s / pace
    return assistant


def cut_speech(length_s: float, recordings: list[np.ndarray], sample_rate: int) -> np.ndarray:
    """Recordings one after another, cut at `length_s`."""
    n = round(length_s * sample_rate)
    speech = np.concatenate(recordings)
    return np.tile(speech, -(-n // len(speech)))[:n]


def answer_streamed(assistant: Assistant, audio: np.ndarray) -> dict[str, float]:
    """Seconds from the end of speech to the first token, and the work done before the end."""
    session = assistant.listen(decoding=ONE_TOKEN)
    chunk = round(CHUNK_S * assistant.sample_rate)
    chunk_s = []
    for start in range(0, len(audio), chunk):
        began = time.perf_counter()
        session.push(audio[start : start + chunk])
        session.settle()
        chunk_s.append(time.perf_counter() - began)
    (event,) = session.finish()
    hop_s = assistant.windows.hop_samples / assistant.sample_rate
    n_late = sum(seconds > hop_s for seconds in chunk_s)
    return {"ttft_s": event.elapsed_s, "before_s": sum(chunk_s), "late": n_late}


def measure(
    bundle: Bundle, recordings: list[np.ndarray], threads: int, pace: float | None, rounds: int
) -> list[dict[str, float]]:
    """A row for each length: medians of `rounds` alternated runs."""
    rows = []
    with (
        load_assistant(bundle, True, threads, pace) as streaming,
        load_assistant(bundle, False, threads, pace) as whole,
    ):
        for length_s in tqdm(LENGTHS_S, desc=f"{threads} threads", file=sys.stderr):
            audio = cut_speech(length_s, recordings, streaming.sample_rate)
            answer_streamed(streaming, audio)  # warms up
            whole.answer(audio, decoding=ONE_TOKEN)
            runs = []
            whole_ttft_s = []
            real_time_factors = []
            for _ in range(rounds):
                runs.append(answer_streamed(streaming, audio))
                whole_ttft_s.append(whole.answer(audio, decoding=ONE_TOKEN).ttft_s)
                real_time_factors.append(streaming.answer(audio).seconds / length_s)
            rows.append(
                {
                    "threads": threads,
                    "speech_s": length_s,
                    "late": max(run["late"] for run in runs),
                    "ttft_s": statistics.median(run["ttft_s"] for run in runs),
                    "before_s": statistics.median(run["before_s"] for run in runs),
                    "whole_ttft_s": statistics.median(whole_ttft_s),
                    "rtf": statistics.median(real_time_factors),
                }
            )
    return rows


def ratios(rows: list[dict[str, float]]) -> dict[str, float]:
    """The figures that the project asks for, the worst over the numbers of threads."""
    by_setting = {(row["threads"], row["speech_s"]): row for row in rows}
    threads = sorted({row["threads"] for row in rows})
    growth = []
    share_of_whole = []
    for n in threads:
        growth.append(by_setting[n, 30]["ttft_s"] / by_setting[n, 3]["ttft_s"])
        share_of_whole.append(by_setting[n, 10]["ttft_s"] / by_setting[n, 10]["whole_ttft_s"])
    return {
        "ttft_30s_over_3s": max(growth),
        "ttft_10s_streaming_over_whole": max(share_of_whole),
        "rtf": max(row["rtf"] for row in rows if row["threads"] == threads[0]),
    }


def quality(bundle: Bundle, folders: dict[str, Path]) -> dict[str, dict]:
    """Quality of the general projector on test splits, in windows and without."""
    found = {}
    with (
        load_assistant(bundle, True, 2, None) as streaming,
        load_assistant(bundle, False, 2, None) as whole,
    ):
        for name, folder in folders.items():
            test = [u for u in load_dataset(folder) if u.split == "test"]
            lengths = [len(u.load(streaming.sample_rate)) for u in test]
            in_windows = evaluate(streaming, test, quiet=True)
            at_once = evaluate(whole, test, quiet=True)
            found[name] = {
                "n": len(test),
                "longer_than_a_window": sum(n > streaming.windows.samples for n in lengths),
                "rougeL": in_windows.rougeL,
                "rougeL_whole": at_once.rougeL,
                "wer": in_windows.wer,
                "wer_whole": at_once.wer,
            }
    return found


# --- soak ---


class Mark(NamedTuple):
    """The state of this process at the end of a turn."""

    audio_s: float  # pushed so far
    resident_bytes: int
    n_threads: int
    n_handles: int


def soak(
    bundle: Bundle, recordings: list[np.ndarray], hours: float, seed: int, threads: int
) -> dict[str, Any]:
    """Many random turns, some of them cancelled or interrupted: what grows, how each turn ended."""
    rng = random.Random(seed)
    turns = {"answered": 0, "cancelled": 0, "nothing": 0}
    marks = []
    n_samples = 0
    digest = 0  # of all tokens
    with Assistant.load(bundle, threads=threads) as assistant:
        rate = assistant.sample_rate
        session = assistant.listen()
        bar = tqdm(total=round(hours * 60), unit="min", desc="soak", file=sys.stderr)
        while n_samples < hours * 3600 * rate:
            audio = random_speech(recordings, rate, rng)
            n_samples += len(audio)
            push_randomly(session, audio, rate, rng)
            end, tokens = finish_turn(session, rng)
            turns[end] += 1
            digest = zlib.crc32(repr(tokens).encode(), digest)
            marks.append(
                Mark(
                    n_samples / rate,
                    resident_bytes(),
                    threading.active_count(),
                    len(os.listdir("/proc/self/fd")),
                )
            )
            bar.update(n_samples // (60 * rate) - bar.n)
        bar.close()

    last = marks[-1]
    warm = next((mark for mark in marks if mark.audio_s >= 600), marks[0])
    early = median_resident(marks, 600, 1200)
    late = median_resident(marks, last.audio_s - 600, last.audio_s)
    return {
        "audio_s": n_samples / rate,
        "turns": turns,
        "resident_bytes_after_10_min": early,
        "resident_bytes_at_the_end": late,
        "growth": late / early - 1,
        "threads": [warm.n_threads, last.n_threads],
        "handles": [warm.n_handles, last.n_handles],
        "seed": seed,
        "digest": digest,
    }


def random_speech(recordings: list[np.ndarray], rate: int, rng: random.Random) -> np.ndarray:
    """One to ten of the recordings, each with up to half a second of digital silence after it."""
    pieces = []
    for recording in rng.sample(recordings, rng.randint(1, 10)):
        pieces += [recording, np.zeros(rng.randint(0, rate // 2), np.float32)]
    return np.concatenate(pieces)


def push_randomly(session: Session, audio: np.ndarray, rate: int, rng: random.Random) -> None:
    """Push the audio in pieces of up to a second; now and then the user starts again."""
    start = 0
    while start < len(audio):
        n = rng.randint(1, rate)
        session.push(audio[start : start + n])
        start += n
        if rng.random() < 0.002:
            session.reset()


def finish_turn(session: Session, rng: random.Random) -> tuple[str, list[int | None]]:
    """Take the turn's answer, of which a quarter is broken off: how it ended, and its tokens."""
    n_wanted = None
    if rng.random() < 0.25:
        n_wanted = rng.randint(0, 6) + 1
    tokens = []
    try:
        for event in session.finish():
            tokens.append(event.token)
            if event.token is None:
                return "nothing", tokens
            if len(tokens) == n_wanted:
                if rng.random() < 0.5:
                    session.cancel()  # or else the next turn ends it
                return "cancelled", tokens
    except AudioError:  # `push_randomly` has taken all of it back
        return "nothing", tokens
    return "answered", tokens


def median_resident(marks: list[Mark], begin_s: float, end_s: float) -> float:
    """Over a stretch: the allocator's free memory differs by megabytes from turn to turn."""
    stretch = [mark for mark in marks if begin_s <= mark.audio_s <= end_s]
    return statistics.median(mark.resident_bytes for mark in stretch or marks)


# --- the report ---


def table(report: dict[str, Any]) -> str:
    """The report as the README's table."""
    head = [
        "threads",
        "speech",
        "end of speech to first token",
        "whole at the end",
        "done before the end",
        "late windows",
        "real-time factor",
    ]
    rows = []
    for row in report["rows"]:
        rows.append(
            [
                row["threads"],
                f"{row['speech_s']} s",
                f"{1000 * row['ttft_s']:.0f} ms",
                f"{1000 * row['whole_ttft_s']:.0f} ms",
                f"{1000 * row['before_s']:.0f} ms",
                row["late"],
                f"{row['rtf']:.3f}",
            ]
        )
    shown = [f"`{name}` {value:.2f}" for name, value in report["ratios"].items()]
    text = f"{grid(head, rows)}\n\nRatios: {', '.join(shown)}."
    if report["quality"]:
        text += f"\n\n{quality_table(report['quality'])}"
    return text


def quality_table(rows: dict[str, dict]) -> str:
    """Quality in windows and without."""
    head = [
        "speaker",
        "longer than a window",
        "ROUGE-L in windows",
        "whole",
        "WER in windows",
        "whole",
    ]
    cells = []
    for name, row in rows.items():
        figures = [f"{row[key]:.3f}" for key in ("rougeL", "rougeL_whole", "wer", "wer_whole")]
        cells.append([name, f"{row['longer_than_a_window']} of {row['n']}", *figures])
    return grid(head, cells)


def soak_table(report: dict[str, Any]) -> str:
    """The soak's report as a table."""
    turns = [f"{n} {end}" for end, n in report["turns"].items()]
    early = report["resident_bytes_after_10_min"] / 1e6
    late = report["resident_bytes_at_the_end"] / 1e6
    threads_early, threads_late = report["threads"]
    handles_early, handles_late = report["handles"]
    rows = [
        ["audio", f"{report['audio_s'] / 3600:.1f} h"],
        ["turns", ", ".join(turns)],
        [
            "resident memory, median of minutes 10 to 20 and of the last ten",
            f"{early:.1f} MB, {late:.1f} MB",
        ],
        ["growth", f"{100 * report['growth']:.2f} %"],
        ["threads", f"{threads_early} and {threads_late}"],
        ["open handles", f"{handles_early} and {handles_late}"],
    ]
    return grid(["", ""], rows)


# --- the run ---


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    bundle = Bundle.open(args.bundle)
    sample_rate = bundle.manifest.front_end.sample_rate
    recordings = [u.load(sample_rate) for u in load_dataset(shipped("voice"))]
    if args.soak_hours:
        args.out = args.out or SOAK
        report = stamp(f"{COMMAND} --soak-hours {args.soak_hours:g}")
        report |= soak(bundle, recordings, args.soak_hours, args.seed, args.threads[0])
        return finish(report, args, soak_table(report))

    args.out = args.out or (FULL_SIZE if args.pace else RESULTS)
    report = stamp(_command(args))
    report["rows"] = []
    for threads in args.threads:
        report["rows"] += measure(bundle, recordings, threads, args.pace, args.rounds)
    report["ratios"] = ratios(report["rows"])
    report["quality"] = {} if args.pace else _quality(bundle, args.digits)
    return finish(report, args, table(report))


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__, None)
    parser.add_argument("--bundle", type=Path, default=shipped("bundle"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--pace", type=float, help="soft tokens per second instead of the projector's own"
    )
    parser.add_argument(
        "--digits", type=Path, help="a folder of speakers, each with metadata.jsonl"
    )
    parser.add_argument("--soak-hours", type=float, help="of audio; instead of the table")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _command(args: argparse.Namespace) -> str:
    """The command for the same table, without folders."""
    command = COMMAND
    if args.digits:
        command += " --digits FOLDER"
    if args.pace:
        command += f" --bundle BUNDLE --pace {args.pace:g}"
    return f"{command} --threads {' '.join(map(str, args.threads))} --rounds {args.rounds}"


def _quality(bundle: Bundle, digits: Path | None) -> dict[str, dict]:
    """`quality` of synthetic voices and of the speakers in `digits`."""
    from tiny_align.reference import recordings, speech

    with tempfile.TemporaryDirectory() as temporary:
        folders = {}
        for name in speech.NEW_VOICES:
            folders[name] = Path(temporary) / name
            recordings.write_voice(name, folders[name], 2, 40)
        return quality(bundle, folders | speakers_of(digits))


if __name__ == "__main__":
    raise SystemExit(main())
