"""The language model on embeddings: prompt assembly, KV-cached prefill, greedy and sampled decoding.

The model holds no conversation: a `Cache` value does. A prompt is read in chunks, so that its length costs no more
memory than its place in the cache. Decoding is a generator of token ids.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tiny_align.runtime.backends.base import Decoder, Scores
from tiny_align.runtime.backends.budget import require_cache
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.manifest import PromptSpec
from tiny_align.runtime.checks import Range, check_fields
from tiny_align.runtime.errors import DataError, TinyAlignError

CHUNK = 128  # positions of a prompt that are read at once
MAX_SHOWN = 20  # strange characters in a message


@dataclass(frozen=True)
class Decoding:
    """How to choose tokens; temperature 0 is greedy."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 40
    seed: int = 0
    loop_tokens: int = (
        24  # an answer ends when its last so many tokens go round in a circle; 0: never for that
    )

    def __post_init__(self):
        check_fields(self, "max_tokens", "temperature", "top_k", "seed", "loop_tokens")


@dataclass
class Cache:
    """Keys and values of the positions read so far, for one conversation."""

    memory: Any = None  # of the backend, laid out when the first position is read
    length: int = 0  # positions


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Text -> token ids, special tokens of the template understood, none added."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def encode_around(
    tokenizer: Tokenizer, prompt: PromptSpec, instruction: str
) -> tuple[list[int], list[int]]:
    """Token ids that stand before and after the words of a prompt, spoken or typed."""
    return encode(tokenizer, prompt.before + instruction.strip() + prompt.between), encode(
        tokenizer, prompt.after
    )


def encode_in_place(tokenizer: Tokenizer, prompt: PromptSpec, words: str) -> list[int]:
    """Words -> token ids as in a prompt: some tokenizers put a space before the first word of a text only."""
    around = prompt.before + prompt.between
    before, ids = encode(tokenizer, around), encode(tokenizer, around + words.strip())
    return ids[len(before) :] if ids[: len(before)] == before else encode(tokenizer, words.strip())


