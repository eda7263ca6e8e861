"""The curves of the alignment study: the shipped bundle, personalised.

From few utterances to many, and in noise.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tiny_align.align.data.datasets import load_dataset, split_of
from tiny_align.align.data.examples import make_examples
from tiny_align.align.data.feature_cache import non_speech_files
from tiny_align.align.data.non_speech import hiss
from tiny_align.align.data.rehearsal import rehearsal_examples
from tiny_align.align.evaluation.quality import EncodedUtterance
from tiny_align.align.model.users import load_projector
from tiny_align.align.training.trainer import Trainer, TrainOptions
from tiny_align.benchmarks.standard.markdown import grid
from tiny_align.benchmarks.studies.alignment_data import (
    FEW,
    Setting,
    TorchAssistant,
    augmented_features,
    encode_test,
    measure_projector,
)
from tiny_align.runtime.assistant import Assistant

if TYPE_CHECKING:
    from tiny_align.align.model.projector import BridgeFormer

SNR_DB = (None, 20, 10, 5, 0)  # None: without noise
N_NON_SPEECH = 60  # sounds
N_DETAILED = 100  # utterances of the trainings that are measured in noise, too
NOISE_SEED = 5


@dataclass(frozen=True)
class CurvesJob:
    """The general projector personalised for a voice or speaker, in a process of its own."""

    setting: Setting
    name: str
    data: str  # a data set's folder

    def run(self) -> dict[str, Any]:
        import torch

        torch.set_num_threads(1)
        with Assistant.load(self.setting.bundle, threads=1) as assistant:
            return _Curves(self, assistant).measure()


class _Curves:
    """A job with its data loaded."""

    def __init__(self, job: CurvesJob, assistant: Assistant):
        self.setting = job.setting
        self.assistant = assistant
        work = Path(self.setting.work)
        folder = Path(job.data)
        cache = work / job.name / "features"
        self.rehearsal = rehearsal_examples(assistant, "ctc", cache)
        training = split_of(load_dataset(folder), "train")
        texts = [utterance.text for utterance in training]
        takes = augmented_features(assistant, training, cache)
        self.examples, self.vocabulary = make_examples(
            assistant.llm, assistant.speech_vocabulary, texts, takes
        )
        self.n_train = len(training)
        self.known_test = encode_test(assistant, work / "known")
        self.tests = {}
        for snr_db in SNR_DB:
            self.tests[snr_db] = encode_noisy(assistant, folder, snr_db)
        self.non_speech = []
        for path in non_speech_files(assistant, N_NON_SPEECH, 2, cache):
            self.non_speech.append(np.load(path, allow_pickle=False))

    def measure(self) -> dict[str, Any]:
        """Figures of the general projector, then of trainings on ever more utterances."""
        general = self.load_general()
        result: dict[str, Any] = {
            "general": self.figures(general, self.tests[None]),
            "general_known": self.figures(general, self.known_test),
            "general_noise": {},
            "general_invented": self.count_invented(general),
            "few": {},
            "noise": {},
        }
        for snr_db, test in self.tests.items():
            result["general_noise"][str(snr_db)] = self.figures(general, test)

        for n in sorted({min(n, self.n_train) for n in self.setting.few}):
            projectors = []
            rows = []
            for seed in range(self.setting.seeds):
                projector, train_seconds = self.personalise(n, seed)
                figures = self.figures(projector, self.tests[None])
                rows.append(figures | {"train_seconds": train_seconds})
                projectors.append(projector)
            result["few"][str(n)] = rows
            if n == min(N_DETAILED, self.n_train):
                result["invented"] = [self.count_invented(p) for p in projectors]
                result["known"] = [self.figures(p, self.known_test) for p in projectors]
                for snr_db, test in self.tests.items():
                    result["noise"][str(snr_db)] = [self.figures(p, test) for p in projectors]
        return result

    def load_general(self) -> "BridgeFormer":
        bundle = self.assistant.bundle
        return load_projector(bundle, bundle.graph("projector"))

    def personalise(self, n: int, seed: int) -> tuple["BridgeFormer", float]:
        """A projector trained on `n` utterances as `tiny-align align` does it, and the seconds."""
        import torch

        from tiny_align.align.model.objectives import make

        assistant = self.assistant
        projector = self.load_general()
        options = TrainOptions(seed=seed)
        scale = assistant.bundle.manifest.readout.scale
        objective = make(options, torch.from_numpy(self.vocabulary.table), scale)
        examples = self.examples[:n]
        windows = assistant.windows
        trainer = Trainer(projector, examples, objective, options, None, self.rehearsal, windows)
        trained = trainer.run(quiet=True)
        projector.load_state_dict(trained.weights)
        return projector, trained.record["train_seconds"]

    def figures(self, projector: "BridgeFormer", test: list[EncodedUtterance]) -> dict[str, float]:
        return measure_projector(self.assistant, projector, test)

    def count_invented(self, projector: "BridgeFormer") -> int:
        """For how many of the non-speech sounds the projector gives a soft token."""
        speaking = TorchAssistant(self.assistant, projector.eval())
        n = 0
        for features in self.non_speech:
            n += len(speaking.soft_tokens(features)) > 0
        return n


def encode_noisy(
    assistant: Assistant, folder: Path, snr_db: float | None
) -> list[EncodedUtterance]:
    """The test split of a data set with coloured noise under it; None: without noise."""
    rng = np.random.default_rng(NOISE_SEED)
    rate = assistant.sample_rate
    encoded = []
    for utterance in split_of(load_dataset(folder), "test"):
        audio = utterance.load(rate)
        if snr_db is not None:
            noise = hiss(rng, len(audio), rate)
            power_ratio = np.mean(audio**2) / np.mean(noise**2)
            noise *= np.sqrt(power_ratio) * 10 ** (-snr_db / 20)
            audio = (audio + noise).astype(np.float32)
            audio /= max(1.0, np.abs(audio).max())
        typed = assistant.answer_text(utterance.text).text
        encoded.append(EncodedUtterance(utterance.text, assistant.features(audio), typed))
    return encoded


# --- the report ---


def curves(report: dict[str, Any]) -> str:
    """The README's table of the shipped bundle: few utterances, noise, what is forgotten."""
    numbers = [str(n) for n in report["setting"].get("few", FEW)]
    levels = [str(snr_db) for snr_db in SNR_DB]
    head = ["speaker", "cascade", "general", *(f"{n} utt." for n in numbers)]
    head += ["WER at most utt.", "training"]
    head += ["clean" if level == "None" else f"{level} dB" for level in levels]
    head += ["known voices: general", "personalised"]
    head.append(f"of {N_NON_SPEECH} non-speech sounds answered")
    rows = []
    for name, row in report["results"].items():
        cascade = report["cascade"].get(name)
        cells = [name, f"{cascade['rougeL']:.3f}" if cascade else ""]
        cells.append(f"{row['general']['rougeL']:.3f}")
        for n in numbers:
            cells.append(_median(row["few"][n], "rougeL") if n in row["few"] else "")
        runs = row["few"][max(row["few"], key=int)]
        train_seconds = statistics.median(run["train_seconds"] for run in runs)
        cells += [_median(runs, "wer"), f"{train_seconds:.0f} s"]
        cells += [_median(row["noise"][level], "rougeL") for level in levels]
        cells.append(f"{row['general_known']['rougeL']:.3f}")
        cells.append(_median(row["known"], "rougeL"))
        cells.append(f"{statistics.median(row['invented']):.0f}")
        rows.append(cells)
    return grid(head, rows)


def _median(runs: list[dict], name: str) -> str:
    return f"{median_of(runs, name):.3f}"


def median_of(runs: list[dict], name: str) -> float:
    """The median of a figure over trainings with different seeds."""
    return statistics.median(run[name] for run in runs)
