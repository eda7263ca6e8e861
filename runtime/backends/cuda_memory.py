"""CUDA's memory through ctypes on libcudart: device buffers, copies and streams.

Every return value is checked. If the GPU has no memory of its own (a Jetson), small arrays are
shared with it instead of copied: see `exchange`. Kernels are TensorRT's, not launched here.
libcudart is loaded at the first call.
"""

import ctypes
import functools
import os
import weakref
from typing import Any

import numpy as np

from tiny_align.runtime.errors import BackendError

LIBRARIES = (
    "libcudart.so.13",
    "libcudart.so.12",
    "libcudart.so",
    "/usr/local/cuda/lib64/libcudart.so",
)
ZERO_COPY = "TINY_ALIGN_ZERO_COPY"  # environment variable; "0": copy every array, on a Jetson too

# of <cuda_runtime_api.h>, the same in CUDA 12 and 13
TO_DEVICE = 1  # cudaMemcpyKind
TO_HOST = 2
ON_DEVICE = 3
MAPPED = 2  # cudaHostAllocMapped
INTEGRATED = 18  # cudaDeviceAttr
CAN_MAP_HOST_MEMORY = 19
POINTER = ctypes.c_void_p
SIZE = ctypes.c_size_t
INT = ctypes.c_int
FLAGS = ctypes.c_uint
SIGNATURES: dict[str, tuple] = {  # each returns a cudaError_t
    "cudaMalloc": (ctypes.POINTER(POINTER), SIZE),
    "cudaFree": (POINTER,),
    "cudaHostAlloc": (ctypes.POINTER(POINTER), SIZE, FLAGS),
    "cudaHostGetDevicePointer": (ctypes.POINTER(POINTER), POINTER, FLAGS),
    "cudaFreeHost": (POINTER,),
    "cudaGetDevice": (ctypes.POINTER(INT),),
    "cudaDeviceGetAttribute": (ctypes.POINTER(INT), INT, INT),
    "cudaMemcpyAsync": (POINTER, POINTER, SIZE, INT, POINTER),
    "cudaMemcpy2DAsync": (POINTER, SIZE, POINTER, SIZE, SIZE, SIZE, INT, POINTER),
    "cudaStreamCreate": (ctypes.POINTER(POINTER),),
    "cudaStreamDestroy": (POINTER,),
    "cudaStreamSynchronize": (POINTER,),
}


@functools.cache
def library() -> ctypes.CDLL:
    """libcudart, its functions declared.

    Raises:
        BackendError: it is not installed.
    """
    for name in LIBRARIES:
        try:
            cudart = ctypes.CDLL(name)
        except OSError:
            continue
        for function_name, arguments in SIGNATURES.items():
            function = getattr(cudart, function_name)
            function.argtypes = arguments
            function.restype = ctypes.c_int
        cudart.cudaGetErrorString.argtypes = (ctypes.c_int,)
        cudart.cudaGetErrorString.restype = ctypes.c_char_p
        return cudart
    raise BackendError(
        f"the CUDA runtime is not installed: none of {', '.join(LIBRARIES)} can be loaded. On a "
        "Jetson it comes with JetPack; elsewhere install CUDA 12 or 13, or set LD_LIBRARY_PATH to "
        "the folder that it is in"
    )


def call(name: str, *arguments: Any, what: str = "") -> None:
    """One call of libcudart.

    Args:
        arguments: as SIGNATURES declares them.
        what: what was asked for, for the message, such as " of 5.0 MB".

    Raises:
        BackendError: it returned an error, named as CUDA names it.
    """
    status = getattr(library(), name)(*arguments)
    if status != 0:
        words = library().cudaGetErrorString(status).decode(errors="replace")
        raise BackendError(f"CUDA refuses {name}{what}: {words} (error {status})")


class Buffer:
    """Device memory, freed with this object; `address` is aligned to 256 bytes."""

    def __init__(self, n_bytes: int):
        self.n_bytes = max(n_bytes, 1)  # of nothing CUDA would return no address
        address = POINTER()
        what = f" of {self.n_bytes / 1e6:.1f} MB"
        call("cudaMalloc", ctypes.byref(address), self.n_bytes, what=what)
        self.address: int = address.value or 0
        weakref.finalize(self, library().cudaFree, self.address)  # a failure cannot be reported


