"""What each process of a run may do and holds, as the kernel shows it in /proc while it lives.

The target is a live process in a private copy of the machine's mounts, whose mounts are others
than the machine's own: so a descriptor of the host is known by its mount.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest

from ghostpool import _build, _capabilities, _command, _deliver, _forkserver, _linux, _run
from ghostpool._buildspec import MountSpec, NamespaceSpec, Node, marshal
from ghostpool._capabilities import BUILDER, COMMAND, ENTER, FILLER, GUARDIAN, NEEDED, WORKER, Cap
from ghostpool._errors import WorkerDied
from ghostpool._launch import launch
from ghostpool._planned import Files, Policy
from ghostpool._process import ForkServer
from ghostpool._report import Report
from ghostpool._workerclient import WorkerClient
from ghostpool.testing._forked import in_child
from tests.support.imagewriter import ImageSet
from tests.support.restore import ghostpool, live, make_read_only, mount_tmpfs

pytestmark = [pytest.mark.needs_mount_ns, pytest.mark.anyio]


@pytest.fixture
def anyio_backend() -> str:
    return "trio"


class Sets(NamedTuple):
    """The capability sets of a process."""

    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int


def status_of(pid: int | str) -> dict[str, str]:
    return status_in(Path(f"/proc/{pid}/status").read_text())


def status_in(text: str) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


def sets_in(status: dict[str, str]) -> Sets:
    return Sets(*(int(status[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")))


MINE = sets_in(status_of("self")).permitted


ELSEWHERE = {"bind", "clone_part", "fill", "find", "open_part", "sweep", "uncover"}
"""Requests that other images than these, or other commands, come to."""


class Held(NamedTuple):
    """A process at one moment."""

    request: str
    sets: Sets
    status: dict[str, str]
    descriptors: dict[int, str]
    host: set[str]
    """What of it is on a mount of the machine itself."""


def hold(pid: int, request: str) -> Held:
    status = status_of(pid)
    own = {line.split()[0] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    descriptors = {}
    host = set()
    for number in os.listdir(f"/proc/{pid}/fd"):
        try:
            link = os.readlink(f"/proc/{pid}/fd/{number}")
            info = Path(f"/proc/{pid}/fdinfo/{number}").read_text()
        except FileNotFoundError:
            continue  # closed a moment after its answer was sent
        descriptors[int(number)] = link
        found = re.search(r"mnt_id:\s+(\d+)", info)
        if found is not None and found[1] in own:
            host.add(link)
    return Held(request, sets_in(status), status, descriptors, host)


def make_data() -> None:
    mount_tmpfs(Path("/mnt"))
    for name in ("sub", "other"):
        Path("/mnt", name).mkdir()
    make_read_only(Path("/mnt"))


def make_images(directory: Path, device: bool = False) -> Path:
    images = ImageSet()
    images.mount("/", device=(0, 60))
    images.mount("/mnt", device=(0, 70), flags=0x200001)
    images.task(1)
    images.open(1, 3, "/mnt/sub/file", ghost=images.ghost(b"content", uid=7, gid=8))
    images.open(1, 4, "/mnt/gone/dir", ghost=images.ghost(mode=0o40750, uid=7))
    images.open(1, 5, "/mnt/other/pipe", ghost=images.ghost(mode=0o10666))
    if device:
        null = images.ghost(mode=0o20666, rdev=os.makedev(1, 3))
        images.open(1, 6, "/mnt/sub/null", ghost=null)
    return images.write(directory)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Held]]:
    """Every child by its kind, as it was after each of its answers."""
    seen: dict[str, list[Held]] = {}
    call = WorkerClient.call

    async def watch(self: WorkerClient, request: str, *args: Any, **keywords: Any) -> Any:
        result = await call(self, request, *args, **keywords)
        if request != "finish":
            kind = self.name.split()[0]
            seen.setdefault(kind, []).append(hold(self.child.pid, request))
        return result

    monkeypatch.setattr(WorkerClient, "call", watch)
    return seen


async def restore(images: Path, pid: int, devices: bool = False, files: Files = "held") -> Report:
    report = Report()
    policy = Policy(allow_devices=devices, keep=files == "kept")
    request = _run.Request(
        str(images), 1, tree=pid, policy=policy, consumers=None if files == "held" else "nobody"
    )
    await _run.run_restore(request, launch(), report, _deliver.discard)
    assert report.restored
    return report


# -- Workers and guardian ------------------------------------------------------------------------


async def test_a_worker_has_what_its_request_needs(
    tmp_path: Path, watched: dict[str, list[Held]]
) -> None:
    images = make_images(tmp_path)
    for files in get_args(Files):
        with live(make_data) as target:
            await restore(images, target.pid, files=files)
    workers = watched["worker"]
    assert {held.request for held in workers} >= set(NEEDED) - ELSEWHERE
    for held in workers:
        assert held.sets.permitted == held.sets.bounding == WORKER & MINE, held
        assert held.sets.inheritable == held.sets.ambient == 0
        assert held.sets.effective == NEEDED.get(held.request, 0) & WORKER & MINE, held
        assert held.status["NoNewPrivs"] == "1"
    of = {held.request: held.sets.effective for held in workers}
    for request in ("create", "place", "open", "remove", "look", "open_mounts"):
        assert not of[request] & ENTER
    for request in ("clone", "make_writable", "make_read_only"):
        assert of[request] == Cap.SYS_ADMIN
    for held in watched["guardian"]:
        assert held.sets == Sets(0, GUARDIAN & MINE, 0, (GUARDIAN | Cap.SYS_RESOURCE) & MINE, 0)
        assert held.status["NoNewPrivs"] == "1"


async def test_the_fork_server_has_nothing_in_effect() -> None:
    """But everything to hand on."""
    launched = launch()
    async with ForkServer.running(launched) as server:
        worker = await WorkerClient.forked(server)
        worker.kill()
        held = hold(launched.pid, "")
    assert (held.sets.permitted, held.sets.effective) == (MINE, 0)


async def test_devices_are_made_only_where_they_are_allowed(
    tmp_path: Path, watched: dict[str, list[Held]]
) -> None:
    with live(make_data) as target:
        await restore(make_images(tmp_path, device=True), target.pid, devices=True)
    for held in watched["worker"]:
        assert held.sets.permitted == (WORKER | Cap.MKNOD) & MINE
        assert bool(held.sets.effective & Cap.MKNOD) == (held.request == "create")
    for held in watched["guardian"]:
        assert not held.sets.permitted & Cap.MKNOD


async def test_what_a_worker_holds(tmp_path: Path, watched: dict[str, list[Held]]) -> None:
    """Its socket, namespaces, mounts and directories of the target: of the host nothing but
    /dev/null and its own descriptors' directory. The images are lent while it creates."""
    images = make_images(tmp_path)
    with live(make_data) as target:
        what_becomes_of_them: tuple[Files, ...] = ("held", "discarded", "kept")
        for files in what_becomes_of_them:
            await restore(images, target.pid, files=files)
        namespace = os.readlink(f"/proc/self/fd/{target.fd}")
    phases = set()
    for held in watched["worker"]:
        links = held.descriptors
        assert [links[number] for number in range(3)] == ["/dev/null"] * 3
        own = {link for link in links.values() if re.fullmatch(r"/proc/\d+/fd", link)}
        assert len(own) == 1
        # What goes back with an answer is closed a moment after it was sent.
        sent = {link for link in links.values() if re.fullmatch(r"/proc/\d+/mountinfo", link)}
        assert not sent or held.request == "mountinfo"
        assert held.host <= {"/dev/null", *own, *sent}, held
        sockets = [link for link in links.values() if link.startswith("socket:")]
        assert len(sockets) == 1
        rest = set(links.values()) - {"/dev/null", *own, *sent, *sockets, namespace}
        # Roots of mounts, as their own mount or a clone shows them, and directories in them.
        allowed = {"/mnt", "/", "/sub", "/other", "/mnt/sub", "/mnt/other", "/gone", "/mnt/gone"}
        assert rest <= allowed, held
        phases.add(held.request)
    assert phases >= set(NEEDED) - ELSEWHERE
    for held in watched["guardian"]:
        links = held.descriptors
        rest = {
            link
            for number, link in links.items()
            if number > 2 and not re.fullmatch(r"/proc/\d+/fd", link)
        }
        # Of the host it has the journal besides, and the directory to take that away from.
        journal = {link for link in rest if link.startswith(os.environ["GHOSTPOOL_RUN_DIR"])}
        kinds = {re.sub(r"\[.*\]|:.*", "", link) for link in rest - journal}
        assert len(journal) <= 2
        assert kinds <= {"socket", "mnt", "anon_inode", "pidfd", "/mnt", "/"}, rest


