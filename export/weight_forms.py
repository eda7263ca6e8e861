"""Which form each weight of an LLM travels in, and its numbers in that form.

Most matrices are INT4. Those that cost the answers most are INT8, as many as the error or the size
asks for (`choose_forms`). Every weight is rounded once and kept in a file: both graphs of a bundle
have the same numbers.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from tiny_align.export.gguf_file import StoredBlocks
from tiny_align.export.options import BLOCKS
from tiny_align.export.rounding import round_gptq, round_nearest
from tiny_align.export.sensitivity import Sensitivity, join
from tiny_align.runtime.bundle.onnx_weights import Place
from tiny_align.runtime.errors import TinyAlignError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

BITS = {"int4": 4, "int8": 8, "fp16": 16, "fp32": 32}  # by precision
SMALL_BLOCK = 16  # for matrices that no block of BLOCKS divides
DIVERGENCE = 0.05  # nats per token that rounding the layers may cost before matrices become INT8


@dataclass(frozen=True)
class Form:
    """How weights are stored: floats of 32 or 16 bits, or integers of 8 or 4 in blocks."""

    bits: int
    block: int = BLOCKS[0]


@dataclass(frozen=True)
class Table:
    """Where a bundle has the embedding table in INT8, which is the output layer's weight too."""

    codes: Place  # (V, D) uint8, 128 more than the codes
    scales: Place  # (V, D / block) float16


@dataclass(frozen=True)
class Blocks:
    """A weight (K, N) in blocks: code * scale, and the minimum if there are any."""

    codes: np.ndarray  # (K, N) int8
    scales: np.ndarray  # (K / block, N) float16, or float32 where they would be too small
    bits: int
    block: int
    minima: np.ndarray | None = None  # (K / block, N) float32
    table: Table | None = None


def forms(precision: str, head: str | None = None, block: int = BLOCKS[0]) -> tuple[Form, Form]:
    """The forms of the layers and of the output layer.

    Args:
        head: the output layer's precision; None: the layers', but at least "int8".
    Raises:
        TinyAlignError: an unknown precision or block size.
    """
    _check_choice("precision", precision, BITS)
    _check_choice("head-precision", head or precision, BITS)
    _check_choice("block-size", block, BLOCKS)
    bits = BITS[precision]
    head_bits = BITS[head] if head else max(bits, 8)
    return Form(bits, block), Form(head_bits, block)


def _check_choice(name: str, value: str | int, choices: Iterable[str | int]) -> None:
    if value not in choices:
        raise TinyAlignError(f"--{name} is {value}: choose one of {', '.join(map(str, choices))}")


Names = tuple[str, ...]  # of modules whose weights are one matrix of the graph


@dataclass(frozen=True)
class Rounding:
    """How weights become integers.

    Attributes:
        method: "nearest", or "gptq", for which the sensitivities have Hessians.
        sensitivities: by the name of a module; without them no matrix is INT8 for its sensitivity.
        max_bits: of a layer's weight, on average.
    """

    method: str = "nearest"
    sensitivities: dict[str, Sensitivity] = dataclasses.field(default_factory=dict)
    max_bits: float = 0


ReadBlocks = Callable[[str], StoredBlocks | None]  # by the name of a module


def no_blocks(name: str) -> StoredBlocks | None:
    """For an LLM that is no file of blocks."""
    return None


