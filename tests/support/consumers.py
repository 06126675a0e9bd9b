"""Programs that are consumers of the task socket: ghostpool's own, and the examples of the docs."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from tests.support.restore import COMMAND

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
NAMES = ("fetch", "fetch.c", "fetch.py")
STRICT = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror")


@cache
def compiled(where: str) -> str:
    """The example in C, as a program below `where`; a warning is an error."""
    program = str(Path(mkdtemp(dir=where)) / "fetch")
    subprocess.run(["cc", *STRICT, "-o", program, str(EXAMPLES / "fetch.c")], check=True)
    return program


def command_line(name: str, where: Path, socket: str, task: int, *command: object) -> list[str]:
    """The consumer `name`, which becomes `command`. `where`: a directory for what is compiled."""
    words = [str(word) for word in command]
    if name == "fetch":
        return [*COMMAND, "fetch", "--socket", socket, "--task", str(task), "--", *words]
    program = {
        "fetch.c": lambda: [compiled(str(where))],
        "fetch.py": lambda: [sys.executable, "-I", str(EXAMPLES / "fetch.py")],
    }[name]()
    return [*program, socket, str(task), *words]
