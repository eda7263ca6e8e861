"""Sentences a person never said, of words they did: recordings are cut where they are quiet, and joined anew.

A hundred sentences show every word beside the same few others, and a projector trained on them learns the others with
it. Joined at random, a word has only itself to be known by (replacing words by others' aligned sound: Lam et al. 2021,
"On-the-Fly Aligned Data Augmentation for Sequence-to-Sequence ASR", arXiv 2104.01393). Where the words are, says the
projector that the training begins with. Where two words flow into each other nothing is cut, so that a piece may be a
phrase or a whole recording.
"""

import contextlib

import numpy as np
import torch
from tqdm import tqdm

from tiny_align.align.projector import STACK
from tiny_align.align.train import Example
from tiny_align.align.vary import vary
from tiny_align.align.windows import project
from tiny_align.runtime.errors import AudioError

QUIET, QUIET_S = 0.005, 0.02  # share of a recording's mean power that is a gap between words; taken over so long
PAUSE_S = (0.0, 0.15)  # between the pieces of a splice
FADE_S = 0.005  # of a piece, at both ends

Piece = tuple[str, np.ndarray]  # words, and how they were said: (S,) float32


def spliced(assistant, projector, utterances: list, examples: list[Example], n: int, seed: int, quiet: bool = False):
    """Up to `n` splices of one person's recordings, as examples; the LLM's speech vocabulary gets the tokens it lacks.

    Args:
        projector: what gives a row per frames and a blank (objective "ctc").
        examples: of the utterances, as align.personalise.make_examples gives them.
    """
    from tiny_align.align.personalise import make_examples

    projector.eval()
    parts = [pieces_of(assistant, projector, u, e) for u, e in zip(utterances, examples)]
    lengths = [sum(len(audio) for _, audio in part) for part in parts]
    pieces, rng = [piece for part in parts for piece in part], np.random.default_rng(seed)
    texts, features = [], []
    for i in tqdm(range(n), desc="splice", unit="utt", disable=quiet, mininterval=0.5):
        words, audio = join(pieces, lengths[i % len(lengths)], assistant.sample_rate, rng)
        with contextlib.suppress(AudioError):  # a piece cut in the wrong place may be silent
            features.append(assistant.features(vary(audio, assistant.sample_rate, rng)))
            texts.append(words)
    return make_examples(assistant.llm, texts, [features])


def pieces_of(assistant, projector, utterance, example: Example) -> list[Piece]:
    """A recording in pieces that, one after another, are the recording."""
    audio, words = utterance.load(assistant.sample_rate), utterance.text.split()
    ids = assistant.llm.speech_tokens[example.tokens].tolist()
    counts = tokens_of_words(ids, words, assistant.llm.tokenizer.decode)
    places = token_places(*_token_logits(assistant, projector, example), ids) if counts else None
    if places is None:
        return [(utterance.text, audio)]
    samples = ((places + 0.5) * _vector_samples(assistant)).astype(int).clip(max=len(audio) - 1)
    last = np.cumsum(counts)[:-1] - 1  # token of every word but the last
    gaps = list(zip(samples[last].tolist(), samples[last + 1].tolist()))
    cuts = quiet_points(audio, gaps, round(QUIET_S * assistant.sample_rate))
    edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut is not None), len(words)]
    sounds = np.split(audio, [cut for cut in cuts if cut is not None])
    return [(" ".join(words[a:b]), sound) for a, b, sound in zip(edges, edges[1:], sounds)]


def tokens_of_words(ids: list[int], words: list[str], decode) -> list[int] | None:
    """How many of a transcript's tokens each word has; None where they do not fall into words."""
    counts, start = [], 0
    for word in words:
        ends = range(start + 1, len(ids) + 1)
        end = next((end for end in ends if decode(ids[start:end]).strip() == word), None)
        if end is None:
            return None
        counts.append(end - start)
        start = end
    return counts if start == len(ids) else None


