"""A model's weights in the file of its graph: mapped, they need no memory of their own."""

import mmap
from pathlib import Path

import numpy as np
import onnx
import torch

from tiny_align.export.program_weights import JOINT, TRANSPOSED
from tiny_align.runtime.bundle.onnx_weights import Place, find_place, load_graph


class MappedFile:
    """A data file in memory; what was read of it is given back on request."""

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            # Private, so that torch takes it for writable; nothing is written.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def array(self, place: Place, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """What is stored there."""
        count = place.length // dtype.itemsize
        return np.frombuffer(self._map, dtype, count, place.offset).reshape(shape)

    def release(self, place: Place | None = None) -> None:
        """Let the system have the pages back, all of them without a place.

        They are read again when they are needed.
        """
        if not hasattr(mmap, "MADV_DONTNEED"):  # Linux has it
            return
        place = place or Place("", 0, len(self._map))
        start = place.offset // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, start, place.offset + place.length - start)


def map_parameters(model: torch.nn.Module, path: Path) -> list[MappedFile]:
    """Let a module's parameters be those that its graph at `path` has stored (`name_weights`).

    Each is compared with what it was, bit by bit; so the module computes what it did, and is still
    what the graph is compared with. After each call of a module inside, its weights' memory is
    given back, so that no more than a layer of them is in memory at once.

    Returns:
        The files that are mapped.
    Raises:
        RuntimeError: the file has other values than the parameter.
    """
    parameters = dict(model.named_parameters())
    files: dict[str, MappedFile] = {}
    places: dict[torch.nn.Parameter, tuple[MappedFile, Place]] = {}
    for tensor in load_graph(path).graph.initializer:
        place = find_place(tensor)
        names = [name.removesuffix(TRANSPOSED) for name in tensor.name.split(JOINT)]
        if place is None or not tensor.name.endswith(TRANSPOSED) or names[0] not in parameters:
            continue
        if place.file not in files:
            files[place.file] = MappedFile(path.parent / place.file)
        file = files[place.file]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        joined = torch.from_numpy(file.array(place, dtype, tuple(tensor.dims)))
        widths = [len(parameters[name]) for name in names]
        for name, part in zip(names, joined.split(widths, dim=1)):
            parameter = parameters[name]
            if not torch.equal(parameter, part.T):
                raise RuntimeError(f"{path} has another {name} than the model")
            parameter.data = part.T
            places[parameter] = (file, place)
            file.release(place)
    _release_after_calls(model, places)
    return list(files.values())


def _release_after_calls(
    model: torch.nn.Module, places: dict[torch.nn.Parameter, tuple[MappedFile, Place]]
) -> None:
    for module in model.modules():
        found = [places[p] for p in module.parameters(recurse=False) if p in places]
        if found:

            def release(*_: object, found: list[tuple[MappedFile, Place]] = found) -> None:
                for file, place in found:
                    file.release(place)

            module.register_forward_hook(release)
