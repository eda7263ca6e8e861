"""The house rules that a machine can hold: who may import whom, what an import costs, what a bare install needs."""

import ast
import fnmatch
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {  # stage -> the stages it may use
    "runtime": {"runtime"},
    "align": {"align", "runtime"},
    "export": {"export", "align", "runtime"},
    "engines": {"engines", "runtime"},
    "reference": {"runtime", "align", "export", "engines", "reference"},
    "benchmarks": {"runtime", "align", "export", "engines", "reference", "benchmarks"},
}
WITHOUT_TORCH = {"runtime", "engines"}
TORCH = {"torch", "transformers", "safetensors"}
MAX_DEPENDENCIES = 6
MAX_IMPORT_S = 0.5

LOADED = """
import sys
from tiny_align.runtime import Assistant
print(sorted(name for name in {names!r} if name in sys.modules))
"""
TIMED = """
import time
began = time.perf_counter()
import tiny_align.runtime
print(time.perf_counter() - began)
"""


def modules(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def named(path):
    return path.relative_to(ROOT).as_posix()


STAGE_MODULES = modules(*MAY_IMPORT)
ALL_MODULES = modules(*MAY_IMPORT, "tests")


def imported(path) -> set[str]:
    """Dotted names of what a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def test_the_stages_are_there():
    assert all(any(named(p).startswith(f"{stage}/") for p in STAGE_MODULES) for stage in MAY_IMPORT)


@pytest.mark.parametrize("path", STAGE_MODULES, ids=named)
def test_imports_point_at_runtime(path):
    stage = named(path).partition("/")[0]
    stages = {name.split(".")[1] for name in imported(path) if name.startswith("tiny_align.")}
    assert stages <= MAY_IMPORT[stage], (
        f"{stage} may not import {sorted(stages - MAY_IMPORT[stage])}"
    )


@pytest.mark.parametrize("path", ALL_MODULES, ids=named)
def test_imports_are_absolute(path):
    """A relative or a bare `import runtime` would make a second copy of a module."""
    bad = [
        name
        for name in imported(path)
        if name.startswith(".") or name.partition(".")[0] in MAY_IMPORT
    ]
    assert not bad


@pytest.mark.parametrize("path", modules(*WITHOUT_TORCH), ids=named)
def test_the_device_needs_no_torch(path):
    assert not {name.partition(".")[0] for name in imported(path)} & TORCH


@pytest.mark.parametrize("path", modules("align"), ids=named)
def test_training_needs_no_transformers(path):
    assert "transformers" not in {name.partition(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", ALL_MODULES, ids=named)
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "a docstring is missing"


def test_the_runtime_loads_neither_torch_nor_transformers(run_python):
    heavy = (*TORCH, "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx")
    done = run_python(LOADED.format(names=heavy))
    assert (done.status, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_runtime_is_imported_quickly(run_python):
    assert min(float(run_python(TIMED).stdout) for _ in range(3)) < MAX_IMPORT_S


def test_a_bare_install_is_small():
    required = [r for r in metadata.requires("tiny-align") if "extra ==" not in r]
    assert 1 <= len(required) <= MAX_DEPENDENCIES, required
    assert not any(r.startswith(("torch", "transformers", "tensorrt")) for r in required)


def test_the_syntax_is_that_of_python_3_10():
    for path in ALL_MODULES:
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))


def test_the_readme_names_every_folder():
    ignored = [line.strip().rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    folders = [p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith((".", "__"))]
    folders = [
        name for name in folders if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)
    ]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(MAY_IMPORT) < set(folders)
    assert not [name for name in folders if f"{name}/" not in readme]


def test_tests_run_the_installed_package():
    """The stages are imported as tiny_align.<stage>, wherever pytest was started."""
    import tiny_align.runtime

    assert "runtime" not in sys.modules and tiny_align.runtime.__name__ == "tiny_align.runtime"


# --- nothing that is loaded runs code ---

SAFELY = {
    "np.load": ("allow_pickle", False),
    "torch.load": ("weights_only", True),
}  # call -> the keyword it needs


def loads(path) -> list[tuple[str, dict]]:
    """(call, constant keywords) of what a module loads by numpy, torch, pickle and the hub's libraries."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in SAFELY or name.endswith(".from_pretrained") or name.startswith("pickle."):
                found.append(
                    (name, {k.arg: getattr(k.value, "value", None) for k in node.keywords})
                )
    return found


@pytest.mark.parametrize("path", STAGE_MODULES, ids=named)
def test_nothing_that_is_loaded_runs_code(path):
    """transformers' loaders are called in one place, which trusts no code."""
    for name, keywords in loads(path):
        if name.endswith(".from_pretrained"):
            assert named(path) == "export/pretrained.py" or "Embedding" in name
        else:
            assert name in SAFELY and keywords.get(SAFELY[name][0], "absent") == SAFELY[name][1], (
                name
            )
