"""Synthetic speakers: espeak-ng's and some of flite's voices for training, other flite voices as
new speakers.

espeak-ng is driven through its C library (Debian: libespeak-ng1), in a copy of its data directory
to which random voice variants are added: formants, pitch, breath and tone drawn at random, so that
hundreds of different "speakers" say the corpus. flite's voices (Debian: flite) are made of
recordings of humans. `TRAINING_VOICES` are trained on too; nothing the project ships is trained on
`NEW_VOICES`.
"""

import ctypes
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000
ACCENTS = [
    "en-us", "en-us", "en-us", "en", "en-gb-x-rp", "en-gb-scotland", "en-us-nyc", "en-029",
    "en-gb-x-gbcwmd",
]  # fmt: skip
STOCK_VARIANTS = [
    "Alicia", "Andrea", "Andy", "Annie", "Denis", "Diogo", "Gene", "Gene2", "Hugo", "Jacky",
    "Lee", "Marco", "Mario", "Michael", "Mike", "adam", "anika", "antonio", "aunty", "belinda",
    "benjamin", "boris", "caleb", "david", "ed", "edward", "f1", "f2", "f3", "f4", "f5",
    "grandma", "grandpa", "gustave", "iven", "john", "klatt", "klatt2", "klatt3", "klatt4",
    "linda", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "max", "michel", "miguel",
    "norbert", "pablo", "paul", "pedro", "quincy", "rob", "robert", "sandro", "shelby", "steph",
    "steph2", "travis", "victor", "zac",
]  # fmt: skip
TRAINING_VOICES = ("kal", "kal16", "rms")  # of flite: one man recorded in two ways, and another
NEW_VOICES = ("awb", "slt")  # of flite: a Scottish man and a woman
# an English sound in espeak-ng's spelling -> what later learners of English say instead
FOREIGN = {
    "T": "tsf", "D": "dzv", "r": "R", "h": "", "w": "v", "v": "wb", "z": "s", "N": "n", "dZ": ("Z", "tS"), "tS": "S",
    "I": ("i:", "e"), "i:": "I", "V": "aE0", "a": "E", "3:": "Ee", "@": "Ea", "A:": "a", "O:": "o", "U": ("u:",),
    "eI": ("e", "E", "e:"), "oU": ("o", "O:"), "aI": "a", "i@": ("i:", "i"), "e@": "E", "o@": "oO", "A@": "a",
}  # fmt: skip
FOREIGN_FINAL = {"d": "t", "z": "s", "v": "f", "g": "k", "b": "p", "dZ": "tS"}  # at a word's end
FOREIGN_ODDS = 0.5  # of a random voice to have an accent of its own
CHILD = 1.3  # how much shorter a child's vocal tract is, and how much higher the voice

_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4  # espeak_PARAMETER
_RETRIEVAL = 1  # espeak_AUDIO_OUTPUT


def random_variant(rng: random.Random, name: str) -> str:
    """The text of an espeak-ng voice variant with a vocal tract and a voice of its own."""
    tract = rng.uniform(0.85, 1.22)  # shorter vocal tract, higher formants
    low = rng.uniform(65, 120) if tract < 1.02 else rng.uniform(100, 230)
    lines = [
        "language variant",
        f"name {name}",
        f"pitch {low:.0f} {low * rng.uniform(1.15, 1.7):.0f}",
    ]
    if rng.random() < 0.4:
        lines.append(f"klatt {rng.randint(1, 5)}")
    for formant in range(9):
        scale = 100 * tract * rng.uniform(0.94, 1.06)
        height, width = rng.uniform(60, 115), rng.uniform(70, 190)
        if formant >= 4:
            height *= rng.uniform(0.2, 1.0)
        lines.append(f"formant {formant} {scale:.0f} {height:.0f} {width:.0f}")
    lines.append(f"flutter {rng.randint(0, 8)}")
    lines.append(f"roughness {rng.randint(0, 3)}")
    lines.append(f"voicing {rng.randint(50, 130)}")
    lines.append(f"consonants {rng.randint(60, 150)} {rng.randint(60, 130)}")
    if rng.random() < 0.4:
        lines.append("breath " + " ".join(str(rng.randint(0, 12)) for _ in range(6)))
    tone = " ".join(f"{hz} {rng.randint(40, 250)}" for hz in (200, 800, 1800, 3200))
    lines.append(f"tone {tone}")
    if rng.random() < FOREIGN_ODDS:
        lines += foreign_sounds(rng, share=rng.uniform(0.15, 0.7))
    return "\n".join(lines) + "\n"


