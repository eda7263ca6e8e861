"""The directory of user profiles: in the platform's data folder, in a bundle, or a given one."""

import re
from pathlib import Path

from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.users import GENERAL
from tiny_align.runtime.errors import UserError
from tiny_align.runtime.files import read_errors

APPLICATION = "tiny-align"
KEY_DIGITS = 4  # of the encoder's hash and as many of the LLM's


def find_users(bundle: Bundle, user: str | None, users: Path | None = None) -> Path:
    """The directory of user profiles in which `user` is, or in which to write a new user.

    1. `users`, if it is given: what a command calls `--users`.
    2. The directory that holds the user already: the platform's, then BUNDLE/users. A profile
       is found, and trained again, where it is.
    3. For a new user BUNDLE/users if the bundle has that folder, because it then carries its
       users with it; otherwise the platform's.

    Nothing is created. A user of None is the general projector, which is in no directory.

    Raises:
        UserError: `user` cannot be a user's name, or a directory cannot be read.
    """
    directories = users_directories(bundle, users)
    if users is None and user is not None and user != GENERAL:
        for directory in directories:
            folder = bundle.user_folder(user, directory)
            with read_errors(folder, UserError):
                if folder.is_dir():
                    return directory
    return directories[-1]


def users_directories(bundle: Bundle, users: Path | None = None) -> list[Path]:
    """The directories in which a bundle's users may be, in the order of `find_users`.

    The platform's directory is one of them even if it does not exist yet.
    """
    if users is not None:
        return [Path(users)]
    directories = [platform_users(bundle)]
    if (bundle.path / "users").is_dir():
        directories.append(bundle.path / "users")
    return directories


def platform_users(bundle: Bundle) -> Path:
    """The bundle's directory of user profiles in the platform's data folder.

    On Linux `~/.local/share/tiny-align/users/NAME-HASH`. Users belong to an encoder and an LLM,
    so NAME is the bundle's name and HASH begins with the hashes of its encoder and its LLM.
    """
    from platformdirs import user_data_path

    name = re.sub(r"[^A-Za-z0-9._-]", "_", bundle.manifest.name)[:64].lstrip(".")
    digits = "".join(value[:KEY_DIGITS] for _, value in bundle.manifest.binding.values())
    return user_data_path(APPLICATION, appauthor=False) / "users" / f"{name}-{digits}"
