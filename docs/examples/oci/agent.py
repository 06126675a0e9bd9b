#!/usr/bin/env python3
"""Restores ghost files into a container that is being started, and serves them to its program.

    agent.py IMAGES DIRECTORY [--timeout S]

The agent of one container, on the host. DIRECTORY is brought into the container by the hook
createContainer (bring-agent.py). The hook startContainer (ask-agent.c) asks at the socket
DIRECTORY/agent.sock; the mount namespace to restore into is that of whoever asks, as the kernel
knows it. The answer comes when the task socket, DIRECTORY/task.sock, is served: so the container's
program finds it. When that has its descriptors the mounts are put back, and the agent ends.

What is restored is the operator's decision, made on this command line: the container says no more
than that it is there.
"""

import argparse
import os
import select
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import anyio

import ghostpool

UCRED = struct.Struct("3i")
HELLO_S = 10
"""Seconds that somebody who has connected may say nothing."""
SO_PEERPIDFD = 77


@contextmanager
def listening(path: str) -> Iterator[socket.socket]:
    """A socket with that name, for root alone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.setblocking(False)
        umask = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(umask)
        try:
            listener.listen()
            yield listener
        finally:
            os.unlink(path)


class Asked:
    """Somebody who asks to be restored into, waiting for an answer."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
        self.pid, self.uid, _ = UCRED.unpack(credentials)
        try:
            self._pidfd = connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        except OSError:
            # Before Linux 6.5. Whoever waits for an answer is still there.
            self._pidfd = os.pidfd_open(self.pid)

    def is_there(self) -> bool:
        """It has not ended: its pid was its own all the time."""
        return not select.select([self._pidfd], [], [], 0)[0]

    def answer(self, text: str) -> None:
        try:
            self.connection.send(text.encode())
        except OSError:
            pass  # it has its answer already, or has gone away

    def close(self) -> None:
        os.close(self._pidfd)
        self.connection.close()


async def first(listener: socket.socket) -> Asked:
    """Who asks first; users other than root and this one are not heard."""
    while True:
        await anyio.wait_readable(listener)
        connection, _ = listener.accept()
        connection.setblocking(False)
        asked = Asked(connection)
        if asked.uid in (0, os.geteuid()):
            with anyio.move_on_after(HELLO_S):
                await anyio.wait_readable(connection)
                if connection.recv(16) == b"restore":
                    return asked
        asked.close()


def reasons(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(map(reasons, error.exceptions))
    return str(error) or type(error).__name__


async def main(images: str, directory: str, timeout_s: float) -> str | None:
    """Until the container's program has its descriptors; what went wrong, if anything."""
    path = f"{directory}/agent.sock"
    with listening(path) as listener:
        print(f"waiting at {path}", flush=True)
        asked = await first(listener)
    try:
        with anyio.fail_after(timeout_s):
            await restore(images, directory, asked)
    except Exception as error:  # noqa: BLE001  it is told to whoever asked
        reason = reasons(error)
        asked.answer(reason)
        return f"agent.py: {reason}"
    finally:
        asked.close()
    print("the mounts are as they were", flush=True)
    return None


async def restore(images: str, directory: str, asked: Asked) -> None:
    """Answers in between, when the task socket is served."""
    async with ghostpool.open_pool(images, tree=asked.pid) as pool:
        if not asked.is_there():
            # Its pid may have been another one's, and so may the namespace.
            raise ProcessLookupError("who asked has gone away")
        async with anyio.create_task_group() as group:
            await group.start(pool.serve, f"{directory}/task.sock")
            asked.answer("ok")
        await pool.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("images")
    parser.add_argument("directory")
    parser.add_argument("--timeout", type=float, default=60, metavar="S")
    given = parser.parse_args()
    sys.exit(anyio.run(main, given.images, given.directory, given.timeout, backend="trio"))
