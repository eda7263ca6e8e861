"""How far an export is: its phases, and one bar on stderr for all of them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TextIO

# Each phase's share of the time, roughly, with an LLM of a billion weights in INT4.
PHASES = {
    "load the models": 8,
    "encoder": 8,
    "projector": 3,
    "LLM: trace": 6,
    "LLM: write": 6,
    "LLM: compare": 10,
    "LLM for ONNX Runtime: trace": 6,
    "LLM for ONNX Runtime: compare": 10,
    "LLM: measure sensitivities": 20,
    "LLM: quantise": 20,
    "LLM: measure": 5,
    "tokenizer and embeddings": 2,
    "check and hash": 1,
}
BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"

BeginPhase = Callable[[str], None]  # called with a key of PHASES; earlier phases are then done


def no_bar(phase: str) -> None:
    """Show nothing."""


def prefixed(begin: BeginPhase, prefix: str) -> BeginPhase:
    """`begin` for phases named "prefix: step", called with the step."""
    return lambda step: begin(f"{prefix}: {step}")


@contextlib.contextmanager
def progress_bar(screen: TextIO, *, quiet: bool) -> Iterator[BeginPhase]:
    """Show the phases in one bar; it ends at 100 % unless the block raises.

    Args:
        screen: of the bar, which is shown on a terminal only.
        quiet: show none.
    """
    from tqdm import tqdm

    total = sum(PHASES.values())
    disable = True if quiet else None  # None: unless `screen` is a terminal
    with tqdm(
        total=total, desc="export", file=screen, bar_format=BAR_FORMAT, disable=disable
    ) as bar:

        def begin(phase: str) -> None:
            done = 0
            for name, share in PHASES.items():
                if name == phase:
                    break
                done += share
            bar.set_postfix_str(phase, refresh=False)
            bar.update(max(done - bar.n, 0))
            bar.refresh()

        begin(next(iter(PHASES)))
        yield begin
        bar.set_postfix_str("", refresh=False)
        bar.update(total - bar.n)
