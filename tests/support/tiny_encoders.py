"""Tiny random encoders of every family, as the hub has them, and their features by transformers.

The suite compares the exported ones with these; benchmarks/studies/families.py makes the README's
table of them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tiny_align.export.pretrained import load_pretrained

LAYERS = 2
SIZE = 32

COMMON = {
    "hidden_size": SIZE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
POSITIONS = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
CONVOLUTIONS = {  # quick to trace
    **POSITIONS,
    "conv_dim": [16] * 3,
    "conv_kernel": [10, 8, 8],
    "conv_stride": [5, 8, 8],
}

Made = tuple[transformers.PreTrainedModel, Any]  # a model and its feature extractor


def wave(**options: Any) -> transformers.Wav2Vec2FeatureExtractor:
    """The feature extractor of models that take normalised samples."""
    return transformers.Wav2Vec2FeatureExtractor(**options)


def wav2vec2(**options: Any) -> Made:
    """As wav2vec2-base, a checkpoint with its CTC head and the seven convolutions of real ones."""
    config = transformers.Wav2Vec2Config(
        **COMMON, **POSITIONS, conv_dim=[16] * 7, vocab_size=30, **options
    )
    return transformers.Wav2Vec2ForCTC(config), wave()


def wav2vec2_layer_norm() -> Made:
    """As wav2vec2-large-lv60."""
    config = transformers.Wav2Vec2Config(
        **COMMON,
        **CONVOLUTIONS,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        conv_bias=True,
    )
    return transformers.Wav2Vec2Model(config), wave(return_attention_mask=True)


def hubert() -> Made:
    config = transformers.HubertConfig(**COMMON, **CONVOLUTIONS)
    return transformers.HubertModel(config), wave()


def wavlm() -> Made:
    model = transformers.WavLMModel(transformers.WavLMConfig(**COMMON, **CONVOLUTIONS))
    positions = model.encoder.layers[0].attention.rel_attn_embed
    torch.nn.init.normal_(positions.weight)  # so that positions make a difference
    return model, wave(do_normalize=False)


def data2vec() -> Made:
    sizes = CONVOLUTIONS | {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5}
    config = transformers.Data2VecAudioConfig(**COMMON, **sizes)
    return transformers.Data2VecAudioModel(config), wave()


def moonshine() -> Made:
    config = transformers.MoonshineConfig(
        hidden_size=SIZE,
        intermediate_size=48,
        vocab_size=50,
        encoder_num_hidden_layers=LAYERS,
        encoder_num_attention_heads=2,
        decoder_num_hidden_layers=LAYERS,
        decoder_num_attention_heads=2,
    )
    return transformers.MoonshineForConditionalGeneration(config), wave(do_normalize=False)


def whisper(n_mels: int = 80) -> Made:
    config = transformers.WhisperConfig(
        d_model=SIZE,
        encoder_layers=LAYERS,
        encoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_layers=LAYERS,
        decoder_attention_heads=2,
        decoder_ffn_dim=48,
        vocab_size=60,
        num_mel_bins=n_mels,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    return model, transformers.WhisperFeatureExtractor(feature_size=n_mels)


def wav2vec2_bert(**options: Any) -> Made:
    config = transformers.Wav2Vec2BertConfig(**COMMON, conv_depthwise_kernel_size=7, **options)
    extractor = transformers.SeamlessM4TFeatureExtractor(padding_value=1)
    return transformers.Wav2Vec2BertModel(config), extractor


def parakeet() -> Made:
    sizes = {"conv_kernel_size": 5, "subsampling_conv_channels": 8, "num_mel_bins": 80}
    config = transformers.ParakeetCTCConfig(
        vocab_size=29, pad_token_id=28, encoder_config=COMMON | sizes
    )
    return transformers.ParakeetForCTC(config), transformers.ParakeetFeatureExtractor()


MAKERS = {
    "wav2vec2": wav2vec2,
    "wav2vec2-layer-norm": wav2vec2_layer_norm,
    "hubert": hubert,
    "wavlm": wavlm,
    "data2vec-audio": data2vec,
    "moonshine": moonshine,
    "whisper": whisper,
    "wav2vec2-bert": wav2vec2_bert,
    "parakeet": parakeet,
}


def save(folder: Path, made: Made) -> Path:
    for part in made:
        part.save_pretrained(folder)
    return folder


def make_encoder(family: str, folder: Path) -> Path:
    """A checkpoint in `folder`: config.json, weights, preprocessor_config.json."""
    torch.manual_seed(0)
    return save(folder, MAKERS[family]())


@torch.no_grad()
def features(family: str, folder: Path, audio: np.ndarray) -> np.ndarray:
    """(N, 2 Da) as transformers computes them, without those of padding."""
    extract = load_pretrained(transformers.AutoFeatureExtractor, folder)
    model = load_pretrained(transformers.AutoModel, folder).eval()
    encoder = model.encoder if family in ("moonshine", "parakeet", "whisper") else model
    inputs = extract(audio, sampling_rate=extract.sampling_rate, return_tensors="pt")
    out = encoder(**inputs, output_hidden_states=True)
    found = torch.cat([out.hidden_states[1], out.last_hidden_state], dim=-1)[0].numpy()
    if family == "parakeet":
        return found[: int(out.attention_mask.sum())]
    if family == "wav2vec2-bert":
        return found[: int(inputs["attention_mask"].sum())]
    if family == "whisper":
        return found[: -(-len(audio) // 320)]  # every 20 ms that has begun
    return found
