"""The table of the alignment study: each projector trained for each objective.

First from nothing, then for new voices.
"""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiny_align.align.data.rehearsal import rehearsal_examples
from tiny_align.align.evaluation.quality import (
    Quality,
    rouge,
    score,
)
from tiny_align.align.model.objectives import FRAMED
from tiny_align.align.model.projector import build_projector
from tiny_align.align.training.trainer import Trainer, TrainOptions
from tiny_align.align.training.validation import Score
from tiny_align.benchmarks.standard.markdown import grid
from tiny_align.benchmarks.standard.pipelines import WEIGHTS
from tiny_align.benchmarks.standard.processes import peak_memory_bytes
from tiny_align.benchmarks.studies.alignment_data import (
    FIGURES,
    VOICES,
    Setting,
    TorchAssistant,
    encode_test,
    figures_of,
    load_examples,
    measure_projector,
    open_bundle,
)
from tiny_align.export.pretrained import load_pretrained
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.readout import ctc_scale

if TYPE_CHECKING:
    from tiny_align.align.data.examples import Example
    from tiny_align.align.model.objectives.end_to_end import FrozenLlm
    from tiny_align.align.model.projector import BridgeFormer

SOFT_TOKENS = 24  # where a projector pools
RATES = (5e-4, 1.5e-3, 4e-3, 1e-2)
PERSONAL_RATES = (1e-3, 3e-3, 1e-2)
N_PERSONAL = 100  # utterances
TUNING_SEED = 99
REPORTED = "bridgeformer"  # the projector of the summary and of the picture


@dataclass(frozen=True)
class TableJob:
    """One projector trained for one objective; it runs in a process of its own."""

    setting: Setting
    kind: str  # of projector
    objective: str

    def run(self) -> dict[str, Any]:
        import torch

        torch.set_num_threads(1)
        bundle = open_bundle(self.setting.bundle, self.objective)
        with Assistant.load(bundle, threads=1) as assistant:
            return _Table(self, assistant).measure()


