"""What the user is told: a failed system call with its mount named, and commands that mend.

The commands run programs of the caller, never of the container whose namespace they act in.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping

from ghostpool._errors import KernelError
from ghostpool._model import MountHandle, live_of
from ghostpool._paths import text
from ghostpool._planned import PlannedMount
from ghostpool._protocol import Failure

_NOTHING = "nothing: the namespace was rebuilt for this run and ends with it"


def kernel_error(
    failure: Failure, mounts: Mapping[MountHandle, PlannedMount], advice: str | None = None
) -> KernelError:
    """A worker's failure with the mount and namespace named."""
    planned = mounts.get(live_of(failure.mount))
    return KernelError(
        failure.errno,
        failure.step,
        failure.path.decode(errors="backslashreplace") or "the mount itself",
        mount=planned.mount.mountpoint.decode(errors="backslashreplace") if planned else None,
        namespace=planned.namespace.target.label if planned else None,
        advice=advice,
    )


def left_behind(planned: PlannedMount, path: bytes) -> str:
    """A directory that was made for a moment and could not be removed."""
    return f"{text(path)} on mount {planned.label}: not removed, something else is in it now"


def mend_command(planned: PlannedMount) -> str:
    """What a user runs to make a mount read-only again, with every other flag restated."""
    enter = planned.namespace.target.enter
    if enter is None:
        return _NOTHING
    return _remount(planned, enter, "ro")


def _remount(planned: PlannedMount, enter: str, how: str) -> str:
    options = ",".join(["remount", "bind", how, *planned.mount.options()[1:]])
    return f"mount -N {enter} -o {options} {_quoted(planned.mount.mountpoint)}"


def _writable(planned: PlannedMount, enter: str, command: str) -> str:
    """`command` with the mount writable for it, if it is not: we worked through a clone."""
    if not planned.mount.read_only:
        return command
    return f"{_remount(planned, enter, 'rw')} && {command}; {_remount(planned, enter, 'ro')}"


def remove_command(planned: PlannedMount, path: bytes, is_directory: bool) -> str:
    """What a user runs to remove a name that was left, given by its path inside the mount."""
    enter = planned.namespace.target.enter
    if enter is None:
        return _NOTHING
    tool = "rmdir" if is_directory else "rm -f"
    inside = planned.mount.mountpoint.rstrip(b"/") + b"/" + path
    if enter.isdecimal():
        command = f"{tool} {_quoted(b'/proc/' + enter.encode() + b'/root' + inside)}"
    else:
        command = f"nsenter --mount={shlex.quote(enter)} {tool} {_quoted(inside)}"
    return _writable(planned, enter, command)


def sweep_command(planned: PlannedMount, prefix: bytes, inodes: Iterable[int]) -> str:
    """What a user runs to remove all names of a run on one mount: those that begin with `prefix`,
    and those that lead to the inodes of its ghosts."""
    enter = planned.namespace.target.enter
    if enter is None:
        return _NOTHING
    tests = [f"-name {_quoted(prefix + b'*')}", *(f"-inum {inode}" for inode in inodes)]
    which = f"-xdev '(' {' -o '.join(tests)} ')' -delete"
    if enter.isdecimal():
        place = b"/proc/" + enter.encode() + b"/root" + planned.mount.mountpoint
        return _writable(planned, enter, f"find {_quoted(place)} {which}")
    place = planned.mount.mountpoint
    command = f"nsenter --mount={shlex.quote(enter)} find {_quoted(place)} {which}"
    return _writable(planned, enter, command)


def _quoted(path: bytes) -> str:
    return shlex.quote(path.decode(errors="surrogateescape"))
