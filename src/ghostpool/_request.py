"""What the library is told of which images go where, and the request that this makes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TypedDict

from ghostpool._followers import EventSink
from ghostpool._limits import Limits
from ghostpool._model import NsId
from ghostpool._planned import OnError, Overmounts, Policy, Strategy
from ghostpool._run import Request
from ghostpool._stall import STALL_S
from ghostpool._userns import maps_owner


class Options(TypedDict, total=False):
    """Keyword arguments of `restore`, `open_pool`, `run_restore` and `make_plan`; none is needed.

    Those of the command have the same names.
    """

    tree: int | None
    """Pid of a process in the mount namespace that stands for that of the images' root task."""
    namespaces: Mapping[int, int | str] | None
    """Any mount namespace id of the images (the N of mountpoints-N.img) to the pid of a process in
    its target, or to the path of a namespace file. With neither of the two, the namespaces are
    rebuilt from the images, privately (Linux 5.15)."""
    external: Mapping[str, str] | None
    """What is mounted for what can not be rebuilt: external key, or mount point, to path."""
    jobs: int | None
    """Most workers alive at once; None: as many as this process may use CPUs."""
    allow_devices: bool
    """Restore character and block devices."""
    allow_setuid: bool
    """Restore setuid and setgid files."""
    consume_link_remaps: bool
    """Take the hidden names of link remaps away when everything is restored. An image whose files
    have no other name can not be restored again then."""
    devshm: str | os.PathLike[str] | None
    """The archive of a container's /dev/shm that lies beside the images (devshm-checkpoint.tar):
    files of link remaps that are missing there are made from it."""
    max_size: int
    """Largest apparent size of a ghost, in bytes; 1 TiB if it is not given."""
    strategy: Strategy
    """How read-only mounts take the old names: "remount" makes the task's own mount writable for
    that long, "detached" does all but the opening through a private clone (Linux 5.12), and the
    mount never changes. "remount" if it is not given."""
    on_error: OnError
    """What comes of files that can not be restored: "refuse" rules all out, "skip" leaves them out,
    and they are in `Plan.skipped`. "refuse" if it is not given."""
    overmounted: Overmounts
    """What becomes of ghosts on a mount that another one hides: "refuse" (if it is not given), or
    "private": they are restored through what a process of the namespace holds of it, or else
    through a private copy of the namespace, and then have the copy's mount id."""
    memory_limit: int | None
    """Bytes that this process and its children may take before further work waits."""
    stall_s: float
    """Seconds without a sign of life after which a worker hangs and is killed; 15 if not given."""
    run_dir: str | None
    """Directory of the journals; None: GHOSTPOOL_RUN_DIR, else /run/ghostpool, or one of the
    user's own."""
    events: EventSink | None
    """Who is told what happens; see `EventSink`."""


def request_of(images: str | os.PathLike[str], options: Options, *, keep: bool = False) -> Request:
    """The request that the arguments of a function of the library make.

    TypeError for an argument that there is not; ValueError for a number that makes no sense.
    """
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        raise TypeError(f"unexpected arguments: {', '.join(sorted(unknown))}")
    for name in ("jobs", "max_size", "memory_limit", "stall_s"):
        number = options.get(name)
        if number is not None and not (isinstance(number, int | float) and number > 0):
            raise ValueError(f"{name}={number!r}: expected a number above 0")
    events = options.get("events")
    where = options.get("namespaces") or {}
    shm = options.get("devshm")
    return Request(
        images_dir=os.fspath(images),
        jobs=options.get("jobs") or len(os.sched_getaffinity(0)),
        tree=options.get("tree"),
        namespaces={NsId(number): str(target) for number, target in where.items()},
        external=dict(options.get("external") or {}),
        policy=Policy(
            allow_devices=options.get("allow_devices", False),
            allow_setuid=options.get("allow_setuid", False),
            keep=keep,
            strategy=options.get("strategy", "remount"),
            on_error=options.get("on_error", "refuse"),
            consume_link_remaps=options.get("consume_link_remaps", False),
            overmounted=options.get("overmounted", "refuse"),
            mapped=maps_owner(),
        ),
        devshm=None if shm is None else os.fspath(shm),
        max_size=options.get("max_size", Limits().size),
        memory_limit=options.get("memory_limit"),
        stall_s=options.get("stall_s", STALL_S),
        run_dir=options.get("run_dir"),
        events=() if events is None else (events,),
    )


__all__ = ["Options", "request_of"]
