"""The speech vocabulary of an LLM with many tokens: the lists, and which rows are read.

The shipped bundle gets a table of 20,000 rows, and a list of the tokens of its own sentences but
for those of one word.
"""

import dataclasses
import json

import numpy as np
import pytest

from tiny_align.align.data.examples import make_examples
from tiny_align.align.data.rehearsal import read_rehearsal, write_rehearsal
from tiny_align.align.training.align_general import train_general
from tiny_align.align.training.align_user import align_user
from tiny_align.align.training.limits import TrainingLimits
from tiny_align.align.training.trainer import Trainer
from tiny_align.align.training.validation import Score
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.manifest import write_manifest
from tiny_align.runtime.errors import UserError
from tiny_align.runtime.llm import LanguageModel
from tiny_align.runtime.speech_vocabulary import SPEECH_TOKENS, SpeechVocabulary

ROWS = 20_000
WORD = "seven"  # one token; the general projector knows it, the list does not
N_TRAIN = 8
STEPS = 20


@pytest.fixture
def n_embedded(monkeypatch):
    """How many rows of the embedding table each call reads from now on, a list that grows."""
    embed = LanguageModel.embed
    numbers = []

    def watched(llm, tokens):
        numbers.append(len(tokens))
        return embed(llm, tokens)

    monkeypatch.setattr(LanguageModel, "embed", watched)
    return numbers


@pytest.fixture
def large(bundle_copy, assistant):
    """A bundle with ROWS tokens of which some hundreds are listed, WORD's not among them."""
    table = np.load(bundle_copy / "token_embeddings.npy")
    noise = np.random.default_rng(0).standard_normal((ROWS - len(table), table.shape[1]))
    more = (noise * table.std()).astype(np.float16)
    np.save(bundle_copy / "token_embeddings.npy", np.concatenate([table, more]))
    (word,) = token_ids(assistant, WORD)
    rehearsal = [e for e in read_rehearsal(bundle_copy / "replay.npz") if word not in e.tokens]
    known = set()
    for line in (bundle_copy / "sentences.txt").read_text().splitlines():
        known.update(token_ids(assistant, line))
    for example in rehearsal:
        known.update(example.tokens)
    listed = sorted(known - {word}, reverse=True)
    np.save(bundle_copy / SPEECH_TOKENS, np.array(listed, np.int32))
    placed = []
    for example in rehearsal:
        places = [listed.index(token) for token in example.tokens]
        placed.append(dataclasses.replace(example, tokens=places))
    write_rehearsal(bundle_copy / "replay.npz", placed)
    manifest = Bundle.open(bundle_copy, verify=False).manifest
    llm = dataclasses.replace(manifest.llm, vocabulary=ROWS)
    write_manifest(bundle_copy, dataclasses.replace(manifest, llm=llm))
    return Bundle.open(bundle_copy)


@pytest.fixture(scope="module")
def recordings(voice_path):
    """Some to train on and two to test, WORD in most of them."""
    from tiny_align.align.data.datasets import load_dataset, split_of

    def lacks_word(utterance):
        return WORD not in utterance.text.split()

    utterances = load_dataset(voice_path)
    train = sorted(split_of(utterances, "train"), key=lacks_word)
    test = sorted(split_of(utterances, "test"), key=lacks_word)
    assert not lacks_word(test[1])
    return train[:N_TRAIN] + test[:2]


def token_ids(assistant, text):
    return assistant.llm.encode_words(text)


def repeated_words(assistant, utterance):
    audio = utterance.load(assistant.sample_rate)
    return assistant.answer(audio, assistant.bundle.manifest.prompt.repeat_instruction).text.split()


# --- the vocabulary itself ---


def test_an_extended_vocabulary_keeps_every_place():
    vocabulary = SpeechVocabulary(
        np.array([7, 3, 5], np.int32), lambda token_ids: token_ids[:, None] * 1.0
    )
    longer = vocabulary.extended([5, 9, 7, 1, 9])
    assert longer.tokens.tolist() == [7, 3, 5, 9, 1] and longer.tokens.dtype == np.int32
    assert vocabulary.places([5, 7]) == [2, 0] and longer.places([5, 1, 7]) == [2, 4, 0]
    assert vocabulary.extended([3, 5]) is vocabulary and len(vocabulary) == 3
    np.testing.assert_array_equal(longer.table[:3], vocabulary.table)
    with pytest.raises(KeyError):
        vocabulary.places([9])


def test_the_table_is_made_once_and_on_first_use():
    n_made = []
    vocabulary = SpeechVocabulary(
        np.arange(4), lambda token_ids: n_made.append(len(token_ids)) or token_ids
    )
    assert n_made == []
    assert vocabulary.table is vocabulary.table and n_made == [4]


# --- without a list ---


def test_without_a_list_places_equal_token_ids(bundle_path):
    texts = ["seven eight", "what is the time"]
    features = [np.zeros((5, 3), np.float32)] * 2
    with Assistant.load(bundle_path, threads=1) as assistant:
        whole = assistant.speech_vocabulary
        examples, vocabulary = make_examples(assistant.llm, whole, texts, [features])
        assert [e.tokens for e in examples] == [token_ids(assistant, text) for text in texts]
        assert vocabulary is whole
        n_tokens = assistant.llm.spec.vocabulary
        np.testing.assert_array_equal(whole.tokens, np.arange(n_tokens))
        np.testing.assert_array_equal(whole.table, assistant.llm.embed(range(n_tokens)))


