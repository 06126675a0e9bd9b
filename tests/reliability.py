"""Make docs/reliability.md: the promise, its limits, and numbers that were measured just now.

    python -m tests.reliability [--quick] [--results DIR] --write docs/reliability.md
    python -m tests.reliability --results DIR --only fuzz

Every part is a command of its own, and its output is shown as it was. A part that does not exist,
that fails or that finds anything wrong ends this with no report written. As root.

It takes an hour or two, so parts may be run one by one: what lies in DIR is taken, as long as the
package's sources are the very ones that it was made with.
"""

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
TEMPLATE = TESTS / "reliability.md"


class Part(NamedTuple):
    """One kind of evidence."""

    title: str
    says: str
    """What its numbers mean."""
    module: str
    arguments: tuple[str, ...]
    quick: tuple[str, ...]
    """Instead of `arguments`, to see whether the report can be made."""
    output: str = "--json"
    """The option for the file with its results."""
    markdown: bool = False
    """Its output is Markdown itself."""
    about: tuple[str, ...] = ("*.py",)
    """The sources that its numbers are about."""

    @property
    def name(self) -> str:
        """In file names, and for --only."""
        return self.module.removeprefix("tests.")


_READERS = (
    "_image*.py",
    "_ghostfile.py",
    "_filetable.py",
    "_remaps.py",
    "_limits.py",
    "_schema.py",
    "_model.py",
    "_errors.py",
    "_linux.py",
    "_paths.py",
)

PARTS = (
    Part(
        "Step matrix",
        "Every step of a restore (a system call of a worker in one of its requests, a call of the "
        "coordinator to a child) under every fault. The list of steps comes from the source. After "
        "each run no mount differs, no name, process or descriptor is left: at once, or after "
        "`ghostpool recover` where everything was killed. A number is how many runs were green; "
        "a dot says that the fault can not come about there.",
        "tests.matrix",
        (),
        ("--every", "40"),
        markdown=True,
    ),
    Part(
        "Random soak",
        "Restores of random plans under random kills, on both event loops.",
        "tests.soak",
        ("--restores", "1000", "--seed", "1"),
        ("--restores", "20", "--seed", "1"),
    ),
    Part(
        "Fuzz",
        "Mutated images, and hostile answers of the process that reads them: no exception but an "
        "ImageError, at most 256 MiB more of memory, at most a second for each.",
        "tests.fuzz",
        ("--executions", "5000000", "--workers", "2"),
        ("--executions", "20000", "--workers", "2"),
        about=_READERS,
    ),
    Part(
        "Attackers",
        "Processes of the container against repeated restores.",
        "tests.attackers",
        ("--seconds", "60"),
        ("--seconds", "2"),
    ),
    Part(
        "Load",
        "Many namespaces, many ghosts, few descriptors.",
        "tests.load",
        (),
        (),
    ),
    Part(
        "Journal cut short",
        "A journal cut at every byte: what is read is what was whole, so never a wrong undo.",
        "pytest",
        ("-q", "-m", "", "-k", "cut_at_every_byte or truncated_at", "tests"),
        ("-q", "-m", "", "-k", "cut_at_every_byte or truncated_at", "tests"),
        output="--junitxml",
    ),
    Part(
        "The guardian",
        "What being told of every change costs, and how soon after the SIGKILL of a coordinator "
        "its guardian has undone what it owed.",
        "bench",
        ("--only", "guard", "--rounds", "7"),
        ("--only", "guard", "--rounds", "1", "--quick"),
        markdown=True,
    ),
)


class Missing(Exception):
    """A part that is not there, or is not green: there can be no report."""


def exists(module: str) -> bool:
    """Whether `python -m module` would find something to run."""
    if importlib.util.find_spec(module) is None:
        return False
    spec = importlib.util.find_spec(module)
    return (spec is not None and spec.origin is not None and "__init__" not in spec.origin) or (
        importlib.util.find_spec(f"{module}.__main__") is not None
    )


