"""runtime/backends/tensorrt.py on an emulation of TensorRT and CUDA that computes
(support/trt_emulation.py).
"""

import ctypes
import dataclasses
import gc
import inspect
import itertools
import json
import os
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from tests.support import trt_emulation
from tiny_align.engines.build import build_engines
from tiny_align.engines.plain_decoder import PlainDecoder
from tiny_align.runtime import Assistant, Decoding
from tiny_align.runtime.audio.samples import read_audio
from tiny_align.runtime.backends import cuda_memory, tensorrt_engine
from tiny_align.runtime.backends import tensorrt as trt_module
from tiny_align.runtime.backends.base import TOPK_LOGITS, Chain
from tiny_align.runtime.backends.registry import load_decoder, load_runner
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.manifest import write_manifest
from tiny_align.runtime.errors import BackendError
from tiny_align.runtime.llm import Cache, LanguageModel

N_UTTERANCES = 20
RATE = 16_000  # Hz, the bundle's
SIZE = 192  # D of its LLM


def plain_decoder(bundle: Bundle) -> PlainDecoder:
    """What TensorRT is compared with.

    The fused graph rounds differently, which may decide a near-tie.
    """
    return PlainDecoder(bundle.graph("llm"), bundle.manifest.graphs["llm"], 1)


@pytest.fixture(scope="module")
def machine():
    """The emulated machine's memory."""
    with pytest.MonkeyPatch.context() as patch:
        yield trt_emulation.install(patch)


@pytest.fixture(scope="module")
def bundle(bundle_path, tmp_path_factory, machine):
    """The shipped bundle with engines."""
    target = tmp_path_factory.mktemp("trt") / "bundle"
    shutil.copytree(bundle_path, target, ignore=shutil.ignore_patterns("users", "engines"))
    build_engines(Bundle.open(target))
    yield Bundle.open(target)
    shutil.rmtree(target)


@pytest.fixture(scope="module")
def ana(bundle, make_user):
    """The projector of a user without engines."""
    make_user(bundle, bundle.path / "users/ana")
    return bundle.projector("ana")


@pytest.fixture(scope="module")
def ben(bundle, make_user):
    """The projector of a user with an engine of their own."""
    folder = make_user(bundle, bundle.path / "users/ben", shift=-0.2)
    build_engines(bundle.for_user(folder), graphs=["projector"])
    return bundle.projector("ben")


@pytest.fixture(scope="module")
def onnxruntime(bundle):
    """ONNX Runtime on the plain graphs, as `plain` has it."""
    with Assistant.load(bundle, threads=1) as assistant:
        assistant.llm = LanguageModel(bundle, plain_decoder(bundle))
        yield assistant


@pytest.fixture
def plain(onnxruntime, bundle):
    """The assistant that TensorRT must answer like, with the general projector at first."""
    yield onnxruntime
    onnxruntime.swap_projector(bundle.projector())


@pytest.fixture
def tensorrt(bundle):
    with Assistant.load(bundle, backend="tensorrt") as assistant:
        yield assistant


@pytest.fixture(scope="module")
def recordings(voice_path):
    return [read_audio(p, RATE) for p in sorted(voice_path.glob("test-*.flac"))[:N_UTTERANCES]]


# --- the same answers ---


def test_answers_equal_onnx_runtimes_before_and_after_each_swap(
    tensorrt, plain, recordings, bundle, ana
):
    answers = set()
    for n, audio in enumerate(recordings[:8]):
        if n % 2 == 0:  # the general projector, Ana's, the general one, Ana's
            for assistant in (tensorrt, plain):
                assistant.swap_projector(ana if n % 4 else bundle.projector())
        got, want = tensorrt.answer(audio), plain.answer(audio)
        assert got.tokens == want.tokens, f"utterance {n}: {got.text!r}, expected {want.text!r}"
        answers.add(got.tokens)
    assert len(answers) > 4  # they depend on the recording


def test_conversations_with_hot_swaps_equal_onnx_runtimes_token_for_token(
    tensorrt, plain, recordings, ana, ben
):
    """Four conversations of five turns, taking turns.

    The projector is swapped twice while all are open.
    """
    assert len(recordings) == N_UTTERANCES
    swaps = {7: ana, 14: ben}  # by refit; an engine of their own
    conversations = {assistant: [Cache() for _ in range(4)] for assistant in (tensorrt, plain)}
    for turn, audio in enumerate(recordings):
        answers = []
        for assistant, caches in conversations.items():
            if turn in swaps:
                assistant.swap_projector(swaps[turn])
            prompt = assistant.llm.assemble(assistant.soft_tokens(assistant.features(audio)))
            answer = assistant.llm.generate(prompt, Decoding(max_tokens=16), caches[turn % 4])
            answers.append(list(answer))
        assert answers[0] == answers[1], f"turn {turn}"
    for got, want in zip(*conversations.values()):
        assert got.length == want.length > 80


