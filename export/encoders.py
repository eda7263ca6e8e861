"""Speech encoders of transformers: which there are, how they are loaded, what goes into them and what comes out.

What a family does differently is in `FAMILIES`; sizes come from the checkpoint's own config.json and
preprocessor_config.json. A CTC head, a decoder and an adapter behind the encoder are left out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

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

MAX_SPEECH_S, USUAL_SPEECH_S = 30.0, 3.0
MIN_FEATURES = 4  # the shortest input makes as many: what comes after wants more than one
UNUSED = (
    "masked_spec_embed",
    "adapter.",
)  # beginnings of parameters that only training has, or that are left out

EXAMPLE_EXTRA = 17  # rows: a length that no other dimension has

ATTENTION = "tiny_align_whole"  # without a mask: nothing of a recording is hidden

Convolution = tuple[int, int, int]  # kernel, stride, padding at either side


@dataclass(frozen=True)
class Family:
    """How transformers names a kind of encoder, and how it shortens its input."""

    model: str  # transformers' class
    extractor: str  # transformers' feature extractor for it
    convolutions: Callable[
        [torch.nn.Module], list[Convolution]
    ]  # of the encoder, before its layers
    part: str = ""  # where in the model the encoder is
    mel_first: bool = False  # whether the encoder takes (B, M, frames), not (B, frames, M)


def _convolution_list(encoder) -> list[Convolution]:
    return [
        (kernel, stride, 0)
        for kernel, stride in zip(encoder.config.conv_kernel, encoder.config.conv_stride)
    ]


def _numbered_convolutions(encoder) -> list[Convolution]:
    layers = [getattr(encoder, f"conv{n}") for n in (1, 2, 3) if hasattr(encoder, f"conv{n}")]
    return [(layer.kernel_size[0], layer.stride[0], layer.padding[0]) for layer in layers]


def _subsampling(encoder) -> list[Convolution]:
    kernel, stride = (
        encoder.config.subsampling_conv_kernel_size,
        encoder.config.subsampling_conv_stride,
    )
    return [(kernel, stride, (kernel - 1) // 2)] * round(
        math.log(encoder.config.subsampling_factor, stride)
    )


def _none(_encoder) -> list[Convolution]:
    return []


WAVE, NEMO = "Wav2Vec2FeatureExtractor", "ParakeetFeatureExtractor"
WHISPER, SEAMLESS = "WhisperFeatureExtractor", "SeamlessM4TFeatureExtractor"
FAMILIES = {
    "data2vec-audio": Family("Data2VecAudioModel", WAVE, _convolution_list),
    "hubert": Family("HubertModel", WAVE, _convolution_list),
    "moonshine": Family("MoonshineModel", WAVE, _numbered_convolutions, "encoder"),
    "parakeet_ctc": Family("ParakeetForCTC", NEMO, _subsampling, "encoder"),
    "parakeet_encoder": Family("ParakeetEncoder", NEMO, _subsampling),
    "wav2vec2": Family("Wav2Vec2Model", WAVE, _convolution_list),
    "wav2vec2-bert": Family("Wav2Vec2BertModel", SEAMLESS, _none),
    "wavlm": Family("WavLMModel", WAVE, _convolution_list),
    "whisper": Family("WhisperModel", WHISPER, _numbered_convolutions, "encoder", mel_first=True),
}


class LayeredEncoder(torch.nn.Module):
    """An encoder whose features are several of its layers side by side, and the sizes of what it takes and gives.

    Middle layers know more of how a voice sounds, the last one more of what it says; a projector for a person the
    encoder never heard can use both. The last layer's features are those that the encoder's own last norm has seen.
    """

    def __init__(self, encoder, family: Family, front_end: AnyFrontEnd, layers: tuple[int, ...]):
        super().__init__()
        self.encoder, self.layers, self.config = encoder, layers, encoder.config
        self.front_end, self.mel_first = front_end, family.mel_first
        self.convolutions = family.convolutions(encoder)
        self.feature_size = len(layers) * encoder.config.hidden_size  # Da

    def forward(self, rows):
        """(B, frames, M) or (B, S) -> (B, N, Da)."""
        out = self.encoder(
            rows.transpose(1, 2) if self.mel_first else rows, output_hidden_states=True
        )
        hidden = (*out.hidden_states[:-1], out.last_hidden_state)
        return torch.cat([hidden[layer] for layer in self.layers], dim=-1)

    @property
    def frame_s(self) -> float:
        """Seconds of audio per feature."""
        rows = math.prod(stride for _, stride, _ in self.convolutions)
        return rows * self.front_end.row_samples / self.front_end.sample_rate

    @property
    def row_range(self) -> tuple[int, int, int]:
        """Least, usual and greatest number of input rows."""
        if isinstance(self.front_end, WhisperMel):
            return (self.front_end.n_rows,) * 3
        per_s = self.front_end.sample_rate / self.front_end.row_samples
        return (
            self._rows_for(MIN_FEATURES),
            round(USUAL_SPEECH_S * per_s),
            round(MAX_SPEECH_S * per_s),
        )

    @property
    def input(self) -> TensorSpec:
        """The input's name and shape; Whisper's has one length."""
        if isinstance(self.front_end, Waveform):
            return TensorSpec("input_values", "float32", (1, "samples"))
        least, _, greatest = self.row_range
        frames = greatest if least == greatest else "frames"
        return TensorSpec("input_features", "float32", (1, frames, self.front_end.row_size))

    @property
    def dims(self) -> dict[str, tuple[int, int, int]]:
        """Least, usual and greatest size of each dynamic dimension."""
        features = {
            "features": (
                2,
                round(USUAL_SPEECH_S / self.frame_s),
                self.n_features(self.row_range[2]),
            )
        }
        return features | {
            name: self.row_range for name in self.input.shape if isinstance(name, str)
        }

    def n_features(self, n_rows: int) -> int:
        """How many features so many input rows make."""
        for kernel, stride, padding in self.convolutions:
            n_rows = (n_rows + 2 * padding - kernel) // stride + 1
        return n_rows

    def _rows_for(self, n_features: int) -> int:
        """The least number of input rows that makes so many features."""
        for kernel, stride, padding in reversed(self.convolutions):
            n_features = (n_features - 1) * stride + kernel - 2 * padding
        return n_features

    def example(self, n_rows: int, seed: int = 0) -> torch.Tensor:
        """(1, n_rows) or (1, n_rows, M) float32 of noise."""
        shape = (1, n_rows, *self.input.shape[2:])
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encoder_graph(encoder: LayeredEncoder) -> Graph:
    """input_features (1, frames, M) or input_values (1, samples) -> features (1, features, Da)."""
    least, usual, greatest = encoder.row_range
    fixed = least == greatest
    rows = encoder.example(usual if fixed else usual + EXAMPLE_EXTRA)
    length = torch.export.Dim.AUTO(min=least, max=greatest)
    program = export_program(
        encoder, {"rows": rows}, dynamic=not fixed, dynamic_shapes={"rows": {1: length}}
    )
    features = encoder.n_features(usual) if fixed else "features"
    return Graph(
        program,
        (encoder.input,),
        (TensorSpec("features", "float32", (1, features, encoder.feature_size)),),
    )


def load_encoder(path: str, layers: tuple[int, ...] = (-1,)) -> LayeredEncoder:
    """The encoder in FP32, with its front end.

    Args:
        path: a local folder or a hub id.
        layers: hidden states that make the features: 1 is the first layer's, -1 the last one's.
    Raises:
        TinyAlignError: no such model, of an unsupported architecture, damaged or not whole, without such a layer,
            or with a front end that is not the family's.
    """
    folder = model_folder(path, "encoder", FAMILIES)
    family = FAMILIES[load_config(folder).model_type]
    front_end = load_front_end(str(folder), family.extractor)
    model = _load_model(folder, family)
    encoder = getattr(model, family.part) if family.part else model
    _check_layers(path, layers, len(getattr(encoder, "encoder", encoder).layers))
    _check_rows(path, encoder.config, front_end)
    if isinstance(front_end, WhisperMel):
        _fit_window(path, encoder, front_end)
    _attend_to_all(encoder)
    return LayeredEncoder(_plain(encoder), family, front_end, layers).eval()


def _load_model(folder: Path, family: Family):
    import transformers

    prefix = f"{family.part}." if family.part else ""
    unused = tuple(prefix + name for name in UNUSED)

    def needed(name: str) -> bool:
        return name.startswith(prefix) and not name.startswith(unused)

    return load_whole(getattr(transformers, family.model), folder, needed, dtype=torch.float32)


def _check_layers(path: str, layers: tuple[int, ...], n_layers: int) -> None:
    if not layers or any(not -n_layers <= layer <= n_layers for layer in layers):
        raise TinyAlignError(
            f"{path} has {n_layers} layers; {list(layers)} was asked for: choose from 1 to {n_layers}"
        )


def _check_rows(path: str, config, front_end: AnyFrontEnd) -> None:
    wanted = getattr(config, "num_mel_bins", None) or getattr(
        config, "feature_projection_input_dim", None
    )
    if not isinstance(front_end, Waveform) and front_end.row_size != wanted:
        raise TinyAlignError(
            f"{path}: its preprocessor_config.json makes {front_end.row_size} values per frame, its config.json "
            f"expects {wanted}: use the two of one checkpoint"
        )


def _fit_window(path: str, encoder, front_end: WhisperMel) -> None:
    """Leave the encoder as many positions as its window has; Whisper's own 30 s need all."""
    wanted, there = front_end.n_rows // 2, encoder.config.max_source_positions
    if wanted > there:
        raise TinyAlignError(
            f"{path}: the chunk_length of its preprocessor_config.json needs {wanted} positions, the encoder has "
            f"{there}: use the two of one checkpoint"
        )
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(
        encoder.embed_positions.weight[:wanted]
    )
    encoder.config.max_source_positions = wanted


