"""`tiny-align enroll`: get to know a person. Sentences to read, recordings checked at once, then training.

From a microphone, or from recordings made elsewhere (`--data`); `--list` only writes the sentences to read. The
recordings of a microphone are kept as a data set beside the person, so that more can be added later.
"""

import io
import itertools
import json
import sys
from pathlib import Path

import numpy as np

from tiny_align.align.commands.align import TrainingLimits, add_training_arguments, personalise
from tiny_align.align.data.data_report import DataReport, each_usable
from tiny_align.align.pictures import new_figure
from tiny_align.runtime.errors import DataError, TinyAlignError
from tiny_align.runtime.files import read_errors, written_file

METADATA = "metadata.jsonl"  # of the recordings of a microphone


def add_arguments(parser) -> None:
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--user", required=True, help="the person's name")
    parser.add_argument("--out", type=Path, help="folder for users/NAME (default: the bundle)")
    parser.add_argument(
        "--data", type=Path, help="recordings made elsewhere (default: the microphone)"
    )
    parser.add_argument("--speaker", help="speaker code, for CHAT transcripts")
    parser.add_argument("--sentences", type=int, default=25, help="how many to read (default: 25)")
    parser.add_argument(
        "--texts", type=Path, help="sentences to choose from, one per line (default: the bundle's)"
    )
    parser.add_argument("--device", help="microphone, by name or number (default: the system's)")
    parser.add_argument("--list", action="store_true", help="only show the sentences to read")
    add_training_arguments(parser)


def run(args) -> dict:
    from tiny_align.runtime.bundle.bundle import Bundle

    bundle = Bundle.open(args.bundle)
    users = (args.out or args.bundle) / "users"
    bundle.user_folder(args.user, users)  # refuses a bad name before anything is recorded
    if args.list:
        return _list(bundle, args)
    new_figure(1, 1)  # if matplotlib is missing, say so before the training

    from tiny_align.align.lock import alone

    show = sys.stderr if args.json else sys.stdout
    report = DataReport()
    with alone(bundle.user_folder(args.user, users)):  # recordings and curve too
        utterances = _given(args, report) if args.data else _recorded(bundle, users, args)
        good = _check_all(bundle, utterances, show, report)
        result, _, _ = personalise(
            args.bundle, good, args.user, users, TrainingLimits.of(args), report=report
        )
        curve = json.loads((Path(result["path"]) / "user.json").read_text())["training"]["curve"]
        path = write_curve(curve, Path(result["path"]) / "curve.png", args.user)
    print(drawn(curve), file=show)
    return result | {"curve": str(path)}


def sentences(bundle, texts: Path | None, n: int) -> tuple[list[str], float]:
    """The `n` sentences to read and the share of all sounds and tokens they cover.

    Raises:
        TinyAlignError: no sentences to choose from.
    """
    from tiny_align.align.data.sentences import choose, coverage

    path = texts or bundle.sentences
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TinyAlignError(
            f"no sentences to read: {path} ({error}). Give a text file with --texts"
        ) from error
    candidates = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not candidates:
        raise TinyAlignError(
            f"{path} holds no sentence to read: expected one per line. Give another file with --texts"
        )
    tokenizer = bundle.load_tokenizer()
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    chosen = choose(candidates, n, encode)
    return chosen, coverage(chosen, candidates, encode)


def _list(bundle, args) -> dict:
    chosen, share = sentences(bundle, args.texts, args.sentences)
    if not args.json:
        print("\n".join(f"{i:3d}  {text}" for i, text in enumerate(chosen, 1)))
    return {"sentences": chosen, "coverage": round(share, 3)}


def _given(args, report: DataReport) -> list:
    from tiny_align.align.data.datasets import load_dataset

    return load_dataset(args.data, args.speaker, report)


def _recorded(bundle, users: Path, args) -> list:
    """Record the sentences one by one, each until it is good -> utterances; kept in users/NAME.recordings."""
    from tiny_align.align.data.datasets import load_dataset
    from tiny_align.runtime.listening.microphone import Microphone

    folder = users / f"{args.user}.recordings"
    before = _said_before(folder)
    chosen, _ = sentences(bundle, args.texts, args.sentences + len(before))
    left = [text for text in chosen if text not in before][: args.sentences]
    with Microphone(bundle.manifest.front_end.sample_rate, args.device) as microphone:
        for i, text in enumerate(left, 1):
            _keep(
                folder,
                text,
                _until_good(microphone, text, f"{i}/{len(left)}"),
                microphone.sample_rate,
            )
    return load_dataset(folder)


