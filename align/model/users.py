"""Projectors on disk, a person's and the general one: the bundle's graph with other weights, without an exporter."""

import contextlib
import dataclasses
import shutil
from pathlib import Path

import numpy as np
from torch import Tensor

from tiny_align.align.data.examples import Example
from tiny_align.align.data.rehearsal import write_rehearsal
from tiny_align.align.lock import training_lock
from tiny_align.align.model.projector import build_projector
from tiny_align.runtime.bundle.bundle import SPEECH_TOKENS, Bundle
from tiny_align.runtime.bundle.manifest import Manifest, write_manifest
from tiny_align.runtime.bundle.users import check_user, write_user_record
from tiny_align.runtime.files import link_tree, write_errors, written_folder


def data_file(bundle: Bundle) -> str:
    """Name of the file that holds the projector graph's weights."""
    return bundle.manifest.graphs["projector"].file + ".data"


def load_projector(bundle: Bundle, graph: Path):
    """The PyTorch projector whose weights lie beside `graph` (the general one's or a person's)."""
    import torch

    blob = (graph.parent / data_file(bundle)).read_bytes()
    weights = {}
    for spec in bundle.manifest.projector_weights:
        array = np.frombuffer(
            blob, "<f4", count=int(np.prod(spec.shape)), offset=spec.offset
        ).reshape(spec.shape)
        weights[spec.parameter] = torch.from_numpy((array.T if spec.transposed else array).copy())
    projector = build_projector(bundle.manifest.projector)
    projector.load_state_dict(weights)
    return projector


def write_weights(path: Path, manifest: Manifest, weights: dict[str, Tensor]) -> None:
    """Overwrite the weights in a copy of the projector's data file."""
    with open(path, "r+b") as file:
        for spec in manifest.projector_weights:
            array = weights[spec.parameter].detach().numpy().astype("<f4")
            file.seek(spec.offset)
            file.write(np.ascontiguousarray(array.T if spec.transposed else array).tobytes())


def write_speech_tokens(folder: Path, bundle: Bundle, tokens: np.ndarray) -> None:
    """Write the speech vocabulary (K,) of a projector in `folder` unless it is the bundle's, which is there already."""
    if not np.array_equal(tokens, bundle.speech_tokens()):
        (folder / SPEECH_TOKENS).unlink(missing_ok=True)  # it may be a link
        np.save(folder / SPEECH_TOKENS, tokens)


def write_user(
    bundle: Bundle,
    folder: Path,
    weights: dict[str, Tensor],
    training: dict,
    speech_tokens: np.ndarray,
) -> dict:
    """Write users/NAME: graph, weights, speech vocabulary and record appear together or not at all."""
    graph = bundle.graph("projector")
    with write_errors(folder), written_folder(folder) as temporary:
        for name in (graph.name, data_file(bundle)):
            shutil.copyfile(graph.parent / name, temporary / name)
        write_weights(temporary / data_file(bundle), bundle.manifest, weights)
        write_speech_tokens(temporary, bundle, speech_tokens)
        write_user_record(temporary, bundle.manifest, training)
    return check_user(folder, bundle.manifest)


def write_general(
    bundle: Bundle, weights: dict[str, Tensor], replayed: list[Example], speech_tokens: np.ndarray
) -> None:
    """Give a bundle another general projector, speech vocabulary and replay file, at once; all else stays in it.

    A person who is being trained in it is waited for: what they get meanwhile would be lost.

    Raises:
        TinyAlignError: the bundle's folder cannot be written; the bundle is as it was.
    """
    path, data = bundle.path.resolve(), data_file(bundle)
    with _nobody_trains(path), write_errors(path), written_folder(path) as temporary:
        link_tree(path, temporary)
        (temporary / data).unlink()
        shutil.copyfile(path / data, temporary / data)
        write_weights(temporary / data, bundle.manifest, weights)
        replay = temporary / bundle.replay.name
        replay.unlink(missing_ok=True)
        write_rehearsal(replay, replayed)
        write_speech_tokens(temporary, bundle, speech_tokens)
        write_manifest(temporary, dataclasses.replace(bundle.manifest, projector_trained=True))


@contextlib.contextmanager
def _nobody_trains(bundle: Path):
    """The work folders of all persons in a bundle are ours meanwhile."""
    with contextlib.ExitStack() as locks:
        for work in sorted(bundle.glob("users/.*.align")):
            name = work.name.removeprefix(".").removesuffix(".align")
            locks.enter_context(training_lock(bundle / "users" / name))
        yield
