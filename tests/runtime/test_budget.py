"""What a bundle takes of memory, before it is loaded; too little is refused with what to change."""

import os
import subprocess
import sys

import pytest

from tiny_align.runtime import Assistant, machine
from tiny_align.runtime.backends import budget as budget_module
from tiny_align.runtime.backends.budget import BASE_BYTES, budget, cache_bytes
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.manifest import MANIFEST
from tiny_align.runtime.errors import BundleError, TinyAlignError
from tiny_align.runtime.llm import Cache

LOADED = r"""
import re, sys
from tiny_align.runtime import Assistant
from tiny_align.runtime.audio.samples import read_audio
with Assistant.load(sys.argv[1], threads=1) as assistant:
    assistant.answer_file(sys.argv[2])
print(int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""


@pytest.fixture
def bundle(bundle_path):
    return Bundle.open(bundle_path, verify=False)


def test_cache_bytes_are_keys_and_values_times_the_backends_sets(bundle):
    spec = bundle.manifest.llm
    one = 2 * spec.n_layers * spec.n_kv_heads * spec.head_size * 4  # bytes of a position
    assert cache_bytes(bundle, "onnxruntime", 100) == 100 * one
    assert cache_bytes(bundle, "tensorrt", 100) == 2 * 100 * one


def test_the_weights_are_those_of_the_backends_graphs(bundle):
    """The LLM's graph for ONNX Runtime has no weights of its own: they are the plain one's."""
    shared = (bundle.path / "llm.onnx.data").stat().st_size
    for backend in ("onnxruntime", "tensorrt"):
        assert budget(bundle, backend, 64).weights["llm"] > shared


def test_a_process_takes_between_half_of_the_budget_and_all_of_it(bundle, voice_path):
    """The peak of a process that loads the bundle and answers."""
    recording = min(voice_path.glob("test-*.flac"))
    line = [sys.executable, "-c", LOADED, str(bundle.path), str(recording)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    peak = int(subprocess.run(line, capture_output=True, text=True, check=True, env=env).stdout)
    total = budget(bundle, "onnxruntime", bundle.manifest.llm.max_context).total
    assert total / 2 < peak < total


def test_a_conversation_without_memory_is_refused_and_others_go_on(assistant, speech, monkeypatch):
    first = assistant.listen()
    first.push(speech)
    first.settle()
    monkeypatch.setattr(budget_module, "memory", lambda: {"MemAvailable": 1_000})
    with pytest.raises(TinyAlignError, match="one more conversation of 256 positions takes"):
        list(assistant.listen().say("hello"))
    assert [event.token for event in first.finish()]


def test_a_conversation_that_grows_beyond_memory_is_refused(assistant, monkeypatch):
    monkeypatch.setattr(budget_module, "FIRST_POSITIONS", 16)
    cache = Cache()
    rows = assistant.llm.embed([1] * 16)
    assistant.llm.prefill(rows, cache)
    monkeypatch.setattr(budget_module, "memory", lambda: {"MemAvailable": 1_000})
    with pytest.raises(TinyAlignError, match="a longer conversation of 32 positions takes"):
        assistant.llm.prefill(rows[:1], cache)
    assert (cache.length, cache.capacity) == (16, 16)


def test_the_budget_counts_the_beginning_of_a_conversation(bundle):
    """A context of millions of positions takes no memory before they are used."""
    short = budget(bundle, "onnxruntime", 256)
    long = budget(bundle, "onnxruntime", 2**20)
    assert (long.total, long.cache) == (short.total, short.cache)
    assert long.cache == cache_bytes(bundle, "onnxruntime", 256)
    full = 2**20 * cache_bytes(bundle, "onnxruntime", 1)
    assert f"{full >> 20} MiB with all of its 1048576 positions of" in str(long)


def test_too_little_memory_is_refused_before_anything_is_loaded(bundle, monkeypatch):
    monkeypatch.setattr(budget_module, "memory", lambda: {"MemAvailable": BASE_BYTES})
    with pytest.raises(
        TinyAlignError, match=r"takes about \d+ MiB \(encoder .*114 MiB are available: ask"
    ):
        Assistant.load(bundle)


# --- limits: control groups and ulimit ---


def recorded(root, files: dict[str, str]):
    """A machine with these files under `root`."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group_2(path: str, limit: str, used: int, stat: str = "") -> dict[str, str]:
    folder = f"sys/fs/cgroup{path}"
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": str(used),
        f"{folder}/memory.stat": stat,
    }


