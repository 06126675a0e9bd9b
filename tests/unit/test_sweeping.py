"""Which names are those of leftovers, and how they are looked for."""

from __future__ import annotations

import errno
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ghostpool import _sweeping
from ghostpool._protocol import Remnant
from ghostpool._sweeping import SweepWork, leftover_kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (b".ghostpool-8e8190bc1540-1", "ghostpool"),
        (b".ghostpool-8e8190bc1540-7ffffff", "ghostpool"),
        (b"a.cr.1f.ghost", "criu_ghost"),
        (b".cr.1.ghost.cr.2.ghost", "criu_ghost"),
        (b"a\n.cr.0.ghost", "criu_ghost"),
        (b"name.cr_link", "cr_link"),
        (b"link_remap.17", "link_remap"),
        (b".ghostpool-8e8190bc1540", None),
        (b".ghostpool-8e8190bc1540-", None),
        (b".ghostpool-8E8190BC1540-1", None),
        (b".ghostpool-8e8190bc154-1", None),
        (b".ghostpool-8e8190bc1540-1.txt", None),
        (b"x.ghostpool-8e8190bc1540-1", None),
        (b".cr.1.ghost", None),
        (b"a.cr..ghost", None),
        (b"a.cr.1g.ghost", None),
        (b"a.cr.1F.ghost", None),
        (b"a.cr.1.ghosts", None),
        (b"a.ghost", None),
        (b".cr_link", None),
        (b"a.cr_link.bak", None),
        (b"link_remap.", None),
        (b"link_remap.0", None),
        (b"link_remap.1a", None),
        (b"link_remap.\xb2", None),
        (b"my_link_remap.1", None),
        (b"a.criu-sk-ghost", None),  # a living file that CRIU has moved aside
    ],
)
def test_names_of_leftovers(name: bytes, kind: str | None) -> None:
    assert leftover_kind(name) == kind


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_PATH)
    yield fd
    os.close(fd)


def find(root: int) -> tuple[list[Remnant], int, list[Any], bool]:
    rows, unread, example, stopped = SweepWork({0: root}).do_sweep([], 0)
    return [Remnant(*row) for row in rows], unread, example, stopped


def test_it_finds_below_directories_and_follows_no_link(tmp_path: Path, root: int) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.cr_link").write_text("four")
    (tmp_path / "link_remap.3").symlink_to("a")
    (tmp_path / "elsewhere").symlink_to("a/b")
    found, *rest = find(root)
    assert rest == [0, [], False]
    link, file = sorted(found, key=lambda one: one.directory)
    assert (link.directory, link.name, link.kind) == (b"", b"link_remap.3", "link_remap")
    assert (file.directory, file.name, file.size) == (b"a/b", b"x.cr_link", 4)
    assert (file.inode, file.above) == (
        (tmp_path / "a/b/x.cr_link").stat().st_ino,
        (tmp_path / "a/b").stat().st_ino,
    )


def test_looking_leaves_no_trace(tmp_path: Path, root: int) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.cr_link").write_text("x")
    os.utime(tmp_path / "d", ns=(1, 1))  # an access time that relatime would renew
    before = (tmp_path / "d").stat()
    find(root)
    assert (tmp_path / "d").stat() == before


def test_there_are_bounds(tmp_path: Path, root: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(9):
        (tmp_path / f"{number}.cr_link").touch()
        (tmp_path / f"d{number}").mkdir()
    assert (len(find(root)[0]), find(root)[3]) == (9, False)
    for name, most in (("MOST_FOUND", 3), ("MOST_ENTRIES", 3), ("_MOST_PENDING", 3)):
        with monkeypatch.context() as patch:
            patch.setattr(_sweeping, name, most)
            found, _, _, stopped = find(root)
        assert stopped, name
        assert len(found) <= 4 or name == "_MOST_PENDING"


def test_what_can_not_be_looked_at_is_told(
    tmp_path: Path, root: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the rest is looked at."""
    for name in ("good", "broken", "exchanged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.cr_link").touch()
    real = _sweeping._open

    def failing(at: int, path: bytes) -> int:
        if path in (b"broken", b"exchanged"):
            raise OSError(errno.EIO if path == b"broken" else errno.ELOOP, "")
        return real(at, path)

    monkeypatch.setattr(_sweeping, "_open", failing)
    found, unread, example, stopped = find(root)
    assert [one.directory for one in found] == [b"good"]
    assert (unread, example, stopped) == (1, [(b"broken", errno.EIO)], False)


def test_what_can_not_be_looked_at_is_not_kept_in_mind(
    tmp_path: Path, root: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be as many such directories as a container likes."""
    for number in range(400):
        (tmp_path / f"{number:0200}").mkdir()
    real = _sweeping._open
    memory: list[int] = []

    def failing(at: int, path: bytes) -> int:
        if not path:
            return real(at, path)
        memory.append(tracemalloc.get_traced_memory()[0])
        raise OSError(errno.EIO, "")

    monkeypatch.setattr(_sweeping, "_open", failing)
    tracemalloc.start()
    try:
        _, unread, example, _ = find(root)
    finally:
        tracemalloc.stop()
    assert (unread, len(example)) == (400, 1)
    assert memory[-1] < memory[0] - 200 * 200
