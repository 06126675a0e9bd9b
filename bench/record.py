"""The document of a run: machine, answers, samples; saved after each answer, and taken up again.

One answer a line, so that two runs can be compared line by line. A file is written anew and put
in the place of the old one, so whatever interrupts a run leaves the last whole one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
from pathlib import Path
from typing import Any

import ghostpool
from bench.scene import BenchError

SCHEMA = 1
_SAME = ("kernel", "cpu", "usable_cpus", "python", "packages", "sources")
"""Facts that all answers of one document have in common."""


def new(*, quick: bool, rounds: int, scratch: Path) -> dict[str, Any]:
    """A document without answers."""
    return {
        "schema": SCHEMA,
        "quick": quick,
        "rounds": rounds,
        "machine": machine(scratch),
        "answers": [],
    }


def machine(scratch: Path) -> dict[str, Any]:
    """What the figures of a run depend on."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        models = {line.partition(":")[2].strip() for line in file if line.startswith("model name")}
    versions = {name: importlib.metadata.version(name) for name in ("ghostpool", "trio", "anyio")}
    with open("/proc/sys/fs/mount-max", encoding="ascii") as mount_max:
        mounts = int(mount_max.read())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    return {
        "kernel": platform.release().partition("-")[0],
        "cpu": ", ".join(sorted(models)) or platform.machine(),
        "usable_cpus": len(os.sched_getaffinity(0)),
        "memory": f"{memory:,} MiB",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": versions,
        "sources": sources(),
        "file_system": f"{_file_system(scratch)}, of the images and of every mount with ghosts",
        "load_average": load(),
        "open_files_limit": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        "mounts_per_namespace_limit": mounts,
    }


def sources() -> str:
    """A sum over the package that is measured: its numbers are about these sources."""
    home = Path(ghostpool.__file__).parent
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(home.rglob("*.py"))]
    return hashlib.sha256("".join(sums).encode()).hexdigest()[:12]


def load() -> list[float]:
    """Load averages of 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def _file_system(path: Path) -> str:
    command = ["stat", "--file-system", "--format=%T", str(path)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def save(document: dict[str, Any], file: Path) -> None:
    """Write the document in place of what is there. BenchError: it can not be."""
    head = {name: value for name, value in document.items() if name != "answers"}
    answers = ",\n".join(json.dumps(answer, ensure_ascii=False) for answer in document["answers"])
    begin = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
    text = f'{begin},\n "answers": [\n{answers}\n]}}\n'
    new_file = file.with_name(f".{file.name}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new_file.write_text(text, encoding="utf-8")
        os.replace(new_file, file)
    except OSError as error:
        raise BenchError(f"{file}: {error.strerror}") from error


def read(file: Path) -> dict[str, Any]:
    """A document that was saved. BenchError: it is none."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchError(f"{file}: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise BenchError(f"{file}: not a document of this version's benchmarks")
    return document


def check_same(old: dict[str, Any], new_one: dict[str, Any]) -> None:
    """BenchError unless answers to both can stand in one document."""
    for name in ("quick", "rounds"):
        if old[name] != new_one[name]:
            raise BenchError(f"--resume: {name} was {old[name]} and is {new_one[name]} now")
    for name in _SAME:
        was, now = old["machine"].get(name), new_one["machine"][name]
        if was != now:
            raise BenchError(f"--resume: {name} was {was} and is {now} now: measure all anew")
