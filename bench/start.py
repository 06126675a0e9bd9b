"""What the smallest restore costs: one ghost, the whole command.

Next to it what no program on trio can do without, importing trio and anyio, and what the same
interpreter needs to do nothing.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from functools import partial
from statistics import median

from bench import rivals
from bench.images import Shape, write_images
from bench.measure import Answer, Run, Setting, alternate, ratio, spread
from bench.ratios import median_ratio
from bench.scene import live_namespace, workplace

_REFERENCE = "python -c 'import trio, anyio'"
_LIVE = "ghostpool, live namespace"


def measure(setting: Setting) -> Answer:
    """Milliseconds of whole commands."""
    with ExitStack() as stack:
        home = stack.enter_context(workplace(setting.scratch, "start"))
        shape = Shape(1, mounts=1, base=bytes(home / "live"))
        images = home / "images"
        write_images(images, shape)
        files = rivals.write_files(home / "files", shape)
        pid = stack.enter_context(live_namespace(shape))
        runs: dict[str, Run] = {
            name: partial(rivals.run, command)
            for name, command in (
                (_REFERENCE, [sys.executable, "-c", "import trio, anyio"]),
                (_LIVE, rivals.ghostpool(images, jobs=1, pid=pid)),
                ("ghostpool, namespace rebuilt", rivals.ghostpool(images, jobs=1)),
                ("shell, nsenter", rivals.shell_one_by_one(pid, shape, files)),
                ("python -c pass", [sys.executable, "-c", "pass"]),
            )
        }
        samples = alternate("start", runs, setting.rounds)
    reference = median(samples[_REFERENCE])
    rows = [
        (ratio(median(values), reference), name, spread(values, 1e3))
        for name, values in samples.items()
    ]
    columns = ("over the imports", "command", "ms (min–max)")
    answer = Answer("start", "one ghost, the whole command", columns, rows, samples)
    over = median_ratio(samples[_LIVE], samples[_REFERENCE])
    answer.figures["command over imports"] = over
    return answer
