"""The language model on embeddings: prompt assembly, KV-cached prefill and decoding.

The model holds no conversation: a `Cache` does. A prompt is prefilled in chunks, so that its length
costs no more memory than its place in the cache. Decoding is a generator of token ids.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tiny_align.runtime.backends.base import Decoder, Scores
from tiny_align.runtime.backends.budget import cache_positions, require_cache
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.manifest import PromptSpec
from tiny_align.runtime.checks import Range, check_fields
from tiny_align.runtime.errors import DataError, TinyAlignError

CHUNK = 128  # positions of a prompt that are prefilled at once
MAX_SHOWN = 20  # characters in a message that the tokenizer does not know


@dataclass(frozen=True)
class Decoding:
    """How to choose tokens; temperature 0 is greedy."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 40
    seed: int = 0
    loop_tokens: int = 24  # end an answer whose last so many tokens repeat a phrase; 0: never

    def __post_init__(self) -> None:
        check_fields(self, "max_tokens", "temperature", "top_k", "seed", "loop_tokens")


@dataclass
class Cache:
    """Keys and values of the positions that are prefilled, for one conversation."""

    memory: Any = None  # of the backend, laid out when the first position is prefilled
    length: int = 0  # positions
    capacity: int = 0  # positions for which the memory is laid out


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Text -> token ids, special tokens of the template understood, none added."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def encode_around(
    tokenizer: Tokenizer, prompt: PromptSpec, instruction: str
) -> tuple[list[int], list[int]]:
    """Token ids that stand before and after the words of a prompt, spoken or typed."""
    before = encode(tokenizer, prompt.lead(instruction))
    after = encode(tokenizer, prompt.after)
    return before, after


def encode_in_place(tokenizer: Tokenizer, prompt: PromptSpec, words: str) -> list[int]:
    """Words -> token ids as in a prompt: some tokenizers put a space before a text's first word."""
    words = words.strip()
    lead = prompt.lead("")
    before = encode(tokenizer, lead)
    ids = encode(tokenizer, lead + words)
    if ids[: len(before)] == before:
        return ids[len(before) :]
    return encode(tokenizer, words)


