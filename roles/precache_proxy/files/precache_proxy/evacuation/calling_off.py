# SPDX-License-Identifier: GPL-3.0-or-later
"""A live move is ended before its end: the guest stands still while QEMU lets go of its mirrors.

QEMU's ``mirror_run`` (block/mirror.c, seen in 10.0) frees the bitmap of blocks in flight before the guest's
writes that wait for a mirror have settled. These clear their bits in freed memory, and QEMU may crash: the
VM's memory is lost. A stop of the guest waits for them (``vm_stop`` drains every block device), and no other
follows. libvirt allows it under way (VIR_JOB_SUSPEND), and lets a guest that ran before the migration go on
when mirrors and migration are gone (qemuMigrationSrcRestoreDomainState, qemuProcessRecoverMigrationOut). What
stands still all the same goes on with the rollback, for it is on record that we stopped it.

The guest is never resumed from here: one that the fence has stopped meanwhile must not run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Final

from precache_proxy.crash_points import crash_point
from precache_proxy.errors import HypervisorError, NotFound
from precache_proxy.evacuation import late_pause, layers, migrate

if TYPE_CHECKING:
    from precache_proxy.evacuation.departure import Departure

logger = logging.getLogger(__name__)

ABORT_AGAIN_SECONDS: Final = 0.2
# From the order to stop the guest until its vCPUs stand still and its own disks have what they had written:
# nobody tells that. And the longest that a dead relay stays open for the order.
SETTLE_SECONDS: Final = 0.5
STANDSTILL_SECONDS: Final = 5.0


class CallingOff:
    """The end that one migration may have to be brought to.

    ``waits``: whether the guest's writes wait, or may wait, for a mirror; one in the background settles what
    it has in flight by itself, and its guest runs on.
    """

    def __init__(self, departure: Departure, *, waits: bool) -> None:
        self._departure = departure
        self.waits = waits
        self._stopping: asyncio.Task[bool] | None = None
        self._stopped_at = 0.0
        # the order to stop the guest is on its way, or none is to be
        self._ordered = asyncio.Event()
        self._watching = asyncio.create_task(self._end_when_enough())

    def writes_wait(self) -> bool:
        """Whether the guest's writes may be made to wait for a mirror; from now on they may then.

        Not in a move that is being ended: its guest is not stopped between two orders to end it.
        """
        if self._departure.enough.is_set():
            return False
        self.waits = True
        return True

    async def _end_when_enough(self) -> None:
        """End the migration once that is asked for: again and again, for libvirt may not have begun it
        yet."""
        departure = self._departure
        domains, vm = departure.around.domains, departure.job.vm
        await departure.enough.wait()
        while True:
            # Before libvirt has the job there is no mirror.
            if self.waits and self._stopping is None and await domains.migrating(vm):
                self._stopped_at = time.monotonic()
                self._stopping = asyncio.create_task(
                    stop_guest(departure, only_migrating=True, ordered=self._ordered)
                )
                # Its writes have settled when libvirt answers; it does not when their relay is dead, until
                # that is closed.
                await asyncio.wait({self._stopping})
            self._ordered.set()
            await migrate.abort(domains, vm)
            await asyncio.sleep(ABORT_AGAIN_SECONDS)

    async def stand_still(self) -> None:
        """Have the migration end for a dead relay, without whose end the stop of the guest does not end;
        return when the guest has had the time to stand still.

        No write of its is on its way to a mirror then, and those that wait in one end together.
        """
        self._departure.enough.set()
        if self.waits:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STANDSTILL_SECONDS):
                    await self._ordered.wait()
            if self._ordered.is_set():
                await asyncio.sleep(SETTLE_SECONDS)

    async def over(self) -> None:
        """The migration has ended, one way or the other. When this returns no stop of ours is under way."""
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        self._ordered.set()
        if self._stopping is not None:
            # Come after libvirt let the guest go on, it would be found by nobody.
            await asyncio.wait({self._stopping})
            (stopped,) = await asyncio.gather(self._stopping, return_exceptions=True)
            if stopped is not True:
                return
            job = self._departure.job
            job.stood_still_seconds = time.monotonic() - self._stopped_at
            logger.info(
                "evacuation %s of VM %s: its guest stood still for %.2f s while its move was ended",
                job.id,
                job.vm,
                job.stood_still_seconds,
            )


async def stop_guest(
    departure: Departure, *, only_migrating: bool = False, ordered: asyncio.Event | None = None
) -> bool:
    """Pause the guest so that its mirrors can be ended; on record before it is done. One that somebody has
    paused is his to resume.

    ``only_migrating``: a migration may end by itself while that goes on record. libvirt would let nobody go
    on any more then, and the rollback does only once it has asked a peer that may not be heard. Whether we
    have paused it. ``ordered`` is set when libvirt is asked.
    """
    stopped = False
    domains, vm = departure.around.domains, departure.job.vm
    try:
        if await domains.paused_by_user(vm):
            return False
        await departure.note_stop()
        crash_point("departure-before-standstill")
        loop = asyncio.get_running_loop()
        stopped = await late_pause.pause(
            departure,
            only_migrating=only_migrating,
            at_order=None if ordered is None else lambda: loop.call_soon_threadsafe(ordered.set),
        )
    except (HypervisorError, NotFound) as error:
        # The migration has to end all the same.
        logger.warning("VM %s: not stopped before its move is ended: %s", vm, error)
    crash_point("departure-stands-still")
    return stopped


async def end_leftovers(departure: Departure) -> None:
    """End what an earlier migration may have left in our QEMU. Raises HypervisorError, NotFound."""
    job, domains = departure.job, departure.around.domains

    async def stop() -> None:
        await stop_guest(departure, only_migrating=True)

    await domains.wait_not_migrating(job.vm, departure.around.stall_seconds * 2, stop)
    definition = await domains.definition(job.vm)
    mirrored = [
        key for key in job.disks if (disk := definition.disk(key)) is not None and disk.mirror == "copy"
    ]
    if mirrored:
        # Whether the guest's writes wait for it is not known any more.
        await stop_guest(departure)
        await layers.cancel_block_jobs(domains, job.vm, mirrored)
