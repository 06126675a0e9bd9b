"""Mount namespaces by descriptor, and the root of a user namespace: what only these tests need."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ghostpool import _linux
from ghostpool._mountinfo import LiveMount, parse_line
from ghostpool.testing._forked import in_child
from ghostpool.testing._namespace import enter


def become_ordinary_user(uid: int = 65534) -> None:
    """Give up root for good and become the root of a new user namespace (in a child only)."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    _linux.prctl(_linux.PR_SET_DUMPABLE, 1)  # else the maps belong to the real root
    _linux.unshare(_linux.CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {uid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def inside(namespace: int, function: Callable[[], Any]) -> Any:
    """`function`'s result from a child in the mount namespace."""

    def child() -> Any:
        enter(namespace)
        return function()

    return in_child(child)


def mountinfo(namespace: int) -> list[LiveMount]:
    """The mount table of a namespace; it needs no /proc inside, and no process in it."""

    def child() -> bytes:
        proc = os.open("/proc", os.O_PATH)
        enter(namespace)
        with open(os.open("self/mountinfo", os.O_RDONLY, dir_fd=proc), "rb") as file:
            return file.read()

    return [parse_line(line) for line in in_child(child).splitlines()]
