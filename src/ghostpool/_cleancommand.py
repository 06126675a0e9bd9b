"""`ghostpool clean`: what failed restores have left in a mount namespace, listed or removed."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

import click

from ghostpool._errors import PlanError
from ghostpool._outcome import (
    EXIT_FAILED,
    EXIT_REFUSED,
    finish,
    printable,
    run_story,
    set_up_logging,
)

log = logging.getLogger("ghostpool")


@click.command()
@click.option(
    "-t",
    "--tree",
    type=click.IntRange(min=1),
    metavar="PID",
    help="Process in the mount namespace.",
)
@click.option("--ns", "namespace", metavar="PID|PATH", help="Mount namespace, or a process in it.")
@click.option(
    "--mount",
    "mounts",
    multiple=True,
    metavar="PATH",
    help="Look through the mount on PATH only; repeatable.  [default: all but kernel file systems]",
)
@click.option("--yes", is_flag=True, help="Remove what was found.")
@click.option("--link-remaps", is_flag=True, help="Remove link_remap.N too, which images may need.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
@click.option("-v", "verbose", count=True, help="Say more; twice for everything.")
@click.option("-o", "--log-file", metavar="FILE", help="Log to FILE, not to stderr.")
def clean(**options: Any) -> None:
    """List what failed restores of ghostpool or CRIU left in a mount namespace.

    With --yes it is removed, but for what a living restore owns. Exit status 1 if something that
    should have been removed is still there.
    """
    if (options["tree"] is None) == (options["namespace"] is None):
        raise click.UsageError("name the mount namespace by one of -t and --ns")
    from ghostpool._launch import launch

    launched = launch()
    from ghostpool._clean import Cleaning
    from ghostpool._clean import clean as clean_namespace
    from ghostpool._report import Report
    from ghostpool._rundir import open_run_directory

    report, cleaning = Report(), Cleaning()
    try:
        set_up_logging(options["verbose"], options["log_file"])
        directory = open_run_directory()
    except PlanError as error:
        report.status, report.error = EXIT_REFUSED, error
        finish(report, None)

    async def story() -> None:
        await clean_namespace(
            launched,
            directory,
            options["namespace"] or str(options["tree"]),
            options["mounts"],
            cleaning,
            remove=options["yes"],
            link_remaps=options["link_remaps"],
        )

    run_story(story, report, None)
    os.close(directory)
    if options["as_json"] and (report.error is None or cleaning.leftovers):
        click.echo(json.dumps(cleaning.document(), indent=2))
    elif report.error is None or cleaning.leftovers:
        for leftover in cleaning.leftovers:
            click.echo(printable(str(leftover)))
        click.echo(_summary(cleaning.leftovers, removed=options["yes"]))
    for where, reason in cleaning.skipped:
        log.warning("not looked through: %s: %s", where, reason)
    if report.error is None and cleaning.failed:
        report.status = EXIT_FAILED
        click.echo("ghostpool: not everything could be removed", err=True)
        sys.exit(report.status)
    finish(report, None)


def _summary(leftovers: list[Any], *, removed: bool) -> str:
    if not leftovers:
        return "nothing is left"
    counts = [leftover.state for leftover in leftovers]
    found = counts.count("removed" if removed else "found")
    what = f"{found} removed" if removed else f"--yes would remove {found}"
    return f"{len(counts)} found, {what}"


__all__ = ["clean"]
