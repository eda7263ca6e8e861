"""Write and load trained projectors: a user's, and a bundle's general one.

A trained projector is the bundle's graph with other weights; no exporter is needed.

What happens to a half-written user? There is none. `write_user` builds the folder under a hidden
name beside its target (`users/.NAME-*`). The last file in it is the record, user.json: the hashes
of all files, and the encoder and the LLM that they were trained for. Then the folder takes the
place of `users/NAME`, in one step where the file system can exchange two folders. If the write
fails, the hidden folder is removed and the old user stays. If the process is killed, the hidden
folder stays behind; no user's name begins with a dot, so nothing loads it, and it may be deleted.
Files that are damaged later no longer match the record: loading refuses them
(runtime/bundle/users.py).
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tiny_align.align.data.examples import Example
from tiny_align.align.data.rehearsal import write_rehearsal
from tiny_align.align.lock import training_lock
from tiny_align.align.model.projector import BridgeFormer, build_projector
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.manifest import Manifest, write_manifest
from tiny_align.runtime.bundle.users import check_user, write_user_record
from tiny_align.runtime.files import link_tree, write_errors, written_folder
from tiny_align.runtime.speech_vocabulary import SPEECH_TOKENS


def data_file(bundle: Bundle) -> str:
    """Name of the file that holds the projector graph's weights."""
    return bundle.manifest.graphs["projector"].file + ".data"


def load_projector(bundle: Bundle, graph: Path) -> BridgeFormer:
    """The PyTorch projector whose weights lie beside `graph` (the general one's or a user's)."""
    blob = (graph.parent / data_file(bundle)).read_bytes()
    weights = {}
    for spec in bundle.manifest.projector_weights:
        count = int(np.prod(spec.shape))
        array = np.frombuffer(blob, "<f4", count=count, offset=spec.offset).reshape(spec.shape)
        if spec.transposed:
            array = array.T
        weights[spec.parameter] = torch.from_numpy(array.copy())
    projector = build_projector(bundle.manifest.projector)
    projector.load_state_dict(weights)
    return projector


def write_weights(path: Path, manifest: Manifest, weights: dict[str, Tensor]) -> None:
    """Overwrite the weights in a copy of the projector's data file."""
    with open(path, "r+b") as file:
        for spec in manifest.projector_weights:
            array = weights[spec.parameter].detach().numpy().astype("<f4")
            if spec.transposed:
                array = array.T
            file.seek(spec.offset)
            file.write(np.ascontiguousarray(array).tobytes())


def write_speech_tokens(folder: Path, bundle: Bundle, tokens: np.ndarray) -> None:
    """Write a projector's speech vocabulary (K,) into `folder`, unless it is the bundle's own."""
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
    """Write users/NAME, whole or not at all: graph, weights, speech vocabulary and record.

    Returns:
        The record, checked.

    Raises:
        TinyAlignError: the folder cannot be written; the user is as before.
    """
    graph = bundle.graph("projector")
    with write_errors(folder), written_folder(folder) as temporary:
        for name in (graph.name, data_file(bundle)):
            shutil.copyfile(graph.parent / name, temporary / name)
        write_weights(temporary / data_file(bundle), bundle.manifest, weights)
        write_speech_tokens(temporary, bundle, speech_tokens)
        write_user_record(temporary, bundle.manifest, training)
    return check_user(folder, bundle.manifest)


def write_general(
    bundle: Bundle, weights: dict[str, Tensor], rehearsal: list[Example], speech_tokens: np.ndarray
) -> None:
    """Give a bundle another general projector, speech vocabulary and rehearsal data, all at once.

    Everything else in the bundle stays. This waits for users who are being trained in it: their
    new projectors would be lost.

    Raises:
        TinyAlignError: the bundle's folder cannot be written; the bundle is as it was.
    """
    path = bundle.path.resolve()
    data = data_file(bundle)
    with _lock_users(path), write_errors(path), written_folder(path) as temporary:
        link_tree(path, temporary)
        (temporary / data).unlink()  # a link: writing into it would change the old bundle
        shutil.copyfile(path / data, temporary / data)
        write_weights(temporary / data, bundle.manifest, weights)
        rehearsal_file = temporary / bundle.replay.name
        rehearsal_file.unlink(missing_ok=True)
        write_rehearsal(rehearsal_file, rehearsal)
        write_speech_tokens(temporary, bundle, speech_tokens)
        write_manifest(temporary, dataclasses.replace(bundle.manifest, projector_trained=True))


@contextlib.contextmanager
def _lock_users(bundle: Path) -> Iterator[None]:
    """Hold the training locks of all users in a bundle."""
    with contextlib.ExitStack() as locks:
        for work in sorted(bundle.glob("users/.*.align")):
            name = work.name.removeprefix(".").removesuffix(".align")
            locks.enter_context(training_lock(bundle / "users" / name))
        yield