def test_two_users_at_once_are_answered_as_by_onnx_runtime(tensorrt, plain, speech, ana, ben):
    """Ana's projector is refitted, Ben's has an engine; their chunks and tokens take turns."""
    chunks = np.array_split(np.tile(speech, 3), 12)
    answers = []
    for assistant in (tensorrt, plain):
        anas = assistant.listen(user="ana")
        bens = assistant.listen(user="ben")
        for chunk in chunks:
            anas.push(chunk)
            bens.push(chunk)
        pairs = list(itertools.zip_longest(anas.finish(), bens.finish()))
        answers.append([[event and event.token for event in pair] for pair in pairs])
    assert answers[0] == answers[1]
    assert any(ana_token != ben_token for ana_token, ben_token in answers[0])


@pytest.mark.parametrize("user", ["ana", "ben"])
def test_a_swap_during_an_answer_does_not_change_it(tensorrt, recordings, user, request):
    want = tensorrt.answer(recordings[0]).tokens
    answer = tensorrt.stream(recordings[0])
    begun = [next(answer).token for _ in range(3)]
    tensorrt.swap_projector(request.getfixturevalue(user))
    assert tuple(begun + [event.token for event in answer]) == want


def test_every_stage_equals_onnx_runtimes(tensorrt, plain, speech):
    features = tensorrt.features(speech)
    np.testing.assert_array_equal(features, plain.features(speech))
    np.testing.assert_array_equal(tensorrt.soft_tokens(features), plain.soft_tokens(features))


def test_the_topk_equals_the_plain_graphs_at_every_step(decoder, bundle):
    np.testing.assert_array_equal(run_in_steps(decoder), run_in_steps(plain_decoder(bundle)))


def test_sampling_from_the_topk_equals_sampling_from_all_logits(tensorrt, plain):
    decoding = Decoding(max_tokens=12, temperature=2.0, top_k=20, seed=3)
    prompt = plain.llm.assemble(plain.llm.embed(plain.llm.encode_words("what time is it")))
    got, want = (list(a.llm.generate(prompt, decoding)) for a in (tensorrt, plain))
    assert got == want != list(plain.llm.generate(prompt, Decoding(max_tokens=12)))


def test_a_top_k_beyond_the_graphs_is_refused(tensorrt):
    hot = Decoding(temperature=1.0, top_k=100)
    with pytest.raises(
        BackendError,
        match=r"expected a top_k of at most 64, .* the LLM's graph gives, got 100: ask for fewer",
    ):
        tensorrt.answer_text("what time is it", decoding=hot)


def test_a_graph_without_topk_gives_all_logits(bundle_path, tmp_path, machine):
    """A bundle of an earlier export.

    Its manifest has no such outputs, and all logits are fetched.
    """
    target = tmp_path / "bundle"
    shutil.copytree(bundle_path, target, ignore=shutil.ignore_patterns("users", "engines"))
    bundle = without_topk(target)
    build_engines(bundle, graphs=["llm"])
    path = bundle.graph("llm")
    spec = bundle.manifest.graphs["llm"]
    with load_decoder(path, spec, "tensorrt", bundle=bundle) as decoder:
        np.testing.assert_array_equal(run_in_steps(decoder), run_in_steps(plain_decoder(bundle)))
        scores = decoder.run(np.zeros((1, SIZE), np.float32), decoder.open_cache(8), 0)
        assert scores.logits.shape == (800,)
    shutil.rmtree(target)


def without_topk(folder: Path) -> Bundle:
    """Take the top k out of a bundle's LLM."""
    onnx = pytest.importorskip("onnx")
    bundle = Bundle.open(folder)
    model = onnx.load(str(bundle.graph("llm")), load_external_data=False)
    topk = next(node for node in model.graph.node if node.output[0] == TOPK_LOGITS)
    model.graph.node.remove(topk)
    for value in [v for v in model.graph.output if v.name in topk.output]:
        model.graph.output.remove(value)
    onnx.save(model, str(bundle.graph("llm")))
    spec = bundle.manifest.graphs["llm"]
    outputs = tuple(tensor for tensor in spec.outputs if tensor.name not in topk.output)
    graphs = {**bundle.manifest.graphs, "llm": dataclasses.replace(spec, outputs=outputs)}
    manifest = dataclasses.replace(bundle.manifest, graphs=graphs)
    return Bundle(folder, write_manifest(folder, manifest))


