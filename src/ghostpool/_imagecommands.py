"""The commands that need images alone: what is in them, for whoever may read them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import click

from ghostpool._errors import GhostpoolError
from ghostpool._options import SIZE
from ghostpool._outcome import EXIT_INTERRUPTED, exit_status, explain
from ghostpool._paths import text


def image_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which images, and how much they may ask for."""
    for decorator in reversed(
        (
            click.argument("images", required=False, metavar="[IMAGES]"),
            click.option(
                "-D",
                "--images-dir",
                metavar="IMAGES",
                help="The same as an option.  [default: .]",
            ),
            click.option(
                "--max-size",
                type=SIZE,
                default="1T",
                show_default=True,
                help="Largest apparent size of a ghost (suffix K, M, G, T or P).",
            ),
        )
    ):
        command = decorator(command)
    return command


def images_path(options: dict[str, Any]) -> str:
    """What the argument or the option names."""
    if options["images"] is not None and options["images_dir"] is not None:
        raise click.UsageError("IMAGES and -D exclude each other")
    path: str = options["images"] or options["images_dir"] or "."
    return path


def outcome_of(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run the coroutine function; what it raises ends the command, said on one line."""
    import anyio

    from ghostpool._signals import Interrupted, signals_kept, until_interrupted

    try:
        with signals_kept() as kept:
            anyio.run(until_interrupted, story, None, kept, backend="trio")
    except (Interrupted, KeyboardInterrupt):
        click.echo("ghostpool: interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except GhostpoolError as error:
        click.echo(f"ghostpool: {explain(error)}", err=True)
        sys.exit(exit_status(error))


@click.command()
@image_options
@click.option("--tree", is_flag=True, help="Show the tasks as a tree, each with what it holds.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def inspect(**options: Any) -> None:
    """Show what images hold: tasks, ghost files and who holds them, link remaps.

    IMAGES is their directory, or a checkpoint archive. Needs no privilege besides reading them.
    """
    if options["tree"] and options["as_json"]:
        raise click.UsageError("--tree and --json exclude each other")
    from ghostpool._inspection import inspection
    from ghostpool._openimages import read_images

    path = images_path(options)
    document: dict[str, Any] = {}

    async def story() -> None:
        document.update(inspection(await read_images(path, max_size=options["max_size"])))

    outcome_of(story)
    if options["as_json"]:
        click.echo(json.dumps(document, indent=2))
        return
    from ghostpool._showimages import show_images, tree_lines

    if options["tree"]:
        for line in tree_lines(document):
            click.echo(line)
    else:
        show_images(document)


@click.command()
@image_options
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="DIR",
    help="Directory for the files: a new one, or an empty one.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="ID|GLOB",
    help="Only the ghost of this number, or those with such an old path; repeatable.",
)
def extract(**options: Any) -> None:
    """Write the contents of ghost files into DIR, with their holes, and a manifest.

    IMAGES is the directory of the images, or a checkpoint archive. What is no regular file is in
    the manifest only. Needs no privilege besides reading the images.
    """
    from ghostpool._extract import MANIFEST
    from ghostpool._extract import extract as extract_ghosts

    path, output = images_path(options), options["output"]

    async def story() -> None:
        done = await extract_ghosts(path, output, options["only"], max_size=options["max_size"])
        others = f"; {done.others} without content in {MANIFEST} only" if done.others else ""
        files = "1 file" if done.files == 1 else f"{done.files} files"
        where = text(os.fsencode(output))
        click.echo(f"{files}, {done.content:,} bytes of content, in {where}{others}")

    outcome_of(story)


__all__ = ["extract", "inspect"]
