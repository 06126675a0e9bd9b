"""What a child of the fork server may do: capabilities(7), by kind of process and by request.

At its start a child gives up for good whatever its kind never needs: from the bounding, permitted,
inheritable and ambient sets. Of what is left nothing is effective until a request asks for it, and
then exactly that: whoever makes a worker misbehave in a file request finds no CAP_SYS_ADMIN in
effect, and no way over file permissions in a mount request (docs/design.md, D-017).
All sets are met with what the process has, so it works where root lacks some, and in user
namespaces.
"""

from __future__ import annotations

import os
import signal
from enum import IntFlag

from ghostpool import _linux


class Cap(IntFlag):
    """CAP_* as bits of a set; the names are those of `docker run --cap-add`."""

    CHOWN = 1 << 0
    DAC_OVERRIDE = 1 << 1
    DAC_READ_SEARCH = 1 << 2
    FOWNER = 1 << 3
    FSETID = 1 << 4
    KILL = 1 << 5
    SETGID = 1 << 6
    SETUID = 1 << 7
    SETPCAP = 1 << 8
    LINUX_IMMUTABLE = 1 << 9
    NET_BIND_SERVICE = 1 << 10
    NET_BROADCAST = 1 << 11
    NET_ADMIN = 1 << 12
    NET_RAW = 1 << 13
    IPC_LOCK = 1 << 14
    IPC_OWNER = 1 << 15
    SYS_MODULE = 1 << 16
    SYS_RAWIO = 1 << 17
    SYS_CHROOT = 1 << 18
    SYS_PTRACE = 1 << 19
    SYS_PACCT = 1 << 20
    SYS_ADMIN = 1 << 21
    SYS_BOOT = 1 << 22
    SYS_NICE = 1 << 23
    SYS_RESOURCE = 1 << 24
    SYS_TIME = 1 << 25
    SYS_TTY_CONFIG = 1 << 26
    MKNOD = 1 << 27
    LEASE = 1 << 28
    AUDIT_WRITE = 1 << 29
    AUDIT_CONTROL = 1 << 30
    SETFCAP = 1 << 31
    MAC_OVERRIDE = 1 << 32
    MAC_ADMIN = 1 << 33
    SYSLOG = 1 << 34
    WAKE_ALARM = 1 << 35
    BLOCK_SUSPEND = 1 << 36
    AUDIT_READ = 1 << 37
    PERFMON = 1 << 38
    BPF = 1 << 39
    CHECKPOINT_RESTORE = 1 << 40


def parse(name: str) -> int:
    """The set of one name, with or without CAP_, or of ALL. ValueError for an unknown one."""
    word = name.upper().removeprefix("CAP_")
    if word == "ALL":
        return int(~Cap(0))
    try:
        return int(Cap[word])
    except KeyError:
        raise ValueError(f"{name!r} is no capability: capabilities(7) has their names") from None


ENTER = int(Cap.SYS_ADMIN | Cap.SYS_CHROOT)
"""setns(2) into a mount namespace."""
_MOUNTS = int(Cap.SYS_ADMIN)
# DAC_OVERRIDE covers searching too. DAC_READ_SEARCH would be open_by_handle_at(2) besides: any
# file of a file system, without a path.
_SEARCH = int(Cap.DAC_OVERRIDE)
# FOWNER: removing in sticky directories, linking the files of others, O_NOATIME.
_NAMES = int(Cap.DAC_OVERRIDE | Cap.FOWNER)
_FILES = int(_NAMES | Cap.CHOWN | Cap.FSETID)

NEEDED: dict[str, int] = {
    "mountinfo": 0,
    "open_mounts": _SEARCH,
    "clone": _MOUNTS,
    "open_part": _SEARCH,
    "clone_part": _MOUNTS,
    "uncover": _MOUNTS | _SEARCH,
    "make_writable": _MOUNTS,
    "make_read_only": _MOUNTS,
    "look": _SEARCH,
    "find": _SEARCH,
    "create": int(_FILES | Cap.MKNOD),
    "place": _NAMES,
    "fill": _NAMES,
    "bind": int(_MOUNTS | Cap.SYS_CHROOT | _FILES),
    "open": _NAMES,
    "open_discarded": _NAMES,
    "sweep": _NAMES,
    "remove": _NAMES,
}
"""What each request of a worker needs; one that is not here needs nothing."""

