"""What the content of a large ghost costs, against cp of the same bytes on the same file system.

The start of a command is no part of it: from each run that of the same command with a ghost of
4 KiB is taken off, in the same round. cp writes into the same read-only mount, made writable for
it, and removes what it wrote; ghostpool's ghost goes too when its descriptor is closed, so both
free the memory within their time. With holes, the rival is cp of as many bytes without them.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median

from bench import rivals
from bench.images import Shape, content_of, write_images
from bench.measure import Answer, Run, Setting, alternate
from bench.ratios import known, median_ratio, shown
from bench.scene import live_namespace, workplace

_MIB = 1 << 20
_SMALL = 4096
_EXTENTS = 256
_APART = 64

# $1 mount point, $2 plain file.
_CP = """
mount -o remount,bind,rw "$1"
cp "$2" "$1/f"
rm "$1/f"
mount -o remount,bind,ro "$1"
"""


def measure(setting: Setting) -> Answer:
    """Seconds that the content takes."""
    size = (256 if setting.quick else 1024) * _MIB
    data = size // 4  # bytes of the ghost with holes that are none
    program = rivals.compile_c(setting.scratch)
    runs: dict[str, Run] = {}
    with ExitStack() as stack:
        home = stack.enter_context(workplace(setting.scratch, "big"))
        base = bytes(home / "live")
        pid = stack.enter_context(live_namespace(Shape(0, mounts=1, base=base)))
        sparse = Shape(
            1,
            mounts=1,
            size=data * _APART,
            extents=_EXTENTS,
            extent=data // _EXTENTS,
            base=base,
        )
        for kind, shape in {
            "small": Shape(1, mounts=1, size=_SMALL, base=base),
            "whole": Shape(1, mounts=1, size=size, base=base),
            "sparse": sparse,
        }.items():
            images = home / f"images-{kind}"
            write_images(images, shape)
            file = _plain_file(home / kind, sum(length for _, length in shape.data))
            point = os.fsdecode(shape.mountpoint(0))
            for name, command in (
                ("cp", ["nsenter", "-t", str(pid), "-m", "sh", "-ec", _CP, "sh", point, str(file)]),
                ("C, one process", rivals.c(program, images, pid=pid)),
                ("ghostpool, 1 job", rivals.ghostpool(images, jobs=1, pid=pid)),
            ):
                runs[f"{name}: {kind}"] = partial(rivals.run, command)
        touch = partial(_touch, home / "touched", size + size // 4)
        samples = alternate("big", runs, setting.rounds, before=touch)
    return _answer(samples, size, data)


def _touch(path: Path, size: int) -> None:
    """Have so much of what is free in use, and give it up again.

    A hypervisor takes back what a machine does not use, and who gets it next waits for it.
    """
    _plain_file(path, size)
    path.unlink()


def _plain_file(path: Path, size: int) -> Path:
    content = content_of(Shape(1, size=size))[:_MIB]
    with open(path, "wb") as file:
        file.writelines(content[: size - at] for at in range(0, size, _MIB))
    return path


def _answer(samples: dict[str, list[float]], size: int, data: int) -> Answer:
    rows: list[tuple[str, ...]] = []
    figures: dict[str, float] = {}
    for kind, bytes_, figure in (
        ("whole", size, "over cp"),
        ("sparse", data, "sparse over cp"),
    ):
        own = {name: _own(samples, name, kind) for name in _names(samples)}
        for name, values in own.items():
            over = shown(median_ratio(values, own["cp"]))
            what = f"{bytes_ / _MIB:,.0f} MiB" + (" between holes" if kind == "sparse" else "")
            whole = median(samples[f"{name}: {kind}"])
            rate = bytes_ / 2**30 / median(values)
            rows.append((over, name, what, f"{whole * 1e3:,.0f}", f"{rate:.2f}"))
        figures[figure] = median_ratio(own["ghostpool, 1 job"], own["cp"])
    return Answer(
        "big",
        "one large ghost, whole and with holes",
        ("over cp", "rival", "data", "whole command, ms", "GiB/s, without the start"),
        rows,
        samples,
        figures=known(figures),
    )


def _names(samples: dict[str, list[float]]) -> list[str]:
    return list(dict.fromkeys(name.partition(":")[0] for name in samples))


def _own(samples: dict[str, list[float]], name: str, kind: str) -> list[float]:
    """Seconds of each round without those of the small ghost."""
    pairs = zip(samples[f"{name}: {kind}"], samples[f"{name}: small"], strict=True)
    return [long - short for long, short in pairs]