@pytest.fixture
def runners(bundle):
    """Encoder and projector on TensorRT."""
    with load(bundle, "encoder") as encoder, load(bundle, "projector") as projector:
        yield encoder, projector


def load(bundle: Bundle, name: str):
    return load_runner(bundle.graph(name), bundle.manifest.graphs[name], "tensorrt", bundle=bundle)


FRAMES = {
    "input_features": np.random.default_rng(1).standard_normal((1, 217, 80)).astype(np.float32)
}


@pytest.mark.parametrize("rows", [None, 20, 10_000])
def test_in_a_chain_the_features_stay_on_the_device(runners, machine, rows):
    encoder, projector = runners
    features = encoder(FRAMES)["features"][:, :rows]
    want = projector({"features": features})["soft_tokens"]
    before = {way: len(sizes) for way, sizes in machine.copied.items()}
    got = Chain(encoder, projector)(FRAMES, rows)
    np.testing.assert_array_equal(got["soft_tokens"], want)
    copied = {way: sizes[before[way] :] for way, sizes in machine.copied.items()}
    assert copied == {
        cuda_memory.TO_DEVICE: [FRAMES["input_features"].nbytes],
        cuda_memory.TO_HOST: [want.nbytes],
    }
    np.testing.assert_array_equal(
        projector({"features": features})["soft_tokens"], want
    )  # by itself again


def test_the_emulation_notices_a_chain_whose_second_graph_does_not_wait(runners, monkeypatch):
    encoder, projector = runners
    run = tensorrt_engine.Engine.run
    monkeypatch.setattr(tensorrt_engine.Engine, "run", lambda self, stream: run(self, self.stream))
    assert np.isnan(Chain(encoder, projector)(FRAMES)["soft_tokens"]).all()


def test_a_chain_that_does_not_fit_or_is_closed_is_refused(runners):
    encoder, projector = runners
    with pytest.raises(
        BackendError,
        match=r"encoder\.onnx takes input_features float32, projector\.onnx gives soft",
    ):
        Chain(projector, encoder)
    with pytest.raises(
        BackendError,
        match=r"encoder\.onnx: expected the inputs \['input_features'\], got \['x'\]",
    ):
        Chain(encoder, projector)({"x": FRAMES["input_features"]})
    projector.close()
    with pytest.raises(BackendError, match=r"projector\.onnx is closed"):
        Chain(encoder, projector)(FRAMES)


def test_a_chain_of_onnx_runtime_equals_one_graph_after_the_other(bundle):
    specs = bundle.manifest.graphs
    encoder, projector = (
        load_runner(bundle.graph(n), specs[n], "onnxruntime", 1) for n in ("encoder", "projector")
    )
    want = projector({"features": encoder(FRAMES)["features"][:, :20]})
    np.testing.assert_array_equal(
        Chain(encoder, projector)(FRAMES, 20)["soft_tokens"], want["soft_tokens"]
    )


def test_a_command_answers_with_tensorrt(bundle, voice_path, run_cli, plain):
    done = run_cli(
        "run",
        voice_path / "test-100.flac",
        "--bundle",
        bundle.path,
        "--backend",
        "tensorrt",
        "--json",
    )
    assert done.status == 0, done.stderr
    assert done.document["backend"] == "tensorrt"
    assert done.document["text"] == plain.answer_file(voice_path / "test-100.flac").text


# --- what goes wrong in the backend goes wrong on the emulation ---

STEPS = (7, 1, 1, 5, 1)  # positions of each step


def run_in_steps(decoder) -> np.ndarray:
    """(steps, 2, 64): the top 64 tokens after each step, and their logits."""
    rng = np.random.default_rng(0)
    cache = decoder.open_cache(32)
    past = 0
    topk = []
    for n in STEPS:
        scores = decoder.run(rng.standard_normal((n, SIZE)).astype(np.float32), cache, past)
        topk.append(np.stack(scores.topk(64)))
        past += n
    return np.stack(topk)


