"""What is left to do when somebody stops speaking: streaming beside the encoding of the whole, by length of the speech.

Speech is pushed in pieces of 100 ms; everything that can be done before the end is done by then, as it is where windows
keep up with the speech (`late` counts those that would not). `whole` is the same bundle without windows, to which all
speech is given at its end. Both sides take turns.

    python -m benchmarks.standard.streaming [--bundle DIR] [--threads 1 2] [--digits FOLDER]
    python -m benchmarks.standard.streaming --bundle work/full_size/bundle --pace 2.5   # untrained: so many soft tokens a second
    python -m benchmarks.standard.streaming --soak-hours 2          # memory, threads and handles over hundreds of turns

The last line is a JSON document; `ratios` are the worse of all numbers of threads.
"""

import argparse
import dataclasses
import os
import random
import resource
import statistics
import sys
import tempfile
import threading
import time
import zlib
from datetime import date
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tiny_align.align.commands.demo import shipped
from tiny_align.align.data.datasets import load_dataset
from tiny_align.align.evaluation.quality import evaluate
from tiny_align.benchmarks import finish
from tiny_align.benchmarks.standard.markdown import grid
from tiny_align.runtime import Assistant, Decoding
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.errors import AudioError
from tiny_align.runtime.machine import describe

RESULTS = Path(__file__).parents[1] / "results" / "streaming.json"
FULL_SIZE, SOAK = (
    RESULTS.with_name("streaming-full-size.json"),
    RESULTS.with_name("streaming-soak.json"),
)
LENGTHS_S = (2, 3, 5, 10, 20, 30)
CHUNK_S = 0.1
FIRST = Decoding(max_tokens=1)


class Paced:
    """Instead of a reader where the projector is untrained: as many soft tokens as somebody would say."""

    def __init__(self, table: np.ndarray, vectors_per_token: float):
        self._table, self._every, self._n, self._given = table, vectors_per_token, 0, 0

    def push(self, vectors: np.ndarray) -> np.ndarray:
        self._n += len(vectors)
        rows = range(self._given, int(self._n / self._every))
        self._given = rows.stop
        return self._table[[row % len(self._table) for row in rows]]

    def finish(self) -> np.ndarray:
        return self._table[:0]


def loaded(bundle: Bundle, windows: bool, threads: int, pace: float | None) -> Assistant:
    """The bundle with its windows or without; `pace`: soft tokens per second, whatever the projector gives."""
    manifest = bundle.manifest if windows else dataclasses.replace(bundle.manifest, windows=None)
    assistant = Assistant.load(Bundle(bundle.path, manifest), threads=threads)
    if pace:
        vectors_per_s = assistant.sample_rate / bundle.manifest.windows.vector_samples
        table = assistant.llm.embed(np.arange(100))
        assistant.reader = lambda: Paced(table, vectors_per_s / pace)
    return assistant


