"""Splicing: where words are found, where recordings are cut, and what is joined of them."""

import itertools

import numpy as np
import pytest

from tiny_align.align.datasets import load_dataset, split_of
from tiny_align.align.personalise import make_examples
from tiny_align.align.splice import FADE_S, join, pieces_of, quiet_points, spliced, token_places, tokens_of_words
from tiny_align.align.users import load_projector

RATE = 16_000  # Hz


@pytest.fixture(scope="module")
def utterances(tmp_path_factory, write_recordings):
    folder = tmp_path_factory.mktemp("said")
    write_recordings(folder, 6, 0)
    return split_of(load_dataset(folder), "train")


@pytest.fixture(scope="module")
def projector(assistant):
    return load_projector(assistant.bundle, assistant.bundle.graph("projector")).eval()


@pytest.fixture(scope="module")
def examples(assistant, utterances):
    features = [assistant.features(u.load(RATE)) for u in utterances]
    return make_examples(assistant.llm, [u.text for u in utterances], [features])


@pytest.mark.parametrize(
    ("tokens", "words", "counts"),
    [
        ([" o", "ne", " two"], ["one", "two"], [2, 1]),
        (["a", " a", " aa"], ["a", "a", "aa"], [1, 1, 1]),
        (["one t", "wo"], ["one", "two"], None),
        ([" one"], ["one", "two"], None),
        ([" one", " two", " three"], ["one", "two"], None),
        ([" One"], ["one"], None),
    ],
)
def test_tokens_fall_into_words_or_not(tokens, words, counts):
    assert tokens_of_words(list(range(len(tokens))), words, lambda ids: "".join(tokens[i] for i in ids)) == counts


@pytest.mark.parametrize("ids", [[3], [3, 5, 3], [5, 5], [3, 5, 5, 3]])
@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_placed_as_on_the_best_of_all_paths(ids, seed):
    rng, n = np.random.default_rng(seed), 6
    logits = {label: rng.normal(size=n) for label in (None, 3, 5)}  # None: the blank
    paths = (p for p in itertools.product(logits, repeat=n) if [k for k, _ in itertools.groupby(p) if k] == ids)
    best = max(paths, key=lambda path: sum(logits[label][t] for t, label in enumerate(path)))
    runs = [list(run) for label, run in itertools.groupby(range(n), key=lambda t: best[t]) if label]
    surest = [max(run, key=lambda t, k=k: logits[k][t] - logits[None][t]) for k, run in zip(ids, runs, strict=True)]
    tokens = np.stack([logits[k] for k in ids], axis=1)
    assert token_places(tokens, logits[None], ids).tolist() == surest


@pytest.mark.parametrize(("n", "ids"), [(2, [3, 5, 3]), (2, [5, 5]), (1, [3, 5])])
def test_more_tokens_than_places_are_not_placed(n, ids):
    assert token_places(np.zeros((n, len(ids))), np.zeros(n), ids) is None


def test_only_quiet_gaps_are_cut():
    sound = np.ones(3000, np.float32)
    sound[900:1100] = 0
    sound[2000:2100] = 0.5  # softer, not quiet
    first, second = quiet_points(sound, [(700, 1300), (1800, 2300)], width=50)
    assert 900 <= first < 1100 and second is None
    assert quiet_points(np.zeros(3000, np.float32), [(700, 1300)], width=50) == [None]


def test_pieces_are_the_recording_one_after_another(assistant, projector, utterances, examples):
    n_pieces, n_words = 0, 0
    for utterance, example in zip(utterances, examples):
        pieces = pieces_of(assistant, projector, utterance, example)
        assert " ".join(words for words, _ in pieces) == utterance.text
        assert np.array_equal(np.concatenate([audio for _, audio in pieces]), utterance.load(RATE))
        n_pieces, n_words = n_pieces + len(pieces), n_words + len(utterance.text.split())
    assert len(utterances) < n_pieces <= n_words


def test_words_lie_in_the_piece_they_are_said_to_be_in(assistant, projector, utterances):
    """Two recordings with a second of silence between them: whatever else is cut, it is cut there."""
    one, two = (u.load(RATE) for u in utterances[:2])
    both = np.concatenate([one, np.zeros(RATE, np.float32), two])
    texts = [u.text for u in utterances[:2]]
    (example,) = make_examples(assistant.llm, [" ".join(texts)], [[assistant.features(both)]])
    pieces = pieces_of(assistant, projector, _Said(" ".join(texts), both), example)
    n_words = np.cumsum([len(words.split()) for words, _ in pieces]).tolist()
    n_samples = np.cumsum([len(audio) for _, audio in pieces])
    at = n_samples[n_words.index(len(texts[0].split()))]
    assert len(one) - 0.2 * RATE < at < len(one) + 1.2 * RATE


class _Said:
    def __init__(self, text, audio):
        self.text, self._audio = text, audio

    def load(self, _):
        return self._audio


@pytest.mark.parametrize("n_samples", [1, 3000, 20_000])
def test_what_is_joined_is_what_it_says_and_as_long_as_asked(n_samples):
    pieces = [(str(level), np.full(2000, level, np.float32)) for level in range(1, 6)]
    words, sound = join(pieces, n_samples, RATE, np.random.default_rng(0))
    inner = 2 * FADE_S * RATE  # a piece but for its ends
    assert all(np.sum(sound == float(word)) >= 2000 - inner for word in words.split())
    assert len(sound) <= max(n_samples, 2000) and len(words.split()) >= n_samples // 5000
    assert not sound[0] and np.abs(np.diff(sound)).max() < 0.1  # nothing clicks


def test_splices_are_new_sentences_of_known_words(assistant, projector, utterances, examples):
    made, again, other = (spliced(assistant, projector, utterances, examples, 8, seed, True) for seed in (0, 0, 1))
    known = {word for u in utterances for word in u.text.split()}
    texts = [assistant.llm.tokenizer.decode(assistant.llm.speech_tokens[e.tokens].tolist()).strip() for e in made]
    assert {word for text in texts for word in text.split()} <= known and len(set(texts)) > 1
    assert all(np.array_equal(a.features, b.features) and a.tokens == b.tokens for a, b in zip(made, again))
    assert [e.tokens for e in made] != [e.tokens for e in other]


def test_a_transcript_without_places_stays_whole(assistant, projector, utterances, examples):
    short = examples[0].__class__(examples[0].features[:4], examples[0].tokens, examples[0].token_lengths)
    ((words, audio),) = pieces_of(assistant, projector, utterances[0], short)
    assert words == utterances[0].text and np.array_equal(audio, utterances[0].load(RATE))
