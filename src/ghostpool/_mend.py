"""What the user is told: a failed system call with its mount named, and commands that mend.

The commands run programs of the caller, never of the container whose namespace they act in.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping

import anyio

from ghostpool._errors import KernelError
from ghostpool._model import MountHandle, live_of
from ghostpool._mountinfo import option_names
from ghostpool._paths import text
from ghostpool._planned import PlannedMount
from ghostpool._protocol import Failure
from ghostpool._rundir import VARIABLE

HOLDERS_S = 5.0
"""Seconds in which those who hold a mount busy are looked for."""
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
    """What a user runs to make a planned mount read-only again."""
    mount = planned.mount
    return remount_command(planned.namespace.target.enter, mount.mountpoint, mount.attributes)


def remount_command(enter: str | None, mountpoint: bytes, attributes: int) -> str:
    """What a user runs to make a mount read-only again, with every other flag restated.

    `enter` names its namespace, see Target.
    """
    if enter is None:
        return _NOTHING
    options = ",".join(["remount", "bind", "ro", *option_names(attributes)[1:]])
    return f"mount -N {enter} -o {options} {_quoted(mountpoint)}"


def recover_command() -> str:
    """What a user runs to have all that is still owed undone, from the journal of this run."""
    directory = os.environ.get(VARIABLE)
    return (f"{VARIABLE}={shlex.quote(directory)} " if directory else "") + "ghostpool recover"


async def describe_holders(mnt_id: int) -> str:
    """Who keeps a mount busy, for people."""
    from ghostpool._holders import holders  # psutil, which only this needs

    # A file that one of them holds may lie on a file system that does not answer.
    with anyio.move_on_after(HOLDERS_S):
        found = await anyio.to_thread.run_sync(holders, mnt_id, abandon_on_cancel=True)
        return ", ".join(map(str, found)) or "nobody any more"
    return f"somebody who could not be found within {HOLDERS_S:g} s"


def _quoted(path: bytes) -> str:
    return shlex.quote(path.decode(errors="surrogateescape"))
