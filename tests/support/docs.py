"""The examples of the documentation, taken out of their pages and run.

An example is a fenced block of Python. It runs as a program of its own, in a directory that the
test prepares (image directories, say). One whose first line is a comment with the name of a file,
`# agent.py`, is that file, so that later ones can import it. A block of `text` right after it is
what it prints; a line of "…" there stands for any lines, and "…" in a line for any characters.

A block of `sh` is what the reader types. One whose first line is a comment that begins with "# in a
second terminal" goes on in the background.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

DOCS = Path(__file__).parents[2] / "docs"
RUN_S = 60
_FENCE = re.compile(
    r"^```(?P<language>python|sh)\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
_FILE = re.compile(r"# ([\w.-]+\.py)\n")
_ANY_LINES = "…\n"


class Example(NamedTuple):
    """One block of Python, or of what is typed."""

    page: str
    line: int
    """Where its code begins in the page."""
    code: str
    output: str | None
    """What the page says that it prints; None: it does not say."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def examples(page: str, language: Literal["python", "sh"] = "python") -> list[Example]:
    """The blocks of a page of docs/, in their order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [
        Example(page, text.count("\n", 0, match.start()) + 2, match["code"], match["output"])
        for match in _FENCE.finditer(text)
        if match["language"] == language
    ]


def run_example(example: Example, directory: Path, replace: Mapping[str, str] | None = None) -> str:
    """Run it in `directory`; what it printed, which is what the page says.

    `replace`: what stands in the page for something that only the test knows, a pid say.
    """
    code = example.code
    for here, there in (replace or {}).items():
        code = code.replace(here, there)
    match = _FILE.match(code)
    file = directory / (match[1] if match else f"example_{example.line}.py")
    # Where it stands in the page, so that a traceback leads there.
    file.write_text("\n" * (example.line - 1) * (match is None) + code, encoding="utf-8")
    command = [sys.executable, "-W", "error", str(file)]
    return _checked(example, command, directory, stderr=subprocess.PIPE)


def write_example(example: Example, directory: Path) -> None:
    """Save it under its name."""
    match = _FILE.match(example.code)
    assert match, f"{example} has no name"
    (directory / match[1]).write_text(example.code, encoding="utf-8")


def type_example(example: Example, directory: Path) -> None:
    """Run what the reader types, in `directory`; it prints, to the terminal, what the page says.

    It is over when nobody has that terminal any more.
    """
    command = ["sh", "-ec", example.code]
    _checked(example, command, directory, stderr=subprocess.STDOUT, env=_environment())


def _checked(example: Example, command: list[str], directory: Path, **options: Any) -> str:
    """What a command prints, which is what the page says; it succeeds."""
    done = subprocess.run(
        command,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=RUN_S,
        check=False,
        **options,
    )
    printed: str = done.stdout
    assert done.returncode == 0, f"{example}: {done.stderr or printed}"
    if example.output is not None:
        assert matches(example.output, printed), f"{example} printed:\n{printed}"
    return printed


@contextmanager
def second_terminal(example: Example, directory: Path) -> Iterator[None]:
    """The block begins when it has printed what the page says, and ends it by Ctrl-C, silently."""
    assert example.output is not None
    with subprocess.Popen(
        ["sh", "-ec", f"exec {example.code.splitlines()[-1]}"],
        cwd=directory,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            said = "".join(process.stdout.readline() for _ in example.output.splitlines())
            assert matches(example.output, said), f"{example} printed:\n{said}"
            yield
        finally:
            process.send_signal(signal.SIGINT)
        said = process.stdout.read()
        assert not said, f"{example} printed at its end:\n{said}"


def _environment() -> dict[str, str]:
    """That of an activated virtual environment, where a warning is an error."""
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONWARNINGS": "error"}


def matches(pattern: str, text: str) -> bool:
    """Whether `text` is what a page says, but for what its "…" stand for."""
    expression = "".join(
        "(?:.*\n)*" if line == _ANY_LINES else re.escape(line).replace("…", ".*")
        for line in pattern.splitlines(keepends=True)
    )
    return re.fullmatch(expression, text) is not None
