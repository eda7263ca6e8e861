"""Files and folders appear whole or not at all; what they replace is never missing."""

import errno
import threading

import pytest

from tiny_align.runtime import files
from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.files import link_tree, written_file, written_folder


def replace(target, text: str) -> None:
    with written_folder(target) as folder:
        (folder / "what").write_text(text)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_is_never_missing_while_it_is_replaced(tmp_path):
    """A thread reads it all the time, like a process that opens a bundle."""
    replace(tmp_path / "b", "old")
    if not files._exchange(tmp_path / "b", tmp_path / "b"):
        pytest.skip("this system cannot exchange two folders")
    over = threading.Event()
    missing = []
    looks = []

    def look():
        while not over.is_set():
            looks.append(1)
            try:
                (tmp_path / "b/what").read_text()
            except FileNotFoundError:
                missing.append(1)

    looker = threading.Thread(target=look)
    looker.start()
    for n in range(200):
        replace(tmp_path / "b", str(n))
    over.set()
    looker.join()
    assert (tmp_path / "b/what").read_text() == "199" and names(tmp_path) == ["b"]
    assert len(looks) > 100 and not missing


def test_a_folder_is_replaced_without_an_exchange_too(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    replace(tmp_path / "b", "old")
    replace(tmp_path / "b", "new")
    assert (tmp_path / "b/what").read_text() == "new" and names(tmp_path) == ["b"]


def test_a_failed_folder_leaves_the_old_one_and_nothing_else(tmp_path):
    replace(tmp_path / "b", "old")
    with pytest.raises(KeyboardInterrupt), written_folder(tmp_path / "b") as folder:
        (folder / "what").write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "b/what").read_text() == "old" and names(tmp_path) == ["b"]


def test_a_file_on_a_full_disk_leaves_the_old_one_and_nothing_else(tmp_path, full_disk):
    (tmp_path / "f").write_text("old")
    refused = pytest.raises(
        TinyAlignError, match=r"cannot be written \(File too large\): make room"
    )
    with full_disk(100), refused, written_file(tmp_path / "f") as temporary:
        temporary.write_bytes(b"x" * 200)
    assert (tmp_path / "f").read_text() == "old" and names(tmp_path) == ["f"]


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_linked_tree_outlives_its_source(tmp_path, monkeypatch, hard_links):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, "no hard links here")

    (tmp_path / "a/deep").mkdir(parents=True)
    (tmp_path / "a/deep/file").write_text("kept")
    if not hard_links:
        monkeypatch.setattr(files.os, "link", refuse)
    link_tree(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b/deep/file").stat().st_nlink == (2 if hard_links else 1)
    (tmp_path / "a/deep/file").unlink()
    assert (tmp_path / "b/deep/file").read_text() == "kept"
