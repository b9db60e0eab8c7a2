# SPDX-License-Identifier: GPL-3.0-or-later
"""A pause of ours that libvirt obeys only after nobody waits for it any more is taken back.

Nothing takes back what libvirt was asked for: where QEMU or libvirt hangs, the call is given up, the VM goes
on with the rollback, and may be paused minutes later, under the verdict `stayed`. The same call outlives a
proxy that is killed, for it is libvirtd that carries it out. So a VM of which a pause was not answered is
looked at until none can come any more: libvirt lets one call at a time change a domain, a call waits at most
30 s for its turn (QEMU_JOB_WAIT_TIME, src/qemu/qemu_domainjob.c) and fails then. Once a question that takes
such a turn was answered, only what was waiting then may still come.

libvirt does not tell who paused a VM: within that time a pause is taken for ours, and the VM goes on. That of
an operator who has paused it meanwhile is undone as well.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from precache_proxy.errors import NotFound
from precache_proxy.evacuation.guard import FENCED
from precache_proxy.evacuation.job import Job, Step

if TYPE_CHECKING:
    from precache_proxy.evacuation.departure import Departure
    from precache_proxy.evacuation.fence import Fence

logger = logging.getLogger(__name__)

# After libvirt's answer; twice what it lets a call wait.
WATCH_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Standing:
    """What libvirt said in its turn: which run of the VM (None: off), and whether it is paused as we pause
    it, and not being migrated."""

    number: int | None
    paused: bool = False


@dataclass(slots=True)
class Pauses:
    """The pauses of one VM that were asked for, as this process knows them. ``unanswered``: so many were not
    answered, those of an earlier process counted as one; ``answered_at``: when libvirt first answered after
    they were given up (monotonic), and of which run of the VM."""

    unanswered: int = 0
    answered_at: float | None = None
    number: int | None = None


class Next(StrEnum):
    """What follows from a look at the VM."""

    LOOK_AGAIN = "look-again"
    RESUME = "resume"
    OVER = "over"


def decide(found: Standing, number: int | None, answered_seconds: float) -> Next:
    """What follows, ``answered_seconds`` after libvirt first answered, of that run of the VM. Pure."""
    if found.number is None or found.number != number:
        return Next.OVER
    if found.paused:
        return Next.RESUME
    return Next.OVER if answered_seconds >= WATCH_SECONDS else Next.LOOK_AGAIN


async def pause(
    departure: Departure, *, only_migrating: bool = False, at_order: Callable[[], object] | None = None
) -> bool:
    """Pause the guest, on record before it is done; the rest as :meth:`Domains.suspend`.

    Raises NotFound, HypervisorError: it may be paused later all the same.
    """
    await departure.note_stop()
    departure.pauses.unanswered += 1
    paused = await departure.around.domains.suspend(
        departure.job.vm, only_migrating=only_migrating, at_order=at_order
    )
    departure.pauses.unanswered -= 1
    return paused


def is_open(job: Job) -> bool:
    """Whether the VM of a job that is over is still watched."""
    return job.step is Step.STAYED and job.pause_unanswered


async def look(departure: Departure, fence: Fence) -> None:
    """Look once, and let the VM go on where it was paused on our account. Raises HypervisorError: then it is
    tried again."""
    job, around, pauses = departure.job, departure.around, departure.pauses
    async with departure.deciding:
        forbidden = await asyncio.to_thread(around.guard.forbidden, job.vm)
        if fence.is_due(departure) or (forbidden is not None and forbidden.cause == FENCED):
            # The fence stops it, and has its own word on when that is over.
            return
        try:
            found = await around.domains.standing(job.vm)
        except NotFound:
            found = Standing(None)
        if pauses.answered_at is None:
            pauses.answered_at, pauses.number = time.monotonic(), found.number
        following = decide(found, pauses.number, time.monotonic() - pauses.answered_at)
        if following is Next.RESUME:
            await around.domains.resume(job.vm)
            logger.warning(
                "VM %s: libvirt obeyed a pause of evacuation %s only after that was over; it goes on",
                job.vm,
                job.id,
            )
        elif following is Next.OVER:
            job.pause_unanswered = False
            await departure.save()