# --- with one ---


def test_new_tokens_go_to_the_end_and_old_places_stay(large):
    with Assistant.load(large, threads=1) as assistant:
        llm = assistant.llm
        before = assistant.speech_vocabulary
        text = f"{WORD} eight {WORD}"
        takes = [[np.zeros((5, 3), np.float32)]]
        (example,), after = make_examples(llm, before, [text], takes)
        np.testing.assert_array_equal(after.tokens, [*before.tokens, *token_ids(assistant, WORD)])
        assert example.tokens[0] == example.tokens[2] == len(before) > example.tokens[1]
        np.testing.assert_array_equal(after.tokens[example.tokens], token_ids(assistant, text))
        np.testing.assert_array_equal(after.table, llm.embed(after.tokens))
        assert make_examples(llm, after, [WORD], takes)[1] is after
        assert assistant.speech_vocabulary is before


def test_a_users_new_word_is_learnt_without_reading_the_whole_table(large, recordings, n_embedded):
    utterance = recordings[-1]
    with Assistant.load(large, threads=1) as assistant:
        assert WORD not in repeated_words(assistant, utterance)
    manifest = (large.path / "manifest.json").read_bytes()
    users = large.path / "users"
    limits = TrainingLimits(steps=STEPS, threads=1)
    align_user(large.path, recordings, "ana", users, limits, quiet=True)

    with Assistant.load(large, "ana", threads=1) as assistant:
        assert repeated_words(assistant, utterance).count(WORD) == utterance.text.split().count(
            WORD
        )
        np.testing.assert_array_equal(
            assistant.speech_vocabulary.tokens,
            [*large.speech_tokens(), *token_ids(assistant, WORD)],
        )
        assistant.swap_projector(large.projector())  # it knows the bundle's words only
        tokens = assistant.speech_vocabulary.tokens
        np.testing.assert_array_equal(tokens, large.speech_tokens())
        assert WORD not in repeated_words(assistant, utterance)
        assistant.swap_projector(large.projector("ana"))
        assert WORD in repeated_words(assistant, utterance)
    assert (large.path / "manifest.json").read_bytes() == manifest
    assert max(n_embedded) == len(large.speech_tokens()) + 1 < 800

    record = json.loads((users / "ana/user.json").read_text())
    assert SPEECH_TOKENS in record["files"]
    np.save(users / "ana" / SPEECH_TOKENS, large.speech_tokens())
    with pytest.raises(UserError, match="has changed: train 'ana' again"):
        Assistant.load(large, "ana", threads=1)


def test_a_second_training_keeps_the_tokens_of_the_first(large, recordings):
    """Ana's second training has no new word in it; neither has Bo's first."""
    users = large.path / "users"
    limits = TrainingLimits(steps=1, threads=1)
    train = recordings[:N_TRAIN]
    with_word = [u for u in train if WORD in u.text.split()][:2]
    without = [u for u in train if WORD not in u.text.split()][:2]
    trainings = (("ana", with_word, 1), ("ana", without, 1), ("bo", without, 0))
    for user, utterances, n_more in trainings:
        align_user(large.path, [*utterances, recordings[-1]], user, users, limits, quiet=True)
        n_tokens = len(large.speech_tokens(large.projector(user)))
        assert n_tokens == len(large.speech_tokens()) + n_more
    assert not (users / "bo" / SPEECH_TOKENS).exists()  # the bundle's is


def test_a_general_training_adds_the_tokens_of_its_texts(large, tmp_path, n_embedded, monkeypatch):
    """The list is empty at first, as after an export; a second training adds to it."""
    figures = iter(range(100, 0, -1))
    monkeypatch.setattr(
        Trainer, "validation_score", lambda trainer: Score(*[float(next(figures))] * 2)
    )  # always better
    np.save(large.path / SPEECH_TOKENS, np.zeros(0, np.int32))
    write_manifest(large.path, dataclasses.replace(large.manifest, projector_trained=False))
    rng = np.random.default_rng(0)
    size = large.manifest.encoder.feature_size
    limits = TrainingLimits(steps=1, threads=1)
    features = [rng.standard_normal((30, size)).astype(np.float32) for _ in range(10)]
    known = {}  # token token_ids, in order
    for words in (["turn on the light", "seven two"], ["two radio"]):
        texts = (words * 10)[:10]
        with Assistant.load(large.path, threads=1) as assistant:
            if not known:
                assert not len(assistant.soft_tokens(features[0]))  # no word can be recognised
            vocabulary = assistant.speech_vocabulary
            examples, vocabulary = make_examples(assistant.llm, vocabulary, texts, [features])
            train_general(assistant, examples, vocabulary, tmp_path / "work", limits, quiet=True)
            for text in texts:
                known.update(dict.fromkeys(token_ids(assistant, text)))
            rehearsed = [e.tokens for e in read_rehearsal(large.replay) if e.tokens]
            rehearsed_ids = [large.speech_tokens()[places].tolist() for places in rehearsed]
            assert rehearsed_ids == [token_ids(assistant, text) for text in texts]
        assert Bundle.open(large.path).speech_tokens().tolist() == list(known)
    assert max(n_embedded) < 20
