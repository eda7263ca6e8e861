"""Trains a projector on cached features: resumable, and judged on utterances held out of the training.

The state of an interrupted training is two files in the work folder, safetensors and JSON; the same call
with the same data goes on from there. Nothing here runs an encoder or the LLM.
"""

import copy
import hashlib
import json
import logging
import time
import zlib
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from tiny_align.align.data.examples import Example
from tiny_align.align.data.feature_cache import Stored
from tiny_align.align.model.windows import project
from tiny_align.align.training.muon import Muon
from tiny_align.runtime.errors import DataError
from tiny_align.runtime.files import written_file
from tiny_align.runtime.windows import WindowSpec

SHORTCUT = "shortcut"  # the projector's part for somebody far
STATE = 5  # the form of an interrupted training on disk: one of another form is not gone on with
LAST_RATE = 0.05  # share of the rate that is left at the end
ETA = 3  # of the mean of the weights: step t counts as t(t + 1)(t + 2), so that it is mostly the last quarter
MIN_JUDGES = 4  # held-out recordings
JUDGED = 64  # held-out recordings that are looked at together
JUDGEMENT = (
    "held_out",
    "held_out_loss",
)  # of the weights, in the curve: where the first is equal, the second decides

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOptions:
    """How to train; the defaults suit one person's hundred utterances on one CPU core."""

    objective: str = "ctc"  # one of align.objectives.FRAMED and POOLED
    flat_start: int = (
        0  # steps with targets cast blindly, before "ctc" and "aligned" find the places themselves
    )
    trainable: tuple[str, ...] = (
        "enter",
    )  # of the projector, that are trained beside the shortcut; (): all
    shortcut_threshold: float | None = (
        0.2  # share of tokens wrong by the general projector above which the shortcut is trained too
    )
    steps: int | None = None  # None: as many as suit the number of utterances (`steps_for`)
    batch: int = 16
    n_rehearsal: int = 12  # utterances of other people and of nobody that are gone over in every step, beside the batch
    rate: float = 1e-3
    shortcut_rate: float = 2e-3  # where the shortcut is trained
    shortcut_epsilon: float = 1e-3  # of Adam, for the shortcut: small gradients hardly change it, many weights though it has
    warmup: int = 20
    weight_decay: float = 1.0  # towards the weights the training began with
    seed: int = 0
    held_out: float = 0.12  # share of the utterances that judges the training
    check_every: int = 50  # steps
    max_seconds: float | None = (
        None  # ends a training early, its rate fallen by then; None: all steps, however long
    )
    frame_dropout: float = 0.2  # share of feature frames hidden in training


@dataclass
class Trained:
    """What a training gives: weights and the record of how they came about."""

    weights: dict[str, Tensor]
    record: dict


