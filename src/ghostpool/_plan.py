"""The plan: what will be created where, opened how, and which mounts must be writable for it.

Pure: it joins the images, the mount tables and what workers saw at the old names, and changes
nothing. Whatever rules a ghost out becomes a refusal with its reason; a restore acts only on a
plan without refusals.

How a ghost is placed: its temporary lies in a directory that exists and that every mount through
which it is to be opened can see, because linkat(2) works only inside one mount. Where no such
directory exists (binds of disjoint subtrees), another live mount that covers both subtrees lends
a private clone for the linking.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import NamedTuple

from ghostpool._admission import (
    check_fifo,
    check_ghost,
    check_mount,
    is_privileged,
    open_flags,
    owned,
    privileges_of,
    why_not_bound,
)
from ghostpool._errors import (
    GhostpoolError,
    Overmounted,
    PlanError,
    UnsupportedError,
)
from ghostpool._keys import Keys, holders_of
from ghostpool._linkremaps import LinkRemaps, Place
from ghostpool._match import Matcher, Namespace, Site
from ghostpool._model import (
    Descriptor,
    Ghost,
    GhostId,
    Images,
    Linked,
    MountHandle,
    NsId,
    RegFile,
    RegId,
    Remap,
    ShmGhost,
    id_in_images,
    maker,
)
from ghostpool._mountinfo import LiveMount
from ghostpool._needs import Counts
from ghostpool._ownership import Ownership, notes
from ghostpool._paths import is_below, join, relative_to, text
from ghostpool._planned import (
    ALTERNATIVE,
    Files,
    LinkedBy,
    MadeAt,
    OpenedAt,
    Opening,
    Plan,
    PlannedGhost,
    PlannedLink,
    PlannedMount,
    PlannedOpen,
    PlannedTask,
    Policy,
    Privileged,
    Refusal,
    is_moved,
    usual_names,
)
from ghostpool._protocol import Found, Look

_make_opening = maker(Opening)
_make_open = maker(PlannedOpen)
_make_ghost = maker(PlannedGhost)
_make_opened_at = maker(OpenedAt)
_make_made_at = maker(MadeAt)
_make_linked_by = maker(LinkedBy)


class _Spot(NamedTuple):
    """A directory of old names."""

    existing: bytes
    """The part of it that exists, relative to the root of its mount."""
    missing: tuple[bytes, ...]
    """The components that do not."""
    place: bytes
    """`existing` inside the file system."""
    group: tuple[int, int]
    """Identity of `existing`."""
    taken: dict[bytes, tuple[bool, bool]]
    """Names: whether something has them, and the ones beside them; empty if nothing has any."""


class Planner:
    """Makes a plan in two steps, with a look at the live old names between them.

    `mounts` after construction says which mounts to open; `looks` which directories to look at;
    `finish` takes what was seen there.
    """

    def __init__(
        self, images: Images, namespaces: Mapping[NsId, Namespace], policy: Policy, token: bytes
    ) -> None:
        self._plan = Plan(images, token, policy.strategy)
        self._images = images
        self._namespaces = namespaces
        self._ownership = Ownership(self._plan, policy)
        if any(namespace.target.ids for namespace in namespaces.values()):
            policy = policy._replace(mapped=Policy().mapped)  # others have them, or not
        self._policy = policy
        self._prefix = b".ghostpool-%s-" % token
        self._matcher = Matcher(images, namespaces, hidden=policy.overmounted == "private")
        self._links = LinkRemaps(self._matcher, policy, images.devshm)
        self._handles: dict[tuple[int, int], PlannedMount] = {}
        self._found: dict[tuple[int, int, int, int], tuple[PlannedMount, int]] = {}
        self._openings: dict[RegId, Opening] = {}
        self._first: dict[GhostId, Opening] = {}
        self._more: dict[GhostId, list[Opening]] = {}
        """All but the first of the ghosts that are opened more than once."""
        self._wanted: dict[tuple[MountHandle, bytes], list[Opening]] = {}
        self._opened_at: dict[OpenedAt, OpenedAt] = {}
        self._made_at: dict[MadeAt, MadeAt] = {}
        self._linked_by: dict[LinkedBy, LinkedBy] = {}
        self._shows_same: dict[tuple[object, ...], MountHandle] = {}
        """By what a read-only mount shows, the first one."""
        self._spots: dict[tuple[MountHandle, bytes], _Spot] = {}
        self._used: dict[tuple[int, bytes, bytes], GhostId] = {}
        self._in_the_way: set[tuple[int, bytes]] | None = None
        """Old names of files that no ghost lies below, as device and path inside it; worked out
        for the first directory."""
        self._holders = holders_of(images)
        self._keys = Keys()
        self._collect()

    # -- step one -------------------------------------------------------------------------------

    @property
    def mounts(self) -> list[PlannedMount]:
        """The live mounts that the plan rests on."""
        return list(self._plan.mounts.values())

    @property
    def looks(self) -> dict[tuple[MountHandle, bytes], tuple[bytes, ...]]:
        """Directories to look at (mount, path inside it), with the names wanted in each."""
        return {key: _names_of(openings) for key, openings in self._wanted.items()}

    @property
    def names(self) -> list[Place]:
        """Hidden names of link remaps (mount, directory inside it, name), to be found."""
        return self._links.places

    def warn(self, subject: str, what: str) -> None:
        """Note what is not as one would expect."""
        self._plan.warnings.append(f"{subject}: {what}")

    def refuse(self, subject: str, error: GhostpoolError, files: Iterable[RegId] = ()) -> None:
        """Note why something can not be restored; without these files, the rest could be."""
        known = dict.fromkeys(map(id_in_images, files))
        self._plan.refusals.append(Refusal(subject, error, tuple(known)))

    def refuse_mount(self, planned: PlannedMount, error: GhostpoolError) -> None:
        """Likewise for all that is opened on a mount."""
        files = (
            opening.file.id
            for (handle, _), openings in self._wanted.items()
            if handle == planned.handle
            for opening in openings
        )
        self.refuse(planned.label, error, files)

    def _collect(self) -> None:
        files = self._images.files
        held: dict[RegId, bool] = {}  # and whether as a fifo
        sockets = self._images.sockets
        for table in self._tables():
            rows = [row for row in table if row.reg_id not in sockets] if sockets else table
            for descriptor in rows:
                held.setdefault(files[descriptor.reg_id].id, descriptor.fifo)
        for remap in self._images.remaps:
            file = self._images.files[remap.origin]
            try:
                self._collect_one(remap, file, held)
            except GhostpoolError as error:
                self.refuse(f"{text(file.name)} (file id {file.id})", error, [file.id])
        self._list_privileged()
        if self._images.sockets:
            self._collect_sockets()

    def _list_privileged(self) -> None:
        """Each such ghost once, by the first of its names, refused for another reason or not."""
        left = {g.id for g in self._images.ghosts.values() if is_privileged(g.mode)}
        for remap in self._images.remaps if left else ():
            if remap.kind == "ghost" and remap.target in left:
                ghost = self._images.ghosts[GhostId(remap.target)]
                left.remove(ghost.id)
                kinds, allowed = privileges_of(ghost, self._policy)
                name = text(self._images.files[remap.origin].name)
                self._plan.privileged.append(Privileged(ghost.file, name, kinds, allowed))

    def _collect_one(self, remap: Remap, file: RegFile, held: Mapping[RegId, bool]) -> None:
        if remap.kind == "procfs":
            self._plan.warnings.append(
                f"{text(file.name)} (file id {file.id}): a file of process {remap.target}, which "
                "was dead when it was dumped, is left alone"
            )
            return
        ghost: Ghost | Linked
        if remap.kind == "linked":
            ghost = self._links.linked(file, self._images.files[RegId(remap.target)])
        else:
            ghost = dumped = self._images.ghosts[GhostId(remap.target)]
            check_ghost(dumped, self._policy)
            if file.mode is not None and file.mode != dumped.mode:
                raise PlanError(
                    f"files.img says mode {file.mode:o}, {dumped.file} says {dumped.mode:o}: "
                    "the images contradict each other"
                )
        holders = self._holders.get(file.id)
        if file.id not in held and not holders:
            # By an inotify mark or a message in flight; or the image that says so was cut.
            raise UnsupportedError(
                "nothing that ghostpool knows of holds it (a mark of inotify or fanotify, a "
                "message in flight), or an fdinfo image is cut"
            )
        site = self._matcher.site(file)
        if file.id in held:
            self._add_opening(file, ghost, site, fifo=held[file.id])
        for further in self._keys.add(file, ghost.mode, holders or (), held=file.id in held):
            self._add_opening(further, ghost, site, fifo=False)
        if file.id in self._images.fifo_data:
            self._collect_fifo(file, ghost)

    def _add_opening(self, file: RegFile, ghost: Ghost | Linked, site: Site, *, fifo: bool) -> None:
        mount, flags = self._admitted(file, ghost, site)
        at = _make_opened_at((mount, site.directory, flags, fifo))
        opening = _make_opening((file, ghost, self._opened_at.setdefault(at, at)))
        if isinstance(ghost, Linked):
            self._links.add(opening, ghost)
        key = mount.handle, site.directory
        there = self._wanted.get(key)
        if there is None:
            there = self._wanted[key] = []
        there.append(opening)
        self._openings[file.id] = opening
        if isinstance(ghost, Linked):
            return
        if self._first.setdefault(ghost.id, opening) is not opening:
            self._more.setdefault(ghost.id, []).append(opening)

    def _collect_sockets(self) -> None:
        holders: dict[RegId, NsId] = {}
        first = {id(t.descriptors): t.namespace for t in reversed(self._images.tasks)}
        for table in self._tables():
            for row in table:
                holders.setdefault(row.reg_id, first[id(table)])
        for socket in self._images.sockets.values():
            holder = holders.get(socket.id)
            why = why_not_bound(socket)
            if holder is None:
                why = "no descriptor of a task leads to it"
            elif self._policy.keep:
                why = "it is nowhere if nobody holds it"
            elif why is None:
                ids = self._namespaces[holder].target.ids
                try:
                    self._plan.sockets[socket.id] = owned(socket, ids, self._policy)
                except PlanError as error:
                    self.refuse(text(socket.path), error, [socket.id])
            if why is not None:
                self._plan.warnings.append(
                    f"{text(socket.path)}: a UNIX socket whose name is gone, which is left out: "
                    f"{why}"
                )

    def _collect_fifo(self, file: RegFile, ghost: Ghost | Linked) -> None:
        length = self._images.fifo_data[file.id].length
        if isinstance(ghost, Linked):
            self._plan.warnings.append(
                f"{text(file.name)}: {length} bytes that waited in the fifo are not put back: it "
                "is one that others know, by its link remap"
            )
            return
        if self._policy.keep:
            if length:
                self._plan.warnings.append(
                    f"{text(file.name)}: {length} bytes that waited in the fifo are lost: a fifo "
                    "that nobody holds open keeps none"
                )
            return
        data = check_fifo(self._images.fifo_data[file.id], ghost, self._policy)
        wanted = self._images.fifo_data[file.id].pipe_size
        if wanted is not None and data.pipe_size != wanted:
            self._plan.warnings.append(
                f"{text(file.name)}: its pipe held up to {wanted} bytes, and can hold no more than "
                f"{data.pipe_size} here (fs.pipe-max-size)"
            )
        self._plan.fifos[ghost.id] = data

    def _admitted(
        self, file: RegFile, ghost: Ghost | Linked, site: Site
    ) -> tuple[PlannedMount, int]:
        """The mount of a site and the flags to open a file there with, checked once per mount."""
        mount = site.mount
        key = site.namespace.target.index, mount.mnt_id, file.flags, ghost.mode
        admitted = self._found.get(key)
        if admitted is None:
            flags = open_flags(file, ghost, mount)
            check_mount(site)
            admitted = self._found[key] = self._planned(site.namespace, mount), flags
        return admitted

    def _planned(self, namespace: Namespace, mount: LiveMount) -> PlannedMount:
        key = (namespace.target.index, mount.mnt_id)
        planned = self._handles.get(key)
        if planned is None:
            handle = MountHandle(2 * len(self._handles))
            planned = PlannedMount(handle, namespace, mount, clone=mount.read_only)
            self._handles[key] = planned
            self._plan.mounts[handle] = planned
        return planned

    def add_bases(self) -> None:
        """Add the mounts that lend a clone where a ghost's opens share no directory."""
        for ghost_id, more in self._more.items():
            openings = [self._first[ghost_id], *more]
            if self._common_root(openings) is None:
                base = self._find_base(openings)
                if base is not None:
                    self._planned(*base)

    def _tables(self) -> Iterable[Sequence[Descriptor]]:
        """Tables of descriptors, once each: of many tasks that share a large one, images are small.

        To look at it once for each task would take hours.
        """
        return {id(task.descriptors): task.descriptors for task in self._images.tasks}.values()

    def counts(self, files: Files) -> Counts:
        """How much there is to hold open; of the files themselves, what `files` says."""
        of_table: dict[int, tuple[int, int]] = {}  # how many, and the highest number
        for table in self._tables():
            numbers = [
                d.number
                for d in table
                if d.reg_id in self._openings or d.reg_id in self._plan.sockets
            ]
            of_table[id(table)] = len(numbers), max(numbers, default=-1)
        most = highest = -1
        for task in self._images.tasks:
            keys = [key.number for key in self._keys.of_task(task)]
            count, number = of_table[id(task.descriptors)]
            most = max(most, count + len(keys))
            highest = max(highest, number, *keys)
        return Counts(
            namespaces=len({n.target.index for n in self._namespaces.values()}),
            mounts=len(self._plan.mounts),
            opens=len(self._openings),
            held=self._held(files) + len(self._plan.fifos) + len(self._plan.sockets),
            directories=len(self._wanted),
            tasks=len(self._images.tasks),
            most_of_task=max(most, 0),
            highest_number=highest,
            most_keys=max(len(self._keys.of_task(task)) for task in self._images.tasks),
        )

    def _held(self, files: Files) -> int:
        if files == "held":
            return len(self._openings)
        if files == "kept":
            return 0
        return len(self._links) + sum(
            len(some)
            for some in self._by_ghost()
            if not is_moved(some[0].ghost, shared=len(some) > 1)
        )

    def _by_ghost(self) -> Iterator[list[Opening]]:
        for ghost_id, first in self._first.items():
            yield [first, *self._more.get(ghost_id, ())]

    # -- step two -------------------------------------------------------------------------------

    def finish(
        self,
        looks: Mapping[tuple[MountHandle, bytes], Look],
        found: Mapping[Place, Found] = MappingProxyType({}),
    ) -> Plan:
        """The plan, given what stands at the old names, and what the hidden ones lead to."""
        owned = self._ownership if self._ownership.needed else None
        for opening, link in self._links.resolve(found):
            if isinstance(link, PlanError):
                number = id_in_images(opening.file.id)
                self.refuse(f"{text(opening.file.name)} (file id {number})", link, [number])
            elif isinstance(link, ShmGhost):
                self._openings[opening.file.id] = opening
                self._plan.devshm.add(link.id)
                if self._first.setdefault(link.id, opening) is not opening:
                    self._more.setdefault(link.id, []).append(opening)
            else:
                self._openings[opening.file.id] = opening
                self._plan.links[link.linked.id] = link
                if owned is not None:
                    owned.note(opening.mount, link.mount)
        for openings in self._by_ghost():
            try:
                self._place(openings, looks)
                if owned is not None:
                    owned.settle(openings)
            except GhostpoolError as error:
                names = ", ".join(sorted({text(o.file.name) for o in openings}))
                self.refuse(names, error, [o.file.id for o in openings])
        self._first.clear()
        self._note_owners()
        if not self._plan.refusals:
            self._assign(looks)
            self._note_strategies()
        return self._plan

    def _note_owners(self) -> None:
        for index, error in self._ownership.choose():
            labels = {n.target.label for n in self._namespaces.values() if n.target.index == index}
            self.refuse(labels.pop(), error)
        self._plan.warnings += notes(self._plan)

    def _note_strategies(self) -> None:
        self._plan.warnings += [
            f"{planned.label}: its read-only flag is locked; old names are made through a private "
            f"clone of {planned.lender}, and it stays as it is"
            for planned in self._plan.mounts.values()
            if planned.lender is not None
        ]
        if self._plan.strategy != "detached":
            return
        leased = self._plan.leased
        self._plan.warnings += [
            f"{planned.label}: no private clone can be made of it, so it is made writable itself"
            for planned in self._plan.mounts.values()
            if planned.handle in leased
        ]

    def _spot(self, opening: Opening, looks: Mapping[tuple[MountHandle, bytes], Look]) -> _Spot:
        """What was seen at an opening's directory; worked out once for all names there."""
        mount, directory = opening.mount, opening.directory
        key = mount.handle, directory
        spot = self._spots.get(key)
        if spot is not None:
            return spot
        look = looks[key]
        if look.errno:
            where = join(mount.mount.mountpoint, directory)
            if look.errno == errno.EXDEV:
                raise Overmounted(f"{text(where)} is hidden by another mount")
            if look.errno == errno.ELOOP:
                raise PlanError(f"{text(where)} leads through a symbolic link now")
            raise PlanError(f"{text(where)}: {os.strerror(look.errno)}")
        components = directory.split(b"/") if directory else []
        existing = b"/".join(components[: look.existing])
        spot = _Spot(
            existing=existing,
            missing=tuple(components[look.existing :]),
            place=join(mount.root, existing),
            group=(look.device, look.inode),
            taken=dict(
                zip(
                    _names_of(self._wanted[key]),
                    zip(look.taken, look.taken_alternative, strict=True),
                    strict=True,
                )
            )
            if any(look.taken) or any(look.taken_alternative)
            else {},
        )
        self._spots[key] = spot
        return spot

    def _names(self, opening: Opening, spot: _Spot) -> tuple[bytes, ...] | None:
        """The names to open by, if they are not the usual ones, since something has the first."""
        if not spot.taken and not self._policy.keep:
            return None
        name = opening.name
        taken, taken_alternative = spot.taken.get(name, (False, False))
        alternative = name + ALTERNATIVE
        if self._policy.keep:
            # Kept names collide among themselves, too.
            own = opening.ghost.id
            key = (opening.mount.mount.device, join(opening.mount.root, opening.directory))
            taken |= self._used.get((*key, name), own) != own
            taken_alternative |= self._used.get((*key, alternative), own) != own
            self._used[(*key, alternative if taken else name)] = own
        if not taken:
            return None
        if taken_alternative or alternative not in usual_names(name):
            raise PlanError("its name is taken by a living file, and so is the name beside it")
        self._plan.warnings.append(
            f"{text(opening.file.name)}: the name is taken by a living file, which is not "
            f"touched; the ghost is opened as {text(alternative)}"
        )
        return (alternative,)

    def _common_root(self, openings: Sequence[Opening]) -> bytes | None:
        """The deepest of the mounts' roots, if all the others hold it."""
        roots = {o.mount.root for o in openings}
        deepest = max(roots, key=len)
        return deepest if all(is_below(deepest, root) for root in roots) else None

    def _find_base(self, openings: Sequence[Opening]) -> tuple[Namespace, LiveMount] | None:
        device = openings[0].mount.mount.device
        roots = {o.mount.root for o in openings}
        for namespace in self._namespaces.values():
            for mount in namespace.table:
                if (
                    mount.device == device
                    and not mount.superblock_read_only
                    and not (mount.read_only and namespace.target.is_host)
                    and namespace.table.stack(mount.mountpoint)[-1] == mount
                    and all(is_below(root, mount.root.strip(b"/")) for root in roots)
                ):
                    return namespace, mount
        return None

    def _place(
        self,
        openings: list[Opening],
        looks: Mapping[tuple[MountHandle, bytes], Look],
    ) -> None:
        first, spot, shared = self._first_place(openings, looks)
        directory = spot.existing
        mount = first.mount
        if not shared:
            base = self._find_base(openings)
            if base is None:
                raise UnsupportedError(
                    "its names are on binds of different subtrees, and no mount of the target "
                    "namespaces holds both: " + ", ".join(sorted({o.mount.label for o in openings}))
                )
            mount = self._planned(*base)
            directory = relative_to(spot.place, mount.root)
        final: tuple[bytes, ...] = ()
        parents: tuple[bytes, ...] = ()
        if stat.S_ISDIR(first.ghost.mode):
            final = self._final(first, self._names(first, spot))
            parents = spot.missing
        at = _make_made_at((mount, directory, self._prefix, parents, spot.group))
        at = self._made_at.setdefault(at, at)
        self._plan.ghosts[first.ghost.id] = _make_ghost((first.ghost, at, final))

    def _final(self, opening: Opening, given: tuple[bytes, ...] | None) -> tuple[bytes, ...]:
        """The names that a directory may wait under; `given` are those that its look left over.

        It can have its old one as late as when it is removed (docs/design.md, D-032), so it waits
        under another where a file is to be opened by that one, unless files are opened in it.
        """
        usual = usual_names(opening.name)
        if self._policy.keep:
            return given or usual
        temporary = b"%s%x" % (self._prefix, opening.ghost.id)
        if self._in_the_way is None:
            self._in_the_way = self._names_of_files() - self._names_of_parents()
        at = (opening.mount.mount.device, join(opening.mount.root, opening.directory))
        if (at[0], join(at[1], opening.name)) in self._in_the_way:
            return (*usual[1:], temporary, opening.name)
        return (*usual, temporary)

    def _names_of_files(self) -> set[tuple[int, bytes]]:
        return {
            (o.mount.mount.device, join(join(o.mount.root, o.directory), o.name))
            for openings in self._wanted.values()
            for o in openings
            if not stat.S_ISDIR(o.ghost.mode)
        }

    def _names_of_parents(self) -> set[tuple[int, bytes]]:
        parents: set[tuple[int, bytes]] = set()
        for handle, directory in self._wanted:
            planned = self._plan.mounts[handle]
            at = (planned.mount.device, join(planned.root, directory))
            while at[1] and at not in parents:
                parents.add(at)
                at = (at[0], at[1].rpartition(b"/")[0])
        return parents

    def _first_place(
        self, openings: Sequence[Opening], looks: Mapping[tuple[MountHandle, bytes], Look]
    ) -> tuple[Opening, _Spot, bool]:
        """The first open, in the order of the records, whose directory all mounts can see.

        False with the very first one: no mount's subtree holds those of the others.
        """
        if len(openings) == 1:
            return openings[0], self._spot(openings[0], looks), True
        devices = {o.mount.mount.device for o in openings}
        if len(devices) > 1:
            raise PlanError(
                "its names are on different superblocks now: "
                + ", ".join(sorted({o.mount.label for o in openings}))
            )
        root = self._common_root(openings)
        for opening in openings:
            spot = self._spot(opening, looks)
            if root is None or is_below(spot.place, root):
                return opening, spot, root is not None
        # None of the names lies in the deepest mount's subtree but that mount's own.
        raise UnsupportedError("no directory that exists is visible through all of its mounts")

    def _assign(self, looks: Mapping[tuple[MountHandle, bytes], Look]) -> None:
        """Give each open to one task: the lowest pid that holds it, as CRIU chooses the master."""
        placed = self._plan.placed
        done: set[int] = set()  # tables whose opens have been given away
        for task in sorted(self._images.tasks, key=lambda task: task.pid):
            opens: list[PlannedOpen] = []
            keys = self._keys.of_task(task)
            rows = () if id(task.descriptors) in done else task.descriptors
            done.add(id(task.descriptors))
            for reg in chain((d.reg_id for d in rows), (k.reg_id for k in keys)):
                opening = self._openings.pop(reg, None)
                if opening is not None:
                    try:
                        opens.append(self._plan_open(opening, placed[opening.ghost.id], looks))
                    except GhostpoolError as error:
                        self.refuse(text(opening.file.name), error, [opening.file.id])
            leases = self._plan.leases_for(opens)
            self._plan.tasks.append(PlannedTask(task, tuple(opens), tuple(sorted(leases)), keys))

    def _plan_open(
        self,
        opening: Opening,
        placed: PlannedGhost | PlannedLink,
        looks: Mapping[tuple[MountHandle, bytes], Look],
    ) -> PlannedOpen:
        spot = self._spot(opening, looks)
        mount = opening.mount
        if placed.mount is mount or is_below(placed.place, mount.root):
            detached = self._plan.strategy_of(mount) == "detached" or mount.private
            link = mount.service if detached else self._made_writable_for(mount)
            link_root = mount.root
        else:
            link, link_root = placed.mount.service, placed.mount.root
        given = placed.final or self._names(opening, spot)
        by = _make_linked_by((link, link_root, len(spot.missing), spot.group))
        return _make_open((opening, self._linked_by.setdefault(by, by), given))

    def _made_writable_for(self, mount: PlannedMount) -> MountHandle:
        """The mount that takes names for this one: one that shows the same, in a pod.

        What two containers have of one volume is two mounts, of which one becomes writable.
        """
        if (
            not self._policy.one_lease
            or not mount.read_only
            or not mount.clone
            or mount.idmap is not None
        ):
            return mount.handle
        same = mount.fsid, mount.mount.device, mount.root, mount.namespace.target.ids
        return self._shows_same.setdefault(same, mount.handle)


def _names_of(openings: list[Opening]) -> tuple[bytes, ...]:
    """The different old names of one directory."""
    return tuple(dict.fromkeys(opening.name for opening in openings))
