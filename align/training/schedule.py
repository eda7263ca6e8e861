"""How many steps a training takes, its learning rate at each of them, and when it ends."""

from dataclasses import dataclass

import numpy as np

PASSES = 40  # over the utterances
MIN_STEPS = 50
MAX_STEPS = 250
LAST_RATE = 0.05  # share of the learning rate that is left at the end


def steps_for(n_utterances: int, batch: int) -> int:
    """PASSES over the utterances, within MIN_STEPS and MAX_STEPS.

    More steps on few utterances would learn them by heart.
    """
    return min(MAX_STEPS, max(MIN_STEPS, PASSES * n_utterances // batch))


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then a cosine down to LAST_RATE at the last step.

    With `max_seconds` the rate also falls with the time in the second half, so that it reaches
    LAST_RATE in any case.
    """

    steps: int
    warmup: int
    max_seconds: float | None = None  # None: all steps, however long they take

    def rate(self, peak: float, step: int, spent_s: float) -> float:
        """The learning rate after `step` steps and `spent_s` seconds."""
        warm = min(1.0, (step + 1) / self.warmup)
        done = step / self.steps
        if self.max_seconds is not None:
            time_done = 2 * spent_s / self.max_seconds - 1  # below 0 in the first half
            done = max(done, min(1.0, time_done))
        cosine = 0.5 * (1 + np.cos(np.pi * done))
        return peak * warm * (LAST_RATE + (1 - LAST_RATE) * cosine)

    def ended(self, step: int, spent_s: float) -> bool:
        out_of_time = self.max_seconds is not None and spent_s > self.max_seconds
        return step >= self.steps or out_of_time
