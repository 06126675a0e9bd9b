"""What images may ask for: every limit, what it says, and what it keeps the memory below."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.images import Shape, write_images
from ghostpool import _archive, _confine, _limits
from ghostpool._errors import ImageError
from ghostpool._images import read_images, read_source
from ghostpool._limits import Limits, parse_size, record_limit, size_text
from tests.support.imagewriter import ImageSet, head, message, record, small
from tests.support.memory import MemorySource

ROOT = Path(__file__).parents[2]


def many() -> ImageSet:
    """Several of everything that is counted: more than two, less than forty."""
    made = ImageSet()
    for name in ("/", "/a", "/b", "/c"):
        made.mount(name)
    made.task(threads=(11, 12, 13))
    for pid in (2, 3, 4):
        made.task(pid)
    for number in range(4):
        chunks = [(2 * n, b"x") for n in range(4)]
        ghost = made.ghost(chunks=chunks, size=1000)
        made.open(1, 3 + number, f"/a/gone{number}", ghost=ghost)
    return made


def refused(tmp_path: Path, limits: Limits) -> ImageError:
    with pytest.raises(ImageError, match="the limit is") as caught:
        read_images(many().write(tmp_path), limits=limits)
    return caught.value


@pytest.mark.parametrize(
    ("field", "most", "file", "number", "what"),
    [
        ("names", 5, None, None, "6 names"),
        ("tasks", 3, "pstree.img", 3, "4 tasks"),
        ("threads", 6, "pstree.img", 3, "7 threads"),
        ("mounts", 2, "mountpoints-10.img", 2, "3 mounts"),
        ("files", 10, "files.img", 10, "11 open files"),
        ("descriptors", 2, "fdinfo-101.img", 2, "3 descriptors"),
        ("remaps", 3, "remap-fpath.img", 3, "4 remaps"),
        ("ghosts", 2, "ghost-file-3.img", 0, "3 ghosts"),
        ("chunks", 3, "ghost-file-1.img", 4, "4 chunks"),
        ("all_chunks", 9, "ghost-file-3.img", 2, "10 chunks"),
        ("memory", 9000, None, None, "bytes of memory"),
        ("size", 999, "ghost-file-1.img", 0, "a ghost of 1,000 bytes"),
    ],
)
def test_counts(
    field: str, most: int, file: str | None, number: int | None, what: str, tmp_path: Path
) -> None:
    """Beyond a limit the error names image, record, number, limit and what to do."""
    error = refused(tmp_path, Limits(**{field: most}))
    if file is not None:
        assert (error.file, error.record) == (file, number)
    assert what in error.problem
    assert error.problem.endswith(
        ("dump fewer tasks at once", "before the dump", "allow it: --max-size 1M")
    )


def test_at_the_limit_nothing_is_refused(tmp_path: Path) -> None:
    limits = Limits(
        size=1000,
        tasks=4,
        threads=7,
        mounts=4,
        files=16,
        descriptors=4,
        remaps=4,
        ghosts=4,
        chunks=4,
        all_chunks=16,
    )
    assert len(read_images(many().write(tmp_path), limits=limits).ghosts) == 4


def test_ghosts_together(tmp_path: Path) -> None:
    made = ImageSet()
    made.task()
    for number in range(17):
        made.open(1, 3 + number, f"/g{number}", ghost=made.ghost(chunks=[], size=1 << 40))
    with pytest.raises(ImageError, match=r"17,.* bytes together|bytes together: the limit is 16T"):
        read_images(made.write(tmp_path))
    assert read_images(tmp_path, limits=Limits(size=2 << 40)).ghosts


def test_content_together(tmp_path: Path) -> None:
    made = ImageSet()
    made.task()
    for number in range(5):
        made.open(1, 3 + number, f"/g{number}", ghost=made.ghost(b"x" * 1024))
    error = r"5,120 bytes of content together: the limit is 4K; .* --max-size 1M"
    with pytest.raises(ImageError, match=error):
        read_images(made.write(tmp_path), limits=Limits(size=1024))


def test_a_sparse_image_has_the_size_that_it_shows(tmp_path: Path) -> None:
    """Raw content is as long as the image says, which costs its author nothing."""
    made = ImageSet()
    made.task()
    made.open(1, 3, "/gone", ghost=made.ghost(b"x", mode=0o100644))
    directory = made.write(tmp_path)
    with (directory / "ghost-file-1.img").open("r+b") as image:
        image.truncate(2 << 40)
    with pytest.raises(ImageError, match="the limit is 1T; if that is meant, allow it"):
        read_images(directory)


@pytest.mark.parametrize("kind", ["core", "mm", "pstree", "fdinfo", "ids", "ghost-file"])
def test_the_length_of_a_record(kind: str) -> None:
    source = small()
    name = {"pstree": "pstree.img", "fdinfo": "fdinfo-101.img", "ghost-file": "ghost-file-1.img"}
    file = name.get(kind, f"{kind}-1.img")
    images = written(source)
    most = record_limit(kind)
    images[file] = head(file) + (most + 1).to_bytes(4, "little") + bytes(most + 1)
    with pytest.raises(ImageError, match=f"a record of {most + 1:,} bytes") as caught:
        read_source("images", MemorySource(images))
    assert (caught.value.file, caught.value.record) == (file, 0)


def written(made: ImageSet) -> dict[str, bytes]:
    """What `write` writes."""
    return {name: head(name) + b"".join(records) for name, records in made.images().items()}


@pytest.mark.parametrize("field", [6, 8, 9, 14, 18])
def test_texts_of_mounts(field: int) -> None:
    made = small()
    for value, problem in ((b"x" * 70_000, "the limit is 65,535"), (b"a\0b", "holds a NUL")):
        images = written(made)
        own: dict[int, int | bytes | str | None] = dict.fromkeys((5, 17), 0)
        own |= {1: 16, 2: 900, 3: 1, 4: 500, 6: b"/", 7: b"/m", 8: b"s", 9: b"o"}
        entry = message(*{**own, field: value}.items())
        images["mountpoints-10.img"] += record(entry)
        with pytest.raises(ImageError, match=problem):
            read_source("images", MemorySource(images))


def test_sizes() -> None:
    assert parse_size("1") == 1
    assert parse_size("4K") == 4096
    assert parse_size(" 2m ") == 2 << 20
    assert parse_size("1GiB") == 1 << 30
    assert parse_size("8191P") == 8191 << 50
    assert size_text(1 << 40) == "1T"
    assert size_text(1025) == "1025"
    for value in ("", "0", "-1", "1.5G", "1E", "K", "8192P", "9" * 5000):
        with pytest.raises(ValueError, match=r"no size|limit"):
            parse_size(value)
    for size in (1, 1024, 3 << 20, (1 << 50) + 1):
        assert parse_size(size_text(size)) == size


# Inputs that would become much larger than they are: what they take is measured in a process of
# their own, which has read nothing before.

_HOSTILE = """
import sys, time
sys.path[:0] = {paths!r}
from ghostpool._errors import ImageError
from tests.support.imagewriter import head, message, record, small, varint
from tests.support.memory import MemorySource
from tests.support.rss import peak_rss
from tests.unit.test_limits import written
from ghostpool._images import read_source
MiB = 1 << 20
mapping = message((14, message((1, 1), (2, 2), (4, 1), (7, 0x41))))
def long(tag, body):
    return tag + varint(len(body)) + body
