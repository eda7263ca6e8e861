"""Which form each weight of an LLM travels in, and its numbers in that form.

Most matrices are INT4. Those that cost the answers most are INT8, as many as the error or the size
asks for (`choose_forms`). Every weight is rounded once and kept in a file: both graphs of a bundle
have the same numbers.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from tiny_align.export.gguf_file import StoredBlocks
from tiny_align.export.options import BLOCKS
from tiny_align.export.program_weights import JOINT, TRANSPOSED
from tiny_align.export.rounding import round_gptq, round_nearest
from tiny_align.export.sensitivity import Sensitivity, join
from tiny_align.runtime.bundle.onnx_weights import Place
from tiny_align.runtime.errors import TinyAlignError

log = logging.getLogger(__name__)

BITS = {"int4": 4, "int8": 8, "fp16": 16, "fp32": 32}  # by precision
INT8_BLOCK = 64  # weights in INT8 that share a scale, at least: theirs are fine enough
SMALL_BLOCK = 16  # for matrices that no block of BLOCKS divides
DIVERGENCE = 0.03  # nats per token that rounding the layers may cost before matrices become INT8


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
    """The weights of an LLM's products in their forms, by the names that graphs give them.

    Names are those of modules: `program_weights.name_weights`.
    """

    def __init__(
        self,
        layers: Form,
        head: Form,
        rounding: Rounding = Rounding(),
        stored: ReadBlocks = no_blocks,
        folder: Path | None = None,
    ):
        """
        Args:
            stored: gives the blocks that the LLM's own file has for a module.
            folder: an empty one for the rounded weights, which must outlive this; None: memory.
        """
        self._layers = layers
        self._head = head
        self._rounding = rounding
        self._stored = stored
        self._folder = folder
        self._sensitive: set[str] = set()
        self._blocks: dict[str, Blocks] = {}
        self.bits = float(layers.bits)  # of a layer's weight with its scale, on average
        self.head_blocks: Blocks | None = None  # once a graph was quantised, if in integers
        self.table: Table | None = None  # where the head is stored already

    def get(self, name: str, values: np.ndarray, is_head: bool) -> Blocks | Literal["fp16"] | None:
        """The form of a weight (K, N); None: it stays as it is."""
        form = self._head if is_head else self._layers
        if form.bits == 32:
            return None
        if form.bits == 16:
            return "fp16"
        bits = 8 if name in self._sensitive else form.bits
        block = fitting_block(len(values), bits, form.block)
        is_odd = values.shape[1] % 2 and bits == 4  # two INT4 codes share a byte
        if block is None or is_odd:
            log.warning(
                "%s, of %d inputs and %d outputs, is stored in FP16: no blocks of integers fit",
                name,
                *values.shape,
            )
            return "fp16"
        if name not in self._blocks:
            self._blocks[name] = self._round(name, values, bits, block)
        blocks = self._blocks[name]
        if not is_head:
            return blocks
        self.head_blocks = blocks
        return dataclasses.replace(blocks, table=self.table)

    def choose_forms(self, weights: Iterable[tuple[str, np.ndarray]]) -> None:
        """Give the matrices that cost most INT8, if the layers are INT4.

        The next one is that whose rounding costs most nats for its size, until what is left costs
        DIVERGENCE or `max_bits` are reached.

        Args:
            weights: names and values (K, N) of every product but the output layer's.
        """
        if self._layers.bits != 4:
            return
        sizes: dict[str, int] = {}
        costs: dict[str, float] = {}
        bits: dict[str, float] = {}
        more: dict[str, float] = {}  # bits in INT8
        for name, values in weights:
            blocks = self.get(name, values, is_head=False)
            if isinstance(blocks, Blocks):
                sizes[name] = values.size
                costs[name] = self._cost(name, values, blocks)
                bits[name] = values.size * stored_bits(4, blocks.block)
                block = fitting_block(len(values), 8, self._layers.block) or blocks.block
                more[name] = values.size * stored_bits(8, block) - bits[name]
        n_weights = max(sum(sizes.values()), 1)
        n_bits = sum(bits.values())
        left = sum(costs.values())
        for name in sorted(sizes, key=lambda name: costs[name] / sizes[name], reverse=True):
            if left <= DIVERGENCE or n_bits + more[name] > self._rounding.max_bits * n_weights:
                break
            left -= costs[name]
            n_bits += more[name]
            self._sensitive.add(name)
            del self._blocks[name]
        self.bits = n_bits / n_weights

    def _sensitivity(self, name: str) -> Sensitivity | None:
        modules = modules_of(name)
        parts = []
        for module in modules:
            part = self._rounding.sensitivities.get(module)
            if part is None:
                return None
            parts.append(part)
        return join(parts)

    def _cost(self, name: str, values: np.ndarray, blocks: Blocks) -> float:
        """Nats per token that the rounding of a matrix costs; 0 if nothing is known of it."""
        sensitivity = self._sensitivity(name)
        if sensitivity is None or blocks.minima is not None:  # which has lost nothing
            return 0.0
        cost = 0.0
        for row, scales in enumerate(blocks.scales):
            inputs = slice(row * blocks.block, (row + 1) * blocks.block)
            error = values[inputs] - blocks.codes[inputs] * scales.astype(np.float32)
            cost += sensitivity.divergence(error, inputs)
        return cost

    def _round(self, name: str, values: np.ndarray, bits: int, block: int) -> Blocks:
        carried = self._carry_over(name, bits)
        if carried is not None:
            return self._keep(carried)
        sensitivity = self._sensitivity(name)
        if sensitivity is None or bits == 8:
            codes, scales = round_nearest(values, bits, block)
        elif self._rounding.method == "gptq" and sensitivity.hessian is not None:
            codes, scales = round_gptq(values, bits, block, sensitivity.hessian)
        else:
            codes, scales = round_nearest(values, bits, block, sensitivity.importance)
        return self._keep(Blocks(codes, scales, bits, block))

    def _carry_over(self, name: str, bits: int) -> Blocks | None:
        """The blocks that the LLM's file has, if it has such for all of these modules."""
        parts = []
        for module in modules_of(name):
            stored = self._stored(module)
            if stored is None or stored.bits != bits:
                return None
            if bits == 8 and (stored.scales < 0).any():  # -128 times one has no code
                return None
            parts.append(stored)
        return join_blocks(parts)

    def _keep(self, blocks: Blocks) -> Blocks:
        """The same with its codes in a file."""
        if self._folder is None:
            return blocks
        path = self._folder / f"{len(list(self._folder.iterdir()))}.npy"
        np.save(path, blocks.codes)
        return dataclasses.replace(blocks, codes=np.load(path, mmap_mode="r", allow_pickle=False))