WORKER = ENTER | _FILES
"""With MKNOD if the operator allows devices; fifos need none."""
ACT = int(Cap.SETUID | Cap.SETGID)
"""Owning new files as somebody whom a target's user namespace, or an idmapped mount, has."""
GUARDIAN = ENTER | _NAMES
"""It makes mounts read-only and removes names, and nothing else."""
BUILDER = ENTER | _SEARCH
FILLER = int(BUILDER | _FILES | Cap.MKNOD)
"""A builder that makes files, too: of any owner, and devices if the operator allows them."""
COMMAND = int(
    Cap.CHOWN
    | Cap.DAC_OVERRIDE
    | Cap.FSETID
    | Cap.FOWNER
    | Cap.NET_RAW
    | Cap.SETGID
    | Cap.SETUID
    | Cap.SETFCAP
    | Cap.SETPCAP
    | Cap.NET_BIND_SERVICE
    | Cap.KILL
    | Cap.AUDIT_WRITE
)
"""What container runtimes give by default, without SYS_CHROOT and MKNOD: a command runs outside
the device cgroup that makes those harmless in a container."""


class Capabilities:
    """The sets of this process, which has one thread: capset(2) acts on a thread."""

    def __init__(self, ever: int) -> None:
        """Give up for good all but `ever`; nothing is in effect then."""
        _, permitted, inheritable = _linux.capget()
        _bound(ever, permitted, inheritable)
        self._permitted = permitted & ever
        self._effective = 0
        # Nothing is ambient that is not inheritable.
        _linux.capset(0, self._permitted, 0)

    def need(self, wanted: int) -> None:
        """Have exactly `wanted` in effect, as far as this process has it at all."""
        wanted &= self._permitted
        if wanted != self._effective:
            _linux.capset(wanted, self._permitted, 0)
            self._effective = wanted

    def act_as(self, uid: int, gid: int) -> None:
        """Own new files as these, and have nothing in effect."""
        self.need(ACT)
        try:
            _linux.setfsids(uid, gid)
            _linux.prctl(_linux.PR_SET_DUMPABLE, 0)
            _linux.prctl(_linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        finally:
            # The kernel has changed what is in effect.
            self._effective = 0
            _linux.capset(0, self._permitted, 0)

    def give_up(self, some: int) -> None:
        """Lose these for good."""
        self._permitted &= ~some
        self._effective &= ~some
        _linux.capset(self._effective, self._permitted, 0)


def hold_back() -> None:
    """Have nothing in effect, but keep everything to hand it on: the fork server."""
    _, permitted, inheritable = _linux.capget()
    _linux.capset(0, permitted, inheritable)


def take_up(some: int) -> None:
    """Have these in effect again: a child of the fork server."""
    _, permitted, inheritable = _linux.capget()
    _linux.capset(some & permitted, permitted, inheritable)


def become_root_of(user_namespace: int) -> None:
    """Enter it as its root, or as whoever it has in its place: a command of a container in one.

    Every capability there is in effect then, and none anywhere else.
    """
    _linux.setns(user_namespace, _linux.CLONE_NEWUSER)
    try:
        os.setgroups([])
    except PermissionError:
        pass  # not where setgroups is denied; they mean nobody there
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def become_command(keep: int) -> None:
    """Give up all but `keep`, so that no exec brings it back."""
    _, permitted, inheritable = _linux.capget()
    _bound(keep, permitted, inheritable)
    if _linux.bounding_set() & ~keep:
        # Without SETPCAP the bounding set stays, and root's exec would take from it.
        _linux.prctl(_linux.PR_SET_NO_NEW_PRIVS, 1)
    permitted &= keep
    _linux.capset(permitted, permitted, inheritable & keep)


def _bound(keep: int, permitted: int, inheritable: int) -> None:
    if permitted & Cap.SETPCAP:
        _linux.capset(int(Cap.SETPCAP), permitted, inheritable)
        _linux.drop_bounding(~keep)