@pytest.fixture(params=["1", "0"], ids=["shared", "copied"])
def decoder(bundle, request, monkeypatch):
    """The LLM; what a step sends and fetches is shared with the device or copied."""
    monkeypatch.setenv(cuda_memory.ZERO_COPY, request.param)
    path, spec = bundle.graph("llm", "tensorrt"), bundle.manifest.graphs["llm"].on("tensorrt")
    with load_decoder(path, spec, "tensorrt", bundle=bundle) as loaded:
        yield loaded


def sets_not_swapped(patch):
    patch.setattr(trt_module.TrtCache, "swap", lambda self, length: setattr(self, "length", length))


def layers_exchanged(patch):
    swap = trt_module.TrtCache.swap

    def wrong(self, length):
        swap(self, length)
        self.current = self.current[2:] + self.current[:2]

    patch.setattr(trt_module.TrtCache, "swap", wrong)


def one_set_only(patch):
    def init(self, tensors, capacity):
        self.capacity = capacity
        buffers = [trt_module.make_buffer(t, trt_module._sized(t, capacity)) for t in tensors]
        self.sets = [buffers, buffers]

    patch.setattr(trt_module.CacheMemory, "__init__", init)


def gaps_up_to_the_capacity(patch):
    """As if TensorRT took a tensor with gaps: the shape of the whole buffer."""
    patch.setattr(trt_module.TrtCache, "checked_total", lambda self, past, new: past + new)
    sized = trt_module._sized
    patch.setattr(
        trt_module,
        "_sized",
        lambda tensor, n: sized(tensor, max(n - 1, 0) if "past" in tensor.name else n),
    )


def not_synchronised(patch):
    patch.setattr(cuda_memory.Stream, "synchronise", lambda self: None)


def run_before_the_upload(patch):
    patch.setenv(cuda_memory.ZERO_COPY, "0")
    upload = cuda_memory.Stream.upload
    run = tensorrt_engine.Engine.run
    late = []
    patch.setattr(cuda_memory.Stream, "upload", lambda *arguments: late.append(arguments))
    patch.setattr(
        tensorrt_engine.Engine,
        "run",
        lambda self, stream: (run(self, stream), upload(*late.pop())),
    )


def buffers_too_small(patch):
    buffer = trt_module.make_buffer
    patch.setattr(
        trt_module,
        "make_buffer",
        lambda t, shape: buffer(t, (3, 8, 32) if "present" in t.name else shape),
    )


def address_inside_a_buffer(patch):
    def wrong(self, name, buffer):
        offset = 256 if name == "past.0.key" else 0
        return self._require(self._context.set_tensor_address(name, buffer.address + offset), "")

    patch.setattr(tensorrt_engine.Engine, "set_address", wrong)


def address_of_the_host(patch):
    patch.setenv(cuda_memory.ZERO_COPY, "1")
    patch.setattr(
        cuda_memory.Mapped,
        "address",
        property(lambda self: self.array.ctypes.data, lambda self, _: None),
        False,
    )


