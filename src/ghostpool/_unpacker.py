"""The unpacker: a process that may do nothing but unpack an archive, once more, for its contents.

It is given the archive and how it is unpacked, gives up everything else (see _confine), and is then
asked for runs of bytes, each time with a socket that they go into. It goes through the archive
forwards, and begins anew for what lies behind it. What it holds is a piece of the archive.
"""

from __future__ import annotations

import _socket
import os
import signal
from collections.abc import Sequence
from typing import NoReturn

from ghostpool import _confine
from ghostpool._model import Step
from ghostpool._said import Said
from ghostpool._unpack import PIECE, FileStream, Stream, Unreadable, load, unpack


class _Unpacker:
    def __init__(self, said: Said) -> None:
        self._said = said
        steps, fds = said.hear()
        self._steps = [Step(kind, at) for kind, at in steps]
        (self._fd,) = fds
        self._size = os.fstat(self._fd).st_size
        load()
        _confine.confine(None, _confine.unpacking_s(self._size))
        self._stream = self._begin()

    def _begin(self) -> Stream:
        return unpack(FileStream(self._fd, 0, self._size), self._steps, self._said.go_on)

    def serve(self) -> None:
        """Answer until nobody asks any more."""
        while True:
            runs, fds = self._said.hear()
            # All that is known of it is said: the kernel may not be asked any more.
            sink = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fds[0])
            try:
                self._go_to(runs[0][0])
                self._said.say("at", [])
                self._send(runs, sink)
            except ConnectionError:
                pass  # whoever took it has come to an end
            except Unreadable as error:
                self._said.say("error", [str(error)])
            finally:
                sink.close()

    def _go_to(self, position: int) -> None:
        if position < self._stream.at:
            self._stream = self._begin()
        if not self._stream.skip(position - self._stream.at):
            raise Unreadable("it is cut")

    def _send(self, runs: Sequence[Sequence[int]], sink: _socket.socket) -> None:
        for position, length in runs:
            self._go_to(position)
            left = length
            while left:
                data = self._stream.read(min(left, PIECE))
                if not data:
                    raise Unreadable("it is cut")
                sink.sendall(data, _socket.MSG_NOSIGNAL)
                left -= len(data)


def main(fd: int) -> NoReturn:
    """Serve the socket `fd`, and end."""
    os.closerange(fd + 1, os.sysconf("SC_OPEN_MAX"))
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    said = Said(fd)
    try:
        _Unpacker(said).serve()
    except (EOFError, ConnectionError):
        pass  # nobody listens any more
    except Unreadable as error:
        said.say("error", [str(error)])
    os._exit(0)


__all__ = ["main"]