def foreign_sounds(rng: random.Random, share: float) -> list[str]:
    """Lines of a variant that replace about `share` of the sounds that foreigners find hard, in the
    whole voice.

    The sounds are those that the literature on learners' English names; which of them go together
    is drawn at random, so that no one language is meant.
    """
    kinds = []
    for sound, replacements in FOREIGN.items():
        kinds.append((0, sound, rng.choice(list(replacements) or ["NULL"])))
    for sound, replacement in FOREIGN_FINAL.items():
        kinds.append((1, sound, replacement))
    return [
        f"replace {where} {sound} {replacement}"
        for where, sound, replacement in kinds
        if rng.random() < share
    ]


def _not_english(folder: str, names: list[str]) -> list[str]:
    """What to leave out of the copy.

    The library lists at most 350 voices, and English is all we need.
    """
    if Path(folder).name == "lang":
        return [name for name in names if name != "gmw"]
    return [name for name in names if name == "mb"]


class Synthesiser:
    """Says a text in any of `voices`: plainly, with random settings, or with pauses."""

    voices: list[str]

    def say(
        self, text: str, voice: str, *, rate: int = 165, pitch: int = 50, pitch_range: int = 50
    ) -> np.ndarray:
        """(S,) float32 at 16 kHz; `rate` in words per minute, `pitch` and `pitch_range` 0..99."""
        raise NotImplementedError

    def say_randomly(self, text: str, rng: random.Random, voice: str | None = None) -> np.ndarray:
        """`say` with a random voice (or the one given), rate, pitch and range."""
        return self.say(
            text,
            voice or rng.choice(self.voices),
            rate=rng.randint(115, 230),
            pitch=rng.randint(25, 75),
            pitch_range=rng.randint(15, 80),
        )

    def say_haltingly(
        self, text: str, rng: random.Random, pause_s: tuple[float, float] = (0.03, 0.6)
    ) -> np.ndarray:
        """`say_randomly` with one voice and a pause after every few words, as digits are read
        aloud.
        """
        voice, words, pieces = rng.choice(self.voices), text.split(), []
        rate, pitch = rng.randint(115, 230), rng.randint(25, 75)
        while words:
            n = rng.choice((1, 1, 1, 2, 3))
            audio = self.say(
                " ".join(words[:n]),
                voice,
                rate=round(rate * rng.uniform(0.85, 1.15)),
                pitch=pitch + rng.randint(-8, 8),
                pitch_range=rng.randint(15, 80),
            )
            loud = np.flatnonzero(np.abs(audio) > 0.01 * np.abs(audio).max())
            silence = np.zeros(int(rng.uniform(*pause_s) * SAMPLE_RATE), np.float32)
            pieces += [audio[loud[0] : loud[-1] + 1], silence]
            words = words[n:]
        return np.concatenate(pieces[:-1])


