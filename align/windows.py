"""A projector on whole utterances in training, window by window as the runtime has it (runtime/windows.py)."""

import torch
from torch import Tensor

from tiny_align.runtime.windows import WindowSpec


def project(projector, takes: list[Tensor], windows: WindowSpec | None) -> tuple[Tensor, Tensor]:
    """What a projector gives for utterances, each window by itself, and how many rows of each count.

    Args:
        takes: (N, Da) features each, the windows' one after another.
        windows: how speech is cut; None: not at all.
    Returns:
        (B, T, ...) padded, and (B,).
    """
    parts = [take.split(windows.n_features) if windows else [take] for take in takes]
    n_frames = torch.tensor([len(part) for utterance in parts for part in utterance])
    padded = torch.nn.utils.rnn.pad_sequence([part for utterance in parts for part in utterance], batch_first=True)
    out, lengths = projector(padded, n_frames), projector.output_lengths(n_frames)
    if len(out) == len(takes):  # nothing was cut
        return out, lengths
    each = iter(row[:n] for row, n in zip(out, lengths))
    joined = [torch.cat([next(each)[which] for which in windows.kept_of(len(utterance))]) for utterance in parts]
    return torch.nn.utils.rnn.pad_sequence(joined, batch_first=True), torch.tensor([len(rows) for rows in joined])