def token_places(tokens: np.ndarray, blank: np.ndarray, ids: list[int]) -> np.ndarray | None:
    """Where each token of a transcript is said: the surest of its places on CTC's best path through them all (Viterbi).

    Args:
        tokens: (T, L) logits of the l-th token at place t.
        blank: (T,) those of no token.
        ids: the L tokens: between two that are the same there is a blank.
    Returns:
        (L,) places, rising; None where there are too few places.
    """
    scores = np.repeat(blank[:, None], 2 * len(ids) + 1, axis=1)  # (T, 2 L + 1): a blank around every token
    scores[:, 1::2] = tokens
    skips = np.full(len(scores[0]), -np.inf)  # of a blank, to a token that differs from the one before
    skips[3::2] = np.where(np.diff(ids), 0, -np.inf)
    best = np.concatenate([scores[0, :2], np.full(len(skips) - 2, -np.inf)])
    steps = np.zeros(scores.shape, int)
    for t in range(1, len(scores)):
        ways = np.stack([best, _later(best, 1), _later(best, 2) + skips])
        steps[t], best = ways.argmax(axis=0), ways.max(axis=0) + scores[t]
    state = len(best) - 2 + int(best[-1] > best[-2])
    if np.isinf(best[state]):
        return None
    path = np.empty(len(scores), int)
    for t in range(len(scores) - 1, -1, -1):
        path[t] = state
        state -= steps[t, state]
    there = path[:, None] == 2 * np.arange(len(ids)) + 1  # (T, L)
    return np.where(there, tokens - blank[:, None], -np.inf).argmax(axis=0)


def _later(row: np.ndarray, n: int) -> np.ndarray:
    return np.concatenate([np.full(n, -np.inf), row[:-n]])


def quiet_points(audio: np.ndarray, gaps: list[tuple[int, int]], width: int) -> list[int | None]:
    """The quietest sample of each gap (first, end); None where it is not quiet there (`QUIET`)."""
    power = np.convolve(np.square(audio, dtype=np.float64), np.full(width, 1 / width), "same")
    found = [first + int(power[first : end + 1].argmin()) for first, end in gaps]
    return [at if power[at] < QUIET * power.mean() else None for at in found]


def join(pieces: list[Piece], n_samples: int, sample_rate: int, rng: np.random.Generator) -> Piece:
    """Pieces drawn at random, with pauses; no longer than `n_samples` unless it is one piece."""
    said, audio = _drawn(pieces, rng)
    words, sounds = [said], [_faded(audio, sample_rate)]
    while True:
        said, audio = _drawn(pieces, rng)
        sounds += [np.zeros(round(rng.uniform(*PAUSE_S) * sample_rate), np.float32), _faded(audio, sample_rate)]
        if sum(map(len, sounds)) > n_samples:
            return " ".join(words), np.concatenate(sounds[:-2])
        words.append(said)


def _drawn(pieces: list[Piece], rng: np.random.Generator) -> Piece:
    return pieces[rng.integers(len(pieces))]


def _faded(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    slope = np.ones(len(audio), np.float32)
    n = min(round(FADE_S * sample_rate), len(audio) // 2)
    slope[:n] = np.linspace(0, 1, n, endpoint=False)
    return audio * slope * slope[::-1]


@torch.no_grad()
def _token_logits(assistant, projector, example: Example) -> tuple[np.ndarray, np.ndarray]:
    """(T, L) of the transcript's tokens and (T,) of the blank, up to a constant of each place."""
    rows = project(projector, [torch.from_numpy(example.features)], assistant.windows)[0][0]  # (T, D + 1)
    table = torch.from_numpy(assistant.llm.speech_table[example.tokens])
    tokens = rows[:, :-1] @ table.T * assistant.bundle.manifest.readout.scale
    return tokens.numpy(), rows[:, -1].numpy()


def _vector_samples(assistant) -> int:
    if assistant.windows:
        return assistant.windows.vector_samples
    return round(STACK * assistant.bundle.manifest.encoder.frame_s * assistant.sample_rate)
