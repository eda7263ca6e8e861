"""How well each objective and projector aligns speech with the LLM, at the same wall-clock budget.

    python -m benchmarks.studies.alignment [--digits FOLDER] [--parts table] [--objectives ctc paper] [--processes 2] [--json]

Two parts. `table`: {projector} x {objective}, each trained from nothing on voices the encoder knows, then for each
new voice on 100 of its utterances, both learning rates tuned per cell; beside the typed ceiling, the transcript
cascade and the chance level. `curves`: the shipped bundle personalised, from few utterances to many, in noise, and what
is forgotten. Medians over the seeds. What is done already is kept (WORK/PART.json), so that a long run can be
interrupted, and a report shows all of it. Needs espeak-ng and flite. Writes benchmarks/results/alignment-PART.json and
its plots; the last line of stdout holds both documents.
"""

import argparse
import json
import multiprocessing
import random
import resource
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tiny_align.align.commands.demo import shipped
from tiny_align.align.data.datasets import load_dataset, split_of
from tiny_align.align.data.examples import embedding_table, make_examples
from tiny_align.align.data.feature_cache import cached_features, non_speech_files
from tiny_align.align.data.non_speech import hiss
from tiny_align.align.data.rehearsal import rehearsal_examples
from tiny_align.align.evaluation.quality import (
    EncodedUtterance,
    Quality,
    encode_utterances,
    rouge,
    score,
)
from tiny_align.align.model.objectives import FRAMED, POOLED
from tiny_align.align.model.projector import PROJECTORS, build_projector
from tiny_align.align.model.users import load_projector
from tiny_align.align.model.windows import project
from tiny_align.align.pictures import new_figure
from tiny_align.align.training.align_user import AUGMENTATIONS
from tiny_align.align.training.trainer import Trainer, TrainOptions
from tiny_align.align.training.validation import Score
from tiny_align.export.pretrained import load_pretrained
from tiny_align.reference import corpus, recordings, speech
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.files import write_json
from tiny_align.runtime.machine import describe
from tiny_align.runtime.readout import collapse, ctc_scale, merge_similar

RESULTS = Path(__file__).parents[1] / "results"
PARTS = ("table", "curves")
WEIGHTS = Path(__file__).parents[2] / "reference" / "weights"
VOICES = speech.NEW_VOICES
SOFT_TOKENS, MERGE_COSINE = 24, 0.85  # where a projector pools
RATES, PERSONAL_RATES = (5e-4, 1.5e-3, 4e-3, 1e-2), (1e-3, 3e-3, 1e-2)
FEW = (10, 25, 50, 100, 200)  # utterances
SNR_DB = (None, 20, 10, 5, 0)
N_TEST, N_WORDLESS = 40, 60
FIGURES = ("rouge1", "rougeL", "wer")
INSTRUCTED = (
    ("answer", "untold"),
    ("repeat", "told"),
    ("repeat", "untold"),
)  # columns; answers told to are ROUGE-L's


@dataclass(frozen=True)
class Setting:
    """What a run is; a result is kept for the same setting only."""

    bundle: str
    work: str
    budget_s: float  # of training from nothing, on one core
    personal_s: float  # of training for a voice
    known: int  # utterances by voices the encoder knows
    seeds: int
    few: list[int]  # utterances to personalise on


@dataclass
class Speaking:
    """An assistant whose projector is still in PyTorch; `align.evaluate.score` takes it."""

    assistant: Assistant
    projector: object

    def __post_init__(self):
        self.bundle, self.answer_soft_tokens = (
            self.assistant.bundle,
            self.assistant.answer_soft_tokens,
        )
        self.table = self.assistant.llm.speech_table

    def soft_tokens(self, features: np.ndarray) -> np.ndarray:
        import torch

        with torch.no_grad():
            out = project(self.projector, [torch.from_numpy(features)], self.assistant.windows)[0][
                0
            ].numpy()
        if self.projector.config.soft_tokens:
            return merge_similar(out, MERGE_COSINE)
        return collapse(out, self.table, ctc_scale(self.table))


