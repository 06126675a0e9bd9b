"""Binding UNIX sockets whose names are gone, where nobody else can see it.

What getsockname(2) says of a socket is the very text that bind(2) was given. That text is looked
up from the root of the process: here an empty file system of this request's own, in no mount
namespace, which is the process's root meanwhile. So the old text binds there, whatever has that
name in the container; no link, mount or file of the container is ever met, and nothing of it
changes.
"""

from __future__ import annotations

import _socket
import errno
import os
import struct
from typing import Any

from ghostpool import _linux
from ghostpool._failed import Failed, Work
from ghostpool._protocol import BindOp

_MILLION = 1_000_000
_SO_PASSSEC = 34


class BindWork(Work):
    """The request that binds sockets."""

    def do_bind(self, out: list[int], operations: list[tuple[Any, ...]]) -> list[Any]:
        """Make sockets and bind them to names that are gone at once; they go back in order."""
        self._step = "openat"
        root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            own = self._file_system()
            try:
                self._bind_all(out, operations, own, root)
            finally:
                os.close(own)
        finally:
            os.close(root)
        return []

    def _file_system(self) -> int:
        """An empty tmpfs that is mounted nowhere."""
        self._step = "fsopen"
        context = _linux.fsopen(b"tmpfs")
        try:
            self._step = "fsconfig"
            _linux.fsconfig(context, _linux.FSCONFIG_SET_STRING, b"mode", b"755")
            _linux.fsconfig(context, _linux.FSCONFIG_CMD_CREATE)
            self._step = "fsmount"
            return _linux.fsmount(context)
        finally:
            os.close(context)

    def _bind_all(
        self, out: list[int], operations: list[tuple[Any, ...]], own: int, root: int
    ) -> None:
        try:
            self._root_at(own)
            for index, fields in enumerate(operations):
                operation = BindOp(*fields)
                try:
                    out.append(self._make(operation))
                except OSError as error:
                    code = error.errno or errno.EIO
                    raise Failed(index, code, self._step, operation.name, -1) from error
        finally:
            # Descriptors are all that other requests use, but "/" is to be the namespace's again.
            self._undo_step = "fchdir"
            os.fchdir(root)
            self._undo_step = "chroot"
            os.chroot(b".")

    def _root_at(self, directory: int) -> None:
        self._step = "fchdir"
        os.fchdir(directory)
        self._step = "chroot"
        os.chroot(b".")

    def _make(self, operation: BindOp) -> int:
        self._step = "socket"
        made = _socket.socket(_socket.AF_UNIX, operation.type)
        try:
            self._bind(made, operation)
            self._set_options(made, operation)
            if operation.backlog is not None:
                self._step = "listen"
                made.listen(operation.backlog)
            if operation.shutdown:
                self._step = "shutdown"
                made.shutdown(operation.shutdown - 1)  # SHUT_RD is 0, the kernel's bit of it 1
            made.setblocking(not operation.nonblocking)
            return made.detach()
        except BaseException:
            made.close()
            raise

    def _bind(self, made: _socket.socket, operation: BindOp) -> None:
        name = operation.name
        parents: list[bytes] = []
        bound = False
        try:
            for end, letter in enumerate(name):
                if letter == ord("/") and end:
                    self._make_parent(name[:end], parents)
            self._step = "bind"
            made.bind(name)
            bound = True
            if operation.owner is not None:
                mode, uid, gid = operation.owner
                self._step = "fchownat"
                os.chown(name, uid, gid)
                self._step = "fchmodat"
                os.chmod(name, mode)
        finally:
            # The next socket may have this name, or one in place of a parent.
            if bound:
                self._undo_step = "unlinkat"
                os.unlink(name)
            for parent in reversed(parents):
                self._undo_step = "rmdir"
                os.rmdir(parent)

    def _make_parent(self, path: bytes, made: list[bytes]) -> None:
        try:
            self._step = "mkdirat"
            os.mkdir(path, 0o755)
        except FileExistsError:  # "..", or a slash too many
            return
        made.append(path)

    def _set_options(self, made: _socket.socket, operation: BindOp) -> None:
        options = operation.options
        level = _socket.SOL_SOCKET
        self._step = "setsockopt"
        for option, size in (
            (_socket.SO_SNDBUF, options[0]),
            (_socket.SO_RCVBUF, options[1]),
        ):
            # The kernel doubles what it is given, and takes no more than net.core.?mem_max.
            if made.getsockopt(level, option) != size:
                made.setsockopt(level, option, min(size // 2, (1 << 31) - 1))
        for option, time_us in (
            (_socket.SO_SNDTIMEO, options[2]),
            (_socket.SO_RCVTIMEO, options[3]),
        ):
            if time_us:
                made.setsockopt(level, option, struct.pack("ll", *divmod(time_us, _MILLION)))
        for option, wanted in ((_socket.SO_PASSCRED, options[4]), (_SO_PASSSEC, options[5])):
            if wanted:
                made.setsockopt(level, option, 1)
