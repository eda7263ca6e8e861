"""Trains a projector on cached features: steps, checks on validation examples, checkpoints.

Nothing here runs an encoder or the LLM.
"""

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from tiny_align.align.data.examples import Example
from tiny_align.align.model.objectives.base import Objective
from tiny_align.align.model.projector import BridgeFormer
from tiny_align.align.model.windows import project
from tiny_align.align.training.checkpoint import Checkpoint, Progress, copy_weights, fingerprint
from tiny_align.align.training.muon import Muon
from tiny_align.align.training.options import TrainOptions
from tiny_align.align.training.schedule import Schedule, steps_for
from tiny_align.align.training.shortcut import SHORTCUT, choose_trainable, needs_shortcut
from tiny_align.align.training.validation import Score, Validator, split_examples
from tiny_align.runtime.errors import DataError
from tiny_align.runtime.windows import WindowSpec

__all__ = ["TrainOptions", "Trained", "Trainer", "summary"]

# eta of the mean of the weights: step t counts as t(t + 1)(t + 2), mostly the last quarter
MEAN_ETA = 3
MAX_GRADIENT_NORM = 1.0

log = logging.getLogger(__name__)


@dataclass
class Trained:
    """The result of a training: weights, and the record of how they came about."""

    weights: dict[str, Tensor]
    record: dict


