"""Importing the runtime turns telemetry off; if that is too late, it warns."""

import json
import types

import pytest

from tiny_align.runtime.privacy import telemetry

IMPORT = """
import json, os
import tiny_align.runtime
print(json.dumps({name: os.environ.get(name) for name in %r}))
"""


@pytest.fixture
def imported_before(monkeypatch):
    """Pretend that an onnxruntime of some version is imported already; returns its calls."""

    def put(version: str, switch: str) -> list[str]:
        calls = []
        disable = lambda: calls.append("disable")  # noqa: E731
        module = types.SimpleNamespace(__version__=version, disable_telemetry_events=disable)
        monkeypatch.setitem(telemetry.sys.modules, "onnxruntime", module)
        for name in telemetry.OFF:
            monkeypatch.setenv(name, "0")
        monkeypatch.setenv(telemetry.ONNX_RUNTIME, switch)
        return calls

    return put


@pytest.mark.parametrize("before", [None, "0"])
def test_importing_the_runtime_sets_every_switch(run_python, monkeypatch, before):
    for name in telemetry.OFF:
        monkeypatch.delenv(name, raising=False)
        if before:
            monkeypatch.setenv(name, before)
    done = run_python(IMPORT % list(telemetry.OFF))
    assert done.status == 0, done.stderr
    assert json.loads(done.stdout) == telemetry.OFF


@pytest.mark.parametrize("switch", ["", "0", "off"])
def test_onnx_runtime_imported_before_with_telemetry_on_is_a_warning(imported_before, switch):
    calls = imported_before("1.29.0", switch)
    with pytest.warns(RuntimeWarning, match="set ORT_DISABLE_TELEMETRY=1"):
        telemetry.turn_off()
    assert calls == ["disable"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("version", "switch"), [("1.32.1", "1"), ("1.29.0", "True"), ("1.28.0", "")]
)
def test_no_warning_without_an_uploader(imported_before, version, switch):
    calls = imported_before(version, switch)
    telemetry.turn_off()
    assert calls == ([] if switch else ["disable"])
