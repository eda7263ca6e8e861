"""How far the builder is: its nested phases as one number, told through TensorRT's IProgressMonitor."""

from collections.abc import Callable

MIN_CHANGE = 0.002  # of the whole; the builder reports thousands of steps


class Phases:
    """The phases now running. Steps of a phase count alike, although they take unlike times."""

    def __init__(self):
        self._running: dict[
            str, tuple[str | None, int, int]
        ] = {}  # name -> (parent, steps done, steps)
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
        """The most that a phase within `parent` has done."""
        inside = [
            name for name, phase in self._running.items() if phase[0] == parent and name != parent
        ]
        return max((self._done(name) for name in inside), default=0.0)

    def _done(self, name: str) -> float:
        _, done, n_steps = self._running[name]
        return min(1.0, (done + self._inside(name)) / n_steps)


def make_monitor(tensorrt, tell: Callable[[float, str], None]):
    """An IProgressMonitor that tells the fraction done and the phase; None where this TensorRT has none."""
    if not hasattr(tensorrt, "IProgressMonitor"):
        return None

    class Monitor(tensorrt.IProgressMonitor):
        def __init__(self):
            tensorrt.IProgressMonitor.__init__(self)
            self.phases, self.told = Phases(), 0.0

        def phase_start(self, phase_name, parent_phase, num_steps):
            self.phases.start(phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name):
            self.phases.finish(phase_name)

        def step_complete(self, phase_name, step):
            self.phases.step(phase_name, step)
            if self.phases.fraction >= self.told + MIN_CHANGE:
                self.told = self.phases.fraction
                tell(self.told, phase_name)
            return True  # go on

    return Monitor()
