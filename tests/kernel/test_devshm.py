"""Semaphores of a container's /dev/shm, out of the archive that lies beside the images.

What sem_open(3) makes is a file of /dev/shm with a semaphore in it, opened by a name that is gone
by the time of the dump: so it has a link remap there, and its mount ends with the container.
"""

from __future__ import annotations

import ctypes
import io
import mmap
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from ghostpool import _run
from ghostpool._buildspec import MountSpec, NamespaceSpec, Node
from ghostpool._errors import ImageError, PlanError
from ghostpool._launch import launch
from ghostpool._linux import Attr
from ghostpool._model import NsId
from ghostpool._planned import Policy
from ghostpool._report import Report
from ghostpool._restored import Restored
from ghostpool.testing._targets import built
from tests.support import archives
from tests.support.imagewriter import O_RDWR, ImageSet
from tests.support.restore import ghostpool, look

pytestmark = pytest.mark.needs_mount_ns

LIBC = ctypes.CDLL(None, use_errno=True)
SIZE = 32
"""Of a sem_t."""
FILE = stat.S_IFREG | 0o600
ROOT = MountSpec(1, 0, b"/", 1, "tmpfs", "root", "", b"/", 0)
SHM = MountSpec(2, 1, b"/dev/shm", 2, "tmpfs", "shm", "", b"/", int(Attr.NOSUID | Attr.NODEV))


class Semaphore:
    """The semaphore in an open file, as whoever has mapped it uses it."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, SIZE)
        self._at = ctypes.byref(ctypes.c_char.from_buffer(self._map))

    def value(self) -> int:
        value = ctypes.c_int()
        assert LIBC.sem_getvalue(self._at, ctypes.byref(value)) == 0
        return value.value

    def post(self) -> None:
        assert LIBC.sem_post(self._at) == 0

    def take(self) -> None:
        assert LIBC.sem_trywait(self._at) == 0


def semaphore(value: int) -> bytes:
    """What is in the file of a semaphore that processes share."""
    memory = ctypes.create_string_buffer(SIZE)
    assert LIBC.sem_init(ctypes.byref(memory), 1, value) == 0
    return memory.raw


def images_of(*numbers: int, size: int = SIZE) -> tuple[ImageSet, list[str]]:
    """A task with semaphores at these numbers, and their hidden names."""
    images = ImageSet()
    images.mount("/", device=(0, 60))
    images.mount("/dev/shm", device=(0, 70))
    images.task(1)
    hidden = []
    for number in numbers:
        name = f"/dev/shm/{number:06x}"
        reg = images.reg(name, mode=FILE, size=size, flags=O_RDWR | 0o400000)
        images.fd(1, number, reg)
        hidden.append(f"link_remap.{images.link(reg, '/dev/shm')}")
    return images, hidden


def archive(path: Path, *members: tuple[str, bytes | str], mode: int = 0o600) -> Path:
    """As a runtime makes it of the directory; text is the name of another member, for a link."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(_info(".", type=tarfile.DIRTYPE, mode=0o1777))
        for name, content in members:
            if isinstance(content, str):
                tar.addfile(_info(name, type=tarfile.LNKTYPE, linkname=content))
            else:
                tar.addfile(_info(name, mode=mode, size=len(content)), io.BytesIO(content))
    return path


