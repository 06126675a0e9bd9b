"""Mount trees of images become build specs, or one clear refusal."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from ghostpool import _linux
from ghostpool._buildspec import MountSpec, Node
from ghostpool._errors import SandboxError
from ghostpool._images import read_images
from ghostpool._linux import Attr
from ghostpool._model import ImageMount, Images, MntId, NsId, RegFile, RegId
from ghostpool._sandbox import attributes_of, parse_external, specs_from_images, unsupported
from tests.support.truth import specs_from_truth

CORPUS = Path(__file__).parents[1] / "corpus"


def mount(number: int, mountpoint: bytes, **fields: Any) -> ImageMount:
    """A private relatime tmpfs of its own on the root, unless `fields` say otherwise."""
    values: dict[str, Any] = {
        "id": MntId(number),
        "parent": MntId(1 if number > 1 else 900),
        "namespace": NsId(11),
        "fstype": "tmpfs",
        "device": 60 + number,
        "root": b"/",
        "mountpoint": mountpoint,
        "source": f"src{number}",
        "options": "size=64k",
        "flags": _linux.MS_RELATIME,
        "superblock_flags": 0,
        "shared_group": 0,
        "master_group": 0,
        "unbindable": False,
        "external_key": None,
    }
    return ImageMount(**(values | fields))


ROOT = mount(1, b"/")


def images(*mounts: ImageMount, files: tuple[RegFile, ...] = ()) -> Images:
    spaces: dict[NsId, tuple[ImageMount, ...]] = {}
    for one in mounts:
        spaces[one.namespace] = (*spaces.get(one.namespace, ()), one)
    return Images(
        directory="dump",
        tasks=(),
        files={file.id: file for file in files},
        remaps=(),
        ghosts={},
        mounts=spaces,
        root_namespace=NsId(11),
        own_user_namespace=False,
    )


def specs(*mounts: ImageMount, external: dict[str, str] | None = None) -> tuple[MountSpec, ...]:
    (namespace,) = specs_from_images(images(ROOT, *mounts), external or {})
    assert namespace.id == 11
    return namespace.mounts[1:]


def test_a_plain_mount() -> None:
    """Ids, place, options, groups and superblock state are those of the image."""
    (spec,) = specs(
        mount(
            2,
            b"/a",
            root=b"/sub",
            flags=_linux.MS_RDONLY | _linux.MS_NOATIME,
            superblock_flags=_linux.MS_RDONLY | 16,
            shared_group=4,
            master_group=5,
            unbindable=True,
        )
    )
    assert spec == MountSpec(
        id=2,
        parent=1,
        mountpoint=b"/a",
        superblock=spec.superblock,
        fstype="tmpfs",
        source="src2",
        options="size=64k,sync",
        root=b"/sub",
        attributes=int(Attr.RDONLY | Attr.NOATIME),
        read_only_superblock=True,
        shared_group=4,
        master_group=5,
        unbindable=True,
    )


def test_numbers_are_plain() -> None:
    """No field is an int subclass: marshal would refuse it."""
    (spec,) = specs(mount(2, b"/a", flags=_linux.MS_NOSUID))
    assert {type(value) for value in spec if isinstance(value, int)} == {int, bool}


def test_equal_devices_are_one_superblock() -> None:
    """Also over namespaces; another device is another superblock."""
    tree = images(
        ROOT,
        mount(2, b"/a"),
        mount(11, b"/", device=ROOT.device)._replace(namespace=NsId(12), parent=MntId(901)),
        mount(12, b"/b", device=62)._replace(namespace=NsId(12), parent=MntId(11)),
    )
    first, second = specs_from_images(tree, {})
    assert [spec.id for spec in (first, second)] == [11, 12]
    assert [spec.superblock for spec in first.mounts] == [spec.superblock for spec in second.mounts]
    assert first.mounts[0].superblock != first.mounts[1].superblock


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (_linux.MS_RELATIME, Attr(0)),
        (_linux.MS_STRICTATIME, Attr.STRICTATIME),
        (0, Attr.STRICTATIME),
        (_linux.MS_NOATIME, Attr.NOATIME),
        (_linux.MS_NODIRATIME | _linux.MS_RELATIME, Attr.NODIRATIME),
        (
            _linux.MS_RDONLY | _linux.MS_NOSUID | _linux.MS_NODEV | _linux.MS_NOEXEC
            | _linux.MS_NOSYMFOLLOW | _linux.MS_RELATIME,
            Attr.RDONLY | Attr.NOSUID | Attr.NODEV | Attr.NOEXEC | Attr.NOSYMFOLLOW,
        ),
    ],
)  # fmt: skip
def test_attributes(flags: int, wanted: Attr) -> None:
    """MS_* flags of an image as MOUNT_ATTR_*; no atime flag is strictatime."""
    assert attributes_of(flags) == wanted


def test_options_of_kernel_file_systems() -> None:
    """devpts keeps its own, proc and the kernel's own file systems none."""
    kept = specs(
        mount(2, b"/p", fstype="proc", options="hidepid=2"),
        mount(3, b"/d", fstype="devpts", options="gid=5,mode=620,newinstance,ptmxmode=666"),
        mount(4, b"/c", fstype="cgroup2", options="nsdelegate", superblock_flags=16),
        mount(5, b"/t", options="seclabel,inode64,size=1m"),
    )
    assert [spec.options for spec in kept] == [
        "",
        "gid=5,mode=620,ptmxmode=666",
        "",
        "inode64,size=1m",
    ]


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"fstype": "overlay", "source": "overlay"}, "overlay of overlay"),
        ({"fstype": "", "source": "/dev/sda1"}, "unnamed file system of /dev/sda1"),
        ({"fstype": "autofs"}, "autofs"),
        ({"fstype": "cgroup"}, "cgroup"),
        ({"fstype": "tmpfs", "external_key": "CRIU:AUTOGENERATED"}, "left to the outside"),
        ({"fstype": "ext4", "external_key": "CRIU:EXTERNAL_DEV"}, "left to the outside"),
        ({"deleted_root": True}, "removed"),
        ({"options": "size=1m,usrquota"}, "usrquota"),
        ({"fstype": "devpts", "options": "nonesuch"}, "nonesuch"),
    ],
)
def test_what_can_not_be_made(fields: dict[str, Any], names: str) -> None:
    """One line names namespace, mount point, file system, source and the option that helps."""
    with pytest.raises(SandboxError, match=names) as caught:
        specs(mount(2, b"/srv/a", **fields))
    text = str(caught.value)
    assert "\n" not in text
    for part in ("namespace 11", "/srv/a", fields.get("source", "src2"), "--external /srv/a=PATH"):
        assert part in text