INPUTS = {{
    "empty mappings": ("mm-1.img", b"\\x72\\0" * (8 * MiB)),
    "empty mappings, spelled longer": ("mm-1.img", b"\\xf2\\0\\0" * (5 * MiB)),
    "as many as may be": ("mm-1.img", message((12, 1)) + mapping * ((1 << 19) - 9)),
    "as many incomplete ones": ("mm-1.img", message((12, 1)) + b"\\x72\\0" * ((1 << 19) - 9)),
    "packed threads": ("pstree.img", message((1, 1), (2, 0), (3, 1), (4, 1), (5, bytes(MiB - 99)))),
    "unknown fields": ("core-1.img", message((1, 1)) + b"\\x78\\0" * (8 * MiB - 9)),
    "known and unknown": ("core-1.img", b"\\x08\\1\\x78\\0" * (4 * MiB)),
    "one task state after another": ("core-1.img", message((1, 1)) + b"\\x1a\\0" * (8 * MiB - 9)),
    "groups": ("core-1.img", b"\\x7b\\x7c" * (8 * MiB)),
    "nested groups": ("core-1.img", b"\\x7b" * (8 * MiB) + b"\\x7c" * (8 * MiB)),
    "a long name": ("files.img", message((1, 1), (2, 1), (3, long(b"\\x32", bytes(15 * MiB))))),
}}
file, body = INPUTS[sys.argv[1]]
images = written(small())
images[file] = head(file) + record(body)
before = peak_rss()
begun = time.process_time()
try:
    read_source("images", MemorySource(images))
except ImageError as error:
    assert len(str(error)) < 1000
