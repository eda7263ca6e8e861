"""Decide between INT8 and FP16: a graph gets the fastest precision within its error bound.

`select_precision` tries the rungs of ladder.py in their order. Of each it makes the graph and
measures its error on recordings (measure.py). The first one within its bound is built. If
there is none, the bundle's own graph is built, or the build fails if one precision was
requested. All of this happens on the machine that builds, because an encoder's INT8 is
calibrated on recordings of its user; the error is measured on the CPU, in ONNX Runtime.
"""

import concurrent.futures
import multiprocessing
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from tiny_align.engines.ladder import AUTO, OWN, Ladder
from tiny_align.engines.process import die_with_parent
from tiny_align.runtime.audio.samples import read_audio
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.errors import BackendError
from tiny_align.runtime.files import sha256


@dataclass(frozen=True)
class Selection:
    """The graph to build."""

    graph: Path
    precision: str  # of its weights; "int4/fp16" if it computes in another one
    accuracy: dict | None  # rung tried -> its "cosine" and its "bound"; None: nothing was tried

    @property
    def entry(self) -> dict:
        """Its fields in engine.json."""
        return {
            "precision": self.precision,
            "accuracy": self.accuracy,
            "built_sha256": sha256(self.graph),
        }


def select_precision(bundle: Bundle, name: str, ladder: Ladder, folder: Path) -> Selection:
    """Select the fastest rung within its bound and write its graph to `folder`.

    Works in a process of its own, so that all memory is free again for the build.

    Raises:
        BackendError: the one precision that was requested is beyond its bound, or memory ran out.
        AudioError: a recording that cannot be used.
    """
    own = bundle.manifest.graphs[name].precision
    if not ladder.rungs(name, own):
        return Selection(bundle.graph(name), own, None)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, die_with_parent) as executor:
        try:
            return executor.submit(try_rungs, bundle, name, ladder, folder).result()
        except BrokenProcessPool as error:
            raise BackendError(
                f"measuring the graph {name!r} was killed, most likely because memory ran out: "
                f"close other programs, or build it as it is with --precision {OWN}"
            ) from error


def try_rungs(bundle: Bundle, name: str, ladder: Ladder, folder: Path) -> Selection:
    """As `select_precision`, in this process."""
    from tiny_align.engines import fp16, measure  # onnx, only where there is something to measure

    own = bundle.manifest.graphs[name].precision
    sample_rate = bundle.manifest.front_end.sample_rate
    audios = [read_audio(path, sample_rate) for path in ladder.recordings]
    graph = measure.SourceGraph(bundle, name, folder)
    meter = measure.METERS[name](graph, audios)
    accuracy = {}
    for precision, bound in ladder.rungs(name, own).items():
        rung = meter.make_rung(precision)
        twin = graph.write(fp16.twin(rung), f"{name}.twin.onnx")
        cosine = meter.min_cosine(twin)
        twin.unlink()
        accuracy[precision] = {"cosine": cosine, "bound": bound}
        if cosine >= bound:
            model = fp16.to_fp16(rung, graph.read_weight)
            path = graph.write(model, f"{name}.{precision}.onnx")
            label = precision if own in (precision, OWN) else f"{own}/{precision}"
            return Selection(path, label, accuracy)
        if ladder.precision != AUTO:
            raise BackendError(
                f"the graph {name!r} in {precision} has a cosine of {cosine:.5f} to the bundle's "
                f"own, expected at least {bound}: choose --precision {AUTO} or {OWN}"
            )
    return Selection(graph.path, own, accuracy)
