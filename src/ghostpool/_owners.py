"""Who owns the targets: the maps of their user namespaces, learned before anything else.

Ids are translated through the live maps of the user namespace that owns a target's mount
namespace, never through those of the images, which another container had. Our own user namespace
needs no translation.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from ghostpool._errors import PlanError
from ghostpool._process import ForkServer, MapsHidden
from ghostpool._targets import Target
from ghostpool._userns import IdMap, IdMaps


async def learn_maps(server: ForkServer, pinned: Mapping[str, Target]) -> dict[str, Target]:
    """The same targets by the same places, with the maps of those that somebody else owns.

    PlanError: a user namespace can not be looked at, or maps nobody.
    """
    known: dict[int, Target] = {}
    for target in pinned.values():
        if target.index not in known:
            known[target.index] = await _with_maps(server, target)
    return {place: known[target.index] for place, target in pinned.items()}


async def _with_maps(server: ForkServer, target: Target) -> Target:
    if target.user_namespace < 0:
        return target
    try:
        uids, gids = await server.user_maps(target.user_namespace)
    except MapsHidden as error:
        raise PlanError(
            f"{target.label}: the user namespace that owns it can not be entered: "
            f"{error.step}: {os.strerror(error.errno)}"
        ) from error
    ids = IdMaps(IdMap.parse(uids), IdMap.parse(gids))
    if ids.first is None:
        raise PlanError(f"{target.label}: the user namespace that owns it maps no ids ({ids})")
    return dataclasses.replace(target, ids=ids)