def dequantised(blocks: Blocks) -> np.ndarray:
    """(K, N) float32: codes * scales, without the minima."""
    return blocks.codes * np.repeat(blocks.scales.astype(np.float32), blocks.block, axis=0)


def modules_of(weight: str) -> list[str]:
    """The modules whose weights a graph's weight is, side by side."""
    names = []
    for name in weight.split(JOINT):
        names.append(name.removesuffix(TRANSPOSED).removesuffix(".weight"))
    return names


def join_blocks(parts: list[StoredBlocks]) -> Blocks:
    """Blocks (N, K) of llama.cpp, of weights that stand side by side, as ours (K, N): the same.

    A negative scale turns its codes around: -s * c is s * (-c - 1) + s. Codes 0 to 15 are shifted
    by 8, which goes into the minima. The scale 0, of a block of one value, becomes 1, its codes 0.
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
        code = np.where(scale[:, :, None] == 0, 0, code)
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


def fitting_block(n_inputs: int, bits: int, block: int) -> int | None:
    """The largest block, up to the wanted one, that divides the inputs; None if none does."""
    wanted = max(block, INT8_BLOCK) if bits == 8 else block
    for size in sorted((*BLOCKS, SMALL_BLOCK), reverse=True):
        if size <= wanted and n_inputs % size == 0:
            return size
    return None