class Trainer:
    """One projector, one set of examples, one objective; `run` trains to the end.

    The result is the mean of all steps' weights, in which later steps count more (polynomial-decay
    averaging, arXiv 1212.1824), or the weights that the training began with, if they do better on
    the validation examples. A dozen examples can tell that much, but not which step was the best.
    On so few, error rates are often equal before and after: then the loss decides.
    """

    def __init__(
        self,
        projector: BridgeFormer,
        examples: Sequence[Example],
        objective: Objective,
        options: TrainOptions,
        work: Path | None,
        rehearsal: Sequence[Example] = (),
        windows: WindowSpec | None = None,
        general: BridgeFormer | None = None,
        validation: Sequence[Example] = (),
    ):
        """
        Args:
            work: folder for the checkpoint; None: the training cannot be resumed.
            rehearsal: other speakers' utterances and non-speech; `options.n_rehearsal` of them in
                every step.
            windows: the bundle's, by which the features are cut.
            general: decides whether the shortcut is trained; None: the projector itself.
            validation: judges the training; if empty, some of the examples are held out for it.
        """
        self.projector = projector
        self.objective = objective
        self.options = options
        self.windows = windows
        self.rehearsal = list(rehearsal)
        self.n_utterances = len(examples)
        if validation:
            self.training_examples = list(examples)
            self.validation_examples = list(validation)
        else:
            split = split_examples(examples, options.held_out)
            self.training_examples, self.validation_examples = split

        self.start = copy.deepcopy(projector).eval()
        self.mean = copy.deepcopy(projector).eval()
        self.general = self.start if general is None else general.eval()
        self.optimisers = make_optimisers(projector, options)

        steps = options.steps or steps_for(len(examples), options.batch)
        self.schedule = Schedule(steps, options.warmup, options.max_seconds)
        self.validator = Validator(objective, windows, last_step=steps)
        self.validation_takes: list[Example] = []
        for example in self.validation_examples or self.training_examples:
            self.validation_takes += example.expand()

        self.progress = Progress()
        self.fingerprint = fingerprint(
            (self.start, self.general),
            self.validation_examples + self.training_examples + self.rehearsal,
            len(self.validation_examples),
            objective.table,
            options,
        )
        self.checkpoint = Checkpoint(work, self.fingerprint) if work else None

    def run(self, quiet: bool = False, *, untrained: bool = False) -> Trained:
        """Train, or resume, to the end.

        Args:
            untrained: the projector began with random weights: take the trained ones in any case.
        """
        self._resume()
        progress = self.progress
        schedule = self.schedule
        if not progress.curve:
            self._check(loss=None)  # the score to improve on
        choose_trainable(self.projector, self.options.trainable, self.needs_shortcut)
        began = time.perf_counter() - progress.spent_s
        bar = tqdm(
            total=schedule.steps,
            initial=progress.step,
            desc="align",
            disable=quiet,
            mininterval=0.5,
        )
        while not schedule.ended(progress.step, progress.spent_s):
            loss = self.train_step()
            progress.step += 1
            progress.spent_s = time.perf_counter() - began
            bar.update()
            ended = schedule.ended(progress.step, progress.spent_s)
            if ended or progress.step % self.options.check_every == 0:
                score = self._check(loss)
                bar.set_postfix(loss=f"{loss:.3f}", held_out=f"{score.error_rate:.3f}")
        bar.close()
        return self._result(untrained)

    @cached_property
    def needs_shortcut(self) -> bool:
        """Whether the shortcut is trained: see shortcut.py."""
        examples = self.validation_examples + self.training_examples
        threshold = self.options.shortcut_threshold
        return needs_shortcut(self.general, examples, self.validator, threshold)

    def train_step(self) -> float:
        """One step of the optimisers -> the loss before it."""
        options = self.options
        peak = options.shortcut_rate if self.needs_shortcut else options.rate
        rate = self.schedule.rate(peak, self.progress.step, self.progress.spent_s)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate

        self.projector.train()
        rng = np.random.default_rng((options.seed, self.progress.step))
        loss = self._loss(self._draw_batch(rng), rng)
        self.projector.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.projector.parameters(), MAX_GRADIENT_NORM)
        for optimiser in self.optimisers:
            optimiser.step()
        self._decay_and_average(rate)
        return loss.item()

    def validation_score(self) -> Score:
        """How good the mean weights are."""
        return self.validator.score(self.mean, self.validation_takes, self.progress.step)

    def _draw_batch(self, rng: np.random.Generator) -> list[Example]:
        """Random training examples, and random rehearsal examples beside them."""
        n = min(self.options.batch, len(self.training_examples))
        drawn = rng.integers(len(self.training_examples), size=n)
        batch = [self.training_examples[i] for i in drawn]
        if self.rehearsal:
            n = min(self.options.n_rehearsal, len(self.rehearsal))
            drawn = rng.integers(len(self.rehearsal), size=n)
            batch += [self.rehearsal[i] for i in drawn]
        return batch

    def _loss(self, batch: list[Example], rng: np.random.Generator) -> Tensor:
        """The objective on random takes with frame dropout."""
        device = next(self.projector.parameters()).device
        takes = [example.random_take(rng) for example in batch]
        features = []
        for take in takes:
            remaining = rng.random((len(take), 1)) >= self.options.frame_dropout
            features.append((take * torch.from_numpy(remaining)).to(device))
        outputs, lengths = project(self.projector, features, self.windows)
        return self.objective(outputs, lengths, batch, self.progress.step)

    @torch.no_grad()
    def _decay_and_average(self, rate: float) -> None:
        """Pull the weights towards the first ones, and add them to their mean."""
        share = (1 + MEAN_ETA) / (self.progress.step + 1 + MEAN_ETA)
        parameters = zip(
            self.projector.parameters(), self.start.parameters(), self.mean.parameters()
        )
        for now, start, mean in parameters:
            if now.requires_grad:
                now.lerp_(start, rate * self.options.weight_decay)
                mean.lerp_(now, share)

    def _check(self, loss: float | None) -> Score:
        """Measure the mean weights, add a point to the curve and write the checkpoint.

        Args:
            loss: of the last step.
        """
        score = self.validation_score()
        step = self.progress.step
        if not score.is_finite:
            raise DataError(
                f"the training diverged: its loss is {score.loss} after {step} steps. "
                "Check the recordings"
            )
        seconds = round(self.progress.spent_s, 2)
        entry = {"step": step, "seconds": seconds, "loss": loss, **score.curve_entry()}
        self.progress.curve.append(entry)
        if self.checkpoint:
            self.checkpoint.save(self.progress, self.projector, self.mean, self.optimisers)
        return score

    def _resume(self) -> None:
        """Go on from the checkpoint, if there is one of this training."""
        if self.checkpoint is None:
            return
        progress = self.checkpoint.load(self.projector, self.mean, self.optimisers)
        if progress is not None:
            self.progress = progress

    def _result(self, untrained: bool) -> Trained:
        progress = self.progress
        ended_by = "steps"
        if progress.step < self.schedule.steps:
            ended_by = "max_seconds"
            log.warning(
                "--max-seconds ended the training after %d of %d steps",
                progress.step,
                self.schedule.steps,
            )
        before = Score.from_curve(progress.curve[0])
        after = Score.from_curve(progress.curve[-1])
        improved = after < before
        record = {
            "steps": progress.step,
            "train_seconds": progress.spent_s,
            "improved": improved,
            "ended_by": ended_by,
            "utterances": self.n_utterances,
            "options": asdict(self.options),
            "curve": progress.curve,
        }
        return Trained(copy_weights(self.mean if improved or untrained else self.start), record)


def summary(record: dict) -> dict:
    """The part of a training's record that is shown in a command's document."""
    names = ("steps", "ended_by", "train_seconds", "utterances", "improved")
    return {name: record[name] for name in names}


def make_optimisers(projector: BridgeFormer, options: TrainOptions) -> list[torch.optim.Optimizer]:
    """AdamW; if all parameters are trainable, Muon for every matrix but the last.

    A user's training changes only the projector's entrance, where Muon is no better.
    """
    last = projector.leave[-1].weight
    shortcut: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in projector.named_parameters():
        is_inner_matrix = parameter.ndim > 1 and parameter is not last
        if name.startswith(SHORTCUT):
            shortcut.append(parameter)
        elif is_inner_matrix and not options.trainable:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": rest},
        {"params": shortcut, "eps": options.shortcut_epsilon},
    ]
    adam = torch.optim.AdamW(groups, weight_decay=0.0)
    return [adam, Muon(matrices)] if matrices else [adam]
