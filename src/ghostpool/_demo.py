"""The demonstration: a real dump, restored in private namespaces and held against the truth.

The images were made by CRIU from four tasks in four mount namespaces; what the tasks saw of their
own files before the dump is shipped beside them, and every descriptor is compared with that.
As an ordinary user it runs inside a user namespace, which maps one id: there every ghost belongs
to that user, and the owner is the one thing that is not compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from ghostpool import _linux
from ghostpool._errors import VerificationError
from ghostpool._mountinfo import option_names
from ghostpool._paths import text
from ghostpool._progress import Bar
from ghostpool._restored import Restored
from ghostpool._run import Prepared
from ghostpool._show import table
from ghostpool._survey import read_tables

JOBS = 16


def enter_user_namespace() -> None:
    """Become root of a fresh user namespace that maps nobody else: user_namespaces(7).

    Must come before any thread is started. OSError: unprivileged user namespaces are forbidden.
    """
    uid, gid = os.geteuid(), os.getegid()
    _linux.unshare(_linux.CLONE_NEWUSER | _linux.CLONE_NEWNS)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def may_mount() -> bool:
    """Whether this process has CAP_SYS_ADMIN (bit 21): capabilities(7)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> 21 & 1)
    return False


def unpack_dump(directory: str) -> None:
    """Write the shipped dump into the directory; read member by member, as any archive should be.

    Its images go into `images`, and what the tasks saw of their files into `expected.json`.
    """
    os.mkdir(os.path.join(directory, "images"))
    with tarfile.open(str(files("ghostpool") / "data" / "demo.tar.gz")) as archive:
        for member in archive:
            content = archive.extractfile(member)
            if content is not None:
                with content:
                    Path(directory, member.name).write_bytes(content.read())


class Demo:
    """One demonstration, in a temporary directory that ends with it."""

    def __init__(self, console: Console, compare_owner: bool) -> None:
        self._console = console
        self._compare_owner = compare_owner
        self._directory = tempfile.TemporaryDirectory(prefix="ghostpool-demo-")
        self._mountinfo = Path("/proc/self/mountinfo").read_bytes()
        unpack_dump(self._directory.name)
        self.images = os.path.join(self._directory.name, "images")
        self.run_dir = os.path.join(self._directory.name, "run")
        expected = Path(self._directory.name, "expected.json").read_text(encoding="utf-8")
        self._expected: list[dict[str, Any]] = json.loads(expected)
        self.bar = Bar(console)
        self.checks = 0

    def __enter__(self) -> Self:
        self.bar.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()
        self._directory.cleanup()

    async def deliver(self, run: Prepared, restored: Restored) -> None:
        """Compare everything, and show the mounts."""
        self.bar.stop()
        tasks = {planned.task.pid: restored.of_task(planned) for planned in run.plan.tasks}
        for row in self._expected:
            self._compare(row, tasks[row["task"]][row["fd"]])
        await self._compare_mounts(run, restored)

    def _require(self, holds: bool, what: str) -> None:
        self.checks += 1
        if not holds:
            raise VerificationError(f"the demonstration failed: {what}")

    def _compare(self, row: dict[str, Any], fd: int) -> None:
        name = f"{row['path']} (task {row['task']}, descriptor {row['fd']})"
        status = os.fstat(fd)
        link = os.readlink(f"/proc/self/fd/{fd}")
        position = os.lseek(fd, 0, os.SEEK_CUR)
        content = hashlib.sha256(os.pread(fd, status.st_size, 0)).hexdigest()
        self._require(position == row["pos"], f"{name}: position {position}")
        self._require(status.st_nlink == 0, f"{name}: {status.st_nlink} links")
        self._require(link.endswith(row["path"] + " (deleted)"), f"{name}: shown as {link}")
        self._require(status.st_size == row["size"], f"{name}: size {status.st_size}")
        self._require(status.st_mode & 0o7777 == row["mode"], f"{name}: mode {status.st_mode:o}")
        self._require(content == row["sha256"], f"{name}: content")
        mtime_us = status.st_mtime_ns // 1000
        expected_us = row["mtime"][0] * 1_000_000 + row["mtime"][1] // 1000
        self._require(mtime_us == expected_us, f"{name}: modification time")
        if self._compare_owner:
            owner = (status.st_uid, status.st_gid)
            self._require(owner == (row["uid"], row["gid"]), f"{name}: owner {owner}")

    async def _compare_mounts(self, run: Prepared, restored: Restored) -> None:
        unique = {target.index: target for target in run.targets.values()}
        tables = await read_tables(run.pool, list(unique.values()))
        await run.release_workers()
        rows = table("mounts", "ns", "mount point", "before", "during", "after", "leases", "window")
        for planned in run.plan.mounts.values():
            usage = restored.usage[planned.handle]
            after = tables[planned.namespace.target.index].stack(planned.mount.mountpoint)[-1]
            during = restored.writable_attributes[planned.handle]
            where = text(planned.mount.mountpoint)
            self._require(after == planned.mount, f"{where} is not as it was: {after.options()}")
            kept = planned.mount.attributes & ~_linux.Attr.RDONLY
            self._require(during == kept, f"{where} lost flags while it was writable")
            self._require(usage.made_writable == 1, f"{where}: {usage.made_writable} changes")
            rows.add_row(
                str(planned.namespace.id),
                where,
                ", ".join(planned.mount.options()),
                ", ".join(option_names(during)),
                ", ".join(after.options()),
                str(usage.leases),
                f"{usage.window_s * 1000:.1f} ms",
            )
        self._console.print(rows)

    def conclude(self) -> None:
        """After the run: nothing is left, and what that is worth in one line."""
        mounts = Path("/proc/self/mountinfo").read_bytes()
        self._require(mounts == self._mountinfo, "this process's own mount table changed")
        owner = "" if self._compare_owner else " (owners not compared: one id is mapped here)"
        ghosts = len({(row["mount"], row["group"]) for row in self._expected})
        self._console.print(
            f"{ghosts} ghost files behind {len(self._expected)} descriptors: content, mode, "
            f"times, position, link count and names as before the dump{owner}; all mounts as "
            f"they were; {self.checks} checks, nothing left behind",
            soft_wrap=True,
        )
