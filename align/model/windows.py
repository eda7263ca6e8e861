"""A projector on whole utterances in training, window by window as the runtime has it (runtime/windows.py)."""

import torch
from torch import Tensor

from tiny_align.runtime.windows import WindowSpec

TOGETHER = (
    8  # windows padded to the longest of them: more would be more padding, fewer smaller products
)


def project(projector, takes: list[Tensor], windows: WindowSpec | None) -> tuple[Tensor, Tensor]:
    """What a projector gives for utterances, each window by itself, and how many rows of each count.

    Args:
        takes: (N, Da) features each, the windows' one after another.
        windows: how speech is cut; None: not at all.
    Returns:
        (B, T, ...) padded, and (B,).
    """
    parts = [take.split(windows.n_features) if windows else [take] for take in takes]
    each = iter(_one_by_one(projector, [part for utterance in parts for part in utterance]))
    rows = [[next(each) for _ in utterance] for utterance in parts]
    joined = [
        torch.cat([r[which] for r, which in zip(u, windows.keep_slices(len(u)))])
        if windows
        else u[0]
        for u in rows
    ]
    return torch.nn.utils.rnn.pad_sequence(joined, batch_first=True), torch.tensor(
        [len(r) for r in joined]
    )


def _one_by_one(projector, parts: list[Tensor]) -> list[Tensor]:
    """Of each part (N, Da) what the projector gives, (T, ...); those of about the same length go together."""
    given, order = [None] * len(parts), sorted(range(len(parts)), key=lambda i: len(parts[i]))
    for group in (order[i : i + TOGETHER] for i in range(0, len(order), TOGETHER)):
        n_frames = torch.tensor([len(parts[i]) for i in group])
        out = projector(
            torch.nn.utils.rnn.pad_sequence([parts[i] for i in group], batch_first=True), n_frames
        )
        for i, row, n in zip(group, out, projector.output_lengths(n_frames)):
            given[i] = row[:n]
    return given
