"""The house rules that a machine can hold.

Who may import whom, what an import costs, what a bare install needs.
"""

import ast
import fnmatch
import re
import sys
import tokenize
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


def test_the_documents_name_every_folder():
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


# --- rooms: imports go one way, lazy ones included ---

# room -> the rooms beside and below it that it may import; files at the top of a stage are a room
# too
ROOMS = {
    "runtime.audio": {"runtime"},
    "runtime.front_ends": {"runtime"},
    "runtime.bundle": {"runtime", "runtime.front_ends"},
    "runtime.backends": {"runtime", "runtime.bundle"},
    "runtime.privacy": {"runtime"},
    "runtime.listening": {"runtime", "runtime.audio"},
    "align.data": {"align"},
    "align.model": {"align", "align.data"},
    "align.training": {"align", "align.data", "align.model", "align.evaluation"},
    "align.evaluation": {"align", "align.data"},
    "benchmarks.standard": {"benchmarks"},
}


def module_name(path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in STAGE_MODULES}


def dependencies(path) -> set[str]:
    """The modules of ours that a module imports, anywhere in it."""
    found = set()
    for name in imported(path):
        name = name.removeprefix("tiny_align.")
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        if name:
            found.add(name)
    return found


def test_no_import_is_circular():
    graph = {name: dependencies(path) - {name} for name, path in MODULES.items()}
    while leaves := [name for name, needed in graph.items() if not needed]:
        for name in leaves:
            del graph[name]
        for needed in graph.values():
            needed.difference_update(leaves)
    assert not graph, f"circular, or importing what is: {sorted(graph)}"


def room_of(name: str) -> str:
    stage, _, rest = name.partition(".")
    inner = rest.partition(".")[0]
    return f"{stage}.{inner}" if (ROOT / stage / inner).is_dir() and inner else stage


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_what_is_below_them(room):
    """Another stage is test_imports_point_at_runtime's business."""
    stage = room.partition(".")[0]
    for name, path in MODULES.items():
        if room_of(name) == room:
            rooms = {room_of(needed) for needed in dependencies(path)}
            inside = {r for r in rooms if r.partition(".")[0] == stage}
            assert inside <= ROOMS[room] | {room}, name


# --- words and documents ---

OLD_WORDS = {
    *("told", "said", "given", "kept", "hear", "hears", "heard", "hearing", "ears", "mouth"),
    *("person", "persons", "people", "somebody", "nobody", "everybody", "company", "wordless"),
    *("judge", "judges", "judged", "effort", "halves", "climb"),
    *("least", "usual", "most", "greatest"),
}
STANDARD = {"NothingHeard", "heard", "most_common"}  # public, or a library's


def words(identifier: str) -> set[str]:
    return {w.lower() for w in re.split(r"_|(?<=[a-z0-9])(?=[A-Z])", identifier)}


@pytest.mark.parametrize("path", ALL_MODULES, ids=named)
def test_names_use_the_words_of_the_glossary(path):
    with open(path, "rb") as file:
        names = {t.string for t in tokenize.tokenize(file.readline) if t.type == tokenize.NAME}
    assert not [name for name in sorted(names - STANDARD) if words(name) & OLD_WORDS]
    assert "given was" not in path.read_text(encoding="utf-8") or path == Path(__file__)


def described() -> dict[str, str]:
    """The tree of docs/architecture.md: path of a file -> its line."""
    files = {}
    folder = stage = ""
    for line in (ROOT / "docs/architecture.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"### ([\w/]+)/ ", line):
            stage = heading[1]
            folder = ""
        elif entry := re.match(r"( *)([\w./-]+) {2,}\S", line):
            indent, name = entry.groups()
            if name.endswith("/"):
                folder = name
                continue
            path = f"{stage}/{folder if indent else ''}{name}"
            assert path not in files
            files[path] = line
    return files


def test_every_module_has_one_line_in_the_architecture():
    expected = {named(path) for path in STAGE_MODULES if path.name != "__init__.py"}
    assert described().keys() == expected


QUESTIONS = {  # what a newcomer asks -> the file, and a word of its line in the tree
    "where is the end of speech decided?": ("runtime/listening/endpoint.py", "end of a turn"),
    "which tokens may speech produce?": ("runtime/speech_vocabulary.py", "which tokens"),
    "how is a user's projector bound to the bundle?": ("runtime/bundle/users.py", "bound"),
    "who decides INT8 or FP16?": ("engines/select_precision.py", "decides"),
    "where is the KV cache laid out?": ("runtime/backends/onnxruntime.py", "KV cache"),
    "what happens to a half-written user?": ("align/model/users.py", "half-written"),
    "when is the shortcut trained?": ("align/training/shortcut.py", "when"),
    "where does a table of the documents come from?": ("benchmarks/studies/report.py", "table"),
    "how are sampling parameters chosen?": ("runtime/llm.py", "sampling parameters"),
    "how does a new encoder family get in?": ("export/encoders.py", "a new one"),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_tree_answers_what_a_newcomer_asks(question):
    path, word = QUESTIONS[question]
    assert word in described()[path]


# --- nothing that is loaded runs code ---

SAFELY = {
    "np.load": ("allow_pickle", False),
    "torch.load": ("weights_only", True),
}  # call -> the keyword it needs


def loads(path) -> list[tuple[str, dict]]:
    """(call, constant keywords) of what a module loads by numpy, torch, pickle and the hub's
    libraries.
    """
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
