"""The precision ladder: of what a graph may compute in, the fastest that keeps to its stated error on real audio.

Precision lives in the graph. From the bundle's own graph a rung makes another one on the machine that builds, so that
an encoder's INT8 is calibrated on the recordings of the person who will be heard. A rung's error is the least cosine,
over recordings that it was not calibrated on, between what it gives and what the bundle's own graph gives: an encoder's
features, an LLM's logits at every token of its answer. ONNX Runtime computes both on the CPU, the rung's through its
twin (fp16.py). The bundle's own graph is the last rung. Nothing is timed: that fewer bits are faster is taken for
granted. Answers (ROUGE-L) are compared by `benchmarks.precision`.

A projector keeps its precision: the bundle's engine is refitted with a person's FP32 weights, and it is small. An LLM
keeps its weights (export's INT4); what changes is what it computes in. Features of a rung within its bound are accepted
for projectors trained on the bundle's own: their key is that of the bundle's encoder, whatever its engine computes in.
"""

import concurrent.futures
import hashlib
import multiprocessing
from dataclasses import dataclass
from pathlib import Path

from tiny_align.engines.build_one import die_with_parent
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.errors import BackendError
from tiny_align.runtime.files import sha256

AUTO, OWN = "auto", "fp32"
RUNGS = {  # graph -> what it may compute in, what a GPU multiplies fastest first -> least cosine to the bundle's graph
    "encoder": {"int8": 0.99, "fp16": 0.999},
    "llm": {"fp16": 0.999},
}
PRECISIONS = (AUTO, OWN, *RUNGS["encoder"])
FORMATS = (".wav", ".flac", ".ogg", ".mp3")
MAX_RECORDINGS = 32  # half of them calibrate, half measure


@dataclass(frozen=True)
class Ladder:
    """What was asked for."""

    recordings: tuple[Path, ...] = ()
    precision: str = OWN

    @classmethod
    def of(cls, data: Path | None, precision: str | None = None) -> "Ladder":
        """Of a folder of recordings; `precision` None: "auto" where there are any.

        Raises:
            BackendError: no such precision, no recordings for it, or recordings without a use.
        """
        precision = precision or (AUTO if data else OWN)
        if precision not in PRECISIONS:
            raise BackendError(f"--precision is {precision}: choose one of {', '.join(PRECISIONS)}")
        if precision == OWN:
            return cls()
        if data is None:
            raise BackendError(
                f"--precision {precision} is measured on recordings: give a folder of them with --data"
            )
        found = sorted(p for p in Path(data).glob("*") if p.suffix.lower() in FORMATS)
        if len(found) < 2:
            raise BackendError(
                f"{data} holds {len(found)} recordings ({', '.join(FORMATS)}), at least 2 are needed, one to calibrate "
                "and one to measure: give a folder with more"
            )
        return cls(tuple(found[:: -(-len(found) // MAX_RECORDINGS)]), precision)

    def wanted(self, graph: str, own: str) -> dict:
        """What engine.json says of an engine that answers the question: it is not asked twice."""
        if not self.rungs(graph, own):
            return {"precision": own}
        digests = "".join(sha256(path) for path in self.recordings)
        recordings = hashlib.sha256(digests.encode()).hexdigest()
        return {"asked": {"precision": self.precision, "recordings": recordings}}

    def rungs(self, graph: str, own: str) -> dict[str, float]:
        """The rungs to try and their bounds, for a graph whose weights are `own`."""
        return {
            precision: bound
            for precision, bound in RUNGS.get(graph, {}).items()
            if self.precision in (AUTO, precision)
            and self.recordings
            and (precision != "int8" or own == "fp32")
        }


@dataclass(frozen=True)
class Choice:
    """The graph to build."""

    graph: Path
    precision: str  # of weights, and what it computes in where that is another one
    accuracy: dict | None  # rung tried -> its least cosine and its bound; None: nothing was tried

    @property
    def entry(self) -> dict:
        """What engine.json says of it."""
        return {
            "precision": self.precision,
            "accuracy": self.accuracy,
            "built_sha256": sha256(self.graph),
        }


def choose(bundle: Bundle, name: str, ladder: Ladder, folder: Path) -> Choice:
    """The fastest rung within its bound, its graph in `folder`; found in a process of its own, which frees its memory.

    Raises:
        BackendError: the one precision that was asked for is beyond its bound, or lack of memory.
    """
    own = bundle.manifest.graphs[name].precision
    if not ladder.rungs(name, own):
        return Choice(bundle.graph(name), own, None)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, die_with_parent) as process:
        try:
            return process.submit(_climb, bundle, name, ladder, folder).result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise BackendError(
                f"measuring the graph {name!r} was killed, most likely because memory ran out: close other programs, "
                f"or build it as it is with --precision {OWN}"
            ) from error


def _climb(*given) -> Choice:
    from tiny_align.engines.select_precision import (
        climb,  # onnx and ONNX Runtime: only where there is something to measure
    )

    return climb(*given)
