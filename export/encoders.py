"""Speech encoders of transformers: the supported families, their loading, their input and output.

How a family differs is in `FAMILIES`; sizes come from the checkpoint's own config.json and
preprocessor_config.json. A CTC head, a decoder and an adapter after the encoder are left out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiny_align.export.graphs import Graph, export_program
from tiny_align.export.model_folder import model_folder
from tiny_align.export.pretrained import load_config, load_whole
from tiny_align.runtime.bundle.manifest import TensorSpec
from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.front_ends.base import AnyFrontEnd
from tiny_align.runtime.front_ends.nemo import NemoMel
from tiny_align.runtime.front_ends.seamless import FilterBank
from tiny_align.runtime.front_ends.wav2vec2 import Waveform
from tiny_align.runtime.front_ends.whisper import WhisperMel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MAX_SPEECH_S = 30.0
OPT_SPEECH_S = 3.0
MIN_FEATURES = 4  # the shortest input makes as many: later stages need more than one
EXAMPLE_EXTRA = 17  # rows: a length that no other dimension has

# Beginnings of parameters that only training uses, or that are left out.
UNUSED = ("masked_spec_embed", "adapter.")

ATTENTION = "tiny_align_whole"  # without a mask: no part of a recording is hidden

Convolution = tuple[int, int, int]  # kernel, stride, padding at either side


# --- families ---


@dataclass(frozen=True)
class Family:
    """Transformers' names for a kind of encoder, and how it shortens its input."""

    model: str  # transformers' class
    extractor: str  # transformers' feature extractor for it
    convolutions: Callable[["PreTrainedModel"], list[Convolution]]  # before the layers
    part: str = ""  # where in the model the encoder is
    mel_first: bool = False  # whether the encoder takes (B, M, frames), not (B, frames, M)


def _convolution_list(encoder: "PreTrainedModel") -> list[Convolution]:
    config = encoder.config
    return [(kernel, stride, 0) for kernel, stride in zip(config.conv_kernel, config.conv_stride)]


def _numbered_convolutions(encoder: "PreTrainedModel") -> list[Convolution]:
    convolutions = []
    for name in ("conv1", "conv2", "conv3"):
        layer = getattr(encoder, name, None)
        if layer is not None:
            convolutions.append((layer.kernel_size[0], layer.stride[0], layer.padding[0]))
    return convolutions