class Espeak(Synthesiser):
    """One espeak-ng synthesiser with `n_random` extra voices; a process holds at most one."""

    def __init__(self, n_random: int = 200, seed: int = 0):
        rng = random.Random(seed)
        self._home = tempfile.TemporaryDirectory(prefix="espeak-")
        self._lib = ctypes.CDLL("libespeak-ng.so.1")
        self._lib.espeak_Initialize(_RETRIEVAL, 0, None, 0)
        self._lib.espeak_Info.restype = ctypes.c_char_p
        stock = ctypes.c_char_p()
        self._lib.espeak_Info(ctypes.byref(stock))
        self._lib.espeak_Terminate()
        data = Path(self._home.name) / "espeak-ng-data"
        shutil.copytree(stock.value.decode(), data, ignore=_not_english)
        names = [f"random{i}" for i in range(n_random)]
        for name in names:
            (data / "voices" / "!v" / name).write_text(random_variant(rng, name))
        self.voices = [f"{rng.choice(ACCENTS)}+{v}" for v in (*STOCK_VARIANTS, *names)]
        self._rate = self._lib.espeak_Initialize(_RETRIEVAL, 0, self._home.name.encode(), 0)
        if self._rate <= 0:
            raise RuntimeError(
                f"espeak-ng could not start with the data in {data}; is libespeak-ng1 installed?"
            )
        self._chunks: list[np.ndarray] = []
        callback = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        self._callback = callback(self._collect)  # kept alive: the library calls it
        self._lib.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples, n: int, _events) -> int:
        if samples and n > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, shape=(n,)).copy())
        return 0

    def say(
        self, text: str, voice: str, *, rate: int = 165, pitch: int = 50, pitch_range: int = 50
    ) -> np.ndarray:
        """(S,) float32 at 16 kHz; `rate` in words per minute, `pitch` and `pitch_range` 0..99."""
        if self._lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        for parameter, value in (
            (_RATE, rate),
            (_PITCH, pitch),
            (_RANGE, pitch_range),
            (_VOLUME, 100),
        ):
            self._lib.espeak_SetParameter(parameter, value, 0)
        self._chunks = []
        encoded = text.encode() + b"\0"
        self._lib.espeak_Synth(
            encoded, len(encoded), 0, 1, 0, 1, None, None
        )  # position by character, UTF-8
        self._lib.espeak_Synchronize()
        if not self._chunks:
            raise RuntimeError(f"espeak-ng made no sound of {text!r} with the voice {voice!r}")
        audio = np.concatenate(self._chunks).astype(np.float32) / 32768
        return soxr.resample(audio, self._rate, SAMPLE_RATE).astype(np.float32)


class Flite(Synthesiser):
    """flite, a process for each sentence; by default in the voices that are trained on."""

    def __init__(self, voices: tuple[str, ...] = TRAINING_VOICES):
        self.voices = list(voices)

    def say(
        self, text: str, voice: str, *, rate: int = 165, pitch: int = 50, pitch_range: int = 50
    ) -> np.ndarray:
        settings = {
            "duration_stretch": 165 / rate,
            "int_f0_target_mean": 105 * 2 ** ((pitch - 50) / 50),  # Hz
            "int_f0_target_stddev": 0.3 * pitch_range,
        }
        return flite(text, voice, settings)


def flite(text: str, voice: str, settings: dict[str, float] | None = None) -> np.ndarray:
    """(S,) float32 at 16 kHz in one of flite's voices, as it speaks by itself or with other
    `settings` of its own.
    """
    options = []
    for name, value in (settings or {}).items():
        options += ["--setf", f"{name}={value:.3f}"]
    with tempfile.NamedTemporaryFile(suffix=".wav") as out:
        subprocess.run(["flite", "-voice", voice, *options, "-t", text, "-o", out.name], check=True)
        audio, rate = soundfile.read(out.name, dtype="float32")
    return soxr.resample(audio, rate, SAMPLE_RATE).astype(np.float32)


def child(text: str) -> np.ndarray:
    """(S,) float32 at 16 kHz: `slt` with a child's vocal tract, at her own pace."""
    slow = flite(text, "slt", {"duration_stretch": CHILD})
    return soxr.resample(slow, SAMPLE_RATE, SAMPLE_RATE / CHILD).astype(np.float32)
