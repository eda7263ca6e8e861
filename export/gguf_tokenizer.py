"""The tokenizer in a GGUF file -> transformers' own, which splits text as the original does."""

from typing import TYPE_CHECKING

import numpy as np

from tiny_align.export.gguf_file import sensible_header
from tiny_align.export.gguf_llm import GgufLlm
from tiny_align.export.model_folder import damaged
from tiny_align.export.vocabularies import (
    SPACE,
    SPLITS,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
)
from tiny_align.runtime.errors import TinyAlignError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

SPECIAL = 3  # a token's type: <eos>, for example
USER_DEFINED = 4  # never split, but not special
SPECIAL_TOKENS = {  # transformers' name of a token -> the file's
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
SENTENCEPIECE_IDS = {"unk_token": 0, "bos_token": 1, "eos_token": 2}  # where a file names none
# Of Phi-3, special tokens but for these swallow the white space behind them, as in llama.cpp.
PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")


def read_tokenizer(llm: GgufLlm) -> "PreTrainedTokenizerFast":
    """The tokenizer with special tokens and chat templates, if the file has some.

    Raises:
        TinyAlignError: a kind of tokenizer or of pre-tokenizer that is not known, or a damaged one.
    """
    with sensible_header(llm.path):
        return _read(llm)


def _read(llm: GgufLlm) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    tokens = list(llm.get("tokenizer.ggml.tokens"))
    kind = llm.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise TinyAlignError(
            f"{llm.path}: its tokenizer is {kind!r}, expected 'gpt2' (bytes) or 'llama' "
            "(SentencePiece): give the folder of the transformers model it was made from"
        )
    special = _special_tokens(llm, tokens, SENTENCEPIECE_IDS if kind == "llama" else {})
    if kind == "gpt2":
        tokenizer = _byte_level(llm, tokens, special)
    else:
        tokenizer = _sentencepiece(llm, tokens, special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_chat_template(llm),
        model_max_length=llm.size("context_length"),
        **special,
    )


def _special_tokens(llm: GgufLlm, tokens: list[str], defaults: dict[str, int]) -> dict[str, str]:
    special = {}
    for name, field in SPECIAL_TOKENS.items():
        number = llm.get(f"tokenizer.ggml.{field}", defaults.get(name))
        if number is None:
            continue
        if not 0 <= number < len(tokens):
            raise damaged(llm.path, f"its {field} is {number}, it has {len(tokens)} tokens")
        special[name] = tokens[number]
    return special


def _chat_template(llm: GgufLlm) -> str | dict[str, str] | None:
    """The only chat template, or several by name."""
    templates = {}
    for name in llm.get("tokenizer.chat_templates", []):
        templates[name] = llm.get(f"tokenizer.chat_template.{name}")
    default = llm.get("tokenizer.chat_template")
    if not templates:
        return default
    return templates | ({"default": default} if default else {})


def _byte_level(llm: GgufLlm, tokens: list[str], special: dict[str, str]) -> "Tokenizer":
    name = llm.get("tokenizer.ggml.pre")
    if name not in SPLITS:
        what = "names no pre-tokenizer" if name is None else f"has the pre-tokenizer {name!r}"
        raise TinyAlignError(
            f"{llm.path} {what}, expected one of {', '.join(SPLITS)}: another would split text "
            "otherwise than in training. Give a current conversion, or the folder it was made from"
        )
    split = SPLITS[name]
    merges = []
    for line in llm.get("tokenizer.ggml.merges", []):
        left, space, right = line.partition(" ")
        if not (left and space and right):
            raise damaged(llm.path, f"its merge {line!r} is not of two tokens")
        merges.append((left, right))
    begins = llm.get("tokenizer.ggml.add_bos_token", split.begins)
    begin = special.get("bos_token") if begins else None
    return byte_level_tokenizer(tokens, merges, _added_tokens(llm, tokens), split, begin)


def _sentencepiece(llm: GgufLlm, tokens: list[str], special: dict[str, str]) -> "Tokenizer":
    spelled = []
    for token in tokens:
        is_spaces = set(token) == {" "}
        spelled.append(SPACE * len(token) if is_spaces else token)
    begins = llm.get("tokenizer.ggml.add_bos_token", True)
    added = _added_tokens(llm, spelled)
    scores = llm.get("tokenizer.ggml.scores")
    if scores is not None:  # Gemma's runs of spaces and line breaks are merged before all others
        types = llm.get("tokenizer.ggml.token_type")
        scores = np.where(types == USER_DEFINED, np.inf, scores)
    return sentencepiece_tokenizer(
        spelled,
        added,
        special["unk_token"],
        special["bos_token"] if begins else None,
        space_before=bool(llm.get("tokenizer.ggml.add_space_prefix", True)),
        scores=scores,
    )


def _added_tokens(llm: GgufLlm, tokens: list[str]) -> "list[AddedToken]":
    from tokenizers import AddedToken

    types = llm.get("tokenizer.ggml.token_type")
    if types is None or len(types) != len(tokens):
        n_types = 0 if types is None else len(types)
        raise damaged(llm.path, f"it has {len(tokens)} tokens and {n_types} types of tokens")
    added = []
    for token, kind in zip(tokens, types):
        if kind in (SPECIAL, USER_DEFINED):
            is_special = bool(kind == SPECIAL)
            swallows = llm.architecture == "phi3" and is_special and token not in PHI3_PLAIN
            added.append(AddedToken(token, normalized=False, special=is_special, rstrip=swallows))
    return added
