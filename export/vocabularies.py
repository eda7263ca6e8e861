"""Tokenizers rebuilt from a vocabulary, for files that hold no tokenizer.json."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

SPACE = "\u2581"  # how SentencePiece writes a space
# How tiktoken's cl100k_base splits text into words, as Llama 3's and Qwen's tokenizer.json have it;
# they differ in how many digits a word may have.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Split:
    """How text is split into words before BPE on bytes.

    Attributes:
        pattern: of a word; None: GPT-2's.
        single_digits: whether GPT-2's pattern finds every digit alone.
        normalised: whether letters and accents are composed first (NFC).
        whole_words: whether a word that is a token is taken as it is, without merges.
        begins: whether a text begins with a special token if the file does not say.
    """

    pattern: str | None = None
    single_digits: bool = False
    normalised: bool = False
    whole_words: bool = False
    begins: bool = False


SPLITS = {  # llama.cpp's name of a pre-tokenizer
    "llama-bpe": Split(WORDS.replace("DIGITS", r"\p{N}{1,3}"), whole_words=True, begins=True),
    "smaug-bpe": Split(WORDS.replace("DIGITS", r"\p{N}{1,3}"), whole_words=True),  # SmolLM3
    "qwen2": Split(WORDS.replace("DIGITS", r"\p{N}"), normalised=True),
    "stablelm2": Split(WORDS.replace("DIGITS", r"\p{N}")),
    "smollm": Split(single_digits=True),
    "gpt-2": Split(),
}


def byte_level_tokenizer(
    tokens: Sequence[str],
    merges: Iterable[tuple[str, str]],
    added: "Sequence[AddedToken]",
    split: Split,
    begin: str | None = None,
) -> "Tokenizer":
    """BPE on bytes, as GPT-2 has it.

    Args:
        added: tokens that are never split, special ones among them.
        begin: the token that a text begins with, if any.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids = {token: number for number, token in enumerate(tokens)}
    model = models.BPE(vocab=ids, merges=list(merges), ignore_merges=split.whole_words)
    tokenizer = Tokenizer(model)
    if split.normalised:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _word_splitter(split)
    tokenizer.decoder = decoders.ByteLevel()
    _begin_with(tokenizer, begin, ids)
    _add(tokenizer, added)
    return tokenizer


def _word_splitter(split: Split) -> "PreTokenizer":
    from tokenizers import Regex, pre_tokenizers

    if split.pattern is not None:
        words: PreTokenizer = pre_tokenizers.Split(Regex(split.pattern), "isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([words, as_bytes])
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if not split.single_digits:
        return as_bytes
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), as_bytes])


def sentencepiece_tokenizer(
    tokens: Sequence[str],
    added: "Sequence[AddedToken]",
    unknown: str,
    begin: str | None,
    space_before: bool,
    scores: Sequence[float] | None = None,
) -> "Tokenizer":
    """A SentencePiece BPE model's, whose file holds no merges: they follow from the vocabulary.

    Args:
        tokens: bytes are written <0x00> to <0xFF>.
        added: tokens that are never split, special ones among them.
        begin: the token that a text begins with, if any.
        space_before: whether a text is read as if a space stood before it.
        scores: of the tokens; higher ones are merged first. None: in their own order.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids = {token: number for number, token in enumerate(tokens)}
    order = list(ids)
    if scores is not None:
        order.sort(key=lambda token: -scores[ids[token]])
    model = models.BPE(
        vocab=ids, merges=_merges(ids, order), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    before: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    after: list[decoders.Decoder] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if space_before:
        before.insert(0, normalizers.Prepend(SPACE))
        after.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(before)
    tokenizer.decoder = decoders.Sequence(after)
    _begin_with(tokenizer, begin, ids)
    _add(tokenizer, added)
    return tokenizer


def _begin_with(tokenizer: "Tokenizer", begin: str | None, ids: dict[str, int]) -> None:
    from tokenizers import processors

    if begin is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, ids[begin])]
        )


def _add(tokenizer: "Tokenizer", added: "Sequence[AddedToken]") -> None:
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])


def _merges(ids: dict[str, int], order: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of tokens whose text is a token too, in the order in which those come."""
    merges = []
    for token in order:
        pairs = []
        for cut in range(1, len(token)):
            left = token[:cut]
            right = token[cut:]
            if left in ids and right in ids:
                pairs.append((left, right))
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges
