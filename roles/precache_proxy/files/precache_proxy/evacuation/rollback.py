# SPDX-License-Identifier: GPL-3.0-or-later
"""Back to before: the VM runs here, the peer forgets the arrival, the overlays are merged, the next pass is
small."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from precache_proxy.crash_points import crash_point
from precache_proxy.errors import Conflict, HypervisorError, LifeboatError, NotFound, PeerUnreachable
from precache_proxy.evacuation import freeze
from precache_proxy.evacuation.arrival import RUNS_HERE
from precache_proxy.evacuation.departure import Departure, clear_local_leftovers
from precache_proxy.evacuation.guard import FENCED, Forbidden
from precache_proxy.evacuation.job import Step, Verdict
from precache_proxy.evacuation.reconcile import Presence

logger = logging.getLogger(__name__)

ABORT_TIMEOUT_SECONDS = 90.0
STATUS_TIMEOUT_SECONDS = 30.0
# Of the time after which the destination presumes us dead: we stop well before it starts.
FENCE_SHARE = 0.5


class ActivatedThere(Conflict):
    """The destination refuses to give the VM back: it runs there."""

    cause = "activated-there"


async def roll_back(departure: Departure, *, cold: bool) -> None:
    """Undo. ``cold``: the VM is off here and has to be started anew, so the peer's word must come first.

    Raises ActivatedThere, PeerUnreachable (cold only), HypervisorError: the job stays in ROLLBACK and is
    tried again.
    """
    job, around = departure.job, departure.around
    if job.step is not Step.ROLLBACK:
        await departure.enter(Step.ROLLBACK)
    crash_point("rollback-begun")
    await clear_local_leftovers(departure)
    presence = await around.domains.presence_at_source(job.vm)
    if presence in {Presence.RUNNING, Presence.PAUSED, Presence.ENDED}:
        cold = False
    await _clean_peer(departure, must=cold and job.settled != "keep-at-source")
    crash_point("rollback-peer-cleaned")
    await asyncio.to_thread(around.guard.allow, job.vm, job=job.id)
    presence = await _run_here(departure, presence)
    if job.disks:
        await freeze.merge_back(around.domains, job.vm, job.disks, presence)
    crash_point("rollback-merged")
    with contextlib.suppress(NotFound):
        await around.source.after_rollback(job.vm)
        await around.source.release(job.vm, job.id)
    job.verdict = Verdict.STAYED
    await departure.enter(Step.STAYED)


async def _run_here(departure: Departure, presence: Presence) -> Presence:
    job, around = departure.job, departure.around
    if presence is Presence.PAUSED:
        # libvirt left it between two worlds, or we fenced it; nobody else runs it.
        await around.domains.resume(job.vm)
        return Presence.RUNNING
    if presence is Presence.SHUT_OFF:
        job.memory_lost = True
        await around.domains.start(job.vm)
        await around.network.stayed(job.definition, job)
        job.sentence += " It had to be started anew here: its memory was lost, its disks are whole."
        return Presence.RUNNING
    if presence is Presence.ABSENT:
        job.verdict = Verdict.FAILED
        raise HypervisorError(
            f"VM {job.name}: libvirt here does not know it any more; define it again from its images "
            f"({', '.join(disk.overlay for disk in job.disks.values()) or 'no overlays'}), then it is merged"
        )
    return presence


async def _clean_peer(departure: Departure, *, must: bool) -> None:
    """Have the destination clear its arrival away, durably. Not reached: owed, unless it ``must`` be."""
    job = departure.job
    if not job.owes_abort:
        return
    kept = job.settled == "keep-at-source"
    try:
        await departure.call("abort", {"kept_at_source": kept}, ABORT_TIMEOUT_SECONDS)
    except (PeerUnreachable, LifeboatError) as error:
        # What follows ends the copy here: a mere "not now" of the other side must not be taken for it.
        if isinstance(error, Conflict) and await _runs_there(departure):
            raise ActivatedThere(error.message) from error
        if must:
            raise
        logger.warning("evacuation %s: %s has not cleared its arrival away yet: %s", job.id, job.peer, error)
        if "contact_lost_at" not in job.progress:
            job.progress["contact_lost_at"] = time.time()
        await departure.save()
        return
    job.owes_abort = False
    job.progress.pop("contact_lost_at", None)
    await departure.save()


async def _runs_there(departure: Departure) -> bool:
    """Whether the destination says, durably, that the VM is its own now."""
    try:
        answer = await departure.call("status", {}, STATUS_TIMEOUT_SECONDS)
    except LifeboatError:
        return False
    return answer.get("state") in {state.value for state in RUNS_HERE}


async def settle_debt(departure: Departure) -> None:
    """A job that is over owes the peer an abort: try again. Raises ActivatedThere."""
    await _clean_peer(departure, must=False)


async def fence_if_due(departure: Departure) -> bool:
    """Stop the VM here before a destination that cannot hear us presumes us dead and runs its arrival.

    Only where its operator has set such a time. True when the VM is paused by us now.
    """
    job, around = departure.job, departure.around
    limit = job.presumed_dead_after_seconds
    lost_at = job.progress.get("contact_lost_at")
    if not job.owes_abort or limit is None or lost_at is None or time.time() - lost_at < limit * FENCE_SHARE:
        return False
    found = await asyncio.to_thread(around.guard.forbidden, job.vm)
    if found is not None and found.job == job.id and found.cause == FENCED:
        return True
    sentence = (
        f"VM {job.name}: {job.peer} cannot be reached and may run it by now, as it was set to presume this "
        f"host dead "
        f"after {limit:.0f} s; it goes on here when contact returns, or on `precache-proxy settle {job.id} "
        f"keep-at-source`"
    )
    await asyncio.to_thread(around.guard.forbid, Forbidden(job.vm, FENCED, sentence, job.id, job.epoch))
    await around.domains.suspend(job.vm)
    logger.critical("%s", sentence)
    return True


async def unfence(departure: Departure) -> None:
    """The peer has cleared its arrival away: the VM may run here again."""
    job, around = departure.job, departure.around
    found = await asyncio.to_thread(around.guard.forbidden, job.vm)
    if found is not None and found.job == job.id and found.cause == FENCED:
        await asyncio.to_thread(around.guard.allow, job.vm, job=job.id)
        await around.domains.resume(job.vm)
