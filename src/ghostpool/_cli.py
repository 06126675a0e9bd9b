"""The command line: its commands, exit statuses, and what is printed where."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack, nullcontext
from functools import reduce
from operator import or_
from typing import Any, NoReturn

import click

from ghostpool._cleancommand import clean
from ghostpool._errors import GhostpoolError, PlanError
from ghostpool._imagecommands import extract, inspect
from ghostpool._options import (
    CAPABILITY,
    SIZE,
    begin_reading,
    listen_fds_option,
    make_request,
    target_options,
)
from ghostpool._outcome import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NEEDS_USER,
    EXIT_REFUSED,
    check_report_path,
    exit_status,
    explain,
    finish,
    printable,
    run_story,
    set_up_logging,
    write_report,
)
from ghostpool._signals import note_only, raise_again


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ghostpool")
def cli() -> None:
    """Bring back the ghost files of CRIU checkpoints."""


cli.add_command(clean)
cli.add_command(extract)
cli.add_command(inspect)


@cli.command(context_settings={"ignore_unknown_options": False})
@target_options
@click.option("--keep", is_flag=True, help="Leave the files linked at their old names.")
@click.option(
    "--consume-link-remaps",
    is_flag=True,
    help="Take the hidden names of link remaps away after a success.",
)
@click.option("--discard", is_flag=True, help="Close everything after the verification.")
@click.option(
    "--serve", metavar="PATH", help="Socket to serve the tasks on.  [default: in the run dir]"
)
@click.option(
    "--cap-add",
    type=CAPABILITY,
    multiple=True,
    help="Capability that CMD keeps besides the usual ones of a container.",
)
@listen_fds_option
@click.option("--report", "report_path", metavar="FILE", help="Write a JSON report; - is stdout.")
@click.option("--json", "as_json", is_flag=True, help="Short for --report -.")
@click.option(
    "--events",
    "events_path",
    metavar="FILE",
    help="Write what happens, as it happens, one JSON document a line; - is stdout.",
)
@click.option("--progress", is_flag=True, help="Show a progress bar on stderr.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="Seconds that the whole run may take.",
)
@click.option(
    "--stall-timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="Seconds without a sign of life after which a worker hangs.  [default: 15]",
)
@click.option(
    "--memory-limit",
    type=SIZE,
    help="Let further work wait while all processes of the run take more than this.",
)
@click.argument("cmd", nargs=-1, type=click.UNPROCESSED)
def restore(**options: Any) -> None:
    """Restore ghost files and start CMD for each task, holding the task's descriptors.

    Without -t and --ns the mount namespaces are rebuilt from the images. Without CMD, --keep and
    --discard the tasks are brought up by consumers on a socket, as ghostpool fetch is one.
    """
    from ghostpool._launch import launch

    cmd = list(options["cmd"])
    report_path = "-" if options["as_json"] else options["report_path"]
    outcomes = {
        "a command": bool(cmd),
        "--keep": options["keep"],
        "--discard": options["discard"],
        "--serve": options["serve"] is not None,
    }
    chosen = [name for name, given in outcomes.items() if given]
    if len(chosen) > 1:
        raise click.UsageError(f"{' and '.join(chosen)} exclude each other")
    if options["cap_add"] and not cmd:
        raise click.UsageError("--cap-add is for a command")
    if options["listen_fds"] and not cmd:
        raise click.UsageError("--listen-fds is for a command")
    if report_path == "-" and cmd:
        raise click.UsageError("stdout belongs to the command: write the report to a file")
    if options["as_json"] and options["report_path"] not in (None, "-"):
        raise click.UsageError("--json and --report FILE exclude each other")
    events_path = options["events_path"]
    if events_path == "-" and cmd:
        raise click.UsageError("stdout belongs to the command: write the events to a file")
    if events_path is not None and events_path == report_path:
        raise click.UsageError("report and events can not go to the same file")

    # Out of the way before anything is started that could inherit them.
    passed = passed_descriptors()
    if passed and options["serve"] is not None:
        raise click.UsageError(
            "--serve and a socket that is passed by LISTEN_FDS exclude each other"
        )
    # The fork server boots while this process imports its event loop.
    launched = launch()
    reading = begin_reading(options)
    from functools import partial

    from ghostpool import _deliver, _run
    from ghostpool._listener import Listener
    from ghostpool._report import Report

    report = Report(strategy=options["strategy"])
    with ExitStack() as stack:
        try:
            set_up_logging(options["verbose"], options["log_file"])
            check_report_path(report_path)
            request = make_request(options, reading, keep=options["keep"])
            deliver: _run.Delivery = _deliver.discard
            listener = bar = None
            if cmd:
                request = request._replace(consumers="commands")
                capabilities = reduce(or_, options["cap_add"], 0)
                deliver = _deliver.commands(cmd, capabilities, listen_fds=options["listen_fds"])
            elif options["keep"] or options["discard"]:
                request = request._replace(consumers="nobody")
            else:
                request = request._replace(consumers="sockets")
                listener = Listener.inherited(passed) if passed else Listener(options["serve"])
                stack.callback(listener.close)
            followers: list[Any] = []
            if events_path is not None:
                from ghostpool._eventfile import EventFile

                followers.append(stack.enter_context(EventFile(events_path)))
            if options["progress"]:
                from ghostpool._progress import Bar

                followers.append(bar := stack.enter_context(Bar()))
                deliver = bar.before(deliver)
            request = request._replace(events=followers)
        except PlanError as error:
            report.status, report.error = EXIT_REFUSED, error
            finish(report, report_path)

        def announce(line: str) -> None:
            with bar.away() if bar is not None else nullcontext():
                click.echo(line, err="-" in (report_path, events_path))

        if listener is not None:
            story = partial(_run.run_served, request, launched, report, listener, announce)
        else:
            story = partial(_run.run_restore, request, launched, report, deliver)
        run_story(story, report, options["timeout"])
    finish(report, report_path)


def passed_descriptors() -> list[int]:
    """What was passed to this process by LISTEN_FDS, of which nobody after it hears."""
    from ghostpool import _listenfds

    try:
        return _listenfds.take(os.environ)
    except PlanError as error:
        raise click.UsageError(str(error)) from error


@cli.command()
@target_options
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON document.")
@click.option("--keep", is_flag=True, help="Plan for restore --keep.")
def plan(**options: Any) -> None:
    """Show what restore would do, and what it would refuse and why. Changes nothing."""
    from ghostpool._launch import launch

    launched = launch()
    reading = begin_reading(options)
    from ghostpool import _run
    from ghostpool._report import Report, plan_document

    report = Report(strategy=options["strategy"])
    try:
        set_up_logging(options["verbose"], options["log_file"])
        request = make_request(options, reading, keep=options["keep"])
    except PlanError as error:
        report.status, report.error = EXIT_REFUSED, error
        finish(report, None)

    async def story() -> None:
        await _run.run_plan(request, launched, report)

    run_story(story, report, None)
    if report.plan is not None and report.error is None:
        if options["as_json"]:
            click.echo(json.dumps(plan_document(report.plan), indent=2))
        else:
            from ghostpool._show import show_plan

            show_plan(report.plan)
        report.status = EXIT_REFUSED if report.plan.refusals else 0  # skipped: see finish
    elif options["as_json"]:
        write_report(report, "-")
    finish(report, None, quiet=True)


@cli.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option(
    "--forget",
    metavar="RUN",
    help="Drop the journal of a dead run, for what can not or need not be undone.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
@click.option("-v", "verbose", count=True, help="Say more; twice for everything.")
@click.option("-o", "--log-file", metavar="FILE", help="Log to FILE, not to stderr.")
def recover(
    dry_run: bool, forget: str | None, as_json: bool, verbose: int, log_file: str | None
) -> None:
    """Undo what runs that were killed have left: writable mounts, temporary names.

    Every restore does this first. Exit status 3 if something is left that needs you.
    """
    if forget is not None and (dry_run or as_json):
        raise click.UsageError("--forget excludes --dry-run and --json")
    from ghostpool._launch import launch
    from ghostpool._report import SCHEMA, Report
    from ghostpool._rundir import open_run_directory

    report = Report()
    runs: list[Any] = []
    try:
        set_up_logging(verbose, log_file)
        directory = open_run_directory()
        if forget is not None:
            from ghostpool._recover import forget as forget_run

            click.echo(printable(forget_run(directory, forget)))
            os.close(directory)
            return
    except PlanError as error:
        report.status, report.error = EXIT_REFUSED, error
        finish(report, None)
    launched = launch()
    from ghostpool import _run

    async def story() -> None:
        runs.extend(await _run.run_recover(launched, directory, dry_run))

    run_story(story, report, None)
    os.close(directory)
    if as_json:
        document = {"schema": SCHEMA, "runs": [run.document() for run in runs]}
        click.echo(json.dumps(document, indent=2))
    else:
        for run in runs:
            state = f"would be {run.state}" if dry_run and run.state != "alive" else run.state
            lines = [f"run {run.token}: {state}", *run.done]
            lines += [f"not undone: {line}" for line in run.refused]
            for line in lines:
                click.echo(printable(line))
        if not runs:
            click.echo("nothing to recover")
    if report.error is None and any(run.refused for run in runs):
        report.status = EXIT_NEEDS_USER
        click.echo(
            "ghostpool: mend what was not undone and run this again, or drop a run's journal "
            "with --forget",
            err=True,
        )
    finish(report, None)


@cli.command()
@click.option("--socket", "path", required=True, metavar="PATH", help="Socket of the server.")
@click.option(
    "--task",
    type=click.IntRange(min=1),
    required=True,
    metavar="PID",
    help="Pid of the task in the images.",
)
@listen_fds_option
@click.argument("cmd", nargs=-1, required=True, type=click.UNPROCESSED)
def fetch(path: str, task: int, listen_fds: bool, cmd: tuple[str, ...]) -> None:
    """Take one task's descriptors from a serving restore and run CMD with them, here."""
    from ghostpool._fetch import fetch as fetch_task

    raise_again()
    passed_descriptors()
    try:
        fetch_task(path, task, list(cmd), listen_fds=listen_fds)
    except GhostpoolError as error:
        click.echo(f"ghostpool: {explain(error)}", err=True)
        sys.exit(exit_status(error))


