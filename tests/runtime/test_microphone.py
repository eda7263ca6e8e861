"""Microphones that are late, lack a rate, are unplugged or absent: a module like PortAudio's."""

import sys
import threading
import time
import types

import numpy as np
import pytest

from tiny_align.runtime.errors import AudioError
from tiny_align.runtime.listening import microphone as module
from tiny_align.runtime.listening.microphone import Microphone, Notice

RATE = 16_000


class PortAudioError(Exception):
    pass


class Stream:
    """Calls back from a thread of its own, as PortAudio does."""

    rates = (RATE,)  # that its device has
    own = RATE  # its device's default
    blocks = ()
    fails = False
    latest = None  # stream that was opened

    def __init__(self, samplerate, blocksize, channels, dtype, device, callback):
        if samplerate not in self.rates or device == 7:
            raise PortAudioError("Invalid sample rate")
        assert (channels, dtype) == (1, "float32")
        self.callback = callback
        self.active = False
        self.closed = False
        type(self).latest = self

    def start(self):
        if self.fails:
            raise PortAudioError("Device unavailable")
        self.active = True
        self.thread = threading.Thread(target=self._play)
        self.thread.start()

    def _play(self):
        for block in self.blocks:
            late = types.SimpleNamespace(input_overflow=block is OVERFLOW)
            self.callback(np.asarray(block, np.float32)[:, None], len(block), None, late)
        self.active = False  # unplugged

    def stop(self):
        self.thread.join()

    def close(self):
        self.closed = True


OVERFLOW = np.ones(512)


def block(number, size=512):
    return np.full(size, number / 1000)


@pytest.fixture
def portaudio(monkeypatch):
    """The class of the streams; change it before a microphone is opened."""
    device = {"name": "USB microphone", "max_input_channels": 1}

    def query_devices(device_id=None, kind=None):
        if kind and device_id == 7:
            raise ValueError("No input device matching 7")
        return device | {"default_samplerate": float(streams.own)} if kind else [device]

    streams = type("Stream", (Stream,), {})
    fake = types.SimpleNamespace(
        PortAudioError=PortAudioError, InputStream=streams, query_devices=query_devices
    )
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    return streams


def read_all(microphone):
    """(blocks and notices, the error's message) until the microphone is gone."""
    items = []
    try:
        for item in microphone:
            items.append(item)
    except AudioError as error:
        return items, str(error)
    return items, ""


def test_blocks_arrive_in_order_until_the_microphone_is_gone(portaudio):
    portaudio.blocks = [block(n) for n in range(50)]
    with Microphone(RATE) as microphone:
        began = time.monotonic()
        items, last = read_all(microphone)
    assert np.allclose(np.concatenate(items), np.concatenate(portaudio.blocks), atol=1e-4)
    assert "the microphone is gone: plug it in" in last and time.monotonic() - began < 1
    assert portaudio.latest.closed


def test_a_microphone_without_blocks_is_gone(portaudio, monkeypatch):
    monkeypatch.setattr(module, "GONE_S", 0.2)
    monkeypatch.setattr(portaudio, "_play", lambda self: None)  # active, and never calls back
    with Microphone(RATE) as microphone:
        assert "is gone" in read_all(microphone)[1]


def test_stop_ends_an_iteration(portaudio, monkeypatch):
    monkeypatch.setattr(portaudio, "_play", lambda self: None)
    with Microphone(RATE) as microphone:
        threading.Timer(0.1, microphone.stop).start()
        assert read_all(microphone) == ([], "")


def test_audio_beyond_the_backlog_is_dropped_with_a_notice(portaudio):
    max_blocks = round(module.BACKLOG_S / module.BLOCK_S)
    portaudio.blocks = [block(1)] * (max_blocks + 300)
    with Microphone(RATE) as microphone:
        portaudio.latest.start()
        portaudio.latest.stop()  # all blocks came before the first is read
        portaudio.blocks = []
        first = next(iter(microphone))
        assert isinstance(first, np.ndarray)
        portaudio.latest.callback(np.float32(block(2))[:, None], 512, None, None)
        items, _ = read_all(microphone)
    [notice] = [item for item in items if isinstance(item, Notice)]
    assert notice.dropped_s == pytest.approx(300 * 512 / RATE)
    assert "9.6 s of audio dropped" in notice.text
    assert len(items) == max_blocks - 1 + 2  # the rest of the backlog, the notice, the last block
    assert items[-2] is notice  # where audio was lost


def test_an_overflow_of_the_system_gives_a_notice(portaudio):
    portaudio.blocks = [block(1), OVERFLOW, block(2)]
    with Microphone(RATE) as microphone:
        items, _ = read_all(microphone)
    assert [isinstance(item, Notice) for item in items] == [False, True, False, False]


@pytest.mark.parametrize("own", [48_000, 44_100])
def test_another_rate_is_resampled_with_a_notice(portaudio, own):
    portaudio.rates, portaudio.own = (own,), own
    time_s = np.arange(own) / own
    portaudio.blocks = np.array_split(np.sin(2 * np.pi * 440 * time_s), 31)
    with Microphone(RATE) as microphone:
        (notice, *blocks), _ = read_all(microphone)
    assert notice == Notice(f"the microphone records at {own} Hz: resampled to 16000 Hz")
    audio = np.concatenate(blocks)
    assert audio.dtype == np.float32
    assert len(audio) == pytest.approx(RATE, abs=0.03 * RATE)  # the filter holds some back
    expected = np.sin(2 * np.pi * 440 * np.arange(len(audio)) / RATE)
    assert np.abs(audio - expected)[200:].max() < 0.01


def test_record_returns_the_audio_until_wait_returns(portaudio):
    portaudio.rates, portaudio.own = (48_000,), 48_000
    portaudio.blocks = [block(100, 1536)] * 40
    with Microphone(RATE) as microphone:
        audio = microphone.record(lambda: portaudio.latest.thread.join())
        again = microphone.record(lambda: None)
    assert len(audio) == len(again) == 40 * 512 and audio.dtype == np.float32
    assert np.allclose(audio[1000:-1000], 0.1, atol=1e-3)


def test_an_unknown_device_is_refused_with_those_there_are(portaudio):
    with pytest.raises(AudioError, match=r"no microphone 7.*known: USB microphone. Give --device"):
        Microphone(RATE, "7")


def test_a_microphone_in_use_is_refused(portaudio):
    portaudio.fails = True
    with Microphone(RATE) as microphone, pytest.raises(AudioError, match="close what else uses it"):
        next(iter(microphone))


def test_a_missing_portaudio_is_refused_with_the_remedy(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "sounddevice":
                raise OSError("PortAudio library not found")

    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(AudioError, match="PortAudio library not found: install PortAudio"):
        Microphone(RATE)