def speech_of(length_s: float, recordings: list[np.ndarray], sample_rate: int) -> np.ndarray:
    """Recordings one after another, cut at `length_s`."""
    n = round(length_s * sample_rate)
    said = np.concatenate(recordings)
    return np.tile(said, -(-n // len(said)))[:n]


def streamed(assistant: Assistant, audio: np.ndarray) -> dict:
    """Seconds from the end of the speech to the first token, and what was done before it ended."""
    session, n = assistant.listen(decoding=FIRST), round(CHUNK_S * assistant.sample_rate)
    hop_s, busy = assistant.windows.hop_samples / assistant.sample_rate, []
    for start in range(0, len(audio), n):
        began = time.perf_counter()
        session.push(audio[start : start + n])
        session.settle()
        busy.append(time.perf_counter() - began)
    (event,) = session.finish()
    return {"ttft_s": event.elapsed_s, "before_s": sum(busy), "late": sum(b > hop_s for b in busy)}


def measure(
    bundle: Bundle, recordings: list[np.ndarray], threads: int, pace: float | None, rounds: int
) -> list[dict]:
    """A row for each length: medians of `rounds` alternated runs."""
    rows = []
    with loaded(bundle, True, threads, pace) as ours, loaded(bundle, False, threads, pace) as other:
        for length in tqdm(LENGTHS_S, desc=f"{threads} threads", file=sys.stderr):
            audio = speech_of(length, recordings, ours.sample_rate)
            streamed(ours, audio), other.answer(audio, decoding=FIRST)
            runs, wholes, real_time = [], [], []
            for _ in range(rounds):
                runs.append(streamed(ours, audio))
                wholes.append(other.answer(audio, decoding=FIRST).ttft_s)
                real_time.append(ours.answer(audio).seconds / length)
            row = {"threads": threads, "speech_s": length, "late": max(run["late"] for run in runs)}
            row |= {
                name: statistics.median(run[name] for run in runs)
                for name in ("ttft_s", "before_s")
            }
            row |= {"whole_ttft_s": statistics.median(wholes), "rtf": statistics.median(real_time)}
            rows.append(row)
    return rows


def ratios(rows: list[dict]) -> dict:
    """The figures that are asked for, the worst of all numbers of threads."""
    by = {(row["threads"], row["speech_s"]): row for row in rows}
    threads = sorted({row["threads"] for row in rows})
    return {
        "ttft_30s_over_3s": max(by[t, 30]["ttft_s"] / by[t, 3]["ttft_s"] for t in threads),
        "ttft_10s_streaming_over_whole": max(
            by[t, 10]["ttft_s"] / by[t, 10]["whole_ttft_s"] for t in threads
        ),
        "rtf": max(row["rtf"] for row in rows if row["threads"] == threads[0]),
    }


def quality(bundle: Bundle, folders: dict[str, Path]) -> dict:
    """ROUGE-L of the answers in windows and without, the general projector's; of the test splits."""
    found = {}
    with loaded(bundle, True, 2, None) as ours, loaded(bundle, False, 2, None) as other:
        for name, folder in folders.items():
            test = [u for u in load_dataset(folder) if u.split == "test"]
            cut = sum(len(u.load(ours.sample_rate)) > ours.windows.samples for u in test)
            scores = [evaluate(assistant, test, quiet=True) for assistant in (ours, other)]
            found[name] = {"n": len(test), "longer_than_a_window": cut}
            found[name] |= {"rougeL": scores[0].rougeL, "rougeL_whole": scores[1].rougeL}
            found[name] |= {"wer": scores[0].wer, "wer_whole": scores[1].wer}
    return found


# --- soak ---


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()


def soak(
    bundle: Bundle, recordings: list[np.ndarray], hours: float, seed: int, threads: int
) -> dict:
    """Turns at random, cancelled and talked over at random: what grows, and whether each was answered or cancelled."""
    rng, samples, turns, marks = (
        random.Random(seed),
        0,
        {"answered": 0, "cancelled": 0, "nothing": 0},
        [],
    )
    digest = 0  # of all tokens
    with Assistant.load(bundle, threads=threads) as assistant:
        rate, session = assistant.sample_rate, assistant.listen()
        bar = tqdm(total=round(hours * 60), unit="min", desc="soak", file=sys.stderr)
        while samples < hours * 3600 * rate:
            said = rng.sample(recordings, rng.randint(1, 10))
            audio = np.concatenate(
                [
                    part
                    for clip in said
                    for part in (clip, np.zeros(rng.randint(0, rate // 2), "f4"))
                ]
            )
            samples += len(audio)
            at = 0
            while at < len(audio):
                n = rng.randint(1, rate)
                session.push(audio[at : at + n])
                at += n
                if rng.random() < 0.002:  # they think again
                    session.reset()
            how, tokens = _answered(session, rng)
            turns[how], digest = turns[how] + 1, zlib.crc32(repr(tokens).encode(), digest)
            marks.append(
                (
                    samples / rate,
                    resident_bytes(),
                    threading.active_count(),
                    len(os.listdir("/proc/self/fd")),
                )
            )
            bar.update(samples // (60 * rate) - bar.n)
        bar.close()
    whole_s, begun = marks[-1][0], next((mark for mark in marks if mark[0] >= 600), marks[0])
    early, late = _resident(marks, 600, 1200), _resident(marks, whole_s - 600, whole_s)
    return {
        "audio_s": samples / rate,
        "turns": turns,
        "resident_bytes_after_10_min": early,
        "resident_bytes_at_the_end": late,
        "growth": late / early - 1,
        "threads": [begun[2], marks[-1][2]],
        "handles": [begun[3], marks[-1][3]],
        "seed": seed,
        "digest": digest,
    }


def _resident(marks: list[tuple], begin_s: float, end_s: float) -> float:
    """The median over a stretch: what the allocator keeps free differs by megabytes from one turn to the next."""
    return statistics.median(
        [mark[1] for mark in marks if begin_s <= mark[0] <= end_s] or [mark[1] for mark in marks]
    )


def _answered(session, rng: random.Random) -> tuple[str, list]:
    """Take the turn's answer, all of it or until it is broken off: how it ended, and its tokens."""
    stop, tokens = rng.randint(0, 6) if rng.random() < 0.25 else None, []
    try:
        for event in session.finish():
            tokens.append(event.token)
            if event.token is None:
                return "nothing", tokens
            if len(tokens) - 1 == stop:
                if rng.random() < 0.5:
                    session.cancel()
                return "cancelled", tokens  # or left alone: the next turn ends it
    except AudioError:
        return "nothing", tokens  # all of it was taken back
    return "answered", tokens


def table(report: dict) -> str:
    """The report as the README's table."""
    head = "| threads | speech | end of speech to first token | whole at the end | done before the end | late windows | "
    lines = [head + "real-time factor |", "|---|---|---|---|---|---|---|"]
    for row in report["rows"]:
        spans = " | ".join(
            f"{1000 * row[name]:.0f} ms" for name in ("ttft_s", "whole_ttft_s", "before_s")
        )
        lines.append(
            f"| {row['threads']} | {row['speech_s']} s | {spans} | {row['late']} | {row['rtf']:.3f} |"
        )
    lines += [
        "",
        f"Ratios: {', '.join(f'`{name}` {value:.2f}' for name, value in report['ratios'].items())}.",
    ]
    if report["quality"]:
        lines += [
            "",
            "| who | longer than a window | ROUGE-L in windows | whole | WER in windows | whole |",
        ]
        lines.append("|---|---|---|---|---|---|")
        for name, q in report["quality"].items():
            figures = " | ".join(
                f"{q[key]:.3f}" for key in ("rougeL", "rougeL_whole", "wer", "wer_whole")
            )
            lines.append(f"| {name} | {q['longer_than_a_window']} of {q['n']} | {figures} |")
    return "\n".join(lines)


def soak_table(report: dict) -> str:
    """The soak's report as a table."""
    turns = ", ".join(f"{n} {how}" for how, n in report["turns"].items())
    sizes = [report[f"resident_bytes_{when}"] / 1e6 for when in ("after_10_min", "at_the_end")]
    rows = [
        ["audio", f"{report['audio_s'] / 3600:.1f} h"],
        ["turns", turns],
        [
            "resident memory, median of minutes 10 to 20 and of the last ten",
            f"{sizes[0]:.1f} MB, {sizes[1]:.1f} MB",
        ],
        ["growth", f"{100 * report['growth']:.2f} %"],
        ["threads", "{} and {}".format(*report["threads"])],
        ["open handles", "{} and {}".format(*report["handles"])],
    ]
    return grid(["", ""], rows)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    bundle = Bundle.open(args.bundle)
    recordings = [
        u.load(bundle.manifest.front_end.sample_rate) for u in load_dataset(shipped("voice"))
    ]
    report = {"machine": describe(), "date": str(date.today())}
    if args.soak_hours:
        args.out = args.out or SOAK
        report |= {
            "command": f"python -m benchmarks.standard.streaming --soak-hours {args.soak_hours:g}"
        }
        report |= soak(bundle, recordings, args.soak_hours, args.seed, args.threads[0])
        return finish(report, args, soak_table(report))
    args.out = args.out or (FULL_SIZE if args.pace else RESULTS)
    report["command"] = "python -m benchmarks.standard.streaming" + (
        " --digits FOLDER" if args.digits else ""
    )
    report["command"] += f" --bundle BUNDLE --pace {args.pace:g}" if args.pace else ""
    report["command"] += f" --threads {' '.join(map(str, args.threads))} --rounds {args.rounds}"
    report["rows"] = [
        row for t in args.threads for row in measure(bundle, recordings, t, args.pace, args.rounds)
    ]
    report["ratios"] = ratios(report["rows"])
    report["quality"] = {} if args.pace else _quality(bundle, args.digits)
    return finish(report, args, table(report))


def _quality(bundle: Bundle, digits: Path | None) -> dict:
    from tiny_align.reference import recordings, speech

    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name in speech.NEW_VOICES}
        for name, folder in folders.items():
            recordings.write_voice(name, folder, 2, 40)
        folders |= (
            {path.parent.name: path.parent for path in sorted(digits.glob("*/metadata.jsonl"))}
            if digits
            else {}
        )
        return quality(bundle, folders)


if __name__ == "__main__":
    raise SystemExit(main())
