"""What becomes of restored descriptors: a command per task, or nothing at all.

Delivery begins when the mounts are back, the temporaries gone and the workers ended. A command is
forked from the fork server, enters its task's mount namespace and finds exactly its task's ghost
descriptors, at their numbers or, on request, from 3 on as sd_listen_fds(3) expects them. What the
task held in other ways comes at free numbers, which GHOSTPOOL_KEYS tells.
"""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Mapping

import anyio

from ghostpool import _listenfds
from ghostpool._errors import CommandError
from ghostpool._planned import PlannedTask
from ghostpool._pod import container_of, in_images
from ghostpool._process import Child, CommandFailed
from ghostpool._restored import Restored
from ghostpool._run import Delivery, Prepared

TERM_S = 5.0
"""Seconds that commands have after SIGTERM, before SIGKILL."""
KILL_S = 5.0
"""Seconds that are waited for a killed command, which uninterruptible sleep delays."""


def environment_of(
    planned: PlannedTask, restored: Restored, environment: Mapping[bytes, bytes]
) -> dict[bytes, bytes]:
    """The environment of a task's command.

    GHOSTPOOL_TASK is the task's pid in the image. GHOSTPOOL_CLOEXEC lists the numbers that were
    close-on-exec: such a descriptor could not outlive the exec, so it is passed open.
    """
    numbers = sorted(
        descriptor.number
        for descriptor in planned.task.descriptors
        if descriptor.close_on_exec and descriptor.reg_id in restored.fds
    )
    return {
        **environment,
        b"GHOSTPOOL_TASK": str(in_images(planned.task.pid)).encode(),
        b"GHOSTPOOL_CLOEXEC": ",".join(map(str, numbers)).encode(),
    }


async def discard(_: Prepared, restored: Restored) -> None:
    """Close everything: for rehearsals, benchmarks, and files that were kept by name."""
    restored.close()


def commands(argv: list[str], extra_capabilities: int = 0, *, listen_fds: bool = False) -> Delivery:
    """Run `argv` once for each task of the image and wait for them all.

    It keeps the capabilities that container runtimes give by default, but for two of them
    (`_capabilities.COMMAND`), and `extra_capabilities`. With `listen_fds` it gets its descriptors
    by the LISTEN_FDS convention.
    """
    from ghostpool._capabilities import COMMAND

    capabilities = COMMAND | extra_capabilities

    async def deliver(run: Prepared, restored: Restored) -> None:
        children: list[tuple[int, Child]] = []
        try:
            for planned in run.plan.tasks:
                child = await _start(run, restored, planned, argv, capabilities, listen_fds)
                children.append((planned.task.pid, child))
            restored.close()
            async with anyio.create_task_group() as group:
                for pid, child in children:
                    group.start_soon(_wait, run, pid, child)
        finally:
            await _end([child for _, child in children])

    return deliver


async def _start(
    run: Prepared,
    restored: Restored,
    planned: PlannedTask,
    argv: list[str],
    capabilities: int,
    listen_fds: bool,
) -> Child:
    pid = planned.task.pid
    target = run.targets[planned.task.namespace]
    environment = environment_of(planned, restored, os.environb)
    if run.request.pod:
        container = run.request.pod[container_of(pid) - 1]
        environment[b"GHOSTPOOL_CONTAINER"] = os.fsencode(container.name)
    descriptors = restored.of_task(planned)
    keys = {key.key: key.number for key in planned.keys}
    for key, fd in restored.of_keys(planned).items():
        descriptors[keys[key]] = fd
    if listen_fds:
        for name, value in _listenfds.variables(descriptors, keys).items():
            environment[name.encode()] = value.encode()
        places = _listenfds.places(descriptors)
        keys = {key: places[number] for key, number in keys.items()}
        descriptors = _listenfds.arranged(descriptors)
    environment[b"GHOSTPOOL_KEYS"] = json.dumps(keys).encode()
    try:
        return await run.server.command(
            [os.fsencode(word) for word in argv],
            environment,
            target.fd,
            descriptors,
            run.soft_limit,
            capabilities,
            target.user_namespace,
        )
    except CommandFailed as error:
        what = f"{argv[0]}: {os.strerror(error.errno)}"
        if error.step == "openat2" and error.errno == errno.ELOOP:
            what = f"{argv[0]}: it or its #! interpreter leads through a magic link of /proc"
        elif error.step not in ("execve", "openat2"):
            what = f"{error.step}: {os.strerror(error.errno)}"
        raise CommandError(
            f"the command can not be started for task {pid} in {target.label}: {what}"
        ) from error


async def _wait(run: Prepared, pid: int, child: Child) -> None:
    status = await child.wait()
    run.report.commands.append((pid, status if status >= 0 else 128 - status))


async def _end(children: list[Child]) -> None:
    """Whoever still runs was not to be waited for: the run was interrupted or failed."""
    alive = [child for child in children if child.status is None]
    if not alive:
        return
    with anyio.CancelScope(shield=True):
        for child in alive:
            child.signal(signal.SIGTERM)
        with anyio.move_on_after(TERM_S):
            for child in alive:
                await child.wait()
        for child in alive:
            child.signal(signal.SIGKILL)
        # One that not even this ends is named when the fork server ends.
        with anyio.move_on_after(KILL_S):
            for child in alive:
                await child.wait()
