"""The product: speech in, streamed text out. A session (session.py) holds a conversation."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tiny_align.runtime.audio.conditioning import condition
from tiny_align.runtime.audio.samples import MIN_SECONDS, check_audio, read_audio
from tiny_align.runtime.backends.base import Chain, Runner
from tiny_align.runtime.backends.budget import budget
from tiny_align.runtime.backends.registry import graph_specs, load_decoder, load_runner
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.user_folders import find_users
from tiny_align.runtime.bundle.users import UserProjector
from tiny_align.runtime.checks import Range, check
from tiny_align.runtime.errors import AudioError
from tiny_align.runtime.events import Event, NothingHeard, Token
from tiny_align.runtime.llm import Decoding, LanguageModel, TextStream
from tiny_align.runtime.projectors import LoadedProjector, Projectors
from tiny_align.runtime.queues import InTurn, Queues
from tiny_align.runtime.readout import Reader, make_reader
from tiny_align.runtime.session import Session
from tiny_align.runtime.speech_vocabulary import SpeechVocabulary
from tiny_align.runtime.stages import UNOBSERVED, StageRecorder
from tiny_align.runtime.windows import cut

log = logging.getLogger(__name__)

User = str | UserProjector | None  # a name, Bundle.user_projector's result, or the default


@dataclass(frozen=True)
class Answer:
    """A whole answer and how long it took."""

    text: str
    tokens: tuple[int, ...]
    ttft_s: float  # end of speech -> first token
    seconds: float  # end of speech -> last token
    audio_s: float
    heard: bool = True  # whether a word was recognised

    @property
    def rtf(self) -> float:
        """Real-time factor: seconds of work per second of speech."""
        return self.seconds / self.audio_s if self.audio_s else 0.0


class Assistant:
    """Encoder, projector and LLM of one bundle.

    Its projector is the general one or a user's. Each session may speak for another user
    (`listen(user=...)`).

    Shapes: audio (S,) float32 in [-1, 1] at `sample_rate`; features (N, Da); soft tokens (T, D).
    Features of speech that is longer than a window (windows.py) are those of its windows, one after
    another.
    """

    def __init__(
        self,
        bundle: Bundle,
        encoder: Runner,
        projector: Runner | LoadedProjector,
        llm: LanguageModel,
        backend: str,
        n_threads: int | None = None,
        users: Path | None = None,
    ) -> None:
        """
        Args:
            projector: the default; a runner has the bundle's speech vocabulary.
            n_threads: per graph; None: all cores.
            users: as `load` takes it.
        """
        if not isinstance(projector, LoadedProjector):
            vocabulary = SpeechVocabulary(bundle.speech_tokens(), llm.embed)
            projector = LoadedProjector(projector, vocabulary)
        self.bundle = bundle
        self.backend = backend
        self.llm = llm
        self.queues = Queues()  # of its sessions
        self.windows = bundle.manifest.windows
        self.sample_rate = bundle.manifest.front_end.sample_rate  # Hz
        self._users = users
        self._encoder = encoder
        self._projectors = Projectors(bundle, backend, n_threads, llm.embed, projector)
        self._recorder: StageRecorder | None = None
        self._front_end = bundle.manifest.front_end
        self._readout = bundle.manifest.readout
        self._rows = bundle.manifest.graphs["encoder"].inputs[0]  # what the front end gives
        self._row_s = self._front_end.row_samples / self.sample_rate

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
            user: whose projector is the default; None: the general one.
            users: directory of user profiles; None: where the user is, in the platform's data
                folder or in the bundle (bundle/user_folders.py).
            backend: one of `registry.names()`; never replaced by another.
            threads: CPU threads per graph; None: all cores.
            context: positions of a conversation, prompt and answers together; None: as many as the
                LLM has.
        Raises:
            BundleError, UserError, BackendError: see their messages.
            TinyAlignError: less memory is free than it takes (budget.py), or a number out of range
                (checks.py).
        """
        check("threads", threads)
        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        max_context = bundle.manifest.llm.max_context
        if context is not None:
            Range(1, max_context).check("context", context)
        need = budget(bundle, backend, context or max_context, threads)
        log.info("%s takes about %s", bundle.path, need)
        need.require()
        own = bundle.user_projector(user, find_users(bundle, user, users))
        specs = graph_specs(bundle, backend)
        graphs = {}
        for name in ("encoder", "llm"):
            bundle.graph(name)  # refuses a bundle without it
            graphs[name] = bundle.path / specs[name].file
        # the largest first: loading takes more memory
        decoder = load_decoder(graphs["llm"], specs["llm"], backend, threads, bundle)
        llm = LanguageModel(bundle, decoder, context)
        encoder = load_runner(graphs["encoder"], specs["encoder"], backend, threads, bundle)
        runner = load_runner(own.graph, specs["projector"], backend, threads, bundle)
        vocabulary = SpeechVocabulary(own.speech_tokens, llm.embed)
        projector = LoadedProjector(runner, vocabulary, own)
        return cls(bundle, encoder, projector, llm, backend, threads, users)

    @property
    def max_speech_s(self) -> float:
        """The longest utterance in seconds: what the encoder takes.

        Infinite if speech is cut into windows: then the LLM's context is the limit.
        """
        return math.inf if self.windows else self._row_bounds()[2] * self._row_s

    @property
    def speech_vocabulary(self) -> SpeechVocabulary:
        """The tokens that the default projector's speech may produce."""
        return self._projectors.default.vocabulary

    def _row_bounds(self) -> tuple[int, int, int]:
        """Min, opt and max number of the encoder's input rows: frames, or samples."""
        rows = self._rows.shape[1]
        return (rows, rows, rows) if isinstance(rows, int) else self.bundle.manifest.dims[rows]

    # --- stages, one by one ---

    def features(self, audio: np.ndarray) -> np.ndarray:
        """(S,) float32 audio -> (N, Da) float32 encoder features, none after the audio's end."""
        check_audio(audio, self.sample_rate, "the audio", max_s=self.max_speech_s)
        windows = cut(audio, self.windows, self.sample_rate)
        return np.concatenate([self.encode_window(window) for window, _ in windows])

    def encode_window(self, audio: np.ndarray) -> np.ndarray:
        """A window (S,), or speech that is not cut -> (N, Da) float32 features, as `features`."""
        return self.encode(self._rows_of(audio))[: self._n_features(audio)]

    def project_window(
        self, audio: np.ndarray, projector: LoadedProjector | None = None
    ) -> np.ndarray:
        """A window (S,), or speech that is not cut -> its vectors, for `reader`.

        Args:
            projector: a user's; None: the default.
        """
        with self.stage("front end"):
            feed = {self._rows.name: self._rows_of(audio)[None]}
            n_features = self._n_features(audio)
            runner = (projector or self._projectors.default).runner
            if self._recorder is None:  # the features stay where the backend has them
                return Chain(self._encoder, runner)(feed, n_features)["soft_tokens"][0]
            with self.stage("encoder"):
                features = self._encoder(feed)["features"][:, :n_features]
            with self.stage("projector"):
                return runner({"features": features})["soft_tokens"][0]

    def _n_features(self, audio: np.ndarray) -> int:
        """Features up to the audio's end; an encoder may want silence after it."""
        feature_samples = round(self.bundle.manifest.encoder.frame_s * self.sample_rate)
        return -(-len(audio) // feature_samples)

    def _rows_of(self, audio: np.ndarray) -> np.ndarray:
        """The front end's output for a window: (frames, M) or (S,)."""
        # with less audio some front ends return no row
        if len(audio) < MIN_SECONDS * self.sample_rate:
            seconds = len(audio) / self.sample_rate
            raise AudioError(
                f"the audio lasts {seconds:.3f} s, expected at least {MIN_SECONDS} s: record longer"
            )
        rows = self._front_end(condition(audio, self.sample_rate))
        min_rows = self._row_bounds()[0]
        if len(rows) < min_rows:
            raise AudioError(
                f"the audio has {len(rows) * self._row_s:.3f} s for the encoder, "
                f"expected at least {min_rows * self._row_s:.3f} s: record longer"
            )
        return np.ascontiguousarray(rows)

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """The front end's output, (frames, M) or (S,) -> (N, Da) float32 encoder features."""
        return self._encoder({self._rows.name: rows[None]})["features"][0]

    def project(self, features: np.ndarray) -> np.ndarray:
        """A window's features (N, Da) -> its vectors, for `reader`."""
        runner = self._projectors.default.runner
        return runner({"features": features[None]})["soft_tokens"][0]

    def reader(self, projector: LoadedProjector | None = None) -> Reader:
        """A readout for one utterance: its windows' vectors in, soft tokens out.

        Args:
            projector: a user's; None: the default.
        """
        vocabulary = (projector or self._projectors.default).vocabulary
        return make_reader(self._readout, vocabulary.table)

    def soft_tokens(self, features: np.ndarray) -> np.ndarray:
        """Features (N, Da) of an utterance -> (T, D) float32 in the LLM's embedding space.

        No row where no word is recognised.
        """
        windows = [features]
        slices = [slice(None)]
        if self.windows:
            windows = self.windows.split(features)
            slices = self.windows.keep_slices(len(windows))
        reader = self.reader()
        pieces = [reader.push(self.project(window)[keep]) for window, keep in zip(windows, slices)]
        return np.concatenate([*pieces, reader.finish()])

    def swap_projector(self, path: Path) -> None:
        """Make another projector graph the default, with its speech vocabulary.

        It holds from the next window on, for open sessions too, but not for those that were opened
        for a user. The old graph is freed when no window and no session uses it.

        Raises:
            BackendError, BundleError: the default stays.
        """
        self._projectors.swap(path)

    # --- answers ---

    def stream(
        self,
        audio: np.ndarray,
        instruction: str | None = None,
        decoding: Decoding = Decoding(),
        *,
        user: User = None,
    ) -> Iterator[Token | NothingHeard]:
        """Answer speech: (S,) float32 mono at `sample_rate` -> a Token each, or one NothingHeard.

        Args:
            user: as `listen` takes it.
        """
        began = time.perf_counter()
        with self.stage("front end"):
            check_audio(audio, self.sample_rate, "the audio", max_s=self.max_speech_s)
        session = self.listen(instruction, decoding, user=user)
        session.push(audio)
        yield from session.finish(began)

    def stream_text(
        self, text: str, instruction: str | None = None, decoding: Decoding = Decoding()
    ) -> Iterator[Token | NothingHeard]:
        """Answer typed text: the upper bound of the spoken path."""
        began = time.perf_counter()
        words = self.llm.embed(self.llm.encode_words(text))
        yield from self._events(words, instruction, decoding, began)

    def _events(
        self, speech: np.ndarray, instruction: str | None, decoding: Decoding, began: float
    ) -> Iterator[Token | NothingHeard]:
        """Answer soft tokens, or embeddings of words, (T, D)."""
        if not len(speech):
            yield NothingHeard("", time.perf_counter() - began)
            return
        text = TextStream(self.llm.tokenizer)
        for token in self.llm.generate(self.llm.assemble(speech, instruction), decoding):
            piece = text.push(token)
            yield Token(piece, time.perf_counter() - began, token)

    def answer(
        self,
        audio: np.ndarray,
        instruction: str | None = None,
        decoding: Decoding = Decoding(),
        *,
        user: User = None,
    ) -> Answer:
        """`stream`, collected."""
        events = self.stream(audio, instruction, decoding, user=user)
        return collect(events, len(audio) / self.sample_rate)

    def answer_text(
        self, text: str, instruction: str | None = None, decoding: Decoding = Decoding()
    ) -> Answer:
        """`stream_text`, collected."""
        return collect(self.stream_text(text, instruction, decoding), 0.0)

    def answer_soft_tokens(self, soft_tokens: np.ndarray, instruction: str | None = None) -> Answer:
        """Answer soft tokens (T, D) that are at hand already; greedy."""
        return collect(self._events(soft_tokens, instruction, Decoding(), time.perf_counter()), 0.0)

    def answer_file(
        self,
        path: str | Path,
        instruction: str | None = None,
        decoding: Decoding = Decoding(),
        *,
        user: User = None,
    ) -> Answer:
        """`answer` for an audio file of any rate, channel count and format that soundfile reads."""
        audio = read_audio(path, self.sample_rate, self.max_speech_s)
        return self.answer(audio, instruction, decoding, user=user)

    def listen(
        self,
        instruction: str | None = None,
        decoding: Decoding = Decoding(),
        *,
        user: User = None,
    ) -> Session:
        """A conversation: push chunks of audio, then finish; any number of turns, spoken and typed.

        Args:
            user: a name, or the result of `Bundle.user_projector`; "general": the general
                projector; None: the user whom the assistant was loaded for. A name is looked up and
                checked each time. A user's projector is loaded once, and stays until `close`.
        Raises:
            UserError, BackendError: no such user, or a projector that cannot be loaded.
        """
        projector = None
        if user is not None:
            if isinstance(user, str):
                users = find_users(self.bundle, user, self._users)
                user = self.bundle.user_projector(user, users)
            projector = self._projectors.get(user)
        return Session(self, instruction, decoding, projector)

    # --- observing, closing ---

    @contextlib.contextmanager
    def observe(self, recorder: StageRecorder, *, one_thread: bool = False) -> Iterator[None]:
        """Let a recorder time the stages (stages.py) of what is answered meanwhile.

        Args:
            recorder: its `stage(name)` is entered for each stage, on the thread that runs it.
                Stages nest: an inner one is part of the outer one's time.
            one_thread: sessions that are opened meanwhile do all work on the caller's thread, one
                stage after the other. No other session may be in use then.
        """
        recorder_before = self._recorder
        queues_before = self.queues
        self._recorder = recorder
        if one_thread:
            self.queues = InTurn()
        try:
            yield
        finally:
            self._recorder = recorder_before
            self.queues = queues_before

    def stage(self, name: str) -> AbstractContextManager[object]:
        """The context in which one of STAGES is to run."""
        return UNOBSERVED if self._recorder is None else self._recorder.stage(name)

    def close(self) -> None:
        """End the sessions' threads and free all graphs."""
        self.queues.close()
        self._encoder.close()
        self._projectors.close()
        self.llm.close()

    def __enter__(self) -> "Assistant":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def collect(events: Iterator[Event], audio_s: float) -> Answer:
    """A whole answer from its events; one without an event took until the generator ended."""
    began = time.perf_counter()
    collected = list(events)
    seconds = collected[-1].elapsed_s if collected else time.perf_counter() - began
    return Answer(
        text="".join(event.text for event in collected).strip(),
        tokens=tuple(event.token for event in collected if isinstance(event, Token)),
        ttft_s=collected[0].elapsed_s if collected else seconds,
        seconds=seconds,
        audio_s=audio_s,
        heard=not any(isinstance(event, NothingHeard) for event in collected),
    )
