"""Chooses the windows in which a bundle's encoder gets speech while it is still spoken.

An encoder sees a whole utterance at once. Windows let the runtime encode during speech, so that an
answer can begin soon after its end.
"""

from collections.abc import Callable

import numpy as np

from tiny_align.align.model.projector import STACK
from tiny_align.runtime.front_ends.base import AnyFrontEnd
from tiny_align.runtime.windows import WindowSpec

MARGIN_S = 0.64  # discarded at each cut


def window_spec(
    window_s: float,
    front_end: AnyFrontEnd,
    frame_s: float,
    encode: Callable[[np.ndarray], np.ndarray],
) -> WindowSpec | None:
    """Windows of about `window_s` seconds for a projector that pools nothing; None if that is 0.

    Args:
        frame_s: seconds of audio per feature.
        encode: maps the front end's output for a window (1, rows, ...) to features (1, N, Da).
    """
    vector_samples = round(STACK * frame_s * front_end.sample_rate)
    n_vectors = round(window_s * front_end.sample_rate / vector_samples)
    if not n_vectors:
        return None
    noise = np.random.default_rng(0).standard_normal(n_vectors * vector_samples)
    audio = noise.astype(np.float32) * 0.1
    n_features = encode(front_end(audio)[None]).shape[1]
    margin = round(MARGIN_S * front_end.sample_rate / vector_samples)
    return WindowSpec(n_vectors, margin, vector_samples, min(n_features, n_vectors * STACK))
