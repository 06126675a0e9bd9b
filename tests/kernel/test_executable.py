"""No process of the container gets at ours: neither their memory nor the host's interpreter.

The attackers here share the pid namespace of the workers, which containers rarely do: it is the
worst case.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ghostpool import _capabilities, _launch, _linux
from ghostpool._capabilities import COMMAND, ENTER, WORKER, Cap
from ghostpool._launch import launch
from ghostpool._process import ForkServer
from ghostpool._workerclient import WorkerClient
from ghostpool.testing._forked import in_child
from tests.kernel.test_capabilities import attempt
from tests.support.live import process

pytestmark = [pytest.mark.needs_mount_ns, pytest.mark.anyio]

PTRACE_ATTACH = 16
LAYOUT = ("maps", "environ", "auxv", "map_files")


@pytest.fixture
def anyio_backend() -> str:
    return "trio"


def ordinary() -> None:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)


def root_of_a_container() -> None:
    """As capable as a worker, so that only what a worker is protects it."""
    _capabilities.become_command(COMMAND | ENTER | Cap.MKNOD)


def ptrace(pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(PTRACE_ATTACH, pid, None, None) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")


def get_at(pid: int) -> dict[str, int]:
    """What an attacker tries on a process of ours."""
    proc = Path("/proc", str(pid))
    found = {"ptrace": attempt(ptrace, pid)}
    for name in ("mem", *LAYOUT):
        found[name] = attempt(os.open, proc / name, os.O_RDONLY)
    for name in ("exe", "root", "cwd", "ns/mnt"):
        found[name] = attempt(os.open, proc / name, os.O_RDONLY)
        found[f"{name} by O_PATH"] = attempt(os.open, proc / name, os.O_PATH)
    found["exe for writing"] = attempt(os.open, proc / "exe", os.O_WRONLY)
    found["fd"] = attempt(os.readlink, proc / "fd/0")  # the numbers alone may be listed
    found["fd for reading"] = attempt(os.open, proc / "fd/0", os.O_RDONLY)
    return found


def attack(become: Callable[[], None], pid: int) -> dict[str, int]:
    def child() -> dict[str, int]:
        become()
        return get_at(pid)

    found: dict[str, int] = in_child(child)
    return found


@pytest.mark.parametrize("become", [ordinary, root_of_a_container])
async def test_nobody_gets_at_a_child(become: Callable[[], None]) -> None:
    launched = launch()
    async with ForkServer.running(launched) as server:
        worker = await WorkerClient.forked(server)
        guardian = await WorkerClient.forked(server, "guardian")
        try:
            for one in (worker, guardian):
                await one.call("ping")
            for pid in (launched.pid, worker.child.pid, guardian.child.pid):
                found = attack(become, pid)
                if become is root_of_a_container:
                    # CAP_SYS_ADMIN, which no container has by default, may read the layout of
                    # any memory on newer kernels: it counts as CAP_PERFMON.
                    found = {k: v for k, v in found.items() if k not in LAYOUT}
                assert not {k: v for k, v in found.items() if v not in (errno.EPERM, errno.EACCES)}
        finally:
            guardian.kill()
            worker.kill()


def test_the_attempts_are_good_for_something() -> None:
    """On a process with the capabilities of a worker that has not taken the same care."""

    def body(ready: Callable[[], None]) -> None:
        _capabilities.become_command(WORKER)
        ready()
        signal.pause()

    with process(body) as pid:
        found = attack(root_of_a_container, pid)
    assert not {found["mem"], found["exe"], found["root"], found["fd"], found["ns/mnt"]} - {0}


def test_the_interpreter_is_on_a_mount_that_nobody_can_write_to(tmp_path: Path) -> None:
    """An attacker that kept the link open finds it read-only when the process has ended."""
    program = tmp_path / "program"
    shutil.copy2(shutil.which("sleep") or "/bin/sleep", program)

    def reopen(path: str) -> list[int]:
        with subprocess.Popen([path, "60"], pass_fds=[fd]) as sleeping:
            held = os.open(f"/proc/{sleeping.pid}/exe", os.O_PATH)
            sleeping.kill()

        def child() -> list[int]:
            name = f"/proc/self/fd/{held}"
            return [attempt(os.open, name, os.O_WRONLY | flag) for flag in (0, os.O_TRUNC)]

        try:
            found: list[int] = in_child(child)
            return found
        finally:
            os.close(held)

    fd = _launch._read_only(str(program))
    try:
        assert reopen(f"/proc/self/fd/{fd}") == [errno.EROFS, errno.EROFS]
        assert program.stat().st_size > 0  # O_TRUNC
        # Executed by its path, it can be overwritten.
        assert reopen(str(program)) == [0, 0]
    finally:
        os.close(fd)


def executable_of(pid: int) -> tuple[bool, bool, bool]:
    """Whether it is ours, on a read-only mount, and on a mount of this namespace."""
    own = {line.split()[0] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    fd = os.open(f"/proc/{pid}/exe", os.O_PATH)
    try:
        ours = os.path.samestat(os.fstat(fd), os.stat(sys.executable))
        read_only = bool(os.fstatvfs(fd).f_flag & os.ST_RDONLY)
        return ours, read_only, str(_linux.mount_identity(fd).mnt_id) in own
    finally:
        os.close(fd)


async def test_all_children_run_from_that_mount() -> None:
    assert executable_of(os.getpid()) == (True, False, True)
    launched = launch()
    async with ForkServer.running(launched) as server:
        worker = await WorkerClient.forked(server)
        try:
            await worker.call("ping")
            for pid in (launched.pid, worker.child.pid):
                assert executable_of(pid) == (True, True, False)
        finally:
            worker.kill()


def test_the_loader_is_told_where_the_library_is() -> None:
    """By the way of the program's own path ($ORIGIN) it could not be found any more."""
    mapped = Path("/proc/self/maps").read_text()
    libraries = {line.split()[5] for line in mapped.splitlines() if "/libpython" in line}
    directories = {os.path.dirname(path) for path in libraries}
    assert set(_launch._libraries().values()) == directories


async def test_without_privilege_it_starts_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> int:
        raise PermissionError(errno.EPERM, path)

    monkeypatch.setattr(_launch, "_read_only", refuse)
    launched = launch()
    async with ForkServer.running(launched) as server:
        worker = await WorkerClient.forked(server)
        try:
            await worker.call("ping")
            assert executable_of(worker.child.pid) == (True, False, True)
        finally:
            worker.kill()
