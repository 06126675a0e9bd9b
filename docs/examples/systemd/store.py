#!/usr/bin/env python3
"""Starts a service with restored descriptors, which the service manager keeps for its restarts.

    store.py SOCKET TASK CMD ARG…

At the first start nothing was passed to it: it becomes `ghostpool fetch`, which takes the
descriptors of TASK from the restore that serves on SOCKET and becomes this program again, now with
descriptors. Those go to the service manager (FDSTORE=1, sd_notify(3)), and it becomes CMD. When the
service manager starts the service again it passes what it has kept, and CMD is all that is left to
do. It is one process throughout: NotifyAccess=main is enough, and LISTEN_PID stays true.
"""

import os
import socket
import sys


def passed() -> dict[str, int]:
    """Descriptors that were passed to this process, by name: sd_listen_fds(3)."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    names = os.environ["LISTEN_FDNAMES"].split(":")
    return {name: fd for fd, name in enumerate(names, 3)}


def store(descriptors: dict[str, int]) -> None:
    """Have the service manager keep them, until the service is stopped."""
    path = os.environ["NOTIFY_SOCKET"]
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.connect(address)
        for name, fd in descriptors.items():
            # FDPOLL=0: else a fifo that nobody writes to would be given up at once.
            message = f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0"
            socket.send_fds(manager, [message.encode()], [fd])


def main(path: str, task: str, *command: str) -> None:
    """Never returns."""
    descriptors = passed()
    if "GHOSTPOOL_TASK" in os.environ:
        store(descriptors)
    elif not descriptors:
        fetch = ["ghostpool", "fetch", "--socket", path, "--task", task, "--listen-fds"]
        os.execvp(fetch[0], [*fetch, "--", *sys.argv])
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
