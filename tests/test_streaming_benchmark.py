"""benchmarks/standard/streaming.py: ratios, readers for untrained projectors, the soak."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="the benchmark measures quality too")

from tiny_align.benchmarks.standard import streaming
from tiny_align.runtime.bundle.bundle import Bundle


def make_rows(threads: int, ttft_s: dict[int, float], whole_ttft_s: float) -> list[dict]:
    """What `measure` returns, of three lengths of speech."""
    rows = []
    for speech_s, seconds in ttft_s.items():
        rows.append(
            {
                "threads": threads,
                "speech_s": speech_s,
                "ttft_s": seconds,
                "whole_ttft_s": whole_ttft_s,
                "rtf": 0.1 * threads,
            }
        )
    return rows


def test_ratios_are_the_worst_over_the_numbers_of_threads():
    rows = make_rows(1, {3: 2.0, 10: 1.0, 30: 2.0}, 10.0)
    rows += make_rows(2, {3: 1.0, 10: 3.0, 30: 1.5}, 6.0)
    assert streaming.ratios(rows) == {
        "ttft_30s_over_3s": 1.5,
        "ttft_10s_streaming_over_whole": 0.5,
        "rtf": pytest.approx(0.1),
    }


def test_a_paced_reader_gives_the_same_number_of_soft_tokens_for_any_pieces():
    table = np.eye(7, dtype=np.float32)
    vectors = np.zeros((100, 3), np.float32)
    whole = streaming.PacedReader(table, 12.5 / 2.5)
    in_pieces = streaming.PacedReader(table, 12.5 / 2.5)
    assert len(whole.push(vectors)) == 20
    n_tokens = sum(len(in_pieces.push(piece)) for piece in np.array_split(vectors, 9))
    assert n_tokens == 20


def test_a_paced_assistant_answers_in_windows_and_at_once(bundle_path, speech):
    bundle = Bundle.open(bundle_path)
    for windows in (True, False):
        with streaming.load_assistant(bundle, windows, threads=1, pace=2.5) as assistant:
            soft_tokens = assistant.soft_tokens(assistant.features(speech))
            assert len(soft_tokens) == pytest.approx(2.5 * len(speech) / 16_000, abs=1)
            assert assistant.answer(speech, decoding=streaming.ONE_TOKEN).tokens


def test_a_soak_is_reproducible_and_leaves_no_thread_or_handle(bundle_path, speech):
    recordings = [speech[: 9_000 + 2_000 * i] for i in range(10)]
    bundle = Bundle.open(bundle_path)
    first = streaming.soak(bundle, recordings, hours=0.02, seed=5, threads=1)
    second = streaming.soak(bundle, recordings, hours=0.02, seed=5, threads=1)
    assert sum(first["turns"].values()) >= 5
    assert first["turns"]["cancelled"] >= 1
    assert first["turns"] == second["turns"]
    assert first["digest"] == second["digest"]
    assert len(set(first["threads"])) == 1
    assert first["handles"][0] == first["handles"][1]
