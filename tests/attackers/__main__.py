"""python -m tests.attackers [--seconds S] [--json FILE] [ATTACK …]: see the package."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests.attackers.arena import run
from tests.attackers.attacks import ATTACKS

_SHOWN = 20
"""Violations of an attack that are printed; all are in the JSON."""


def main() -> int:
    """Exit status 1 if anything happened that must not."""
    parser = argparse.ArgumentParser(prog="python -m tests.attackers", description=__doc__)
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=" ".join(ATTACKS))
    parser.add_argument("--seconds", type=float, default=60.0, help="for each attack")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    arguments = parser.parse_args()
    unknown = set(arguments.attacks) - ATTACKS.keys()
    if unknown:
        parser.error(f"no such attack: {' '.join(sorted(unknown))}")
    results = []
    for name in arguments.attacks or ATTACKS:
        result = run(name, arguments.seconds)
        results.append(result)
        outcomes = ", ".join(f"{count} {what}" for what, count in result.outcomes.most_common())
        print(
            f"{name}: {result.blows} blows in {result.seconds:.0f} s on {result.restores} "
            f"restores ({outcomes}); {result.delivered} descriptors delivered, "
            f"{result.moved} names moved away; violations: {len(result.violations)}",
            flush=True,
        )
        for violation in result.violations[:_SHOWN]:
            print(f"    {violation}", flush=True)
    if arguments.json is not None:
        document = [result.document() for result in results]
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if any(result.violations for result in results) else 0


sys.exit(main())
