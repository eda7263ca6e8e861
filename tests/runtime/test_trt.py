"""runtime/trt.py on an emulation of TensorRT and CUDA that computes (trt_emulation.py)."""

import sys
from pathlib import Path

import numpy as np
import pytest
import trt_emulation

from tiny_align.engines.build import build_engines
from tiny_align.runtime import Assistant, Decoding
from tiny_align.runtime import trt as trt_module
from tiny_align.runtime.audio import read_audio
from tiny_align.runtime.backend import Decoder, load_decoder, load_runner
from tiny_align.runtime.bundle import Bundle
from tiny_align.runtime.errors import BackendError
from tiny_align.runtime.llm import LanguageModel
from tiny_align.runtime.ort import OrtRunner

N_UTTERANCES = 20
RATE = 16_000  # Hz, the bundle's


class Plain(Decoder):
    """The plain graph of the LLM in ONNX Runtime, its cache passed through numpy: what TensorRT is compared with.

    The fused graph that ONNX Runtime takes rounds activations elsewhere, so that a near-tie may fall differently.
    """

    def __init__(self, bundle: Bundle):
        self.spec = bundle.manifest.graphs["llm"]
        self.runner = OrtRunner(bundle.graph("llm"), self.spec, 1)

    def open_cache(self, capacity):
        return {}

    def read(self, embeddings, cache, past):
        for tensor in self.spec.inputs[1:] if past == 0 else ():
            cache[tensor.name] = np.zeros([0 if isinstance(n, str) else n for n in tensor.shape], tensor.dtype)
        out = self.runner({"inputs_embeds": embeddings[None], **cache})
        cache.update({name.replace("present", "past"): value for name, value in out.items() if name != "logits"})
        return out["logits"][0, 0]


@pytest.fixture(scope="module")
def machine():
    """The emulated machine's memory."""
    with pytest.MonkeyPatch.context() as patch:
        yield trt_emulation.install(patch)


@pytest.fixture(scope="module")
def bundle(bundle_path, tmp_path_factory, machine):
    """The shipped bundle with engines."""
    import shutil

    target = tmp_path_factory.mktemp("trt") / "bundle"
    shutil.copytree(bundle_path, target, ignore=shutil.ignore_patterns("users", "engines"))
    build_engines(Bundle.open(target))
    yield Bundle.open(target)
    shutil.rmtree(target)


@pytest.fixture(scope="module")
def ana(bundle, make_user):
    """The projector of a person."""
    make_user(bundle, bundle.path / "users/ana")
    return bundle.projector("ana")


@pytest.fixture(scope="module")
def plain(bundle):
    """The assistant that TensorRT must answer like: ONNX Runtime on the plain graphs."""
    with Assistant.load(bundle, threads=1) as assistant:
        assistant.llm = LanguageModel(bundle, Plain(bundle))
        yield assistant


@pytest.fixture
def tensorrt(bundle):
    with Assistant.load(bundle, backend="tensorrt") as assistant:
        yield assistant


@pytest.fixture(scope="module")
def recordings(voice_path):
    return [read_audio(p, RATE) for p in sorted(voice_path.glob("test-*.flac"))[:N_UTTERANCES]]


# --- the same answers ---


def test_twenty_utterances_are_answered_token_for_token_with_a_hot_swap_in_between(
    tensorrt, plain, recordings, bundle, ana
):
    assert len(recordings) == N_UTTERANCES
    answers = set()
    for n, audio in enumerate(recordings):
        if n % 5 == 0:  # the general projector, Ana's, the general one, Ana's
            for assistant in (tensorrt, plain):
                assistant.swap_projector(ana if n % 10 else bundle.projector())
        got, want = tensorrt.answer(audio), plain.answer(audio)
        assert got.tokens == want.tokens, f"utterance {n}: {got.text!r}, expected {want.text!r}"
        answers.add(got.tokens)
    assert len(answers) > N_UTTERANCES / 2  # they are about what was said
