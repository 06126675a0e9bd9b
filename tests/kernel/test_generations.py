"""Dumps as older versions of CRIU and a big-endian machine would have written them, restored.

They are the real dumps of the corpus, converted; what the tasks get is compared with truth.json, as
in test_restore_corpus.py.
"""

from __future__ import annotations

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