def _info(name: str, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.uid, info.gid, info.mtime = 7, 8, 1_500_000_000
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def restore(
    images: ImageSet,
    directory: Path,
    devshm: Path | None,
    see: Callable[[Any], Any] = lambda fds: None,
    *,
    pack: Callable[[Path], bytes] | None = None,
    times: int = 1,
    **policy: Any,
) -> Any:
    """What `see` makes of the descriptors; everything in the namespace is as before."""
    seen: list[Any] = []

    async def deliver(run: _run.Prepared, restored: Restored) -> None:
        task = run.plan.tasks[0]
        seen.append(see(restored.of_task(task) or restored.of_keys(task)))

    where = images.write(directory / "images")
    if pack is not None:
        where = directory / "archive"
        where.write_bytes(pack(directory / "images"))
    with built([NamespaceSpec(10, (ROOT, SHM))]) as (fd,):
        before = look(fd)
        request = _run.Request(
            str(where),
            2,
            namespaces={NsId(10): f"/proc/self/fd/{fd}"},
            policy=Policy(**policy),
            devshm=None if devshm is None else str(devshm),
        )
        try:
            for _ in range(times):
                anyio.run(_run.run_restore, request, launch(), Report(), deliver, backend="trio")
        finally:
            assert look(fd) == before
    return seen[-1]


@pytest.mark.parametrize("strategy", ["remount", "detached"])
def test_semaphores_come_back(tmp_path: Path, strategy: str) -> None:
    """With their values, shared by whoever shared them; twice, and nothing is left."""
    images, (first, again, other) = images_of(3, 4, 5)
    tar = archive(
        tmp_path / "devshm-checkpoint.tar",
        (first, semaphore(3)),
        (again, first),
        ("sem.living", semaphore(9)),
        (f"./{other}", semaphore(0)),
    )

    def see(fds: dict[int, int]) -> None:
        status = os.fstat(fds[3])
        assert (status.st_nlink, status.st_mode, status.st_uid, status.st_gid) == (0, FILE, 7, 8)
        assert status.st_mtime_ns == 1_500_000_000 * 10**9
        assert os.readlink(f"/proc/self/fd/{fds[3]}") == "/dev/shm/000003 (deleted)"
        assert os.path.samestat(status, os.fstat(fds[4]))
        assert not os.path.samestat(status, os.fstat(fds[5]))
        one, same, another = Semaphore(fds[3]), Semaphore(fds[4]), Semaphore(fds[5])
        assert (one.value(), same.value(), another.value()) == (3, 3, 0)
        one.take()
        another.post()
        assert (one.value(), same.value(), another.value()) == (2, 2, 1)

    restore(images, tmp_path, tar, see, times=2, strategy=strategy)


def test_semaphores_that_are_only_mapped(tmp_path: Path) -> None:
    """As sem_open(3) leaves them, which closes its descriptor; processes share one."""
    images, _ = images_of()
    images.task(2)
    reg = images.reg("/dev/shm/sem.AbCdEf", mode=FILE, size=SIZE, flags=0)
    for task in (1, 2):
        images.map(task, 0x10000, 0x11000, reg, status=0x81, prot=3, flags=1)
    hidden = f"link_remap.{images.link(reg, '/dev/shm')}"
    tar = archive(tmp_path / "tar", (hidden, semaphore(3)), ("sem.mp-abc", hidden))

    def see(keys: dict[str, int]) -> int:
        assert list(keys) == ["map:10000-11000"]
        (fd,) = keys.values()
        assert os.readlink(f"/proc/self/fd/{fd}") == "/dev/shm/sem.AbCdEf (deleted)"
        one = Semaphore(fd)
        one.take()
        return one.value()

    assert restore(images, tmp_path, tar, see) == 2


@pytest.mark.parametrize("place", ["beside checkpoint/", "beside the images"])
def test_a_checkpoint_archive_has_it_inside(tmp_path: Path, place: str) -> None:
    """Where Podman puts it; what --devshm names comes first."""
    images, (hidden,) = images_of(3)
    tar = archive(tmp_path / "tar", ("sem.living", bytes(99)), (hidden, semaphore(3)))
    other = archive(tmp_path / "other", (hidden, semaphore(7)))
    above = "checkpoint/" if place == "beside checkpoint/" else ""

    def pack(directory: Path) -> bytes:
        shm = ("devshm-checkpoint.tar", tar.read_bytes())
        return archives.tar([("bind.mounts", b"[]"), *archives.images_below(directory, above), shm])

    def value(fds: dict[int, int]) -> int:
        return Semaphore(fds[3]).value()

    assert restore(images, tmp_path, None, value, pack=pack) == 3
    assert restore(images, tmp_path, other, value, pack=pack) == 7


def test_one_that_nobody_needs_may_be_damaged(tmp_path: Path) -> None:
    images, _ = images_of()
    images.open(1, 3, "/gone", ghost=images.ghost(b"x"))

    def pack(directory: Path) -> bytes:
        shm = ("devshm-checkpoint.tar", b"nothing")
        return archives.tar([*archives.images_below(directory), shm])

    assert restore(images, tmp_path, None, len, pack=pack) == 1


def test_a_file_that_is_there_is_the_one_that_is_opened(tmp_path: Path) -> None:
    """The archive is for what is missing."""
    images, (hidden,) = images_of(3)
    node = Node(f"/dev/shm/{hidden}".encode(), FILE, data=semaphore(5))
    tar = archive(tmp_path / "tar", (hidden, semaphore(3)))

    images.write(tmp_path / "images")
    with built([NamespaceSpec(10, (ROOT, SHM._replace(nodes=(node,))))]) as (fd,):
        target = f"10=/proc/{os.getpid()}/fd/{fd}"
        command = "plan", "-D", tmp_path / "images", "--ns", target, "--devshm", tar, "--json"
        plan = ghostpool(*command)
    assert plan.returncode == 0, plan.stderr
    assert '"link_remaps": 1' in plan.stdout
    assert '"ghosts": 0' in plan.stdout


def test_what_would_supply_it(tmp_path: Path) -> None:
    images, (hidden,) = images_of(3)
    with pytest.raises(PlanError, match=rf"{hidden} is not there on /dev/shm .* --devshm FILE"):
        restore(images, tmp_path, None)
    tar = archive(tmp_path / "tar", ("link_remap.999", semaphore(3)))
    with pytest.raises(PlanError, match=r"nor in the archive of /dev/shm"):
        restore(images, tmp_path, tar)


def test_an_archive_of_another_dump(tmp_path: Path) -> None:
    images, (hidden,) = images_of(3)
    with pytest.raises(PlanError, match=r"files.img says 32 bytes, the archive of /dev/shm 33"):
        restore(images, tmp_path, archive(tmp_path / "tar", (hidden, bytes(33))))
    tar = archive(tmp_path / "tar", (hidden, bytes(32)), mode=0o4755)
    with pytest.raises(
        PlanError, match=r"files.img says mode 100600, the archive of /dev/shm 1047"
    ):
        restore(images, tmp_path, tar)


def test_an_archive_that_is_none(tmp_path: Path) -> None:
    images, _ = images_of(3)
    broken = tmp_path / "broken"
    broken.write_bytes(b"nothing" * 1000)
    with pytest.raises(ImageError, match=r"broken, .*no tar archive"):
        restore(images, tmp_path, broken)
    with pytest.raises(PlanError, match=r"--devshm .*No such file"):
        restore(images, tmp_path, tmp_path / "missing")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageError, match="fifo: is not a regular file"):
        restore(images, tmp_path, tmp_path / "fifo")


@pytest.mark.long
def test_the_option_of_the_command(tmp_path: Path) -> None:
    images, (hidden,) = images_of(3)
    tar = archive(tmp_path / "tar", (hidden, semaphore(3)))
    with built([NamespaceSpec(10, (ROOT, SHM))]) as (fd,):
        target = f"10=/proc/{os.getpid()}/fd/{fd}"
        images.write(tmp_path / "images")
        command = "restore", "-D", tmp_path / "images", "--ns", target, "--discard"
        assert ghostpool(*command).returncode == 2
        done = ghostpool(*command, "--devshm", tar)
        assert done.returncode == 0, done.stderr
    rebuilt = ghostpool("restore", "-D", tmp_path / "images", "--discard", "--devshm", tar)
    assert rebuilt.returncode == 0, rebuilt.stderr
