"""Becoming a command of the user in its mount namespace: the life of a child from fork to exec.

What it executes is the container's, so nothing of the host may be within its reach by then: it
has no capability that mount work needs, no descriptor but its own, and what it leads to is looked
at first. A file or `#!` interpreter that is a link to /proc/self/exe would make the kernel execute
ghostpool's own interpreter again, as a process that the container can get at (CVE-2019-5736).
Should a container exchange the file after that look, it gains no more than a process of its own
command that runs from a read-only mount (docs/design.md, D-018).
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat

from ghostpool import _capabilities, _descriptors, _linux
from ghostpool._failed import Work
from ghostpool._linux import Resolve
from ghostpool._protocol import BlockingChannel

_DEFAULT_PATH = b"/usr/local/bin:/usr/bin:/bin"
_SIGNALS = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGPIPE, signal.SIGXFSZ),
)
_HEAD = 256
"""As much of a file as the kernel looks at for "#!": execve(2)."""
_MOST_INTERPRETERS = 5
"""Scripts of scripts that the kernel goes through."""


def main(
    fds: list[int],
    argv: list[bytes],
    environment: dict[bytes, bytes],
    numbers: list[int],
    soft_limit: int,
    core_limit: int,
    capabilities: int,
    in_user_namespace: bool,
) -> None:
    """Become the command: namespaces, capabilities, descriptors, limits, signals, exec.

    `fds`: status socket, mount namespace, stdin, stdout, stderr, then one for each of `numbers`,
    and with `in_user_namespace` that.
    The status socket is close-on-exec, as is every other descriptor that has no place in the
    command: its end without a word means that exec succeeded.
    """
    # Both objects live until the exec: the end of the first one would close its number, which may
    # be that of a descriptor of the command by then.
    status = first = BlockingChannel(fds[0])
    work = Work()
    try:
        work._step = "setns"
        _capabilities.take_up(_capabilities.ENTER)
        _linux.setns(fds[1], _linux.CLONE_NEWNS)
        if in_user_namespace:
            # A file of the container must not be executed as more than the container's root.
            _capabilities.become_root_of(fds.pop())
        work._step = "capset"
        _capabilities.become_command(capabilities)
        work._step = "dup2"
        targets = dict(enumerate(fds[2:5]))
        targets.update(zip(numbers, fds[5:], strict=True))
        status = BlockingChannel(_descriptors.place(targets, first.fileno(), soft_limit))
        work._step = "setrlimit"
        _, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (core_limit, hard))
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if b"LISTEN_FDS" in environment:
            environment[b"LISTEN_PID"] = b"%d" % os.getpid()
        work._step = "execve"
        _execute(argv, environment)
    except OSError as error:
        status.send((getattr(error, "syscall", work._step), error.errno))


def _execute(argv: list[bytes], environment: dict[bytes, bytes]) -> None:
    """execve(2) of the first match in PATH. OSError if there is none.

    Not os.execvpe, which imports a module on the way (see `_forkserver.seal_imports`).
    """
    if b"/" in argv[0]:
        refuse_magic_links(argv[0])
        os.execve(argv[0], argv, environment)
    failure = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    for directory in environment.get(b"PATH", _DEFAULT_PATH).split(b":"):
        path = (directory or b".") + b"/" + argv[0]
        try:
            refuse_magic_links(path)
            os.execve(path, argv, environment)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            failure = error
    raise failure


def refuse_magic_links(path: bytes) -> None:
    """OSError (ELOOP) if a program, or an interpreter of it, is found through /proc/*/exe, fd, …

    openat2(2), RESOLVE_NO_MAGICLINKS. What can not be executed anyway is left to execve to say.
    """
    for _ in range(_MOST_INTERPRETERS + 1):
        # Opened for reading, a fifo would block and a device might do something.
        if not _is_regular(path):
            return
        try:
            flags = os.O_RDONLY | os.O_NONBLOCK
            file = _linux.openat2(_linux.AT_FDCWD, path, flags, Resolve.NO_MAGICLINKS)
        except PermissionError:
            return
        try:
            head = os.pread(file, _HEAD, 0)
        finally:
            os.close(file)
        words = head[2:].partition(b"\n")[0].split(maxsplit=1)
        if not head.startswith(b"#!") or not words:
            return
        path = words[0].partition(b"\0")[0]


def _is_regular(path: bytes) -> bool:
    fd = _linux.openat2(_linux.AT_FDCWD, path, os.O_PATH, Resolve.NO_MAGICLINKS)
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    finally:
        os.close(fd)
