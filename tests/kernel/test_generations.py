"""Dumps as older versions of CRIU and a big-endian machine would have written them, restored.

They are the real dumps of the corpus, converted; what the tasks get is compared with truth.json, as
in test_restore_corpus.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ghostpool import _linux
from ghostpool.testing._targets import built
from tests.kernel.test_restore_corpus import (
    ALLOWED,
    check_descriptors,
    check_report,
    finish,
    identify,
    places_of,
    truth_of,
)
from tests.support.corpus import CORPUS, corpus
from tests.support.imagewriter import PROCFS, small
from tests.support.live import live, read_only, run
from tests.support.memory import load
from tests.support.namespaces import mountinfo
from tests.support.older import Version, big_endian, older
from tests.support.restore import fetched, look, serving
from tests.support.truth import specs_from_truth

pytestmark = [pytest.mark.long, pytest.mark.needs_mount_ns]

WHEN: dict[str, Version | None] = {
    "3.5": (3, 5),
    "3.3": (3, 3),
    "1.7": (1, 7),
    "1.3": (1, 3),
    "big-endian": None,
}
TIMES = frozenset(("atime", "mtime"))


def converted(case: str, when: str, directory: Path) -> Path:
    images = load(CORPUS / case / "images")
    version = WHEN[when]
    directory.mkdir()
    for name, data in (big_endian(images) if version is None else older(images, version)).items():
        (directory / name).write_bytes(data)
    return directory


def unknown(when: str) -> frozenset[str]:
    """What images of then do not say."""
    version = WHEN[when]
    return TIMES if version is not None and version < (2, 0) else frozenset()


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("case", ["02-types", "06-nested-mntns"])
def test_into_namespaces_of_the_truth(case: str, when: str, tmp_path: Path) -> None:
    """Tasks get what they had, and mounts that were read-only are so again."""
    truth = truth_of(case)
    images = converted(case, when, tmp_path / "images")
    specs = specs_from_truth(corpus(case)[1])
    report = tmp_path / "report"
    taken = {
        entry["path"]
        for mount in truth.mounts
        for entry in mount.get("contents") or ()
        if entry["kind"] != "dir"
    }
    with built(specs) as fds:
        numbers = {spec.id: fd for spec, fd in zip(specs, fds, strict=True)}
        before = {number: look(fd) for number, fd in numbers.items()}
        places = places_of({number: mountinfo(fd) for number, fd in numbers.items()})
        options: list[object] = [*ALLOWED.get(case, ()), "--report", report]
        for number, fd in numbers.items():
            options += ["--ns", f"{truth.image_namespaces[number]}=/proc/{os.getpid()}/fd/{fd}"]
        with (
            serving("-D", images, "--serve", tmp_path / "socket", *options) as served,
            fetched(served.socket, truth.tasks) as probes,
        ):
            check_descriptors(truth, probes, places, taken, unknown(when))
            document = finish(served, report)
        assert {number: look(fd) for number, fd in numbers.items()} == before
        check_report(truth, document, places, os.cpu_count() or 1)


@pytest.mark.parametrize("when", ["1.7", "big-endian"])
def test_into_rebuilt_namespaces(when: str, tmp_path: Path) -> None:
    """Flags that mounts and superblocks had together make the same mounts."""
    truth = truth_of("10-ro-bind-shared")
    images = converted("10-ro-bind-shared", when, tmp_path / "images")
    fds: list[int] = []
    try:
        with serving("-D", images, "--serve", tmp_path / "socket") as served:
            fds += served.namespaces()
            numbers = identify(truth, fds)
            places = places_of({number: mountinfo(fd) for number, fd in numbers.items()})
            with fetched(served.socket, truth.tasks) as probes:
                check_descriptors(truth, probes, places, set(), unknown(when))
    finally:
        _linux.close_all(fds)


def test_file_of_a_dead_process(tmp_path: Path) -> None:
    """It is named, with the process, wherever a plan or a report is; the rest is restored."""
    made = small()
    made.open(1, 5, "/proc/77/status", mode=0o100444)
    made.remap(made.open(1, 6, "/proc/78/task/78/stat"), 78, PROCFS)
    other = made.open(1, 7, "/proc/77/cmdline")
    made.remap(other, 77, PROCFS)
    made.fd(1, 8, other)
    images = made.write(tmp_path / "images")
    listed = [
        {"pid": pid, "path": path, "descriptors": [{"task": 1, "fd": fd} for fd in numbers]}
        for pid, path, numbers in (
            (78, "/proc/78/task/78/stat", [6]),
            (77, "/proc/77/cmdline", [7, 8]),
        )
    ]
    with live([read_only(2, b"/data")]) as (target,):
        before = target.snapshot()
        plan = run("plan", "-D", images, "-t", target.pid, "--json")
        options = ("-D", images, "-t", target.pid, "--report", tmp_path / "report")
        with (
            serving(*options, "--serve", tmp_path / "socket") as served,
            fetched(served.socket, [1]) as probes,
        ):
            assert set(probes[1].descriptors) == {0, 1, 2, 3}
            finish(served, tmp_path / "report")
        done = run("restore", "--discard", *options)
        assert done.status == 0
        after = target.snapshot()
    assert after.without_directory_times() == before.without_directory_times()
    for pid, path in (78, "/proc/78/task/78/stat"), (77, "/proc/77/cmdline"):
        (line,) = (line for line in done.err.splitlines() if path in line)
        assert f"process {pid}" in line
    for text in (plan.out, (tmp_path / "report").read_text()):
        document = json.loads(text)
        files = [file.pop("file") for file in document["of_dead_processes"]]
        assert len(set(files)) == 2
        assert document["of_dead_processes"] == listed
        assert len(document["warnings"]) == 2
        assert document["refusals"] == []
