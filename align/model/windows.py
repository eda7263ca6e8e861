"""Project whole utterances in training, window by window as in use (runtime/windows.py)."""

from itertools import islice

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tiny_align.align.model.projector import BridgeFormer
from tiny_align.runtime.windows import WindowSpec

# Windows that are padded to the longest of them and projected together. More would mean more
# padding, fewer would mean smaller matrix products.
GROUP = 8


def project(
    projector: BridgeFormer, features: list[Tensor], windows: WindowSpec | None
) -> tuple[Tensor, Tensor]:
    """Project utterances, each window by itself.

    Args:
        features: (N, Da) of each utterance, its windows one after another.
        windows: how speech is cut; None: not at all.

    Returns:
        Vectors (B, T, ...), padded, and how many of them belong to each utterance, (B,).
    """
    pieces: list[Tensor] = []  # the windows of all utterances
    n_pieces = []  # of each utterance
    for utterance in features:
        split = utterance.split(windows.n_features) if windows else [utterance]
        pieces.extend(split)
        n_pieces.append(len(split))
    projected = iter(_project_pieces(projector, pieces))
    vectors = [_join(list(islice(projected, n)), windows) for n in n_pieces]
    lengths = torch.tensor([len(utterance) for utterance in vectors])
    return pad_sequence(vectors, batch_first=True), lengths


def _join(vectors: list[Tensor], windows: WindowSpec | None) -> Tensor:
    """The vectors of an utterance's windows without the margins at the cuts, (T, ...)."""
    if windows is None:
        return vectors[0]
    slices = windows.keep_slices(len(vectors))
    return torch.cat([window[keep] for window, keep in zip(vectors, slices)])


def _project_pieces(projector: BridgeFormer, pieces: list[Tensor]) -> list[Tensor]:
    """(N, Da) features -> (T, ...) vectors of each piece; pieces of similar length go together."""
    by_length = sorted(range(len(pieces)), key=lambda i: len(pieces[i]))
    vectors: dict[int, Tensor] = {}  # place in `pieces` -> vectors
    for start in range(0, len(pieces), GROUP):
        group = by_length[start : start + GROUP]
        batch = [pieces[i] for i in group]
        n_frames = torch.tensor([len(piece) for piece in batch])
        output = projector(pad_sequence(batch, batch_first=True), n_frames)
        lengths = projector.output_lengths(n_frames)
        for i, piece_output, length in zip(group, output, lengths):
            vectors[i] = piece_output[:length]
    return [vectors[i] for i in range(len(pieces))]
