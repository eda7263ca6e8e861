"""Tiny random encoders of every supported family, as the hub has them, and their features by transformers.

The suite holds the exported ones to these; benchmarks/studies/families.py makes the README's table.
"""

from pathlib import Path

import numpy as np
import torch
import transformers

from tiny_align.export.pretrained import load_pretrained

LAYERS, SIZE = 2, 32

COMMON = {
    "hidden_size": SIZE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
POSITIONS = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
CONVOLUTIONS = POSITIONS | {
    "conv_dim": [16] * 3,
    "conv_kernel": [10, 8, 8],
    "conv_stride": [5, 8, 8],
}  # quick to trace


def wave(**options):
    return transformers.Wav2Vec2FeatureExtractor(**options)


def wav2vec2(**options):
    """As wav2vec2-base, a checkpoint with its CTC head; the seven convolutions are those of all the real ones."""
    config = transformers.Wav2Vec2Config(
        **COMMON, **POSITIONS, conv_dim=[16] * 7, vocab_size=30, **options
    )
    return transformers.Wav2Vec2ForCTC(config), wave()


def wav2vec2_layer_norm():
    """As wav2vec2-large-lv60."""
    options = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
    model = transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(**COMMON, **CONVOLUTIONS, **options)
    )
    return model, wave(return_attention_mask=True)


def hubert():
    return transformers.HubertModel(transformers.HubertConfig(**COMMON, **CONVOLUTIONS)), wave()


def wavlm():
    model = transformers.WavLMModel(transformers.WavLMConfig(**COMMON, **CONVOLUTIONS))
    torch.nn.init.normal_(
        model.encoder.layers[0].attention.rel_attn_embed.weight
    )  # positions count
    return model, wave(do_normalize=False)


def data2vec():
    sizes = CONVOLUTIONS | {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5}
    return transformers.Data2VecAudioModel(
        transformers.Data2VecAudioConfig(**COMMON, **sizes)
    ), wave()


def moonshine():
    sizes = {
        f"{part}_num_{what}": 2
        for part in ("encoder", "decoder")
        for what in ("hidden_layers", "attention_heads")
    }
    sizes |= {"hidden_size": SIZE, "intermediate_size": 48, "vocab_size": 50}
    model = transformers.MoonshineForConditionalGeneration(transformers.MoonshineConfig(**sizes))
    return model, wave(do_normalize=False)


def whisper(n_mels=80):
    sizes = {
        f"{part}_{what}": 2
        for part in ("encoder", "decoder")
        for what in ("layers", "attention_heads")
    }
    sizes |= {
        "d_model": SIZE,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "vocab_size": 60,
        "num_mel_bins": n_mels,
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes, **ids))
    return model, transformers.WhisperFeatureExtractor(feature_size=n_mels)


def wav2vec2_bert(**options):
    config = transformers.Wav2Vec2BertConfig(**COMMON, conv_depthwise_kernel_size=7, **options)
    return transformers.Wav2Vec2BertModel(config), transformers.SeamlessM4TFeatureExtractor(
        padding_value=1
    )


def parakeet():
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


def save(folder: Path, made) -> Path:
    for part in made:
        part.save_pretrained(folder)
    return folder


def make_encoder(family: str, folder: Path) -> Path:
    """A checkpoint in `folder`: config.json, weights, and the preprocessor_config.json of its feature extractor."""
    torch.manual_seed(0)
    return save(folder, MAKERS[family]())


@torch.no_grad()
def features(family: str, folder: Path, audio: np.ndarray) -> np.ndarray:
    """(N, 2 Da) as transformers computes them: its feature extractor, its model; without those of padding."""
    extract = load_pretrained(transformers.AutoFeatureExtractor, folder)
    model = load_pretrained(transformers.AutoModel, folder).eval()
    encoder = model.encoder if family in ("moonshine", "parakeet", "whisper") else model
    inputs = extract(audio, sampling_rate=extract.sampling_rate, return_tensors="pt")
    out = encoder(**inputs, output_hidden_states=True)
    features = torch.cat([out.hidden_states[1], out.last_hidden_state], dim=-1)[0].numpy()
    heard = {
        "parakeet": lambda: int(out.attention_mask.sum()),
        "wav2vec2-bert": lambda: int(inputs["attention_mask"].sum()),
        "whisper": lambda: -(-len(audio) // 320),  # every 20 ms that has begun
    }.get(family, lambda: len(features))
    return features[: heard()]
