"""The optimisation profile of a graph: the min, opt and max shape of each input.

Made from the manifest alone, no builder is needed. An engine has one profile. A min may be 0 (an
empty KV cache): TensorRT-RTX 1.7 builds such profiles. That the dimensions agree with each other,
such as a mask as long as cache and new tokens together, is up to the exporter: the builder does
not notice if they do not.
"""

from typing import NamedTuple

from tiny_align.runtime.bundle.manifest import GraphSpec
from tiny_align.runtime.errors import BundleError

Shape = tuple[int, ...]
Dims = dict[str, tuple[int, int, int]]  # name of a dynamic dimension -> its min, opt and max


class ShapeRange(NamedTuple):
    """The shapes that an input may have, and the one that an engine is optimised for."""

    min: Shape
    opt: Shape
    max: Shape


def graph_profile(graph: GraphSpec, dims: Dims) -> dict[str, ShapeRange]:
    """Min, opt and max shape of every input of `graph`, static ones included.

    Args:
        graph: the graph's entry in the manifest.
        dims: the manifest's min, opt and max value of each dynamic dimension.

    Raises:
        BundleError: a dynamic dimension without an entry, or with values out of order.
    """
    profile = {}
    for tensor in graph.inputs:
        where = f"input {tensor.name!r} of {graph.file}"
        sizes = [_size_range(size, where, dims) for size in tensor.shape]
        profile[tensor.name] = ShapeRange(
            min=tuple(size[0] for size in sizes),
            opt=tuple(size[1] for size in sizes),
            max=tuple(size[2] for size in sizes),
        )
    return profile


def _size_range(size: int | str, where: str, dims: Dims) -> tuple[int, int, int]:
    """Min, opt and max of one dimension."""
    if isinstance(size, int):
        return size, size, size
    if size not in dims:
        raise BundleError(
            f"the manifest's dims lack {size!r}, a dimension of {where}: export the bundle again"
        )
    min_, opt, max_ = dims[size]
    if not 0 <= min_ <= opt <= max_:
        raise BundleError(
            f"the manifest's dims for {size!r}, a dimension of {where}: expected "
            f"0 <= min <= opt <= max, got {min_}, {opt}, {max_}: export the bundle again"
        )
    return min_, opt, max_
