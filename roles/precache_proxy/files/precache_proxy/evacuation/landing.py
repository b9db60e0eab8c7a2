# SPDX-License-Identifier: GPL-3.0-or-later
"""After the hand-off, at the destination: the way back is protected, then the chain collapses into one image.

The layer that arrived is what the old home lacks: it is not merged before the old home has it sealed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from precache_proxy import durable
from precache_proxy.blocks.images import ImageReference
from precache_proxy.crash_points import crash_point
from precache_proxy.errors import Conflict, HypervisorError, LifeboatError, NotFound
from precache_proxy.evacuation import layers
from precache_proxy.evacuation.arrival import Arrival, ArrivalState
from precache_proxy.evacuation.arrival_records import ArrivalRecords
from precache_proxy.evacuation.domains import Domains
from precache_proxy.evacuation.reconcile import Presence
from precache_proxy.evacuation.rooms import SourceRoom, StoreRoom
from precache_proxy.evacuation.tracking import Tracking

logger = logging.getLogger(__name__)

WAIT_SECONDS = 2.0
RETRY_SECONDS = 30.0
SETTLE_SECONDS = 0.5
DEFAULT_RPO_SECONDS = 15.0


class Landing:
    """Lands arrivals in the background, one task each."""

    def __init__(
        self,
        records: ArrivalRecords,
        domains: Domains,
        source: SourceRoom,
        store: StoreRoom,
        links: Mapping[str, Any],
        tracking: Tracking,
    ) -> None:
        self._records = records
        self._domains = domains
        self._source = source
        self._store = store
        self._links = links
        self._tracking = tracking
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def begin(self, arrival: Arrival) -> None:
        """Land an activated arrival, unless that is under way."""
        task = self._tasks.get(arrival.id)
        if arrival.state is ArrivalState.ACTIVATED and (task is None or task.done()):
            task = asyncio.create_task(self._run(arrival), name=f"landing-{arrival.id}")
            self._tasks[arrival.id] = task
            task.add_done_callback(lambda _done: self._tasks.pop(arrival.id, None))

    async def leave(self, vm: str) -> None:
        """The VM moves on: stop merging its layers. What is on record stays; the next hand-off takes the
        chain along."""
        for arrival in self._records.of(vm):
            task = self._tasks.pop(arrival.id, None)
            if task is not None and not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await layers.cancel_block_jobs(self._domains, vm, arrival.disks)

    async def stop(self) -> None:
        """End the tasks; landings carry on at the next start."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()

    async def _run(self, arrival: Arrival) -> None:
        while arrival.state is ArrivalState.ACTIVATED:
            try:
                await self.land(arrival)
            except LifeboatError as error:
                logger.warning("landing of VM %s: %s; tried again", arrival.vm, error)
                arrival.sentence = f"landing: {error}"
                await asyncio.sleep(RETRY_SECONDS)

    async def land(self, arrival: Arrival) -> None:
        """All of it, each part repeatable."""
        if not arrival.landing:
            await self._track(arrival)
            await self._protect_way_back(arrival)
        crash_point("landing-begun")
        if not arrival.fails_over:
            await self._wait_until_home_has_it(arrival)
        if not await self._is_running(arrival.vm):
            arrival.landing = "left"
        else:
            await self._collapse_between_passes(arrival)
            if not arrival.fails_over:
                await self._tell_home(arrival)
            arrival.landing = "collapsed"
        crash_point("landing-collapsed")
        async with self._records.lock(arrival.vm):
            await self._records.enter(arrival, ArrivalState.LANDED)

    async def _track(self, arrival: Arrival) -> None:
        if arrival.checkpoint:
            return
        # Its peers come first: QEMU's main loop serves its network, too.
        await asyncio.sleep(SETTLE_SECONDS)
        async with self._records.lock(arrival.vm):
            try:
                await self._tracking.begin_while_running(arrival)
            except OSError as error:
                raise HypervisorError(f"VM {arrival.name}: its layer cannot be changed: {error}") from error

    async def _tell_home(self, arrival: Arrival) -> None:
        """The old home may merge generations into what it kept; until told its chain grows with every pass.

        Raises PeerUnreachable: told again with the next attempt.
        """
        link = self._links.get(arrival.peer)
        if link is None:
            logger.warning(
                "VM %s: %s is no peer any more; it is not told of the landing", arrival.vm, arrival.peer
            )
            return
        try:
            await link.call("store.allow_commit", {"vm": arrival.vm, "epoch": arrival.epoch})
        except (Conflict, NotFound) as error:
            # It keeps nothing of the VM, or something of another owner: nothing there waits for us.
            logger.info("VM %s: landing: %s", arrival.vm, error)

    async def _protect_way_back(self, arrival: Arrival) -> None:
        await self._take_over_files(arrival)
        await layers.drop_stray_bitmaps(
            self._domains, arrival.vm, {name: list(arrival.disks) for name in arrival.stray_bitmaps}
        )
        overlays = {
            key: ImageReference(Path(disk.overlay), "qcow2", disk.size_bytes)
            for key, disk in arrival.disks.items()
        }
        await self._source.adopt_for_return(
            arrival.vm,
            name=arrival.name,
            peer=arrival.peer,
            epoch=arrival.epoch,
            generation=arrival.generation,
            # What its dead home kept is not what it ran from here: the way back begins with a first copy.
            checkpoint="" if arrival.fails_over else arrival.checkpoint,
            overlays={} if arrival.fails_over else overlays,
            autostart_wanted=arrival.autostart,
            **{"rpo_seconds": DEFAULT_RPO_SECONDS, **arrival.protection},
        )
        arrival.landing = "way-back-protected"
        await self._records.save(arrival)

    async def _take_over_files(self, arrival: Arrival) -> None:
        """The replica's files are the VM's own from now on; remember how deep they go."""
        with contextlib.suppress(NotFound):
            chains = await self._store.detach(arrival.vm)
            for key, chain in chains.items():
                if key in arrival.disks and chain:
                    arrival.disks[key].base = str(chain[-1].path)
            await self._records.save(arrival)

    async def _wait_until_home_has_it(self, arrival: Arrival) -> None:
        """Until the old home has sealed what arrived here. A home that is gone keeps the chain as it is."""
        while True:
            try:
                status = self._source.status(arrival.vm)
            except NotFound:
                # Not protected any more (the operator's choice): nobody needs the layer.
                return
            if (
                int(status.get("generation") or 0) > arrival.generation
                and int(status["epoch"]) >= arrival.epoch
            ):
                return
            await asyncio.sleep(WAIT_SECONDS)

    async def _is_running(self, vm: str) -> bool:
        """Wait until the VM runs: layers of one that is off are merged when it is started again. False: it
        left."""
        while (presence := await self._domains.presence(vm)) is not Presence.RUNNING:
            if presence is Presence.ABSENT:
                return False
            await asyncio.sleep(RETRY_SECONDS)
        return True

    async def _collapse_between_passes(self, arrival: Arrival) -> None:
        """Hold the passes: libvirt refuses a backup while a block job runs, and the other way round."""
        holder = f"landing-{arrival.id}"
        try:
            # An evacuation ends the landing wherever it is: while it waits for a pass, too.
            with contextlib.suppress(NotFound):
                await self._source.hold(arrival.vm, holder)
            await self._collapse(arrival)
        finally:
            with contextlib.suppress(NotFound):
                await self._source.release(arrival.vm, holder)

    async def _collapse(self, arrival: Arrival) -> None:
        """Merge every layer into the lowest image that is ours; the VM's disk has its old name again."""
        vm = arrival.vm
        for key, disk in arrival.disks.items():
            definition = await self._domains.definition(vm)
            current = definition.disk(key)
            if current is None:
                continue
            chain = [current.path, *(image.path for image in current.backing)]
            base = disk.base
            if base not in chain:
                continue
            if current.path != base:
                # On record first: a kill after the merge must still find what is to be removed.
                disk.merged = chain[: chain.index(base)]
                await self._records.save(arrival)
                await layers.commit(self._domains, vm, key, top=None, base=base)
                await layers.wait_for_layer(self._domains, vm, key, base)
                crash_point("landing-merged")
            # Before they go: a definition that still names one of them could not start the VM.
            await asyncio.to_thread(layers.sync_definitions)
            for path in disk.merged:
                # Generations of the replica and our overlays: their content is in the base now.
                await asyncio.to_thread(durable.remove, Path(path))
