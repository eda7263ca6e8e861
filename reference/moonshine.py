"""Moonshine tiny, English: the two graphs of the package moonshine-voice to a checkpoint.

Weights are INT8 per tensor there, convolutions FP32; the checkpoint holds them in FP32. Sizes and
settings are those of UsefulSensors/moonshine-tiny.
"""

from pathlib import Path

from tiny_align.export.vocabularies import sentencepiece_tokenizer
from tiny_align.reference.checkpoints import write_generation_config, write_model, write_tokenizer
from tiny_align.reference.ort_format import read_weights
from tiny_align.runtime.files import write_json

MAX_TOKENS = 194  # of a transcript
UNKNOWN = 0
BEGIN = 1
END = 2
FIRST_BYTE = 3  # the tokens of the 256 bytes follow
PROCESSOR = "Wav2Vec2Processor"
FRONT_END = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "processor_class": PROCESSOR,
    "sampling_rate": 16_000,
    "feature_size": 1,
    "padding_side": "right",
    "padding_value": 0.0,
    "do_normalize": False,
    "return_attention_mask": True,
}


def write_moonshine(encoder: Path, decoder: Path, vocabulary: Path, folder: Path) -> None:
    """A MoonshineForConditionalGeneration, from encoder_model.ort, decoder_model_merged.ort and
    tokenizer.bin.
    """
    from transformers import MoonshineConfig, MoonshineForConditionalGeneration

    weights = {f"model.encoder.{name}": array for name, array in read_weights(encoder).items()}
    weights.update(read_weights(decoder))
    del weights["proj_out.weight"]  # the embedding table once more
    config = MoonshineConfig(
        max_position_embeddings=MAX_TOKENS,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.9,
        },
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=END,
        decoder_start_token_id=BEGIN,
    )
    write_model(folder, MoonshineForConditionalGeneration, config, weights)
    write_generation_config(
        folder,
        max_length=MAX_TOKENS,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=END,
        decoder_start_token_id=BEGIN,
    )
    write_json(folder / "preprocessor_config.json", FRONT_END)
    _write_tokenizer(folder, read_vocabulary(vocabulary))


def _write_tokenizer(folder: Path, tokens: list[str]) -> None:
    from tokenizers import AddedToken

    special = [tokens[UNKNOWN], tokens[BEGIN], tokens[END]]
    special += [token for token in tokens if token.startswith("<<ST_")]
    added = [AddedToken(token, normalized=False, special=True) for token in special]
    write_tokenizer(
        folder,
        sentencepiece_tokenizer(tokens, added, tokens[UNKNOWN], tokens[BEGIN], space_before=True),
        unk_token=tokens[UNKNOWN],
        bos_token=tokens[BEGIN],
        eos_token=tokens[END],
        pad_token=tokens[END],
        processor_class=PROCESSOR,
        model_max_length=MAX_TOKENS,
    )


def read_vocabulary(path: Path) -> list[str]:
    """The tokens of a tokenizer.bin: each is its length in bytes (below 128), then the bytes."""
    data = path.read_bytes()
    tokens: list[str] = []
    position = 0
    while position < len(data):
        start = position + 1
        position = start + data[position]
        number = len(tokens) - FIRST_BYTE
        is_byte = 0 <= number < 256
        tokens.append(f"<0x{number:02X}>" if is_byte else data[start:position].decode("utf-8"))
    return tokens
