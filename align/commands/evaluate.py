"""`tiny-align eval` and the measure behind it: alignment quality.

What the LLM answers to speech against what it answers to the same words typed.

ROUGE is against the typed answer (typed is 1.0 by definition); the word error rate (word_errors.py) is that of a
repeated sentence against its transcript. The chance level scores every answer against another sentence's typed answer.
"""

import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tiny_align.align.data.data_report import DataReport, each_usable
from tiny_align.align.word_errors import error_rates, normaliser_name
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.errors import DataError


def add_arguments(parser) -> None:
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="metadata folder, NeMo manifest or CHAT transcripts",
    )
    parser.add_argument("--user", help="whose projector; without it, the general one")
    parser.add_argument("--users", type=Path, help="where persons are kept (default: BUNDLE/users)")
    parser.add_argument(
        "--split", default="test", help="the part of the data to measure; 'all' for everything"
    )
    parser.add_argument("--instruction", help="what to do with the speech (default: the bundle's)")
    parser.add_argument("--speaker", help="speaker code, for CHAT transcripts")
    parser.add_argument(
        "--rows", action="store_true", help="every utterance's texts in the JSON document too"
    )
    parser.add_argument(
        "--backend", default="onnxruntime", help="onnxruntime (default) or tensorrt"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")


def run(args) -> dict:
    from tiny_align.align.data.datasets import SPLITS, load_dataset, split_of

    report = DataReport()
    utterances = load_dataset(args.data, args.speaker, report)
    chosen = utterances if args.split == "all" else split_of(utterances, args.split)
    options = {"users": args.users, "backend": args.backend, "threads": args.threads}
    with Assistant.load(args.bundle, args.user, **options) as assistant:
        heard = encode_utterances(assistant, chosen, args.instruction, report=report)
        report.used = dict.fromkeys(SPLITS, 0) | Counter(h.split for h in heard)
        print(report, file=sys.stderr)
        quality = asdict(score(assistant, heard, args.instruction))
    rows, others = (
        quality.pop("rows"),
        Counter(u.split for u in utterances) - Counter(u.split for u in chosen),
    )
    data = report.document() | {"other_splits": dict(others)}
    result = quality | {"backend": args.backend, "user": args.user, "data": data}
    return result | ({"rows": rows} if args.rows else {})


@dataclass(frozen=True)
class Quality:
    """Means over the utterances; `rows` has one entry for each."""

    rouge1: float
    rougeL: float
    rougeL_chance: float
    wer: float
    cer: float
    n: int
    normaliser: str  # of the texts whose words and characters are compared
    rows: tuple[dict, ...]


@dataclass(frozen=True)
class EncodedUtterance:
    """An utterance up to the projector, and what it is measured against."""

    text: str
    features: np.ndarray  # (N, Da)
    typed: str  # the LLM's answer to the typed text
    split: str = "test"


def evaluate(
    assistant: Assistant, utterances: list, instruction: str | None = None, *, quiet: bool = False
) -> Quality:
    """`encode_utterances`, then `score`."""
    return score(
        assistant,
        encode_utterances(assistant, utterances, instruction, quiet=quiet),
        instruction,
        quiet=quiet,
    )


def encode_utterances(
    assistant: Assistant,
    utterances: list,
    instruction: str | None = None,
    *,
    quiet: bool = False,
    report: DataReport | None = None,
) -> list[EncodedUtterance]:
    """What is the same for every projector: features and typed answers, of the utterances that can be used.

    Args:
        report: counts the others, each of which the log names.

    Raises:
        DataError: none of the utterances can be used.
    """

    def heard(utterance) -> EncodedUtterance:
        assistant.llm.encode_words(utterance.text, "the transcript")
        features = assistant.features(utterance.load(assistant.sample_rate))
        return EncodedUtterance(
            utterance.text,
            features,
            assistant.answer_text(utterance.text, instruction).text,
            utterance.split,
        )

    report = report or DataReport()
    usable = [h for _, h in each_usable(_shown(utterances, "hear", quiet), heard, report)]
    if utterances and not usable:
        raise DataError(
            f"none of the {len(utterances)} recordings to measure can be used; {report.explained()}"
        )
    return usable


def score(
    assistant: Assistant,
    heard: list[EncodedUtterance],
    instruction: str | None = None,
    *,
    quiet: bool = False,
) -> Quality:
    """Answer and repeat every utterance with the projector the assistant has.

    Args:
        instruction: for the ROUGE answers; None: the bundle's own. The repeats always use the bundle's.
    """
    rows = [_row(assistant, h, instruction) for h in _shown(heard, "evaluate", quiet)]
    spoken, typed = [r["spoken"] for r in rows], [r["typed"] for r in rows]
    wer, cer = error_rates([r["text"] for r in rows], [r["repeated"] for r in rows])
    return Quality(
        rouge1=rouge(typed, spoken, "rouge1"),
        rougeL=rouge(typed, spoken),
        rougeL_chance=rouge(typed[1:] + typed[:1], spoken),
        wer=wer,
        cer=cer,
        n=len(rows),
        normaliser=normaliser_name(),
        rows=tuple(rows),
    )


def rouge(wanted: list[str], said: list[str], kind: str = "rougeL") -> float:
    """Mean F-measure of texts against those they should be, pair by pair."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer([kind])
    return _mean(scorer.score(w, s)[kind].fmeasure for w, s in zip(wanted, said, strict=True))


def _shown(items: list, what: str, quiet: bool):
    from tqdm import tqdm

    return tqdm(items, desc=what, unit="utt", disable=quiet, mininterval=0.5)


def _row(assistant: Assistant, heard: EncodedUtterance, instruction: str | None) -> dict:
    soft_tokens = assistant.soft_tokens(heard.features)
    repeat = assistant.bundle.manifest.prompt.repeat_instruction
    return {
        "text": heard.text,
        "typed": heard.typed,
        "spoken": assistant.answer_soft_tokens(soft_tokens, instruction).text,
        "repeated": assistant.answer_soft_tokens(soft_tokens, repeat).text,
    }


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)
