"""Finds the files that a table or transcript names, however the name is spelt."""

import os
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path, PurePath


@dataclass
class FileFinder:
    """Finds files whose names may differ from those on disk.

    A name may have another Unicode normalisation form, spaces around it or Windows' separators.
    """

    # folder -> name in NFC -> name on disk
    names: dict[Path, dict[str, str]] = field(default_factory=dict)

    def find(self, folder: Path, name: str) -> Path | None:
        """The file `name` in `folder`; None: there is none."""
        stripped = name.strip()
        for spelling in dict.fromkeys((name, stripped, stripped.replace("\\", "/"))):
            exact = folder / spelling
            if exact.is_file():
                return exact
            found = self._find_part_by_part(folder, PurePath(spelling))
            if found is not None and found.is_file():
                return found
        return None

    def _find_part_by_part(self, folder: Path, name: PurePath) -> Path | None:
        for part in name.parts:
            if (folder / part).exists():
                folder = folder / part
                continue
            on_disk = self._listing(folder).get(unicodedata.normalize("NFC", part))
            if on_disk is None:
                return None
            folder = folder / on_disk
        return folder

    def _listing(self, folder: Path) -> dict[str, str]:
        if folder not in self.names:
            names = os.listdir(folder) if folder.is_dir() else []
            self.names[folder] = {unicodedata.normalize("NFC", name): name for name in names}
        return self.names[folder]
