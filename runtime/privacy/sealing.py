"""A process gives up the network, other programs and writing, for good: Linux refuses them.

Make a `Seal` before models are loaded and threads start; `close` it when everything is loaded.
Landlock holds writing: it knows folders, but binds only threads that start later. Seccomp (the
system's libseccomp) holds the rest: it binds all threads at once, but knows numbers, not paths.
Where Landlock cannot do its part, because the kernel has none or other threads ran before, seccomp
refuses to open any file for writing. So a seal is whole, or it is refused.

What is open stays open: the standard streams, files, and sockets of this machine (AF_UNIX), which
a microphone's sound server may need. Any other open socket makes `close` refuse. Afterwards no
socket is made or connected, not even one of this machine. Reading is not restricted, and programs
that were started before are not sealed.
"""

import ctypes
import errno
import glob
import os
import stat
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

from tiny_align.runtime.errors import TinyAlignError

# --- Landlock (linux/landlock.h) ---

LANDLOCK_CREATE_RULESET = 444  # system calls, the same numbers on every architecture
LANDLOCK_ADD_RULE = 445
LANDLOCK_RESTRICT_SELF = 446
LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH = 1
PR_SET_NO_NEW_PRIVS = 38
WRITE_FILE = 1 << 1
REMOVE_AND_MAKE = sum(1 << bit for bit in range(4, 13))
REFER = 1 << 13  # since version 2
TRUNCATE = 1 << 14  # since version 3
DEVICES = (  # sound and GPUs are opened for writing
    "/dev/null",
    "/dev/snd",
    "/dev/dri",
    "/dev/nvidia*",
    "/dev/nvhost*",
    "/dev/nvmap",
    "/dev/nvgpu",
)

# --- seccomp (seccomp.h) ---

ACT_ALLOW = 0x7FFF0000
ACT_ERRNO = 0x00050000
ATTR_BAD_ARCH = 2  # what happens to calls of another architecture, 32-bit ones for instance
ATTR_TSYNC = 4
ATTR_NO_SSB = 7  # without it older kernels slow the process down
ATTR_OPTIMIZE = 8
COMPARE_NE = 1
COMPARE_MASKED_EQ = 7
MIN_API = 2  # of libseccomp on this kernel: TSYNC

# Names that an architecture does not have are skipped.
NETWORK = "socket socketcall connect bind listen accept accept4"
MESSAGES = "sendmsg sendmmsg"  # the client of a sound server sends some
PROGRAMS = "execve execveat"
OTHER_PROCESSES = "ptrace process_vm_readv process_vm_writev process_madvise pidfd_getfd"
SIDE_DOORS = (  # to files and the network by other ways, and to the machine itself
    "io_uring_setup io_uring_enter io_uring_register open_by_handle_at userfaultfd bpf "
    "perf_event_open keyctl add_key request_key mq_open msgget shmget semget ipc mount umount "
    "umount2 pivot_root chroot move_mount mount_setattr open_tree fsopen fsconfig fsmount fspick "
    "unshare setns swapon swapoff acct quotactl quotactl_fd init_module finit_module "
    "delete_module kexec_load kexec_file_load reboot ioperm iopl syslog sethostname "
    "setdomainname settimeofday clock_settime clock_settime64"
)
WRITING_BESIDE_LANDLOCK = (  # version 1 holds none of these
    "truncate truncate64 chmod fchmod fchmodat chown fchown lchown fchownat chown32 fchown32 "
    "lchown32 setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr utime utimes "
    "futimesat utimensat utimensat_time64"
)
# What Landlock holds, beside the flags of `open`.
CREATION = "creat mkdir mkdirat mknod mknodat link linkat symlink symlinkat"
REMOVAL = "rename renameat renameat2 unlink unlinkat rmdir"
WRITING = f"{CREATION} {REMOVAL}"
MAP_SHADOW_STACK = 453
MSEAL = 462
TOO_NEW = set(range(452, 512)) - {MAP_SHADOW_STACK, MSEAL}  # libseccomp may not know them yet
TIOCSTI = 0x5412  # types into the terminal, as the user would
TIOCLINUX = 0x541C
FLAGS_OF_OPEN = {"open": 1, "openat": 2}  # which argument


