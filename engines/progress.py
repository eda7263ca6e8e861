"""How far a build is: the builder's nested phases as one number, and the bar that shows it."""

import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

MIN_CHANGE = 0.002  # of the whole; the builder reports thousands of steps
BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"

ReportProgress = Callable[[float, str], None]  # the fraction done, 0 to 1, and the builder's phase


class Phases:
    """The phases now running. All steps of a phase count the same, whatever time they take."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[str | None, int, int]] = {}  # name -> (parent, done, steps)
        self.fraction = 0.0  # of the whole; never falls

    def start(self, name: str, parent: str | None, n_steps: int) -> None:
        self._running[name] = (parent, 0, max(n_steps, 1))

    def step(self, name: str, step: int) -> None:
        """Step number `step` of a phase, from 0, is done."""
        if name in self._running:
            parent, _, n_steps = self._running[name]
            self._running[name] = (parent, step + 1, n_steps)
        self.fraction = max(self.fraction, min(1.0, self._inside(None)))

    def finish(self, name: str) -> None:
        self._running.pop(name, None)

    def _inside(self, parent: str | None) -> float:
        """The largest share that a phase within `parent` has done; 0 if none is running."""
        largest = 0.0
        for name, (its_parent, done, n_steps) in self._running.items():
            if its_parent == parent and name != parent:
                share = (done + self._inside(name)) / n_steps
                largest = max(largest, min(1.0, share))
        return largest


def make_monitor(tensorrt: ModuleType, report: ReportProgress) -> Any:
    """An IProgressMonitor that reports progress; None if this TensorRT has no such interface."""
    if not hasattr(tensorrt, "IProgressMonitor"):
        return None
    base: Any = tensorrt.IProgressMonitor  # of a package without types

    class Monitor(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.phases = Phases()
            self.reported = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases.start(phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            self.phases.finish(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.phases.step(phase_name, step)
            if self.phases.fraction >= self.reported + MIN_CHANGE:
                self.reported = self.phases.fraction
                report(self.reported, phase_name)
            return True  # continue

    return Monitor()


def progress_bar(names: list[str]) -> Iterator[tuple[str, ReportProgress]]:
    """Yield each name with a function that shows its build's progress in one bar on stderr."""
    from tqdm import tqdm

    def show(name: str, number: int, fraction: float, phase: str) -> None:
        bar.set_postfix_str(f"{name}: {phase}", refresh=False)
        bar.update(number + fraction - bar.n)

    with tqdm(
        total=len(names),
        desc="engines",
        file=sys.stderr,
        bar_format=BAR_FORMAT,
        disable=not names,
    ) as bar:
        for number, name in enumerate(names):
            yield name, functools.partial(show, name, number)
            bar.update(number + 1 - bar.n)
