"""Alignment quality of the reference bundle: typed, known voices, voices and people the encoder never heard.

    python -m benchmarks.studies.quality [--digits FOLDER] [--json]

Needs espeak-ng and flite (Debian packages); `--digits` takes a folder of speakers, each a data set. Training runs
on one core. Writes benchmarks/results/quality.json; the last line of stdout is the same document.
"""

import argparse
import random
import tempfile
from datetime import date
from pathlib import Path

import soundfile

from tiny_align.align.commands.demo import shipped
from tiny_align.align.data.datasets import Utterance, load_dataset
from tiny_align.align.evaluation.quality import evaluate
from tiny_align.align.training.align_user import align_user
from tiny_align.align.training.limits import TrainingLimits
from tiny_align.benchmarks import finish
from tiny_align.reference import corpus, recordings, speech
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.machine import describe

RESULTS = Path(__file__).parents[1] / "results" / "quality.json"
FIGURES = ("rouge1", "rougeL", "wer", "cer", "rougeL_chance", "n")


def typed_exact(assistant: Assistant, n: int) -> dict:
    """Share of held-out sentences that the deployed LLM answers exactly when typed."""
    drawn = corpus.sentences(n, 21, held_out=True)
    right = sum(assistant.answer_text(s.text).text == s.answer for s in drawn)
    return {"exact": right / n, "n": n}


def known_voices(assistant: Assistant, n: int, folder: Path) -> dict:
    """Held-out sentences by voices the encoder was trained on, with the general projector."""
    espeak, rng, utterances = speech.Espeak(seed=0), random.Random(21), []
    for i, s in enumerate(corpus.sentences(n, 22, held_out=True)):
        path = folder / f"{i}.wav"
        soundfile.write(path, espeak.say_randomly(s.text, rng), speech.SAMPLE_RATE)
        utterances.append(Utterance(path, s.text, "test"))
    quality = evaluate(assistant, utterances)
    return {name: getattr(quality, name) for name in FIGURES}


def new_user(bundle: Path, data: Path, name: str, users: Path) -> dict:
    """Personalise on the train split on one core; before and after on the test split."""
    result, _, _ = align_user(bundle, load_dataset(data), name, users, TrainingLimits(threads=1))
    return {k: v for k, v in result.items() if k not in ("path", "user")}


def measure(bundle: Path, digits: Path | None, n_train: int) -> dict:
    command = "python -m benchmarks.studies.quality" + (" --digits FOLDER" if digits else "")
    report: dict = {"machine": describe(), "date": str(date.today()), "command": command}
    report |= {"learnt_voices": {}, "new_voices": {}, "people": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with Assistant.load(bundle) as assistant:
            report["typed"] = typed_exact(assistant, 800)
            report["known_voices"] = known_voices(assistant, 60, folder)
        for group, voices in (
            ("learnt_voices", speech.TRAINING_VOICES),
            ("new_voices", speech.NEW_VOICES),
        ):
            for name in voices:
                recordings.write_voice(name, folder / name, n_train, 40)
                report[group][name] = new_user(bundle, folder / name, name, folder / "users")
        for person in sorted(digits.glob("*/metadata.jsonl")) if digits else []:
            report["people"][person.parent.name] = new_user(
                bundle, person.parent, person.parent.name, folder / "users"
            )
    return report


def table(report: dict) -> str:
    """The report as the README's table."""
    known = report["known_voices"]
    lines = [
        "| who | ROUGE-L before | after | WER before | after | chance ROUGE-L | training, one core |",
        "|---|---|---|---|---|---|---|",
        f"| typed, {report['typed']['n']} held-out sentences: exact | {report['typed']['exact']:.3f} | | | | | |",
        f"| known voices, general projector | {known['rougeL']:.3f} | | {known['wer']:.3f} | | "
        f"{known['rougeL_chance']:.3f} | |",
    ]
    for group, label in (
        ("learnt_voices", "flite, known"),
        ("new_voices", "flite, new"),
        ("people", "human, digits"),
    ):
        for name, r in report[group].items():
            lines.append(
                f"| {name} ({label}) | {r['rougeL_before']:.3f} | {r['rougeL_after']:.3f} | {r['wer_before']:.3f} | "
                f"{r['wer_after']:.3f} | {r['rougeL_chance']:.3f} | {r['train_seconds']:.0f} s |"
            )
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=shipped("bundle"))
    parser.add_argument(
        "--digits", type=Path, help="a folder of speakers, each with metadata.jsonl"
    )
    parser.add_argument(
        "--train", type=int, default=100, help="recordings of each new voice to train on"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    report = measure(args.bundle, args.digits, args.train)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return finish(report, args, table(report))


if __name__ == "__main__":
    raise SystemExit(main())
