"""Who owns a ghost, where ids are not the same everywhere; pure.

The ids of the images are those that the dumped tasks saw, and the tasks that the ghosts are for are
to see the same: so they are translated through the live maps of the user namespace that owns the
task's mount namespace, whatever the images say of their own. Where the mount that a task opens the
file through is idmapped, that is a second step, which the kernel does by itself for whoever works
through the same mount; but somebody must be made owner whom that mount has.

Making a file, or a name of it, the kernel asks besides whether the file system, and the mount, has
whoever does it (EOVERFLOW): so for each target somebody is chosen for workers to act as.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from ghostpool._errors import PlanError, UnsupportedError
from ghostpool._model import Ghost
from ghostpool._planned import Opening, Plan, PlannedMount, Policy
from ghostpool._userns import IdMaps

Owner = tuple[int, int]


class Ownership:
    """Fills the owners of a plan, ghost by ghost, and who is acted as in each target."""

    def __init__(self, plan: Plan, policy: Policy) -> None:
        self._plan = plan
        self._policy = policy
        self._has: dict[int, set[IdMaps]] = {}
        """By target: everything that must have whoever is acted as."""

    @property
    def needed(self) -> bool:
        """Somewhere ids are others; to be asked when all mounts are known."""
        return not self._policy.own_owner and any(
            mount.namespace.target.ids or mount.idmap or mount.service_idmap
            for mount in self._plan.mounts.values()
        )

    def settle(self, openings: Sequence[Opening]) -> None:
        """Enter the owner of a placed ghost. PlanError: there is none, or no one for all opens."""
        ghost = openings[0].ghost
        assert isinstance(ghost, Ghost)  # files of link remaps have an owner
        made = self._plan.ghosts[ghost.id].mount
        stored = {self._stored(opening): opening for opening in openings}
        if len(stored) > 1:
            seen = ", ".join(sorted(opening.mount.label for opening in stored.values()))
            raise UnsupportedError(
                f"its owner {ghost.uid}:{ghost.gid} would have to be somebody else through each "
                f"of its mounts, which have different maps of ids: {seen}"
            )
        (owner,) = stored
        given = owner if made.service_idmap is None else made.service_idmap.outside(*owner)
        if given is None:
            raise UnsupportedError(
                f"its owner is {owner[0]}:{owner[1]} on the file system, whom {made.label}, "
                f"where it has to be made, does not have ({made.service_idmap})"
            )
        self._plan.owners[ghost.id] = given
        self.note(made, made)
        for opening in openings:
            self.note(opening.mount, made)

    def _stored(self, opening: Opening) -> Owner:
        """What the file system has to say, for the tasks of an open to see the owner."""
        ghost, target = opening.ghost, opening.mount.namespace.target
        assert isinstance(ghost, Ghost)
        wanted: Owner | None = (ghost.uid, ghost.gid)
        if target.ids is not None:
            wanted = target.ids.outside(ghost.uid, ghost.gid)
            if wanted is None:
                raise PlanError(
                    f"its owner {ghost.uid}:{ghost.gid} has no id in the user namespace of "
                    f"{target.label} ({target.ids})"
                )
        elif not self._policy.mapped(ghost.uid, ghost.gid):
            raise no_such_owner(ghost.uid, ghost.gid)
        assert wanted is not None
        idmap = opening.mount.idmap
        stored = wanted if idmap is None else idmap.inside(*wanted)
        if stored is None:
            raise PlanError(
                f"its owner {ghost.uid}:{ghost.gid} is {wanted[0]}:{wanted[1]} here, whom the "
                f"idmapped mount {opening.mount.label} does not show ({idmap})"
            )
        return stored

    def note(self, working: PlannedMount, through: PlannedMount) -> None:
        """Names are made in the target of `working`, on it and through the other one."""
        there = self._has.setdefault(working.namespace.target.index, set())
        for mount in (working, through):
            own = mount.namespace.target.ids, mount.idmap, mount.service_idmap
            there.update(maps for maps in own if maps is not None)

    def choose(self) -> Iterable[tuple[int, PlanError]]:
        """Enter who is acted as in each target; targets for which there is nobody, and why."""
        me = os.geteuid(), os.getegid()
        for index, maps in self._has.items():
            ordered = sorted(maps)
            some = [me, *(m.first for m in ordered if m.first is not None)]
            uid = next((u for u, _ in some if all(m.uids.inside(u) is not None for m in maps)), -1)
            gid = next((g for _, g in some if all(m.gids.inside(g) is not None for m in maps)), -1)
            if uid < 0 or gid < 0:
                yield (
                    index,
                    UnsupportedError(
                        "nobody can make files there whom all of its mounts have: "
                        + "; ".join(map(str, ordered))
                    ),
                )
            elif (uid, gid) != me:
                self._plan.acting[index] = uid, gid


def no_such_owner(uid: int, gid: int) -> PlanError:
    """For a user namespace of our own that maps few ids."""
    return PlanError(f"its owner {uid}:{gid} does not exist in this user namespace")


def notes(plan: Plan) -> Iterable[str]:
    """What the operator should know of the ids, once for each target."""
    targets = {m.namespace.target.index: m.namespace.target for m in plan.mounts.values()}
    for target in targets.values():
        if target.ids is not None:
            yield (
                f"{target.label} belongs to a user namespace: owners are as in the images inside "
                f"it, and outside {target.ids}"
            )
        elif plan.images.own_user_namespace:
            yield (
                f"{target.label} has no user namespace of its own, as the images had: owners are "
                "the ids that were seen inside that one"
            )
