"""Images without some of their files, as if the tasks had never held them: for what is skipped.

Pure. A plan is made of images as a whole (names, parents, mounts that lend a clone depend on each
other), so what can not be restored is left out of them, and the plan is made once more.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from ghostpool._model import Descriptor, GhostId, Images, RegId, Task


def without(images: Images, files: AbstractSet[RegId]) -> Images:
    """The images less the remaps of `files`, and whatever held these."""
    remaps = tuple(remap for remap in images.remaps if remap.origin not in files)
    left = {GhostId(remap.target) for remap in remaps if remap.kind == "ghost"}
    tables: dict[int, tuple[Descriptor, ...]] = {}

    def lessened(task: Task) -> Task:
        key = id(task.descriptors)  # tasks may have one table in common
        if key not in tables:
            tables[key] = tuple(d for d in task.descriptors if d.reg_id not in files)
        holders = tuple(h for h in task.holders if h.reg_id not in files)
        return task._replace(descriptors=tables[key], holders=holders)

    return images._replace(
        tasks=tuple(map(lessened, images.tasks)),
        remaps=remaps,
        ghosts={number: ghost for number, ghost in images.ghosts.items() if number in left},
        sockets={reg: socket for reg, socket in images.sockets.items() if reg not in files},
    )


__all__ = ["without"]
