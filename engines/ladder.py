"""The precision ladder: the precisions that a graph may be built in (its rungs) and their bounds.

A rung's error is a cosine on recordings that did not calibrate it: the lowest, over the
recordings, between the outputs of its graph and those of the bundle's own graph. An encoder's
outputs are its features, an LLM's the logits at every token of its answer. The bundle's own
graph is the last rung. select_precision.py takes the first rung within its bound; nothing is
timed, fewer bits are assumed to be faster.

A projector keeps its precision: it is small, and the bundle's engine is refitted with a
user's FP32 weights. An LLM keeps its weights (export's INT4); the rungs change what it
computes in. An encoder within its bound still fits projectors that were trained on the
bundle's own features: a user's key names the bundle's encoder, whatever its engine computes
in.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tiny_align.runtime.errors import BackendError
from tiny_align.runtime.files import sha256

AUTO = "auto"  # the fastest rung within its bound
OWN = "fp32"  # the bundle's own graph
RUNGS = {  # graph -> precision, the fastest on a GPU first -> min cosine to the bundle's graph
    "encoder": {"int8": 0.99, "fp16": 0.999},
    "llm": {"fp16": 0.999},
}
PRECISIONS = (AUTO, OWN, *RUNGS["encoder"])
FORMATS = (".wav", ".flac", ".ogg", ".mp3")
MAX_RECORDINGS = 32  # half of them calibrate, half measure


@dataclass(frozen=True)
class Ladder:
    """The precision that is requested, and the recordings to calibrate and measure with."""

    recordings: tuple[Path, ...] = ()
    precision: str = OWN

    @classmethod
    def of(cls, data: Path | None, precision: str | None = None) -> "Ladder":
        """From a folder of recordings; `precision` None: "auto" if there is a folder.

        Raises:
            BackendError: an unknown precision, one that needs recordings, or too few of them.
        """
        precision = precision or (AUTO if data else OWN)
        if precision not in PRECISIONS:
            raise BackendError(
                f"expected a --precision of {', '.join(PRECISIONS)}, got {precision}: choose one"
            )
        if precision == OWN:
            return cls()
        if data is None:
            raise BackendError(
                f"--precision {precision} is measured on recordings: "
                "give a folder of them with --data"
            )
        found = sorted(p for p in Path(data).glob("*") if p.suffix.lower() in FORMATS)
        if len(found) < 2:
            raise BackendError(
                f"expected at least 2 recordings ({', '.join(FORMATS)}) in {data}, one to "
                f"calibrate and one to measure, got {len(found)}: give a folder with more"
            )
        step = -(-len(found) // MAX_RECORDINGS)  # rounded up
        return cls(tuple(found[::step]), precision)

    def record_fields(self, graph: str, own: str) -> dict:
        """The fields of engine.json by which an engine built for the same request is found again.

        Args:
            graph: its name in the manifest.
            own: the precision of its weights in the bundle.
        """
        if not self.rungs(graph, own):
            return {"precision": own}
        digests = "".join(sha256(path) for path in self.recordings)
        recordings = hashlib.sha256(digests.encode()).hexdigest()
        return {"asked": {"precision": self.precision, "recordings": recordings}}

    def rungs(self, graph: str, own: str) -> dict[str, float]:
        """The rungs to try and their bounds, for a graph whose weights in the bundle are `own`."""
        if not self.recordings:
            return {}
        rungs = {}
        for precision, bound in RUNGS.get(graph, {}).items():
            requested = self.precision in (AUTO, precision)
            possible = precision != "int8" or own == "fp32"
            if requested and possible:
                rungs[precision] = bound
        return rungs
