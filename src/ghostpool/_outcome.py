"""How a command runs and ends: its story, exit status and report, and what is said of errors."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

import click

from ghostpool._errors import PlanError, RestoreError, RevertError, leaves

EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_NEEDS_USER = 3
EXIT_SKIPPED = 4
EXIT_INTERRUPTED = 130

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)
log = logging.getLogger("ghostpool")


def set_up_logging(verbose: int, log_file: str | None) -> None:
    """Messages of the run: warnings, and more with -v."""
    stream: logging.Handler = logging.StreamHandler()
    if log_file is not None:
        try:
            stream = logging.FileHandler(log_file)
        except OSError as error:
            raise PlanError(f"{log_file}: {error.strerror}") from error
    stream.setFormatter(_Formatter("ghostpool: %(message)s"))
    root = logging.getLogger("ghostpool")
    root.handlers[:] = [stream]
    root.setLevel(_LEVELS[min(verbose, 2)])


def exit_status(error: BaseException) -> int:
    """What the state that an error leaves the host in is as an exit status."""
    found = list(leaves(error))
    if any(isinstance(leaf, RevertError) for leaf in found):
        return EXIT_NEEDS_USER
    if all(isinstance(leaf, PlanError) for leaf in found):
        return EXIT_REFUSED
    return EXIT_FAILED


def explain(error: BaseException) -> str:
    """An error on one line."""
    found = (" ".join(str(leaf).split()) or type(leaf).__name__ for leaf in leaves(error))
    return printable("; ".join(found))


def printable(line: str) -> str:
    """Without what a terminal would act on: names in images are anybody's."""
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def run_story(
    story: Callable[[], Coroutine[Any, Any, None]], report: Any, timeout: float | None
) -> None:
    """Run the coroutine on trio, until it ends or a signal or the timeout ends it.

    The error, if any, goes into the report, with its exit status.
    """
    import anyio

    from ghostpool._signals import Interrupted, TimedOut, signals_kept, until_interrupted

    try:
        with signals_kept() as kept:
            anyio.run(until_interrupted, story, timeout, kept, backend="trio")
    except (Interrupted, KeyboardInterrupt):
        report.status = EXIT_INTERRUPTED
        report.error = RestoreError(f"interrupted; {_after(report)}")
        report.restored = report.kept
    except TimedOut:
        report.status = EXIT_FAILED
        waiting = f"{report.missing}; " if report.missing else ""
        report.error = RestoreError(f"not done within {timeout:g} s; {waiting}{_after(report)}")
    except Exception as error:
        report.status = exit_status(error)
        report.error = error
        log.debug("failed", exc_info=error)


def _after(report: Any) -> str:
    return "all files were restored and are kept" if report.kept else "everything was undone"


def check_report_path(path: str | None) -> None:
    """Refuse a report that could not be written now, rather than after the restore."""
    if path is None or path == "-":
        return
    try:
        with open(path, "w", encoding="utf-8"):
            pass
    except OSError as error:
        raise PlanError(f"--report {path}: {error.strerror}") from error


def write_report(report: Any, path: str | None) -> None:
    """The JSON document to a file, or to stdout for "-"."""
    if path is None:
        return
    text = json.dumps(report.document(), indent=2) + "\n"
    if path == "-":
        click.echo(text, nl=False)
        return
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        report.status = report.status or EXIT_FAILED
        click.echo(f"ghostpool: {path}: {error.strerror}", err=True)


def finish(report: Any, path: str | None, *, quiet: bool = False) -> NoReturn:
    """Write the report, say what went wrong on one line, and exit.

    `quiet` leaves out the plan's warnings, for who has shown them already.
    """
    if report.error is None and report.commands:
        report.status = max(status for _, status in report.commands)
    skipped = report.plan.skipped if report.plan is not None and report.error is None else []
    if skipped:
        report.status = report.status or EXIT_SKIPPED
    write_report(report, path)
    warnings = report.plan.warnings if report.plan is not None and not quiet else []
    # A refusal is one line: what would not have been perfect either is for -v.
    level = logging.INFO if report.status == EXIT_REFUSED else logging.WARNING
    for line in [*warnings, *report.left]:
        log.log(level, "%s", line)
    for refusal in () if quiet else skipped:
        log.warning("skipped: %s", refusal)
    if report.error is not None:
        click.echo(f"ghostpool: {explain(report.error)}", err=True)
    sys.exit(report.status)