class Trainer:
    """One projector, one set of examples, one objective; `run` trains to the end.

    What is kept is the mean of all steps' weights, the later the more (polynomial-decay averaging, arXiv 1212.1824), or
    the weights it began with where those do better on the held-out utterances. A dozen of them can tell that much; they
    cannot tell which step was the best. Of a few, as many words are often heard wrongly before and after: then the loss
    decides, which tells more than none.
    """

    def __init__(
        self,
        projector,
        examples: list[Example],
        objective,
        options: TrainOptions,
        work: Path | None,
        rehearsal: list[Example] = (),
        windows: WindowSpec | None = None,
        general=None,
        validation: list[Example] = (),
    ):
        """Args:
        rehearsal: other people's utterances, and sounds without a word; `options.n_rehearsal` of them in every step.
        windows: the bundle's, how the features are cut.
        general: the projector that tells who is far; None: the one that is to be trained.
        validation: what judges the training; none: some of the examples are held out of it.
        """
        self.windows = windows
        self.projector, self.objective, self.options, self.work = (
            projector,
            objective,
            options,
            work,
        )
        self.held, self.used = (
            (validation, examples) if validation else held_out(examples, options.held_out)
        )
        self.judges = [take for e in self.held or self.used for take in e.takes()]
        self.n_utterances, self.rehearsal = len(examples), list(rehearsal)
        self.steps = options.steps or steps_for(len(examples), options.batch)
        self.start, self.mean = copy.deepcopy(projector).eval(), copy.deepcopy(projector).eval()
        self.general = self.start if general is None else general.eval()
        examples = self.held + self.used + self.rehearsal
        self.fingerprint = _fingerprint(
            (self.start, self.general), examples, objective.table, options
        )
        self.fingerprint += (
            f" {len(self.held)}"  # the same examples, judged by others, are another training
        )
        self.optimisers = _optimisers(projector, options)
        self.step, self.curve, self.spent_s = 0, [], 0.0

    def run(self, quiet: bool = False, *, untrained: bool = False) -> Trained:
        """`untrained`: the weights it began with are worth nothing, so that the trained ones are kept in any case."""
        self._resume()
        if not self.curve:
            self._check(None)  # what is to be improved on
        self._choose_parts()
        began = time.perf_counter() - self.spent_s
        bar = tqdm(
            total=self.steps, initial=self.step, desc="align", disable=quiet, mininterval=0.5
        )
        while not self._finished():
            loss = self._train_step()
            self.step += 1
            self.spent_s = time.perf_counter() - began
            bar.update()
            if self.step % self.options.check_every == 0 or self._finished():
                self._check(loss)
                bar.set_postfix(loss=f"{loss:.3f}", held_out=f"{self.curve[-1]['held_out']:.3f}")
        bar.close()
        if self.step < self.steps:
            log.warning(
                "--max-seconds ended the training after %d of %d steps", self.step, self.steps
            )
        before, after = (
            [entry[name] for name in JUDGEMENT] for entry in (self.curve[0], self.curve[-1])
        )
        improved = after < before
        record = {"steps": self.step, "train_seconds": self.spent_s, "improved": improved}
        record["ended_by"] = "steps" if self.step >= self.steps else "max_seconds"
        record |= {
            "utterances": self.n_utterances,
            "options": asdict(self.options),
            "curve": self.curve,
        }
        return Trained(_weights(self.mean if improved or untrained else self.start), record)

    @cached_property
    def needs_shortcut(self) -> bool:
        """Whether the general projector hears much wrongly; of a mere loss, nobody knows what is much.

        All recordings tell, held out or not, as it was trained on none of them.
        """
        told = self.options.shortcut_threshold is not None and hasattr(self.objective, "held_out")
        return (
            told
            and self._figures(self.general, self.held + self.used)[0]
            > self.options.shortcut_threshold
        )

    def _choose_parts(self) -> None:
        """Where a voice comes in; for somebody far, of whom that is not all, patterns of their sounds too."""
        for name, parameter in self.projector.named_parameters():
            chosen = not self.options.trainable or name.startswith(self.options.trainable)
            parameter.requires_grad_(self.needs_shortcut if name.startswith(SHORTCUT) else chosen)

    def _finished(self) -> bool:
        return self.step >= self.steps or self._time_is_up()

    def _time_is_up(self) -> bool:
        return self.options.max_seconds is not None and self.spent_s > self.options.max_seconds

    def _rate(self) -> float:
        """Warm-up, then a cosine to LAST_RATE: there at the last step or, where time is limited and short, by then."""
        warm = min(1.0, (self.step + 1) / self.options.warmup)
        done = self.step / self.steps
        if self.options.max_seconds is not None:
            done = max(
                done, min(1.0, 2 * self.spent_s / self.options.max_seconds - 1)
            )  # below 0 for the first half
        rate = self.options.shortcut_rate if self.needs_shortcut else self.options.rate
        return rate * warm * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + np.cos(np.pi * done)))

    def _train_step(self) -> float:
        self.projector.train()
        for group in (group for optimiser in self.optimisers for group in optimiser.param_groups):
            group["lr"] = self._rate()
        rng = np.random.default_rng((self.options.seed, self.step))
        loss = self._loss(self._chosen(rng), rng)
        self.projector.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.projector.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        with torch.no_grad():
            triples = zip(
                self.projector.parameters(), self.start.parameters(), self.mean.parameters()
            )
            for now, start, mean in (t for t in triples if t[0].requires_grad):
                now.lerp_(start, self._rate() * self.options.weight_decay)
                mean.lerp_(now, (1 + ETA) / (self.step + 1 + ETA))
        return loss.item()

    def _chosen(self, rng: np.random.Generator) -> list[Example]:
        own = [
            self.used[i]
            for i in rng.integers(len(self.used), size=min(self.options.batch, len(self.used)))
        ]
        beside = min(self.options.n_rehearsal, len(self.rehearsal))
        return own + [
            self.rehearsal[i] for i in rng.integers(len(self.rehearsal) or 1, size=beside)
        ]

    def _loss(self, examples: list[Example], rng: np.random.Generator) -> Tensor:
        return self.objective(*self._outputs(self.projector, examples, rng), examples, self.step)

    def _outputs(
        self, projector, examples: list[Example], rng: np.random.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """What a projector gives, and its lengths; with `rng`, of a take with a share of its frames hidden."""
        takes = [e.take(rng) for e in examples]
        if rng:
            takes = [
                take * torch.from_numpy(rng.random((len(take), 1)) >= self.options.frame_dropout)
                for take in takes
            ]
        device = next(projector.parameters()).device
        return project(projector, [take.to(device) for take in takes], self.windows)

    def _held_out_figures(self) -> tuple[float, float]:
        """How good the mean weights are."""
        return self._figures(self.mean, self.judges)

    @torch.no_grad()
    def _figures(self, projector, examples: list[Example]) -> tuple[float, float]:
        """The objective's own measure of a projector, where it has one, and its loss."""
        measure = getattr(self.objective, "held_out", self.objective)
        parts = [examples[i : i + JUDGED] for i in range(0, len(examples), JUDGED)]
        figures = []
        for part in parts:
            outputs = self._outputs(projector, part, None)
            loss = self.objective(
                *outputs, part, self.steps
            )  # as at the end: of every check the same
            figures.append((float(measure(*outputs, part, self.step)), float(loss)))
        weights = [sum(len(e.tokens) or 1 for e in part) for part in parts]
        return tuple(np.average(figures, axis=0, weights=weights).tolist())

    @torch.no_grad()
    def _check(self, loss: float | None) -> None:
        """A point of the curve, and the state on disk."""
        held = dict(zip(JUDGEMENT, self._held_out_figures()))
        if not all(map(np.isfinite, held.values())):
            shown = held["held_out_loss"]
            raise DataError(
                f"the training diverged: its loss is {shown} after {self.step} steps. Check the recordings"
            )
        self.curve.append(
            {"step": self.step, "seconds": round(self.spent_s, 2), "loss": loss, **held}
        )
        if self.work:
            self._save()

    def _save(self) -> None:
        tensors = {f"now.{k}": v for k, v in _weights(self.projector).items()}
        tensors |= {f"mean.{k}": v for k, v in _weights(self.mean).items()}
        for i, optimiser in enumerate(self.optimisers):
            for j, state in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser.{i}.{j}.{k}": v for k, v in state.items()}
        numbers = {k: getattr(self, k) for k in ("fingerprint", "step", "curve", "spent_s")}
        with written_file(self.work / "state.safetensors") as temporary:
            temporary.write_bytes(save(tensors, {"numbers": json.dumps(numbers)}))

    def _resume(self) -> None:
        path = self.work / "state.safetensors" if self.work else None
        numbers, tensors = _read_state(path) if path and path.exists() else ({}, {})
        if numbers.get("fingerprint") != self.fingerprint:
            return
        self.projector.load_state_dict(_under("now.", tensors))
        self.mean.load_state_dict(_under("mean.", tensors))
        for i, optimiser in enumerate(self.optimisers):
            state = optimiser.state_dict()
            for name, value in _under(f"optimiser.{i}.", tensors).items():
                index, key = name.split(".")
                state["state"].setdefault(int(index), {})[key] = value
            optimiser.load_state_dict(state)
        for name, value in numbers.items():
            setattr(self, name, value)


def _optimisers(projector, options: TrainOptions) -> list[torch.optim.Optimizer]:
    """AdamW; where all parts are trained, Muon for all matrices but the last.

    On the few recordings of one person, who trains the entrance only, Muon is no better.
    """
    rest, shortcut, matrices = [], [], []
    for name, parameter in projector.named_parameters():
        inner = parameter.ndim > 1 and parameter is not projector.leave[-1].weight
        kind = (
            shortcut
            if name.startswith(SHORTCUT)
            else matrices
            if inner and not options.trainable
            else rest
        )
        kind.append(parameter)
    adam = torch.optim.AdamW(
        [{"params": rest}, {"params": shortcut, "eps": options.shortcut_epsilon}], weight_decay=0.0
    )
    return [adam, Muon(matrices)] if matrices else [adam]


def steps_for(n_utterances: int, batch: int) -> int:
    """Forty passes over the utterances, within 50 and 250 steps: more of few is learning them by heart."""
    return min(250, max(50, 40 * n_utterances // batch))


def held_out(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """(held out, used): of few, one in five up to MIN_JUDGES at least, as one or two cannot judge a training.

    Which is which is drawn from the recording alone, so that what was trained on stays so when others are added
    (to twenty or more; of fewer some may become judges).
    """
    least = min(MIN_JUDGES, len(examples) // 5)
    if not least:
        return [], list(examples)
    lots = [zlib.crc32(_identity(e.features)) / 2**32 for e in examples]
    edge = max(share, sorted(lots)[least - 1])
    return [e for e, lot in zip(examples, lots) if lot <= edge], [
        e for e, lot in zip(examples, lots) if lot > edge
    ]


def _identity(features: np.ndarray | Stored) -> bytes:
    """What tells features from others: they themselves, or the name of the file they lie in."""
    return features.path.name.encode() if isinstance(features, Stored) else features.tobytes()


def _weights(projector) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in projector.state_dict().items()}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _read_state(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Numbers and tensors of an interrupted training; a damaged file counts as none, with a warning."""
    try:
        with safe_open(path, "pt") as file:
            numbers = json.loads(file.metadata()["numbers"])
            return numbers, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        log.warning("%s is damaged (%s): the training starts from the beginning", path, error)
        return {}, {}


def _fingerprint(
    projectors: tuple, examples: list[Example], table: Tensor, options: TrainOptions
) -> str:
    """Identifies a training: start and general weights, examples, targets, options. Another must not be resumed."""
    digest = hashlib.sha256(repr((STATE, options)).encode())
    digest.update(table.detach().contiguous().view(torch.uint8).cpu().numpy())
    for value in (value for projector in projectors for value in projector.state_dict().values()):
        digest.update(value.detach().cpu().numpy().tobytes())
    for example in examples:
        for take in (example.features, *example.augmentations):
            digest.update(_identity(take))
        digest.update(repr((example.tokens, example.token_lengths, example.answers)).encode())
    return digest.hexdigest()