def test_the_users_key_is_named() -> None:
    with pytest.raises(SandboxError, match="--external disk0=PATH"):
        specs(mount(2, b"/a", fstype="ext4", external_key="disk0"))


def test_supplied_by_key_and_by_mount_point(tmp_path: Path) -> None:
    """A path stands in; what is a file is known from it."""
    (tmp_path / "file").touch()
    first, second, third = specs(
        mount(2, b"/a", fstype="ext4", external_key="disk0", root=b"/data", shared_group=3),
        mount(3, b"/b", fstype="", external_key="CRIU:AUTOGENERATED"),
        mount(4, b"/a/f", fstype="overlay"),
        external={"disk0": str(tmp_path), "/b": str(tmp_path), "/a/f": str(tmp_path / "file")},
    )
    assert first.external == second.external == bytes(tmp_path)
    assert (first.root, first.shared_group, first.is_file) == (b"/", 3, False)
    assert first.superblock == second.superblock != third.superblock
    assert third.is_file


def test_a_bind_of_a_supplied_superblock(tmp_path: Path) -> None:
    """Other mounts of the superblock show the same part of the path that is supplied."""
    disk = {"fstype": "ext4", "device": 99}
    whole, part, outside = (
        mount(2, b"/a", external_key="disk0", root=b"/top", **disk),
        mount(3, b"/b", root=b"/top/x/y", **disk),
        mount(4, b"/c", root=b"/topmost", **disk),
    )
    first, second = specs(whole, part, external={"disk0": str(tmp_path)})
    assert (second.external, second.root) == (first.external, b"/x/y")
    assert second.superblock == first.superblock
    with pytest.raises(SandboxError, match="--external /c=PATH"):
        specs(whole, outside, external={"disk0": str(tmp_path)})


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    (spec,) = specs(mount(2, b"/a", fstype="ext4"), external={"/a": "d"})
    assert spec.external == bytes(tmp_path / "d")


def test_a_key_that_no_mount_has(tmp_path: Path) -> None:
    """A misspelt key is an error that lists the right ones."""
    with pytest.raises(SandboxError, match=r"dsk0=.*: no mount .* disk0"):
        specs(
            mount(2, b"/a", fstype="ext4", external_key="disk0"),
            external={"dsk0": str(tmp_path), "disk0": str(tmp_path)},
        )
    with pytest.raises(SandboxError, match="none has to be supplied"):
        specs(external={"x": str(tmp_path)})


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match=r"/a=.*missing: No such file"):
        specs(mount(2, b"/a", fstype="ext4"), external={"/a": str(tmp_path / "missing")})


