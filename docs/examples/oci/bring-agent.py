#!/usr/bin/env python3
"""OCI hook createContainer: brings the agent's directory into the container, as /run/ghosts.

    "createContainer": [{"path": "…/bring-agent.py", "args": ["bring-agent.py", "DIRECTORY"]}]

It runs in the container's mount namespace, but before the root is changed: the directory and this
program are the host's, and what it mounts is seen by the container alone. The container can connect
to the agent's sockets and execute what lies beside them, but change nothing there: the mount is
read-only. /run has to be in the container's root, as directory or as mount.
"""

import ctypes
import json
import os
import sys

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND = 1, 2, 4, 32, 4096


def mount(source: str | None, target: int, flags: int) -> None:
    """mount(2) on the directory `target`."""
    libc = ctypes.CDLL(None, use_errno=True)
    path = f"/proc/self/fd/{target}"
    arguments = (source.encode() if source else None, path.encode(), None, ctypes.c_ulong(flags))
    if libc.mount(*arguments, None) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)


def directory(name: str, parent: int | None = None) -> int:
    """A directory; a link is not followed, since in the container's root it could lead anywhere."""
    return os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)


def main(agent: str) -> None:
    """The state of the container is on stdin: OCI runtime specification, "State"."""
    bundle = json.load(sys.stdin)["bundle"]
    with open(f"{bundle}/config.json", encoding="utf-8") as file:
        root = json.load(file)["root"]["path"]
    run = directory("run", directory(os.path.join(bundle, root)))
    try:
        os.mkdir("ghosts", 0o755, dir_fd=run)
    except FileExistsError:
        pass
    mount(agent, directory("ghosts", run), MS_BIND)
    # Looked up again: now it is the root of the mount.
    flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV
    mount(None, directory("ghosts", run), flags)


if __name__ == "__main__":
    main(*sys.argv[1:])