FAULTS = (
    sets_not_swapped,
    layers_exchanged,
    one_set_only,
    gaps_up_to_the_capacity,
    not_synchronised,
    run_before_the_upload,
    buffers_too_small,
    address_inside_a_buffer,
    address_of_the_host,
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_the_emulation_notices_a_fault(bundle, decoder, fault, monkeypatch):
    want = run_in_steps(plain_decoder(bundle))
    fault(monkeypatch)
    path, spec = bundle.graph("llm"), bundle.manifest.graphs["llm"]
    try:
        with load_decoder(path, spec, "tensorrt", bundle=bundle) as wrong:
            got = run_in_steps(wrong)
    except BackendError as error:
        assert "CUDA refuses" in str(error) or "does not give" in str(error)
    else:
        assert not np.allclose(got, want, atol=0.1)


# --- device memory ---


def test_a_step_fetches_the_topk_and_copies_nothing_if_memory_is_shared(decoder, machine):
    cache, one = decoder.open_cache(8), np.zeros((1, SIZE), np.float32)
    before = {way: len(sizes) for way, sizes in machine.copied.items()}
    decoder.run(one, cache, 0)
    copied = {way: sizes[before[way] :] for way, sizes in machine.copied.items()}
    shared = os.environ[cuda_memory.ZERO_COPY] == "1"
    assert copied[cuda_memory.TO_DEVICE] == ([] if shared else [one.nbytes])
    assert copied[cuda_memory.TO_HOST] == ([] if shared else [64 * 4, 64 * 8])


def test_another_conversation_leaves_scores_unchanged(decoder):
    first, second = decoder.open_cache(8), decoder.open_cache(8)
    rng = np.random.default_rng(0)
    scores = decoder.run(rng.standard_normal((3, SIZE)).astype(np.float32), first, 0)
    before = np.stack(scores.topk(64))
    decoder.run(rng.standard_normal((3, SIZE)).astype(np.float32), second, 0)
    np.testing.assert_array_equal(np.stack(scores.topk(64)), before)


@pytest.mark.parametrize("length", [0, 5, 9, 12])
def test_rewind_then_run_equals_a_run_without_what_was_forgotten(decoder, bundle, length):
    embeddings = np.random.default_rng(0).standard_normal((12, SIZE)).astype(np.float32)
    cache, plain = decoder.open_cache(16), plain_decoder(bundle)
    decoder.run(embeddings[:9], cache, 0)
    decoder.rewind(cache, length)
    left = min(length, 9)
    got = decoder.run(embeddings[9:], cache, left)
    want = plain.run(np.concatenate([embeddings[:left], embeddings[9:]]), plain.open_cache(16), 0)
    np.testing.assert_array_equal(got.tokens[:5], want.topk(5)[0])
    np.testing.assert_allclose(got.logits, want.topk(64)[1], atol=1e-3)


@pytest.mark.parametrize("length", [0, 5, 8])
def test_a_grown_cache_keeps_what_it_holds(decoder, bundle, machine, length):
    embeddings = np.random.default_rng(0).standard_normal((16, SIZE)).astype(np.float32)
    decoder._spare.clear()
    gc.collect()
    llm, before = bundle.manifest.llm, machine.n_bytes
    cache, whole = decoder.open_cache(8), decoder.open_cache(16)
    one_set = 2 * llm.n_layers * llm.n_kv_heads * llm.head_size * 4  # bytes of a position
    assert machine.n_bytes - before == 2 * (8 + 16) * one_set
    for end in range(1, length + 1):
        decoder.run(embeddings[end - 1 : end], cache, end - 1)
        decoder.run(embeddings[end - 1 : end], whole, end - 1)
    decoder.grow(cache, 16)
    gc.collect()
    assert machine.n_bytes - before == 2 * (16 + 16) * one_set
    got = decoder.run(embeddings[length:], cache, length)
    want = decoder.run(embeddings[length:], whole, length)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.logits, want.logits)


def test_the_memory_of_a_grown_cache_is_reused(decoder, machine):
    decoder._spare.clear()
    cache = decoder.open_cache(8)
    decoder.grow(cache, 16)
    del cache
    gc.collect()
    before = machine.n_bytes
    again = decoder.open_cache(8)
    decoder.grow(again, 16)
    assert machine.n_bytes == before


def test_memory_is_shared_only_with_an_integrated_gpu(machine, monkeypatch):
    monkeypatch.delenv(cuda_memory.ZERO_COPY, raising=False)
    assert isinstance(cuda_memory.exchange(4, "float32"), cuda_memory.Mapped)
    monkeypatch.setattr(machine, "integrated", False)
    assert isinstance(cuda_memory.exchange(4, "float32"), cuda_memory.Copied)
    monkeypatch.setattr(machine, "integrated", True)
    monkeypatch.setenv(cuda_memory.ZERO_COPY, "0")
    assert isinstance(cuda_memory.exchange(4, "float32"), cuda_memory.Copied)


def test_shared_memory_is_freed(machine):
    gc.collect()
    before, shared = machine.n_bytes, cuda_memory.Mapped(100, "int64")
    assert (machine.n_bytes - before, shared.array.shape) == (800, (100,))
    del shared
    gc.collect()
    assert machine.n_bytes == before


def test_memory_is_laid_out_once_and_freed_on_close(bundle, recordings, machine, ana):
    gc.collect()
    before = machine.n_bytes
    with Assistant.load(bundle, backend="tensorrt") as assistant:
        assistant.answer(recordings[0])
        in_use, n_mallocs = machine.n_bytes, machine.n_mallocs
        for audio in recordings[1:4]:
            assistant.answer(audio)
        assert (machine.n_bytes, machine.n_mallocs) == (in_use, n_mallocs)
        assistant.swap_projector(ana)
        assert machine.n_bytes == in_use
    gc.collect()
    assert machine.n_bytes == before


