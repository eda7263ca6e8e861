"""runtime/assistant.py on the shipped bundle: events, sessions, users, observers, refused audio.

Whether the answers are good is not tested here. Most are sampled: a greedy one might be empty.
"""

import contextlib
import shutil
import threading

import numpy as np
import pytest

from tiny_align.runtime import Answer, Assistant, Decoding, Event, NothingHeard, Token
from tiny_align.runtime import projectors as projectors_module
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.users import write_user_record
from tiny_align.runtime.errors import AudioError, BackendError, DataError, TinyAlignError, UserError
from tiny_align.runtime.speech_vocabulary import SPEECH_TOKENS
from tiny_align.runtime.stages import STAGES

DECODING = Decoding(max_tokens=16, temperature=2.0, seed=1)
RATE = 16_000  # Hz, the bundle's


def tokens(events):
    return [event.token for event in events]


@pytest.fixture
def long_speech(speech):
    """Longer than two windows."""
    return np.tile(speech, 1 + 120_000 // len(speech))[:120_000]


@pytest.fixture(scope="module")
def ana(bundle_path, make_user, tmp_path_factory):
    """A folder of users with a projector for Ana."""
    users = tmp_path_factory.mktemp("users")
    make_user(Bundle.open(bundle_path), users / "ana")
    return users


# --- whole recordings ---


@pytest.mark.parametrize("ask", ["stream", "stream_text"])
def test_events_join_to_the_answer(assistant, speech, ask):
    question = speech if ask == "stream" else "what is the time"
    stream = getattr(assistant, ask)
    answer_whole = getattr(assistant, ask.replace("stream", "answer"))
    events = list(stream(question, decoding=DECODING))
    answer = answer_whole(question, decoding=DECODING)
    assert "".join(event.text for event in events).strip() == answer.text
    assert tuple(tokens(events)) == answer.tokens
    assert all(isinstance(event, Token) and isinstance(event, Event) for event in events)
    assert answer.text == assistant.llm.tokenizer.decode(list(answer.tokens)).strip()


def test_event_times_increase_from_the_end_of_speech(assistant, speech):
    events = list(assistant.stream(speech, decoding=DECODING))
    times = [event.elapsed_s for event in events]
    assert times == sorted(times) and times[0] > 0


def test_an_answer_has_its_times_and_real_time_factor(assistant, speech):
    answer = assistant.answer(speech, decoding=DECODING)
    assert 0 < answer.ttft_s <= answer.seconds
    assert answer.audio_s == pytest.approx(len(speech) / RATE)
    assert answer.rtf == pytest.approx(answer.seconds / answer.audio_s)
    assert Answer("", (), 0.1, 0.1, 0.0).rtf == 0.0


def test_a_file_is_answered_as_its_samples(assistant, speech, voice_path):
    from_file = assistant.answer_file(voice_path / "train-000.flac", decoding=DECODING)
    assert from_file.tokens == assistant.answer(speech, decoding=DECODING).tokens


def test_features_and_soft_tokens_have_the_shapes_of_the_manifest(assistant, speech):
    manifest = assistant.bundle.manifest
    frame_s = manifest.encoder.frame_s
    features = assistant.features(speech)
    assert features.ndim == 2 and features.shape[1] == manifest.encoder.feature_size
    assert len(features) * frame_s < len(speech) / RATE + 2 * frame_s
    n_tokens, size = assistant.soft_tokens(features).shape
    assert 1 <= n_tokens <= len(features) and size == manifest.llm.hidden_size


def test_answer_soft_tokens_equals_answer(assistant, speech):
    soft_tokens = assistant.soft_tokens(assistant.features(speech))
    assert assistant.answer_soft_tokens(soft_tokens).tokens == assistant.answer(speech).tokens


def test_another_instruction_is_another_prompt(assistant, speech):
    """The answers may still agree."""
    soft_tokens = assistant.soft_tokens(assistant.features(speech))
    instruction = assistant.bundle.manifest.prompt.instruction
    default = assistant.llm.assemble(soft_tokens)
    same = assistant.llm.assemble(soft_tokens, instruction)
    other = assistant.llm.assemble(soft_tokens, "Say it again.")
    np.testing.assert_array_equal(default, same)
    assert default.shape != other.shape or not np.array_equal(default, other)


def test_answer_does_not_change_the_audio(assistant, speech):
    before = speech.copy()
    assistant.answer(speech, decoding=DECODING)
    np.testing.assert_array_equal(speech, before)


def test_a_stream_that_is_closed_early_does_not_change_the_next_answer(assistant, speech):
    stream = assistant.stream(speech, decoding=DECODING)
    first = next(stream)
    stream.close()
    assert assistant.answer(speech, decoding=DECODING).tokens[0] == first.token


# --- no word recognised ---


@pytest.fixture
def assistant_without_words(bundle_copy):
    """An assistant with an empty speech vocabulary: it recognises no word."""
    np.save(bundle_copy / SPEECH_TOKENS, np.zeros(0, np.int32))
    with Assistant.load(bundle_copy, threads=1) as loaded:
        yield loaded


def test_no_word_recognised_is_one_event_and_an_empty_answer(assistant_without_words, speech):
    (event,) = assistant_without_words.stream(speech)
    assert (
        isinstance(event, NothingHeard)
        and event.token is None
        and event.text == ""
        and event.elapsed_s > 0
    )
    answer = assistant_without_words.answer(speech)
    assert not answer.heard and answer.text == "" and answer.tokens == ()


def test_an_answer_to_words_is_no_nothing_event(assistant, speech):
    assert assistant.answer(speech).heard
    assert assistant.answer_text("stop the music").heard


# --- sessions ---


@pytest.mark.parametrize("size", [1, 333, 1_600, 7_919, 10**6])
def test_chunks_of_any_size_give_the_answer_to_the_whole(assistant, speech, size):
    short = speech[:6_400] if size == 1 else speech
    session = assistant.listen(decoding=DECODING)
    for start in range(0, len(short), size):
        session.push(short[start : start + size])
    assert tokens(session.finish()) == tokens(assistant.stream(short, decoding=DECODING))


def test_uneven_and_empty_chunks_give_the_answer_to_the_whole(assistant, speech):
    session = assistant.listen("Say it again.", DECODING)
    for chunk in np.split(speech, [0, 1, 18, 18, 4_003, 20_000]):
        session.push(chunk)
    assert tokens(session.finish()) == tokens(assistant.stream(speech, "Say it again.", DECODING))


def test_push_copies_the_chunk(assistant, speech):
    session = assistant.listen(decoding=DECODING)
    buffer = np.zeros(1_600, np.float32)
    whole = speech[: len(speech) // 1_600 * 1_600]
    for part in whole.reshape(-1, 1_600):
        buffer[:] = part
        session.push(buffer)
    assert tokens(session.finish()) == tokens(assistant.stream(whole, decoding=DECODING))


def test_a_second_turn_is_answered_as_the_first(assistant, speech):
    session = assistant.listen(decoding=DECODING)
    session.push(speech)
    first = tokens(session.finish())
    session.push(speech)
    assert tokens(session.finish()) == first  # the reference LLM knows one turn only


def test_reset_forgets_what_was_pushed(assistant, speech):
    session = assistant.listen(decoding=DECODING)
    session.push(np.full(RATE, 0.3, np.float32))
    session.reset()
    session.push(speech)
    assert tokens(session.finish()) == tokens(assistant.stream(speech, decoding=DECODING))


def test_two_sessions_answer_as_each_alone(assistant, speech):
    whole = tokens(assistant.stream(speech, decoding=DECODING))
    beginning = tokens(assistant.stream(speech[:16_000], decoding=DECODING))
    first = assistant.listen(decoding=DECODING)
    second = assistant.listen(decoding=DECODING)
    first.push(speech)
    second.push(speech[:16_000])
    both = list(zip(first.finish(), second.finish()))  # token by token in turn
    n = len(both)
    assert [event.token for event, _ in both] == whole[:n]
    assert [event.token for _, event in both] == beginning[:n]


@pytest.mark.parametrize(
    ("chunk", "got"),
    [
        (np.zeros(100, np.int16), r"int16 \(100,\)"),
        (np.zeros(100, np.float64), r"float64 \(100,\)"),
        (np.zeros((100, 2), np.float32), r"float32 \(100, 2\)"),
        ([0.0, 0.1], "list"),
        (b"\0\0", "bytes"),
    ],
)
def test_a_chunk_of_another_kind_is_refused_and_changes_nothing(assistant, speech, chunk, got):
    session = assistant.listen(decoding=DECODING)
    session.push(speech)
    message = rf"must be a float32 array of shape \(S,\), got {got}: convert it"
    with pytest.raises(AudioError, match=message):
        session.push(chunk)
    assert tokens(session.finish()) == tokens(assistant.stream(speech, decoding=DECODING))


def test_a_session_without_speech_is_refused(assistant):
    with pytest.raises(AudioError, match="is empty"):
        list(assistant.listen().finish())


# --- projectors and users ---


def test_swap_projector_changes_open_sessions_and_can_be_undone(bundle_path, ana, speech):
    with (
        Assistant.load(bundle_path, threads=1) as assistant,
        Assistant.load(bundle_path, "ana", users=ana, threads=1) as anas,
    ):
        features = assistant.features(speech)
        general = assistant.soft_tokens(features)
        session = assistant.listen(decoding=DECODING)
        session.push(speech[:9_000])
        assistant.swap_projector(assistant.bundle.projector("ana", ana))
        session.push(speech[9_000:])
        assert not np.array_equal(assistant.soft_tokens(features), general)
        np.testing.assert_allclose(
            assistant.soft_tokens(features), anas.soft_tokens(features), atol=1e-5
        )
        assert tokens(session.finish()) == tokens(anas.stream(speech, decoding=DECODING))
        assistant.swap_projector(assistant.bundle.projector())
        np.testing.assert_array_equal(assistant.soft_tokens(features), general)


@pytest.fixture(scope="module")
def users(bundle_path, make_user, tmp_path_factory):
    """Two users: Ana, and Ben, whose speech vocabulary is his own."""
    bundle = Bundle.open(bundle_path)
    folder = tmp_path_factory.mktemp("users")
    make_user(bundle, folder / "ana")
    make_user(bundle, folder / "ben", shift=-0.2)
    np.save(folder / "ben" / SPEECH_TOKENS, np.arange(0, 800, 2, dtype=np.int32)[::-1])
    write_user_record(folder / "ben", bundle.manifest, {})
    return folder


def test_sessions_speak_for_two_users_at_once(bundle_path, users, long_speech):
    """Pushed in turn, window by window, each is answered as if it were alone."""
    names = ("ana", "ben", "general", None)
    alone = {}
    for name in names:
        with Assistant.load(bundle_path, name, users=users, threads=1) as assistant:
            alone[name] = tokens(assistant.stream(long_speech, decoding=DECODING))
    assert alone["ana"] != alone["ben"] != alone[None] == alone["general"] != alone["ana"]

    with Assistant.load(bundle_path, users=users, threads=1) as assistant:
        sessions = {name: assistant.listen(decoding=DECODING, user=name) for name in names}
        for start in range(0, len(long_speech), 9_000):
            for session in sessions.values():
                session.push(long_speech[start : start + 9_000])
        answers = {name: session.finish() for name, session in sessions.items()}
        firsts = {name: next(answer).token for name, answer in answers.items()}
        for name, answer in answers.items():
            assert [firsts[name], *tokens(answer)] == alone[name], name


def test_a_session_keeps_its_user_when_the_default_is_swapped(bundle_path, users, speech):
    with Assistant.load(bundle_path, users=users, threads=1) as assistant:
        want = {
            name: tokens(assistant.stream(speech, decoding=DECODING, user=name))
            for name in ("ana", "ben", "general")
        }
        bens = assistant.listen(decoding=DECODING, user="ben")
        default = assistant.listen(decoding=DECODING)
        for session in (bens, default):
            session.push(speech[:9_000])
        assistant.swap_projector(assistant.bundle.projector("ana", users))
        for session in (bens, default):
            session.push(speech[9_000:])
        assert tokens(bens.finish()) == want["ben"]
        assert tokens(default.finish()) == want["ana"]
        assert (
            tokens(assistant.stream(speech, decoding=DECODING, user="general")) == want["general"]
        )


def test_every_way_to_answer_takes_a_user(bundle_path, users, speech, voice_path):
    with Assistant.load(bundle_path, "ana", users=users, threads=1) as assistant:
        ben = assistant.bundle.user_projector("ben", users)
        want = tuple(tokens(assistant.stream(speech, decoding=DECODING, user=ben)))
        assert assistant.answer(speech, decoding=DECODING, user="ben").tokens == want
        path = voice_path / "train-000.flac"
        assert assistant.answer_file(path, decoding=DECODING, user="ben").tokens == want
        anas = assistant.answer(speech, decoding=DECODING)
        assert assistant.answer(speech, decoding=DECODING, user="ana").tokens == anas.tokens != want
        with pytest.raises(UserError, match="no user 'eve'"):
            assistant.listen(user="eve")


def test_a_users_projector_is_loaded_once_until_it_is_trained_again(
    bundle_path, make_user, speech, tmp_path, monkeypatch
):
    load = projectors_module.load_runner
    loaded = []
    monkeypatch.setattr(
        projectors_module, "load_runner", lambda path, *a: loaded.append(path) or load(path, *a)
    )
    bundle = Bundle.open(bundle_path)
    ana = make_user(bundle, tmp_path / "ana")
    with Assistant.load(bundle, users=tmp_path, threads=1) as assistant:
        before = assistant.answer(speech, decoding=DECODING, user="ana").tokens
        assert assistant.answer(speech, decoding=DECODING, user="ana").tokens == before
        assert loaded == [ana / "projector.onnx"]
        shutil.rmtree(ana)
        make_user(bundle, ana, shift=-0.2)
        assert assistant.answer(speech, decoding=DECODING, user="ana").tokens != before
        assert loaded == [ana / "projector.onnx"] * 2


def test_swap_projector_loads_with_the_assistants_threads(bundle_path, monkeypatch):
    with Assistant.load(bundle_path, threads=1) as assistant:
        load = projectors_module.load_runner
        threads = []
        monkeypatch.setattr(
            projectors_module, "load_runner", lambda *a: threads.append(a[3]) or load(*a)
        )
        assistant.swap_projector(assistant.bundle.projector())
    assert threads == [1]


def test_a_failed_swap_leaves_the_old_projector(bundle_path, speech, tmp_path):
    with Assistant.load(bundle_path, threads=1) as assistant:
        before = assistant.answer(speech, decoding=DECODING).tokens
        (tmp_path / "projector.onnx").write_text("not a graph")
        with pytest.raises(BackendError, match="cannot load"):
            assistant.swap_projector(tmp_path / "projector.onnx")
        assert assistant.answer(speech, decoding=DECODING).tokens == before


def test_an_unknown_user_is_refused(bundle_path, ana):
    with pytest.raises(UserError, match=r"no user 'ben' .*known: ana"):
        Assistant.load(bundle_path, "ben", users=ana)


def test_an_unknown_backend_is_refused(bundle_path):
    with pytest.raises(BackendError, match="there is no backend 'cuda': choose one of onnxruntime"):
        Assistant.load(bundle_path, backend="cuda")


def test_a_closed_assistant_answers_nothing(bundle_path, speech):
    with Assistant.load(Bundle.open(bundle_path), threads=1) as assistant:
        assistant.answer(speech, decoding=DECODING)
    with pytest.raises(TinyAlignError, match="closed"):
        assistant.answer(speech)


# --- observing ---


class Recorder:
    """Notes which stages ran, and on which threads."""

    def __init__(self):
        self.names, self.threads = [], set()

    @contextlib.contextmanager
    def stage(self, name):
        self.names.append(name)
        self.threads.add(threading.current_thread().name)
        yield


@pytest.mark.parametrize("one_thread", [False, True])
def test_an_observer_sees_every_stage_and_changes_no_answer(assistant, speech, one_thread):
    want = tokens(assistant.stream(speech, decoding=DECODING))
    recorder = Recorder()
    with assistant.observe(recorder, one_thread=one_thread):
        assert tokens(assistant.stream(speech, decoding=DECODING)) == want
    assert set(recorder.names) == set(STAGES)
    assert recorder.names.count("text") == len(want)
    assert len(recorder.threads) == (1 if one_thread else 3)
    n_stages = len(recorder.names)
    assert tokens(assistant.stream(speech, decoding=DECODING)) == want
    assert len(recorder.names) == n_stages


def test_a_failure_is_the_same_for_an_observer(assistant, speech):
    with assistant.observe(Recorder(), one_thread=True):
        session = assistant.listen()
        session.push(speech[:1_000])
        with pytest.raises(AudioError, match="record longer"):
            list(session.finish())


# --- audio that is refused, and says why ---


def with_nan(speech):
    speech = speech.copy()
    speech[100] = np.nan
    return speech


BAD = {
    "NaN": (lambda a, s: with_nan(s), "NaN or infinite"),
    "infinite": (lambda a, s: np.append(s, np.float32(np.inf)), "NaN or infinite"),
    "silence": (lambda a, s: np.zeros(RATE, np.float32), "nothing was heard"),
    "0.05 s": (lambda a, s: s[:800], r"lasts 0\.050 s, expected at least"),
    "0.12 s": (lambda a, s: s[8_000:9_920], "expected at least .*: record longer"),
    "empty": (lambda a, s: s[:0], "is empty"),
    "integers": (lambda a, s: (s * 32767).astype(np.int16), "int16 samples"),
    "loud": (lambda a, s: s * np.float32(32768), "divide 16-bit samples"),
    "double": (lambda a, s: s.astype(np.float64), "float64 samples"),
    "stereo": (lambda a, s: np.stack([s, s], axis=1), "average the channels"),
    "a list": (lambda a, s: s.tolist(), "got list"),
}


@pytest.mark.parametrize(("make", "why"), BAD.values(), ids=BAD)
def test_bad_audio_is_refused(assistant, speech, make, why):
    with pytest.raises(AudioError, match=why):
        list(assistant.stream(make(assistant, speech)))


def test_the_longest_recording_is_answered(assistant, speech):
    _, _, max_frames = assistant.bundle.manifest.dims["frames"]
    longest = np.resize(speech, max_frames * assistant.bundle.manifest.front_end.hop_samples)
    answer = assistant.answer(longest, decoding=Decoding(max_tokens=1))
    assert answer.audio_s == pytest.approx(len(longest) / RATE)


def test_bad_text_is_refused(assistant):
    for text in ("", "ж"):
        with pytest.raises(DataError):
            list(assistant.stream_text(text))