def sources(part: Part) -> str:
    """A sum over the sources that a part is about: its numbers are worth something for these."""
    home = TESTS.parent / "src" / "ghostpool"
    paths = sorted({path for pattern in part.about for path in home.glob(pattern)})
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() + path.name for path in paths]
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def section_of(part: Part, quick: bool, results: Path) -> str:
    """The section of one part: that which is there, if it is about these sources, or a new one."""
    kept = results / f"{part.name}.section"
    about = f"{sources(part)} {quick}\n"
    if kept.exists() and (text := kept.read_text(encoding="utf-8")).startswith(about):
        return text.removeprefix(about)
    section = run_part(part, quick, results)
    kept.write_text(about + section, encoding="utf-8")
    return section


def run_part(part: Part, quick: bool, results: Path) -> str:
    """Run one part; its section. Missing unless it is green."""
    file = results / f"{part.name}{_suffix(part)}"
    arguments = part.quick if quick else part.arguments
    command = [sys.executable, "-m", part.module, *arguments]
    begun = time.monotonic()
    done = subprocess.run(
        [*command, f"{part.output}={file}"],
        cwd=TESTS.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    elapsed = time.monotonic() - begun
    if done.returncode:
        raise Missing(f"{part.title}: {_shown(part, arguments)}: status {done.returncode}")
    _check_results(part, file)
    text = done.stdout.strip()
    shown = text if part.markdown else f"```text\n{text}\n```"
    return (
        f"### {part.title}\n\n{part.says}\n\n"
        f"`{_shown(part, arguments)}`, {elapsed:,.0f} s:\n\n{shown}\n"
    )


def _suffix(part: Part) -> str:
    return ".json" if part.output == "--json" else ".xml"


def _shown(part: Part, arguments: Sequence[str]) -> str:
    words = [shlex.quote(word) for word in arguments]
    return " ".join(["python", "-m", part.module, *words])


def _check_results(part: Part, file: Path) -> None:
    """A command that wrote nothing, or tested nothing, has shown nothing."""
    if not file.exists():
        raise Missing(f"{part.title}: {part.module} wrote no results")
    if part.output == "--json":
        if not json.loads(file.read_text(encoding="utf-8")):
            raise Missing(f"{part.title}: the results are empty")
        return
    suites = list(ET.parse(file).getroot().iter("testsuite"))
    tests = sum(int(suite.get("tests", 0)) - int(suite.get("skipped", 0)) for suite in suites)
    if not tests:
        raise Missing(f"{part.title}: no test was run")


def machine() -> str:
    """What the numbers depend on, as a Markdown list."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        models = {line.partition(":")[2].strip() for line in file if line.startswith("model name")}
    facts = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "kernel": platform.release(),
        "CPUs": f"{len(os.sched_getaffinity(0))} × {', '.join(sorted(models)) or 'unknown'}",
        "Python": platform.python_version(),
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def missing_parts(parts: Sequence[Part] = PARTS) -> list[str]:
    """Modules that the report needs and that are not there."""
    return [part.module for part in parts if not exists(part.module)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="the report")
    parser.add_argument(
        "--only", choices=[part.name for part in PARTS], help="run this part, into --results"
    )
    parser.add_argument("--quick", action="store_true", help="a few runs of each part")
    parser.add_argument("--results", type=Path, metavar="DIR", help="keep the parts' results there")
    options = parser.parse_args(arguments)
    if options.only is None and options.write is None:
        parser.error("--write FILE, or --only PART with --results DIR")
    if options.only is not None and options.results is None:
        parser.error("--only needs --results DIR")
    lacking = missing_parts()
    if lacking:
        print(f"there can be no report: {', '.join(lacking)} missing", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        results = options.results or Path(temporary)
        results.mkdir(parents=True, exist_ok=True)
        sections = []
        for part in PARTS:
            if options.only not in (None, part.name):
                continue
            print(f"{part.title} …", file=sys.stderr, flush=True)
            try:
                sections.append(section_of(part, options.quick, results))
            except Missing as error:
                print(f"there can be no report: {error}", file=sys.stderr)
                return 1
    if options.write is None or options.only is not None:
        return 0
    text = TEMPLATE.read_text(encoding="utf-8")
    text = text.replace("{machine}", machine()).replace("{parts}", "\n".join(sections).strip())
    options.write.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
