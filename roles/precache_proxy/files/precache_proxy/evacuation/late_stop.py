# SPDX-License-Identifier: GPL-3.0-or-later
"""A guest that obeys its shutdown only after its restart was given up is started again at its home.

Nothing takes a request to shut down back: a guest may be deaf to it for minutes and then end, under the
verdict `stayed`. So the request is on record before it is made, and once it is given up the VM is looked at
until its guest has been seen running for long enough. libvirt does not tell who wanted an orderly shutdown:
within that time it is taken for the late answer to ours, and the VM started again, once. Whoever ends it
otherwise (`virsh destroy`, `virsh managedsave`), or shuts it down a second time, is obeyed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from enum import StrEnum

from precache_proxy.evacuation.departure import Departure
from precache_proxy.evacuation.fence import Fence, this_boot
from precache_proxy.evacuation.giving_up import refuse_when_moved
from precache_proxy.evacuation.guard import FENCED
from precache_proxy.evacuation.job import Job, ShutdownRequest
from precache_proxy.evacuation.reconcile import Life, Presence
from precache_proxy.source.scratch import boottime_seconds

logger = logging.getLogger(__name__)

# A guest that still runs after this will not end any more because of what it was asked.
WATCH_SECONDS = 600.0
# Whoever looks again only after this (the proxy was not running) cannot say any more why it is off.
LONGEST_SECONDS = 3600.0


class Next(StrEnum):
    """What follows from a look at the VM; all but the first two are the end of the watch."""

    LOOK_AGAIN = "look-again"
    START = "start"
    SEEN_RUNNING = "seen-running"
    STARTED_BY_OTHERS = "started-by-others"
    ENDED_BY_OTHERS = "ended-by-others"
    HOST_RESTARTED = "host-restarted"
    TOO_LATE = "too-late"
    GONE = "gone"
    FORBIDDEN = "forbidden"
    STARTED_AGAIN = "started-again"


def decide(request: ShutdownRequest, life: Life, boot: str, now: float) -> Next:
    """What follows; ``boot`` and ``now`` (seconds) are those of the boot clock. Pure."""
    if request.boot != boot:
        # What is off is off because this host was.
        return Next.HOST_RESTARTED
    if life.presence is Presence.UNKNOWN:
        return Next.LOOK_AGAIN
    if life.presence is Presence.ABSENT:
        return Next.GONE
    waited = now - (request.given_up_boottime_seconds or now)
    if life.number is not None:
        if life.number != request.domain_number:
            return Next.STARTED_BY_OTHERS
        return Next.SEEN_RUNNING if waited >= WATCH_SECONDS else Next.LOOK_AGAIN
    if not life.in_order:
        return Next.ENDED_BY_OTHERS
    return Next.START if waited < LONGEST_SECONDS else Next.TOO_LATE


def is_open(job: Job) -> bool:
    """Whether the VM of a job that is over is still watched."""
    request = job.shutdown_request
    return request is not None and request.given_up_boottime_seconds is not None and not request.outcome


async def asked(departure: Departure, number: int | None) -> None:
    """On record before the guest is asked: a proxy that is killed then still knows of it."""
    if number is not None and departure.job.shutdown_request is None:
        departure.job.shutdown_request = ShutdownRequest(time.time(), boottime_seconds(), this_boot(), number)
        await departure.save()


def give_up(job: Job) -> None:
    """It runs on although it was asked to end; durable with the step that the caller enters."""
    if job.shutdown_request is not None:
        job.shutdown_request.given_up_boottime_seconds = boottime_seconds()


async def look(departure: Departure, fence: Fence) -> None:
    """Look once, and start the VM again where it went off on our account. Raises HypervisorError: then it is
    tried again."""
    job, around = departure.job, departure.around
    request = job.shutdown_request
    if request is None:
        return
    async with departure.deciding:
        following = decide(request, await around.domains.life(job.vm), this_boot(), boottime_seconds())
        if following is Next.START:
            forbidden = await asyncio.to_thread(around.guard.forbidden, job.vm)
            if fence.is_due(departure) or (forbidden is not None and forbidden.cause == FENCED):
                return
            following = Next.FORBIDDEN if forbidden is not None else await _start(departure)
        if following is Next.LOOK_AGAIN:
            return
        request.outcome = following.value
        if following is Next.TOO_LATE:
            job.sentence += (
                " It is off: it may have obeyed late, while the proxy here did not run; start it if it is to "
                "run."
            )
        logger.info("VM %s: asked to shut down by evacuation %s: %s", job.vm, job.id, following.value)
        await departure.save()


async def _start(departure: Departure) -> Next:
    job, around = departure.job, departure.around
    await refuse_when_moved(departure)
    if not await around.domains.start(job.vm):
        return Next.STARTED_BY_OTHERS
    logger.warning("VM %s: shut down after its restart was given up; it was started again here", job.vm)
    await around.network.stayed(job.definition, job)
    job.sentence += " Its guest shut down only after that, and was started again here."
    return Next.STARTED_AGAIN
