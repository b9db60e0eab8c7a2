# SPDX-License-Identifier: GPL-3.0-or-later
"""Back to before: the VM runs here, the peer forgets the arrival, the overlays are merged, the next pass is
small."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from precache_proxy.crash_points import crash_point
from precache_proxy.errors import Conflict, HypervisorError, LifeboatError, NotFound, PeerUnreachable
from precache_proxy.evacuation import freeze, giving_up, release_ahead, restart
from precache_proxy.evacuation.arrival import RUNS_HERE
from precache_proxy.evacuation.departure import Departure, clear_local_leftovers
from precache_proxy.evacuation.fence import KEEP_AT_SOURCE, Fence
from precache_proxy.evacuation.guard import FENCED
from precache_proxy.evacuation.job import Step, Verdict
from precache_proxy.evacuation.reconcile import Presence

logger = logging.getLogger(__name__)

ABORT_TIMEOUT_SECONDS = 90.0
STATUS_TIMEOUT_SECONDS = 30.0
_PAUSED_BY_OTHERS = " It is paused here, which was not for this evacuation: resume it when it is to run."


class ActivatedThere(Conflict):
    """The destination refuses to give the VM back: it runs there."""

    cause = "activated-there"


async def roll_back(departure: Departure, fence: Fence, *, cold: bool) -> None:
    """Undo. ``cold``: the VM is off here and has to be started anew, so the peer's word must come first.

    Raises ActivatedThere, PeerUnreachable (cold only), HypervisorError: the job stays in ROLLBACK and is
    tried again.
    """
    job, around = departure.job, departure.around
    if job.step is not Step.ROLLBACK:
        await departure.enter(Step.ROLLBACK)
    crash_point("rollback-begun")
    released = job.began(Step.RELEASED) is not None
    # Where the peer may run it, a halted VM stays so until the peer has said, durably, that it never will:
    # whoever was told to let it go on while it was halted does so at once.
    in_doubt = released or fence.is_due(departure)
    if not in_doubt:
        await release_ahead.take_back(departure)
    halted = in_doubt and await around.emulators.is_halted(job.vm)
    if not halted:
        await clear_local_leftovers(departure)
    presence = await around.domains.presence_at_source(job.vm)
    if halted:
        cold = True
    elif job.restarts:
        presence = await restart.presence_for_rollback(departure, presence)
        # Before the release the destination does not run it, heard or not; after it only its word counts.
        cold = job.began(Step.RELEASED) is not None and presence not in {Presence.RUNNING, Presence.PAUSED}
    elif presence in {Presence.RUNNING, Presence.PAUSED, Presence.ENDED}:
        cold = False
    if presence is Presence.UNKNOWN:
        # Taken for off, a VM that runs would be merged as one that does not, and ended.
        raise HypervisorError(f"VM {job.name}: libvirt here does not say whether it runs; it is asked again")
    await _clean_peer(departure, must=cold and job.settled != KEEP_AT_SOURCE)
    crash_point("rollback-peer-cleaned")
    if halted:
        await release_ahead.take_back(departure)
        await clear_local_leftovers(departure)
        presence = await around.domains.presence_at_source(job.vm)
    if presence in {Presence.SHUT_OFF, Presence.PAUSED}:
        await giving_up.refuse_when_moved(departure)
    async with departure.deciding:
        if not fence.is_due(departure):
            await _remember_fence(departure)
            await asyncio.to_thread(around.guard.allow, job.vm, job=job.id)
            presence = await _run_here(departure, presence)
            if halted and presence is Presence.RUNNING:
                # With the release the peer's gateway may have been told of it, and was what comes for it.
                await around.network.stayed(job.definition, job)
    if fence.is_due(departure):
        await fence.stand_still(departure)
        raise PeerUnreachable(
            f"VM {job.name}: {job.peer} may have presumed this host dead and run it; it stands still here "
            f"until contact returns"
        )
    if job.disks:
        await freeze.merge_back(around.domains, job.vm, job.disks, presence)
    crash_point("rollback-merged")
    await _go_on_at_last(departure, fence)
    with contextlib.suppress(NotFound):
        await around.source.after_rollback(job.vm)
        await around.source.release(job.vm, job.id)
    job.verdict = Verdict.STAYED
    # Looked at from now on, where libvirt may pause it on our account after this.
    job.pause_unanswered = departure.pauses.unanswered > 0
    await departure.enter(Step.STAYED)


async def _remember_fence(departure: Departure) -> None:
    """A record of an older release does not say that the fence stopped its VM: the guard's file does, and is
    about to go."""
    found = await asyncio.to_thread(departure.around.guard.forbidden, departure.job.vm)
    if found is not None and found.cause == FENCED and found.job == departure.job.id:
        await departure.note_stop()


async def _go_on_at_last(departure: Departure, fence: Fence) -> None:
    """A proxy that was killed may have asked libvirt for a stop that came only after we had looked."""
    job, around = departure.job, departure.around
    if job.stopped_here:
        async with departure.deciding:
            if not fence.is_due(departure) and await around.domains.paused_by_user(job.vm):
                await around.domains.resume(job.vm)


async def _run_here(departure: Departure, presence: Presence) -> Presence:
    job, around = departure.job, departure.around
    if presence is Presence.PAUSED:
        if not job.stopped_here and await around.domains.paused_by_user(job.vm):
            if _PAUSED_BY_OTHERS not in job.sentence:
                job.sentence += _PAUSED_BY_OTHERS
            return presence
        # libvirt left it between two worlds, or we stopped it; nobody else runs it.
        await around.domains.resume(job.vm)
        return Presence.RUNNING
    if presence is Presence.SHUT_OFF:
        job.memory_lost = not job.restarts
        await around.domains.start(job.vm)
        await around.network.stayed(job.definition, job)
        job.sentence += (
            " It was started again here."
            if job.restarts
            else " It had to be started anew here: its memory was lost, its disks are whole."
        )
        return Presence.RUNNING
    if presence is Presence.ABSENT:
        job.verdict = Verdict.FAILED
        raise HypervisorError(
            f"VM {job.name}: libvirt here does not know it any more; define it again from its images "
            f"({', '.join(disk.overlay for disk in job.disks.values()) or 'no overlays'}), then it is merged"
        )
    return presence


async def _clean_peer(departure: Departure, *, must: bool, goes_on: bool = False) -> None:
    """Have the destination clear its arrival away, durably. Not reached: owed, unless it ``must`` be.

    ``goes_on``: with the debt paid a VM that stands still here goes on, so that it is paid only where the
    peer does not run it from a generation. Raises Conflict where it does.
    """
    job = departure.job
    if not job.owes_abort:
        return
    kept = job.settled == KEEP_AT_SOURCE
    try:
        await departure.call("abort", {"kept_at_source": kept}, ABORT_TIMEOUT_SECONDS)
    except LifeboatError as error:
        # What follows ends the copy here: a mere "not now" of the other side must not be taken for it.
        if isinstance(error, Conflict) and await _runs_there(departure):
            raise ActivatedThere(error.message) from error
        if must:
            raise
        # Asked every few seconds, perhaps for hours: said once.
        level = logging.WARNING if departure.complaint != error.message else logging.DEBUG
        departure.complaint = error.message
        logger.log(level, "evacuation %s: %s has not cleared its arrival away: %s", job.id, job.peer, error)
        await departure.save()
        return
    if goes_on:
        await giving_up.refuse_when_moved(departure)
    job.owes_abort = False
    await departure.save()


async def _runs_there(departure: Departure) -> bool:
    """Whether the destination says, durably, that the VM is its own now."""
    try:
        answer = await departure.call("status", {}, STATUS_TIMEOUT_SECONDS)
    except LifeboatError:
        return False
    return answer.get("state") in {state.value for state in RUNS_HERE}


async def settle_debt(departure: Departure) -> None:
    """A job that is over owes the peer an abort: try again. Raises ActivatedThere, Conflict."""
    await _clean_peer(departure, must=False, goes_on=True)