def _attend_to_all(encoder) -> None:
    """Attention as it is, but for the mask of a batch's padding: a graph would carry it, and take time for it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(ATTENTION, sdpa_attention_forward)
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
    encoder.set_attn_implementation(ATTENTION)


def _plain(encoder):
    """The encoder without its adapter, every weight that is computed from others computed once."""
    from torch.nn.utils import parametrize

    if hasattr(encoder, "adapter"):
        encoder.adapter = None
    for module in encoder.modules():
        if parametrize.is_parametrized(
            module
        ):  # the convolution over positions has its weight normalised
            parametrize.remove_parametrizations(module, "weight")
    return encoder


def load_front_end(path: str, extractor: str) -> AnyFrontEnd:
    """The front end that a checkpoint's preprocessor_config.json (or processor_config.json) describes.

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
            f"{path}: its preprocessor_config.json is a {value['feature_extractor_type']}'s, its encoder needs a "
            f"{extractor}'s: use the two of one checkpoint"
        )
    numbers = {name: number for name, number in value.items() if isinstance(number, int | float)}
    try:
        return FRONT_ENDS[extractor](numbers)
    except (KeyError, TypeError) as error:
        raise TinyAlignError(
            f"{path}: its preprocessor_config.json lacks {error}: use its encoder's"
        ) from error


