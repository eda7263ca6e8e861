"""Files and folders appear whole or not at all, and what they replace is never missing in between."""

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


def test_a_folder_that_is_replaced_is_never_missing(tmp_path):
    """Somebody looks at it all the time, as one does who opens a bundle, or who kills the process."""
    replace(tmp_path / "b", "old")
    if not files._exchange(tmp_path / "b", tmp_path / "b"):
        pytest.skip("this system cannot exchange two folders")
    over, missing, looks = threading.Event(), [], []

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


def test_without_an_exchange_a_folder_is_replaced_in_two_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    replace(tmp_path / "b", "old")
    replace(tmp_path / "b", "new")
    assert (tmp_path / "b/what").read_text() == "new" and names(tmp_path) == ["b"]


def test_a_folder_that_fails_leaves_the_old_one_and_nothing_else(tmp_path):
    replace(tmp_path / "b", "old")
    with pytest.raises(KeyboardInterrupt), written_folder(tmp_path / "b") as folder:
        (folder / "what").write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "b/what").read_text() == "old" and names(tmp_path) == ["b"]


def test_a_file_that_does_not_fit_leaves_the_old_one_and_nothing_else(tmp_path, full_disk):
    (tmp_path / "f").write_text("old")
    refused = pytest.raises(
        TinyAlignError, match=r"cannot be written \(File too large\): make room"
    )
    with full_disk(100), refused, written_file(tmp_path / "f") as temporary:
        temporary.write_bytes(b"x" * 200)
    assert (tmp_path / "f").read_text() == "old" and names(tmp_path) == ["f"]


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_linked_tree_is_the_same_without_the_source(tmp_path, monkeypatch, hard_links):
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
