"""runtime/assistant.py on the shipped bundle: events, streaming sessions, other projectors, audio that is refused.

What the answers say is not judged here. Sampling makes them lively where a greedy answer might be empty.
"""

import numpy as np
import pytest

from tiny_align.runtime import Answer, Assistant, Decoding
from tiny_align.runtime import assistant as assistant_module
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.errors import AudioError, BackendError, DataError, TinyAlignError, UserError
from tiny_align.runtime.readout import CtcReader

DECODING = Decoding(max_tokens=16, temperature=2.0, seed=1)
RATE = 16_000  # Hz, the bundle's


def tokens(events):
    return [event.token for event in events]


@pytest.fixture(scope="module")
def ana(bundle_path, make_user, tmp_path_factory):
    """The users folder in which Ana has a projector of her own."""
    users = tmp_path_factory.mktemp("users")
    make_user(Bundle.open(bundle_path), users / "ana")
    return users


# --- whole recordings ---


@pytest.mark.parametrize("ask", ["stream", "stream_text"])
def test_events_join_to_the_answer(assistant, speech, ask):
    said = speech if ask == "stream" else "what is the time"
    events = list(getattr(assistant, ask)(said, decoding=DECODING))
    answer = getattr(assistant, ask.replace("stream", "answer"))(said, decoding=DECODING)
    assert "".join(event.text for event in events).strip() == answer.text
    assert tuple(tokens(events)) == answer.tokens
    assert answer.text == assistant.llm.tokenizer.decode(list(answer.tokens)).strip()


def test_events_carry_the_time_since_the_speech_ended(assistant, speech):
    events = list(assistant.stream(speech, decoding=DECODING))
    times = [event.elapsed_s for event in events]
    assert times == sorted(times) and times[0] > 0


def test_an_answer_carries_its_times(assistant, speech):
    answer = assistant.answer(speech, decoding=DECODING)
    assert 0 < answer.ttft_s <= answer.seconds and answer.audio_s == pytest.approx(
        len(speech) / RATE
    )
    assert answer.rtf == pytest.approx(answer.seconds / answer.audio_s)
    assert Answer("", (), 0.1, 0.1, 0.0).rtf == 0.0


def test_a_file_is_answered_as_its_samples(assistant, speech, voice_path):
    from_file = assistant.answer_file(voice_path / "train-000.flac", decoding=DECODING)
    assert from_file.tokens == assistant.answer(speech, decoding=DECODING).tokens


def test_the_stages_have_the_shapes_of_the_manifest(assistant, speech):
    manifest = assistant.bundle.manifest
    features = assistant.features(speech)
    assert features.ndim == 2 and features.shape[1] == manifest.encoder.feature_size
    assert (
        features.shape[0] * manifest.encoder.frame_s
        < len(speech) / RATE + 2 * manifest.encoder.frame_s
    )
    n_tokens, size = assistant.soft_tokens(features).shape
    assert 1 <= n_tokens <= len(features) and size == manifest.llm.hidden_size


def test_soft_tokens_at_hand_are_answered_as_their_speech(assistant, speech):
    soft_tokens = assistant.soft_tokens(assistant.features(speech))
    assert assistant.answer_soft_tokens(soft_tokens).tokens == assistant.answer(speech).tokens


def test_the_instruction_reaches_the_llm(assistant, speech):
    """Other words around the same speech, other logits: the answers may still agree."""
    soft_tokens = assistant.soft_tokens(assistant.features(speech))
    default, given, other = (
        assistant.llm.assemble(soft_tokens, i)
        for i in (None, assistant.bundle.manifest.prompt.instruction, "Say it again.")
    )
    np.testing.assert_array_equal(default, given)
    assert default.shape != other.shape or not np.array_equal(default, other)


def test_the_callers_array_is_not_changed(assistant, speech):
    kept = speech.copy()
    assistant.answer(speech, decoding=DECODING)
    np.testing.assert_array_equal(speech, kept)


def test_a_stream_may_be_left_early(assistant, speech):
    stream = assistant.stream(speech, decoding=DECODING)
    first = next(stream)
    stream.close()
    assert assistant.answer(speech, decoding=DECODING).tokens[0] == first.token


# --- nothing said ---


@pytest.fixture
def deaf(assistant, monkeypatch):
    """An assistant that finds no word in anything."""
    size = assistant.bundle.manifest.llm.hidden_size
    monkeypatch.setattr(
        assistant, "reader", lambda: CtcReader(np.zeros((0, size), np.float32), 1.0)
    )
    return assistant


def test_nothing_heard_is_an_event_and_no_answer(deaf, speech):
    (event,) = deaf.stream(speech)
    assert event.token is None and event.text == "" and event.elapsed_s > 0
    answer = deaf.answer(speech)
    assert not answer.heard and answer.text == "" and answer.tokens == ()


def test_words_are_heard(assistant, speech):
    assert assistant.answer(speech).heard and assistant.answer_text("stop the music").heard


# --- sessions ---


