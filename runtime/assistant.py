"""The product: speech in, streamed text out. Loads a bundle once; it is session.py that holds a conversation."""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tiny_align.runtime.audio.conditioning import condition
from tiny_align.runtime.audio.samples import MIN_SECONDS, check_audio, read_audio
from tiny_align.runtime.backends.base import Chain
from tiny_align.runtime.backends.budget import budget
from tiny_align.runtime.backends.registry import graph_specs, load_decoder, load_runner
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.checks import Range, check
from tiny_align.runtime.errors import AudioError
from tiny_align.runtime.llm import Decoding, LanguageModel, TextStream
from tiny_align.runtime.readout import CtcReader, PooledReader, reader
from tiny_align.runtime.session import Event, Session, Threads
from tiny_align.runtime.windows import cut

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """A whole answer and how long it took."""

    text: str
    tokens: tuple[int, ...]
    ttft_s: float  # end of speech -> first token
    seconds: float  # end of speech -> last token
    audio_s: float
    heard: bool = True  # whether there was a word to answer

    @property
    def rtf(self) -> float:
        """Real-time factor: seconds of work per second of speech."""
        return self.seconds / self.audio_s if self.audio_s else 0.0


class Assistant:
    """Encoder, projector and LLM of one bundle, with one person's projector.

    Shapes: audio (S,) float32 in [-1, 1] at `sample_rate`; features (N, Da); soft tokens (T, D). Features of speech
    that is longer than a window (windows.py) are those of its windows, one after another.
    """

    def __init__(
        self,
        bundle: Bundle,
        encoder,
        projector,
        llm: LanguageModel,
        backend: str,
        n_threads: int | None = None,
    ):
        self.bundle, self.backend, self._n_threads = bundle, backend, n_threads
        self._encoder, self._projector, self.llm = encoder, projector, llm
        self.threads = Threads()  # of its sessions
        self.windows = bundle.manifest.windows
        self._front_end, self._readout = bundle.manifest.front_end, bundle.manifest.readout
        self.sample_rate = self._front_end.sample_rate  # Hz
        self._rows = bundle.manifest.graphs["encoder"].inputs[0]  # what the front end makes
        self._row_s = self._front_end.row_samples / self.sample_rate

    @property
    def max_speech_s(self) -> float:
        """The longest utterance, in seconds: what the encoder takes, or any that the LLM has room for."""
        return math.inf if self.windows else self._row_range()[2] * self._row_s

    def _row_range(self) -> tuple[int, int, int]:
        """Least, usual and greatest number of the encoder's input rows: frames, or samples."""
        rows = self._rows.shape[1]
        return (rows,) * 3 if isinstance(rows, int) else self.bundle.manifest.dims[rows]

    @classmethod
    def load(
        cls,
        bundle: str | Path | Bundle,
        user: str | None = None,
        *,
        users: Path | None = None,
        backend: str = "onnxruntime",
        threads: int | None = None,
        context: int | None = None,
    ) -> "Assistant":
        """Load a bundle's graphs.

        Args:
            bundle: its folder, or one that is open already.
            user: whose projector; None: the general one.
            users: the folder persons are kept in, if not the bundle's own.
            backend: one of `registry.names()`; never replaced by another.
            threads: CPU threads per graph; None: all cores.
            context: positions of a conversation, prompt and answers together; None: as many as the LLM has.
        Raises:
            BundleError, UserError, BackendError: see their messages.
            TinyAlignError: less memory is free than it takes (budget.py), or a number out of range (checks.py).
        """
        check("threads", threads)
        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        if context is not None:
            Range(1, bundle.manifest.llm.max_context).check("context", context)
        need = budget(bundle, backend, context or bundle.manifest.llm.max_context, threads)
        log.info("%s takes about %s", bundle.path, need)
        need.require()
        own = bundle.projector(user, users)
        specs = graph_specs(bundle, backend)
        paths = {}
        for name in ("encoder", "llm"):
            bundle.graph(name)  # refuses a bundle without it
            paths[name] = bundle.path / specs[name].file
        # the largest first: loading takes more memory
        llm = LanguageModel(
            bundle, load_decoder(paths["llm"], specs["llm"], backend, threads, bundle), context
        )
        encoder = load_runner(paths["encoder"], specs["encoder"], backend, threads, bundle)
        projector = load_runner(own, specs["projector"], backend, threads, bundle)
        assistant = cls(bundle, encoder, projector, llm, backend, threads)
        assistant.llm.set_speech_tokens(bundle.speech_tokens(own))
        return assistant

    def features(self, audio: np.ndarray) -> np.ndarray:
        """(S,) float32 audio -> (N, Da) float32 encoder features, none of them after the end of the audio."""
        check_audio(audio, self.sample_rate, "the audio", max_s=self.max_speech_s)
        return np.concatenate(
            [self.encode_window(window) for window, _ in cut(audio, self.windows, self.sample_rate)]
        )

    def encode_window(self, audio: np.ndarray) -> np.ndarray:
        """A window (S,), or speech that is not cut -> (N, Da) float32, none of them after the end of the audio."""
        return self.encode(self._rows_of(audio))[: self._n_features(audio)]

    def project_window(self, audio: np.ndarray) -> np.ndarray:
        """A window (S,), or speech that is not cut -> `vectors`; its features stay where the backend has them."""
        rows = self._rows_of(audio)
        chain = Chain(self._encoder, self._projector)
        return chain({self._rows.name: rows[None]}, self._n_features(audio))["soft_tokens"][0]

    def _n_features(self, audio: np.ndarray) -> int:
        """How many features there are up to the end of the audio; an encoder may want silence after it."""
        return -(-len(audio) // round(self.bundle.manifest.encoder.frame_s * self.sample_rate))

    def _rows_of(self, audio: np.ndarray) -> np.ndarray:
        """What the front end makes of a window: (frames, M) or (S,)."""
        if (
            len(audio) < MIN_SECONDS * self.sample_rate
        ):  # some front ends have nothing to make of it
            seconds = len(audio) / self.sample_rate
            raise AudioError(
                f"the audio lasts {seconds:.3f} s, expected at least {MIN_SECONDS} s: record longer"
            )
        least = self._row_range()[0]
        rows = self._front_end(condition(audio, self.sample_rate))
        if len(rows) < least:
            raise AudioError(
                f"the audio has {len(rows) * self._row_s:.3f} s for the encoder, at least {least * self._row_s:.3f} s "
                "are needed: record longer"
            )
        return np.ascontiguousarray(rows)

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """What the front end made, (frames, M) or (S,) -> (N, Da) float32 encoder features."""
        return self._encoder({self._rows.name: rows[None]})["features"][0]

    def project(self, features: np.ndarray) -> np.ndarray:
        """A window's features (N, Da) -> what the projector makes of them, for `reader`."""
        return self._projector({"features": features[None]})["soft_tokens"][0]

    def reader(self) -> CtcReader | PooledReader:
        """What makes one utterance's soft tokens of its windows' vectors."""
        return reader(self._readout, self.llm.speech_table)

    def soft_tokens(self, features: np.ndarray) -> np.ndarray:
        """(N, Da) of an utterance -> (T', D) float32 in the LLM's embedding space; no row where no word was heard."""
        windows = self.windows.split(features) if self.windows else [features]
        kept = self.windows.keep_slices(len(windows)) if self.windows else [slice(None)]
        reading = self.reader()
        heard = [reading.push(self.project(window)[which]) for window, which in zip(windows, kept)]
        return np.concatenate([*heard, reading.finish()])

    def swap_projector(self, path: Path) -> None:
        """Use another person's projector graph, and the tokens they may say, from the next window on.

        The old one goes when no window is in it any more.
        """
        spec = graph_specs(self.bundle, self.backend)["projector"]
        self._projector = load_runner(path, spec, self.backend, self._n_threads, self.bundle)
        self.llm.set_speech_tokens(self.bundle.speech_tokens(path))

    def stream(
        self, audio: np.ndarray, instruction: str | None = None, decoding: Decoding = Decoding()
    ) -> Iterator[Event]:
        """Answer speech: (S,) float32 mono at `sample_rate` -> events, one per token; one if nothing was heard."""
        began = time.perf_counter()
        check_audio(audio, self.sample_rate, "the audio", max_s=self.max_speech_s)
        session = self.listen(instruction, decoding)
        session.push(audio)
        yield from session.finish(began)

    def stream_text(
        self, text: str, instruction: str | None = None, decoding: Decoding = Decoding()
    ) -> Iterator[Event]:
        """Answer typed text: the upper bound of the spoken path."""
        began = time.perf_counter()
        yield from self._events(
            self.llm.embed(self.llm.encode_words(text)), instruction, decoding, began
        )

    def _events(
        self, speech: np.ndarray, instruction, decoding: Decoding, began: float
    ) -> Iterator[Event]:
        if not len(speech):
            yield Event("", None, time.perf_counter() - began)
            return
        pieces = TextStream(self.llm.tokenizer)
        for token in self.llm.generate(self.llm.assemble(speech, instruction), decoding):
            yield Event(pieces.push(token), token, time.perf_counter() - began)

    def answer(
        self, audio: np.ndarray, instruction: str | None = None, decoding: Decoding = Decoding()
    ) -> Answer:
        """`stream`, collected."""
        return collect(self.stream(audio, instruction, decoding), len(audio) / self.sample_rate)

    def answer_text(
        self, text: str, instruction: str | None = None, decoding: Decoding = Decoding()
    ) -> Answer:
        """`stream_text`, collected."""
        return collect(self.stream_text(text, instruction, decoding), 0.0)

    def answer_soft_tokens(self, soft_tokens: np.ndarray, instruction: str | None = None) -> Answer:
        """Answer soft tokens (T, D) that are at hand already; greedy."""
        return collect(self._events(soft_tokens, instruction, Decoding(), time.perf_counter()), 0.0)

    def answer_file(
        self, path, instruction: str | None = None, decoding: Decoding = Decoding()
    ) -> Answer:
        """`answer` for an audio file of any rate, channel count and format that soundfile reads."""
        return self.answer(
            read_audio(path, self.sample_rate, self.max_speech_s), instruction, decoding
        )

    def listen(self, instruction: str | None = None, decoding: Decoding = Decoding()) -> Session:
        """A conversation: push chunks of audio, then finish; any number of turns, spoken and typed."""
        return Session(self, instruction, decoding)

    def close(self) -> None:
        self.threads.close()
        for loaded in (self._encoder, self._projector, self.llm):
            loaded.close()

    def __enter__(self) -> "Assistant":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def collect(events: Iterator[Event], audio_s: float) -> Answer:
    """A whole answer from its events; an answer without a token took until the generator ended."""
    began, got = time.perf_counter(), list(events)
    seconds = got[-1].elapsed_s if got else time.perf_counter() - began
    text = "".join(e.text for e in got).strip()
    tokens = tuple(e.token for e in got if e.token is not None)
    heard = not got or got[0].token is not None
    return Answer(text, tokens, got[0].elapsed_s if got else seconds, seconds, audio_s, heard)