class _Table:
    """A job with its data loaded."""

    def __init__(self, job: TableJob, assistant: Assistant):
        self.kind = job.kind
        self.objective = job.objective
        self.setting = job.setting
        self.assistant = assistant
        self.llm: FrozenLlm | None = None
        self.rehearsal: list[Example] = []
        work = Path(self.setting.work)
        if self.objective == "end-to-end":
            self.llm = frozen_llm(assistant)
        else:
            rehearsal = rehearsal_examples(assistant, self.objective, work / "features")
            self.rehearsal = self._uncut(rehearsal)
        self.known = load_examples(assistant, work / "known")
        self.known_test = encode_test(assistant, work / "known")
        self.voices = {}
        self.voice_tests = {}
        for voice in VOICES:
            self.voices[voice] = load_examples(assistant, work / voice, N_PERSONAL)
            self.voice_tests[voice] = encode_test(assistant, work / voice)

    def _uncut(self, rehearsal: "list[Example]") -> "list[Example]":
        """Rehearsal data no longer than a window of the bundle: the same for every objective."""
        windows = Bundle.open(self.setting.bundle).manifest.windows
        if windows is None:
            return rehearsal
        return [e for e in rehearsal if len(e.features) <= windows.n_features]

    def measure(self) -> dict[str, Any]:
        """Tune, train from nothing for ever longer, then personalise, each for every seed."""
        budget_s = self.setting.budget_s
        rate, step_s = self.tune()
        budget_curve = []
        for share in (1 / 8, 1 / 4, 1 / 2):
            budget_curve.append(self.budget_point(share * budget_s, rate, step_s))

        seeds = []
        personal_rate = None
        personal_steps = None
        for seed in range(self.setting.seeds):
            projector = self.new_projector(seed)
            steps = steps_in(budget_s, step_s)
            record = self.train(projector, self.known, rate, steps, seed)
            figures = measure_projector(self.assistant, projector, self.known_test)
            row = {"train_seconds": record["train_seconds"], "known": figures}
            general = {name: value.clone() for name, value in projector.state_dict().items()}
            if personal_rate is None:
                personal_rate, personal_steps = self.tune_personal(projector, general)
            for voice in VOICES:
                projector.load_state_dict(general)
                row[voice] = self.personalise(projector, voice, personal_rate, personal_steps, seed)
            seeds.append(row)

        budget_curve.append({"seconds": budget_s, "rougeL": seeds[0]["known"]["rougeL"]})
        level = 0.95 * max(point["rougeL"] for point in budget_curve)
        reached = [point["seconds"] for point in budget_curve if point["rougeL"] >= level]
        return {
            "projector": self.kind,
            "objective": self.objective,
            "rate": rate,
            "step_s": step_s,
            "budget_curve": budget_curve,
            "seeds": seeds,
            "personal_rate": personal_rate,
            "personal_steps": personal_steps,
            "seconds_to_95": min(reached),
            "peak_gb": peak_memory_bytes() / 1e9,
        }

    def tune(self) -> tuple[float, float]:
        """The rate with the lowest validation error after half the budget, and seconds per step."""
        projector = self.new_projector(TUNING_SEED)
        record = self.train(projector, self.known, RATES[0], 10, TUNING_SEED)
        step_s = record["train_seconds"] / 10
        scores = {}
        for rate in RATES:
            projector = self.new_projector(TUNING_SEED)
            steps = steps_in(self.setting.budget_s / 2, step_s)
            record = self.train(projector, self.known, rate, steps, TUNING_SEED)
            scores[rate] = Score.from_curve(record["curve"][-1])
            step_s = record["train_seconds"] / record["steps"]
        return min(scores, key=scores.__getitem__), step_s

    def tune_personal(self, projector: "BridgeFormer", general: dict) -> tuple[float, int]:
        """The rate with the lowest validation error for the first voice, and how many steps."""
        examples = self.voices[VOICES[0]]
        record = self.train(projector, examples, PERSONAL_RATES[0], 10, TUNING_SEED, personal=True)
        steps = steps_in(self.setting.personal_s, record["train_seconds"] / 10)
        scores = {}
        for rate in PERSONAL_RATES:
            projector.load_state_dict(general)
            record = self.train(projector, examples, rate, steps, TUNING_SEED, personal=True)
            scores[rate] = Score.from_curve(record["curve"][-1])
        return min(scores, key=scores.__getitem__), steps

    def budget_point(self, seconds: float, rate: float, step_s: float) -> dict[str, float]:
        """Known voices' ROUGE-L after a training of so many seconds, with a schedule of its own."""
        projector = self.new_projector(0)
        self.train(projector, self.known, rate, steps_in(seconds, step_s), seed=0)
        quality = score(TorchAssistant(self.assistant, projector), self.known_test, quiet=True)
        return {"seconds": seconds, "rougeL": quality.rougeL}

    def personalise(
        self, projector: "BridgeFormer", voice: str, rate: float, steps: int, seed: int
    ) -> dict[str, Any]:
        """Train a general projector for a voice: its figures before and after."""
        test = self.voice_tests[voice]
        before = measure_projector(self.assistant, projector, test)
        record = self.train(projector, self.voices[voice], rate, steps, seed, personal=True)
        trained = TorchAssistant(self.assistant, projector.eval())
        instructed = score(trained, test, None, quiet=True)
        uninstructed = score(trained, test, "", quiet=True)
        return {
            "before": before,
            "train_seconds": record["train_seconds"],
            "after": figures_of(instructed),
            "instruction": instruction_effect(instructed, uninstructed),
        }

    def new_projector(self, seed: int) -> "BridgeFormer":
        import torch

        torch.manual_seed(seed)
        sizes = dict(self.assistant.bundle.manifest.projector)
        sizes["kind"] = self.kind
        sizes["soft_tokens"] = None if self.objective in FRAMED else SOFT_TOKENS
        return build_projector(sizes)

    def train(
        self,
        projector: "BridgeFormer",
        examples: "list[Example]",
        rate: float,
        steps: int,
        seed: int,
        personal: bool = False,
    ) -> dict[str, Any]:
        """Train the projector in place; the training's record.

        Args:
            personal: as `tiny-align align` trains; else all parameters, from nothing.
        """
        import torch

        from tiny_align.align.model.objectives import make

        options = TrainOptions(
            objective=self.objective,
            flat_start=steps // 8,
            steps=steps,
            rate=rate,
            shortcut_rate=rate,
            seed=seed,
            check_every=10**6,
        )
        if not personal:
            options = replace(
                options, trainable=(), shortcut_threshold=None, weight_decay=1e-2, n_rehearsal=3
            )
        table = torch.from_numpy(self.assistant.speech_vocabulary.table)
        objective = make(options, table, ctc_scale(table.numpy()), self.llm)
        windows = self.assistant.windows
        trainer = Trainer(projector, examples, objective, options, None, self.rehearsal, windows)
        trained = trainer.run(quiet=True)
        projector.load_state_dict(trained.weights)
        return trained.record


def frozen_llm(assistant: Assistant, weights: Path = WEIGHTS / "llm") -> "FrozenLlm":
    """The reference LLM in PyTorch, with the prompts of both instructions."""
    import torch
    from transformers import AutoModelForCausalLM

    from tiny_align.align.model.objectives.end_to_end import FrozenLlm

    prompt = assistant.bundle.manifest.prompt
    before_answer, after = assistant.llm.around(prompt.instruction)
    before_repeat, _ = assistant.llm.around(prompt.repeat_instruction)
    model = load_pretrained(AutoModelForCausalLM, weights).eval()
    prompts = [torch.from_numpy(before_answer), torch.from_numpy(before_repeat)]
    return FrozenLlm(model, prompts, torch.from_numpy(after))


def steps_in(seconds: float, step_s: float) -> int:
    return max(10, round(seconds / step_s))


