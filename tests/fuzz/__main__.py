"""`python -m tests.fuzz --executions N --seed S`: mutated images, as many as asked for."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.run import Outcome, run_piece

PIECE = 100_000
"""Executions of one mutator, with a seed of its own."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--executions", type=int, default=100_000, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="S")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--crashes", metavar="DIR", help="write inputs that break a rule there")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    return parser.parse_args(arguments)


def report(outcome: Outcome) -> str:
    """The figures for people."""
    grown = (outcome.peak_rss - outcome.base_rss) / (1 << 20)
    lines = [
        f"{outcome.executions:,} executions in {outcome.elapsed_s:,.0f} s",
        f"{outcome.cpu_s:,.0f} s of processor time",
        f"{outcome.read:,} gave images",
        f"{len(outcome.errors):,} distinct refusals of the others",
        f"{len(outcome.crashes):,} that broke a rule",
        f"peak memory {outcome.peak_rss / (1 << 20):,.0f} MiB, {grown:,.0f} MiB above the start",
        f"slowest input {outcome.slowest_s * 1000:,.0f} ms of processor time ({outcome.slowest})",
        "",
        "| changed | executions |",
        "|---|---|",
        *(f"| {kind or 'nothing'} | {n:,} |" for kind, n in sorted(outcome.kinds.items())),
    ]
    return "\n".join([*lines, *(f"crash {crash}" for crash in outcome.crashes)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; exit status 1 if an input broke a rule."""
    options = parse(arguments)
    jobs = [
        (min(PIECE, options.executions - begun), options.seed + begun, options.crashes)
        for begun in range(0, options.executions, PIECE)
    ]
    outcome = Outcome()
    # A process for each piece: what one has grown to says nothing of the next one.
    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
        begun = time.monotonic()
        for part in pool.imap_unordered(run_piece, jobs):
            outcome.add(part)
            outcome.elapsed_s = time.monotonic() - begun
            done = f"{outcome.executions:,} of {options.executions:,}, {len(outcome.crashes)} broke"
            print(f"{done} a rule, {outcome.elapsed_s:,.0f} s", file=sys.stderr, flush=True)
    print(report(outcome))
    if options.json:
        Path(options.json).write_text(json.dumps(vars(outcome), indent=1) + "\n")
    return 1 if outcome.crashes else 0


if __name__ == "__main__":
    sys.exit(main())
