"""The optimisation profile of a graph: the least, usual and greatest shape of each input.

Made from the manifest alone, no builder is needed. One profile per engine. A dimension may be 0 at least (an empty KV
cache): TensorRT-RTX 1.7 builds such profiles. That the dimensions agree with each other, such as a mask as long as
cache and new tokens together, is the exporter's business: the builder does not notice where they do not.
"""

from tiny_align.runtime.bundle.manifest import GraphSpec, TensorSpec
from tiny_align.runtime.errors import BundleError

Shape = tuple[int, ...]
LEAST, USUAL, GREATEST = range(3)


def graph_profile(
    graph: GraphSpec, dims: dict[str, tuple[int, int, int]]
) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Least, usual and greatest shape of every input of `graph`, static ones included.

    Args:
        graph: the graph's entry in the manifest.
        dims: the manifest's least, usual and greatest value of each dynamic dimension.

    Raises:
        BundleError: a dynamic dimension without an entry, or with values out of order.
    """
    return {tensor.name: _shapes(tensor, graph.file, dims) for tensor in graph.inputs}


def _shapes(tensor: TensorSpec, file: str, dims: dict) -> tuple[Shape, Shape, Shape]:
    ranges = [_range(dim, f"input {tensor.name!r} of {file}", dims) for dim in tensor.shape]
    return tuple(tuple(r[which] for r in ranges) for which in (LEAST, USUAL, GREATEST))


def _range(dim: int | str, where: str, dims: dict) -> tuple[int, int, int]:
    if isinstance(dim, int):
        return dim, dim, dim
    if dim not in dims:
        raise BundleError(
            f"the manifest's dims lack {dim!r}, a dimension of {where}: export the bundle again"
        )
    least, usual, greatest = dims[dim]
    if not 0 <= least <= usual <= greatest:
        raise BundleError(
            f"the manifest gives {dim!r}, a dimension of {where}, the values {least}, {usual}, {greatest}; expected "
            "0 <= least <= usual <= greatest: export the bundle again"
        )
    return least, usual, greatest
