"""The values that make up a plan. Frozen but for what the survey still finds out of a mount."""

from __future__ import annotations

import stat
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ghostpool._errors import (
    GhostpoolError,
    HostNamespace,
    MountNotFound,
    Overmounted,
    PlanError,
    ReadOnlySuperblock,
    UnsupportedError,
)
from ghostpool._match import Namespace
from ghostpool._model import (
    FifoData,
    Ghost,
    GhostId,
    Images,
    Linked,
    MountHandle,
    RegFile,
    RegId,
    Socket,
    Task,
    service_of,
)
from ghostpool._mountinfo import LiveMount
from ghostpool._paths import join, text
from ghostpool._pipelimit import pipe_limit
from ghostpool._protocol import Found
from ghostpool._targets import Target
from ghostpool._userns import IdMaps

Strategy = Literal["remount", "detached"]
"""How a task's read-only mount takes the old name of a ghost: it is made writable for that long, or
the name is made through its private writable clone and only opened through the mount itself."""

OnError = Literal["refuse", "skip"]
"""What comes of files that can not be restored: all is refused, or they are left out."""

Overmounts = Literal["refuse", "private"]
"""What becomes of ghosts on a mount that another one hides: they are refused, or restored through
what somebody holds of it, or else through a private copy of its namespace."""

Files = Literal["held", "kept", "discarded"]
"""What becomes of a file that was opened: its descriptor is held for whoever takes it; or the file
stays by name, for nobody in particular; or it was only to be opened."""


ALTERNATIVE = b".cr_link"
"""What CRIU appends to an old name that something else has taken."""
_NAME_MAX = 255


class Policy(NamedTuple):
    """What the operator allows and wants."""

    allow_devices: bool = False
    allow_setuid: bool = False
    keep: bool = False
    """Leave the files linked at their old names."""
    consume_link_remaps: bool = False
    """Take the hidden names of link remaps away when all is restored."""
    own_owner: bool = False
    """Give every ghost to the restoring user: for user namespaces that map one id."""
    strategy: Strategy = "remount"
    one_lease: bool = False
    """Of several mounts that show the same, one becomes writable for all."""
    on_error: OnError = "refuse"
    overmounted: Overmounts = "refuse"
    mapped: Callable[[int, int], bool] = lambda uid, gid: True
    """Whether this process's user namespace has such an owner."""
    pipe_limit: Callable[[], int] = pipe_limit
    """The largest buffer of a pipe."""


@dataclass(eq=False, repr=False, slots=True)
class PlannedMount:
    """A live mount that the restore works on."""

    handle: MountHandle
    namespace: Namespace
    mount: LiveMount
    clone: bool
    """A writable private clone serves for creating and cleaning: the mount is read-only. False
    for a read-only mount of which none can be made: then its own lease serves."""
    private: bool = False
    """It is hidden: names are made through its clone, whatever the strategy."""
    fsid: int = 0
    """Number of its file system, found by the survey; see MountFacts."""
    idmap: IdMaps | None = None
    """Of an idmapped mount: ids on its file system to ids that it shows; found by the survey."""
    lender: str | None = None
    """Its read-only flag is locked: the mount that lends the service side, for messages."""
    lent_in: Target | None = None
    """The target where that mount is; None: there is none, or it is in our own namespace."""
    root: bytes = field(init=False)
    """What of the file system is mounted: a path inside it."""
    read_only: bool = field(init=False)
    """The mount's own flag."""
    _service: MountHandle = field(init=False)

    def __post_init__(self) -> None:
        # Asked for once per ghost and more.
        self.root = self.mount.root.strip(b"/")
        self.read_only = self.mount.read_only
        self._service = service_of(self.handle)

    @property
    def service(self) -> MountHandle:
        """The side for creating and cleaning."""
        return self._service if self.clone else self.handle

    @property
    def service_idmap(self) -> IdMaps | None:
        """As `idmap`, of that side."""
        return self.idmap if self.lender is None else None

    @property
    def label(self) -> str:
        """For messages."""
        return f"{text(self.mount.mountpoint)} in {self.namespace.target.label}"


class OpenedAt(NamedTuple):
    """Where a reg file lives now and how it is opened: held once for all that are alike."""

    mount: PlannedMount
    directory: bytes
    flags: int
    fifo: bool


