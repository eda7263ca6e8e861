"""benchmarks.streaming: its figures are those asked for, and a soak gives the same from the same seed."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="the benchmark measures quality too")

from tiny_align.benchmarks.standard import streaming
from tiny_align.runtime.bundle.bundle import Bundle


def rows(threads, ttft, whole):
    return [
        {
            "threads": threads,
            "speech_s": s,
            "ttft_s": ttft[s],
            "whole_ttft_s": whole,
            "rtf": 0.1 * threads,
        }
        for s in (3, 10, 30)
    ]


def test_ratios_are_the_worst_of_all_threads():
    both = rows(1, {3: 2.0, 10: 1.0, 30: 2.0}, 10.0) + rows(2, {3: 1.0, 10: 3.0, 30: 1.5}, 6.0)
    figures = streaming.ratios(both)
    assert figures == {
        "ttft_30s_over_3s": 1.5,
        "ttft_10s_streaming_over_whole": 0.5,
        "rtf": pytest.approx(0.1),
    }


def test_a_pace_gives_so_many_soft_tokens_however_they_come():
    table, vectors = np.eye(7, dtype=np.float32), np.zeros((100, 3), np.float32)
    whole, parts = streaming.Paced(table, 12.5 / 2.5), streaming.Paced(table, 12.5 / 2.5)
    assert len(whole.push(vectors)) == 20
    assert sum(len(parts.push(part)) for part in np.array_split(vectors, 9)) == 20


def test_a_soak_is_reproducible_and_every_turn_ends(bundle_path, speech):
    clips = [speech[: 9_000 + 2_000 * i] for i in range(10)]
    once, again = (streaming.soak(Bundle.open(bundle_path), clips, 0.02, 5, 1) for _ in range(2))
    assert sum(once["turns"].values()) >= 5 and once["turns"]["cancelled"] >= 1
    assert once["digest"] == again["digest"] and once["turns"] == again["turns"]
    assert len(set(once["threads"])) == 1 and once["handles"][0] == once["handles"][1]