def test_a_conversation_takes_two_sets_of_its_own_and_ended_ones_are_reused(
    decoder, machine, bundle
):
    llm, before = bundle.manifest.llm, machine.n_bytes
    cache = decoder.open_cache(llm.max_context)
    one_set = 2 * llm.n_layers * llm.n_kv_heads * llm.max_context * llm.head_size * 4
    assert machine.n_bytes - before == 2 * one_set
    del cache
    again = decoder.open_cache(llm.max_context)  # the memory of the first
    assert machine.n_bytes - before == 2 * one_set
    other = decoder.open_cache(llm.max_context)
    assert machine.n_bytes - before == 4 * one_set
    assert again is not other


def test_too_little_memory_raises_one_sentence_and_frees_everything(bundle, monkeypatch):
    small = trt_emulation.install(monkeypatch, capacity=1_000_000)
    with pytest.raises(
        BackendError, match=r"CUDA refuses cudaMalloc of .* MB: out of memory \(error 2\)"
    ):
        Assistant.load(bundle, backend="tensorrt")
    gc.collect()
    assert small.n_bytes == 0


def test_the_emulation_refuses_freed_memory(machine):
    buffer, stream = cuda_memory.Buffer(64), cuda_memory.Stream()
    address = buffer.address
    del buffer
    gc.collect()
    assert machine.memory(address, 1) is None
    stray = types.SimpleNamespace(address=address, n_bytes=64)
    with pytest.raises(
        BackendError, match=r"CUDA refuses cudaMemcpyAsync: invalid argument \(error 1\)"
    ):
        stream.upload(np.zeros(4, np.float32), stray)


def test_an_array_larger_than_its_buffer_is_refused():
    with pytest.raises(BackendError, match="for a device buffer of 8 bytes, got one of 16"):
        cuda_memory.Stream().upload(np.zeros(4, np.float32), cuda_memory.Buffer(8))


# --- what is refused ---


def test_a_shape_outside_the_profile_is_refused_with_the_profile(bundle):
    spec = bundle.manifest.graphs["encoder"]
    with (
        load_runner(bundle.graph("encoder"), spec, "tensorrt", bundle=bundle) as runner,
        pytest.raises(
            BackendError,
            match=r"takes input_features from \[1, 13, 80\] to \[1, 3000, 80\], got \[",
        ),
    ):
        runner({"input_features": np.zeros((1, 3001, 80), np.float32)})


def test_a_cache_goes_on_from_its_end_and_within_its_capacity(decoder):
    cache, three = decoder.open_cache(8), np.zeros((3, SIZE), np.float32)
    decoder.run(three, cache, 0)
    for past, n in ((2, 1), (4, 1), (3, 6)):
        with pytest.raises(
            BackendError,
            match=rf"a cache of 8 positions, 3 of them in use, cannot take {n} after {past}",
        ):
            decoder.run(np.zeros((n, SIZE), np.float32), cache, past)
    decoder.run(three, cache, 3)
    decoder.run(three, cache, 0)


def test_a_closed_decoder_is_refused(bundle, decoder):
    cache = decoder.open_cache(8)
    decoder.close()
    for use in (
        lambda: decoder.open_cache(8),
        lambda: decoder.run(np.zeros((1, SIZE), np.float32), cache, 0),
    ):
        with pytest.raises(BackendError, match=r"llm\.onnx is closed"):
            use()


def test_without_tensorrt_no_other_backend_replaces_it(bundle, monkeypatch):
    monkeypatch.setattr(tensorrt_engine, "PACKAGES", ("tensorrt_that_is_not_there",))
    with pytest.raises(
        BackendError,
        match=r"needs TensorRT, which is not installed.*JetPack.*--backend onnxruntime",
    ):
        Assistant.load(bundle, backend="tensorrt")


