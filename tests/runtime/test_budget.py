"""What a bundle takes is known before it is loaded, and too little memory is refused with what to change."""

import os
import subprocess
import sys

import pytest

from tiny_align.runtime import Assistant
from tiny_align.runtime import budget as budget_module
from tiny_align.runtime.budget import BASE_BYTES, budget, cache_bytes
from tiny_align.runtime.bundle import Bundle
from tiny_align.runtime.errors import TinyAlignError

LOADED = r"""
import re, sys
from tiny_align.runtime import Assistant
from tiny_align.runtime.audio import read_audio
with Assistant.load(sys.argv[1], threads=1) as assistant:
    assistant.answer_file(sys.argv[2])
print(int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""


@pytest.fixture
def bundle(bundle_path):
    return Bundle.open(bundle_path, verify=False)


def test_a_conversation_takes_its_keys_and_values(bundle):
    spec = bundle.manifest.llm
    one = 2 * spec.n_layers * spec.n_kv_heads * spec.head_size * 4  # bytes of a position
    assert cache_bytes(bundle.manifest.graphs["llm"], "onnxruntime", 100) == 100 * one
    assert cache_bytes(bundle.manifest.graphs["llm"], "tensorrt", 100) == 2 * 100 * one


def test_the_weights_are_those_of_the_backends_graphs(bundle):
    """The LLM's graph for ONNX Runtime has no weights of its own: they are the plain one's."""
    shared = (bundle.path / "llm.onnx.data").stat().st_size
    for backend in ("onnxruntime", "tensorrt"):
        assert budget(bundle, backend, 64).weights["llm"] > shared


def test_it_is_enough(bundle, voice_path):
    """The peak of a process that loads the bundle and answers lies below, and above half of it."""
    line = [sys.executable, "-c", LOADED, str(bundle.path), str(sorted(voice_path.glob("test-*.flac"))[0])]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    peak = int(subprocess.run(line, capture_output=True, text=True, check=True, env=env).stdout)
    assert budget(bundle, "onnxruntime", bundle.manifest.llm.max_context).total / 2 < peak
    assert peak < budget(bundle, "onnxruntime", bundle.manifest.llm.max_context).total


def test_a_conversation_without_memory_is_refused_and_others_go_on(assistant, speech, monkeypatch):
    first = assistant.listen()
    first.push(speech)
    first.settle()
    monkeypatch.setattr(budget_module, "memory", lambda: {"MemAvailable": 1_000})
    with pytest.raises(TinyAlignError, match="one more conversation of 256 positions takes"):
        list(assistant.listen().say("hello"))
    assert [event.token for event in first.finish()]


def test_too_little_memory_is_refused_before_anything_is_loaded(bundle, monkeypatch):
    monkeypatch.setattr(budget_module, "memory", lambda: {"MemAvailable": BASE_BYTES})
    with pytest.raises(TinyAlignError, match=r"takes about \d+ MiB \(encoder .*114 MiB are available: ask"):
        Assistant.load(bundle)
