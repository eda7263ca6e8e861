"""Alignment quality of the reference bundle: typed text, known and new voices, new speakers.

    python -m benchmarks.studies.quality [--digits FOLDER] [--json]

Needs espeak-ng and flite (Debian packages); `--digits` takes a folder of speakers, each a data set.
Training runs on one core. Writes benchmarks/results/quality.json; the last line of stdout is the
same document.
"""

import random
import tempfile
from pathlib import Path
from typing import Any

import soundfile

from tiny_align.align.data.datasets import Utterance, load_dataset
from tiny_align.align.evaluation.quality import evaluate
from tiny_align.align.training.align_user import align_user
from tiny_align.align.training.limits import TrainingLimits
from tiny_align.benchmarks import finish, new_parser, stamp
from tiny_align.benchmarks.standard.markdown import grid
from tiny_align.benchmarks.standard.speakers import speakers_of
from tiny_align.reference import corpus, recordings, speech
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.bundle.shipped import shipped

RESULTS = Path(__file__).parents[1] / "results" / "quality.json"
GROUPS = {  # of a report's trained users -> what they are
    "learnt_voices": "flite, known",
    "new_voices": "flite, new",
    "people": "human, digits",
}


def typed_exact(assistant: Assistant, n: int) -> dict[str, float]:
    """Share of held-out sentences that the deployed LLM answers exactly when typed."""
    n_exact = 0
    for sentence in corpus.sentences(n, 21, held_out=True):
        n_exact += assistant.answer_text(sentence.text).text == sentence.answer
    return {"exact": n_exact / n, "n": n}


def known_voices(assistant: Assistant, n: int, folder: Path) -> dict[str, float]:
    """Held-out sentences by voices the encoder was trained on, with the general projector."""
    espeak = speech.Espeak(seed=0)
    rng = random.Random(21)
    utterances = []
    for i, sentence in enumerate(corpus.sentences(n, 22, held_out=True)):
        path = folder / f"{i}.wav"
        soundfile.write(path, espeak.say_randomly(sentence.text, rng), speech.SAMPLE_RATE)
        utterances.append(Utterance(path, sentence.text, "test"))
    quality = evaluate(assistant, utterances)
    return {
        "rouge1": quality.rouge1,
        "rougeL": quality.rougeL,
        "wer": quality.wer,
        "cer": quality.cer,
        "rougeL_chance": quality.rougeL_chance,
        "n": quality.n,
    }


def train_user(bundle: Path, data: Path, name: str, users: Path) -> dict[str, Any]:
    """Train on the train split on one core; before and after on the test split."""
    result, _, _ = align_user(bundle, load_dataset(data), name, users, TrainingLimits(threads=1))
    return {key: value for key, value in result.items() if key not in ("path", "user")}


def measure(bundle: Path, digits: Path | None, n_train: int) -> dict[str, Any]:
    report = stamp("python -m benchmarks.studies.quality" + (" --digits FOLDER" if digits else ""))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        users = folder / "users"
        with Assistant.load(bundle) as assistant:
            report["typed"] = typed_exact(assistant, 800)
            report["known_voices"] = known_voices(assistant, 60, folder)
        for group, voices in (
            ("learnt_voices", speech.TRAINING_VOICES),
            ("new_voices", speech.NEW_VOICES),
        ):
            report[group] = {}
            for voice in voices:
                recordings.write_voice(voice, folder / voice, n_train, 40)
                report[group][voice] = train_user(bundle, folder / voice, voice, users)
        report["people"] = {}
        for speaker, data in speakers_of(digits).items():
            report["people"][speaker] = train_user(bundle, data, speaker, users)
    return report


def table(report: dict[str, Any]) -> str:
    """The report as the README's table."""
    head = [
        "speaker",
        "ROUGE-L before",
        "after",
        "WER before",
        "after",
        "chance ROUGE-L",
        "training, one core",
    ]
    typed = report["typed"]
    known = report["known_voices"]
    typed_name = f"typed, {typed['n']} held-out sentences: exact"
    rows = [
        [typed_name, f"{typed['exact']:.3f}", "", "", "", "", ""],
        [
            "known voices, general projector",
            f"{known['rougeL']:.3f}",
            "",
            f"{known['wer']:.3f}",
            "",
            f"{known['rougeL_chance']:.3f}",
            "",
        ],
    ]
    for group, label in GROUPS.items():
        for name, row in report[group].items():
            rows.append(
                [
                    f"{name} ({label})",
                    f"{row['rougeL_before']:.3f}",
                    f"{row['rougeL_after']:.3f}",
                    f"{row['wer_before']:.3f}",
                    f"{row['wer_after']:.3f}",
                    f"{row['rougeL_chance']:.3f}",
                    f"{row['train_seconds']:.0f} s",
                ]
            )
    return grid(head, rows)


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__, RESULTS)
    parser.add_argument("--bundle", type=Path, default=shipped("bundle"))
    parser.add_argument(
        "--digits", type=Path, help="a folder of speakers, each with metadata.jsonl"
    )
    parser.add_argument(
        "--train", type=int, default=100, help="recordings of each new voice to train on"
    )
    args = parser.parse_args(argv)
    report = measure(args.bundle, args.digits, args.train)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return finish(report, args, table(report))


if __name__ == "__main__":
    raise SystemExit(main())
