"""`python -m bench`: measure, print Markdown, and write the raw samples where --json says."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import guard, mounts, slope, start
from bench.measure import Answer, Setting
from bench.scene import BenchError, in_private_namespace

QUESTIONS: dict[str, Callable[[Setting], Answer]] = {
    "start": start.measure,
    "slope": slope.measure,
    "mounts": mounts.measure,
    "guard": guard.measure,
}


def machine() -> dict[str, Any]:
    """What the figures of a run depend on."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        models = {line.partition(":")[2].strip() for line in file if line.startswith("model name")}
    versions = {name: importlib.metadata.version(name) for name in ("ghostpool", "trio", "anyio")}
    return {
        "kernel": platform.release(),
        "cpu": ", ".join(sorted(models)) or platform.machine(),
        "usable_cpus": len(os.sched_getaffinity(0)),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": versions,
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "file_system": "tmpfs, of the images and of every mount with ghosts",
        "open_files_limit": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
    }


def describe(facts: dict[str, Any]) -> str:
    """The facts as a Markdown list."""
    shown = facts | {
        "packages": ", ".join(f"{name} {version}" for name, version in facts["packages"].items()),
        "load_average": " ".join(map(str, facts["load_average"])),
    }
    return "".join(f"- {key.replace('_', ' ')}: {value}\n" for key, value in shown.items())


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer rounds")
    parser.add_argument(
        "--only", action="append", choices=QUESTIONS, help="ask this question (repeatable)"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="samples of each rival")
    parser.add_argument(
        "--ghosts", nargs=2, type=int, metavar=("FEW", "MANY"), help="the two counts of slope"
    )
    parser.add_argument("--json", metavar="FILE", help="write facts and raw samples")
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds: at least 1")
    if options.ghosts and not 0 < options.ghosts[0] < options.ghosts[1]:
        parser.error("--ghosts: FEW is at least 1 and smaller than MANY")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the questions; exit status."""
    options = parse(arguments)
    if os.geteuid() != 0:
        print("bench: needs root, for mount namespaces", file=sys.stderr)
        return 2

    def body(scratch: Path) -> None:
        facts = machine()
        print(describe(facts), flush=True)
        rounds = options.rounds or (5 if options.quick else 11)
        ghosts = tuple(options.ghosts) if options.ghosts else None
        setting = Setting(scratch, rounds, options.quick, ghosts)
        answers: list[Answer] = []
        begun = time.monotonic()
        for name in options.only or QUESTIONS:
            answers.append(QUESTIONS[name](setting))
            print(answers[-1].markdown(), flush=True)
        facts["load_average_after"] = [round(value, 2) for value in os.getloadavg()]
        facts["elapsed_s"] = round(time.monotonic() - begun, 1)
        load = " ".join(map(str, facts["load_average_after"]))
        print(f"{rounds} rounds in {facts['elapsed_s']} s; load average after them: {load}")
        if options.json:
            document = {"machine": facts, "answers": [answer.document() for answer in answers]}
            try:
                Path(options.json).write_text(json.dumps(document, indent=1) + "\n")
            except OSError as error:
                raise BenchError(f"--json {options.json}: {error.strerror}") from error

    return in_private_namespace(body)


if __name__ == "__main__":
    sys.exit(main())