def test_a_tensorrt_that_cannot_be_imported_is_named(bundle, monkeypatch, tmp_path):
    (tmp_path / "broken_tensorrt.py").write_text(
        "raise ImportError('libnvinfer.so.10: no such file')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tensorrt_engine, "PACKAGES", ("broken_tensorrt",))
    with pytest.raises(
        BackendError, match=r"cannot be imported \(libnvinfer\.so\.10: no such file\): repair"
    ):
        Assistant.load(bundle, backend="tensorrt")


def test_without_cuda_the_message_says_where_it_comes_from(monkeypatch, run_python):
    script = (
        "from tiny_align.runtime.backends import cuda_memory; cuda_memory.LIBRARIES = ('libcudart_nowhere.so',)\n"
        "try: cuda_memory.Buffer(8)\n"
        "except cuda_memory.BackendError as error: print(error)"
    )
    assert (
        "none of libcudart_nowhere.so can be loaded. On a Jetson it comes with JetPack"
        in run_python(script).stdout
    )


def test_a_missing_engine_is_refused_with_the_command_that_builds_it(bundle_path):
    with pytest.raises(BackendError, match="tiny-align build-engines"):
        Assistant.load(bundle_path, backend="tensorrt")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (
            b"not an engine",
            r"tensorrt 10\.3\.0 cannot load the engine for .*llm\.engine: Serialization assertion failed",
        ),
        (b"", r"llm\.engine cannot be read \(cannot mmap an empty file\): build the engines again"),
    ],
    ids=["damaged", "empty"],
)
def test_tensorrts_reason_against_an_engine_is_in_the_message(
    bundle, monkeypatch, tmp_path, content, why
):
    (tmp_path / "llm.engine").write_bytes(content)
    monkeypatch.setattr(tensorrt_engine, "check_engine", lambda *_: tmp_path / "llm.engine")
    with pytest.raises(BackendError, match=why):
        Assistant.load(bundle, backend="tensorrt")


def test_a_runtime_that_cannot_be_made_raises_one_sentence(bundle, monkeypatch):
    def refuse(self, logger):
        logger.log(
            trt_emulation.ILogger.Severity.ERROR, "CUDA initialization failure with error: 35"
        )
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(trt_emulation.Runtime, "__init__", refuse)
    with pytest.raises(
        BackendError, match=r"cannot make a Runtime for .*llm\.engine: CUDA initialization failure"
    ):
        Assistant.load(bundle, backend="tensorrt")


def test_an_engine_with_other_tensors_than_the_manifest_is_refused(bundle):
    spec = bundle.manifest.graphs["encoder"]
    other = dataclasses.replace(
        spec, outputs=(dataclasses.replace(spec.outputs[0], dtype="float16"),)
    )
    graphs = {**bundle.manifest.graphs, "encoder": other}
    changed = dataclasses.replace(
        bundle, manifest=dataclasses.replace(bundle.manifest, graphs=graphs)
    )
    with pytest.raises(
        BackendError, match="differ in features float16, features float32: build the engines again"
    ):
        load_runner(bundle.graph("encoder"), other, "tensorrt", bundle=changed)


def test_a_size_that_depends_on_the_data_is_refused(bundle, monkeypatch):
    monkeypatch.setattr(
        trt_emulation.IExecutionContext, "get_tensor_shape", lambda self, name: (1, -1, 352)
    )
    with pytest.raises(
        BackendError,
        match=r"gives features a size that is known only after a run: \[1, -1, 352\]",
    ):
        load_runner(
            bundle.graph("encoder"), bundle.manifest.graphs["encoder"], "tensorrt", bundle=bundle
        )


# --- a user's projector ---


def test_a_user_without_engines_is_loaded_by_refit(bundle, ana, plain, speech):
    with Assistant.load(bundle, "ana", backend="tensorrt") as assistant:
        features = assistant.features(speech)
        got, general = assistant.soft_tokens(features), plain.soft_tokens(features)
        plain.swap_projector(ana)
        np.testing.assert_array_equal(got, plain.soft_tokens(features))
        assert got.shape != general.shape or not np.array_equal(got, general)


def test_a_user_with_an_engine_is_loaded_without_refit(bundle, ben, plain, speech, monkeypatch):
    monkeypatch.setattr(tensorrt_engine.Engine, "_refit", None)
    with Assistant.load(bundle, "ben", backend="tensorrt") as assistant:
        features = assistant.features(speech)
        plain.swap_projector(ben)
        np.testing.assert_array_equal(assistant.soft_tokens(features), plain.soft_tokens(features))


def test_an_engine_without_refit_is_refused_with_the_command_that_builds_one(
    bundle, ana, monkeypatch, tensorrt, speech
):
    before = tensorrt.answer(speech).tokens
    monkeypatch.setattr(trt_emulation.ICudaEngine, "refittable", False)
    with pytest.raises(
        BackendError,
        match=r"built without REFIT .*other weights: .*build-engines --bundle \S+ --user ana`",
    ):
        tensorrt.swap_projector(ana)
    assert tensorrt.answer(speech).tokens == before


