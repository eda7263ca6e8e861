"""Seal a process: it gives up the network, other programs and writing for good (Linux).

Make a `Seal` before models are loaded and threads start; `close` it when everything is loaded.
Landlock restricts writing: it knows folders, but binds only threads that start later. Seccomp (the
system's libseccomp) restricts the rest: it binds all threads at once, but knows numbers, not
paths. Where Landlock cannot do its part, because the kernel has none or other threads ran before,
seccomp refuses to open any file for writing. So a seal is complete, or it is refused.

What is open stays open: the standard streams, files, and sockets of this machine (AF_UNIX), which
a microphone's sound server may need. Any other open socket makes `close` refuse. Afterwards no
socket can be made or connected, not even one of this machine. Reading is not restricted, and
programs that were started before are not sealed.
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
from typing import NamedTuple

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
OTHER_WAYS = (  # to files and the network, and to the machine itself
    "io_uring_setup io_uring_enter io_uring_register open_by_handle_at userfaultfd bpf "
    "perf_event_open keyctl add_key request_key mq_open msgget shmget semget ipc mount umount "
    "umount2 pivot_root chroot move_mount mount_setattr open_tree fsopen fsconfig fsmount fspick "
    "unshare setns swapon swapoff acct quotactl quotactl_fd init_module finit_module "
    "delete_module kexec_load kexec_file_load reboot ioperm iopl syslog sethostname "
    "setdomainname settimeofday clock_settime clock_settime64"
)
WRITING_BESIDE_LANDLOCK = (  # version 1 of Landlock restricts none of these
    "truncate truncate64 chmod fchmod fchmodat chown fchown lchown fchownat chown32 fchown32 "
    "lchown32 setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr utime utimes "
    "futimesat utimensat utimensat_time64"
)
# What Landlock restricts, beside the flags of `open`.
CREATION = "creat mkdir mkdirat mknod mknodat link linkat symlink symlinkat"
REMOVAL = "rename renameat renameat2 unlink unlinkat rmdir"
WRITING = f"{CREATION} {REMOVAL}"
MAP_SHADOW_STACK = 453
MSEAL = 462
TOO_NEW = set(range(452, 512)) - {MAP_SHADOW_STACK, MSEAL}  # libseccomp may not know them yet
TIOCSTI = 0x5412  # types into the terminal, as the user would
TIOCLINUX = 0x541C
FLAGS_OF_OPEN = {"open": 1, "openat": 2}  # number of the argument
STANDARD_STREAMS = (0, 1, 2)


class _Compare(ctypes.Structure):
    """struct scmp_arg_cmp: argument number, comparison, and what with."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("comparison", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


class _Rule(NamedTuple):
    """A system call that is refused, always or if an argument compares so."""

    call: str | int  # its name or number
    error: int  # what the caller gets
    condition: _Compare | None = None


class Seal:
    """Seals this process in two steps: the constructor restricts writing, `close` everything else.

    `writable` are the folders that can still be written: the given ones, or none where Landlock
    cannot restrict writing.
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
                raise TinyAlignError(f"{folder} is to stay writable: create the folder first")
        self._seccomp = load_libseccomp()
        n_threads = len(os.listdir("/proc/self/task"))
        self._landlock = _restrict_writing(folders) if n_threads == 1 else 0
        self.writable = folders if self._landlock else []

    def close(self, microphone: bool = False) -> dict[str, str | list[str]]:
        """Seal all threads for as long as the process lives.

        Args:
            microphone: one is open; messages to its sound server stay possible.
        Returns:
            What enforces what, as in the document of `tiny-align run --sealed`.
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


# --- Landlock ---