def figures(assistant: Assistant, projector, test: list[EncodedUtterance]) -> dict:
    """FIGURES and the chance level of a projector in PyTorch."""
    return _shown_of(score(Speaking(assistant, projector.eval()), test, quiet=True))


def _shown_of(quality: Quality) -> dict:
    return {name: getattr(quality, name) for name in (*FIGURES, "rougeL_chance")}


def instructed(told: Quality, untold: Quality) -> dict:
    """ROUGE-L of each thing that the LLM can be asked for, told so and with no instruction at all.

    An answer is measured against the answer to typed text, a repetition against the text.
    """
    texts = [row["text"] for row in told.rows]
    repeated, anything = (
        [row["repeated"] for row in told.rows],
        [row["spoken"] for row in untold.rows],
    )
    return {
        "answer": {"told": told.rougeL, "untold": untold.rougeL},
        "repeat": {"told": rouge(texts, repeated), "untold": rouge(texts, anything)},
    }


# --- data ---


def write_known(out: Path, n: int) -> None:
    """`n` training sentences and N_TEST held-out ones by random espeak-ng voices, as a data set."""
    espeak, rng = speech.Espeak(seed=0), random.Random(31)
    recordings.write_recordings(out, n, N_TEST, 31, lambda text: espeak.say_randomly(text, rng))


def prepare(setting: Setting, objectives: list[str]) -> None:
    """Every recording and, for the table's objectives, its features, in the work folder."""
    work = Path(setting.work)
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "known").exists():
        write_known(work / "known", setting.known)
    for voice in VOICES:
        if not (work / voice).exists():
            recordings.write_voice(voice, work / voice, max(FEW), N_TEST)
    for objective in {
        name in POOLED: name for name in objectives
    }.values():  # one of each form: many processes read it
        with Assistant.load(bundle_for(setting, objective)) as assistant:
            for name in ("known", *VOICES):
                examples_of(assistant, work / name)
            if objective not in POOLED:
                rehearsal_examples(assistant, "ctc", work / "features")


def bundle_for(setting: Setting, objective: str) -> Bundle:
    """The bundle, without windows where the objective's projectors look at an utterance as a whole."""
    bundle = Bundle.open(setting.bundle)
    if objective in POOLED:
        return Bundle(bundle.path, replace(bundle.manifest, windows=None))
    return bundle


def examples_of(assistant: Assistant, folder: Path, n: int | None = None) -> list:
    """The first `n` of a data set's train split, with augmentations and, for end-to-end, both answers."""
    utterances = split_of(load_dataset(folder), "train")[:n]
    takes = [
        cached_features(assistant, utterances, folder / "features", augmentation=k)
        for k in range(AUGMENTATIONS + 1)
    ]
    replies, llm = answers(), assistant.llm
    end = assistant.bundle.manifest.llm.end_tokens[0]
    texts = [u.text for u in utterances]
    return [
        replace(
            example, answers=tuple((*llm.encode(answer), end) for answer in (replies[text], text))
        )
        for text, example in zip(texts, make_examples(llm, texts, takes))
    ]


def answers() -> dict[str, str]:
    """Every sentence that is trained on, and the answer to it."""
    drawn = corpus.sentences(10_000, 31) + corpus.sentences(max(FEW), 11)
    return {s.text: s.answer for s in drawn}


def test_of(assistant: Assistant, folder: Path) -> list[EncodedUtterance]:
    return encode_utterances(assistant, split_of(load_dataset(folder), "test"), quiet=True)


# --- the table ---


