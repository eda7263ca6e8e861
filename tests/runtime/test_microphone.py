"""A microphone that is late, lacks a rate, is pulled out or was never there: a PortAudio-like module in its place."""

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
    """Calls back from a thread of its own, as PortAudio does; `rates` are what its device can do."""

    rates, own, blocks, fails = (RATE,), RATE, [], False

    def __init__(self, samplerate, blocksize, channels, dtype, device, callback):
        if samplerate not in self.rates or device == 7:
            raise PortAudioError("Invalid sample rate")
        assert (channels, dtype) == (1, "float32")
        self.callback, self.blocksize, self.active, self.closed = callback, blocksize, False, False

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
        self.active = False  # pulled out

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


def taken(microphone, until=10**9):
    """Blocks and notices until it is gone, and the last words."""
    items = []
    try:
        for item in microphone:
            items.append(item)
            if len(items) == until:
                microphone.stop()
    except AudioError as error:
        return items, str(error)
    return items, ""


def test_blocks_arrive_in_order_until_it_is_gone(portaudio):
    portaudio.blocks = [block(n) for n in range(50)]
    with Microphone(RATE) as microphone:
        began = time.monotonic()
        items, last = taken(microphone)
    assert np.allclose(np.concatenate(items), np.concatenate(portaudio.blocks), atol=1e-4)
    assert "the microphone is gone: plug it in" in last and time.monotonic() - began < 1
    assert microphone._stream.closed


def test_one_that_only_falls_silent_is_gone_too(portaudio, monkeypatch):
    monkeypatch.setattr(module, "GONE_S", 0.2)
    monkeypatch.setattr(portaudio, "_play", lambda self: None)  # active, and never calls back
    with Microphone(RATE) as microphone:
        assert "is gone" in taken(microphone)[1]


def test_stop_ends_the_reading(portaudio, monkeypatch):
    monkeypatch.setattr(portaudio, "_play", lambda self: None)
    with Microphone(RATE) as microphone:
        threading.Timer(0.1, microphone.stop).start()
        assert taken(microphone) == ([], "")


def test_what_nobody_takes_is_dropped_and_said(portaudio):
    kept = round(module.BACKLOG_S / module.BLOCK_S)
    portaudio.blocks = [block(1)] * (kept + 300)
    with Microphone(RATE) as microphone:
        microphone._start()
        microphone._stream.stop()  # the reader slept meanwhile
        assert microphone._blocks.qsize() == kept
        portaudio.blocks = []
        first = next(iter(microphone))
        assert isinstance(first, np.ndarray)
        microphone._take(np.float32(block(2))[:, None], 512, None, None)
        items, _ = taken(microphone)
    [notice] = [item for item in items if isinstance(item, Notice)]
    assert (
        notice.dropped_s == pytest.approx(300 * 512 / RATE)
        and "9.6 s of audio dropped" in notice.text
    )
    assert items[-2] is notice  # where it was lost


def test_what_the_system_lost_is_said(portaudio):
    portaudio.blocks = [block(1), OVERFLOW, block(2)]
    with Microphone(RATE) as microphone:
        items, _ = taken(microphone)
    assert [isinstance(item, Notice) for item in items] == [False, True, False, False]


@pytest.mark.parametrize("own", [48_000, 44_100])
def test_a_rate_it_lacks_is_made_and_said(portaudio, own):
    portaudio.rates, portaudio.own = (own,), own
    time_s = np.arange(own) / own
    portaudio.blocks = np.array_split(np.sin(2 * np.pi * 440 * time_s), 31)
    with Microphone(RATE) as microphone:
        (notice, *blocks), _ = taken(microphone)
    assert notice == Notice(f"the microphone records at {own} Hz: resampled to 16000 Hz")
    audio = np.concatenate(blocks)
    assert audio.dtype == np.float32
    assert len(audio) == pytest.approx(RATE, abs=0.03 * RATE)  # the filter holds some back
    expected = np.sin(2 * np.pi * 440 * np.arange(len(audio)) / RATE)
    assert np.abs(audio - expected)[200:].max() < 0.01


def test_record_is_what_is_said_until_told(portaudio):
    portaudio.rates, portaudio.own = (48_000,), 48_000
    portaudio.blocks = [block(100, 1536)] * 40
    with Microphone(RATE) as microphone:
        audio = microphone.record(lambda: microphone._stream.thread.join())
        again = microphone.record(lambda: None)
    assert len(audio) == len(again) == 40 * 512 and audio.dtype == np.float32
    assert np.allclose(audio[1000:-1000], 0.1, atol=1e-3)


def test_no_such_device_names_those_there_are(portaudio):
    with pytest.raises(AudioError, match=r"no microphone 7.*known: USB microphone. Give --device"):
        Microphone(RATE, "7")


def test_one_in_use_does_not_start(portaudio):
    portaudio.fails = True
    with Microphone(RATE) as microphone, pytest.raises(AudioError, match="close what else uses it"):
        next(iter(microphone))


def test_no_portaudio_is_said(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "sounddevice":
                raise OSError("PortAudio library not found")

    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(AudioError, match="PortAudio library not found: install PortAudio"):
        Microphone(RATE)