def group_1(path: str, limit: int, used: int, stat: str = "") -> dict[str, str]:
    folder = f"sys/fs/cgroup/memory{path}"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    return dict(zip((f"{folder}/{name}" for name in names), (str(limit), str(used), stat)))


CACHES_2 = "anon 1\nfile 900\ninactive_file 200\nactive_file 100\nslab_reclaimable 50\n"
CACHES_1 = "cache 900\ntotal_inactive_file 200\ntotal_active_file 150\n"
GROUPS = {  # the process's line, the groups, bytes left in the tightest, its name
    "v2": ("0::/a/b\n", group_2("/a/b", "1000", 600, CACHES_2), 750, "/a/b (memory.max)"),
    "v2, a parent's": (
        "0::/a/b\n",
        group_2("/a/b", "max", 600) | group_2("/a", "1000", 900),
        100,
        "/a (memory.max)",
    ),
    "v2 in a container": ("0::/\n", group_2("", "1000", 400), 600, "/ (memory.max)"),
    "v2, used up": ("0::/a\n", group_2("/a", "1000", 1200), 0, "/a (memory.max)"),
    "v1": (
        "4:cpu:/x\n3:memory:/a\n",
        group_1("/a", 1000, 600, CACHES_1),
        750,
        "/a (memory.limit_in_bytes)",
    ),
    "v1 beside v2": (
        "3:memory:/a\n0::/\n",
        group_1("/a", 1000, 600) | group_1("", 2**63 - 4096, 10),
        400,
        "/a (memory.limit_in_bytes)",
    ),
    "v1 in a container": (
        "3:memory:/docker/1\n",
        group_1("", 1000, 600),
        400,
        "/ (memory.limit_in_bytes)",
    ),
}


@pytest.mark.parametrize(("line", "files", "free", "name"), GROUPS.values(), ids=GROUPS)
def test_a_control_groups_room_is_its_limit_without_what_cannot_be_taken_back(
    tmp_path, line, files, free, name
):
    rooms = machine.memory_limits(recorded(tmp_path, {"proc/self/cgroup": line, **files}))
    tightest = min(rooms, key=lambda room: room.free)
    assert (tightest.free, tightest.limit) == (free, f"in the control group {name}")


@pytest.mark.parametrize("line", ["", "0::/a\n", "no line at all", "3:memory:/a\n"])
def test_without_a_limit_there_is_no_room_to_report(tmp_path, line):
    root = recorded(tmp_path, {"proc/self/cgroup": line, **group_2("/a", "max", 5)})
    assert machine.memory_limits(root) == []


def test_the_tightest_limit_is_named(bundle, monkeypatch):
    rooms = [
        machine.Room(50 << 20, "in the control group /app (memory.max)"),
        machine.Room(90 << 20, "elsewhere"),
    ]
    monkeypatch.setattr(budget_module, "memory_limits", lambda: rooms)
    sentence = (
        r"takes about .* and in the control group /app \(memory\.max\) 50 MiB are available: ask"
    )
    with pytest.raises(TinyAlignError, match=sentence):
        Assistant.load(bundle)


def test_what_threads_reserve_counts_only_if_the_limit_counts_it(bundle, monkeypatch):
    need = budget(bundle, "onnxruntime", 64, threads=4)
    per_thread = 64 << 20
    monkeypatch.setattr(
        budget_module, "memory_limits", lambda: [machine.Room(2 * need.total, "here")]
    )
    need.require()
    rooms = [machine.Room(2 * need.total, "under ulimit -v", per_thread)]
    monkeypatch.setattr(budget_module, "memory_limits", lambda: rooms)
    with pytest.raises(
        TinyAlignError, match=r"with what 11 threads reserve, and under ulimit -v .*fewer --threads"
    ):
        need.require()


def test_a_bundle_without_an_llm_is_refused(bundle_copy, edit_json):
    edit_json(bundle_copy / MANIFEST, lambda m: m["graphs"].pop("llm"))
    with pytest.raises(BundleError, match="no graph 'llm'"):
        Assistant.load(bundle_copy)
