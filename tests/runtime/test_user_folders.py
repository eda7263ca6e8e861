"""The directory of users: an explicit one, in the platform's data folder, or the bundle's own."""

import dataclasses
import sys

import pytest

from tiny_align.runtime import Assistant
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.user_folders import find_users, platform_users, users_directories
from tiny_align.runtime.bundle.users import user_names
from tiny_align.runtime.errors import UserError

QUICK = ("--max-tokens", 6, "--threads", 1, "--json")


@pytest.fixture
def bundle(bundle_copy):
    """A bundle without users."""
    return Bundle.open(bundle_copy, verify=False)


@pytest.fixture
def platform(bundle, tmp_path, monkeypatch):
    """The platform's directory of the bundle's users, which does not exist."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return platform_users(bundle)


@pytest.fixture
def inside(bundle):
    """The bundle's own directory of users, which does not exist."""
    return bundle.path / "users"


def test_a_new_user_goes_into_the_platforms_data_folder(bundle, platform):
    assert find_users(bundle, "ana") == platform and not platform.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the path is Linux's")
def test_the_platforms_directory_names_the_bundle_and_its_models(bundle, platform, tmp_path):
    encoder, llm = (value for _, value in bundle.manifest.binding.values())
    folder = tmp_path / "data/tiny-align/users"
    assert platform == folder / f"{bundle.manifest.name}-{encoder[:4]}{llm[:4]}"


def test_bundles_with_other_models_or_names_have_other_users(bundle, platform):
    changes = ({"embeddings_sha256": "0" * 64}, {"name": "../another"}, {"name": "a b"})
    others = [
        platform_users(Bundle(bundle.path, dataclasses.replace(bundle.manifest, **change)))
        for change in changes
    ]
    assert len({platform, *others}) == 4
    assert all(other.parent == platform.parent for other in others)


def test_a_new_user_goes_into_a_bundle_that_has_a_directory_of_users(bundle, platform, inside):
    inside.mkdir()
    assert find_users(bundle, "ana") == inside
    assert users_directories(bundle) == [platform, inside]


def test_a_user_is_found_where_it_is_the_platforms_directory_first(
    bundle, platform, inside, make_user
):
    make_user(bundle, inside / "ana")
    assert find_users(bundle, "ana") == inside
    make_user(bundle, platform / "ben")
    assert find_users(bundle, "ben") == platform and find_users(bundle, "ana") == inside
    make_user(bundle, platform / "ana")
    assert find_users(bundle, "ana") == platform


def test_an_explicit_directory_is_the_only_one(bundle, platform, inside, make_user, tmp_path):
    make_user(bundle, inside / "ana")
    assert find_users(bundle, "ana", tmp_path / "elsewhere") == tmp_path / "elsewhere"


def test_the_general_projector_needs_no_directory(bundle, platform):
    assert find_users(bundle, None) == find_users(bundle, "general") == platform


@pytest.mark.parametrize("name", ["../ana", "a" * 65, ""])
def test_a_name_that_cannot_be_a_users_is_refused(bundle, platform, name):
    with pytest.raises(UserError, match="is no user name"):
        find_users(bundle, name)


@pytest.mark.parametrize("where", ["platform", "inside"])
def test_run_answers_with_a_user_of_either_directory(
    request, run_cli, bundle, platform, voice_path, make_user, where
):
    make_user(bundle, request.getfixturevalue(where) / "ana")
    call = ("run", voice_path / "train-000.flac", "--bundle", bundle.path, *QUICK)
    done = run_cli(*call, "--user", "ana")
    assert done.status == 0 and done.document["user"] == "ana"
    assert done.document["tokens"] >= 0 and platform.exists() == (where == "platform")


def test_a_user_who_is_nowhere_is_refused_and_nothing_is_created(
    run_cli, bundle, platform, voice_path
):
    call = ("run", voice_path / "train-000.flac", "--bundle", bundle.path, *QUICK)
    done = run_cli(*call, "--user", "ana")
    assert done.status == 2 and f"no user 'ana' in {platform}" in done.stderr
    assert not platform.exists()


def test_a_folder_that_a_killed_training_left_is_not_listed(bundle, platform, make_user):
    make_user(bundle, platform / "ben")
    make_user(bundle, platform / ".ana-killed")
    assert user_names(platform) == ["ben"]
    with pytest.raises(UserError, match=r"no user 'ana' in .* \(known: ben\)"):
        bundle.user_projector("ana", platform)


@pytest.mark.parametrize("where", ["platform", "inside"])
def test_a_program_finds_a_user_of_either_directory(request, bundle, platform, make_user, where):
    folder = request.getfixturevalue(where) / "ana"
    make_user(bundle, folder)
    with Assistant.load(bundle, "ana", threads=1) as assistant:
        assistant.listen(user="ana")
        with pytest.raises(UserError, match="no user 'ben'"):
            assistant.listen(user="ben")