class LlmWeights:
    """The weights of an LLM's products in their forms, by their values: graphs name them anew."""

    def __init__(
        self,
        layers: Form,
        head: Form,
        rounding: Rounding = Rounding(),
        modules: "dict[bytes, tuple[str, int]] | None" = None,
        stored: ReadBlocks = no_blocks,
        folder: Path | None = None,
    ):
        """
        Args:
            modules: of `module_rows`, whose names the sensitivities and stored blocks have.
            stored: gives the blocks that the LLM's own file has for a module.
            folder: an empty one for the rounded weights, which must outlive this; None: memory.
        """
        self._layers = layers
        self._head = head
        self._rounding = rounding
        self._modules = modules or {}
        self._stored = stored
        self._folder = folder
        self._sensitive: set[Names] = set()
        self._blocks: dict[Names, Blocks] = {}
        self.bits = float(layers.bits)  # of a layer's weight with its scale, on average
        self.head_blocks: Blocks | None = None  # once a graph was quantised, if in integers
        self.table: Table | None = None  # where the head is stored already

    def get(self, values: np.ndarray, is_head: bool) -> Blocks | Literal["fp16"] | None:
        """The form of a weight (K, N); None: it stays as it is."""
        form = self._head if is_head else self._layers
        if form.bits == 32:
            return None
        if form.bits == 16:
            return "fp16"
        block = _fitting_block(len(values), form.block)
        if block is None or values.shape[1] % 2:  # two INT4 codes of a row share a byte
            log.warning(
                "a weight of %d inputs and %d outputs is stored in FP16: no blocks of integers fit",
                *values.shape,
            )
            return "fp16"
        names = self._names(values)
        if names not in self._blocks:
            bits = 8 if names in self._sensitive else form.bits
            self._blocks[names] = self._round(values, names, bits, block)
        blocks = self._blocks[names]
        if not is_head:
            return blocks
        self.head_blocks = blocks
        return dataclasses.replace(blocks, table=self.table)

    def choose_forms(self, weights: Iterable[np.ndarray]) -> None:
        """Give the matrices that cost most INT8, if the layers are INT4.

        The next one is that whose rounding costs most nats for its size, until what is left costs
        DIVERGENCE or `max_bits` are reached.

        Args:
            weights: (K, N) of every product but the output layer's, as the graph has them.
        """
        if self._layers.bits != 4:
            return
        sizes: dict[Names, int] = {}
        costs: dict[Names, float] = {}
        for values in weights:
            blocks = self.get(values, is_head=False)
            if isinstance(blocks, Blocks) and blocks.bits == 4 and blocks.minima is None:
                names = self._names(values)
                sizes[names] = values.size
                costs[names] = self._cost(values, names, blocks)
        n_weights = max(sum(sizes.values()), 1)
        n_bits = sum(sizes[names] * stored_bits(4, self._blocks[names].block) for names in sizes)
        left = sum(costs.values())
        for names in sorted(sizes, key=lambda names: costs[names] / sizes[names], reverse=True):
            block = self._blocks[names].block
            more = sizes[names] * (stored_bits(8, block) - stored_bits(4, block))
            if left <= DIVERGENCE or n_bits + more > self._rounding.max_bits * n_weights:
                break
            left -= costs[names]
            n_bits += more
            self._sensitive.add(names)
            del self._blocks[names]
        self.bits = n_bits / n_weights

    def _names(self, values: np.ndarray) -> Names:
        """The modules whose weights stand side by side in (K, N)."""
        names = []
        column = 0
        while column < values.shape[1]:
            key = np.ascontiguousarray(values[:, column]).tobytes()
            if key not in self._modules:
                digest = hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
                return (f"unknown {digest}",)
            name, n_rows = self._modules[key]
            names.append(name)
            column += n_rows
        return tuple(names)

    def _sensitivity(self, names: Names) -> Sensitivity | None:
        parts = [self._rounding.sensitivities.get(name) for name in names]
        present = [part for part in parts if part is not None]
        return join(present) if len(present) == len(parts) else None

    def _cost(self, values: np.ndarray, names: Names, blocks: Blocks) -> float:
        """Nats per token that the rounding of a matrix costs; 0 if nothing is known of it."""
        sensitivity = self._sensitivity(names)
        if sensitivity is None:
            return 0.0
        cost = 0.0
        for row, scales in enumerate(blocks.scales):
            inputs = slice(row * blocks.block, (row + 1) * blocks.block)
            error = values[inputs] - blocks.codes[inputs] * scales.astype(np.float32)
            cost += sensitivity.divergence(error, inputs)
        return cost

    def _round(self, values: np.ndarray, names: Names, bits: int, block: int) -> Blocks:
        carried = self._carry_over(names, bits)
        if carried is not None:
            return carried
        sensitivity = self._sensitivity(names)
        if sensitivity is None or bits == 8:
            codes, scales = round_nearest(values, bits, block)
        elif self._rounding.method == "gptq" and sensitivity.hessian is not None:
            codes, scales = round_gptq(values, bits, block, sensitivity.hessian)
        else:
            codes, scales = round_nearest(values, bits, block, sensitivity.importance)
        return self._keep(Blocks(codes, scales, bits, block))

    def _carry_over(self, names: Names, bits: int) -> Blocks | None:
        """The blocks that the LLM's file has, if it has such for all of these modules."""
        parts = []
        for name in names:
            stored = self._stored(name)
            if stored is None or stored.bits != bits:
                return None
            parts.append(stored)
        return self._keep(join_blocks(parts))

    def _keep(self, blocks: Blocks) -> Blocks:
        """The same with its codes in a file."""
        if self._folder is None:
            return blocks
        path = self._folder / f"{len(list(self._folder.iterdir()))}.npy"
        np.save(path, blocks.codes)
        return dataclasses.replace(blocks, codes=np.load(path, mmap_mode="r"))


def module_rows(llm: "PreTrainedModel") -> dict[bytes, tuple[str, int]]:
    """The first row of every linear module's weight -> its name and number of rows.

    That row is a column of the graph's weight, which has another name.
    """
    modules = {}
    for name, module in llm.named_modules():
        if isinstance(module, torch.nn.Linear):
            row = module.weight[0].detach().numpy()
            modules[row.tobytes()] = (name, module.out_features)
    return modules


def join_blocks(parts: list[StoredBlocks]) -> Blocks:
    """Blocks (N, K) of llama.cpp, of weights that stand side by side, as ours (K, N): the same.

    A negative scale turns its codes around: -s * c is s * (-c - 1) + s. Codes 0 to 15 are shifted
    by 8, which goes into the minima.
    """
    codes = []
    scales = []
    minima = []
    for part in parts:
        n_rows, n_blocks = part.scales.shape
        block = part.codes.shape[1] // n_blocks
        scale = part.scales.astype(np.float32)
        low = np.zeros_like(scale) if part.minima is None else part.minima.astype(np.float32)
        code = part.codes.reshape(n_rows, n_blocks, block).astype(np.int16)
        if part.minima is not None:
            code = code - 8
            low = low + 8 * scale
        if part.bits == 4:
            turned = scale < 0
            code = np.where(turned[:, :, None], -code - 1, code)
            low = np.where(turned, low - scale, low)
        codes.append(code.reshape(n_rows, -1).astype(np.int8).T)
        scales.append(np.abs(part.scales).T)
        minima.append(low.T)
    joined = np.concatenate(minima, axis=1)
    positive = np.concatenate(scales, axis=1)
    return Blocks(
        np.concatenate(codes, axis=1),
        np.where(positive == 0, np.float16(1), positive),
        parts[0].bits,
        block,
        joined if joined.any() else None,
    )


def stored_bits(bits: int, block: int) -> float:
    """Bits of a weight with its share of a scale, in the graph where it takes more of them.

    INT8 is two INT4 weights there, each with scales.
    """
    return bits + 16 / block * (bits / 4)


def _fitting_block(n_inputs: int, block: int) -> int | None:
    """The largest block, up to the wanted one, that divides the inputs; None if none does."""
    for size in (block, *BLOCKS, SMALL_BLOCK):
        if size <= block and n_inputs % size == 0:
            return size
    return None
