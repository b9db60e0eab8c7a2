# SPDX-License-Identifier: GPL-3.0-or-later
"""A home that was taken for dead hears that its VM runs at the peer from a generation: it gives the VM up.

The start is forbidden first and durably; then a copy that runs is ended, for the newer epoch is right, and
what an evacuation of the VM had begun is over. Its images stay where they are: they hold what was written
after that generation, and are nobody's base any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from precache_proxy.crash_points import crash_point
from precache_proxy.errors import (
    Conflict,
    HypervisorError,
    LifeboatError,
    NotFound,
    PeerUnreachable,
    StaleEpoch,
)
from precache_proxy.evacuation.departure import Departure
from precache_proxy.evacuation.fence import KEEP_AT_SOURCE, this_boot
from precache_proxy.evacuation.guard import TOMBSTONE, Forbidden
from precache_proxy.evacuation.job import FOLLOWING, EvacuationOptions, Step, Verdict, new_job
from precache_proxy.evacuation.layers import forget_definition
from precache_proxy.evacuation.preflight import covered_disks
from precache_proxy.evacuation.reconcile import Presence
from precache_proxy.evacuation.surroundings import Surroundings

logger = logging.getLogger(__name__)

HOME_TIMEOUT_SECONDS = 30.0
NETWORK_SECONDS = 10.0
_ACTIVE = frozenset({Presence.RUNNING, Presence.PAUSED})


async def refuse_when_moved(departure: Departure) -> None:
    """Before the VM is started again: whether its peer was told that we are dead, and runs it.

    Raises Conflict, or PeerUnreachable where this host was down since the job was begun: then the peer's
    operator had every reason to say so.
    """
    job = departure.job
    if job.settled == KEEP_AT_SOURCE:
        return
    try:
        if departure.link.state != "up":
            raise PeerUnreachable(f"peer {job.peer}: no contact")
        answer = await departure.call("home", {"epoch": job.epoch}, HOME_TIMEOUT_SECONDS)
    except NotFound:
        # A release that cannot run a VM of ours on its operator's word.
        return
    except LifeboatError as error:
        if not job.boot or job.boot == this_boot():
            return
        raise PeerUnreachable(
            f"VM {job.name}: this host was down, and {job.peer} cannot be asked whether it runs the VM by "
            f"now; it is started when contact returns, or on `precache-proxy settle {job.id} "
            f"{KEEP_AT_SOURCE}` (only when {job.peer} does not run it)"
        ) from error
    if answer.get("runs_here"):
        raise Conflict(f"VM {job.name}: it runs at {job.peer} by now; it is not started here")


async def refuse_what_is_not_so(
    around: Surroundings, open_jobs: Sequence[Departure], peer: str, told: Mapping[str, Any]
) -> None:
    """Raise Conflict, StaleEpoch or HypervisorError if the peer may not have the VM; nothing is changed."""
    vm, name, epoch = str(told["vm"]), str(told["name"]), int(told["epoch"])
    presence = await around.domains.presence_at_source(vm)
    if presence is Presence.UNKNOWN:
        raise HypervisorError(f"VM {name}: libvirt here does not say whether it runs; ask again")
    if told.get("only_if_off") and presence in _ACTIVE:
        raise Conflict(
            f"VM {name}: its home is not dead, it is {presence.value} there; evacuate it from there, by "
            "restart if need be"
        )
    found = await asyncio.to_thread(around.guard.forbidden, vm)
    # It was given up already; the answer was lost, or we were killed in between.
    repeated = found is not None and found.job == str(told["job"])
    under_way = next((item.job for item in open_jobs if not item.job.ended), None)
    if told.get("only_if_off") and under_way is not None and not repeated:
        raise Conflict(
            f"VM {name}: its home is not dead, evacuation {under_way.id} is at step "
            f"{under_way.step.value} there; let it come to its end, or cancel it there"
        )
    try:
        status = around.source.status(vm)
    except NotFound:
        status = None
    if status is not None and status["peer"] != peer:
        raise Conflict(f"VM {name}: it is protected at {status['peer']}, not at {peer}; unprotect it there")
    if status is not None and int(status["epoch"]) >= epoch:
        raise StaleEpoch(f"VM {name}: it is here with epoch {status['epoch']}, this is epoch {epoch}")
    if status is None and presence is not Presence.ABSENT and not repeated:
        raise Conflict(f"VM {name}: it is not protected here any more; what {peer} has of it is an old copy")


async def give_up(
    around: Surroundings, open_jobs: Sequence[Departure], peer: str, told: Mapping[str, Any]
) -> dict[str, Any]:
    """Do it; repeatable after a kill at any line. Nobody works on ``open_jobs``.

    What is raised is raised before the start is forbidden for good: Conflict where the VM has come to run.
    After that nothing is: the answer says what is still ``owes``-d here, to be told again.
    """
    vm, name = str(told["vm"]), str(told["name"])
    before = await asyncio.to_thread(around.guard.forbidden, vm)
    if before is None or before.job != str(told["job"]):
        sentence = await _sentence(around, peer, told)
        job, epoch = str(told["job"]), int(told["epoch"])
        forbidden = Forbidden(vm, TOMBSTONE, sentence, job, epoch, name=name, peer=peer)
        await asyncio.to_thread(around.guard.forbid, forbidden)
        # Asked after the tombstone: a start that the hook let through before it is visible by now.
        presence = await around.domains.presence_at_source(vm)
        if told.get("only_if_off") and presence in {*_ACTIVE, Presence.UNKNOWN}:
            await asyncio.to_thread(_as_before, around, before, forbidden)
            raise Conflict(f"VM {name}: its home is not dead, it is {presence.value} there since just now")
        logger.critical("%s", sentence)
    else:
        sentence = before.sentence
    crash_point("home-forbidden")
    try:
        await _end(around, open_jobs, peer, told, sentence)
    except (LifeboatError, OSError) as error:
        logger.error("VM %s: it was given up to %s, and is not all gone here: %s", vm, peer, error)
        return {"owes": str(error)}
    return {}


def _as_before(around: Surroundings, before: Forbidden | None, forbidden: Forbidden) -> None:
    if before is None:
        around.guard.allow(forbidden.vm, job=forbidden.job)
    else:
        around.guard.forbid(before)


async def _sentence(around: Surroundings, peer: str, told: Mapping[str, Any]) -> str:
    images: list[str] = []
    with contextlib.suppress(LifeboatError):
        definition = await around.domains.definition(str(told["vm"]))
        images = [
            disk.path for key in covered_disks(definition) if (disk := definition.disk(key)) is not None
        ]
    kept = f" What was written here since is in {', '.join(images)}." if images else ""
    return (
        f"VM {told['name']} was started at {peer} from generation {told['generation']} (epoch "
        f"{told['epoch']}), as this host was taken for dead, and runs there. Do not start the copy "
        f"here.{kept}"
    )


async def _end(
    around: Surroundings, open_jobs: Sequence[Departure], peer: str, told: Mapping[str, Any], sentence: str
) -> None:
    vm, name, epoch = str(told["vm"]), str(told["name"]), int(told["epoch"])
    if await around.domains.presence_at_source(vm) in {*_ACTIVE, Presence.UNKNOWN}:
        logger.critical("VM %s: it ran here while it runs at %s; the old copy is ended now", vm, peer)
        # A halted one could not answer libvirt, which would wait for that.
        await around.emulators.end(vm)
        await around.domains.destroy(vm)
    for item in open_jobs:
        await _end_job(item, sentence)
    crash_point("home-jobs-ended")
    await forget_definition(around.domains, vm)
    with contextlib.suppress(NotFound):
        await around.source.handed_over(vm)
    # Most have left without a job of this host's; the network asks for no more than the names in it.
    # The peer waits for our answer meanwhile.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(NETWORK_SECONDS):
            await around.network.left(new_job(vm, name, peer, epoch, EvacuationOptions(), time.time()))


async def _end_job(item: Departure, sentence: str) -> None:
    """It ends without an answer of its own: the VM is out, from another instant."""
    job = item.job
    job.owes_abort = False
    if job.step is Step.STAYED:
        await item.save()
        return
    job.verdict = Verdict.RESTARTED_FROM_REPLICA
    job.explain("superseded", sentence)
    ways: list[Step] = []
    step = job.step
    while step is not Step.DONE:
        step = next(way for way in (Step.DONE, Step.FINISH, Step.ROLLBACK) if way in FOLLOWING[step])
        ways.append(step)
    # At once: one that a kill left at FINISH would be finished as an evacuation, its overlays removed.
    await item.enter(*ways)