grown = peak_rss() - before
print(grown, time.process_time() - begun)
"""


def inputs() -> list[str]:
    return [line.split('"')[1] for line in _HOSTILE.splitlines() if line.startswith('    "')]


@pytest.mark.parametrize("name", inputs())
def test_what_would_grow(name: str) -> None:
    paths = [str(ROOT), *(path for path in sys.path if path)]
    done = subprocess.run(
        [sys.executable, "-I", "-c", _HOSTILE.format(paths=paths), name],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    grown, took = map(float, done.stdout.split())
    assert grown < 160 << 20, f"{grown / (1 << 20):.0f} MiB"
    assert took < 1


@pytest.mark.long
def test_a_hundred_thousand_ghosts(tmp_path: Path) -> None:
    """Real users have them: they pass, with names of some length, and below 256 MiB."""
    write_images(tmp_path / "images", Shape(100_000, base=b"/var/lib/service/data/instances/one"))
    code = (
        f"import gc, json, sys; sys.path[:0] = {[str(ROOT), *(p for p in sys.path if p)]!r}\n"
        "from ghostpool._images import read_images\n"
        "from ghostpool._imagerows import rows_of\n"
        "gc.disable()\n"  # as the reader does
        f"images = read_images({str(tmp_path / 'images')!r})\n"
        "for frame in rows_of(images):\n"
        "    json.dumps(frame)\n"
        "print(len(images.ghosts))\n"
        "from tests.support.rss import peak_rss\n"
        "print(peak_rss())"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    ghosts, peak = map(int, done.stdout.split())
    assert ghosts == 100_000
    assert peak < 256 << 20, f"{peak / (1 << 20):.0f} MiB"


def test_what_is_one_too_many_is_not_read(tmp_path: Path) -> None:
    """Of an image with one record no more than two are ever held."""
    made = small()
    images = made.images()
    images["ids-1.img"] *= 200_000
    made.write(tmp_path, images)
    begun = time.process_time()
    with pytest.raises(ImageError, match=r"ids-1\.img, record 1: a ids image holds one record"):
        read_images(tmp_path)
    assert time.process_time() - begun < 0.2


def test_a_truncated_chunk_is_answered_at_once(tmp_path: Path) -> None:
    made = ImageSet()
    made.task()
    made.open(1, 3, "/gone", ghost=made.ghost(chunks=[(0, bytes(9000))], size=9000))
    directory = made.write(tmp_path)
    image = directory / "ghost-file-1.img"
    image.write_bytes(image.read_bytes()[:-1])
    begun = time.monotonic()
    with pytest.raises(ImageError, match="9000 bytes of content should follow, 8999 do"):
        read_images(directory)
    assert time.monotonic() - begun < 0.2


# The documentation.


def test_the_table_of_limits_is_true() -> None:
    """docs/reading-images.md has every limit, with its number."""
    text = (ROOT / "docs" / "reading-images.md").read_text(encoding="utf-8")
    rows = {
        cells[1].strip(): cells[2].strip()
        for line in text.splitlines()
        if line.startswith("|") and len(cells := line.split("|")) == 4
    }
    limits = Limits()
    expected = {
        "apparent size of a ghost": f"{size_text(limits.size)}, or `--max-size`",
        "apparent size of all ghosts": f"{size_text(16 * limits.size)}, or 16 times `--max-size`",
        "content of all ghosts": f"{size_text(4 * limits.size)}, or 4 times `--max-size`",
        "length of a record": size_text(record_limit("pstree")),
        "length of a record of core, mm and files": size_text(record_limit("mm")),
        "text of a mount (root, source, options)": f"{_limits.TEXT_LIMIT:,} bytes",
        "names in the directory": f"{limits.names:,}",
        "members of an archive": f"{limits.names:,}",
        "images kept of a packed archive": size_text(_archive.KEPT_MAX),
        "tasks": f"{limits.tasks:,}",
        "threads": f"{limits.threads:,}",
        "mounts": f"{limits.mounts:,}",
        "open files": f"{limits.files:,}",
        "descriptors": f"{limits.descriptors:,}",
        "remaps": f"{limits.remaps:,}",
        "ghosts": f"{limits.ghosts:,}",
        "mappings of a task": f"{limits.mappings:,}",
        "chunks of a ghost": f"{limits.chunks:,}",
        "chunks of all ghosts": f"{limits.all_chunks:,}",
        "memory of the values": size_text(limits.memory),
        "address space of the reader": size_text(_confine.MEMORY),
        "processor time of the reader": f"{_confine.CPU_S} s",
        "descriptors of the reader": str(_confine.FILES),
    }
    assert {name: rows.get(name) for name in expected} == expected
