"""Checkpoint archives as the tools write them, out of a directory of images.

The layouts are those of Podman 5 (`podman container checkpoint --export`), CRI-O and the kubelet's
checkpoint API, containerd (`ctr checkpoint`, an OCI layout in a tar archive), and an image made of
a checkpoint by buildah. What is beside the images in them is there too, as small as it can be.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Members = list[tuple[str, bytes | None]]
"""Names and contents; None: a directory."""

CRIU_LAYER = "application/vnd.containerd.container.criu.checkpoint.criu.tar"
RUNTIME_NAME = "org.opencontainers.runtime.name"


def tar(members: Iterable[tuple[str, bytes | None]], form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar archive of these members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.mtime = 1_700_000_000
            if content is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o700
                archive.addfile(info)
            else:
                info.size, info.mode = len(content), 0o600
                archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zstd_frame(data: bytes) -> bytes:
    return zstd.compress(data)


def images_below(directory: Path, prefix: str = "checkpoint/") -> Members:
    """The images of a directory as members, in the order in which Go walks it."""
    files = [(prefix + file.name, file.read_bytes()) for file in sorted(directory.iterdir())]
    return [*([(prefix, None)] if prefix else []), *files]


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def podman(images: Path) -> bytes:
    """What `podman container checkpoint --export` packs."""
    return tar(
        [
            ("artifacts/", None),
            ("bind.mounts", b"[]"),
            *images_below(images),
            ("config.dump", as_json({"id": "c0ffee", "name": "counter", "runtime": "crun"})),
            ("devshm-checkpoint.tar", tar([("./", None)])),
            ("io.podman.annotations.checkpoint", b"{}"),
            ("network.status", b"{}"),
            ("rootfs-diff.tar", tar([("etc/", None), ("etc/hostname", b"counter\n")])),
            ("spec.dump", as_json({"ociVersion": "1.2.0", "mounts": []})),
            ("stats-dump", b"\x40\x59\x10\x55"),
        ]
    )


def crio(images: Path) -> bytes:
    """What CRI-O packs, and so the kubelet's checkpoint API with it; it is never compressed."""
    return tar(
        [
            *images_below(images),
            ("config.dump", as_json({"id": "c0ffee", "rootfsImage": "docker.io/library/busybox"})),
            ("spec.dump", as_json({"ociVersion": "1.2.0", "mounts": []})),
            ("dump.log", b"(00.000000) Version: 4.2 (gitid 0)\n"),
            ("io.kubernetes.cri-o.LogPath", b"/var/log/pods/0.log"),
        ],
        tarfile.GNU_FORMAT,
    )


def layout(layers: Iterable[tuple[str, bytes]], annotations: dict[str, str]) -> Members:
    """The members of an OCI layout with one manifest over these layers: media type and blob."""
    blobs: dict[str, bytes] = {}

    def blob(kind: str, content: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[digest] = content
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(content)}

    config = blob("application/vnd.oci.image.config.v1+json", as_json({"architecture": "amd64"}))
    manifest = {
        "schemaVersion": 2,
        "config": config,
        "layers": [blob(kind, content) for kind, content in layers],
        "annotations": annotations,
    }
    entry = blob("application/vnd.oci.image.manifest.v1+json", as_json(manifest))
    return [
        ("blobs/", None),
        ("blobs/sha256/", None),
        *((f"blobs/sha256/{digest}", content) for digest, content in sorted(blobs.items())),
        ("index.json", as_json({"schemaVersion": 2, "manifests": [entry]})),
        ("oci-layout", as_json({"imageLayoutVersion": "1.0.0"})),
    ]


def containerd(images: Path) -> bytes:
    """What containerd exports of a checkpoint: the images at the top of a blob of their own."""
    criu = tar(images_below(images, ""))
    diff = gzip.compress(tar([("etc/", None), ("etc/hostname", b"counter\n")]), mtime=0)
    spec = "application/vnd.containerd.container.checkpoint.config.v1+proto"
    layers = [
        (CRIU_LAYER, criu),
        ("application/vnd.oci.image.layer.v1.tar+gzip", diff),
        (spec, b"\x0a\x04spec"),
    ]
    return tar(layout(layers, {RUNTIME_NAME: "io.containerd.runc.v2"}), tarfile.GNU_FORMAT)


def oci_members(images: Path) -> Members:
    """An image that buildah has made of a checkpoint, whose layer it compresses."""
    layer = gzip.compress(podman(images), mtime=0)
    notes = {"io.podman.annotations.checkpoint.name": "counter"}
    return layout([("application/vnd.oci.image.layer.v1.tar+gzip", layer)], notes)


def oci(images: Path) -> bytes:
    """The same as `podman save --format oci-archive` writes it."""
    return tar(oci_members(images))


def with_large_ghost(images: Path, packing: str, size: int, to: Path) -> Path:
    """An archive of images whose ghost 1, as the last of them, gets `size` bytes of zeros.

    In a piece of 1 MiB a frame, of which any number is one stream, and as a hole where nothing
    is packed: it takes neither time nor space.
    """
    pack = {"gzip": lambda data: gzip.compress(data, 1, mtime=0), "zstd": zstd_frame}.get(packing)
    name = "checkpoint/ghost-file-1.img"
    members = dict(images_below(images))
    head = members.pop(name)
    assert head is not None
    whole = tar(members.items())
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        last = archive.getmembers()[-1]
    before = whole[: last.offset_data + -(-last.size // 512) * 512]
    info = tarfile.TarInfo(name)
    info.size = len(head) + size
    before += info.tobuf(tarfile.PAX_FORMAT) + head
    after = bytes(-info.size % 512 + 1024)
    with to.open("wb") as file:
        if pack is None:
            file.write(before)
            file.seek(size, 1)
            file.write(after)
        else:
            piece = pack(bytes(1 << 20))
            file.write(pack(before))
            for _ in range(size >> 20):
                file.write(piece)
            file.write(pack(after))
    return to


PACKED: dict[str, Callable[[Path], bytes]] = {
    "podman": podman,
    "podman-gzip": lambda images: gzip.compress(podman(images), mtime=0),
    "podman-zstd": lambda images: zstd.compress(podman(images)),
    "crio": crio,
    "containerd": containerd,
    "oci": oci,
}
"""By what writes it."""


def packed(images: Path, how: str, to: Path) -> Path:
    """The archive of these images, at `to`."""
    to.write_bytes(PACKED[how](images))
    return to
