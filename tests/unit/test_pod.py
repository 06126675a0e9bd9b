"""Several sets of images as one."""

from __future__ import annotations

from ghostpool._images import read_images
from ghostpool._linkremaps import LinkRemaps
from ghostpool._model import RegId
from ghostpool._pod import container_of, in_images, joined
from tests.support.corpus import CORPUS


def test_link_remaps_of_all_containers_are_believed() -> None:
    """Their hidden names end in the number that the images have."""
    images = read_images(CORPUS / "05-link-remap" / "images")
    both = joined([images, images])
    linked = [remap for remap in both.remaps if remap.kind == "linked"]
    assert len(linked) == 2 * sum(remap.kind == "linked" for remap in images.remaps) > 0
    for remap in linked:
        file, hidden = both.files[remap.origin], both.files[RegId(remap.target)]
        found = LinkRemaps.linked(file, hidden)
        assert found.hidden == hidden.name
        assert container_of(found.id) == container_of(file.id)


def test_numbers_are_different_and_tell_what_they_are() -> None:
    images = read_images(CORPUS / "06-nested-mntns" / "images")
    both = joined([images, images])
    assert [in_images(task.pid) for task in both.tasks] == [t.pid for t in images.tasks] * 2
    assert {container_of(task.pid) for task in both.tasks} == {1, 2}
    assert [task.parent for task in both.tasks if in_images(task.pid) == 1] == [0, 0]
    for kind in ("files", "ghosts", "mounts"):
        assert len(getattr(both, kind)) == 2 * len(getattr(images, kind))
    assert {ghost.file for ghost in both.ghosts.values()} == {
        ghost.file for ghost in images.ghosts.values()
    }