class _Compare(ctypes.Structure):
    """struct scmp_arg_cmp: argument number, comparison, and what with."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("comparison", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


class Seal:
    """Seals this process in two steps: making it restricts writing, `close` everything else.

    `writable` are the folders that can still be written: those given, or none where Landlock
    cannot hold them.
    """

    def __init__(self, writable: Sequence[Path] = ()):
        """
        Args:
            writable: folders below which files may still be written.
        Raises:
            TinyAlignError: there is no such folder, or this system cannot seal a process.
        """
        folders = [Path(folder).resolve() for folder in writable]
        for folder in folders:
            if not folder.is_dir():
                raise TinyAlignError(f"{folder} is to stay writable: make the folder first")
        self._seccomp = _load_libseccomp()
        self._landlock = _restrict_writing(folders) if _n_threads() == 1 else 0
        self.writable = folders if self._landlock else []

    def close(self, microphone: bool = False) -> dict:
        """Seal all threads for as long as the process lives. Returns what enforces what.

        Args:
            microphone: one is open; its sound server may be sent messages.
        Raises:
            TinyAlignError: a socket to elsewhere is open, or the kernel refuses. Only what the
                constructor did is in force then.
        """
        _require_no_way_out()
        _load_filter(self._seccomp, _rules(microphone, all_writing=not self._landlock))
        return {
            "network": "seccomp",
            "programs": "seccomp",
            "writing": f"Landlock {self._landlock}" if self._landlock else "seccomp",
            "writable": [str(folder) for folder in self.writable],
        }


def _n_threads() -> int:
    return len(os.listdir("/proc/self/task"))


# --- Landlock ---


def _restrict_writing(folders: list[Path]) -> int:
    """Let this thread, and those it starts, write below `folders` only.

    Returns:
        Landlock's version; 0 if it cannot, and nothing was restricted.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    size = ctypes.c_size_t
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, size(0), LANDLOCK_CREATE_RULESET_VERSION)
    if version < 1:
        return 0
    access = WRITE_FILE | REMOVE_AND_MAKE
    access |= REFER if version >= 2 else 0
    access |= TRUNCATE if version >= 3 else 0
    ruleset = libc.syscall(LANDLOCK_CREATE_RULESET, struct.pack("=Q", access), size(8), 0)
    if ruleset < 0:
        return 0
    try:
        for folder in folders:
            _allow(libc, ruleset, str(folder), access)
        for pattern in DEVICES:
            for device in glob.glob(pattern):
                _allow(libc, ruleset, device, WRITE_FILE)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        return version if libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0 else 0
    except OSError:
        return 0
    finally:
        os.close(ruleset)


def _allow(libc, ruleset: int, path: str, access: int) -> None:
    parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", access, parent)  # landlock_path_beneath_attr
        if libc.syscall(LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, rule, 0):
            raise OSError(ctypes.get_errno(), "Landlock takes no rule", path)
    finally:
        os.close(parent)


# --- seccomp ---


def _load_libseccomp():
    if sys.platform != "linux":
        raise TinyAlignError(f"sealing needs Linux, this is {sys.platform}: do without it")
    try:
        library = ctypes.CDLL("libseccomp.so.2")
        api = library.seccomp_api_get()
    except (OSError, AttributeError) as error:
        raise TinyAlignError(
            f"sealing needs the system's libseccomp 2.4 or later ({error}): install it (Debian: "
            "libseccomp2), or do without it"
        ) from error
    if api < MIN_API:
        raise TinyAlignError(
            "sealing needs a kernel that binds all threads at once (seccomp with TSYNC), this one "
            "does not: use another, or do without it"
        )
    library.seccomp_init.restype = ctypes.c_void_p
    return library