def _waveform(value: dict) -> Waveform:
    if value.get("feature_size", 1) != 1:
        raise TypeError("'feature_size' 1")
    return Waveform(sample_rate=value["sampling_rate"], normalise=value.get("do_normalize", True))


def _nemo(value: dict) -> NemoMel:
    return NemoMel(
        sample_rate=value["sampling_rate"],
        n_mels=value["feature_size"],
        n_fft=value["n_fft"],
        window_samples=value["win_length"],
        hop_samples=value["hop_length"],
        preemphasis=value["preemphasis"],
        **{name: value[name] for name in ("floor_db", "speech_share") if name in value},
    )


def _whisper(value: dict) -> WhisperMel:
    return WhisperMel(
        sample_rate=value["sampling_rate"],
        n_mels=value["feature_size"],
        n_fft=value["n_fft"],
        hop_samples=value["hop_length"],
        padded_samples=value["chunk_length"] * value["sampling_rate"],
    )


def _filter_bank(value: dict) -> FilterBank:
    return FilterBank(
        sample_rate=value["sampling_rate"], n_mels=value["num_mel_bins"], stride=value["stride"]
    )


FRONT_ENDS = {WAVE: _waveform, NEMO: _nemo, WHISPER: _whisper, SEAMLESS: _filter_bank}
