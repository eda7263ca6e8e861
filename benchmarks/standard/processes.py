"""Measurements in processes of their own: their threads, their memory and their crashes are their own."""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NUMPY_THREADS = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
)  # read when numpy is imported


@contextmanager
def numpy_threads(n: int) -> Iterator[None]:
    """Processes started within let libraries use so many threads; numpy's own products one, as the runtime has it."""
    before = {name: os.environ.get(name) for name in NUMPY_THREADS}
    os.environ.update(dict.fromkeys(NUMPY_THREADS, str(n)) | {"OPENBLAS_NUM_THREADS": "1"})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def apart(threads: int, function: Callable, *arguments):
    """What the function returns, from a new process."""
    with numpy_threads(threads), multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peak_memory_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Served:
    """What `make` makes, in a process of its own, to be asked to `measure`; `why` says why there is none.

    One that does not answer within `patience_s` is given up.
    """

    def __init__(self, make: Callable, *arguments, threads: int, patience_s: float | None = None):
        self._patience_s = patience_s
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, make, arguments), daemon=True)
        with numpy_threads(threads):
            self._process.start()
        other.close()
        self.why = self._ask(None)

    def measure(self, *question) -> dict | None:
        """What it measures; None where it has failed."""
        answer = self._ask(question) if self.why is None else None
        if isinstance(answer, str):
            self.why = answer
            return None
        return answer

    def _ask(self, question):
        try:
            if question is not None:
                self._pipe.send(question)
            if self._pipe.poll(self._patience_s):
                return self._pipe.recv()
            self._process.kill()
            return f"it gave no answer within {self._patience_s:g} s"
        except (EOFError, OSError):
            self._process.join(5)
            return f"its process ended (exit status {self._process.exitcode})"

    def close(self) -> None:
        self._pipe.close()  # and its process ends
        self._process.join()


def _serve(pipe, make: Callable, arguments: tuple) -> None:
    try:
        began = time.perf_counter()
        made = make(*arguments)
        load_s = time.perf_counter() - began
        pipe.send(None)
        while True:
            pipe.send(
                made.measure(*pipe.recv()) | {"load_s": load_s, "peak_bytes": peak_memory_bytes()}
            )
    except EOFError:  # no more questions
        return
    except Exception as error:  # any peer's, to be reported in its place
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])