def _subsampling(encoder: "PreTrainedModel") -> list[Convolution]:
    kernel = encoder.config.subsampling_conv_kernel_size
    stride = encoder.config.subsampling_conv_stride
    n_convolutions = round(math.log(encoder.config.subsampling_factor, stride))
    return [(kernel, stride, (kernel - 1) // 2)] * n_convolutions


def _no_convolutions(encoder: "PreTrainedModel") -> list[Convolution]:
    return []


WAVE = "Wav2Vec2FeatureExtractor"
NEMO = "ParakeetFeatureExtractor"
WHISPER = "WhisperFeatureExtractor"
SEAMLESS = "SeamlessM4TFeatureExtractor"
FAMILIES = {
    "data2vec-audio": Family("Data2VecAudioModel", WAVE, _convolution_list),
    "hubert": Family("HubertModel", WAVE, _convolution_list),
    "moonshine": Family("MoonshineModel", WAVE, _numbered_convolutions, "encoder"),
    "parakeet_ctc": Family("ParakeetForCTC", NEMO, _subsampling, "encoder"),
    "parakeet_encoder": Family("ParakeetEncoder", NEMO, _subsampling),
    "wav2vec2": Family("Wav2Vec2Model", WAVE, _convolution_list),
    "wav2vec2-bert": Family("Wav2Vec2BertModel", SEAMLESS, _no_convolutions),
    "wavlm": Family("WavLMModel", WAVE, _convolution_list),
    "whisper": Family("WhisperModel", WHISPER, _numbered_convolutions, "encoder", mel_first=True),
}


# --- the encoder ---


class LayeredEncoder(torch.nn.Module):
    """An encoder whose features are several of its layers side by side, and its sizes.

    Middle layers hold more of how a voice sounds, the last one more of the words; a projector for a
    user unlike the encoder's training data can use both. The last layer's features are those after
    the encoder's own last norm.
    """

    def __init__(
        self,
        encoder: "PreTrainedModel",
        family: Family,
        front_end: AnyFrontEnd,
        layers: tuple[int, ...],
    ):
        super().__init__()
        self.encoder = encoder
        self.layers = layers
        self.config = encoder.config
        self.front_end = front_end
        self.mel_first = family.mel_first
        self.convolutions = family.convolutions(encoder)
        self.feature_size = len(layers) * encoder.config.hidden_size  # Da

    def forward(self, rows: Tensor) -> Tensor:
        """(B, frames, M) or (B, S) -> (B, N, Da)."""
        if self.mel_first:
            rows = rows.transpose(1, 2)  # (B, M, frames)
        out = self.encoder(rows, output_hidden_states=True)
        hidden = (*out.hidden_states[:-1], out.last_hidden_state)
        return torch.cat([hidden[layer] for layer in self.layers], dim=-1)

    @property
    def frame_s(self) -> float:
        """Seconds of audio per feature."""
        rows = math.prod(stride for _, stride, _ in self.convolutions)
        return rows * self.front_end.row_samples / self.front_end.sample_rate

    @property
    def row_range(self) -> tuple[int, int, int]:
        """Min, opt and max number of input rows."""
        if isinstance(self.front_end, WhisperMel):
            return (self.front_end.n_rows,) * 3
        rows_per_s = self.front_end.sample_rate / self.front_end.row_samples
        opt_rows = round(OPT_SPEECH_S * rows_per_s)
        max_rows = round(MAX_SPEECH_S * rows_per_s)
        min_rows = MIN_FEATURES
        for kernel, stride, padding in reversed(self.convolutions):
            min_rows = (min_rows - 1) * stride + kernel - 2 * padding
        return min_rows, opt_rows, max_rows

    @property
    def input(self) -> TensorSpec:
        """The input's name and shape; Whisper's has one length."""
        if isinstance(self.front_end, Waveform):
            return TensorSpec("input_values", "float32", (1, "samples"))
        min_rows, _, max_rows = self.row_range
        frames = max_rows if min_rows == max_rows else "frames"
        return TensorSpec("input_features", "float32", (1, frames, self.front_end.row_size))

    @property
    def dims(self) -> dict[str, tuple[int, int, int]]:
        """Min, opt and max size of each dynamic dimension."""
        opt_features = round(OPT_SPEECH_S / self.frame_s)
        max_features = self.n_features(self.row_range[2])
        dims = {"features": (2, opt_features, max_features)}
        for name in self.input.shape:
            if isinstance(name, str):
                dims[name] = self.row_range
        return dims

    def n_features(self, n_rows: int) -> int:
        """The number of features of `n_rows` input rows."""
        for kernel, stride, padding in self.convolutions:
            n_rows = (n_rows + 2 * padding - kernel) // stride + 1
        return n_rows

    def example(self, n_rows: int, seed: int = 0) -> Tensor:
        """(1, n_rows) or (1, n_rows, M) float32 of noise."""
        shape = [1, n_rows]
        if not isinstance(self.front_end, Waveform):
            shape.append(self.front_end.row_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encoder_graph(encoder: LayeredEncoder) -> Graph:
    """input_features (1, frames, M) or input_values (1, samples) -> features (1, features, Da)."""
    min_rows, opt_rows, max_rows = encoder.row_range
    is_fixed = min_rows == max_rows
    example = encoder.example(opt_rows if is_fixed else opt_rows + EXAMPLE_EXTRA)
    length = torch.export.Dim.AUTO(min=min_rows, max=max_rows)
    program = export_program(
        encoder, {"rows": example}, dynamic=not is_fixed, dynamic_shapes={"rows": {1: length}}
    )
    n_features = encoder.n_features(opt_rows) if is_fixed else "features"
    features = TensorSpec("features", "float32", (1, n_features, encoder.feature_size))
    return Graph(program, inputs=(encoder.input,), outputs=(features,))


# --- loading ---


def load_encoder(path: str, layers: tuple[int, ...] = (-1,)) -> LayeredEncoder:
    """The encoder in FP32, with its front end.

    Args:
        path: a local folder or a hub id.
        layers: hidden states that make the features: 1 is the first layer's, -1 the last one's.
    Raises:
        TinyAlignError: no such model, of an unsupported architecture, damaged or not whole, without
            such a layer, or with a front end that is not the family's.
    """
    folder = model_folder(path, "encoder", FAMILIES)
    family = FAMILIES[load_config(folder).model_type]
    front_end = load_front_end(str(folder), family.extractor)
    model = _load_model(folder, family)
    encoder = getattr(model, family.part) if family.part else model
    modules = getattr(encoder, "encoder", encoder).layers
    assert isinstance(modules, torch.nn.ModuleList)
    _check_layers(path, layers, len(modules))
    _check_row_size(path, encoder.config, front_end)
    if isinstance(front_end, WhisperMel):
        _fit_window(path, encoder, front_end)
    _attend_to_all(encoder)
    _simplify(encoder)
    return LayeredEncoder(encoder, family, front_end, layers).eval()


def _load_model(folder: Path, family: Family) -> "PreTrainedModel":
    import transformers

    prefix = f"{family.part}." if family.part else ""
    unused = tuple(prefix + name for name in UNUSED)

    def needed(name: str) -> bool:
        return name.startswith(prefix) and not name.startswith(unused)

    return load_whole(getattr(transformers, family.model), folder, needed, dtype=torch.float32)


def _check_layers(path: str, layers: tuple[int, ...], n_layers: int) -> None:
    is_there = [-n_layers <= layer <= n_layers for layer in layers]
    if not layers or not all(is_there):
        raise TinyAlignError(
            f"{path} has {n_layers} layers: expected --encoder-layers from 1 to {n_layers}, got "
            f"{list(layers)}"
        )


def _check_row_size(path: str, config: "PreTrainedConfig", front_end: AnyFrontEnd) -> None:
    if isinstance(front_end, Waveform):
        return
    expected = getattr(config, "num_mel_bins", None)
    expected = expected or getattr(config, "feature_projection_input_dim", None)
    if front_end.row_size != expected:
        raise TinyAlignError(
            f"{path}: its preprocessor_config.json makes {front_end.row_size} values per frame, "
            f"its config.json expects {expected}: use the two of one checkpoint"
        )


def _fit_window(path: str, encoder: "PreTrainedModel", front_end: WhisperMel) -> None:
    """Cut the encoder's positions to those of its window; Whisper's own 30 s need all."""
    needed = front_end.n_rows // 2
    positions = encoder.embed_positions
    if needed > encoder.config.max_source_positions:
        raise TinyAlignError(
            f"{path}: the chunk_length of its preprocessor_config.json needs {needed} positions, "
            f"the encoder has {encoder.config.max_source_positions}: use the two of one checkpoint"
        )
    assert isinstance(positions, torch.nn.Embedding)
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(positions.weight[:needed])
    encoder.config.max_source_positions = needed


def _attend_to_all(encoder: "PreTrainedModel") -> None:
    """Drop the attention mask, which only hides a batch's padding but takes time in a graph."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(ATTENTION, sdpa_attention_forward)
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
    encoder.set_attn_implementation(ATTENTION)


def _simplify(encoder: "PreTrainedModel") -> None:
    """Take the adapter away, and compute once every weight that is computed from others."""
    from torch.nn.utils import parametrize

    if hasattr(encoder, "adapter"):
        encoder.adapter = None  # type: ignore[assignment]  # as a model without one has it
    for module in encoder.modules():
        if parametrize.is_parametrized(
            module
        ):  # a normalised weight, of the positions' convolution
            parametrize.remove_parametrizations(module, "weight")


# --- the front end ---


def load_front_end(path: str, extractor: str) -> AnyFrontEnd:
    """The front end of a checkpoint's preprocessor_config.json (or processor_config.json).

    Args:
        path: a local folder.
        extractor: the transformers class that it must be of, such as WhisperFeatureExtractor.
    Raises:
        TinyAlignError: no such file, not JSON, of another class, or without a value that is needed.
    """
    from transformers.models.auto.feature_extraction_auto import get_feature_extractor_config

    try:
        value = get_feature_extractor_config(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise TinyAlignError(f"{path} has no readable preprocessor_config.json: {error}") from error
    if not value:
        raise TinyAlignError(
            f"{path} has no readable preprocessor_config.json: copy it beside the config.json"
        )
    if value.get("feature_extractor_type", extractor) != extractor:
        raise TinyAlignError(
            f"{path}: its preprocessor_config.json is a {value['feature_extractor_type']}'s, its "
            f"encoder needs a {extractor}'s: use the two of one checkpoint"
        )
    numbers = {name: number for name, number in value.items() if isinstance(number, int | float)}
    try:
        return _make_front_end(extractor, numbers)
    except (KeyError, TypeError) as error:
        raise TinyAlignError(
            f"{path}: its preprocessor_config.json lacks {error}: use its encoder's"
        ) from error


def _make_front_end(extractor: str, value: dict[str, Any]) -> AnyFrontEnd:
    """The front end of a preprocessor_config.json.

    Raises:
        KeyError, TypeError: a value is absent or of another type.
    """
    if extractor == WAVE:
        if value.get("feature_size", 1) != 1:
            raise TypeError("'feature_size' 1")
        normalise = value.get("do_normalize", True)
        return Waveform(sample_rate=value["sampling_rate"], normalise=normalise)
    if extractor == WHISPER:
        return WhisperMel(
            sample_rate=value["sampling_rate"],
            n_mels=value["feature_size"],
            n_fft=value["n_fft"],
            hop_samples=value["hop_length"],
            padded_samples=value["chunk_length"] * value["sampling_rate"],
        )
    if extractor == SEAMLESS:
        return FilterBank(
            sample_rate=value["sampling_rate"], n_mels=value["num_mel_bins"], stride=value["stride"]
        )
    ours = {name: value[name] for name in ("floor_db", "speech_share") if name in value}
    return NemoMel(
        sample_rate=value["sampling_rate"],
        n_mels=value["feature_size"],
        n_fft=value["n_fft"],
        window_samples=value["win_length"],
        hop_samples=value["hop_length"],
        preemphasis=value["preemphasis"],
        **ours,
    )
