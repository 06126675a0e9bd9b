"""Mount namespaces made from a list of mounts, for as long as somebody needs them.

No process lives in them and no path leads to them but that of a descriptor of this process: when
that is closed, they are gone, with everything that was mounted there alone.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager

from ghostpool import _buildspec, _linux, _needs
from ghostpool._buildspec import NamespaceSpec
from ghostpool._errors import SandboxError
from ghostpool._launch import launch
from ghostpool._model import Images
from ghostpool._process import BuildFailed, ForkServer
from ghostpool._rlimit import all_descriptors
from ghostpool._sandbox import specs_from_images
from ghostpool._stall import STALL_S


class Sandbox:
    """Private mount namespaces. Made by `built` or `from_images`, which end them."""

    def __init__(self, specs: tuple[NamespaceSpec, ...], fds: Mapping[int, int]) -> None:
        self.specs: tuple[NamespaceSpec, ...] = specs
        """What was built."""
        self.fds: dict[int, int] = dict(fds)
        """Descriptors of the namespaces, by the id of their spec; the sandbox's own."""
        self.paths: dict[int, str] = {
            number: f"/proc/{os.getpid()}/fd/{fd}" for number, fd in self.fds.items()
        }
        """Paths of the namespace files, by the same id: fit for `namespaces=`, for open_leases and
        for other processes (nsenter --mount=PATH), as long as the block and this process last."""

    def __repr__(self) -> str:
        return f"<Sandbox {len(self.fds)} mount namespaces>"

    @classmethod
    @asynccontextmanager
    async def built(
        cls, specs: Iterable[NamespaceSpec], *, stall_s: float = STALL_S
    ) -> AsyncIterator[Sandbox]:
        """Mount namespaces as the specs say, for the time of the block.

        Every mount of the machine is left out, and nothing propagates out of them; mounts of one
        superblock number are of one superblock, in all the namespaces of one call. `stall_s` is in
        seconds: a builder that shows no sign of life for so long is killed.

        SandboxError: the kernel refused a step, which it names, or a spec makes no sense; nothing
        is left then. WorkerDied: the builder was killed. PlanError: more namespaces than
        descriptors. They come alone, not in a group. Cancelled, it leaves nothing behind.
        Linux 5.15; CAP_SYS_ADMIN. RLIMIT_NOFILE is raised to the hard limit meanwhile.
        """
        wanted = tuple(specs)
        ids = [spec.id for spec in wanted]
        if len(set(ids)) != len(ids):
            raise SandboxError("two mount namespaces have one id")
        fds: list[int] = []
        with all_descriptors() as (_, hard):
            _needs.check_namespaces(len(wanted), hard)
            try:
                async with ForkServer.running(launch(), stall_s) as server:
                    fds += await _build(server, wanted)
                yield cls(wanted, dict(zip(ids, fds, strict=True)))
            finally:
                _linux.close_all(fds)

    @classmethod
    @asynccontextmanager
    async def from_images(
        cls,
        images: Images,
        external: Mapping[str, str] | None = None,
        *,
        stall_s: float = STALL_S,
    ) -> AsyncIterator[Sandbox]:
        """The mount namespaces of `images`, rebuilt, by their ids there; otherwise as `built`.

        `external` maps the external key of a mount, or the mount point of one that has none, to
        the path that is mounted in its stead. SandboxError also for a mount that can not be
        rebuilt and that nothing was supplied for, and for a key that no mount has.
        """
        specs = specs_from_images(images, external or {})
        async with cls.built(specs, stall_s=stall_s) as sandbox:
            yield sandbox


async def _build(server: ForkServer, specs: Sequence[NamespaceSpec]) -> list[int]:
    try:
        return await server.build(_buildspec.marshal(specs))
    except BuildFailed as error:
        raise SandboxError(f"the mount namespaces can not be built: {error}") from error


__all__ = ["Sandbox"]