@cli.command()
@click.option(
    "--unpack",
    metavar="DIR",
    help="Only make DIR and write the dump there, its images into DIR/images.",
)
def demo(unpack: str | None) -> None:
    """Restore a real dump in private namespaces and prove that it came out right."""
    from ghostpool._demo import JOBS, Demo, enter_user_namespace, may_mount, unpack_dump

    if unpack is not None:
        try:
            os.mkdir(unpack)
            unpack_dump(unpack)
        except OSError as error:
            click.echo(f"ghostpool: {unpack}: {error.strerror}", err=True)
            sys.exit(EXIT_REFUSED)
        return
    privileged = may_mount()
    if not privileged:
        try:
            enter_user_namespace()
        except OSError as error:
            click.echo(
                f"ghostpool: this user may not make a user namespace ({error.strerror}): "
                "run the demo as root",
                err=True,
            )
            sys.exit(EXIT_REFUSED)
    from rich.console import Console

    from ghostpool import _run
    from ghostpool._launch import launch
    from ghostpool._planned import Policy
    from ghostpool._report import Report

    report = Report()
    with Demo(Console(highlight=False), compare_owner=privileged) as show:
        policy = Policy(own_owner=not privileged)
        request = _run.Request(
            images_dir=show.images,
            jobs=JOBS,
            policy=policy,
            run_dir=show.run_dir,
            events=(show.bar,),
        )
        launched = launch()

        async def story() -> None:
            await _run.run_restore(request, launched, report, show.deliver)

        run_story(story, report, None)
        if report.error is None:
            show.conclude()
    finish(report, None)


def main() -> NoReturn:
    """Run the command, and end with its status."""
    note_only()
    status = exit_status_of_cli()
    flush_spans()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            status = status or EXIT_FAILED
    # Not sys.exit: a Ctrl-C during the interpreter's end would make Python end by that signal.
    os._exit(status)


def flush_spans() -> None:
    """What traces this process would do so when the interpreter ends, which it does not."""
    if "ghostpool._tracing" in sys.modules:
        from ghostpool import _tracing

        _tracing.flush()


def exit_status_of_cli() -> int:
    """Run the command line; its exit status."""
    try:
        status = cli(prog_name="ghostpool", standalone_mode=False)
    except click.ClickException as error:
        # One line, as every other refusal.
        click.echo(f"ghostpool: {' '.join(error.format_message().split())}", err=True)
        return EXIT_REFUSED
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except SystemExit as end:
        status = end.code
    return status if isinstance(status, int) else 0