def instruction_effect(instructed: Quality, uninstructed: Quality) -> dict[str, dict[str, float]]:
    """ROUGE-L of each task of the LLM, with its instruction ("told") and without any ("untold").

    An answer is measured against the answer to typed text, a repetition against the text.
    """
    texts = [row["text"] for row in instructed.rows]
    repeated = [row["repeated"] for row in instructed.rows]
    spoken = [row["spoken"] for row in uninstructed.rows]
    return {
        "answer": {"told": instructed.rougeL, "untold": uninstructed.rougeL},
        "repeat": {"told": rouge(texts, repeated), "untold": rouge(texts, spoken)},
    }


# --- the report ---


def table(report: dict[str, Any]) -> str:
    """The README's table of projectors and objectives."""
    head = [
        "projector",
        "objective",
        "known ROUGE-L",
        "new voice before",
        "after: ROUGE-1",
        "ROUGE-L",
        "WER",
        "answer without instruction",
        "repeat with instruction",
        "without",
        "rates",
        "s per step",
        "s to 95 %",
        "peak GB",
    ]
    rows = []
    chances = []
    for row in report["results"].values():
        known = statistics.median(seed["known"]["rougeL"] for seed in row["seeds"])
        rows.append(
            [
                row["projector"],
                row["objective"],
                f"{known:.3f}",
                f"{over_voices(row, 'before', 'rougeL'):.3f}",
                *(f"{over_voices(row, 'after', name):.3f}" for name in FIGURES),
                f"{over_voices(row, 'instruction', 'answer', 'untold'):.3f}",
                f"{over_voices(row, 'instruction', 'repeat', 'told'):.3f}",
                f"{over_voices(row, 'instruction', 'repeat', 'untold'):.3f}",
                f"{row['rate']:g}, {row['personal_rate']:g}",
                f"{row['step_s']:.3f}",
                f"{row['seconds_to_95']:.0f}",
                f"{row['peak_gb']:.1f}",
            ]
        )
        chances.append(over_voices(row, "after", "rougeL_chance"))

    cascade = report["cascade"]
    known_cascade = f"{cascade['known']['rougeL']:.3f}"
    new_cascade = f"{sum(cascade[voice]['rougeL'] for voice in VOICES) / len(VOICES):.3f}"
    blank = [""] * (len(head) - 6)
    rows.append(["typed", "", "1.000", "", "1.000", "1.000", *blank])
    rows.append(["cascade", "", known_cascade, new_cascade, "", new_cascade, *blank])
    if chances:
        rows.append(["chance", "", "", "", "", f"{statistics.median(chances):.3f}", *blank])
    return grid(head, rows)


def over_voices(row: dict[str, Any], *path: str) -> float:
    """The figure at `path` of a voice's results: median over seeds, mean over the new voices."""
    means = []
    for seed in row["seeds"]:
        total = 0.0
        for voice in VOICES:
            value = seed[voice]
            for name in path:
                value = value[name]
            total += value
        means.append(total / len(VOICES))
    return statistics.median(means)


def summary(results: dict[str, dict]) -> dict[str, Any]:
    """BridgeFormer's objectives compared: medians over seeds, means over the new voices."""
    rows = {}
    after = {}
    for row in results.values():
        if row["projector"] == REPORTED:
            rows[row["objective"]] = row
            after[row["objective"]] = over_voices(row, "after", "rougeL")
    found: dict[str, Any] = {"rougeL": after}
    papers = [after[name] for name in ("paper", "paper-padded") if name in after]
    if "ctc" in after and papers:
        found["distance_to_typed_over_the_papers"] = (1 - after["ctc"]) / (1 - max(papers))
    if "ctc" in after:
        effect = {}
        for task in ("answer", "repeat"):
            instructed = over_voices(rows["ctc"], "instruction", task, "told")
            effect[task] = instructed / over_voices(rows["ctc"], "instruction", task, "untold")
        found["over_no_instruction"] = effect
    if "ctc" in after and "end-to-end" in after:
        found["end_to_end"] = compare_curves(
            rows["ctc"]["budget_curve"], rows["end-to-end"]["budget_curve"]
        )
    return found


def compare_curves(ours: list[dict], theirs: list[dict]) -> dict[str, float]:
    """Seconds of training to 95 % of the ROUGE-L that both budget curves reach."""
    our_max = max(point["rougeL"] for point in ours)
    their_max = max(point["rougeL"] for point in theirs)
    level = 0.95 * min(our_max, their_max)
    ours_s = seconds_to(ours, level)
    theirs_s = seconds_to(theirs, level)
    return {"rougeL": level, "ours_s": ours_s, "end_to_end_s": theirs_s, "ratio": theirs_s / ours_s}


def seconds_to(curve: list[dict], level: float) -> float:
    """Seconds of training until ROUGE-L `level`, on lines between a budget curve's points."""
    before = {"seconds": 0.0, "rougeL": 0.0}
    for point in curve:
        if point["rougeL"] >= level:
            share = (level - before["rougeL"]) / (point["rougeL"] - before["rougeL"])
            return before["seconds"] + share * (point["seconds"] - before["seconds"])
        before = point
    raise ValueError(f"the curve ends at {before['rougeL']}, below {level}")