def _said_before(folder: Path) -> set[str]:
    """The sentences that have been recorded.

    Raises:
        DataError: a damaged line of the metadata.
    """
    said = set()
    for number, line in enumerate(_lines(folder / METADATA), 1):
        try:
            said.add(json.loads(line)["transcription"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder / METADATA}, line {number} is damaged ({error}): delete the line, and its sentence is "
                "recorded again"
            ) from error
    return said


def _lines(path: Path) -> list[bytes]:
    with read_errors(path, DataError):
        return path.read_bytes().splitlines() if path.exists() else []


def _until_good(microphone, text: str, where: str) -> np.ndarray:
    from tiny_align.align.data.recording import check_recording

    while True:
        print(f"\n[{where}] press Enter, read aloud, press Enter:\n    {text}", file=sys.stderr)
        _enter()
        audio = microphone.record(_enter)
        report = check_recording(audio, microphone.sample_rate, text)
        if not report.remedy:
            print(f"    good: {report.seconds:.1f} s, {report.speech_db:.0f} dBFS", file=sys.stderr)
            return audio
        print(f"    once more, please: {report.remedy}", file=sys.stderr)


def _enter() -> None:
    """Wait for the Enter key.

    Raises:
        TinyAlignError: nobody can press it.
    """
    try:
        input()
    except (EOFError, RuntimeError) as error:  # the latter: stdin is closed
        raise TinyAlignError(
            "enroll waits for Enter, and standard input has ended: run it in a terminal, or give recordings with "
            "--data. What has been recorded is kept"
        ) from error


def _keep(folder: Path, text: str, audio: np.ndarray, sample_rate: int) -> None:
    """Add one recording to the data set: the sound first, then its line; each whole or not at all."""
    import soundfile

    name = next(
        name
        for name in map("{:04d}.flac".format, itertools.count())
        if not (folder / name).exists()
    )
    soundfile.write(
        sound := io.BytesIO(), np.clip(audio, -1, 1), sample_rate, format="FLAC", subtype="PCM_16"
    )
    with written_file(folder / name) as temporary:
        temporary.write_bytes(sound.getvalue())
    line = json.dumps({"file_name": name, "transcription": text}, ensure_ascii=False)
    with written_file(folder / METADATA) as temporary:
        temporary.write_bytes(b"\n".join([*_lines(folder / METADATA), line.encode(), b""]))


def _check_all(bundle, utterances: list, show, report: DataReport) -> list:
    """The recordings that are good enough; says of each other one what is wrong with it.

    Raises:
        DataError: none is.
    """
    from tiny_align.align.data.recording import check_recording

    rate, good = bundle.manifest.front_end.sample_rate, []

    def remedy(utterance) -> str:
        return check_recording(utterance.load(rate), rate, utterance.text).remedy

    for utterance, problem in each_usable(utterances, remedy, report):
        if problem:
            print(f"left out {utterance.audio.name}: {problem}", file=show)
            report.leave_out_utterance(utterance, problem)
        else:
            good.append(utterance)
    if not good:
        raise DataError(
            f"none of the {len(utterances)} recordings can be used: record them again ({report.explained()})"
        )
    return good


def drawn(curve: list[dict], width: int = 60) -> str:
    """The objective's held-out figure over the steps, as one line of blocks."""
    errors = np.array([entry["held_out"] for entry in curve])
    errors = errors[np.linspace(0, len(errors) - 1, min(width, len(errors))).round().astype(int)]
    share = (errors - errors.min()) / max(float(np.ptp(errors)), 1e-9)
    bars = "".join("▁▂▃▄▅▆▇█"[round(7 * float(s))] for s in share)
    return f"held-out error {errors[0]:.3f} {bars} {errors[-1]:.3f}"


def write_curve(curve: list[dict], path: Path, user: str) -> Path:
    """The learning curve as a PNG."""
    figure = new_figure(6, 3.5)
    axes = figure.add_subplot(
        xlabel="step", ylabel="loss, or share of wrong tokens", title=f"training of {user}"
    )
    steps = [entry["step"] for entry in curve]
    axes.plot(steps, [entry["held_out"] for entry in curve], "k-o", markersize=3, label="held out")
    axes.plot(steps[1:], [entry["loss"] for entry in curve[1:]], "k:", label="trained on")
    axes.legend()
    with written_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path