async def test_the_images_are_held_while_creating(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other side of the test above: there they really are not, since here they are."""
    seen: list[str] = []
    send = ForkServer.fork

    async def fork(self: ForkServer, kind: str, *arguments: object, fds: list[int]) -> Any:
        seen.append(kind)
        return await send(self, kind, *arguments, fds=fds)

    call = WorkerClient.call
    lent: list[str] = []

    async def watch(self: WorkerClient, request: str, *args: Any, **keywords: Any) -> Any:
        lent.extend([request] * len(list(keywords.get("fds", ()))))
        return await call(self, request, *args, **keywords)

    monkeypatch.setattr(ForkServer, "fork", fork)
    monkeypatch.setattr(WorkerClient, "call", watch)
    with live(make_data) as target:
        await restore(make_images(tmp_path), target.pid)
    assert set(lent) == {"create", "journal", "watch"}
    assert set(seen) == {"worker", "guardian"}


async def test_a_worker_that_fails_by_itself_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    """An error that nobody foresaw comes through the socket, not on the terminal."""
    async with ForkServer.running(launch()) as server:
        worker = await WorkerClient.forked(server)
        with pytest.raises(WorkerDied, match=r"failed in create: TypeError"):
            await worker.call("create", None, None, None)
        assert not worker.alive
        assert await worker.child.wait() != 0
        worker.child.close()
    assert capfd.readouterr().err == ""


async def test_no_child_leaves_a_core(tmp_path: Path) -> None:
    async with ForkServer.running(launch()) as server:
        worker = await WorkerClient.forked(server)
        (pid, _) = await worker.call("ping")
        soft, _ = resource.prlimit(pid, resource.RLIMIT_CORE)
        assert soft == 0
        await worker.stop()


# -- The sets themselves -------------------------------------------------------------------------


def attempt(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> int:
    """0, or the errno that it fails with."""
    try:
        function(*arguments, **keywords)
    except OSError as error:
        return error.errno or -1
    return 0


def test_what_must_fail_in_a_worker(tmp_path: Path) -> None:
    """In effect during one request is nothing that another one needs."""
    closed = tmp_path / "closed"
    closed.write_bytes(b"")
    closed.chmod(0)
    os.chown(closed, 65534, 65534)

    def child() -> dict[str, int]:
        own = os.open("/proc/self/ns/mnt", os.O_RDONLY)
        _linux.unshare(_linux.CLONE_NEWNS)
        _linux.mount(None, b"/", None, _linux.MS_REC | _linux.MS_PRIVATE)
        capabilities = _capabilities.Capabilities(WORKER)
        found = {}
        capabilities.need(NEEDED["create"])
        found["read"] = attempt(os.open, closed, os.O_RDONLY)
        found["chown"] = attempt(os.chown, closed, 65534, 1)
        found["mount in a file request"] = attempt(
            _linux.mount, b"x", os.fsencode(tmp_path), b"tmpfs", 0
        )
        found["setns in a file request"] = attempt(_linux.setns, own, _linux.CLONE_NEWNS)
        found["device"] = attempt(os.mknod, tmp_path / "null", stat.S_IFCHR, os.makedev(1, 3))
        capabilities.need(NEEDED["clone"])
        found["mount"] = attempt(_linux.mount, b"x", os.fsencode(tmp_path), b"tmpfs", 0)
        _linux.umount2(os.fsencode(tmp_path), 0)
        found["read in a mount request"] = attempt(os.open, closed, os.O_RDONLY)
        found["chown in a mount request"] = attempt(os.chown, closed, 1, 1)
        found["setns in a mount request"] = attempt(_linux.setns, own, _linux.CLONE_NEWNS)
        everything = int(~Cap(0))
        found["more than permitted"] = attempt(_linux.capset, everything, everything, 0)
        found["chroot"] = attempt(os.chroot, "/")
        capabilities.need(ENTER)
        found["setns"] = attempt(_linux.setns, own, _linux.CLONE_NEWNS)
        return found

    assert in_child(child) == {
        "read": 0,
        "chown": 0,
        "mount in a file request": errno.EPERM,
        "setns in a file request": errno.EPERM,
        "device": errno.EPERM,
        "mount": 0,
        "read in a mount request": errno.EACCES,
        "chown in a mount request": errno.EPERM,
        "setns in a mount request": errno.EPERM,
        "more than permitted": errno.EPERM,
        "chroot": errno.EPERM,
        "setns": 0,
    }


def test_one_capset_for_a_request_that_needs_others() -> None:
    """And none for one that needs the same."""

    def child() -> list[tuple[int, int, int]]:
        calls = []
        capabilities = _capabilities.Capabilities(WORKER)
        _linux.capset = lambda *sets: calls.append(sets)
        for request in ("ping", "open", "open", "remove", "clone", "make_writable", "mountinfo"):
            capabilities.need(NEEDED.get(request, 0))
        return calls

    calls = in_child(child)
    wanted = [NEEDED["open"], NEEDED["clone"], 0]
    assert [effective for effective, _, _ in calls] == [bits & MINE for bits in wanted]


@pytest.mark.parametrize("fills", [False, True])
def test_the_builder_has_a_set_of_its_own(fills: bool) -> None:
    """And files of any owner to make only where there are any."""
    nodes = (Node(b"/x", stat.S_IFREG),) if fills else ()
    specs = [NamespaceSpec(1, (MountSpec(1, 0, b"/", 1, nodes=nodes),))]

    def child() -> Any:
        answers: list[Any] = []

        class Channel:
            def send(self, message: Any, fds: Any = None) -> None:
                answers.append(message)

        def build(namespaces: object) -> list[int]:
            answers.append(status_of("self"))
            return []

        _build.build = build
        _forkserver._build_namespaces(Channel(), marshal(specs))  # type: ignore[arg-type]
        return answers

    status, answer = in_child(child)
    needed = FILLER if fills else BUILDER
    assert sets_in(status) == Sets(0, *(needed & MINE,) * 3, 0)
    assert status["NoNewPrivs"] == "1"
    assert answer == (True, ())


def test_a_process_that_lacks_some_has_the_rest() -> None:
    """Without SETPCAP the bounding set has to stay; what is not there is not asked for."""

    def child() -> Any:
        _, permitted, _ = _linux.capget()
        permitted &= ~int(Cap.SETPCAP | Cap.FSETID)
        _linux.capset(permitted, permitted, 0)
        capabilities = _capabilities.Capabilities(WORKER)
        capabilities.need(NEEDED["create"])
        return status_of("self")

    got = sets_in(in_child(child))
    assert got.permitted == WORKER & MINE & ~Cap.FSETID
    assert got.effective == NEEDED["create"] & got.permitted
    assert got.bounding & Cap.SETPCAP


def test_restore_with_no_more_than_is_needed(tmp_path: Path) -> None:
    """Root that has only what the workers use, and PTRACE to find the target: no SETPCAP."""
    keep = WORKER | Cap.SYS_PTRACE

    def lower() -> None:
        _linux.drop_bounding(~int(keep))

    with live(make_data) as target:
        done = ghostpool(
            *("restore", "-D", make_images(tmp_path), "-t", target.pid),
            *("--", "bash", "-c", "cat <&3 && grep -E '^Cap|NoNew' /proc/self/status"),
            preexec_fn=lower,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("contentCapInh")
    status = status_in(done.stdout.removeprefix("content"))
    sets = sets_in(status)
    # Its bounding set could not be made smaller, so it must not get anything from there.
    assert sets.bounding == keep & MINE
    assert sets.permitted == COMMAND & keep & MINE
    assert status["NoNewPrivs"] == "1"


# -- Commands ------------------------------------------------------------------------------------


def run(target: int, images: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return ghostpool("restore", "-D", images, "-t", target, *command)


def test_what_a_command_may_do(tmp_path: Path) -> None:
    images = make_images(tmp_path)
    with live(make_data) as target:
        shown = run(target.pid, images, "--", "cat", "/proc/self/status")
        added = run(
            *(target.pid, images, "--cap-add", "NET_ADMIN", "--cap-add", "cap_sys_nice"),
            *("--", "cat", "/proc/self/status"),
        )
        for tried in (
            "mount -t tmpfs x /mnt",
            "umount /mnt",
            "mknod /tmp/ghostpool-test-device b 8 0",
            "chroot / true",
            "nsenter -t 1 -m true",
            "unshare -m true",
        ):
            done = run(target.pid, images, "--", "bash", "-c", tried)
            assert done.returncode not in (0, 127), tried
    assert shown.returncode == added.returncode == 0, shown.stderr + added.stderr
    sets = sets_in(status_in(shown.stdout))
    have = COMMAND & MINE
    assert sets == Sets(0, have, have, have, 0)
    assert not have & (ENTER | Cap.SYS_PTRACE | Cap.MKNOD | Cap.SYS_MODULE | Cap.SYS_RAWIO)
    assert "NoNewPrivs:\t0" in shown.stdout
    sets = sets_in(status_in(added.stdout))
    assert sets.permitted == (have | Cap.NET_ADMIN | Cap.SYS_NICE) & MINE


def test_a_command_has_the_callers_core_limit(tmp_path: Path) -> None:
    def lower() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (0x1000, hard))

    with live(make_data) as target:
        done = ghostpool(
            *("restore", "-D", make_images(tmp_path), "-t", target.pid),
            *("--", "grep", "core", "/proc/self/limits"),
            preexec_fn=lower,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[4] == "4096"


def test_no_word_is_a_capability_that_is_none(tmp_path: Path) -> None:
    done = run(1, tmp_path, "--cap-add", "EVERYTHING", "--", "true")
    assert done.returncode == 2
    assert "'EVERYTHING' is no capability" in done.stderr
    done = run(1, tmp_path, "--cap-add", "KILL", "--discard")
    assert done.returncode == 2
    assert "--cap-add is for a command" in done.stderr


@pytest.mark.parametrize(
    "program",
    [
        "link",
        "script",
        "script of a script",
        "descriptor",
    ],
)
def test_a_command_that_leads_to_our_executable(tmp_path: Path, program: str) -> None:
    """CVE-2019-5736: the container's program is ghostpool's interpreter, by a magic link."""

    def setup() -> None:
        make_data()
        mount_tmpfs(Path("/opt"))
        path = Path("/opt/program")
        if program == "link":
            path.symlink_to("/proc/self/exe")
        elif program == "descriptor":
            path.symlink_to("/dev/fd/0")
        else:
            path.write_text("#! /proc/self/exe\nprint('executed')\n")
        if program == "script of a script":
            path.rename("/opt/inner")
            path.write_text("#!/opt/inner -x\n")
            Path("/opt/inner").chmod(0o755)
        if not path.is_symlink():
            path.chmod(0o755)

    with live(setup) as target:
        images = make_images(tmp_path)
        done = run(target.pid, images, "--", "/opt/program", "-c", "print('executed')")
        by_path = ghostpool(
            *("restore", "-D", tmp_path, "-t", target.pid, "--", "program"),
            env={**os.environ, "PATH": "/nowhere:/opt"},
        )
    for one in (done, by_path):
        assert one.returncode == 1, one.stdout + one.stderr
        assert "magic link" in one.stderr
        assert "executed" not in one.stdout


def test_what_is_no_program_is_left_to_the_kernel(tmp_path: Path) -> None:
    """No fifo is waited for, and programs that are links of the ordinary kind are executed."""
    os.mkfifo(tmp_path / "fifo", 0o777)
    _command.refuse_magic_links(os.fsencode(tmp_path / "fifo"))
    (tmp_path / "true").symlink_to("/bin/true")
    _command.refuse_magic_links(os.fsencode(tmp_path / "true"))
    (tmp_path / "odd").write_bytes(b"#!  \t \n")
    _command.refuse_magic_links(os.fsencode(tmp_path / "odd"))
    with pytest.raises(FileNotFoundError):
        _command.refuse_magic_links(os.fsencode(tmp_path / "none"))
    with pytest.raises(OSError, match="symbolic links") as caught:
        _command.refuse_magic_links(b"/proc/self/exe")
    assert caught.value.errno == errno.ELOOP
