"""An encoder-decoder recogniser's encoder in FP32, FP16 and INT8, read by its own decoder.

FP16 is the graph in FP32 with every value rounded that TensorRT has in FP16 (engines/fp16.py). The
weights of Moonshine tiny come from a file with INT8 weights per tensor (reference/moonshine.py), so
that INT8 costs it little more than its activations.
"""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from tqdm import tqdm

from tiny_align.align.data.datasets import load_dataset
from tiny_align.align.data.utterance import Utterance
from tiny_align.align.evaluation.word_errors import error_rates, normaliser_name
from tiny_align.engines import fp16
from tiny_align.export.bundle import write_encoder
from tiny_align.export.encoders import load_encoder
from tiny_align.export.pretrained import load_pretrained
from tiny_align.runtime.backends.base import Runner
from tiny_align.runtime.backends.registry import load_runner
from tiny_align.runtime.bundle.onnx_weights import load_graph

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BACKEND = "onnxruntime"
SAMPLE_RATE = 16_000  # Hz
FORMS = ("fp32", "fp16", "int8")
TOKENS_PER_SECOND = 6.5  # no more are spoken; an endless loop of the decoder stops there


def measure_encoder(
    source: Path, speech: Path | None, n_utterances: int, folder: Path
) -> dict[str, Any]:
    """Cosines of the features with FP32's, bytes, and WER of the model's own decoder on them.

    Args:
        source: a Moonshine checkpoint.
        speech: a data set, of whose test split `n_utterances` are taken, evenly spaced.
        folder: an empty one for graphs.
    """
    from transformers import AutoFeatureExtractor, AutoTokenizer, MoonshineForConditionalGeneration

    model = load_pretrained(MoonshineForConditionalGeneration, source).eval()
    tokenizer = load_pretrained(AutoTokenizer, source)
    extractor = load_pretrained(AutoFeatureExtractor, source)
    utterances = choose(speech, n_utterances) if speech else []
    runners = open_forms(source, folder)
    texts: dict[str, list[str]] = {form: [] for form in FORMS}
    cosines: dict[str, list[np.ndarray]] = {form: [] for form in FORMS}
    seconds = 0.0
    for utterance in tqdm(utterances, desc="encoder", unit="utterance"):
        samples = utterance.load(SAMPLE_RATE)
        seconds += len(samples) / SAMPLE_RATE
        values = extractor(samples, sampling_rate=SAMPLE_RATE).input_values[0]
        feed = {"input_values": np.asarray(values, np.float32)[None]}
        exact = runners["fp32"](feed)["features"]
        for form, runner in runners.items():
            features = runner(feed)["features"]
            cosines[form].append(frame_cosines(exact[0], features[0]))
            ids = decode(model, features, len(samples) / SAMPLE_RATE)
            texts[form].append(tokenizer.decode(ids, skip_special_tokens=True))
    report: dict[str, Any] = {
        "utterances": len(utterances),
        "seconds": seconds,
        "normaliser": normaliser_name(),
        "forms": {},
    }
    references = [utterance.text for utterance in utterances]
    for form in FORMS:
        all_cosines = np.concatenate(cosines[form])
        word_errors, character_errors = error_rates(references, texts[form])
        report["forms"][form] = {
            "cosine": float(all_cosines.mean()),
            "min_cosine": float(all_cosines.min()),
            "wer": word_errors,
            "cer": character_errors,
            "texts_equal": float(np.mean([a == b for a, b in zip(texts[form], texts["fp32"])])),
            "bytes": form_bytes(folder, form),
        }
    return report


def choose(speech: Path, n: int) -> list[Utterance]:
    """Utterances of the test split, or of all if there is none, evenly spaced."""
    utterances = load_dataset(speech)
    test = [utterance for utterance in utterances if utterance.split == "test"] or utterances
    places = np.linspace(0, len(test) - 1, min(n, len(test))).round().astype(int)
    return [test[place] for place in places]


def open_forms(source: Path, folder: Path) -> dict[str, Runner]:
    """The encoder's graph in each of FORMS."""
    encoder = load_encoder(str(source))
    runners = {}
    for form in ("fp32", "int8"):
        (folder / form).mkdir()
        with contextlib.redirect_stdout(sys.stderr):  # the exporter's progress
            spec = write_encoder(folder / form, encoder, form).on(BACKEND)
        runners[form] = load_runner(folder / form / spec.file, spec, BACKEND, 1)
        if form == "fp32":
            twin = folder / form / "twin.onnx"
            onnx.save(fp16.twin(load_graph(folder / form / spec.file)), str(twin))
            runners["fp16"] = load_runner(twin, spec, BACKEND, 1)
    return {form: runners[form] for form in FORMS}


def form_bytes(folder: Path, form: str) -> int:
    """Bytes of the weights of a form; FP16 has half of FP32's."""
    name = "int8" if form == "int8" else "fp32"
    n_bytes = sum(file.stat().st_size for file in (folder / name).glob("encoder*.data"))
    return n_bytes // 2 if form == "fp16" else n_bytes


def frame_cosines(exact: np.ndarray, features: np.ndarray) -> np.ndarray:
    """(N, D) twice -> (N,) cosine of every frame."""
    lengths = np.linalg.norm(exact, axis=1) * np.linalg.norm(features, axis=1)
    return (exact * features).sum(axis=1) / lengths


def decode(model: "PreTrainedModel", features: np.ndarray, seconds: float) -> list[int]:
    """The greedy transcript's token ids for features (1, N, D)."""
    import torch
    from transformers.models.moonshine.modeling_moonshine import MoonshineEncoderModelOutput

    encoded = MoonshineEncoderModelOutput(last_hidden_state=torch.from_numpy(features))
    with torch.inference_mode():
        ids = model.generate(
            encoder_outputs=encoded,
            max_length=max(8, round(TOKENS_PER_SECOND * seconds)),
            do_sample=False,
        )
    return ids[0].tolist()
