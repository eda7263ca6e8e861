"""`tiny-align demo`: the whole story in one command.

Takes the shipped bundle and the shipped recordings of a voice its encoder never heard; answers them, trains that
person's projector here, answers again while the text streams, and shows the two side by side.
"""

import statistics
from itertools import islice
from pathlib import Path

from tiny_align.align.commands.align import TrainingLimits, add_training_arguments, personalise
from tiny_align.align.data.data_report import DataReport, each_usable

N_SHOWN, N_STREAMED = 8, 5


def shipped(name: str) -> Path:
    """A folder of the shipped reference: "bundle" or "voice"."""
    from importlib.resources import files

    return Path(str(files("tiny_align.reference"))) / name


def add_arguments(parser) -> None:
    parser.add_argument("--bundle", type=Path, help="another bundle than the shipped one")
    parser.add_argument("--data", type=Path, help="other recordings than the shipped ones")
    parser.add_argument("--user", default="demo", help="the person's name (default: demo)")
    parser.add_argument(
        "--out", type=Path, default=Path("tiny-align-demo"), help="where users/NAME is written"
    )
    add_training_arguments(parser)


def run(args) -> dict:
    from tiny_align.align.data.datasets import load_dataset, split_of

    bundle, data = args.bundle or shipped("bundle"), args.data or shipped("voice")
    report = DataReport()
    utterances, users = load_dataset(data, report=report), args.out / "users"
    result, before, after = personalise(
        bundle, utterances, args.user, users, TrainingLimits.of(args), report=report
    )
    speed = _stream(bundle, args.user, users, split_of(utterances, "test"), args)
    if not args.json:
        _show(before, after, result | speed)
    return result | speed


def _stream(bundle: Path, user: str, users: Path, utterances: list, args) -> dict:
    """Answer some of the test recordings aloud -> medians of the time to the first token and the real-time factor."""
    from tiny_align.runtime.assistant import Assistant, collect
    from tiny_align.runtime.commands.answering import print_events

    answers = []
    with Assistant.load(bundle, user, users=users, threads=args.threads) as assistant:
        recordings = each_usable(utterances, lambda u: u.load(assistant.sample_rate), DataReport())
        for utterance, audio in islice(recordings, N_STREAMED + 1):  # the first one warms up
            if not args.json and answers:
                print(f"\n  you said:  {utterance.text}\n  answer:    ", end="", flush=True)
            events = assistant.stream(audio)
            answers.append(
                collect(
                    print_events(events, quiet=args.json or not answers),
                    len(audio) / assistant.sample_rate,
                )
            )
    timed = answers[1:] or answers
    return {
        "ttft_ms": round(statistics.median(a.ttft_s for a in timed) * 1000, 2),
        "rtf": round(statistics.median(a.rtf for a in timed), 4),
    }


def _show(before, after, result: dict) -> None:
    print(f"\n{'typed answer':42s} | {'spoken, before':42s} | spoken, after")
    for old, new in list(zip(before.rows, after.rows))[:N_SHOWN]:
        print(f"{new['typed'][:42]:42s} | {old['spoken'][:42]:42s} | {new['spoken'][:60]}")
    print(f"\n{'':24s} {'before':>8s} {'after':>8s}")
    for name, label in (("rougeL", "ROUGE-L against typed"), ("wer", "word error rate")):
        print(f"{label:24s} {result[f'{name}_before']:8.3f} {result[f'{name}_after']:8.3f}")
    print(f"{'chance ROUGE-L':24s} {'':8s} {result['rougeL_chance']:8.3f}")
    print(
        f"trained for {result['train_seconds']:.1f} s ({result['steps']} steps, {result['utterances']} recordings)"
    )
    print(
        f"time to first token {result['ttft_ms']:.0f} ms, real-time factor {result['rtf']:.3f}, {result['backend']}"
    )
    print(f"written to {result['path']}")
