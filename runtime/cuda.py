"""CUDA's memory through ctypes on libcudart: device buffers, copies and one stream. Every return value is checked.

Not for kernels: TensorRT has those. Nothing of CUDA is looked for before the first call.
"""

import ctypes
import functools
import weakref

import numpy as np

from tiny_align.runtime.errors import BackendError

LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so", "/usr/local/cuda/lib64/libcudart.so")
TO_DEVICE, TO_HOST = 1, 2  # cudaMemcpyKind
POINTER, SIZE = ctypes.c_void_p, ctypes.c_size_t
SIGNATURES = {  # of <cuda_runtime_api.h>, the same in CUDA 12 and 13; each returns a cudaError_t
    "cudaMalloc": (ctypes.POINTER(POINTER), SIZE),
    "cudaFree": (POINTER,),
    "cudaMemcpyAsync": (POINTER, POINTER, SIZE, ctypes.c_int, POINTER),
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
    cudart.cudaGetErrorString.argtypes, cudart.cudaGetErrorString.restype = (ctypes.c_int,), ctypes.c_char_p
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
        call("cudaMalloc", ctypes.byref(address), self.n_bytes, what=f" of {self.n_bytes / 1e6:.1f} MB")
        self.address = address.value
        weakref.finalize(self, library().cudaFree, self.address)  # where it fails nobody can be told


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

    def synchronise(self) -> None:
        """Wait until all of it is done; errors of what ran before are told here."""
        call("cudaStreamSynchronize", self.handle)

    def _copy(self, to: int, origin: int, array: np.ndarray, buffer: Buffer, kind: int) -> None:
        if array.nbytes > buffer.n_bytes or not array.flags.c_contiguous:
            raise BackendError(f"{array.nbytes} bytes do not fit a device buffer of {buffer.n_bytes}")
        call("cudaMemcpyAsync", to, origin, array.nbytes, kind, self.handle)
