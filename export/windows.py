"""How speech is to be cut for an encoder: the windows of a bundle."""

import numpy as np

from tiny_align.align.model.projector import STACK
from tiny_align.runtime.windows import WindowSpec

MARGIN_S = 0.64  # at each cut


def window_spec(window_s: float, front_end, frame_s: float, encode) -> WindowSpec | None:
    """The windows of about `window_s` seconds, in vectors of a projector that pools nothing; None of 0 s.

    Args:
        encode: what the front end made of a window, (1, rows, ...) -> (1, N, Da) features.
    """
    vector_samples = round(STACK * frame_s * front_end.sample_rate)
    n_vectors = round(window_s * front_end.sample_rate / vector_samples)
    if not n_vectors:
        return None
    noise = (
        np.random.default_rng(0).standard_normal(n_vectors * vector_samples).astype(np.float32)
        * 0.1
    )
    n_features = encode(front_end(noise)[None]).shape[1]
    margin = round(MARGIN_S * front_end.sample_rate / vector_samples)
    return WindowSpec(n_vectors, margin, vector_samples, min(n_features, n_vectors * STACK))