def frozen_llm(assistant: Assistant, weights: Path = WEIGHTS / "llm"):
    """The reference LLM in PyTorch, with the prompts of the two instructions, for end-to-end training."""
    import torch
    from transformers import AutoModelForCausalLM

    from tiny_align.align.model.objectives.end_to_end import FrozenLlm

    llm, prompt = assistant.llm, assistant.bundle.manifest.prompt
    asked = (prompt.instruction, prompt.repeat_instruction)
    around = [llm.around(wanted) for wanted in asked]
    model = load_pretrained(AutoModelForCausalLM, weights).eval()
    return FrozenLlm(
        model, [torch.from_numpy(before) for before, _ in around], torch.from_numpy(around[0][1])
    )


def _uncut(rehearsal: list, bundle: str) -> list:
    """Those of the bundle's replayed utterances that are no longer than a window: the same to every objective."""
    windows = Bundle.open(bundle).manifest.windows
    return [e for e in rehearsal if windows is None or len(e.features) <= windows.n_features]


@dataclass
class Cell:
    """One projector trained for one objective."""

    setting: Setting
    kind: str
    objective: str

    def run(self) -> dict:
        import torch

        torch.set_num_threads(1)
        with Assistant.load(bundle_for(self.setting, self.objective), threads=1) as self.assistant:
            return self._measure()

    def _measure(self) -> dict:
        work = Path(self.setting.work)
        self.llm = frozen_llm(self.assistant) if self.objective == "end-to-end" else None
        rehearsal = (
            []
            if self.llm
            else rehearsal_examples(self.assistant, self.objective, work / "features")
        )
        self.rehearsal = _uncut(rehearsal, self.setting.bundle)
        known, self.known_test = (
            examples_of(self.assistant, work / "known"),
            test_of(self.assistant, work / "known"),
        )
        voices = {
            v: (examples_of(self.assistant, work / v, 100), test_of(self.assistant, work / v))
            for v in VOICES
        }
        rate, step_s = self._tune(known)
        row = {"projector": self.kind, "objective": self.objective, "rate": rate, "step_s": step_s}
        row["budget_curve"] = self._budget_curve(known, rate, step_s)
        row["seeds"] = [
            self._one_seed(known, voices, row, seed) for seed in range(self.setting.seeds)
        ]
        row["budget_curve"].append(
            {"seconds": self.setting.budget_s, "rougeL": row["seeds"][0]["known"]["rougeL"]}
        )
        best = max(point["rougeL"] for point in row["budget_curve"])
        row["seconds_to_95"] = min(
            p["seconds"] for p in row["budget_curve"] if p["rougeL"] >= 0.95 * best
        )
        row["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        return row

    def _train(
        self, projector, examples: list, rate: float, steps: int, seed: int, personal: bool = False
    ):
        from tiny_align.align.model.objectives import make

        options = TrainOptions(
            objective=self.objective, flat_start=steps // 8, steps=steps, rate=rate, shortcut_rate=rate, seed=seed,
            check_every=10**6,
        )  # fmt: skip
        if not personal:
            options = replace(
                options, trainable=(), shortcut_threshold=None, weight_decay=1e-2, n_rehearsal=3
            )
        table = embedding_table(self.assistant)
        target = make(options, table, ctc_scale(table.numpy()), self.llm)
        trained = Trainer(
            projector, examples, target, options, None, self.rehearsal, self.assistant.windows
        ).run(quiet=True)
        projector.load_state_dict(trained.weights)
        return trained.record

    def _new(self, seed: int):
        import torch

        torch.manual_seed(seed)
        manifest = self.assistant.bundle.manifest
        soft_tokens = None if self.objective in FRAMED else SOFT_TOKENS
        return build_projector(
            {**manifest.projector, "kind": self.kind, "soft_tokens": soft_tokens}
        )

    def _tune(self, known: list) -> tuple[float, float]:
        """The rate that is best on held-out utterances after half the budget, and seconds per step."""
        record = self._train(self._new(99), known, RATES[0], 10, seed=99)
        step_s = record["train_seconds"] / 10
        held_out = {}
        for rate in RATES:
            record = self._train(
                self._new(99), known, rate, self._steps(self.setting.budget_s / 2, step_s), seed=99
            )
            held_out[rate], step_s = _judged(record), record["train_seconds"] / record["steps"]
        return min(held_out, key=held_out.get), step_s

    def _steps(self, seconds: float, step_s: float) -> int:
        return max(10, round(seconds / step_s))

    def _budget_curve(self, known: list, rate: float, step_s: float) -> list[dict]:
        """Known voices' ROUGE-L after shorter trainings, each with a schedule of its own."""
        curve = []
        for share in (1 / 8, 1 / 4, 1 / 2):
            projector = self._new(0)
            self._train(
                projector, known, rate, self._steps(share * self.setting.budget_s, step_s), seed=0
            )
            quality = score(Speaking(self.assistant, projector), self.known_test, quiet=True)
            curve.append({"seconds": share * self.setting.budget_s, "rougeL": quality.rougeL})
        return curve

    def _tune_personal(self, projector, start: dict, examples: list) -> tuple[float, int]:
        """The rate that is best for the first voice, from the first seed's general weights, and how many steps."""
        record = self._train(projector, examples, PERSONAL_RATES[0], 10, 99, personal=True)
        steps, held_out = self._steps(self.setting.personal_s, record["train_seconds"] / 10), {}
        for rate in PERSONAL_RATES:
            projector.load_state_dict(start)
            held_out[rate] = _judged(
                self._train(projector, examples, rate, steps, 99, personal=True)
            )
        return min(held_out, key=held_out.get), steps

    def _one_seed(self, known: list, voices: dict, row: dict, seed: int) -> dict:
        projector, step_s = self._new(seed), row["step_s"]
        record = self._train(
            projector, known, row["rate"], self._steps(self.setting.budget_s, step_s), seed
        )
        out = {
            "train_seconds": record["train_seconds"],
            "known": self._quality(projector, self.known_test),
        }
        start = {k: v.clone() for k, v in projector.state_dict().items()}
        if "personal_rate" not in row:
            row["personal_rate"], row["personal_steps"] = self._tune_personal(
                projector, start, voices[VOICES[0]][0]
            )
        for voice, (examples, test) in voices.items():
            projector.load_state_dict(start)
            out[voice] = {"before": self._quality(projector, test)}
            record = self._train(
                projector,
                examples,
                row["personal_rate"],
                row["personal_steps"],
                seed,
                personal=True,
            )
            speaking = Speaking(self.assistant, projector.eval())
            told, untold = (
                score(speaking, test, instruction, quiet=True) for instruction in (None, "")
            )
            out[voice] |= {"train_seconds": record["train_seconds"], "after": _shown_of(told)}
            out[voice]["instruction"] = instructed(told, untold)
        return out

    def _quality(self, projector, test: list[EncodedUtterance]) -> dict:
        return figures(self.assistant, projector, test)


def _judged(record: dict) -> Score:
    """How good the end of a training is, as the trainer itself judges it: smaller is better."""
    return Score.from_curve(record["curve"][-1])


# --- the shipped bundle ---


@dataclass
class Shipped:
    """The shipped general projector, personalised for one voice or person: from few utterances to many, in noise."""

    setting: Setting
    name: str
    data: str  # a data set's folder

    def run(self) -> dict:
        import torch

        torch.set_num_threads(1)
        folder, known = Path(self.data), Path(self.setting.work) / "known"
        self.cache = Path(self.setting.work) / self.name / "features"
        with Assistant.load(self.setting.bundle, threads=1) as self.assistant:
            self.rehearsal = rehearsal_examples(self.assistant, "ctc", self.cache)
            self.n_train = len(split_of(load_dataset(folder), "train"))
            self.examples, self.known_test = self._examples(folder), test_of(self.assistant, known)
            self.tests = {db: noisy(self.assistant, folder, db) for db in SNR_DB}
            self.wordless = [
                np.load(path, allow_pickle=False)
                for path in non_speech_files(self.assistant, N_WORDLESS, 2, self.cache)
            ]
            return self._measure()

    def _examples(self, folder: Path) -> list:
        utterances = split_of(load_dataset(folder), "train")
        takes = [
            cached_features(self.assistant, utterances, self.cache, augmentation=k)
            for k in range(AUGMENTATIONS + 1)
        ]
        return make_examples(self.assistant.llm, [u.text for u in utterances], takes)

    def _measure(self) -> dict:
        general = load_projector(self.assistant.bundle, self.assistant.bundle.graph("projector"))
        out = {
            "general": self._quality(general, self.tests[None]),
            "general_known": self._quality(general, self.known_test),
            "general_noise": {
                str(db): self._quality(general, test) for db, test in self.tests.items()
            },
            "general_invented": self._invented(general),
            "few": {},
            "noise": {},
        }
        for n in sorted({min(n, self.n_train) for n in self.setting.few}):
            runs = [self._personalised(n, seed) for seed in range(self.setting.seeds)]
            out["few"][str(n)] = [
                {**self._quality(p, self.tests[None]), "train_seconds": seconds}
                for p, seconds in runs
            ]
            if n == min(100, self.n_train):
                out["invented"] = [self._invented(projector) for projector, _ in runs]
                out["known"] = [self._quality(projector, self.known_test) for projector, _ in runs]
                for db, test in self.tests.items():
                    out["noise"][str(db)] = [
                        self._quality(projector, test) for projector, _ in runs
                    ]
        return out

    def _personalised(self, n: int, seed: int):
        from tiny_align.align.model.objectives import make

        options = TrainOptions(seed=seed)
        projector = load_projector(self.assistant.bundle, self.assistant.bundle.graph("projector"))
        target = make(
            options, embedding_table(self.assistant), self.assistant.bundle.manifest.readout.scale
        )
        trained = Trainer(
            projector,
            self.examples[:n],
            target,
            options,
            None,
            self.rehearsal,
            self.assistant.windows,
        ).run(quiet=True)
        projector.load_state_dict(trained.weights)
        return projector, trained.record["train_seconds"]

    def _invented(self, projector) -> int:
        """In how many of N_WORDLESS sounds a word is heard."""
        speaking = Speaking(self.assistant, projector.eval())
        return sum(len(speaking.soft_tokens(features)) > 0 for features in self.wordless)

    def _quality(self, projector, test: list[EncodedUtterance]) -> dict:
        return figures(self.assistant, projector, test)


def noisy(assistant: Assistant, folder: Path, snr_db: float | None) -> list[EncodedUtterance]:
    """The test split with coloured noise under it."""
    rng, rate = np.random.default_rng(5), assistant.sample_rate
    heard = []
    for utterance in split_of(load_dataset(folder), "test"):
        audio = utterance.load(rate)
        if snr_db is not None:
            sound = hiss(rng, len(audio), rate)
            sound *= np.sqrt(np.mean(audio**2) / np.mean(sound**2)) * 10 ** (-snr_db / 20)
            audio = (audio + sound).astype(np.float32)
            audio /= max(1.0, np.abs(audio).max())
        heard.append(
            EncodedUtterance(
                utterance.text,
                assistant.features(audio),
                assistant.answer_text(utterance.text).text,
            )
        )
    return heard


def cascade(assistant: Assistant, folder: Path) -> dict:
    """The encoder's own letters, read by the LLM as text: what there is without a projector."""
    import torch
    from transformers import ParakeetForCTC

    from tiny_align.reference.encoder import FRONT_END, decode_letters

    model = load_pretrained(ParakeetForCTC, WEIGHTS / "encoder").eval()
    typed, spoken = [], []
    for utterance in split_of(load_dataset(folder), "test"):
        with torch.no_grad():
            letters = (
                model(torch.from_numpy(FRONT_END(utterance.load(speech.SAMPLE_RATE)))[None])
                .logits[0]
                .argmax(-1)
            )
        spoken.append(assistant.answer_text(decode_letters(letters.numpy()) or " ").text)
        typed.append(assistant.answer_text(utterance.text).text)
    return {"rougeL": rouge(typed, spoken), "n": len(spoken)}


# --- the run ---


def jobs_of(args, part: str, setting: Setting) -> dict[str, Cell | Shipped]:
    if part == "table":
        cells = [
            Cell(setting, kind, objective)
            for objective in args.objectives
            for kind in args.projectors
        ]
        return {
            f"{cell.objective}/{cell.kind}": cell
            for cell in sorted(cells, key=lambda c: c.kind != "bridgeformer")
        }
    data = {voice: args.work / voice for voice in VOICES} | people(args.digits)
    return {name: Shipped(setting, name, str(folder)) for name, folder in data.items()}


def people(digits: Path | None) -> dict[str, Path]:
    """A folder of speakers -> name and data set of each."""
    return (
        {p.parent.name: p.parent for p in sorted(digits.glob("*/metadata.jsonl"))} if digits else {}
    )


def run_all(jobs: dict, kept: Path, setting: Setting, processes: int) -> dict:
    """Every job in a process of its own; what `kept` has of this setting is not done again, and returned too."""
    state = json.loads(kept.read_text()) if kept.exists() else {}
    key = _shown(setting) | {"bundle": Bundle.open(setting.bundle).manifest.files}
    results = state["results"] if state.get("setting") == key else {}
    missing = {name: job for name, job in jobs.items() if name not in results}
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc="alignment")
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        for name, result in pool.imap_unordered(_run, missing.items()):
            results[name] = result
            write_json(kept, {"setting": key, "results": results})
            bar.update()
    return results


