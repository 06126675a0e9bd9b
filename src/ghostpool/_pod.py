"""The containers of a pod in one run: several sets of images become one.

The numbers in the images of one dump mean nothing in those of another: each container has a task 1.
So a number of the n-th container (n from 1) becomes n times `CONTAINER` more, and everything else
goes on as if one dump held all of them: one plan, one barrier over all tasks, one lease on a mount
that several of them have. A number's decimal digits still tell the two it is made of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from ghostpool._errors import PlanError, UnsupportedError
from ghostpool._model import (
    CONTAINER,
    HOST_NS,
    Descriptor,
    GhostId,
    ImageMount,
    Images,
    MntId,
    NsId,
    Pid,
    RegFile,
    RegId,
    Remap,
    Task,
)


class Container(NamedTuple):
    """One container of a pod: its images, and the live namespaces that they are restored into."""

    name: str
    """For people and for GHOSTPOOL_CONTAINER."""
    images_dir: str
    """Directory or archive of its images."""
    tree: int | None = None
    """As `Options.tree`."""
    namespaces: Mapping[NsId, str] = MappingProxyType({})
    """As `Options.namespaces`, by the numbers in its own images."""


def number_of(container: int, number: int) -> int:
    """What a number of the images is in the run; containers are counted from 1."""
    return container * CONTAINER + number


def in_images(number: int) -> int:
    """The number that the images have."""
    return number % CONTAINER


def container_of(number: int) -> int:
    """Which container a number belongs to, from 1; 0 in a run that has no pod."""
    return number // CONTAINER


def joined(found: Sequence[Images]) -> Images:
    """The images of all containers as one. UnsupportedError: one of them can not be part of it."""
    parts = [_shifted(at, images) for at, images in enumerate(found, 1)]
    first = parts[0]
    return first._replace(
        directory=", ".join(part.directory for part in parts),
        tasks=tuple(task for part in parts for task in part.tasks),
        files={key: file for part in parts for key, file in part.files.items()},
        remaps=[remap for part in parts for remap in part.remaps],
        ghosts={key: ghost for part in parts for key, ghost in part.ghosts.items()},
        mounts={key: table for part in parts for key, table in part.mounts.items()},
        fifo_data={key: data for part in parts for key, data in part.fifo_data.items()},
        own_user_namespace=any(part.own_user_namespace for part in parts),
        sockets={key: one for part in parts for key, one in part.sockets.items()},
    )


def _shifted(at: int, images: Images) -> Images:
    if images.root_namespace == HOST_NS:
        raise UnsupportedError(
            f"{images.directory}: dumped without a mount namespace of its own: such a container "
            "can not be part of a pod, restore it by itself"
        )
    if images.unpacking is not None:
        raise UnsupportedError(
            f"{images.directory}: an archive, which can not be part of a pod yet: unpack it"
        )
    base = at * CONTAINER
    return images._replace(
        tasks=_tasks(base, images.tasks),
        files={RegId(base + key): _file(base, file) for key, file in images.files.items()},
        remaps=[_remap(base, remap) for remap in images.remaps],
        ghosts={
            GhostId(base + key): ghost._replace(id=GhostId(base + key))
            for key, ghost in images.ghosts.items()
        },
        mounts={
            NsId(base + key): tuple(_mount(base, mount) for mount in table)
            for key, table in images.mounts.items()
        },
        root_namespace=NsId(base + images.root_namespace),
        fifo_data={RegId(base + key): data for key, data in images.fifo_data.items()},
        sockets={
            RegId(base + key): one._replace(id=RegId(base + one.id))
            for key, one in images.sockets.items()
        },
    )


def _tasks(base: int, tasks: Iterable[Task]) -> tuple[Task, ...]:
    """Tasks that share a table of descriptors go on sharing it: there may be thousands of them."""
    tables: dict[int, list[Descriptor]] = {}
    found = []
    for task in tasks:
        table = tables.get(id(task.descriptors))
        if table is None:
            rows = task.descriptors
            table = [one._replace(reg_id=RegId(base + one.reg_id)) for one in rows]
            tables[id(rows)] = table
        found.append(_task(base, task)._replace(descriptors=table))
    return tuple(found)


def _task(base: int, task: Task) -> Task:
    return task._replace(
        pid=Pid(base + task.pid),
        parent=Pid(task.parent and base + task.parent),
        namespace=NsId(base + task.namespace),
        holders=tuple(
            one._replace(pid=Pid(base + one.pid), reg_id=RegId(base + one.reg_id))
            for one in task.holders
        ),
    )


def _file(base: int, file: RegFile) -> RegFile:
    mnt_id = None if file.mnt_id is None else MntId(base + file.mnt_id)
    return file._replace(id=RegId(base + file.id), mnt_id=mnt_id)


def _remap(base: int, remap: Remap) -> Remap:
    # Processes of /proc are only named in a warning.
    target = remap.target if remap.kind == "procfs" else base + remap.target
    return remap._replace(origin=RegId(base + remap.origin), target=target)


def _mount(base: int, mount: ImageMount) -> ImageMount:
    return mount._replace(
        id=MntId(base + mount.id),
        parent=MntId(base + mount.parent),
        namespace=NsId(base + mount.namespace),
        shared_group=mount.shared_group and base + mount.shared_group,
        master_group=mount.master_group and base + mount.master_group,
    )


def read_pod(path: str) -> tuple[Container, ...]:
    """The containers that the file of --pod lists. PlanError says what is wrong with it.

    A JSON object: {"containers": [{"name": …, "images": …, "tree": PID, "namespaces": {ID: PID or
    PATH}}, …]}. Name, tree and namespaces may be left out, but for one of the last two; paths are
    from the directory of the file.
    """
    try:
        with open(path, "rb") as file:
            listed = json.load(file)["containers"]
        found = tuple(_container(path, at, one) for at, one in enumerate(listed, 1))
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise PlanError(
            f'{path}: is not of the form {{"containers": [{{"name": "web", "images": "DIR", '
            f'"tree": PID, "namespaces": {{"ID": "PATH"}}}}]}}: {error!r}'
        ) from error
    if not found:
        raise PlanError(f"{path}: lists no container")
    names = [one.name for one in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise PlanError(f"{path}: lists two containers of the name {twice}")
    return found


def _container(path: str, at: int, listed: dict[str, Any]) -> Container:
    unknown = listed.keys() - {"name", "images", "tree", "namespaces"}
    if unknown:
        raise ValueError(f"container {at} has {', '.join(sorted(unknown))}")
    name, images, tree = listed.get("name", str(at)), listed["images"], listed.get("tree")
    namespaces = {
        NsId(int(number)): str(where) for number, where in listed.get("namespaces", {}).items()
    }
    if not (isinstance(name, str) and isinstance(images, str)) or "\0" in name + images:
        raise TypeError(f"container {at}: name and images are texts")
    if not (tree is None or (type(tree) is int and tree > 0)):
        raise TypeError(f"container {at}: tree is the pid of a process")
    if tree is None and not namespaces:
        raise ValueError(f"container {at} has neither tree nor namespaces to be restored into")
    return Container(name, os.path.join(os.path.dirname(path), images), tree, namespaces)
