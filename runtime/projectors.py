"""The projectors that an assistant has loaded: the default, and those of its sessions' users."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tiny_align.runtime.backends.base import Runner
from tiny_align.runtime.backends.registry import graph_specs, load_runner
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.users import UserProjector
from tiny_align.runtime.speech_vocabulary import SpeechVocabulary


@dataclass(frozen=True)
class LoadedProjector:
    """A projector that is ready to run, and the tokens that its speech may produce."""

    runner: Runner
    vocabulary: SpeechVocabulary
    source: UserProjector | None = None  # None: not known


class Projectors:
    """Loads projectors for one assistant, and keeps those of users until it is closed."""

    def __init__(
        self,
        bundle: Bundle,
        backend: str,
        n_threads: int | None,
        embed: Callable[[np.ndarray], np.ndarray],
        default: LoadedProjector,
    ) -> None:
        """
        Args:
            n_threads: per graph; None: all cores.
            embed: (K,) token ids -> (K, D), for speech vocabularies.
            default: of sessions without a user.
        """
        self._bundle = bundle
        self._backend = backend
        self._n_threads = n_threads
        self._embed = embed
        self.default = default
        self._loaded: dict[UserProjector, LoadedProjector] = {}
        self._lock = threading.Lock()  # sessions may be opened on any thread

    def swap(self, graph: Path) -> None:
        """Make another graph the default, with the speech vocabulary of its folder.

        Raises:
            BackendError, BundleError: the default stays.
        """
        self.default = self._load(graph, self._bundle.speech_tokens(graph))

    def get(self, source: UserProjector) -> LoadedProjector:
        """A user's projector, loaded when it is first asked for.

        Raises:
            BackendError: see its message.
        """
        with self._lock:
            if source not in self._loaded:
                loaded = self.default
                if loaded.source != source:
                    loaded = self._load(source.graph, source.speech_tokens, source)
                self._forget(source.folder)
                self._loaded[source] = loaded
            return self._loaded[source]

    def _load(
        self, graph: Path, speech_tokens: np.ndarray, source: UserProjector | None = None
    ) -> LoadedProjector:
        spec = graph_specs(self._bundle, self._backend)["projector"]
        runner = load_runner(graph, spec, self._backend, self._n_threads, self._bundle)
        vocabulary = self.default.vocabulary  # one table where the tokens are the same
        if not np.array_equal(speech_tokens, vocabulary.tokens):
            vocabulary = SpeechVocabulary(speech_tokens, self._embed)
        return LoadedProjector(runner, vocabulary, source)

    def _forget(self, folder: Path) -> None:
        """Drop what this user's training has replaced; a session that uses it still holds it."""
        for source in list(self._loaded):
            if source.folder == folder:
                del self._loaded[source]

    def close(self) -> None:
        """Free all graphs."""
        with self._lock:
            self.default.runner.close()
            for loaded in self._loaded.values():
                loaded.runner.close()
            self._loaded.clear()
