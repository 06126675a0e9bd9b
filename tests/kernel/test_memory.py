"""--memory-limit with the real command: fewer workers, the same result."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.imagewriter import ImageSet
from tests.support.live import Live, live, read_only, run

pytestmark = pytest.mark.needs_mount_ns

MOUNTS = 12


@pytest.fixture(scope="module")
def target() -> Iterator[Live]:
    with live([read_only(10 + n, b"/m%d" % n, "keep") for n in range(MOUNTS)]) as (one,):
        yield one


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = ImageSet()
    made.mount("/")
    made.task(1)
    for number in range(MOUNTS):
        made.mount(f"/m{number}", flags=0x200001)
    for number in range(20 * MOUNTS):
        name = f"/m{number % MOUNTS}/gone-{number}"
        made.open(1, 3 + number, name, ghost=made.ghost(bytes(20_000)))
    return made.write(tmp_path_factory.mktemp("images"))


def restore(images: Path, target: Live, report: Path, *options: str) -> dict[str, Any]:
    where = ("-D", images, "-t", target.pid, "-j", MOUNTS, "--report", report)
    done = run("restore", *where, "--discard", *options)
    document: dict[str, Any] = json.loads(report.read_text())
    assert done.status == document["status"], done
    return document


def test_fewer_workers_and_the_same_result(target: Live, images: Path, tmp_path: Path) -> None:
    before = target.snapshot().without_directory_times()
    free = restore(images, target, tmp_path / "free")
    assert free["memory"] is None
    assert free["workers"]["count"] == MOUNTS

    wide = restore(images, target, tmp_path / "wide", "--memory-limit", "2G")
    assert wide["workers"]["count"] == MOUNTS
    assert wide["memory"]["limit_bytes"] == 2 << 30
    assert 0 < wide["memory"]["peak_bytes"] < 2 << 30

    small = restore(images, target, tmp_path / "small", "--memory-limit", "1M")
    assert small["status"] == 2
    (error,) = small["errors"]
    need = re.search(r"--memory-limit 1M: this run needs (\d+)M", error["message"])
    assert need is not None, error
    # What it asks for is enough, and is about kept.
    tight = restore(images, target, tmp_path / "tight", "--memory-limit", f"{need[1]}M")
    assert tight["status"] == 0, tight["errors"]
    assert tight["workers"]["count"] < MOUNTS / 2
    assert tight["memory"]["peak_bytes"] < (int(need[1]) << 20) * 1.1
    assert target.snapshot().without_directory_times() == before


@pytest.mark.parametrize("size", ["", "0", "x", "5T", "-1", "1.5G", "K", "٣"])
def test_sizes_that_are_none(size: str) -> None:
    done = run("restore", "--memory-limit", size)
    assert done.status == 2
    assert "is no size" in done.err


def test_sizes_with_units(images: Path, target: Live) -> None:
    for size in ("1", "1k", "1K", "1M"):
        done = run("restore", "-D", images, "-t", target.pid, "--discard", "--memory-limit", size)
        assert (done.status, "this run needs" in done.err) == (2, True), done