class LanguageModel:
    """A bundle's LLM: typed text or soft tokens in, token ids out."""

    def __init__(self, bundle: Bundle, decoder: Decoder, context: int | None = None):
        """context: positions of a cache; None: as many as the bundle's LLM has.

        Raises:
            TinyAlignError: more than that.
        """
        self._decoder, self._bundle = decoder, bundle
        self.spec = bundle.manifest.llm
        self.capacity = self.spec.max_context if context is None else context
        Range(1, self.spec.max_context).check("context", self.capacity)
        self.prompt = bundle.manifest.prompt
        self.tokenizer = bundle.load_tokenizer()
        self._table = bundle.load_embeddings()
        self.set_speech_tokens(bundle.speech_tokens())
        self._special = {
            i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self._unknown = self.tokenizer.token_to_id(
            getattr(self.tokenizer.model, "unk_token", None) or "<unk>"
        )

    def encode(self, text: str) -> list[int]:
        """Text -> token ids, special tokens of the template understood, none added."""
        return encode(self.tokenizer, text)

    def encode_words(self, text: str, where: str = "the text") -> list[int]:
        """A person's words -> token ids, as they stand in the prompt; space around them counts for nothing.

        Raises:
            DataError: no words, a special token of the template, or characters the tokenizer does not know.
        """
        ids = encode_in_place(self.tokenizer, self._prompt_of_today(), text)
        if special := self._special.intersection(ids) - {self._unknown}:
            named = ", ".join(sorted(self.tokenizer.id_to_token(i) for i in special))
            raise DataError(f"{where} holds the LLM's special token {named}: write the words only")
        if not text.strip() or not ids:
            raise DataError(f"{where} is empty: a sentence was expected")
        if self._unknown is not None and self._unknown in ids:
            strange = sorted({c for c in set(text) if self._unknown in self.encode(c)})[
                :MAX_SHOWN
            ] or [text]
            raise DataError(
                f"{where} holds characters outside the LLM's tokenizer: {' '.join(map(repr, strange))}. "
                "Write it in the characters the model knows"
            )
        return ids

    def close(self) -> None:
        self._decoder.close()

    def set_speech_tokens(self, tokens: np.ndarray) -> None:
        """Speech is read as these tokens from now on: the speech vocabulary, (K,) int32."""
        self.speech_tokens, self._speech_table = tokens, None

    @property
    def speech_table(self) -> np.ndarray:
        """(K, D) float32: the speech vocabulary as the LLM sees it, in memory, where a large vocabulary never is."""
        if self._speech_table is None:
            self._speech_table = self.embed(self.speech_tokens)
        return self._speech_table

    def embed(self, ids: list[int]) -> np.ndarray:
        """(T, D) float32 rows of the embedding table."""
        return self._table[ids].astype(np.float32) * np.float32(self.spec.embedding_scale)

    def assemble(self, speech: np.ndarray, instruction: str | None = None) -> np.ndarray:
        """Instruction injection: template and instruction around `speech` (T, D) -> (T', D)."""
        before, after = self.around(instruction)
        return np.concatenate([before, speech, after])

    def around(self, instruction: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """What stands before and after speech, template, instruction and today's date: (P, D) and (Q, D) embeddings."""
        wanted = self.prompt.instruction if instruction is None else instruction
        before, after = encode_around(self.tokenizer, self._prompt_of_today(), wanted)
        if strange := [
            i for i in before + after if i >= len(self._table)
        ]:  # some special tokens have no embedding
            raise DataError(
                f"the prompt holds {self.tokenizer.id_to_token(strange[0])}, for which the LLM has no embedding: "
                "write the instruction in words"
            )
        return self.embed(before), self.embed(after)

    def following(self) -> np.ndarray:
        """(P, D): what stands between an answer and the next turn's words; no rows where the LLM knows one turn."""
        return self.embed(self.encode(self._prompt_of_today().next or ""))

    def _prompt_of_today(self) -> PromptSpec:
        return self.prompt.on(datetime.now())

    def prefill(self, embeddings: np.ndarray, cache: Cache) -> Scores:
        """Read (T, D) float32 embeddings into the cache.

        Returns:
            The last position's; the next reading into this cache overwrites them.
        Raises:
            TinyAlignError: more positions than the context has, or no memory for another conversation.
        """
        if cache.length + len(embeddings) > self.capacity:
            raise TinyAlignError(
                f"the prompt needs {cache.length + len(embeddings)} positions, the bundle's LLM has "
                f"{self.capacity}: shorten the instruction or the recording"
            )
        if cache.memory is None:
            require_cache(self._bundle, self._decoder.name, self.capacity)
            cache.memory = self._decoder.open_cache(self.capacity)
        for start in range(0, len(embeddings), CHUNK):
            chunk = embeddings[start : start + CHUNK]
            logits = self._decoder.run(chunk, cache.memory, cache.length)
            cache.length += len(chunk)
        return logits

    def rewind(self, cache: Cache, length: int) -> None:
        """Forget all but the first `length` positions."""
        if length < cache.length:
            self._decoder.rewind(cache.memory, length)
            cache.length = length

    def generate(
        self, embeddings: np.ndarray, decoding: Decoding, cache: Cache | None = None
    ) -> Iterator[int]:
        """Token ids of the answer to a prompt (T, D): `decode` after reading it."""
        cache = Cache() if cache is None else cache
        yield from self.decode(
            self.prefill(np.ascontiguousarray(embeddings, np.float32), cache), decoding, cache
        )

    def decode(self, scores: Scores, decoding: Decoding, cache: Cache) -> Iterator[int]:
        """Token ids after a prompt, until an end token, `max_tokens`, a full context or a loop.

        A token is read into the cache when the next one is asked for, so that the last one given is not in it.
        """
        rng, said = np.random.default_rng(decoding.seed), []
        for n_more in reversed(range(decoding.max_tokens)):
            token = _choose(scores, decoding, rng)
            if token in self.spec.end_tokens:
                return
            yield token
            said.append(token)
            if n_more == 0 or cache.length >= self.capacity or loops(said, decoding.loop_tokens):
                return
            scores = self.prefill(self.embed([token]), cache)


def loops(tokens: list[int], n: int) -> bool:
    """Whether the last `n` tokens are one short phrase, of n / 3 tokens at most, over and over."""
    last = tokens[-n:] if n and len(tokens) >= n else []
    return any(last[period:] == last[:-period] for period in range(1, len(last) // 3 + 1))


def _choose(scores: Scores, decoding: Decoding, rng: np.random.Generator) -> int:
    """The best token, or one drawn from the `top_k` best at a temperature."""
    if decoding.temperature <= 0:
        return int(scores.topk(1)[0][0])
    tokens, logits = scores.topk(decoding.top_k)
    scaled = logits / decoding.temperature
    weights = np.exp(scaled - scaled.max())
    return int(rng.choice(tokens, p=weights / weights.sum()))


class TextStream:
    """Token ids -> pieces of text: what each token adds, held back while a character is incomplete."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._ids, self.text = tokenizer, [], ""

    def push(self, token: int) -> str:
        self._ids.append(token)
        whole = self._tokenizer.decode(self._ids)
        if whole.endswith("�"):
            return ""
        added, self.text = whole[len(self.text) :], whole
        return added
