"""An export from local folders uses no network and leaves HOME as it was."""

import json
import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers", reason="models are exported from transformers")
pytest.importorskip("onnx", reason="graphs are written with onnx")

CALL = "import sys; from tiny_align.runtime.commands.cli import main; sys.exit(main(sys.argv[1:]))"


def make_encoder(folder: Path) -> Path:
    """Parakeet, 1 layer x 48, with its front end."""
    sizes = {
        "hidden_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "conv_kernel_size": 5,
        "subsampling_conv_channels": 8,
        "num_mel_bins": 80,
        "scale_input": False,
    }
    config = transformers.ParakeetCTCConfig(vocab_size=29, pad_token_id=28, encoder_config=sizes)
    transformers.ParakeetForCTC(config).save_pretrained(folder)
    front_end = transformers.ParakeetFeatureExtractor(feature_size=80).to_dict()
    (folder / "preprocessor_config.json").write_text(json.dumps(front_end))
    return folder


def test_export_uses_no_network_and_writes_nothing_to_home(watch, tiny_llm, tmp_path):
    encoder = make_encoder(tmp_path / "encoder")
    options = ("--encoder", encoder, "--llm", tiny_llm, "--out", tmp_path / "bundle", "--json")
    watched = watch(sys.executable, "-c", CALL, "export", *options)
    assert watched.outcome.status == 0, watched.outcome.stderr
    assert (tmp_path / "bundle/manifest.json").exists()
    assert (watched.attempts, watched.files) == ([], [])