@pytest.mark.parametrize("size", [1, 333, 1_600, 7_919, 10**6])
def test_chunks_of_any_size_are_answered_as_the_whole(assistant, speech, size):
    short = speech[:6_400] if size == 1 else speech
    session = assistant.listen(decoding=DECODING)
    for start in range(0, len(short), size):
        session.push(short[start : start + size])
    assert tokens(session.finish()) == tokens(assistant.stream(short, decoding=DECODING))


def test_chunks_of_uneven_sizes_and_empty_ones(assistant, speech):
    session = assistant.listen("Say it again.", DECODING)
    for chunk in np.split(speech, [0, 1, 18, 18, 4_003, 20_000]):
        session.push(chunk)
    assert tokens(session.finish()) == tokens(assistant.stream(speech, "Say it again.", DECODING))


def test_the_callers_buffer_may_be_used_again(assistant, speech):
    session, buffer = assistant.listen(decoding=DECODING), np.zeros(1_600, np.float32)
    whole = speech[: len(speech) // 1_600 * 1_600]
    for part in whole.reshape(-1, 1_600):
        buffer[:] = part
        session.push(buffer)
    assert tokens(session.finish()) == tokens(assistant.stream(whole, decoding=DECODING))


def test_speech_after_the_answer_is_another_turn(assistant, speech):
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


def test_sessions_do_not_hear_each_other(assistant, speech):
    one, two = assistant.listen(decoding=DECODING), assistant.listen(decoding=DECODING)
    one.push(speech)
    two.push(speech[:16_000])
    both = list(zip(one.finish(), two.finish()))  # token by token in turn
    assert [a.token for a, _ in both] == tokens(assistant.stream(speech, decoding=DECODING))[
        : len(both)
    ]
    assert [b.token for _, b in both] == tokens(
        assistant.stream(speech[:16_000], decoding=DECODING)
    )[: len(both)]


@pytest.mark.parametrize(
    ("chunk", "given"),
    [
        (np.zeros(100, np.int16), r"int16 \(100,\)"),
        (np.zeros(100, np.float64), r"float64 \(100,\)"),
        (np.zeros((100, 2), np.float32), r"float32 \(100, 2\)"),
        ([0.0, 0.1], "list"),
        (b"\0\0", "bytes"),
    ],
)
def test_a_chunk_of_another_kind_is_refused(assistant, speech, chunk, given):
    session = assistant.listen(decoding=DECODING)
    session.push(speech)
    with pytest.raises(
        AudioError, match=rf"must be a float32 array of shape \(S,\), got {given}: convert it"
    ):
        session.push(chunk)
    assert tokens(session.finish()) == tokens(
        assistant.stream(speech, decoding=DECODING)
    )  # nothing was spoiled


def test_a_session_without_speech_is_refused(assistant):
    with pytest.raises(AudioError, match="is empty"):
        list(assistant.listen().finish())


# --- projectors ---


def test_another_projector_is_another_answer_and_sessions_go_on(bundle_path, ana, speech):
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


def test_another_projector_keeps_to_the_threads_given(bundle_path, monkeypatch):
    with Assistant.load(bundle_path, threads=1) as assistant:
        load, threads = assistant_module.load_runner, []
        monkeypatch.setattr(
            assistant_module, "load_runner", lambda *a: threads.append(a[3]) or load(*a)
        )
        assistant.swap_projector(assistant.bundle.projector())
    assert threads == [1]


def test_a_projector_that_cannot_be_loaded_leaves_the_old_one(bundle_path, speech, tmp_path):
    with Assistant.load(bundle_path, threads=1) as assistant:
        before = assistant.answer(speech, decoding=DECODING).tokens
        (tmp_path / "projector.onnx").write_text("not a graph")
        with pytest.raises(BackendError, match="cannot load"):
            assistant.swap_projector(tmp_path / "projector.onnx")
        assert assistant.answer(speech, decoding=DECODING).tokens == before


def test_an_unknown_person_is_refused(bundle_path, ana):
    with pytest.raises(UserError, match=r"no user 'ben' .*known: ana"):
        Assistant.load(bundle_path, "ben", users=ana)


def test_an_unknown_backend_is_refused_and_never_replaced(bundle_path):
    with pytest.raises(BackendError, match="there is no backend 'cuda': choose one of onnxruntime"):
        Assistant.load(bundle_path, backend="cuda")


def test_it_is_a_context_manager_and_closes(bundle_path, speech):
    with Assistant.load(Bundle.open(bundle_path), threads=1) as assistant:
        assistant.answer(speech, decoding=DECODING)
    with pytest.raises(TinyAlignError, match="closed"):
        assistant.answer(speech)


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
    "0.12 s": (lambda a, s: s[8_000:9_920], "at least .* needed: record longer"),
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
    _, _, greatest = assistant.bundle.manifest.dims["frames"]
    longest = np.resize(speech, greatest * assistant.bundle.manifest.front_end.hop_samples)
    assert assistant.answer(longest, decoding=Decoding(max_tokens=1)).audio_s == pytest.approx(
        len(longest) / RATE
    )


def test_bad_text_is_refused(assistant):
    for text in ("", "ж"):
        with pytest.raises(DataError):
            list(assistant.stream_text(text))
