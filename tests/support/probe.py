"""What a consumer of restored descriptors gets in hand: run as the command, it tells everything.

One JSON line of facts first (nothing that would change a file, not even an access time), then one
line for each line that it reads: `content`, `positions`, or `move FD POSITION`. With `--to DIR`
it asks nobody: facts and content go to DIR/TASK.json, with what is in the directories named
after DIR. Standard library only; it must run in a bare interpreter.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import resource
import stat
import struct
import sys
import termios
from typing import Any

_CHUNK = 1 << 20


def descriptors() -> list[int]:
    """The open ones; the descriptor of the listing itself is closed again by then."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
        except OSError:
            continue
        found.append(int(name))
    return sorted(found)


def fdinfo(fd: int) -> dict[str, int]:
    """Position, flags and mount id, as the kernel prints them."""
    with open(f"/proc/self/fdinfo/{fd}") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line)
    return {
        "pos": int(fields["pos"]),
        "flags": int(fields["flags"], 8),
        "mnt_id": int(fields["mnt_id"]),
    }


def pending(fd: int) -> dict[str, int]:
    """How many bytes wait in a pipe: ioctl(2), FIONREAD."""
    return {"pending": struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]}


def facts_of(fd: int) -> dict[str, Any]:
    """All that can be known without reading."""
    status = os.fstat(fd)
    return {
        **(pending(fd) if stat.S_ISFIFO(status.st_mode) else {}),
        **fdinfo(fd),
        "link": os.readlink(f"/proc/self/fd/{fd}"),
        "mode": status.st_mode,
        "nlink": status.st_nlink,
        "uid": status.st_uid,
        "gid": status.st_gid,
        "size": status.st_size,
        "blocks": status.st_blocks,
        "atime_ns": status.st_atime_ns,
        "mtime_ns": status.st_mtime_ns,
        "rdev": status.st_rdev,
        "dev": status.st_dev,
        "ino": status.st_ino,
    }


def content_of(fd: int) -> dict[str, Any]:
    """Hash and data extents of a regular file, target of a symbolic link."""
    status = os.fstat(fd)
    if stat.S_ISLNK(status.st_mode):
        return {"target": os.readlink(b"", dir_fd=fd).decode()}
    if not stat.S_ISREG(status.st_mode):
        return {}
    flags = fdinfo(fd)["flags"]
    # Another open where this one can not read; also for the extents, since seeking moves.
    own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NOATIME)
    reader = own if flags & os.O_PATH or flags & os.O_ACCMODE == os.O_WRONLY else fd
    try:
        digest = hashlib.sha256()
        at = 0
        while data := os.pread(reader, _CHUNK, at):
            digest.update(data)
            at += len(data)
        return {"sha256": digest.hexdigest(), "data": extents(own, status.st_size)}
    finally:
        os.close(own)


def extents(fd: int, size: int) -> list[tuple[int, int]]:
    """Offset and length of each run of data: lseek(2), SEEK_DATA and SEEK_HOLE."""
    found = []
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: a hole to the end
            break
        at = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, at - start))
    return found


def facts() -> dict[str, Any]:
    """Descriptors first: what is opened later on must not be among them."""
    held = {fd: facts_of(fd) for fd in descriptors()}
    with open("/proc/self/mountinfo") as file:
        mountinfo = file.read()
    return {
        "descriptors": held,
        "pid": os.getpid(),
        "task": os.environ.get("GHOSTPOOL_TASK"),
        "cloexec": os.environ.get("GHOSTPOOL_CLOEXEC"),
        "keys": json.loads(os.environ.get("GHOSTPOOL_KEYS", "null")),
        "cwd": os.getcwd(),
        "mount_namespace": os.readlink("/proc/self/ns/mnt"),
        "mountinfo": mountinfo,
        "soft_limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def answer(words: list[str], held: list[int]) -> Any:
    """What one line of the input asks for."""
    if words == ["content"]:
        return {fd: content_of(fd) for fd in held}
    if words == ["positions"]:
        return {fd: fdinfo(fd)["pos"] for fd in held}
    if words[:1] == ["move"]:
        return os.lseek(int(words[1]), int(words[2]), os.SEEK_SET)
    raise ValueError(words)


def main(arguments: list[str]) -> None:
    """Tell, once or on demand."""
    known = facts()
    held = list(known["descriptors"])
    if arguments:
        directory, *listed = arguments[1:]
        known["content"] = {fd: content_of(fd) for fd in held}
        known["listed"] = {path: sorted(os.listdir(path)) for path in listed}
        with open(f"{directory}/{known['task']}.json", "w") as file:
            json.dump(known, file)
        return
    print(json.dumps(known), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(line.split(), held)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