class Opening(NamedTuple):
    """One open of a ghost: a reg file of the images and where it lives now."""

    file: RegFile
    ghost: Ghost | Linked
    """What is opened: `Linked` for the file of a link remap."""
    at: OpenedAt

    @property
    def mount(self) -> PlannedMount:
        """The live mount."""
        return self.at.mount

    @property
    def directory(self) -> bytes:
        """Of the old name, relative to the mount's root."""
        return self.at.directory

    @property
    def flags(self) -> int:
        """Of open(2)."""
        return self.at.flags

    @property
    def fifo(self) -> bool:
        """It was opened as a fifo."""
        return self.at.fifo

    @property
    def name(self) -> bytes:
        """The old name in `directory`."""
        return self.file.name.rpartition(b"/")[2]


class MadeAt(NamedTuple):
    """Where ghosts are made: held once for all that are alike."""

    mount: PlannedMount
    directory: bytes
    prefix: bytes
    """What all temporary names of the run begin with."""
    parents: tuple[bytes, ...]
    group: tuple[int, int]


class PlannedGhost(NamedTuple):
    """Where a ghost is made, and under which name it waits for its opens."""

    ghost: Ghost
    at: MadeAt
    final: tuple[bytes, ...]
    """A directory ghost only: the names that it may be moved to at once, the first that is free."""

    @property
    def mount(self) -> PlannedMount:
        """The live mount, by whose service side it is made."""
        return self.at.mount

    @property
    def directory(self) -> bytes:
        """Existing, relative to the mount's root."""
        return self.at.directory

    @property
    def parents(self) -> tuple[bytes, ...]:
        """A directory ghost only: what is missing between `directory` and the old name."""
        return self.at.parents

    @property
    def group(self) -> tuple[int, int]:
        """Identity of `directory`: all work in one directory is one worker's."""
        return self.at.group

    @property
    def name(self) -> bytes:
        """The temporary one."""
        return b"%s%x" % (self.at.prefix, self.ghost.id)

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
        """A directory ghost only: components above its name, inside the file system and not from
        the root of whichever bind. Outer directories have fewer."""
        return len([c for c in join(self.mount.root, self.final_directory).split(b"/") if c])

    @property
    def wanted(self) -> tuple[bytes, ...]:
        """A directory ghost only: of its `final` names, those to go by, best first."""
        return tuple(sorted((name for name in self.final if name != self.name), key=len))

    @property
    def times_ns(self) -> tuple[int, int] | None:
        """Access and modification time in nanoseconds, if the image has them."""
        if self.ghost.atime is None or self.ghost.mtime is None:
            return None
        return self.ghost.atime * 1000, self.ghost.mtime * 1000


class PlannedLink(NamedTuple):
    """A hidden name, by which the file of a link remap is linked to its old name."""

    linked: Linked
    mount: PlannedMount
    """The live mount that its reg file is opened on."""
    directory: bytes
    """Relative to the mount's root."""
    found: Found
    """The file, as it was found."""

    @property
    def final(self) -> tuple[bytes, ...]:
        """It is moved nowhere."""
        return ()

    @property
    def name(self) -> bytes:
        """The hidden one."""
        return self.linked.hidden.rpartition(b"/")[2]

    @property
    def place(self) -> bytes:
        """`directory` inside the file system."""
        return join(self.mount.root, self.directory)


class LinkedBy(NamedTuple):
    """How old names are made: held once for all that are alike."""

    link: MountHandle
    root: bytes
    missing: int
    group: tuple[int, int]


class PlannedOpen(NamedTuple):
    """How one open is done."""

    opening: Opening
    by: LinkedBy
    given: tuple[bytes, ...] | None = None
    """The names it may be opened by, if they are not the usual ones."""

    @property
    def link(self) -> MountHandle:
        """Mount through which the old name is made: the task's own (leased), or a service clone."""
        return self.by.link

    @property
    def link_root(self) -> bytes:
        """Root of that mount inside the file system."""
        return self.by.root

    @property
    def missing(self) -> int:
        """How many components of the directory are missing now."""
        return self.by.missing

    @property
    def group(self) -> tuple[int, int]:
        """Identity of the directory that it happens in: all work there is one worker's."""
        return self.by.group

    @property
    def names(self) -> tuple[bytes, ...]:
        """The names it may be opened by, the first of them that nothing else has by then."""
        return usual_names(self.opening.name) if self.given is None else self.given


def usual_names(name: bytes) -> tuple[bytes, ...]:
    """The old name, and what to use instead if something has it."""
    alternative = name + ALTERNATIVE
    return (name, alternative) if len(alternative) <= _NAME_MAX else (name,)


def is_moved(ghost: Ghost | Linked, *, shared: bool) -> bool:
    """Whether an open moves the ghost to its old name: nobody else opens it.

    Directories are moved before.
    """
    return not shared and not stat.S_ISDIR(ghost.mode)


