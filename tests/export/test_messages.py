"""What an export shows: one bar, a table, one document; libraries' messages are in a log."""

import json
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="models are exported from torch")
pytest.importorskip("transformers", reason="models are exported from transformers")
pytest.importorskip("onnx", reason="exported graphs are written with onnx")

from test_export import make_encoder  # noqa: E402 - needs the packages above

from tiny_align.export.command import columns, graph_bytes  # noqa: E402
from tiny_align.export.progress import PHASES, progress_bar  # noqa: E402
from tiny_align.runtime.bundle.bundle import Bundle  # noqa: E402

LOG = re.compile(r"messages of libraries: (\S+)")
NOISE = """
import ctypes, logging, os, sys, warnings
from tiny_align.export.messages import messages_to_log

early = logging.StreamHandler()  # holds the stream, as transformers' own does
logging.getLogger("library").addHandler(early)
print("before")
with messages_to_log() as screen:
    print("a print")
    print("a print to stderr", file=sys.stderr)
    warnings.warn("a warning")
    logging.getLogger("library").warning("an early handler")
    logging.getLogger("other").warning("the last resort")
    os.write(1, b"descriptor 1\\n")
    os.write(2, b"descriptor 2\\n")
    ctypes.CDLL(None).puts(b"puts of C")
    logging.getLogger("tiny_align.export").warning("of ours")
    print("for the user", file=screen)
    if sys.argv[1:]:
        raise KeyboardInterrupt
print("after")
print("after, on stderr", file=sys.stderr)
"""
NOISES = [
    "a print",
    "a print to stderr",
    "a warning",
    "an early handler",
    "the last resort",
    "descriptor 1",
    "descriptor 2",
    "puts of C",
]


def on_terminal(*command) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command whose stderr is a terminal."""
    screen, stderr = pty.openpty()
    shown = bytearray()

    def read() -> None:
        try:
            while chunk := os.read(screen, 4096):
                shown.extend(chunk)
        except OSError:  # the terminal's other end is closed
            pass

    reader = threading.Thread(target=read)
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=stderr
    ) as process:
        os.close(stderr)
        reader.start()
        stdout, _ = process.communicate(timeout=300)
    reader.join()
    os.close(screen)
    return process.returncode, stdout.decode(), shown.decode()


@pytest.mark.parametrize("interrupted", [False, True])
def test_whatever_libraries_print_is_in_the_log(run_python, interrupted):
    done = run_python(NOISE, *["interrupted"] * interrupted)
    log = Path(LOG.search(done.stderr)[1])
    text = log.read_text()
    log.unlink()
    assert [noise for noise in NOISES if noise not in text] == []
    shown = done.stderr.splitlines()[:3]
    assert shown == ["warning: of ours", "for the user", f"messages of libraries: {log}"]
    if not interrupted:
        assert done.stdout == "before\nafter\n" and done.stderr.endswith("after, on stderr\n")


def test_empty_log_is_removed(run_python, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    quiet = "from tiny_align.export.messages import messages_to_log\nwith messages_to_log(): pass"
    assert run_python(quiet) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_export_shows_a_bar_a_table_and_a_document(tiny_llm, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    torch.manual_seed(0)
    make_encoder(tmp_path / "encoder")
    out = tmp_path / "out/bundle"
    models = ("--encoder", tmp_path / "encoder", "--llm", tiny_llm, "--out", out)
    command = (sys.executable, "-m", "tiny_align.runtime.commands.cli", "export", *models)
    status, stdout, shown = on_terminal(*command, "--precision", "int8")
    assert status == 0, shown
    *table, last = stdout.splitlines()
    document = json.loads(last)
    check_table(table, document, Bundle.open(out))
    (log,) = tmp_path.glob("tiny-align-export-*.log")
    lines = re.split(r"[\r\n]+", shown.strip())
    bars = [line for line in lines if line.startswith("export: ")]
    percentages = [int(re.search(r"(\d+)%", bar)[1]) for bar in bars]
    assert percentages == sorted(percentages) and percentages[-1] == 100
    assert all(any(phase in bar for bar in bars) for phase in PHASES)
    assert lines[-1] == f"messages of libraries: {log}"
    others = [line for line in lines[:-1] if line.strip() and line not in bars]
    assert [line for line in others if not line.startswith("warning: ")] == []
    assert "OnnxExporter is experimental" in log.read_text()  # transformers' warning
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


def check_table(table: list[str], document: dict, bundle: Bundle) -> None:
    head, *rows, total, context, path = table
    assert head.split() == ["graph", "form", "bytes", "parity", "in", "this", "form"]
    assert [row.split()[0] for row in rows] == list(document["graphs"])
    for row in rows:
        name, form, size, parity, *rest = row.split()
        graph = document["graphs"][name]
        assert form == graph["precision"].upper()
        spec = bundle.manifest.graphs[name]
        files = {spec.file} | {other.file for other in spec.backends.values()}
        assert int(size.replace(",", "")) == graph_bytes(bundle.path, spec)
        assert int(size.replace(",", "")) > sum((bundle.path / f).stat().st_size for f in files)
        assert parity == f"{max(graph['parity']['max_diff_over_std'].values()):.1e}"
        if name == "llm":
            figures = graph["parity"]
            cost = f"KL {figures['kl_to_pytorch']:.2g}, {figures['same_next_token']:.0%} same"
            assert " ".join(rest).startswith(cost)
    assert total.split() == ["all", "files", f"{document['bytes']:,}"]
    n, position = document["context"], document["cache_bytes_per_position"]
    assert context.startswith(f"context of {n:,} positions, each {position:,} bytes of")
    assert path == f"bundle in {document['path']}"


def test_no_bar_where_there_is_no_terminal(capsys):
    with progress_bar(sys.stderr, quiet=False) as begin:
        begin("projector")
    assert capsys.readouterr().err == ""


def test_columns_are_as_wide_as_their_widest_cell():
    assert columns(["a", "b"], [["long", "1"], ["", "2"]]) == "a     b\nlong  1\n      2"
