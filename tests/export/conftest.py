"""Fixtures for export: a tiny LLM, made once, and the command, expected to work or to refuse."""

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

import pytest

from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.commands.cli import main


def make_tokenizer():
    """The reference LLM's kind of tokenizer, from 200 sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from tiny_align.reference import corpus
    from tiny_align.reference.llm import CHAT_TEMPLATE, SPECIAL

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    texts = [text for s in corpus.sentences(200, 0) for text in (s.text, s.answer)]
    texts += corpus.ANSWER_INSTRUCTIONS + corpus.REPEAT_INSTRUCTIONS
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    names = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **names)


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory) -> Path:
    """LlamaForCausalLM, 2 layers x 64, 128 positions.

    Its weights are large enough to vary tokens.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "llm"
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).half().float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Exported(NamedTuple):
    """A bundle just written and what the command printed."""

    bundle: Bundle
    stdout: str


@pytest.fixture(scope="session")
def export():
    """Call the command: export({"encoder": folder, "llm": folder}, out, *options) -> Exported."""

    def call(models: dict[str, Path], out: Path, *options) -> Exported:
        paths = ["--encoder", models["encoder"], "--llm", models["llm"], "--out", out]
        line = ["export", *paths, "--json", *options]
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            status = main([str(argument) for argument in line])
        assert status == 0
        return Exported(Bundle.open(out), stdout.getvalue())

    return call


@pytest.fixture
def refused(run_cli):
    """Try to export: refused(models, out, *options, encoder=...) -> the sentence."""

    def call(models: dict[str, Path], out: Path, *options, **other) -> str:
        folders = {**models, **other}
        paths = ["--encoder", folders["encoder"], "--llm", folders["llm"], "--out", out]
        done = run_cli("export", *paths, *options)
        assert done.status == 2 and done.stdout == "" and "Traceback" not in done.stderr
        return next(line for line in done.stderr.splitlines() if line.startswith("tiny-align: "))

    return call
