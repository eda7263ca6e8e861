"""Tokenizers rebuilt from a vocabulary, for files that hold no tokenizer.json."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

SPACE = "\u2581"  # how SentencePiece writes a space


def byte_level_tokenizer(
    tokens: Sequence[str], merges: Iterable[tuple[str, str]], added: "Sequence[AddedToken]"
) -> "Tokenizer":
    """SmolLM's: BPE on bytes as GPT-2's, and every digit is a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add(tokenizer, added)
    return tokenizer


def sentencepiece_tokenizer(
    tokens: Sequence[str],
    added: "Sequence[AddedToken]",
    unknown: str,
    begin: str,
    space_before: bool,
) -> "Tokenizer":
    """A SentencePiece BPE model's, whose file holds no merges: they follow from the vocabulary.

    Args:
        tokens: in the order in which they were merged; bytes are written <0x00> to <0xFF>.
        added: tokens that are never split, special ones among them.
        begin: the token that a text begins with.
        space_before: whether a text is read as if a space stood before it.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    ids = {token: number for number, token in enumerate(tokens)}
    model = models.BPE(
        vocab=ids, merges=_merges(ids), unk_token=unknown, fuse_unk=True, byte_fallback=True
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
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, ids[begin])]
    )
    _add(tokenizer, added)
    return tokenizer


def _add(tokenizer: "Tokenizer", added: "Sequence[AddedToken]") -> None:
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])


def _merges(ids: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs of tokens whose text is a token too, in the order of the vocabulary."""
    merges = []
    for token in ids:
        pairs = []
        for cut in range(1, len(token)):
            left = token[:cut]
            right = token[cut:]
            if left in ids and right in ids:
                pairs.append((left, right))
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges
