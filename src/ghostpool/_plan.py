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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ghostpool._buildspec import SHARED_BY_KERNEL
from ghostpool._errors import (
    GhostpoolError,
    HostNamespace,
    MountNotFound,
    Overmounted,
    PlanError,
    ReadOnlySuperblock,
    UnsupportedError,
)
from ghostpool._linux import Attr
from ghostpool._match import Matcher, Namespace, Site
from ghostpool._model import (
    Ghost,
    GhostId,
    Images,
    MountHandle,
    NsId,
    RegFile,
    RegId,
    Remap,
    Task,
    service_of,
)
from ghostpool._mountinfo import LiveMount
from ghostpool._paths import is_below, join, relative_to, text
from ghostpool._protocol import Look

ALTERNATIVE = b".cr_link"
"""What CRIU appends to an old name that something else has taken."""
_NAME_MAX = 255
_TMPFILE_BIT = os.O_TMPFILE & ~os.O_DIRECTORY
_DROPPED_FLAGS = os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOCTTY | os.O_CLOEXEC
_MOST_EXTENTS = 250_000
"""What fits one request to a worker; 1 GiB of which every other block is a hole has as many."""
# Python says 0 on 64-bit machines, but fdinfo shows the kernel's own value there.
_O_LARGEFILE = {"x86_64": 0o100000, "aarch64": 0o400000}.get(os.uname().machine, 0o100000)
_KNOWN_FLAGS = (
    os.O_ACCMODE
    | os.O_APPEND
    | os.O_NONBLOCK
    | os.O_SYNC
    | os.O_ASYNC
    | os.O_DIRECT
    | os.O_LARGEFILE
    | _O_LARGEFILE
    | os.O_DIRECTORY
    | os.O_NOFOLLOW
    | os.O_NOATIME
    | os.O_PATH
)


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator allows and wants."""

    allow_devices: bool = False
    allow_setuid: bool = False
    keep: bool = False
    """Leave the files linked at their old names."""
    own_owner: bool = False
    """Give every ghost to the restoring user: for user namespaces that map one id."""
    mapped: Callable[[int, int], bool] = lambda uid, gid: True
    """Whether this process's user namespace has such an owner."""


@dataclass(eq=False, slots=True)
class PlannedMount:
    """A live mount that the restore works on."""

    handle: MountHandle
    namespace: Namespace
    mount: LiveMount
    clone: bool
    """A writable private clone serves for creating and cleaning: the mount is read-only. False
    for a read-only mount of which none can be made: then its own lease serves."""

    @property
    def service(self) -> MountHandle:
        """The side for creating and cleaning."""
        return service_of(self.handle) if self.clone else self.handle

    @property
    def root(self) -> bytes:
        """What of the file system is mounted: a path inside it."""
        return self.mount.root.strip(b"/")

    @property
    def label(self) -> str:
        """For messages."""
        return f"{text(self.mount.mountpoint)} in {self.namespace.target.label}"


@dataclass(frozen=True, slots=True)
class Opening:
    """One open of a ghost: a reg file of the images and where it lives now."""

    file: RegFile
    ghost: Ghost
    mount: PlannedMount
    site: Site
    flags: int
    fifo: bool


@dataclass(frozen=True, slots=True)
class PlannedGhost:
    """Where a ghost is made, and under which name it waits for its opens."""

    ghost: Ghost
    mount: PlannedMount
    directory: bytes
    """Existing, relative to the mount's root."""
    name: bytes
    parents: tuple[bytes, ...]
    final: tuple[bytes, ...]
    """A directory ghost only: the old name, to which it is moved at once."""
    group: tuple[int, int]
    """Identity of `directory`: all work in one directory is one worker's."""

    @property
    def place(self) -> bytes:
        """`directory` inside the file system."""
        return join(self.mount.root, self.directory)

    @property
    def final_directory(self) -> bytes:
        """A directory ghost only: where it is moved to, relative to the mount's root."""
        return join(self.directory, b"/".join(self.parents))

    @property
    def depth(self) -> int:
        """Components above the final name: outer directories have a smaller one."""
        return len([c for c in self.final_directory.split(b"/") if c])

    @property
    def times_ns(self) -> tuple[int, int] | None:
        """Access and modification time in nanoseconds, if the image has them."""
        if self.ghost.atime is None or self.ghost.mtime is None:
            return None
        return self.ghost.atime * 1000, self.ghost.mtime * 1000


