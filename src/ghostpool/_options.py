"""Options that say what is restored where, and the request that they make.

What parses their values is imported when there is one: the command starts without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ghostpool._errors import GhostpoolError, PlanError

_T = TypeVar("_T")


class Parsed(click.ParamType[_T]):
    """What `parse` makes of the text; what it raises is said as click says such things."""

    def __init__(self, name: str, parse: Callable[[str], _T]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> _T:
        try:
            return self._parse(value)
        except (ValueError, GhostpoolError) as error:
            self.fail(str(error), param, ctx)


def _namespace(value: str) -> tuple[int, str]:
    from ghostpool._targets import parse_namespace_option

    return parse_namespace_option(value)


def _capability(value: str) -> int:
    from ghostpool._capabilities import parse

    return parse(value)


def _size(value: str | int) -> int:
    from ghostpool._limits import parse_size

    return value if isinstance(value, int) else parse_size(value)


def _external(value: str) -> tuple[str, str]:
    from ghostpool._sandbox import parse_external

    return parse_external(value)


NAMESPACE = Parsed("ID=PID|PATH", _namespace)
CAPABILITY = Parsed("NAME", _capability)
"""NAME, CAP_NAME or ALL, as with container runtimes; the set it stands for."""
SIZE = Parsed("SIZE", _size)
"""Bytes, or a number with a suffix."""
EXTERNAL = Parsed("KEY=PATH", _external)
"""KEY=PATH, or criu's mnt[KEY]:PATH."""


listen_fds_option = click.option(
    "--listen-fds",
    is_flag=True,
    help="Give CMD its descriptors from 3 on, by the LISTEN_FDS convention.",
)


def target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say which images go where; those of criu where criu has them."""
    for decorator in reversed(
        (
            click.option(
                "-D",
                "--images-dir",
                default=".",
                show_default=True,
                metavar="IMAGES",
                help="Directory of the images, or checkpoint archive.",
            ),
            click.option(
                "-t",
                "--tree",
                type=click.IntRange(min=1),
                metavar="PID",
                help="Live process whose mount namespace is that of the images' root task.",
            ),
            click.option(
                "--ns",
                "namespaces",
                type=NAMESPACE,
                multiple=True,
                help="Mount namespace for one of the images, by process or namespace file.",
            ),
            click.option(
                "--pod",
                metavar="FILE",
                help="JSON list of containers to restore in one run: images and target of each.",
            ),
            click.option(
                "--external",
                type=EXTERNAL,
                multiple=True,
                help="What to mount for an external mount, when namespaces are rebuilt.",
            ),
            click.option(
                "--devshm",
                metavar="FILE",
                help="The container's /dev/shm as its checkpoint has it (devshm-checkpoint.tar).",
            ),
            click.option(
                "-j",
                "--jobs",
                type=click.IntRange(min=1, max=1024),
                metavar="N",
                help="Most workers alive at once.  [default: usable CPUs]",
            ),
            click.option(
                "--strategy",
                type=click.Choice(["remount", "detached"]),
                default="remount",
                show_default=True,
                help="Make a task's read-only mount writable, or work on a private clone of it.",
            ),
            click.option(
                "--on-error",
                type=click.Choice(["refuse", "skip"]),
                default="refuse",
                show_default=True,
                help="Refuse all if a file can not be restored, or restore the others.",
            ),
            click.option(
                "--overmounted",
                type=click.Choice(["refuse", "private"]),
                default="refuse",
                show_default=True,
                help="Ghosts on hidden mounts: refuse, or use a private copy of the namespace.",
            ),
            click.option(
                "--allow-devices", is_flag=True, help="Restore character and block devices."
            ),
            click.option("--allow-setuid", is_flag=True, help="Restore setuid and setgid files."),
            click.option(
                "--max-size",
                type=SIZE,
                default="1T",
                show_default=True,
                help="Largest apparent size of a ghost (suffix K, M, G, T or P).",
            ),
            click.option("-v", "verbose", count=True, help="Say more; twice for everything."),
            click.option("-o", "--log-file", metavar="FILE", help="Log to FILE, not to stderr."),
        )
    ):
        command = decorator(command)
    return command


def begin_reading(options: dict[str, Any]) -> Any:
    """Have the images read from now on; the Reading, or the PlanError that the run raises.

    Called before anything heavy is imported: the reader works meanwhile, on another CPU.
    """
    from ghostpool._startreader import start_reading

    if options.get("pod") is not None:
        return None  # what is to be read is not known yet
    rebuilt = options["tree"] is None and not options["namespaces"]
    try:
        return start_reading(
            options["images_dir"],
            options["max_size"],
            all_mounts=rebuilt,
            devshm=options.get("devshm"),
        )
    except PlanError as error:
        return error


def make_request(options: dict[str, Any], reading: Any, keep: bool = False) -> Any:
    """The Request of target options."""
    from ghostpool._request import Options, request_of

    numbers = [number for number, _ in options["namespaces"]]
    if len(set(numbers)) != len(numbers):
        raise PlanError("--ns names a mount namespace of the images twice")
    pod = _pod(options)
    given = Options(
        tree=options["tree"],
        namespaces=dict(options["namespaces"]),
        external=dict(options["external"]),
        jobs=options["jobs"],
        allow_devices=options["allow_devices"],
        allow_setuid=options["allow_setuid"],
        max_size=options["max_size"],
        strategy=options["strategy"],
        on_error=options["on_error"],
        overmounted=options["overmounted"],
        memory_limit=options.get("memory_limit"),
        consume_link_remaps=options.get("consume_link_remaps", False),
        devshm=options.get("devshm"),
    )
    if options.get("stall_timeout"):
        given["stall_s"] = options["stall_timeout"]
    return request_of(options["images_dir"], given, keep=keep)._replace(reading=reading, pod=pod)


def _pod(options: dict[str, Any]) -> Any:
    """The containers of --pod, if it is given."""
    if options.get("pod") is None:
        return ()
    from ghostpool._pod import read_pod

    if options["tree"] is not None or options["namespaces"] or options["external"]:
        raise PlanError("--pod names the targets of its containers: leave out -t, --ns, --external")
    if options.get("devshm"):
        raise PlanError("--devshm is for one container: leave out --pod")
    source = click.get_current_context().get_parameter_source("images_dir")
    if source is not click.core.ParameterSource.DEFAULT:
        raise PlanError("--pod names the images of its containers: leave out -D")
    return read_pod(options["pod"])