def _restrict_writing(folders: list[Path]) -> int:
    """Let this thread, and the threads it starts, write below `folders` only.

    Returns:
        Landlock's version; 0 if Landlock cannot do it, and nothing was restricted.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    size = ctypes.c_size_t
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, size(0), LANDLOCK_CREATE_RULESET_VERSION)
    if version < 1:
        return 0
    access = WRITE_FILE | REMOVE_AND_MAKE
    if version >= 2:
        access |= REFER
    if version >= 3:
        access |= TRUNCATE
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
        refused = libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0)
        return 0 if refused else version
    except OSError:
        return 0
    finally:
        os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, access: int) -> None:
    parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", access, parent)  # landlock_path_beneath_attr
        if libc.syscall(LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, rule, 0):
            raise OSError(ctypes.get_errno(), "Landlock refuses a rule", path)
    finally:
        os.close(parent)


# --- seccomp ---


def load_libseccomp() -> ctypes.CDLL:
    """The system's libseccomp.

    Raises:
        TinyAlignError: this system has none, or its kernel is too old.
    """
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


def _rules(microphone: bool, all_writing: bool) -> list[_Rule]:
    """All that is refused."""
    calls = [NETWORK, PROGRAMS, OTHER_PROCESSES, OTHER_WAYS, WRITING_BESIDE_LANDLOCK]
    if not microphone:
        calls.append(MESSAGES)
    if all_writing:
        calls.append(WRITING)
    rules = [_Rule(name, errno.EPERM) for name in " ".join(calls).split()]
    too_new: list[str | int] = ["openat2", *sorted(TOO_NEW)]
    for call in too_new:  # as if the kernel were older: callers know what to do
        rules.append(_Rule(call, errno.ENOSYS))
    # without an address sendto is a write; a pair of AF_UNIX has both ends in this process
    rules.append(_Rule("sendto", errno.EPERM, _Compare(4, COMPARE_NE, 0)))
    rules.append(_Rule("socketpair", errno.EPERM, _Compare(0, COMPARE_NE, 1)))
    for request in (TIOCSTI, TIOCLINUX):
        same_request = _Compare(1, COMPARE_MASKED_EQ, 0xFFFFFFFF, request)
        rules.append(_Rule("ioctl", errno.EPERM, same_request))
    for name, argument in FLAGS_OF_OPEN.items():
        for mask, value in _refused_flags(all_writing):
            same_flags = _Compare(argument, COMPARE_MASKED_EQ, mask, value)
            rules.append(_Rule(name, errno.EPERM, same_flags))
    return rules


def _refused_flags(all_writing: bool) -> list[tuple[int, int]]:
    """(mask, value) of the flags with which no file can be opened."""
    if not all_writing:  # versions 1 and 2 of Landlock let a file be truncated for reading
        return [(os.O_ACCMODE | os.O_TRUNC, os.O_RDONLY | os.O_TRUNC)]
    writing = [(os.O_ACCMODE, mode) for mode in (os.O_WRONLY, os.O_RDWR, os.O_ACCMODE)]
    return [*writing, (os.O_CREAT, os.O_CREAT), (os.O_TRUNC, os.O_TRUNC)]


def _load_filter(library: ctypes.CDLL, rules: list[_Rule]) -> None:
    """Make the kernel refuse the calls of `rules`, in every thread.

    Raises:
        TinyAlignError: the kernel does not take the rules; nothing has changed then.
    """
    context = ctypes.c_void_p(library.seccomp_init(ACT_ALLOW))
    try:
        status = library.seccomp_attr_set(context, ATTR_BAD_ARCH, ACT_ERRNO | errno.EPERM)
        status = status or library.seccomp_attr_set(context, ATTR_TSYNC, 1)
        library.seccomp_attr_set(context, ATTR_NO_SSB, 1)  # an old libseccomp lacks this one
        library.seccomp_attr_set(context, ATTR_OPTIMIZE, 2)  # and this
        for rule in rules:
            status = status or _add_rule(library, context, rule)
        status = status or library.seccomp_load(context)
    finally:
        library.seccomp_release(context)
    if status:
        raise TinyAlignError(
            f"this system does not let the process be sealed ({os.strerror(abs(status))}): use "
            "another kernel or libseccomp, or do without it"
        )


def _add_rule(library: ctypes.CDLL, context: ctypes.c_void_p, rule: _Rule) -> int:
    """Returns 0, also for a call that this architecture does not have, or a negative errno."""
    number = rule.call
    if isinstance(number, str):
        number = int(library.seccomp_syscall_resolve_name(number.encode()))
    if number < 0:
        return 0
    conditions = [] if rule.condition is None else [rule.condition]
    array = (_Compare * len(conditions))(*conditions)
    action = ACT_ERRNO | rule.error
    return library.seccomp_rule_add_array(context, action, number, len(conditions), array)


# --- what is open already ---


def _require_no_way_out() -> None:
    """Check every open file but the standard streams, which belong to the caller of this process.

    Raises:
        TinyAlignError: a socket that is not this machine's own, or an io_uring.
    """
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor in STANDARD_STREAMS:
            continue
        try:
            kind = _way_out(descriptor)
        except OSError:  # closed meanwhile
            continue
        if kind:
            raise TinyAlignError(
                f"{kind} is open (file descriptor {descriptor}): close it, then seal"
            )


def _way_out(descriptor: int) -> str | None:
    """The kind of an open file that can reach further than this machine's sockets; else None."""
    import socket

    if os.readlink(f"/proc/self/fd/{descriptor}") == "anon_inode:[io_uring]":
        return "an io_uring"
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return None
    with socket.socket(fileno=os.dup(descriptor)) as copy:
        family = copy.family
    return None if family == socket.AF_UNIX else f"a socket ({getattr(family, 'name', family)})"