def _shown(setting: Setting) -> dict:
    """All but where things lie."""
    return {k: v for k, v in asdict(setting).items() if k not in ("bundle", "work")}


def _run(job: tuple) -> tuple[str, dict]:
    return job[0], job[1].run()


def measure(args, part: str) -> dict:
    sizes = args.budget, args.personal, args.known, args.seeds, list(args.few)
    setting = Setting(str(args.bundle), str(args.work), *sizes)
    prepare(setting, args.objectives if part == "table" else [])
    report = {"machine": describe(), "date": str(date.today())}
    report["command"] = _command(args, part)
    with Assistant.load(args.bundle) as assistant:
        data = {name: args.work / name for name in ("known", *VOICES)} | people(args.digits)
        report["cascade"] = {name: cascade(assistant, folder) for name, folder in data.items()}
        report["encoder_key"] = assistant.bundle.manifest.encoder_key
    report["setting"] = _shown(setting)
    jobs = jobs_of(args, part, setting)
    report["results"] = run_all(jobs, args.work / f"{part}.json", setting, args.processes)
    if part == "table":
        report["summary"] = summary(report["results"])
    return report


# --- the report ---


def median(values) -> float:
    return statistics.median(list(values))


def over_voices(row: dict, *path: str) -> float:
    """Median over seeds of the mean over the new voices."""
    return median(sum(_at(seed[v], path) for v in VOICES) / len(VOICES) for seed in row["seeds"])


