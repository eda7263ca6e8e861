"""Fixtures of the align tests: small data sets of the shipped voice."""

import json
import shutil

import pytest


def read_metadata(folder):
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def write_metadata(folder, rows):
    lines = (json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="session")
def write_recordings(voice_path):
    """Write a data set of the first recordings of each split.

    write_recordings(folder, n_train, n_test) -> rows
    """

    def write(folder, n_train, n_test):
        rows = read_metadata(voice_path)
        train = [row for row in rows if row["split"] == "train"]
        test = [row for row in rows if row["split"] == "test"]
        chosen = train[:n_train] + test[:n_test]
        folder.mkdir(parents=True, exist_ok=True)
        for row in chosen:
            shutil.copyfile(voice_path / row["file_name"], folder / row["file_name"])
        write_metadata(folder, chosen)
        return chosen

    return write


@pytest.fixture(scope="session")
def change_rows():
    """Change a data set's rows: change_rows(folder, change), where `change` alters the list."""

    def edit(folder, change):
        rows = read_metadata(folder)
        change(rows)
        write_metadata(folder, rows)

    return edit
