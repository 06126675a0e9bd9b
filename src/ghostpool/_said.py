"""What a confined process says and hears: frames of JSON on its socket.

    frame := u32 length, <length> bytes of JSON: [kind, rows]

JSON can neither name a class nor run anything; descriptors come with frames that it hears.
"""

from __future__ import annotations

import _socket
import json
import struct
import time
from typing import Any, Final

from ghostpool._protocol import take_rights

LENGTH: Final = struct.Struct("<I")
MAX_FRAME: Final = 4 << 20
STILL_S: Final = 1.0
"""How often the reader says that it goes on."""

encode: Final = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
_SPACE: Final = _socket.CMSG_SPACE(253 * 4)


class Said:
    """The reader's end of its socket."""

    def __init__(self, fd: int) -> None:
        self._socket = _socket.socket(fileno=fd)
        self._last = time.monotonic()

    def say(self, kind: str, value: Any) -> None:
        """Send a frame, or several if the rows do not fit into one."""
        body = encode([kind, value]).encode()
        if len(body) > MAX_FRAME and len(value) > 1:
            half = len(value) // 2
            self.say(kind, value[:half])
            self.say(kind, value[half:])
            return
        self._socket.sendall(LENGTH.pack(len(body)) + body, _socket.MSG_NOSIGNAL)
        self._last = time.monotonic()

    def go_on(self) -> None:
        """Say that this is slow, not stuck."""
        if time.monotonic() - self._last > STILL_S:
            self.say("still", [])

    def hear(self) -> tuple[Any, list[int]]:
        """One frame of the coordinator, and the descriptors with it. EOFError: it is gone."""
        header, ancillary, flags, _ = self._socket.recvmsg(
            LENGTH.size, _SPACE, _socket.MSG_CMSG_CLOEXEC | _socket.MSG_WAITALL
        )
        fds = take_rights(ancillary, flags)
        if len(header) < LENGTH.size:
            raise EOFError
        (left,) = LENGTH.unpack(header)
        body = b""
        while len(body) < left:
            piece = self._socket.recv(left - len(body))
            if not piece:
                raise EOFError
            body += piece
        return json.loads(body), fds


__all__ = ["LENGTH", "MAX_FRAME", "STILL_S", "Said", "encode"]