class Copied:
    """An array here, one on the device at `address`, and copies between them."""

    def __init__(self, size: int, dtype: str):
        self.array = np.empty(size, dtype)
        self._buffer = Buffer(self.array.nbytes)
        self.address = self._buffer.address

    def send(self, stream: "Stream", n: int) -> None:
        """Copy the first `n` elements to the device; they must not change until `synchronise`."""
        stream.upload(self.array[:n], self._buffer)

    def fetch(self, stream: "Stream") -> None:
        """Copy the device's array to `array`, which is filled after `synchronise`."""
        stream.download(self._buffer, self.array)


class Mapped:
    """One array that the device sees too, at `address`: used like Copied, and nothing is copied."""

    def __init__(self, size: int, dtype: str):
        n_bytes = size * np.dtype(dtype).itemsize
        host = POINTER()
        what = f" of {n_bytes / 1e6:.1f} MB"
        call("cudaHostAlloc", ctypes.byref(host), n_bytes, MAPPED, what=what)
        start: int = host.value or 0
        weakref.finalize(self, library().cudaFreeHost, start)  # a failure cannot be reported
        address = POINTER()
        call("cudaHostGetDevicePointer", ctypes.byref(address), start, 0)
        shared = (ctypes.c_byte * n_bytes).from_address(start)
        self.array = np.frombuffer(memoryview(shared), dtype)
        self.address: int = address.value or 0

    def send(self, stream: "Stream", n: int) -> None:
        """No copy needed: the device reads the same memory."""

    def fetch(self, stream: "Stream") -> None:
        """No copy needed: the device has written into the same memory."""


def exchange(size: int, dtype: str) -> Copied | Mapped:
    """Memory for an array that is sent to the device, or fetched from it, at every step.

    It is shared if CPU and GPU share their memory. The GPU does not cache a shared array: that
    pays for what is read or written about once, such as a token's embedding, whose copy would
    take longer than its use. What a graph reads again and again belongs into a Buffer.
    """
    return Mapped(size, dtype) if shares_memory() else Copied(size, dtype)


def shares_memory() -> bool:
    """Whether the GPU uses the machine's memory, as on a Jetson, and ZERO_COPY is not "0"."""
    device = INT()
    call("cudaGetDevice", ctypes.byref(device))
    for attribute in (INTEGRATED, CAN_MAP_HOST_MEMORY):
        value = INT()
        call("cudaDeviceGetAttribute", ctypes.byref(value), attribute, device.value)
        if not value.value:
            return False
    return os.environ.get(ZERO_COPY) != "0"


class Stream:
    """Copies and kernels, executed one after the other; destroyed with this object."""

    def __init__(self) -> None:
        stream = POINTER()
        call("cudaStreamCreate", ctypes.byref(stream))
        self.handle = stream.value or 0
        weakref.finalize(self, library().cudaStreamDestroy, self.handle)

    def upload(self, array: np.ndarray, buffer: Buffer) -> None:
        """Copy an array to the start of a buffer; it must not change until `synchronise`."""
        self._copy(buffer.address, array.ctypes.data, array, buffer, TO_DEVICE)

    def download(self, buffer: Buffer, array: np.ndarray) -> None:
        """Copy the start of a buffer to an array, which is filled after `synchronise`."""
        self._copy(array.ctypes.data, buffer.address, array, buffer, TO_HOST)

    def shorten(
        self, origin: Buffer, to: Buffer, n_rows: int, row_bytes: int, prefix_bytes: int
    ) -> None:
        """Copy the first `prefix_bytes` of each of `n_rows` rows to a buffer, without gaps."""
        fits = n_rows * row_bytes <= origin.n_bytes and n_rows * prefix_bytes <= to.n_bytes
        if not fits or prefix_bytes > row_bytes:
            raise BackendError(
                f"cannot shorten {n_rows} rows from {row_bytes} to {prefix_bytes} bytes in buffers "
                f"of {origin.n_bytes} and {to.n_bytes} bytes"
            )
        if prefix_bytes:
            call(
                "cudaMemcpy2DAsync",
                to.address,
                prefix_bytes,
                origin.address,
                row_bytes,
                prefix_bytes,
                n_rows,
                ON_DEVICE,
                self.handle,
            )

    def synchronise(self) -> None:
        """Wait until all of it is done; errors of what ran before are raised here."""
        call("cudaStreamSynchronize", self.handle)

    def _copy(self, to: int, origin: int, array: np.ndarray, buffer: Buffer, kind: int) -> None:
        if array.nbytes > buffer.n_bytes or not array.flags.c_contiguous:
            raise BackendError(
                f"expected a contiguous array for a device buffer of {buffer.n_bytes} bytes, "
                f"got one of {array.nbytes}"
            )
        call("cudaMemcpyAsync", to, origin, array.nbytes, kind, self.handle)