def _at(value: dict, path: tuple):
    for name in path:
        value = value[name]
    return value


def table(report: dict) -> str:
    """The README's table of projectors and objectives."""
    head = [
        "projector",
        "objective",
        "known ROUGE-L",
        "new voice before",
        "after: ROUGE-1",
        "ROUGE-L",
        "WER",
    ]
    head += [
        "not told to answer",
        "told to repeat",
        "not told to",
        "rates",
        "s per step",
        "s to 95 %",
        "peak GB",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    chance = []
    for row in report["results"].values():
        chance.append(over_voices(row, "after", "rougeL_chance"))
        shown = [over_voices(row, "after", name) for name in FIGURES]
        cells = [
            row["projector"],
            row["objective"],
            f"{median(s['known']['rougeL'] for s in row['seeds']):.3f}",
        ]
        cells += [f"{over_voices(row, 'before', 'rougeL'):.3f}", *(f"{f:.3f}" for f in shown)]
        cells += [f"{over_voices(row, 'instruction', *path):.3f}" for path in INSTRUCTED]
        cells.append(f"{row['rate']:g}, {row['personal_rate']:g}")
        cells += [f"{row['step_s']:.3f}", f"{row['seconds_to_95']:.0f}", f"{row['peak_gb']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    heard = sum(report["cascade"][v]["rougeL"] for v in VOICES) / len(VOICES)
    blank = " |" * (len(head) - 6)
    lines.append(f"| typed | | 1.000 | | 1.000 | 1.000 |{blank}")
    lines.append(
        f"| cascade | | {report['cascade']['known']['rougeL']:.3f} | {heard:.3f} | | {heard:.3f} |{blank}"
    )
    if chance:
        lines.append(f"| chance | | | | | {median(chance):.3f} |{blank}")
    return "\n".join(lines)


def curves(report: dict) -> str:
    """The README's table of the shipped bundle: few utterances, noise, what is forgotten."""
    few, snr = [str(n) for n in report["setting"].get("few", FEW)], [str(db) for db in SNR_DB]
    head = [
        "who",
        "cascade",
        "general",
        *(f"{n} utt." for n in few),
        "WER at most utt.",
        "training",
    ]
    head += [f"{db} dB" if db != "None" else "clean" for db in snr] + [
        "known voices: general",
        "personalised",
    ]
    head += [f"of {N_WORDLESS} sounds without a word answered"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, row in report["results"].items():
        most = row["few"][max(row["few"], key=int)]
        heard = report["cascade"].get(name)
        cells = [name, f"{heard['rougeL']:.3f}" if heard else "", f"{row['general']['rougeL']:.3f}"]
        cells += [
            f"{median(r['rougeL'] for r in row['few'][n]):.3f}" if n in row["few"] else ""
            for n in few
        ]
        cells += [
            f"{median(r['wer'] for r in most):.3f}",
            f"{median(r['train_seconds'] for r in most):.0f} s",
        ]
        cells += [f"{median(r['rougeL'] for r in row['noise'][db]):.3f}" for db in snr]
        cells += [
            f"{row['general_known']['rougeL']:.3f}",
            f"{median(r['rougeL'] for r in row['known']):.3f}",
        ]
        cells += [f"{median(row['invented']):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(results: dict) -> dict:
    """BridgeFormer's objectives against each other: medians over seeds, means over the new voices."""
    rows = {row["objective"]: row for row in results.values() if row["projector"] == "bridgeformer"}
    after = {name: over_voices(row, "after", "rougeL") for name, row in rows.items()}
    papers = [after[name] for name in ("paper", "paper-padded") if name in after]
    out = {"rougeL": after}
    if "ctc" in after and papers:
        out["distance_to_typed_over_the_papers"] = (1 - after["ctc"]) / (1 - max(papers))
    if "ctc" in after:
        out["over_no_instruction"] = {
            task: over_voices(rows["ctc"], "instruction", task, "told")
            / over_voices(rows["ctc"], "instruction", task, "untold")
            for task in ("answer", "repeat")
        }
    if {"ctc", "end-to-end"} <= set(rows):
        curves_ = [rows[name]["budget_curve"] for name in ("ctc", "end-to-end")]
        level = 0.95 * min(max(p["rougeL"] for p in curve) for curve in curves_)
        ours, theirs = (seconds_to(curve, level) for curve in curves_)
        out["end_to_end"] = {
            "rougeL": level,
            "ours_s": ours,
            "end_to_end_s": theirs,
            "ratio": theirs / ours,
        }
    return out


def seconds_to(curve: list[dict], level: float) -> float:
    """Seconds of training until ROUGE-L `level`, between a budget curve's points by the straight line."""
    before = {"seconds": 0.0, "rougeL": 0.0}
    for point in curve:
        if point["rougeL"] >= level:
            share = (level - before["rougeL"]) / (point["rougeL"] - before["rougeL"])
            return before["seconds"] + share * (point["seconds"] - before["seconds"])
        before = point
    raise ValueError(f"the curve ends at {before['rougeL']}, below {level}")


def plot_table(report: dict, folder: Path) -> list[str]:
    """A PNG picture: quality over training time, by objective."""
    rows = [r for r in report["results"].values() if r["projector"] == "bridgeformer"]
    lines = {
        r["objective"]: tuple(zip(*((p["seconds"], p["rougeL"]) for p in r["budget_curve"])))
        for r in rows
    }
    return [_draw(folder / "alignment-time.png", "seconds of training, known voices", lines)]


def plot_curves(report: dict, folder: Path) -> list[str]:
    """PNG pictures: few utterances, noise."""
    few, noise = {}, {}
    for name, row in report["results"].items():
        medians = [median(x["rougeL"] for x in v) for v in row["few"].values()]
        few[name] = ([0, *map(int, row["few"])], [row["general"]["rougeL"], *medians])
        medians = [median(x["rougeL"] for x in row["noise"][str(db)]) for db in SNR_DB]
        noise[name] = ([30 if db is None else db for db in SNR_DB], medians)
    return [
        _draw(folder / "alignment-few.png", "utterances trained on", few),
        _draw(folder / "alignment-noise.png", "signal to noise, dB (30: clean)", noise),
    ]


def _draw(path: Path, label: str, lines: dict) -> str:
    figure = new_figure(6, 4)
    axes = figure.add_subplot(xlabel=label, ylabel="ROUGE-L", ylim=(0, 1))
    for name, (x, y) in lines.items():
        axes.plot(x, y, "-o", markersize=3, label=name)
    axes.legend()
    figure.savefig(path, dpi=110)
    return path.name


def _command(args, part: str) -> str:
    """The command that measures `part` so: what is not the default is named, folders are not."""
    words, parser = ["python -m benchmarks.studies.alignment --parts", part], _parser()
    words += ["--digits FOLDER"] if args.digits else []
    for name in ("objectives", "projectors", "seeds", "few", "budget", "personal", "known"):
        value, default = (
            np.atleast_1d(v).tolist() for v in (getattr(args, name), parser.get_default(name))
        )
        words += [f"--{name}", *map(str, value)] if value != default else []
    return " ".join(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=shipped("bundle"))
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("work/alignment"),
        help="recordings, features, what is done",
    )
    parser.add_argument(
        "--digits", type=Path, help="a folder of speakers, each with metadata.jsonl"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--objectives", nargs="+", choices=FRAMED + POOLED, default=FRAMED + POOLED)
    parser.add_argument("--projectors", nargs="+", choices=PROJECTORS, default=tuple(PROJECTORS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--few", type=int, nargs="+", default=FEW, help="utterances to personalise on"
    )
    parser.add_argument(
        "--budget", type=float, default=120.0, help="seconds of training from nothing, one core"
    )
    parser.add_argument(
        "--personal", type=float, default=15.0, help="seconds of training for a voice, one core"
    )
    parser.add_argument(
        "--known", type=int, default=2000, help="utterances by known voices to train on"
    )
    parser.add_argument("--processes", type=int, default=1, help="jobs at once, a core each")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder for the documents and pictures"
    )
    parser.add_argument("--json", action="store_true")
    return parser


def main(argv=None) -> int:
    args = _parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    reports = {}
    for part in args.parts:
        report = reports[part] = measure(args, part)
        text, plot = {"table": (table, plot_table), "curves": (curves, plot_curves)}[part]
        report["plots"] = plot(report, args.out)
        write_json(args.out / f"alignment-{part}.json", report)
        print(text(report), file=sys.stderr if args.json else sys.stdout)
    print(json.dumps(reports))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
