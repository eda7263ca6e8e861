"""CUDA's memory through ctypes on libcudart: device buffers, copies and one stream. Every return value is checked.

Where the GPU has no memory of its own (a Jetson) small arrays are shared with it instead of copied: see `exchange`. Not
for kernels: TensorRT has those. Nothing of CUDA is looked for before the first call.
"""

import ctypes
import functools
import os
import weakref

import numpy as np

from tiny_align.runtime.errors import BackendError

LIBRARIES = (
    "libcudart.so.13",
    "libcudart.so.12",
    "libcudart.so",
    "/usr/local/cuda/lib64/libcudart.so",
)
TO_DEVICE, TO_HOST, ON_DEVICE = 1, 2, 3  # cudaMemcpyKind
MAPPED = 2  # cudaHostAllocMapped
INTEGRATED, CAN_MAP_HOST_MEMORY = 18, 19  # cudaDeviceAttr
ZERO_COPY = (
    "TINY_ALIGN_ZERO_COPY"  # environment variable; "0": every array is copied, on a Jetson too
)
POINTER, SIZE, INT, FLAGS = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint
SIGNATURES = {  # of <cuda_runtime_api.h>, the same in CUDA 12 and 13; each returns a cudaError_t
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
def library():
    """libcudart, its functions declared.

    Raises:
        BackendError: it is not installed.
    """
    for name in LIBRARIES:
        try:
            return _declared(ctypes.CDLL(name))
        except OSError:
            continue
    raise BackendError(
        f"the CUDA runtime is not installed: none of {', '.join(LIBRARIES)} can be loaded. On a Jetson it comes with "
        "JetPack; elsewhere install CUDA 12 or 13, or set LD_LIBRARY_PATH to where it lies"
    )


def _declared(cudart):
    for name, arguments in SIGNATURES.items():
        function = getattr(cudart, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    cudart.cudaGetErrorString.argtypes, cudart.cudaGetErrorString.restype = (
        (ctypes.c_int,),
        ctypes.c_char_p,
    )
    return cudart


def call(name: str, *arguments, what: str = "") -> None:
    """One call of libcudart.

    Args:
        what: for people: what was asked for, such as "(5 MB)".
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
        self.n_bytes, address = max(n_bytes, 1), POINTER()  # of nothing CUDA would give no address
        call(
            "cudaMalloc",
            ctypes.byref(address),
            self.n_bytes,
            what=f" of {self.n_bytes / 1e6:.1f} MB",
        )
        self.address = address.value
        weakref.finalize(
            self, library().cudaFree, self.address
        )  # where it fails nobody can be told


class Copied:
    """An array here, one on the device at `address`, and copies between them."""

    def __init__(self, size: int, dtype):
        self.array = np.empty(size, dtype)
        self._buffer = Buffer(self.array.nbytes)
        self.address = self._buffer.address

    def send(self, stream: "Stream", n: int) -> None:
        """Let the device see the first `n` elements; they must stay as they are until the stream is synchronised."""
        stream.upload(self.array[:n], self._buffer)

    def fetch(self, stream: "Stream") -> None:
        """Let the array be what the device has, once the stream is synchronised."""
        stream.download(self._buffer, self.array)


class Mapped:
    """One array that the device sees too, at `address`: as Copied, and nothing is copied."""

    def __init__(self, size: int, dtype):
        n_bytes, host, address = size * np.dtype(dtype).itemsize, POINTER(), POINTER()
        call(
            "cudaHostAlloc", ctypes.byref(host), n_bytes, MAPPED, what=f" of {n_bytes / 1e6:.1f} MB"
        )
        weakref.finalize(
            self, library().cudaFreeHost, host.value
        )  # where it fails nobody can be told
        call("cudaHostGetDevicePointer", ctypes.byref(address), host.value, 0)
        self.array = np.frombuffer((ctypes.c_byte * n_bytes).from_address(host.value), dtype)
        self.address = address.value

    def send(self, stream: "Stream", n: int) -> None:
        """It sees them."""

    def fetch(self, stream: "Stream") -> None:
        """It is."""


def exchange(size: int, dtype) -> Copied | Mapped:
    """Memory for an array that crosses between here and the device at every step, shared where they share memory.

    A shared array is not in the GPU's cache: that pays for what is read or written about once, such as a token's
    embedding, whose copy would take longer than its use. What a graph reads again and again belongs into a Buffer.
    """
    return (Mapped if shares_memory() else Copied)(size, dtype)


def shares_memory() -> bool:
    """Whether the GPU's memory is the machine's, as on a Jetson, and ZERO_COPY does not say no."""
    device = INT()
    call("cudaGetDevice", ctypes.byref(device))
    can = all(_attribute(which, device.value) for which in (INTEGRATED, CAN_MAP_HOST_MEMORY))
    return can and os.environ.get(ZERO_COPY) != "0"


def _attribute(which: int, device: int) -> int:
    value = INT()
    call("cudaDeviceGetAttribute", ctypes.byref(value), which, device)
    return value.value


class Stream:
    """Copies and kernels one after the other; destroyed with this object."""

    def __init__(self):
        stream = POINTER()
        call("cudaStreamCreate", ctypes.byref(stream))
        self.handle = stream.value or 0
        weakref.finalize(self, library().cudaStreamDestroy, self.handle)

    def upload(self, array: np.ndarray, buffer: Buffer) -> None:
        """Copy an array to the start of a buffer; it must stay as it is until `synchronise`."""
        self._copy(buffer.address, array.ctypes.data, array, buffer, TO_DEVICE)

    def download(self, buffer: Buffer, array: np.ndarray) -> None:
        """Copy the start of a buffer to an array, which is filled after `synchronise`."""
        self._copy(array.ctypes.data, buffer.address, array, buffer, TO_HOST)

    def shorten(self, origin: Buffer, to: Buffer, rows: int, row: int, kept: int) -> None:
        """Copy the first `kept` bytes of each of `rows` rows of `row` bytes to another buffer, without gaps."""
        if rows * row > origin.n_bytes or kept > row or rows * kept > to.n_bytes:
            raise BackendError(
                f"{rows} rows of {row} bytes do not fit buffers of {origin.n_bytes} and {to.n_bytes}"
            )
        if kept:
            call(
                "cudaMemcpy2DAsync",
                to.address,
                kept,
                origin.address,
                row,
                kept,
                rows,
                ON_DEVICE,
                self.handle,
            )

    def synchronise(self) -> None:
        """Wait until all of it is done; errors of what ran before are told here."""
        call("cudaStreamSynchronize", self.handle)

    def _copy(self, to: int, origin: int, array: np.ndarray, buffer: Buffer, kind: int) -> None:
        if array.nbytes > buffer.n_bytes or not array.flags.c_contiguous:
            raise BackendError(
                f"{array.nbytes} bytes do not fit a device buffer of {buffer.n_bytes}"
            )
        call("cudaMemcpyAsync", to, origin, array.nbytes, kind, self.handle)