def test_weights_of_another_graph_are_refused_and_the_old_ones_remain(
    bundle, tensorrt, speech, tmp_path
):
    before = tensorrt.answer(speech).tokens
    (tmp_path / "projector.onnx").write_text("not a graph")
    with pytest.raises(
        BackendError,
        match=r"cannot take the weights of .*projector\.onnx .*structure is not the eng",
    ):
        tensorrt.swap_projector(tmp_path / "projector.onnx")
    assert tensorrt.answer(speech).tokens == before


# --- every version has the API that is used ---

API = json.loads((Path(__file__).parents[1] / "data/tensorrt-api.json").read_text())


@pytest.mark.parametrize("version", API["versions"])
def test_tensorrt_has_all_of_the_emulation(version):
    """Whatever the backend uses is in the emulation, so it is in this version with these
    parameters.
    """
    known = API["versions"][version]
    for kind in trt_emulation.API:
        for name, member in vars(kind).items():
            if name == "__init__" and f"{kind.__name__}.{name}" not in known["names"]:
                continue  # made by TensorRT, not by us
            if name == "__init__" or not name.startswith("_"):
                assert_as_documented(f"{kind.__name__}.{name}", member, known)
    assert parameters(trt_emulation.nptype) in known["names"]["nptype"]
    for kind in trt_emulation.ENUMS:
        assert set(kind.__members__) <= set(known["enums"][kind.__name__])


def assert_as_documented(name: str, member, known: dict) -> None:
    if isinstance(member, type):
        assert member.__name__ in known["enums"]
    elif isinstance(member, property):
        assert known["names"][name] is None, name
    else:
        required = [
            [p for p in overload if not p.endswith("=")] for overload in known["names"][name]
        ]
        assert parameters(member) in required, name


def parameters(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_tensorrt_rtx_itself_has_the_api():
    """The signatures in an installed TensorRT-RTX's docstrings.

    It follows the newest of the versions.
    """
    rtx = pytest.importorskip("tensorrt_rtx")
    for name, overloads in API["versions"]["11.0"]["names"].items():
        owner, _, member = name.rpartition(".")
        real = getattr(getattr(rtx, owner), member) if owner else getattr(rtx, member)
        if overloads is None:
            assert isinstance(real, property), name
            continue
        lines = [
            re.sub("<.*?>", "", line.split(" -> ")[0]) for line in (real.__doc__ or "").splitlines()
        ]
        known = []
        for line in lines:
            known.append([p for p in re.findall(r"(\w+): ", line) if p != "self"])
        for overload in overloads if owner else ():
            assert [p.rstrip("=") for p in overload] in known, f"{name}{overload}: {real.__doc__}"


def test_engines_of_another_version_are_refused(bundle, monkeypatch):
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "11.0.0")
    with pytest.raises(BackendError, match=r"11\.0\.0"):
        Assistant.load(bundle, backend="tensorrt")


CUDA = json.loads((Path(__file__).parents[1] / "data/cuda-api.json").read_text())["versions"]
IN_C = {  # what ctypes passes -> the types that the headers may have there
    cuda_memory.POINTER: {"void *", "const void *", "cudaStream_t"},
    cuda_memory.SIZE: {"size_t"},
    cuda_memory.INT: {"int", "enum cudaMemcpyKind", "enum cudaDeviceAttr"},
    cuda_memory.FLAGS: {"unsigned int"},
    ctypes.POINTER(cuda_memory.POINTER): {"void **", "cudaStream_t *"},
    ctypes.POINTER(cuda_memory.INT): {"int *"},
}


@pytest.mark.parametrize("version", CUDA)
def test_cuda_is_called_as_its_headers_declare(version):
    declared = CUDA[version]["functions"]
    for name, arguments in cuda_memory.SIGNATURES.items():
        assert all(c in IN_C[a] for a, c in zip(arguments, declared[name], strict=True)), name
        assert len(parameters(getattr(trt_emulation.Cudart, name))) == len(arguments), name
    assert set(declared) == {*cuda_memory.SIGNATURES, "cudaGetErrorString"}
    ours = (
        cuda_memory.MAPPED,
        cuda_memory.INTEGRATED,
        cuda_memory.CAN_MAP_HOST_MEMORY,
        cuda_memory.TO_DEVICE,
        cuda_memory.TO_HOST,
        cuda_memory.ON_DEVICE,
    )
    assert tuple(CUDA[version]["constants"].values()) == ours