@dataclass(frozen=True, slots=True)
class PlannedOpen:
    """How one open is done."""

    opening: Opening
    link: MountHandle
    """Mount through which the old name is made: the task's own (leased), or a service clone."""
    link_root: bytes
    """Root of that mount inside the file system."""
    names: tuple[bytes, ...]
    missing: int
    """How many components of the directory are missing now."""
    group: tuple[int, int]


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """A task, the opens that it does for itself and others, and the leases it needs for them."""

    task: Task
    opens: tuple[PlannedOpen, ...]
    leases: tuple[MountHandle, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why something can not be restored."""

    subject: str
    error: GhostpoolError

    def __str__(self) -> str:
        return f"{self.subject}: {self.error}"


@dataclass(slots=True)
class Plan:
    """Everything that a restore will do."""

    images: Images
    mounts: dict[MountHandle, PlannedMount] = field(default_factory=dict)
    ghosts: dict[GhostId, PlannedGhost] = field(default_factory=dict)
    tasks: list[PlannedTask] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def opens(self) -> list[PlannedOpen]:
        """All opens of all tasks."""
        return [planned for task in self.tasks for planned in task.opens]

    @property
    def leased(self) -> set[MountHandle]:
        """Mounts that will be made writable in their tasks' own view."""
        return {*self.service_leases, *(handle for task in self.tasks for handle in task.leases)}

    @property
    def service_leases(self) -> list[MountHandle]:
        """Mounts leased from the first change to the last, since no clone of them can be made."""
        return [p.handle for p in self.mounts.values() if p.mount.read_only and not p.clone]

    def check(self) -> None:
        """Raise the first refusal, if there is one."""
        if self.refusals:
            first = self.refusals[0]
            more = len(self.refusals) - 1
            note = f" (and {more} more: see ghostpool plan)" if more else ""
            raise type_of(first.error)(f"refused: {first}{note}") from first.error


def type_of(error: GhostpoolError) -> type[PlanError]:
    """The class to raise a refusal as: its own where a message alone makes one."""
    simple = (
        UnsupportedError,
        MountNotFound,
        Overmounted,
        ReadOnlySuperblock,
        HostNamespace,
    )
    return next((kind for kind in simple if isinstance(error, kind)), PlanError)


class Planner:
    """Makes a plan in two steps, with a look at the live old names between them.

    `mounts` after construction says which mounts to open; `looks` which directories to look at;
    `finish` takes what was seen there.
    """

    def __init__(
        self, images: Images, namespaces: Mapping[NsId, Namespace], policy: Policy, token: bytes
    ) -> None:
        self._plan = Plan(images)
        self._images = images
        self._namespaces = namespaces
        self._policy = policy
        self._token = token
        self._matcher = Matcher(images, namespaces)
        self._handles: dict[tuple[int, int], PlannedMount] = {}
        self._openings: dict[RegId, Opening] = {}
        self._by_ghost: dict[GhostId, list[Opening]] = {}
        self._wanted: dict[tuple[MountHandle, bytes], dict[bytes, int]] = {}
        self._used: dict[tuple[int, bytes, bytes], GhostId] = {}
        self._collect()

    # -- step one -------------------------------------------------------------------------------

    @property
    def mounts(self) -> list[PlannedMount]:
        """The live mounts that the plan rests on."""
        return list(self._plan.mounts.values())

    @property
    def looks(self) -> dict[tuple[MountHandle, bytes], tuple[bytes, ...]]:
        """Directories to look at (mount, path inside it), with the names wanted in each."""
        return {key: tuple(names) for key, names in self._wanted.items()}

    def refuse(self, subject: str, error: GhostpoolError) -> None:
        """Note why something can not be restored."""
        self._plan.refusals.append(Refusal(subject, error))

    def _collect(self) -> None:
        held: dict[RegId, tuple[Task, bool]] = {}
        for task in self._images.tasks:
            for descriptor in task.descriptors:
                held.setdefault(descriptor.reg_id, (task, descriptor.fifo))
        if self._images.own_user_namespace:
            self.refuse(
                self._images.directory,
                UnsupportedError(
                    "dumped in a user namespace of its own, whose ids are not translated yet"
                ),
            )
        for remap in self._images.remaps:
            file = self._images.files[remap.origin]
            subject = f"{text(file.name)} (file id {file.id})"
            try:
                self._collect_one(remap, file, held)
            except GhostpoolError as error:
                self.refuse(subject, error)
        remapped = {remap.origin for remap in self._images.remaps if remap.kind != "procfs"}
        for task in self._images.tasks:
            for holder in task.holders:
                if holder.reg_id in remapped:
                    self.refuse(
                        text(self._images.files[holder.reg_id].name),
                        UnsupportedError(
                            f"held by task {task.pid} as {holder.key}, which can not be "
                            "restored yet"
                        ),
                    )
        self._plan.warnings += [
            f"{text(name)}: a bound UNIX socket whose name is gone is not restored yet"
            for name in self._images.deleted_sockets
        ]

    def _collect_one(
        self, remap: Remap, file: RegFile, held: Mapping[RegId, tuple[Task, bool]]
    ) -> None:
        if remap.kind == "procfs":
            self._plan.warnings.append(
                f"{text(file.name)}: a file of a dead process in /proc is left alone"
            )
            return
        if remap.kind == "linked":
            raise UnsupportedError("a link remap, which can not be restored yet")
        ghost = self._images.ghosts[GhostId(remap.target)]
        if file.id not in held:
            # By an inotify mark or a message in flight; or the image that says so was cut.
            if all(holder.reg_id != file.id for t in self._images.tasks for holder in t.holders):
                raise UnsupportedError(
                    "nothing that ghostpool knows of holds it (a mark of inotify or fanotify, a "
                    "message in flight), or an fdinfo image is cut"
                )
            return  # refused by the name of what holds it
        self._check_kind(ghost)
        if file.mode is not None and file.mode != ghost.mode:
            raise PlanError(
                f"files.img says mode {file.mode:o}, {ghost.file} says {ghost.mode:o}: "
                "the images contradict each other"
            )
        site = self._matcher.site(file)
        fifo = held[file.id][1]
        flags = self._flags(file, ghost, site.mount)
        self._check_mount(site)
        pending = self._images.pending_fifo_bytes.get(file.id, 0)
        if pending:
            self._plan.warnings.append(
                f"{text(file.name)}: {pending} bytes that waited in the fifo are not restored yet"
            )
        opening = Opening(file, ghost, self._planned_mount(site), site, flags, fifo)
        self._openings[file.id] = opening
        names = self._wanted.setdefault((opening.mount.handle, site.directory), {})
        names.setdefault(site.name, len(names))
        self._by_ghost.setdefault(ghost.id, []).append(opening)

    def _check_kind(self, ghost: Ghost) -> None:
        kind = stat.S_IFMT(ghost.mode)
        if kind in (stat.S_IFCHR, stat.S_IFBLK) and not self._policy.allow_devices:
            rdev = ghost.rdev or 0
            raise PlanError(
                f"a device ({os.major(rdev)}:{os.minor(rdev)}), refused without --allow-devices"
            )
        setuid = ghost.mode & (stat.S_ISUID | stat.S_ISGID)
        if setuid and not self._policy.allow_setuid:
            raise PlanError(
                f"a setuid or setgid file (mode {stat.S_IMODE(ghost.mode):04o}), refused "
                "without --allow-setuid"
            )
        if len(ghost.extents) > _MOST_EXTENTS:
            raise PlanError(
                f"{len(ghost.extents)} pieces of content, more than {_MOST_EXTENTS} in one file"
            )
        if not self._policy.own_owner and not self._policy.mapped(ghost.uid, ghost.gid):
            raise PlanError(
                f"its owner {ghost.uid}:{ghost.gid} does not exist in this user namespace"
            )

    def _flags(self, file: RegFile, ghost: Ghost, mount: LiveMount) -> int:
        flags = file.flags & ~_DROPPED_FLAGS
        if flags & _TMPFILE_BIT:
            # The file is opened by a name now. O_DIRECTORY is part of O_TMPFILE, but only then.
            flags &= ~os.O_TMPFILE
        unknown = flags & ~_KNOWN_FLAGS
        if unknown:
            raise UnsupportedError(f"open flags {unknown:#o} are not known")
        if flags & os.O_PATH:
            return flags & (os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY)
        kind = stat.S_IFMT(ghost.mode)
        if kind == stat.S_IFLNK:
            raise PlanError("a symbolic link that was not opened with O_PATH")
        if kind in (stat.S_IFCHR, stat.S_IFBLK) and mount.attributes & Attr.NODEV:
            raise PlanError(f"a device on {text(mount.mountpoint)}, which is nodev now")
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        if kind == stat.S_IFREG and writes and mount.read_only:
            # The open would succeed during the lease and then keep the mount from going back.
            raise PlanError(
                f"open for writing, but {text(mount.mountpoint)} is read-only now: it could "
                "not be made read-only again while the file is open"
            )
        return flags

    def _check_mount(self, site: Site) -> None:
        mount, target = site.mount, site.namespace.target
        where = f"{text(mount.mountpoint)} in {target.label}"
        if mount.superblock_read_only:
            raise ReadOnlySuperblock(
                f"the superblock of {where} ({mount.fstype}) is read-only, so nothing can be "
                "created on it through any mount"
            )
        if target.enter is None and mount.fstype in SHARED_BY_KERNEL:
            raise UnsupportedError(
                f"{where} is the machine's own {mount.fstype}, which a rebuilt namespace only "
                "borrows: nothing is created on it"
            )
        if mount.read_only and target.is_host:
            raise HostNamespace(
                f"{where} is read-only and belongs to the host's mount namespace, which is "
                "never remounted: run the restore in a container's namespace, or remount it "
                "yourself"
            )
        if mount.root.endswith(b"//deleted"):
            raise MountNotFound(f"the directory that was mounted on {where} has been removed")

    def _planned_mount(self, site: Site) -> PlannedMount:
        return self._planned(site.namespace, site.mount)

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
        for openings in self._by_ghost.values():
            if self._common_root(openings) is None:
                base = self._find_base(openings)
                if base is not None:
                    self._planned(*base)

    # -- step two -------------------------------------------------------------------------------

    def finish(self, looks: Mapping[tuple[MountHandle, bytes], Look]) -> Plan:
        """The plan, given what stands at the old names."""
        for ghost_id, openings in self._by_ghost.items():
            try:
                self._place(ghost_id, openings, looks)
            except GhostpoolError as error:
                names = ", ".join(sorted({text(o.file.name) for o in openings}))
                self.refuse(names, error)
        if not self._plan.refusals:
            self._assign(looks)
        return self._plan

    def _seen(
        self, opening: Opening, looks: Mapping[tuple[MountHandle, bytes], Look]
    ) -> tuple[Look, bool, bool]:
        """The look at an opening's directory, and whether its name and its other one are taken."""
        site = opening.site
        key = (opening.mount.handle, site.directory)
        look = looks[key]
        if look.errno:
            where = join(site.mount.mountpoint, site.directory)
            if look.errno == errno.EXDEV:
                raise Overmounted(f"{text(where)} is hidden by another mount")
            if look.errno == errno.ELOOP:
                raise PlanError(f"{text(where)} leads through a symbolic link now")
            raise PlanError(f"{text(where)}: {os.strerror(look.errno)}")
        number = self._wanted[key][site.name]
        return look, look.taken[number], look.taken_alternative[number]

    def _names(self, opening: Opening, taken: bool, taken_alternative: bool) -> tuple[bytes, ...]:
        """The old name, and what to use instead if something has it."""
        name = opening.site.name
        alternative = name + ALTERNATIVE
        fits = len(alternative) <= _NAME_MAX
        if self._policy.keep:
            # Kept names collide among themselves, too.
            own = opening.ghost.id
            key = (opening.mount.mount.device, opening.site.path)
            taken |= self._used.get((*key, name), own) != own
            taken_alternative |= self._used.get((*key, alternative), own) != own
            self._used[(*key, alternative if taken else name)] = own
        if not taken:
            return (name, alternative) if fits else (name,)
        if taken_alternative or not fits:
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
        ghost_id: GhostId,
        openings: list[Opening],
        looks: Mapping[tuple[MountHandle, bytes], Look],
    ) -> None:
        devices = {o.mount.mount.device for o in openings}
        if len(devices) > 1:
            raise PlanError(
                "its names are on different superblocks now: "
                + ", ".join(sorted({o.mount.label for o in openings}))
            )
        root = self._common_root(openings)
        first, seen = self._first_place(openings, root, looks)
        look = seen[0]
        components = first.site.directory.split(b"/") if first.site.directory else []
        directory = b"/".join(components[: look.existing])
        mount = first.mount
        if root is None:
            base = self._find_base(openings)
            if base is None:
                raise UnsupportedError(
                    "its names are on binds of different subtrees, and no mount of the target "
                    "namespaces holds both: " + ", ".join(sorted({o.mount.label for o in openings}))
                )
            mount = self._planned(*base)
            inside = join(first.mount.root, directory)
            directory = relative_to(inside, mount.root)
        ghost = openings[0].ghost
        final: tuple[bytes, ...] = ()
        parents: tuple[bytes, ...] = ()
        if stat.S_ISDIR(ghost.mode):
            final = self._names(first, *seen[1:])
            parents = tuple(components[look.existing :])
        self._plan.ghosts[ghost_id] = PlannedGhost(
            ghost=ghost,
            mount=mount,
            directory=directory,
            name=b".ghostpool-%s-%x" % (self._token, ghost_id),
            parents=parents,
            final=final,
            group=(look.device, look.inode),
        )

    def _first_place(
        self,
        openings: Sequence[Opening],
        root: bytes | None,
        looks: Mapping[tuple[MountHandle, bytes], Look],
    ) -> tuple[Opening, tuple[Look, bool, bool]]:
        """The first open, in the order of the records, whose directory all mounts can see."""
        for opening in openings:
            seen = self._seen(opening, looks)
            existing = opening.site.directory.split(b"/")[: seen[0].existing]
            path = join(opening.mount.root, b"/".join(existing))
            if root is None or is_below(path, root):
                return opening, seen
        # None of the names lies in the deepest mount's subtree but that mount's own.
        raise UnsupportedError("no directory that exists is visible through all of its mounts")

    def _assign(self, looks: Mapping[tuple[MountHandle, bytes], Look]) -> None:
        """Give each open to one task: the lowest pid that holds it, as CRIU chooses the master."""
        done: set[RegId] = set()
        for task in sorted(self._images.tasks, key=lambda task: task.pid):
            opens: list[PlannedOpen] = []
            for descriptor in task.descriptors:
                opening = self._openings.get(descriptor.reg_id)
                if opening is not None and opening.file.id not in done:
                    done.add(opening.file.id)
                    try:
                        opens.append(self._plan_open(opening, looks))
                    except GhostpoolError as error:
                        self.refuse(text(opening.file.name), error)
            leases = {
                planned.link
                for planned in opens
                if planned.link == planned.opening.mount.handle
                and planned.opening.mount.mount.read_only
                and not self._plan.ghosts[planned.opening.ghost.id].final
            }
            self._plan.tasks.append(PlannedTask(task, tuple(opens), tuple(sorted(leases))))

    def _plan_open(
        self, opening: Opening, looks: Mapping[tuple[MountHandle, bytes], Look]
    ) -> PlannedOpen:
        placed = self._plan.ghosts[opening.ghost.id]
        look, taken, taken_alternative = self._seen(opening, looks)
        own_root = opening.mount.root
        place = join(placed.mount.root, placed.directory)
        if is_below(place, own_root):
            link, link_root = opening.mount.handle, own_root
        else:
            link, link_root = placed.mount.service, placed.mount.root
        components = opening.site.directory.split(b"/") if opening.site.directory else []
        names = placed.final or self._names(opening, taken, taken_alternative)
        return PlannedOpen(
            opening=opening,
            link=link,
            link_root=link_root,
            names=names,
            missing=len(components) - look.existing,
            group=(look.device, look.inode),
        )
