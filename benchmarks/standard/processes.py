"""Measurements in processes of their own, with their own threads, memory and crashes."""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

NUMPY_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")  # read at its import


@contextmanager
def numpy_threads(n: int) -> Iterator[None]:
    """Processes started within use `n` threads in libraries, but one in numpy's products.

    The runtime has it so, too.
    """
    before = {name: os.environ.get(name) for name in NUMPY_THREADS}
    os.environ.update(dict.fromkeys(NUMPY_THREADS, str(n)))
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run_in_process(threads: int, function: Callable, *arguments: object) -> Any:
    """Call the function in a new process and return its result."""
    with numpy_threads(threads), multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def resident_bytes() -> int:
    """Memory of this process that is resident now."""
    fields = Path("/proc/self/statm").read_text(encoding="utf-8").split()
    return int(fields[1]) * resource.getpagesize()


def peak_memory_bytes() -> int:
    """The most memory that was resident in this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class PeerProcess:
    """An object in a process of its own, where `make(*arguments)` makes it and its `measure` runs.

    `failure` is None, or the reason why there is no such object or none any more. A process that
    does not answer within `timeout_s` is killed.
    """

    def __init__(
        self, make: Callable, *arguments: object, threads: int, timeout_s: float | None = None
    ):
        self.timeout_s = timeout_s
        context = multiprocessing.get_context("spawn")
        self._pipe, other_end = context.Pipe()
        self._process = context.Process(
            target=_answer_questions, args=(other_end, make, arguments), daemon=True
        )
        with numpy_threads(threads):
            self._process.start()
        other_end.close()
        self.failure: str | None = self._receive()

    def measure(self, *question: object) -> dict | None:
        """What its `measure` returns, with "load_s" and "peak_bytes"; None after a failure."""
        if self.failure is not None:
            return None
        try:
            self._pipe.send(question)
        except OSError:
            self.failure = self._exit_reason()
            return None
        answer = self._receive()
        if isinstance(answer, str):
            self.failure = answer
            return None
        return answer

    def _receive(self) -> Any:
        """The next answer; a string if there is none, which says why."""
        try:
            if self._pipe.poll(self.timeout_s):
                return self._pipe.recv()
        except (EOFError, OSError):
            return self._exit_reason()
        self._process.kill()
        return f"it gave no answer within {self.timeout_s:g} s"

    def _exit_reason(self) -> str:
        self._process.join(5)
        return f"its process ended (exit status {self._process.exitcode})"

    def close(self) -> None:
        """End the process."""
        self._pipe.close()  # the process sees the end of the pipe and returns
        self._process.join()


def _answer_questions(pipe: Connection, make: Callable, arguments: tuple) -> None:
    try:
        began = time.perf_counter()
        measured = make(*arguments)
        load_s = time.perf_counter() - began
        pipe.send(None)
        while True:
            answer = measured.measure(*pipe.recv())
            pipe.send(answer | {"load_s": load_s, "peak_bytes": peak_memory_bytes()})
    except EOFError:  # no more questions
        return
    except Exception as error:  # of any peer: it becomes the peer's `failure`
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])
