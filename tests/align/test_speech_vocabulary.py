"""Of a large vocabulary speech is read and trained on as listed tokens: the lists, and what is read of the table.

The shipped bundle is given a table of 20,000 rows and a list of the tokens of its own sentences, without one word.
"""

import dataclasses
import json

import numpy as np
import pytest

from tiny_align.align.data.examples import (
    embedding_table,
    extend_speech_vocabulary,
    make_examples,
)
from tiny_align.align.data.rehearsal import read_rehearsal, write_rehearsal
from tiny_align.align.training.align_general import train_general
from tiny_align.align.training.align_user import align_user
from tiny_align.align.training.limits import TrainingLimits
from tiny_align.align.training.trainer import Trainer
from tiny_align.align.training.validation import Score
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.bundle.bundle import SPEECH_TOKENS, Bundle
from tiny_align.runtime.bundle.manifest import write_manifest
from tiny_align.runtime.errors import UserError
from tiny_align.runtime.llm import LanguageModel

ROWS = 20_000
WORD = "seven"  # one token; the general projector knows it, the list does not
N_TRAIN, STEPS = 8, 20


@pytest.fixture
def asked(monkeypatch):
    """The numbers of rows of the embedding table that this process reads at once, as a list that grows."""
    numbers, embed = [], LanguageModel.embed
    monkeypatch.setattr(
        LanguageModel, "embed", lambda self, ids: (numbers.append(len(ids)), embed(self, ids))[1]
    )
    return numbers


@pytest.fixture
def large(bundle_copy, assistant):
    """A bundle with ROWS tokens of which some hundreds are listed, WORD's not among them."""
    table = np.load(bundle_copy / "token_embeddings.npy")
    more = (
        np.random.default_rng(0).standard_normal((ROWS - len(table), table.shape[1])) * table.std()
    )
    np.save(bundle_copy / "token_embeddings.npy", np.concatenate([table, more.astype(np.float16)]))
    (word,) = assistant.llm.encode_words(WORD)
    replayed = [e for e in read_rehearsal(bundle_copy / "replay.npz") if word not in e.tokens]
    known = {
        t
        for line in (bundle_copy / "sentences.txt").read_text().split("\n")
        if line
        for t in ids(assistant, line)
    }
    listed = sorted((known | {t for e in replayed for t in e.tokens}) - {word}, reverse=True)
    np.save(bundle_copy / SPEECH_TOKENS, np.array(listed, np.int32))
    write_rehearsal(
        bundle_copy / "replay.npz",
        [dataclasses.replace(e, tokens=[listed.index(t) for t in e.tokens]) for e in replayed],
    )
    manifest = Bundle.open(bundle_copy, verify=False).manifest
    write_manifest(
        bundle_copy,
        dataclasses.replace(manifest, llm=dataclasses.replace(manifest.llm, vocabulary=ROWS)),
    )
    return Bundle.open(bundle_copy)


@pytest.fixture(scope="module")
def recordings(voice_path):
    """Some to train on and two to test, WORD in most of them."""
    from tiny_align.align.data.datasets import load_dataset, split_of

    every = load_dataset(voice_path)
    train, test = (
        sorted(split_of(every, s), key=lambda u: WORD not in u.text.split())
        for s in ("train", "test")
    )
    assert WORD in test[1].text.split()
    return train[:N_TRAIN] + test[:2]


def ids(assistant, text):
    return assistant.llm.encode_words(text)


def repeated(assistant, utterance):
    audio = utterance.load(assistant.sample_rate)
    return assistant.answer(audio, assistant.bundle.manifest.prompt.repeat_instruction).text.split()


# --- without a list ---


def test_without_a_list_places_are_token_ids(bundle_path):
    texts, features = ["seven eight", "what is the time"], [np.zeros((5, 3), np.float32)] * 2
    with Assistant.load(bundle_path, threads=1) as assistant:
        examples = make_examples(assistant.llm, texts, [features])
        assert [e.tokens for e in examples] == [ids(assistant, text) for text in texts]
        vocabulary = assistant.llm.spec.vocabulary
        np.testing.assert_array_equal(assistant.llm.speech_tokens, np.arange(vocabulary))
        np.testing.assert_array_equal(
            embedding_table(assistant).numpy(), assistant.llm.embed(range(vocabulary))
        )


# --- with one ---


