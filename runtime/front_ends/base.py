"""Every front end that a manifest can name, by its kind.

A front end is a frozen dataclass of numbers with
    kind          its name in the manifest,
    sample_rate   Hz,
    row_samples   samples of audio per row of its output,
    row_size      M, if a row is a frame,
    __call__      (S,) float32 audio in [-1, 1] -> (rows, M) float32, or (rows,) if a row is a
                  sample.
Each equals, in numpy, the feature extractor of transformers that its file names.

To add one for a new family of encoders, write the dataclass in a file of its own here, and add it
to `AnyFrontEnd` below. For the export, export/encoders.py makes it from a checkpoint's
preprocessor_config.json (`FRONT_ENDS`).
"""

from typing import Any, get_args

from tiny_align.runtime.front_ends.nemo import NemoMel
from tiny_align.runtime.front_ends.seamless import FilterBank
from tiny_align.runtime.front_ends.wav2vec2 import Waveform
from tiny_align.runtime.front_ends.whisper import WhisperMel

AnyFrontEnd = NemoMel | Waveform | WhisperMel | FilterBank
KINDS: dict[str, type[AnyFrontEnd]] = {cls.kind: cls for cls in get_args(AnyFrontEnd)}


def front_end_from(value: dict[str, Any]) -> AnyFrontEnd:
    """Make the front end that a manifest describes; without a kind, as in old bundles, NeMo's.

    Raises:
        KeyError, TypeError: no such kind, or no such parameter.
    """
    parameters = dict(value)
    kind = parameters.pop("kind", NemoMel.kind)
    return KINDS[kind](**parameters)