def test_a_file_bind_is_known_by_an_open_file() -> None:
    """An open file with the very name of the mount point tells what its root is."""

    def file(number: int, name: bytes, mode: int) -> RegFile:
        return RegFile(RegId(number), 0, 0, name, MntId(number), None, mode)

    tree = images(
        ROOT,
        *(mount(number, b"/f%d" % number) for number in (2, 3, 4)),
        files=(
            file(2, b"/f2", stat.S_IFREG | 0o600),
            file(3, b"/f3", stat.S_IFDIR | 0o755),
            file(4, b"/f4/below", stat.S_IFREG | 0o600),
        ),
    )
    (namespace,) = specs_from_images(tree, {})
    assert [spec.is_file for spec in namespace.mounts[1:]] == [True, False, False]


def test_images_without_a_mount_namespace() -> None:
    with pytest.raises(SandboxError, match="-t or --ns"):
        specs_from_images(images(), {})


def test_a_namespace_without_a_root() -> None:
    with pytest.raises(SandboxError, match=r"namespace 11 .* no mount at /"):
        specs_from_images(images(mount(2, b"/a")), {})


def test_unsupported_lists_what_has_to_be_supplied() -> None:
    bad = (mount(2, b"/a", fstype="overlay"), mount(3, b"/b", external_key="k"))
    assert unsupported(images(ROOT, *bad, mount(4, b"/c", fstype="proc"))) == bad


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("disk0=/srv/d", ("disk0", "/srv/d")),
        ("/a=b=c", ("/a", "b=c")),
        ("mnt[disk0]:/srv/d", ("disk0", "/srv/d")),
        ("mnt[/a=b]:c", ("/a=b", "c")),
    ],
)
def test_parse_external(text: str, pair: tuple[str, str]) -> None:
    assert parse_external(text) == pair


@pytest.mark.parametrize("text", ["", "key", "=path", "key=", "mnt[]:p", "mnt[k]:", "mnt[k]"])
def test_parse_external_refuses(text: str) -> None:
    with pytest.raises(SandboxError, match="KEY=PATH"):
        parse_external(text)


@pytest.mark.parametrize("case", sorted(path.parent.name for path in CORPUS.glob("*/truth.json")))
def test_images_and_truth_agree(case: str, tmp_path: Path) -> None:
    """Both ways to the specs give the same mounts but for files, options and external ones."""

    def shape(mount: MountSpec, devices: dict[int, int], groups: dict[int, int]) -> MountSpec:
        return mount._replace(
            superblock=devices.setdefault(mount.superblock, len(devices)),
            shared_group=mount.shared_group
            and groups.setdefault(mount.shared_group, len(groups) + 1),
            fstype="",
            source="",
            options="",
            external=None,
            nodes=(),
        )

    truth = specs_from_truth(json.loads((CORPUS / case / "truth.json").read_text()))
    external = {"disk0": str(tmp_path)} if case == "03-sparse-fiemap" else {}
    got = specs_from_images(read_images(CORPUS / case / "images"), external)
    both = []
    for namespaces in (truth, got):
        mounts = sorted(mount for namespace in namespaces for mount in namespace.mounts)
        devices: dict[int, int] = {}
        groups: dict[int, int] = {}
        both.append([shape(mount, devices, groups) for mount in mounts])
    assert both[0] == both[1]


def test_truth_of_every_kind() -> None:
    """Files of truth.json become nodes, whatever their kind; links and propagation as well."""
    common = {"uid": 1, "gid": 2, "mode": 0o640}
    contents = [
        {"path": "/f", "kind": "reg", "content_b64": "aGk=", "mtime": [-1, 5], **common},
        {"path": "/g", "kind": "reg", "hardlink_to": "/f", "size": 3, **common},
        {"path": "/l", "kind": "lnk", "target": "f", **common},
        {"path": "/c", "kind": "chr", "rdev": [1, 3], **common},
    ]
    truth = {
        "mounts": [
            {
                "ns": 0,
                "mountpoint": "/",
                "mnt_id": 5,
                "parent_mnt_id": 4,
                "fstype": "ext4",
                "source": "/dev/loop0",
                "root": "/",
                "dev": "7:0",
                "flags": ["ro", "nodiratime"],
                "sb": "ro",
                "sb_options": "errors=continue",
                "propagation": "slave+shared",
                "peer_group": 2,
                "master_group": 3,
                "build": {"op": "external", "type": "ext4"},
                "contents": contents,
            }
        ]
    }
    ((_, (spec,)),) = specs_from_truth(truth)
    assert (spec.fstype, spec.options, spec.read_only_superblock) == ("tmpfs", "", True)
    assert (spec.shared_group, spec.master_group) == (2, 3)
    assert spec.attributes == Attr.RDONLY | Attr.NODIRATIME | Attr.STRICTATIME
    regular = Node(b"/f", stat.S_IFREG | 0o640, 1, 2, b"hi", mtime_ns=-(10**9) + 5)
    assert spec.nodes[0] == regular
    assert spec.nodes[1].hard_link_of == b"/f"
    assert spec.nodes[2].target == b"f"
    assert spec.nodes[3].rdev == 259
