"""What the tests of the align stage share: small data sets of the shipped voice."""

import json
import shutil

import pytest


def write_metadata(folder, rows):
    lines = (json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="session")
def write_recordings(voice_path):
    """Write a data set of the first recordings of each split: write_recordings(folder, n_train, n_test) -> rows."""

    def write(folder, n_train, n_test):
        every = [
            json.loads(line) for line in (voice_path / "metadata.jsonl").read_text().splitlines()
        ]
        train, test = (
            [row for row in every if row["split"] == split] for split in ("train", "test")
        )
        rows = train[:n_train] + test[:n_test]
        folder.mkdir(parents=True, exist_ok=True)
        for row in rows:
            shutil.copyfile(voice_path / row["file_name"], folder / row["file_name"])
        write_metadata(folder, rows)
        return rows

    return write


@pytest.fixture(scope="session")
def change_rows():
    """Change a data set's rows: change_rows(folder, change), where `change` alters the list it is given."""

    def edit(folder, change):
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        change(rows)
        write_metadata(folder, rows)

    return edit
