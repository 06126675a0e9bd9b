"""`python -m bench`: measure, print Markdown, and write samples and docs/performance.md if asked.

    python -m bench --quick                           does everything run? in minutes
    python -m bench --only slope --json FILE          one question; --resume FILE goes on later
    python -m bench --write docs/performance.md       everything, then the page
    python -m bench --page FILE --write PAGE          the page from what --json has written

As root, on a quiet machine. What is answered is saved at once: an interruption loses one question.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench import (
    big,
    filesystems,
    guard,
    leased,
    loop,
    many,
    memory,
    mounts,
    page,
    profile,
    record,
    slope,
    start,
    sweeps,
    writable,
)
from bench.measure import Answer, Setting
from bench.scene import BenchError, in_private_namespace

PAGE = Path("docs/performance.md")

QUESTIONS: Mapping[str, Callable[[Setting], Answer]] = {
    "start": start.measure,
    "slope": slope.measure,
    "many": many.measure,
    "leased": leased.measure,
    "mounts": mounts.measure,
    "big": big.measure,
    "filesystems": filesystems.measure,
    "guard": guard.measure,
    "memory": memory.measure,
    "writable": writable.measure,
    "loop": loop.measure,
    "profile": profile.measure,
    **{f"sweep-{one.name}": partial(sweeps.measure, one) for one in sweeps.SWEEPS},
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer rounds")
    parser.add_argument(
        "--only", action="append", choices=QUESTIONS, help="ask this question (repeatable)"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="samples of each rival")
    parser.add_argument(
        "--ghosts", nargs=2, type=int, metavar=("FEW", "MANY"), help="the two counts of slope"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="facts, answers and raw samples, after each answer",
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="go on with FILE (and --json there): what is answered in it is asked again only by "
        "--only",
    )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="the page, with its pictures")
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help=f"measure nothing: PAGE ({PAGE}) from this FILE"
    )
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="its table of the first targets, beside PAGE"
    )
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds: at least 1")
    if options.ghosts and not 0 < options.ghosts[0] < options.ghosts[1]:
        parser.error("--ghosts: FEW is at least 1 and smaller than MANY")
    if options.page is not None and (options.only or options.resume or options.json):
        parser.error("--page measures nothing: it goes with --write and --readme alone")
    if options.readme is not None and not (options.page or options.write):
        parser.error("--readme goes with --write, or with --page")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask the questions, or take what was answered; exit status."""
    options = parse(arguments)
    try:
        if options.page is not None:
            _write(options, record.read(options.page))
            return 0
        if os.geteuid() != 0:
            print("bench: needs root, for mount namespaces", file=sys.stderr)
            return 2
        # Modules that each command compiles anew would be the compiler's time.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        file = options.json or options.resume
        if file is None and options.write is not None:
            file = options.write.with_suffix("") / "samples.json"
        status = in_private_namespace(lambda scratch: _ask(options, scratch, file))
        if status == 0 and options.write is not None:
            _write(options, record.read(file))
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return status


def _write(options: argparse.Namespace, document: dict[str, Any]) -> None:
    page.write(document, options.write or PAGE)
    if options.readme is not None:
        page.put_summary(document, options.readme)


def _ask(options: argparse.Namespace, scratch: Path, file: Path | None) -> None:
    """Ask what is to be asked. BenchError: something has no answer."""
    rounds = options.rounds or (5 if options.quick else 11)
    ghosts = tuple(options.ghosts) if options.ghosts else None
    document = record.new(quick=options.quick, rounds=rounds, scratch=scratch)
    if options.resume is not None and options.resume.exists():
        document = _resumed(record.read(options.resume), document)
    print(page.describe(document["machine"]), flush=True)
    answers: dict[str, dict[str, Any]] = {one["name"]: one for one in document["answers"]}
    wanted = options.only or [name for name in QUESTIONS if name not in answers]
    setting = Setting(scratch, rounds, options.quick, ghosts)
    unanswered: list[str] = []
    begun = time.monotonic()
    for number, name in enumerate(wanted):
        print(f"bench: {name}, {number + 1} of {len(wanted)}", file=sys.stderr, flush=True)
        answer = _answer(name, setting)
        if answer is None:
            unanswered.append(name)
            continue
        print(answer.markdown(), flush=True)
        answers[name] = answer.document()
        document["answers"] = [answers[one] for one in QUESTIONS if one in answers]
        document["machine"]["load_average_after"] = record.load()
        if file is not None:
            record.save(document, file)
    elapsed, after = time.monotonic() - begun, os.getloadavg()[0]
    print(f"{rounds} rounds in {elapsed:,.1f} s; load average after them: {after:.2f}")
    if unanswered:
        raise BenchError(f"no answer to {', '.join(unanswered)}")


def _resumed(old: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    record.check_same(old, now)
    return old


def _answer(name: str, setting: Setting) -> Answer | None:
    """None: that failed, and why has been said; the next question may have an answer still."""
    before, begun = os.getloadavg()[0], time.monotonic()
    try:
        answer = QUESTIONS[name](setting)
    except BenchError as error:
        print(f"bench: {name}: {error}", file=sys.stderr, flush=True)
        return None
    except Exception:  # noqa: BLE001  hours of other questions do not depend on this one
        traceback.print_exc()
        return None
    answer.load = (before, os.getloadavg()[0])
    answer.elapsed_s = round(time.monotonic() - begun, 1)
    return answer


if __name__ == "__main__":
    sys.exit(main())