def _rules(microphone: bool, all_writing: bool) -> list[tuple]:
    """(system call's name or number, errno, comparison or None): all that is refused."""
    calls = [NETWORK, PROGRAMS, OTHER_PROCESSES, SIDE_DOORS, WRITING_BESIDE_LANDLOCK]
    calls += [] if microphone else [MESSAGES]
    calls += [WRITING] if all_writing else []
    rules = [(name, errno.EPERM, None) for name in " ".join(calls).split()]
    # as if the kernel were older: callers know what to do
    rules += [(call, errno.ENOSYS, None) for call in ("openat2", *sorted(TOO_NEW))]
    # sent without an address it is a write; a pair of AF_UNIX has both ends in this process
    rules.append(("sendto", errno.EPERM, _Compare(4, COMPARE_NE, 0)))
    rules.append(("socketpair", errno.EPERM, _Compare(0, COMPARE_NE, 1)))
    for request in (TIOCSTI, TIOCLINUX):
        same = _Compare(1, COMPARE_MASKED_EQ, 0xFFFFFFFF, request)
        rules.append(("ioctl", errno.EPERM, same))
    for call, argument in FLAGS_OF_OPEN.items():
        for mask, value in _refused_flags(all_writing):
            same = _Compare(argument, COMPARE_MASKED_EQ, mask, value)
            rules.append((call, errno.EPERM, same))
    return rules


def _refused_flags(all_writing: bool) -> list[tuple[int, int]]:
    """(mask, value) of the flags with which no file is opened."""
    if not all_writing:  # versions 1 and 2 of Landlock let a file be truncated for reading
        return [(os.O_ACCMODE | os.O_TRUNC, os.O_RDONLY | os.O_TRUNC)]
    writing = [(os.O_ACCMODE, mode) for mode in (os.O_WRONLY, os.O_RDWR, os.O_ACCMODE)]
    return [*writing, (os.O_CREAT, os.O_CREAT), (os.O_TRUNC, os.O_TRUNC)]


def _load_filter(library, rules: list[tuple]) -> None:
    """Refuse `rules` in every thread.

    Raises:
        TinyAlignError: the kernel does not take them; nothing has changed then.
    """
    context = ctypes.c_void_p(library.seccomp_init(ACT_ALLOW))
    try:
        status = library.seccomp_attr_set(context, ATTR_BAD_ARCH, ACT_ERRNO | errno.EPERM)
        status = status or library.seccomp_attr_set(context, ATTR_TSYNC, 1)
        library.seccomp_attr_set(context, ATTR_NO_SSB, 1)  # an old libseccomp has neither
        library.seccomp_attr_set(context, ATTR_OPTIMIZE, 2)
        for rule in rules:
            status = status or _refuse(library, context, *rule)
        status = status or library.seccomp_load(context)
    finally:
        library.seccomp_release(context)
    if status:
        raise TinyAlignError(
            f"this system does not let the process be sealed ({os.strerror(abs(status))}): use "
            "another kernel or libseccomp, or do without it"
        )


def _refuse(library, context, call: str | int, number: int, condition: _Compare | None) -> int:
    """Add a rule. Returns 0, also for a call that this architecture does not have."""
    if isinstance(call, str):
        call = library.seccomp_syscall_resolve_name(call.encode())
    if call < 0:
        return 0
    conditions = [condition] if condition else []
    array = (_Compare * len(conditions))(*conditions)
    action = ACT_ERRNO | number
    return library.seccomp_rule_add_array(context, action, call, len(conditions), array)


# --- what is open already ---


def _require_no_way_out() -> None:
    """Look at every open file but the standard streams, which belong to whoever started us.

    Raises:
        TinyAlignError: a socket that is not this machine's own, or an io_uring.
    """
    for name in os.listdir("/proc/self/fd"):
        try:
            what = _way_out(int(name)) if int(name) > 2 else None
        except OSError:  # closed meanwhile
            continue
        if what:
            raise TinyAlignError(f"{what} is open (file descriptor {name}): close it, then seal")


def _way_out(descriptor: int) -> str | None:
    """What an open file is, if it can reach further than this machine's sockets."""
    import socket

    if os.readlink(f"/proc/self/fd/{descriptor}") == "anon_inode:[io_uring]":
        return "an io_uring"
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return None
    with socket.socket(fileno=os.dup(descriptor)) as copy:
        family = copy.family
    return None if family == socket.AF_UNIX else f"a socket ({getattr(family, 'name', family)})"
