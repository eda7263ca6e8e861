"""`tiny-align enroll`: record a new user, then align.

The user reads sentences, and each recording is checked at once; or the recordings were made
elsewhere (`--data`). `--list` only shows the sentences to read. Recordings of a microphone are
stored as a data set beside the user, so that more can be added later.
"""

import argparse
import io
import itertools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from tiny_align.align.training.limits import TrainingLimits, share_cores
from tiny_align.runtime.commands.options import (
    BundleOptions,
    SpeakerOptions,
    TrainedUserOptions,
    add_options,
    option,
    read_options,
)
from tiny_align.runtime.errors import DataError, TinyAlignError
from tiny_align.runtime.files import read_errors, written_file

if TYPE_CHECKING:
    from tiny_align.align.data.data_report import DataReport
    from tiny_align.align.data.utterance import Utterance
    from tiny_align.runtime.bundle.bundle import Bundle
    from tiny_align.runtime.listening.microphone import Microphone

METADATA = "metadata.jsonl"  # of the recordings of a microphone
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class EnrollOptions(SpeakerOptions, TrainedUserOptions, BundleOptions):
    user: str = field(metadata=option("the user's name", metavar="NAME"))
    data: Path | None = field(
        default=None,
        metadata=option("recordings made elsewhere (default: the microphone)", metavar="DIR"),
    )
    sentences: int = field(
        default=25, metadata=option("how many to read (default: 25)", metavar="N")
    )
    texts: Path | None = field(
        default=None,
        metadata=option(
            "sentences to choose from, one per line (default: the bundle's)", metavar="FILE"
        ),
    )
    device: str | None = field(
        default=None, metadata=option("microphone (default: the system's)", metavar="NAME|NUMBER")
    )
    list: bool = field(default=False, metadata=option("only show the sentences to read"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, EnrollOptions)
    add_options(parser, TrainingLimits)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Record and train, or list the sentences to read; the command's document."""
    from tiny_align.runtime.bundle.bundle import Bundle
    from tiny_align.runtime.bundle.user_folders import find_users

    options = read_options(args, EnrollOptions)
    bundle = Bundle.open(options.bundle)
    users = find_users(bundle, options.user, options.explicit_users)
    folder = bundle.user_folder(options.user, users)  # refuses a bad name before a recording
    if options.list:
        return _list_sentences(bundle, options, quiet=args.json)

    from tiny_align.align.pictures import new_figure

    new_figure(1, 1)  # refuses now, not after the training, if matplotlib is missing
    share_cores()  # before PyTorch is loaded
    from tiny_align.align.data.data_report import DataReport
    from tiny_align.align.data.datasets import load_dataset
    from tiny_align.align.lock import training_lock
    from tiny_align.align.training.align_user import align_user

    limits = read_options(args, TrainingLimits)
    output = sys.stderr if args.json else sys.stdout
    report = DataReport()
    with training_lock(folder):  # of the recordings and the curve too
        if options.data:
            utterances = load_dataset(options.data, options.speaker, report)
        else:
            recordings = users / f"{options.user}.recordings"
            _record_sentences(bundle, recordings, options)
            utterances = load_dataset(recordings)
        utterances = _check_recordings(bundle, utterances, output, report)
        document, _, _ = align_user(
            options.bundle, utterances, options.user, users, limits, report=report
        )
        record = json.loads((folder / "user.json").read_text(encoding="utf-8"))
        curve = record["training"]["curve"]
        document["curve"] = str(write_curve(curve, folder / "curve.png", options.user))
    print(curve_line(curve), file=output)
    return document


# --- the sentences ---


def choose_sentences(bundle: "Bundle", texts: Path | None, n: int) -> tuple[list[str], float]:
    """The `n` sentences to read, and the share of all sounds and tokens that they cover.

    Raises:
        TinyAlignError: no sentences to choose from.
    """
    from tiny_align.align.data.sentences import choose, coverage

    candidates = _read_candidates(texts or bundle.sentences)
    tokenizer = bundle.load_tokenizer()

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    chosen = choose(candidates, n, encode)
    return chosen, coverage(chosen, candidates, encode)


def _read_candidates(path: Path) -> list[str]:
    """The sentences of a text file, one per line, each once."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TinyAlignError(
            f"no sentences to read: {path} ({error}). Give a text file with --texts"
        ) from error
    candidates = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not candidates:
        raise TinyAlignError(
            f"{path} holds no sentence to read: expected one per line. "
            "Give another file with --texts"
        )
    return candidates


def _list_sentences(bundle: "Bundle", options: EnrollOptions, *, quiet: bool) -> dict[str, Any]:
    chosen, share = choose_sentences(bundle, options.texts, options.sentences)
    if not quiet:
        for i, text in enumerate(chosen, 1):
            print(f"{i:3d}  {text}")
    return {"sentences": chosen, "coverage": round(share, 3)}


# --- the microphone ---


def _record_sentences(bundle: "Bundle", folder: Path, options: EnrollOptions) -> None:
    """Record sentences that are not in the data set `folder` yet, one by one, and add them."""
    from tiny_align.runtime.listening.microphone import Microphone

    recorded = read_recorded_texts(folder)
    chosen, _ = choose_sentences(bundle, options.texts, options.sentences + len(recorded))
    remaining = [text for text in chosen if text not in recorded][: options.sentences]
    with Microphone(bundle.manifest.front_end.sample_rate, options.device) as microphone:
        for i, text in enumerate(remaining, 1):
            audio = _record_until_good(microphone, text, f"{i}/{len(remaining)}")
            add_recording(folder, text, audio, microphone.sample_rate)


def _record_until_good(microphone: "Microphone", text: str, position: str) -> np.ndarray:
    from tiny_align.align.data.recording import check_recording

    while True:
        prompt = f"\n[{position}] press Enter, read aloud, press Enter:\n    {text}"
        print(prompt, file=sys.stderr)
        _wait_for_enter()
        audio = microphone.record(_wait_for_enter)
        report = check_recording(audio, microphone.sample_rate, text)
        if not report.remedy:
            print(f"    good: {report.seconds:.1f} s, {report.speech_db:.0f} dBFS", file=sys.stderr)
            return audio
        print(f"    once more, please: {report.remedy}", file=sys.stderr)


def _wait_for_enter() -> None:
    """Wait for the Enter key.

    Raises:
        TinyAlignError: standard input has ended.
    """
    try:
        input()
    except (EOFError, RuntimeError) as error:  # RuntimeError: stdin is closed
        raise TinyAlignError(
            "enroll waits for Enter, and standard input has ended: run it in a terminal, or give "
            "recordings with --data. What has been recorded is kept"
        ) from error


# --- the data set of recordings ---


def read_recorded_texts(folder: Path) -> set[str]:
    """The sentences in the data set `folder`, which may not exist yet.

    Raises:
        DataError: a damaged line of the metadata.
    """
    texts = set()
    for number, line in enumerate(_read_lines(folder / METADATA), 1):
        try:
            texts.add(json.loads(line)["transcription"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder / METADATA}, line {number} is damaged ({error}): delete the line, and "
                "its sentence is recorded again"
            ) from error
    return texts


def _read_lines(path: Path) -> list[bytes]:
    with read_errors(path, DataError):
        return path.read_bytes().splitlines() if path.exists() else []


def add_recording(folder: Path, text: str, audio: np.ndarray, sample_rate: int) -> None:
    """Add one recording to the data set: the audio first, then its line; each whole or not at all.

    Raises:
        TinyAlignError: the folder cannot be written.
    """
    import soundfile

    for i in itertools.count():
        file = folder / f"{i:04d}.flac"
        if not file.exists():
            break
    flac = io.BytesIO()
    soundfile.write(flac, np.clip(audio, -1, 1), sample_rate, format="FLAC", subtype="PCM_16")
    with written_file(file) as temporary:
        temporary.write_bytes(flac.getvalue())
    row = json.dumps({"file_name": file.name, "transcription": text}, ensure_ascii=False)
    lines = [*_read_lines(folder / METADATA), row.encode()]
    with written_file(folder / METADATA) as temporary:
        temporary.write_bytes(b"\n".join(lines) + b"\n")


def _check_recordings(
    bundle: "Bundle", utterances: "list[Utterance]", output: TextIO, report: "DataReport"
) -> "list[Utterance]":
    """The recordings that are good enough; says what is wrong with each other one.

    Raises:
        DataError: there is none.
    """
    from tiny_align.align.data.data_report import each_usable
    from tiny_align.align.data.recording import check_recording

    sample_rate = bundle.manifest.front_end.sample_rate

    def check(utterance: "Utterance") -> str:
        return check_recording(utterance.load(sample_rate), sample_rate, utterance.text).remedy

    good = []
    for utterance, problem in each_usable(utterances, check, report):
        if problem:
            print(f"left out {utterance.audio.name}: {problem}", file=output)
            report.leave_out_utterance(utterance, problem)
        else:
            good.append(utterance)
    if not good:
        raise DataError(
            f"none of the {len(utterances)} recordings can be used: record them again "
            f"({report.explained()})"
        )
    return good


# --- the learning curve ---


def curve_line(curve: list[dict], width: int = 60) -> str:
    """The validation error over the steps as one line of blocks, `width` at most."""
    errors = np.array([entry["held_out"] for entry in curve])
    indices = np.linspace(0, len(errors) - 1, min(width, len(errors))).round().astype(int)
    errors = errors[indices]
    heights = (errors - errors.min()) / max(float(np.ptp(errors)), 1e-9)
    bars = ""
    for height in heights:
        bars += BLOCKS[round(7 * float(height))]
    return f"held-out error {errors[0]:.3f} {bars} {errors[-1]:.3f}"


def write_curve(curve: list[dict], path: Path, user: str) -> Path:
    """Draw the learning curve as a PNG; returns `path`."""
    from tiny_align.align.pictures import new_figure

    figure = new_figure(6, 3.5)
    axes = figure.add_subplot(
        xlabel="step", ylabel="loss, or share of wrong tokens", title=f"training of {user}"
    )
    steps = [entry["step"] for entry in curve]
    errors = [entry["held_out"] for entry in curve]
    losses = [entry["loss"] for entry in curve[1:]]  # none before the first step
    axes.plot(steps, errors, "k-o", markersize=3, label="held out")
    axes.plot(steps[1:], losses, "k:", label="trained on")
    axes.legend()
    with written_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path