class LanguageModel:
    """A bundle's LLM: typed text or soft tokens in, token ids out."""

    def __init__(self, bundle: Bundle, decoder: Decoder, context: int | None = None) -> None:
        """
        Args:
            context: positions of a cache at most; None: as many as the bundle's LLM has.
        Raises:
            TinyAlignError: more than that.
        """
        self._decoder = decoder
        self._bundle = bundle
        self.spec = bundle.manifest.llm
        self.capacity = self.spec.max_context if context is None else context
        Range(1, self.spec.max_context).check("context", self.capacity)
        self.prompt = bundle.manifest.prompt
        self.tokenizer = bundle.load_tokenizer()
        self._table = bundle.load_embeddings()
        added = self.tokenizer.get_added_tokens_decoder()
        self._special = {i for i, token in added.items() if token.special}
        unknown = getattr(self.tokenizer.model, "unk_token", None) or "<unk>"
        self._unknown = self.tokenizer.token_to_id(unknown)

    def encode(self, text: str) -> list[int]:
        """Text -> token ids, special tokens of the template understood, none added."""
        return encode(self.tokenizer, text)

    def encode_words(self, text: str, where: str = "the text") -> list[int]:
        """A user's words -> token ids, as they stand in the prompt, without spaces around them.

        Args:
            where: what the messages call the text.
        Raises:
            DataError: no words, a special token of the template, or characters that the tokenizer
                does not know.
        """
        ids = encode_in_place(self.tokenizer, self._prompt_of_today(), text)
        special = self._special.intersection(ids) - {self._unknown}
        if special:
            names = ", ".join(sorted(str(self.tokenizer.id_to_token(i)) for i in special))
            raise DataError(f"{where} holds the LLM's special token {names}: write the words only")
        if not text.strip() or not ids:
            raise DataError(f"{where} is empty: expected a sentence")
        if self._unknown is not None and self._unknown in ids:
            unknown = [c for c in sorted(set(text)) if self._unknown in self.encode(c)]
            shown = " ".join(map(repr, unknown[:MAX_SHOWN] or [text]))
            raise DataError(
                f"{where} holds characters outside the LLM's tokenizer: {shown}. "
                "Write it in the characters the model knows"
            )
        return ids

    def close(self) -> None:
        """Free the graph."""
        self._decoder.close()

    def embed(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """(T,) token ids -> (T, D) float32 rows of the embedding table."""
        return self._table.rows(ids) * np.float32(self.spec.embedding_scale)

    def assemble(self, speech: np.ndarray, instruction: str | None = None) -> np.ndarray:
        """Put template and instruction around `speech`: (T, D) -> (T', D)."""
        before, after = self.around(instruction)
        return np.concatenate([before, speech, after])

    def around(self, instruction: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """What stands before and after speech: (P, D) and (Q, D) embeddings.

        That is the template, the instruction (None: the bundle's; "": none, the LLM's own system
        text if it has one) and today's date.

        Raises:
            DataError: a special token that has no embedding.
        """
        if instruction is None:
            instruction = self.prompt.instruction
        before, after = encode_around(self.tokenizer, self._prompt_of_today(), instruction)
        for token in before + after:
            if token >= len(self._table):
                raise DataError(
                    f"the prompt holds {self.tokenizer.id_to_token(token)}, for which the LLM has "
                    "no embedding: write the instruction in words"
                )
        return self.embed(before), self.embed(after)

    def following(self) -> np.ndarray:
        """(R, D): what stands between an answer and the next turn's words.

        No rows where the LLM knows one turn only.
        """
        return self.embed(self.encode(self._prompt_of_today().next or ""))

    def _prompt_of_today(self) -> PromptSpec:
        return self.prompt.on(datetime.now())

    def prefill(self, embeddings: np.ndarray, cache: Cache) -> Scores:
        """Run the LLM over (T, D) float32 embeddings, T > 0, into the cache.

        Returns:
            The last position's scores; the next prefill into this cache overwrites them.
        Raises:
            TinyAlignError: more positions than the context has, or no memory for another
                conversation.
        """
        n_needed = cache.length + len(embeddings)
        if n_needed > self.capacity:
            raise TinyAlignError(
                f"the prompt needs {n_needed} positions, the bundle's LLM has {self.capacity}: "
                "shorten the instruction or the recording"
            )
        if n_needed > cache.capacity:
            self._make_room(cache, cache_positions(n_needed, self.capacity))
        for start in range(0, len(embeddings), CHUNK):
            chunk = embeddings[start : start + CHUNK]
            scores = self._decoder.run(chunk, cache.memory, cache.length)
            cache.length += len(chunk)
        return scores

    def _make_room(self, cache: Cache, capacity: int) -> None:
        """Lay the cache out for `capacity` positions, if there is memory for it."""
        require_cache(self._bundle, self._decoder.name, capacity, cache.capacity)
        if cache.memory is None:
            cache.memory = self._decoder.open_cache(capacity)
        else:
            self._decoder.grow(cache.memory, capacity)
        cache.capacity = capacity

    def rewind(self, cache: Cache, length: int) -> None:
        """Forget all but the first `length` positions."""
        if length < cache.length:
            self._decoder.rewind(cache.memory, length)
            cache.length = length

    def generate(
        self, embeddings: np.ndarray, decoding: Decoding, cache: Cache | None = None
    ) -> Iterator[int]:
        """Token ids of the answer to a prompt (T, D): prefill, then `decode`."""
        cache = Cache() if cache is None else cache
        scores = self.prefill(np.ascontiguousarray(embeddings, np.float32), cache)
        yield from self.decode(scores, decoding, cache)

    def decode(self, scores: Scores, decoding: Decoding, cache: Cache) -> Iterator[int]:
        """Token ids after a prompt, until an end token, `max_tokens`, a full context or a loop.

        A token is prefilled when the next one is asked for: the last one is not in the cache.
        """
        rng = np.random.default_rng(decoding.seed)
        answer: list[int] = []
        while len(answer) < decoding.max_tokens:
            token = _choose(scores, decoding, rng)
            if token in self.spec.end_tokens:
                return
            yield token
            answer.append(token)
            if len(answer) == decoding.max_tokens or cache.length >= self.capacity:
                return
            if loops(answer, decoding.loop_tokens):
                return
            scores = self.prefill(self.embed([token]), cache)


def loops(tokens: list[int], n: int) -> bool:
    """Whether the last `n` tokens are one short phrase, of n / 3 tokens at most, over and over."""
    if n == 0 or len(tokens) < n:
        return False
    last = tokens[-n:]
    return any(last[period:] == last[:-period] for period in range(1, n // 3 + 1))


def _choose(scores: Scores, decoding: Decoding, rng: np.random.Generator) -> int:
    """The most likely token, or one drawn from the `top_k` most likely at a temperature."""
    if decoding.temperature <= 0:
        return int(scores.topk(1)[0][0])
    tokens, logits = scores.topk(decoding.top_k)
    scaled = logits / decoding.temperature
    weights = np.exp(scaled - scaled.max())
    return int(rng.choice(tokens, p=weights / weights.sum()))


class TextStream:
    """Token ids -> pieces of text, held back while a character is incomplete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self.text = ""  # so far

    def push(self, token: int) -> str:
        """What this token adds to the text."""
        self._ids.append(token)
        whole = self._tokenizer.decode(self._ids)
        if whole.endswith("�"):
            return ""
        added = whole[len(self.text) :]
        self.text = whole
        return added
