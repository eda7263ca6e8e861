"""The projectors that an assistant has loaded: the default, and those of its sessions' users."""

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tiny_align.runtime.backends.base import Runner
from tiny_align.runtime.backends.registry import graph_specs, load_runner
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.users import UserProjector
from tiny_align.runtime.llm import LanguageModel
from tiny_align.runtime.speech_vocabulary import SpeechVocabulary


@dataclass(frozen=True)
class LoadedProjector:
    """A user's projector that is ready to run, and the tokens that its speech may produce."""

    source: UserProjector
    runner: Runner
    vocabulary: SpeechVocabulary


class Projectors:
    """Loads projectors for one assistant, and keeps those of users until it is closed."""

    def __init__(
        self, bundle: Bundle, backend: str, n_threads: int | None, default: Runner
    ) -> None:
        self._bundle = bundle
        self._backend = backend
        self._n_threads = n_threads  # per graph
        self.default = default  # of sessions without a user; its vocabulary is the LLM's
        self.default_source: UserProjector | None = None  # None: not known
        self._loaded: dict[UserProjector, LoadedProjector] = {}
        self._lock = threading.Lock()  # sessions may be opened on any thread

    def load(self, graph: Path, user: Path | None = None) -> Runner:
        """Load a projector's graph.

        Args:
            user: folder of the user; None: the graph's, if that is not the bundle's.
        Raises:
            BackendError: see its message.
        """
        spec = graph_specs(self._bundle, self._backend)["projector"]
        return load_runner(graph, spec, self._backend, self._n_threads, self._bundle, user)

    def get(self, source: UserProjector, llm: LanguageModel) -> LoadedProjector:
        """A user's projector, loaded when it is first asked for.

        Args:
            llm: embeds the speech vocabulary.
        Raises:
            BackendError: see its message.
        """
        with self._lock:
            if source not in self._loaded:
                runner = self.default
                if source != self.default_source:
                    user = None if source.name is None else source.folder
                    runner = self.load(source.graph, user)
                vocabulary = llm.speech_vocabulary  # one table where the tokens are the same
                if not np.array_equal(source.speech_tokens, vocabulary.tokens):
                    vocabulary = SpeechVocabulary(source.speech_tokens, llm.embed)
                self._forget(source.folder)
                self._loaded[source] = LoadedProjector(source, runner, vocabulary)
            return self._loaded[source]

    def _forget(self, folder: Path) -> None:
        """Drop what this user's training has replaced; a session that uses it still holds it."""
        for source in list(self._loaded):
            if source.folder == folder:
                del self._loaded[source]

    def close(self) -> None:
        """Free all graphs."""
        with self._lock:
            self.default.close()
            for loaded in self._loaded.values():
                loaded.runner.close()
            self._loaded.clear()
