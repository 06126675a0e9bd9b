"""Link remaps: files opened through the hidden names that a dump gave them, and nothing else.

Each is restored into a namespace that has the file; all that is about it but the time of its latest
linking is compared with what it was.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from ghostpool import _run
from ghostpool._buildspec import MountSpec, NamespaceSpec, Node
from ghostpool._errors import PlanError, RestoreError, VerificationError
from ghostpool._launch import launch
from ghostpool._linux import Attr
from ghostpool._model import NsId
from ghostpool._planned import Policy, Strategy
from ghostpool._report import Report
from ghostpool._restored import Restored
from ghostpool.testing._targets import built
from tests.support.crash import Whom, coordinate, journals, own_paths, wait_for
from tests.support.imagewriter import O_RDWR, ImageSet
from tests.support.namespaces import inside
from tests.support.restore import ghostpool, look

pytestmark = pytest.mark.needs_mount_ns

RO = int(Attr.RDONLY)
ROOT = MountSpec(1, 0, b"/", 1, "tmpfs", "root", "", b"/", 0)
O_PATH = 0o12000000
CONTENT = b"somebody needs it"
FILE = stat.S_IFREG | 0o640


def file(path: str, **fields: Any) -> Node:
    node = Node(path.encode(), FILE, uid=7, gid=8, data=CONTENT, mtime_ns=1_234_567_890_123_456_789)
    return node._replace(**fields)


def mount(*nodes: Node, point: str = "/data", flags: int = RO, **fields: Any) -> MountSpec:
    spec = MountSpec(2, 1, point.encode(), 2, "tmpfs", "m2", "", b"/", flags, nodes=nodes)
    return spec._replace(**fields)


@contextmanager
def namespace(*mounts: MountSpec) -> Iterator[int]:
    with built([NamespaceSpec(10, (ROOT, *mounts))]) as (fd,):
        yield fd


def one_task(point: str = "/data", **fields: Any) -> ImageSet:
    images = ImageSet()
    images.mount("/", device=(0, 60))
    images.mount(point, device=(0, 70), **fields)
    images.task(1)
    return images


def linked(
    images: ImageSet, number: int, name: str, where: str = "/data", **fields: Any
) -> tuple[int, str]:
    """A descriptor of task 1 that has a link remap; its file id and the hidden name."""
    fields = {"mode": FILE, "size": len(CONTENT), **fields}
    mode, size, flags = fields["mode"], fields["size"], fields.get("flags", 0o100000)
    reg = images.reg(name, mode=mode, size=size, flags=flags, pos=fields.get("pos", 0))
    images.fd(1, number, reg)
    return reg, f"{where}/link_remap.{images.link(reg, where)}"


Files = dict[str, tuple[Any, ...]]


def files_of(fd: int) -> Files:
    """All files, but for the times at which a file with a link remap was linked."""
    files = look(fd, "/").files
    return {
        path: seen if "link_remap" not in path and seen[5] == 1 else (*seen[:9], *seen[10:])
        for path, seen in files.items()
    }


See = Callable[[int], Any]


def restore(
    images: ImageSet,
    fd: int,
    directory: Path,
    see: See = os.fstat,
    *,
    report: Report | None = None,
    changed: bool = False,
    **policy: Any,
) -> dict[int, Any]:
    """Restore in this process; what `see` made of each descriptor of task 1.

    Everything in the namespace is as before, but for files that are `changed` or kept.
    """
    mounts, before = look(fd, "/").mounts, files_of(fd)
    seen: dict[int, Any] = {}

    async def deliver(run: _run.Prepared, restored: Restored) -> None:
        for number, descriptor in restored.of_task(run.plan.tasks[0]).items():
            seen[number] = see(descriptor)

    request = _run.Request(
        str(images.write(directory / "images")),
        4,
        namespaces={NsId(10): f"/proc/self/fd/{fd}"},
        policy=Policy(**policy),
        run_dir=str(directory),
    )

    async def story() -> None:
        await _run.run_restore(request, launch(), report or Report(), deliver)

    try:
        anyio.run(story, backend="trio")
    finally:
        assert look(fd, "/").mounts == mounts
        if not changed and not policy.get("keep"):
            assert files_of(fd) == before
    return seen


def link_of(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


def everything_of(fd: int) -> tuple[os.stat_result, str, int, bytes]:
    return os.fstat(fd), link_of(fd), os.lseek(fd, 0, os.SEEK_CUR), os.pread(fd, 99, 0)


def inode_of(fd: int, path: str) -> tuple[int, int]:
    found: tuple[int, int] = inside(fd, lambda: (os.lstat(path).st_dev, os.lstat(path).st_ino))
    return found


# -- What is opened -----------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["remount", "detached"])
def test_the_file_itself_is_opened_under_its_old_name(tmp_path: Path, strategy: Strategy) -> None:
    """On a read-only mount too, with parents that are gone; again and again from one image."""
    images = one_task(flags=0x200001)
    _, here = linked(images, 3, "/data/gone", pos=3)
    _, above = linked(images, 4, "/data/a/b/gone")
    with namespace(mount(file(here), file(above))) as fd:
        for _ in range(2):
            report = Report()
            got = restore(images, fd, tmp_path, everything_of, report=report, strategy=strategy)
            for number, hidden, name in ((3, here, "gone"), (4, above, "a/b/gone")):
                status, link, position, content = got[number]
                assert (status.st_dev, status.st_ino) == inode_of(fd, hidden)
                assert (status.st_nlink, status.st_mode, status.st_uid) == (1, FILE, 7)
                assert status.st_mtime_ns == 1_234_567_890_123_456_789
                assert link == f"/data/{name} (deleted)"
                assert content == CONTENT
                assert position == (3 if number == 3 else 0)
            document = report.document()
            assert (document["ghosts"], document["link_remaps"], document["remaps"]) == (0, 2, 2)
            (one,) = document["mounts"]
            assert one["made_writable"]["task"] == int(strategy == "remount")


def test_one_file_by_several_hidden_names(tmp_path: Path) -> None:
    """As a dump gives each open file one of its own: they are one file still."""
    images = one_task()
    _, first = linked(images, 3, "/data/gone")
    _, second = linked(images, 4, "/data/other")
    other = file(second, hard_link_of=first.encode())
    with namespace(mount(file(first), other, flags=0)) as fd:
        got = restore(images, fd, tmp_path)
    assert os.path.samestat(got[3], got[4])
    assert got[3].st_nlink == 2


def test_beside_ghosts(tmp_path: Path) -> None:
    images = one_task(flags=0x200001)
    _, hidden = linked(images, 3, "/data/gone")
    images.open(1, 4, "/data/ghost", ghost=images.ghost(b"ghost"))
    shared = images.ghost(b"shared")
    images.open(1, 5, "/data/once", ghost=shared)
    images.open(1, 6, "/data/twice", ghost=shared)
    with namespace(mount(file(hidden))) as fd:
        got = restore(images, fd, tmp_path)
    assert {number: status.st_nlink for number, status in got.items()} == {3: 1, 4: 0, 5: 0, 6: 0}


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    """By another file, or by the very same one that somebody has linked back."""
    images = one_task()
    _, first = linked(images, 3, "/data/gone")
    _, second = linked(images, 4, "/data/back")
    living = (file("/data/gone"), file("/data/back", hard_link_of=second.encode()))
    with namespace(mount(file(first), file(second), *living, flags=0)) as fd:
        got = restore(images, fd, tmp_path, link_of)
        again = restore(images, fd, tmp_path)
        assert (again[4].st_dev, again[4].st_ino) == inode_of(fd, "/data/back")
    assert got == {3: "/data/gone.cr_link (deleted)", 4: "/data/back.cr_link (deleted)"}


def test_what_is_written_goes_to_the_file(tmp_path: Path) -> None:
    images = one_task()
    _, hidden = linked(images, 3, "/data/gone", flags=O_RDWR)

    def write(fd: int) -> int:
        os.pwrite(fd, b"SOMEBODY", 0)
        return os.fstat(fd).st_nlink

    with namespace(mount(file(hidden), flags=0)) as fd:
        assert restore(images, fd, tmp_path, write, changed=True) == {3: 1}
        assert inside(fd, lambda: Path(hidden).read_bytes()) == b"SOMEBODY needs it"


def test_a_fifo_a_symbolic_link_and_a_device(tmp_path: Path) -> None:
    images = one_task()
    _, pipe = linked(images, 3, "/data/pipe", mode=0o10600, size=None, flags=O_RDWR)
    _, link = linked(images, 4, "/data/link", mode=0o120777, size=None, flags=O_PATH | 0o400000)
    _, null = linked(images, 5, "/data/null", mode=0o20600, size=None)
    nodes = (
        Node(pipe.encode(), 0o10600),
        Node(link.encode(), 0o120777, target=b"away"),
        Node(null.encode(), 0o20600, rdev=os.makedev(1, 3)),
    )
    with namespace(mount(*nodes, flags=0)) as fd:
        got = restore(images, fd, tmp_path, allow_devices=True)
        with pytest.raises(
            PlanError, match=r"/data/null .*device, refused without --allow-devices"
        ):
            restore(images, fd, tmp_path)
    assert {number: stat.S_IFMT(status.st_mode) for number, status in got.items()} == {
        3: stat.S_IFIFO,
        4: stat.S_IFLNK,
        5: stat.S_IFCHR,
    }


def test_a_kept_file_has_both_names(tmp_path: Path) -> None:
    images = one_task(flags=0x200001)
    _, hidden = linked(images, 3, "/data/gone")
    with namespace(mount(file(hidden))) as fd:
        restore(images, fd, tmp_path, keep=True)
        assert inode_of(fd, "/data/gone") == inode_of(fd, hidden)


# -- Taking the hidden names away -----------------------------------------------------------------


def hidden_in(fd: int) -> list[str]:
    found: list[str] = inside(fd, lambda: [n for n in os.listdir("/data") if "link_remap" in n])
    return found


@pytest.mark.parametrize("flags", [0, RO])
def test_hidden_names_go_after_a_success_if_asked_for(tmp_path: Path, flags: int) -> None:
    """Whatever other names the files have stay; the mount is as it was."""
    images = one_task(flags=0x200001)
    _, first = linked(images, 3, "/data/gone")
    _, second = linked(images, 4, "/data/other")
    nodes = file(first), file(second), file("/data/own", hard_link_of=second.encode())
    with namespace(mount(*nodes, flags=flags)) as fd:
        report = Report()
        seen = {}

        def see(number: int) -> None:
            seen[link_of(number)] = os.fstat(number).st_nlink

        restore(images, fd, tmp_path, see, report=report, changed=True, consume_link_remaps=True)
        assert hidden_in(fd) == []
        assert seen == {"/data/gone (deleted)": 0, "/data/other (deleted)": 1}
        assert inside(fd, lambda: Path("/data/own").read_bytes()) == CONTENT
        assert report.document()["consumed_link_remaps"] == 2
        assert report.document()["left"] == []
        with pytest.raises(PlanError, match="is not there"):
            restore(images, fd, tmp_path, consume_link_remaps=True)


def test_a_hidden_name_that_somebody_else_has_taken_away_is_not_counted(tmp_path: Path) -> None:
    """It is gone, as it should be, but not by this run."""
    images = one_task(flags=0x200001)
    _, first = linked(images, 3, "/data/gone")
    _, second = linked(images, 4, "/data/other")
    nodes = file(first), file(second)
    with namespace(mount(*nodes, flags=0)) as fd, pytest.MonkeyPatch.context() as patch:
        report = Report()

        def check(_: _run.Session) -> None:
            inside(fd, lambda: os.unlink(first))

        patch.setattr(_run.Session, "_check_consumers", check)
        restore(images, fd, tmp_path, report=report, changed=True, consume_link_remaps=True)
        assert hidden_in(fd) == []
        assert report.document()["consumed_link_remaps"] == 1
        assert report.document()["left"] == []


def test_hidden_names_stay_after_a_failure(tmp_path: Path) -> None:
    """Whatever comes after the files were opened: here the last word of who takes them."""
    images = one_task()
    linked_file = linked(images, 3, "/data/gone")[1]
    with namespace(mount(file(linked_file), flags=0)) as fd, pytest.MonkeyPatch.context() as patch:

        def check(session: _run.Session) -> None:
            raise RestoreError("no")

        patch.setattr(_run.Session, "_check_consumers", check)
        with pytest.raises(RestoreError, match="no"):
            restore(images, fd, tmp_path, consume_link_remaps=True)
        assert hidden_in(fd) == [os.path.basename(linked_file)]


def test_a_hidden_name_that_is_another_file_by_then_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = one_task()
    _, hidden = linked(images, 3, "/data/gone")
    report = Report()
    with namespace(mount(file(hidden), file("/data/new"), flags=0)) as fd:

        def check(session: _run.Session) -> None:
            inside(fd, lambda: os.rename("/data/new", hidden))

        monkeypatch.setattr(_run.Session, "_check_consumers", check)
        restore(images, fd, tmp_path, report=report, changed=True, consume_link_remaps=True)
        assert hidden_in(fd) == [os.path.basename(hidden)]
    (told,) = report.document()["left"]
    assert hidden in told
    assert "another file has the name now" in told


@pytest.mark.long
@pytest.mark.parametrize("whom", ["coordinator", "all but the guardian", "everything"])
def test_killed_while_hidden_names_are_taken_away(tmp_path: Path, whom: Whom) -> None:
    """Before it is written down all stay; from then on all go, by the guardian or by recover."""
    images = one_task(flags=0x200001)
    _, first = linked(images, 3, "/data/gone")
    _, second = linked(images, 4, "/data/other")
    directory = images.write(tmp_path)
    with namespace(mount(file(first), file(second))) as fd:
        where = own_paths({10: fd})
        # The first debts are for the mount and for the old names, the third for the hidden ones.
        coordinate(directory, where, 2, kind="owe", when="before", whom=whom, consume=True)
        assert wait_for(lambda: whom == "everything" or not journals())
        if whom == "everything":
            assert ghostpool("recover").returncode == 0
        assert sorted(hidden_in(fd)) == sorted(map(os.path.basename, (first, second)))
        coordinate(directory, where, 2, kind="owe", when="after", whom=whom, consume=True)
        assert wait_for(lambda: whom == "everything" or not hidden_in(fd))
        if whom == "everything":
            assert len(hidden_in(fd)) == 2
            done = ghostpool("recover")
            assert (done.returncode, done.stdout.count(": removed")) == (0, 2), done.stdout
        assert hidden_in(fd) == []
        assert wait_for(lambda: not journals())


@pytest.mark.long
def test_the_option_of_the_command(tmp_path: Path) -> None:
    images = one_task()
    _, hidden = linked(images, 3, "/data/gone")
    with namespace(mount(file(hidden), flags=0)) as fd:
        target = f"10=/proc/{os.getpid()}/fd/{fd}"
        command = "restore", "-D", images.write(tmp_path), "--ns", target, "--discard"
        assert ghostpool(*command).returncode == 0
        assert len(hidden_in(fd)) == 1
        assert ghostpool(*command, "--consume-link-remaps").returncode == 0
        assert hidden_in(fd) == []


# -- What is refused ----------------------------------------------------------------------------


def refused(images: ImageSet, spec: MountSpec, directory: Path, words: str) -> None:
    with namespace(spec) as fd, pytest.raises(PlanError, match=words):
        restore(images, fd, directory)


WHERE: Mapping[str, tuple[dict[str, Any], str]] = {
    "tmpfs": ({}, "a tmpfs: "),
    "external": ({"ext_key": "shm"}, r"a tmpfs, external in the images \(shm\): "),
}


@pytest.mark.parametrize("kind", WHERE)
def test_a_file_that_is_not_there(tmp_path: Path, kind: str) -> None:
    """Its names, its mount and what would supply it."""
    fields, what = WHERE[kind]
    images = one_task("/dev/shm", **fields)
    reg, hidden = linked(images, 3, "/dev/shm/gone", "/dev/shm")
    words = rf"/dev/shm/gone \(file id {reg}\).*{hidden} is not there on /dev/shm in .*{what}"
    refused(images, mount(point="/dev/shm", flags=0), tmp_path, words + ".*restore where")


def test_a_file_that_is_another_one_by_now(tmp_path: Path) -> None:
    for fields, words in (
        ({"data": b"longer than " + CONTENT}, "29 bytes now, files.img says 17"),
        ({"mode": stat.S_IFREG | 0o600}, "mode 100600 now, files.img says 100640"),
    ):
        images = one_task()
        _, hidden = linked(images, 3, "/data/gone")
        refused(images, mount(file(hidden, **fields), flags=0), tmp_path, words)


def test_an_image_names_no_other_file(tmp_path: Path) -> None:
    """Whoever writes an image would else choose a file of the mount to be opened by root."""
    for name in ("/data/secret", "/data/link_remap.1", "/data/other/link_remap.70"):
        images = one_task()
        reg = images.open(1, 3, "/data/gone")
        images.remap(reg, images.reg(name, id=70, flags=0, mode=None, with_mount=False), 0)
        nodes = (Node(b"/data/other", stat.S_IFDIR | 0o755), file(name, mode=0o100644))
        refused(images, mount(*nodes, flags=0), tmp_path, "no name that criu dump gives a file")


def test_a_file_of_another_kind_where_images_do_not_say(tmp_path: Path) -> None:
    images = one_task()
    _, hidden = linked(images, 3, "/data/gone", mode=None, size=None)
    with namespace(mount(file(hidden), flags=0)) as fd:
        assert restore(images, fd, tmp_path)[3].st_mode == FILE
    refused(images, mount(Node(hidden.encode(), 0o10600), flags=0), tmp_path, "no regular file")


def test_opened_for_writing_on_a_read_only_mount(tmp_path: Path) -> None:
    images = one_task(flags=0x200001)
    _, hidden = linked(images, 3, "/data/gone", flags=O_RDWR)
    refused(images, mount(file(hidden)), tmp_path, "open for writing, but /data is read-only now")


# -- What comes in between ----------------------------------------------------------------------


@pytest.mark.parametrize("what", ["another", "gone"])
def test_the_hidden_name_is_another_file_when_it_is_opened(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was exchanged after the plan: the restore fails, and leaves alone what is there."""
    images = one_task()
    _, hidden = linked(images, 3, "/data/gone")
    with namespace(mount(file(hidden), file("/data/new", data=b"another one's"), flags=0)) as fd:
        real = _run.Prepared.restoring

        def exchange() -> None:
            if what == "another":
                os.rename("/data/new", hidden)
            else:
                os.unlink(hidden)

        def restoring(run: _run.Prepared, **options: Any) -> Any:
            inside(fd, exchange)
            return real(run, **options)

        monkeypatch.setattr(_run.Prepared, "restoring", restoring)
        error = VerificationError if what == "another" else RestoreError
        with pytest.raises(error, match=r"identity|No such file"):
            restore(images, fd, tmp_path, keep=True)
        left = inside(fd, lambda: sorted(os.listdir("/data")))
        assert left == ([os.path.basename(hidden)] if what == "another" else ["new"])