def test_new_tokens_go_to_the_end_and_old_places_stay(large):
    with Assistant.load(large, threads=1) as assistant:
        llm, before = assistant.llm, assistant.llm.speech_tokens
        (example,) = make_examples(llm, [f"{WORD} eight {WORD}"], [[np.zeros((5, 3), np.float32)]])
        np.testing.assert_array_equal(llm.speech_tokens, [*before, *ids(assistant, WORD)])
        assert example.tokens[0] == example.tokens[2] == len(before) > example.tokens[1]
        np.testing.assert_array_equal(
            llm.speech_tokens[example.tokens], ids(assistant, f"{WORD} eight {WORD}")
        )
        np.testing.assert_array_equal(
            embedding_table(assistant).numpy(), llm.embed(llm.speech_tokens)
        )
        extend_speech_vocabulary(llm, ids(assistant, WORD))
        assert len(llm.speech_tokens) == len(before) + 1


def test_a_persons_new_word_is_learnt_and_answered_and_the_table_is_never_read_whole(
    large, recordings, asked
):
    utterance = recordings[-1]
    with Assistant.load(large, threads=1) as assistant:
        assert WORD not in repeated(assistant, utterance)
    manifest = (large.path / "manifest.json").read_bytes()
    users, limits = large.path / "users", TrainingLimits(steps=STEPS, threads=1)
    align_user(large.path, recordings, "ana", users, limits, quiet=True)

    with Assistant.load(large, "ana", threads=1) as assistant:
        assert repeated(assistant, utterance).count(WORD) == utterance.text.split().count(WORD)
        np.testing.assert_array_equal(
            assistant.llm.speech_tokens, [*large.speech_tokens(), *ids(assistant, WORD)]
        )
        assistant.swap_projector(
            large.projector()
        )  # the bundle's own, which knows the bundle's words only
        np.testing.assert_array_equal(assistant.llm.speech_tokens, large.speech_tokens())
        assert WORD not in repeated(assistant, utterance)
        assistant.swap_projector(large.projector("ana"))
        assert WORD in repeated(assistant, utterance)
    assert (large.path / "manifest.json").read_bytes() == manifest
    assert max(asked) == len(large.speech_tokens()) + 1 < 800

    record = json.loads((users / "ana/user.json").read_text())
    assert SPEECH_TOKENS in record["files"]
    np.save(users / "ana" / SPEECH_TOKENS, large.speech_tokens())
    with pytest.raises(UserError, match="has changed: train 'ana' again"):
        Assistant.load(large, "ana", threads=1)


def test_what_a_person_said_before_stays_in_their_list(large, recordings):
    """Their second training has no new word in it; the first one's stay."""
    users, limits, test = large.path / "users", TrainingLimits(steps=1, threads=1), recordings[-1]
    said = [
        [u for u in recordings[:N_TRAIN] if (WORD in u.text.split()) == new][:2]
        for new in (True, False)
    ]
    for user, utterances, n_more in (("ana", said[0], 1), ("ana", said[1], 1), ("bo", said[1], 0)):
        align_user(large.path, [*utterances, test], user, users, limits, quiet=True)
        assert (
            len(large.speech_tokens(large.projector(user))) == len(large.speech_tokens()) + n_more
        )
    assert not (users / "bo" / SPEECH_TOKENS).exists()  # the bundle's is


def test_a_general_projector_brings_the_tokens_of_its_texts(large, tmp_path, asked, monkeypatch):
    """The list is empty at first, as in a bundle just exported; the second training adds to that of the first."""
    figures = iter(range(100, 0, -1))
    monkeypatch.setattr(
        Trainer, "validation_score", lambda trainer: Score(*[float(next(figures))] * 2)
    )  # always better
    np.save(large.path / SPEECH_TOKENS, np.zeros(0, np.int32))
    write_manifest(large.path, dataclasses.replace(large.manifest, projector_trained=False))
    rng, size, limits = (
        np.random.default_rng(0),
        large.manifest.encoder.feature_size,
        TrainingLimits(steps=1, threads=1),
    )
    features = [rng.standard_normal((30, size)).astype(np.float32) for _ in range(10)]
    known = []
    for words in (["turn on the light", "seven two"], ["two radio"]):
        texts = (words * 10)[:10]
        with Assistant.load(large.path, threads=1) as assistant:
            if not known:
                assert not len(assistant.soft_tokens(features[0]))  # nothing to be heard yet
            examples = make_examples(assistant.llm, texts, [features])
            train_general(assistant, examples, tmp_path / "work", limits, quiet=True)
            known = list(
                dict.fromkeys([*known, *(t for text in texts for t in ids(assistant, text))])
            )
            replayed = [
                large.speech_tokens()[e.tokens].tolist()
                for e in read_rehearsal(large.replay)
                if e.tokens
            ]
            assert replayed == [ids(assistant, text) for text in texts]
        assert Bundle.open(large.path).speech_tokens().tolist() == known
    assert max(asked) < 20
