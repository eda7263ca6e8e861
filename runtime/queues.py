"""The two work queues of an assistant: one thread encodes speech, one prefills the LLM and decodes.

All sessions of an assistant share them. Work is done in the order in which it was queued, so that a
model never runs twice at once and nothing needs a lock.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from tiny_align.runtime.errors import TinyAlignError

P = ParamSpec("P")
T = TypeVar("T")


class Queues:
    """The encode queue and the prefill queue; each thread starts when it is needed."""

    def __init__(self) -> None:
        self._encode_queue = ThreadPoolExecutor(1, "tiny-align-encode")
        self._prefill_queue = ThreadPoolExecutor(1, "tiny-align-prefill")

    def encode(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue work for the thread that runs encoder, projector and readout."""
        return _submit(self._encode_queue, work, *args, **kwargs)

    def prefill(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue work for the thread that runs the LLM."""
        return _submit(self._prefill_queue, work, *args, **kwargs)

    def close(self) -> None:
        """End both threads after what they are doing now; queued work is dropped."""
        self._encode_queue.shutdown(cancel_futures=True)
        self._prefill_queue.shutdown(cancel_futures=True)


def _submit(
    pool: ThreadPoolExecutor, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> Future[T]:
    try:
        return pool.submit(work, *args, **kwargs)
    except RuntimeError as error:
        if "shutdown" not in str(error):  # "can't start new thread"
            raise
        raise TinyAlignError("the assistant is closed: load the bundle again") from error


class InTurn(Queues):
    """Both queues on the caller's own thread: work is done when it is queued."""

    def encode(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        done: Future[T] = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except Exception as error:  # raised where the result is asked for, as on a queue
            done.set_exception(error)
        return done

    prefill = encode
