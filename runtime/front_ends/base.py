"""What an encoder is given, by kind: every front end that a manifest can name.

A front end is a frozen dataclass of numbers with
    kind          its name in the manifest,
    sample_rate   Hz,
    row_samples   samples of audio per row of its output,
    row_size      M, where a row is a frame,
    __call__      (S,) float32 audio in [-1, 1] -> (rows, M) float32, or (rows,) where a row is a sample.
Each equals the feature extractor of transformers that its file names, in numpy.
"""

from tiny_align.runtime.front_ends.nemo import FrontEnd
from tiny_align.runtime.front_ends.seamless import FilterBank
from tiny_align.runtime.front_ends.wav2vec2 import Waveform
from tiny_align.runtime.front_ends.whisper import WhisperMel

KINDS = {kind.kind: kind for kind in (FrontEnd, Waveform, WhisperMel, FilterBank)}
AnyFrontEnd = FrontEnd | Waveform | WhisperMel | FilterBank


def front_end_from(value: dict) -> AnyFrontEnd:
    """A manifest's front end; one without a kind is NeMo's, as in bundles from before there were others.

    Raises:
        KeyError, TypeError: no such kind, or no such parameter.
    """
    parameters = {name: given for name, given in value.items() if name != "kind"}
    return KINDS[value.get("kind", FrontEnd.kind)](**parameters)
