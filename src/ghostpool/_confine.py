"""Giving everything up: a process that can compute, read what it was given, and answer.

`confine` takes from the calling process, for good, what a process that parses hostile bytes has no
use for: the file system but for one directory, all capabilities, new programs, new processes, new
files, memory and time without end, and with a seccomp filter every system call that it does not
need. Each layer holds by itself where another one is missing (an ordinary user may not chroot, a
kernel may lack seccomp); what became of them is the return value.
Sources: capabilities(7), seccomp(2), include/uapi/linux/{seccomp,filter,audit}.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import struct
from typing import NamedTuple

from ghostpool import _linux
from ghostpool._seal import seal_imports

MEMORY = 512 << 20
"""Address space, in bytes."""
CPU_S = 120
"""Processor time; the signal is SIGXCPU."""
FILES = 256
"""Descriptors."""

_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2

_F_DUPFD_CLOEXEC = 1030
_F_GETFL = 3
_F_SETFD = 2
_PROT_EXEC = 4

# Of struct sock_filter: load a word of the data, jump if equal, jump if a bit is set, return.
_LOAD, _IF_EQUAL, _IF_ANY, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW = 0x7FFF0000
_REFUSE = 0x00050000 | errno.EPERM
_KILL = 0x80000000
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16

# The architecture as audit(7) numbers it, and the numbers of the calls that are allowed; those of
# every image come first, since the filter goes through them in this order.
_MACHINES = {
    "x86_64": (
        0xC000003E,
        {
            "openat": 257,
            "newfstatat": 262,
            "fstat": 5,
            "pread64": 17,
            "close": 3,
            "brk": 12,
            "clock_gettime": 228,
            "exit": 60,
            "exit_group": 231,
            "fcntl": 72,
            "futex": 202,
            "getdents64": 217,
            "getrandom": 318,
            "lseek": 8,
            "madvise": 28,
            "mmap": 9,
            "mprotect": 10,
            "mremap": 25,
            "munmap": 11,
            "recvfrom": 45,
            "recvmsg": 47,
            "restart_syscall": 219,
            "rt_sigprocmask": 14,
            "rt_sigreturn": 15,
            "sched_yield": 24,
            "sendmsg": 46,
            "sendto": 44,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "openat": 56,
            "newfstatat": 79,
            "fstat": 80,
            "pread64": 67,
            "close": 57,
            "brk": 214,
            "clock_gettime": 113,
            "exit": 93,
            "exit_group": 94,
            "fcntl": 25,
            "futex": 98,
            "getdents64": 61,
            "getrandom": 278,
            "lseek": 62,
            "madvise": 233,
            "mmap": 222,
            "mprotect": 226,
            "mremap": 216,
            "munmap": 215,
            "recvfrom": 207,
            "recvmsg": 212,
            "restart_syscall": 128,
            "rt_sigprocmask": 135,
            "rt_sigreturn": 139,
            "sched_yield": 124,
            "sendmsg": 211,
            "sendto": 206,
        },
    ),
}
# O_LARGEFILE, which a C library adds by itself: no bit of it on x86-64, this one on aarch64.
_HARMLESS_OPEN = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC | 0o400000 | 0o100000


def unpacking_s(size: int) -> int:
    """Processor time for an archive of so many bytes, which may be mostly memory of tasks."""
    return CPU_S + (size >> 22)


class Confined(NamedTuple):
    """Which layers there are; the limits and the lack of capabilities always are."""

    root: bool
    """The root directory is the one that was given."""
    filter: bool
    """System calls are filtered."""


def confine(directory: int | None, cpu_s: int = CPU_S) -> Confined:
    """Give up everything but reading in `directory` and the descriptors that are open.

    Without a directory, and without the right to change the root directory, nothing can be opened
    any more. `cpu_s`: seconds of processor time. OSError: one of the layers that every kernel has
    could not be put in place.
    """
    seal_imports()
    root = _enter(directory) if directory is not None else _enter_nothing()
    _drop_capabilities()
    _limit(cpu_s)
    _linux.prctl(_linux.PR_SET_DUMPABLE, 0)
    _linux.prctl(_linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    _linux.prctl(_linux.PR_SET_NO_NEW_PRIVS, 1)
    return Confined(root, _filter(root and directory is not None))


def _enter(directory: int) -> bool:
    """Make `directory` the root, so that no path leads out of it: chroot(2)."""
    try:
        os.fchdir(directory)
        os.chroot(".")
    except PermissionError:
        return False
    return True


def _enter_nothing() -> bool:
    """The same where there is no directory to read: one that is empty as soon as we are gone."""
    try:
        directory = os.open("/proc/self/fdinfo", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _enter(directory)
    finally:
        os.close(directory)


def _drop_capabilities() -> None:
    """All of them, in every set, for this process and whatever it might execute."""
    try:
        _linux.drop_bounding(-1)
    except OSError as error:
        # Without CAP_SETPCAP the bounding set stays, which no_new_privs keeps from giving anything.
        if error.errno != errno.EPERM:
            raise
    # What is not inheritable is not ambient either.
    _linux.capset(0, 0, 0)


def _limit(cpu_s: int) -> None:
    for what, most in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_NOFILE, FILES),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        value = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (value, value))


def _filter(may_open: bool) -> bool:
    """Install the filter; False where the kernel has none, or its call numbers are not known."""
    program = filter_program(os.uname().machine, may_open)
    if program is None:
        return False
    code = ctypes.create_string_buffer(program)
    head = struct.pack("HP", len(program) // 8, ctypes.addressof(code))
    fprog = ctypes.create_string_buffer(head)
    try:
        _linux.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(fprog))
    except OSError as error:
        if error.errno == errno.EINVAL:  # CONFIG_SECCOMP_FILTER is not set
            return False
        raise
    return True


def filter_program(machine: str, may_open: bool) -> bytes | None:
    """The filter as instructions of classic BPF; None for an unknown machine.

    A call that is not listed fails with EPERM. Another architecture's way to call the kernel,
    whose numbers mean other calls, ends the process.
    """
    if machine not in _MACHINES:
        return None
    architecture, numbers = _MACHINES[machine]
    no_execution = _unless_any(2, _PROT_EXEC)
    checks = {
        "mmap": no_execution,
        "mprotect": no_execution,
        "openat": _unless_any(2, ~_HARMLESS_OPEN & 0xFFFFFFFF) if may_open else [],
        "fcntl": _if_one_of(1, _F_DUPFD_CLOEXEC, _F_GETFL, _F_SETFD),
        "newfstatat": _if_one_of(3, _linux.AT_EMPTY_PATH),
    }
    program = [
        (_LOAD, 0, 0, _ARCH_AT),
        (_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    for name, number in numbers.items():
        check = checks.get(name, [(_RETURN, 0, 0, _ALLOW)])
        if check:
            program += [(_IF_EQUAL, 0, len(check), number), *check]
    program.append((_RETURN, 0, 0, _REFUSE))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def _argument(number: int) -> tuple[int, int, int, int]:
    """Load the low half of an argument; both machines are little endian."""
    return _LOAD, 0, 0, _ARGUMENTS_AT + 8 * number


def _unless_any(argument: int, bits: int) -> list[tuple[int, int, int, int]]:
    return [
        _argument(argument),
        (_IF_ANY, 1, 0, bits),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]


def _if_one_of(argument: int, *values: int) -> list[tuple[int, int, int, int]]:
    check = [_argument(argument)]
    for value in values:
        check += [(_IF_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    return [*check, (_RETURN, 0, 0, _REFUSE)]


__all__ = ["CPU_S", "FILES", "MEMORY", "Confined", "confine", "filter_program", "unpacking_s"]