class PlannedKey(NamedTuple):
    """A ghost that a task holds in another way than by a descriptor."""

    key: str
    """cwd, root, exe or map:<start>-<end> (hex, as in /proc/PID/maps)."""
    number: int
    """One that no descriptor of the task has: where its command finds the file."""
    reg_id: RegId
    """Of the open that it gets."""


class PlannedTask(NamedTuple):
    """A task, the opens that it does for itself and others, and the leases it needs for them."""

    task: Task
    opens: tuple[PlannedOpen, ...]
    leases: tuple[MountHandle, ...]
    """Mounts that are writable for it, while it is brought up."""
    keys: tuple[PlannedKey, ...] = ()
    """What it holds besides its descriptors."""

    @property
    def held(self) -> Iterator[RegId]:
        """The open of each number and key; several may have one."""
        for descriptor in self.task.descriptors:
            yield descriptor.reg_id
        for key in self.keys:
            yield key.reg_id


class Refusal(NamedTuple):
    """Why something can not be restored."""

    subject: str
    error: GhostpoolError
    files: tuple[RegId, ...] = ()
    """Ids of the open files of the images without which the rest could be restored; none: it is
    about more than single files."""

    def __str__(self) -> str:
        return f"{self.subject}: {self.error}"


class Privileged(NamedTuple):
    """A ghost that could give somebody more than he has, whether it is allowed or not."""

    file: str
    """The image that describes it."""
    name: str
    """One of its old names, for people."""
    kinds: tuple[str, ...]
    """Of "setuid", "setgid", "char device MAJOR:MINOR", "block device MAJOR:MINOR"."""
    allowed: bool
    """Every option that it needs was given."""

    def __str__(self) -> str:
        kinds = " and ".join(self.kinds)
        return f"{self.name}: {kinds}, {'allowed' if self.allowed else 'refused'}"


@dataclass(eq=False, repr=False, slots=True)
class Plan:
    """Everything that a restore will do."""

    images: Images
    token: bytes
    """Random part of the temporary names; it names the run."""
    strategy: Strategy = "remount"
    mounts: dict[MountHandle, PlannedMount] = field(default_factory=dict)
    ghosts: dict[GhostId, PlannedGhost] = field(default_factory=dict)
    fifos: dict[GhostId, FifoData] = field(default_factory=dict)
    """What waited in ghost fifos, and is put back; with a size of the pipe that it can have."""
    links: dict[GhostId, PlannedLink] = field(default_factory=dict)
    """Files of link remaps, which are opened like ghosts that are there already."""
    devshm: set[GhostId] = field(default_factory=set)
    """Those of `ghosts` whose content is in the archive of /dev/shm."""
    owners: dict[GhostId, tuple[int, int]] = field(default_factory=dict)
    """Who is made owner, of ghosts whose ids are others where they are made; see _ownership."""
    acting: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By target: whom workers make files as, where it can not be ghostpool's user."""
    sockets: dict[RegId, Socket] = field(default_factory=dict)
    """UNIX sockets that are bound anew."""
    tasks: list[PlannedTask] = field(default_factory=list)
    privileged: list[Privileged] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    skipped: list[Refusal] = field(default_factory=list)
    """What is not restored, because `on_error` is "skip"; `images` are without it."""
    warnings: list[str] = field(default_factory=list)

    @property
    def opens(self) -> list[PlannedOpen]:
        """All opens of all tasks."""
        return [planned for task in self.tasks for planned in task.opens]

    @property
    def placed(self) -> Mapping[GhostId, PlannedGhost | PlannedLink]:
        """What is opened, and where it waits for that."""
        # Each has keys of its own.
        return ChainMap[GhostId, Any](self.ghosts, self.links) if self.links else self.ghosts

    @property
    def leased(self) -> set[MountHandle]:
        """Mounts that will be made writable in their tasks' own view."""
        return {*self.service_leases, *(handle for task in self.tasks for handle in task.leases)}

    @property
    def service_leases(self) -> list[MountHandle]:
        """Mounts leased from the first change to the last, since no clone of them can be made."""
        return [p.handle for p in self.mounts.values() if p.read_only and not p.clone]

    def strategy_of(self, mount: PlannedMount) -> Strategy | None:
        """How the mount is worked on; None where it is writable already."""
        if not mount.read_only:
            return None
        wanted = self.strategy == "detached" or mount.lender is not None or mount.private
        return "detached" if wanted and mount.clone else "remount"

    def leases_for(self, opens: Iterable[PlannedOpen]) -> set[MountHandle]:
        """The mounts that must be writable for these opens, in their own namespaces' view."""
        return {
            planned.link
            for planned in opens
            if planned.link in self.mounts
            and self.mounts[planned.link].read_only
            and not stat.S_ISDIR(planned.opening.ghost.mode)
        }

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
