# SPDX-License-Identifier: GPL-3.0-or-later
"""The source stops its VM before a destination that cannot hear it may presume it dead and run the arrival.

Only where the destination's operator has set such a time. It works like a lease: the destination counts from
when it last heard of us, we from when we *asked* the question that it last answered, which is no later; and
we stop well before its time is over. Nothing else of a job is waited for: each has a task of its own for
this, the time is that of the boot clock (suspended time counts), and it is on disk, for a restart of the
proxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

from precache_proxy.errors import LifeboatError, NotFound
from precache_proxy.evacuation import late_pause
from precache_proxy.evacuation.departure import Departure
from precache_proxy.evacuation.guard import FENCED, TOMBSTONE, Forbidden
from precache_proxy.evacuation.job import FENCE_SHARE
from precache_proxy.source.scratch import boottime_seconds

logger = logging.getLogger(__name__)

# Timers of the event loop stand still while the host is suspended: the boot clock is looked at this often.
LOOK_SECONDS: Final = 1.0
# How often the destination is asked, as a share of the time until the VM would be stopped.
ASK_SHARE: Final = 0.1
ASK_TIMEOUT_SECONDS: Final = 10.0
KEEP_AT_SOURCE: Final = "keep-at-source"


def this_boot() -> str:
    """The kernel's name for this boot: its clock says nothing about another one's."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Fence:
    """Keeps it for all jobs of this host."""

    def __init__(self, clock: Callable[[], float] = boottime_seconds, boot: str | None = None) -> None:
        self._clock = clock
        self._boot = this_boot() if boot is None else boot
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def watch(self, departure: Departure) -> None:
        """Watch over a job, where its destination may presume us dead; one that is watched already is no
        error."""
        job = departure.job
        task = self._tasks.get(job.id)
        if self._concerns(departure) and (task is None or task.done()):
            self._tasks[job.id] = asyncio.create_task(self._keep(departure), name=f"fence-{job.id}")

    async def stop(self) -> None:
        """End the tasks; what is fenced stays fenced."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()

    @staticmethod
    def _concerns(departure: Departure) -> bool:
        job = departure.job
        return (
            job.owes_abort and job.presumed_dead_after_seconds is not None and job.settled != KEEP_AT_SOURCE
        )

    def heard(self, departure: Departure, asked_at: float) -> None:
        """The destination has answered what we asked at that time; durable with the next save."""
        departure.job.heard_boottime_seconds, departure.job.heard_boot = asked_at, self._boot

    def seconds_left(self, departure: Departure) -> float:
        """Until the VM may not run here any more; infinite where that never comes."""
        job = departure.job
        if not self._concerns(departure):
            return float("inf")
        if job.heard_boottime_seconds is None or job.heard_boot != self._boot:
            # This host was down meanwhile, nobody knows for how long.
            return 0.0
        limit = job.presumed_dead_after_seconds or 0.0
        return job.heard_boottime_seconds + limit * FENCE_SHARE - self._clock()

    def is_due(self, departure: Departure) -> bool:
        """Whether the VM may not run here now."""
        return self.seconds_left(departure) <= 0

    async def stand_still(self, departure: Departure) -> None:
        """Forbid starts and pause the VM. Repeatable. Raises HypervisorError; then it is tried again."""
        job, around = departure.job, departure.around
        async with departure.deciding:
            if not self.is_due(departure):
                return
            found = await asyncio.to_thread(around.guard.forbidden, job.vm)
            # A tombstone says more: it runs elsewhere.
            if found is None or (found.job != job.id and found.cause != TOMBSTONE):
                limit = job.presumed_dead_after_seconds or 0.0
                sentence = (
                    f"VM {job.name}: {job.peer} cannot be reached and may run it by now, as it was set to "
                    f"presume this host dead after {limit:.0f} s; it goes on here when contact returns, or "
                    f"on `precache-proxy settle {job.id} {KEEP_AT_SOURCE}`"
                )
                forbidden = Forbidden(job.vm, FENCED, sentence, job.id, job.epoch)
                await asyncio.to_thread(around.guard.forbid, forbidden)
                job.explain(FENCED, sentence)
                # A lift that comes after a kill looks for a pause that libvirt had not answered by then.
                job.stopped_here = job.pause_unanswered = True
                await departure.save()
                logger.critical("%s", sentence)
            with contextlib.suppress(NotFound):
                await late_pause.pause(departure)

    async def lift(self, departure: Departure) -> None:
        """The peer has cleared its arrival away, or the operator vouches for it: the VM goes on here."""
        job, around = departure.job, departure.around
        async with departure.deciding:
            found = await asyncio.to_thread(around.guard.forbidden, job.vm)
            if found is not None and found.job == job.id and found.cause == FENCED:
                await asyncio.to_thread(around.guard.allow, job.vm, job=job.id)
                job.pause_unanswered = departure.pauses.unanswered > 0
                await departure.save()
                await around.domains.resume(job.vm)
                logger.warning("VM %s: contact with %s is settled; it goes on here", job.vm, job.peer)

    async def _keep(self, departure: Departure) -> None:
        asking: asyncio.Task[None] | None = None
        asked_at = float("-inf")
        limit = departure.job.presumed_dead_after_seconds or 0.0
        try:
            while self._concerns(departure):
                if self.is_due(departure):
                    await self._stand_still_quietly(departure)
                if (asking is None or asking.done()) and self._clock() - asked_at >= (
                    limit * FENCE_SHARE * ASK_SHARE
                ):
                    asked_at = self._clock()
                    # Beside us: an answer that does not come must not keep the VM running.
                    asking = asyncio.create_task(self._ask(departure))
                await asyncio.sleep(min(LOOK_SECONDS, max(self.seconds_left(departure), 0.05)))
        finally:
            if asking is not None:
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)

    async def _stand_still_quietly(self, departure: Departure) -> None:
        try:
            await self.stand_still(departure)
        except (LifeboatError, OSError) as error:
            logger.critical("VM %s: could not be stopped here: %s; tried again", departure.job.vm, error)

    async def _ask(self, departure: Departure) -> None:
        try:
            await departure.call("status", {}, ASK_TIMEOUT_SECONDS)
            await departure.save()
        except (LifeboatError, OSError) as error:
            logger.debug("evacuation %s: %s not heard: %s", departure.job.id, departure.job.peer, error)
