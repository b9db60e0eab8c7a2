# SPDX-License-Identifier: GPL-3.0-or-later
"""What an arrival that does not run yet occupies on this host: guard, overlays, sockets' directory, replica.

Made before libvirt comes, and removed without a trace when the VM stays where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

from precache_proxy import durable
from precache_proxy.crash_points import crash_point
from precache_proxy.errors import NotFound
from precache_proxy.evacuation.arrival import Arrival, ArrivalState
from precache_proxy.evacuation.arrival_network import ArrivalNetwork
from precache_proxy.evacuation.arrival_records import ArrivalRecords
from precache_proxy.evacuation.domains import Domains
from precache_proxy.evacuation.guard import ARRIVAL, Forbidden, Guard
from precache_proxy.evacuation.images import create_overlay
from precache_proxy.evacuation.layers import forget_definition
from precache_proxy.evacuation.relay import make_job_directory, remove_job_directory
from precache_proxy.evacuation.rooms import StoreRoom
from precache_proxy.hypervisor.qemu_user import QemuUser

logger = logging.getLogger(__name__)


class Footprint:
    """Makes and removes it. The VM's lock is held by the caller."""

    def __init__(
        self,
        records: ArrivalRecords,
        domains: Domains,
        guard: Guard,
        store: StoreRoom,
        network: ArrivalNetwork,
        qemu_user: QemuUser,
        sockets_directory: Path,
    ) -> None:
        self._records = records
        self._domains = domains
        self._guard = guard
        self._store = store
        self._network = network
        self._qemu_user = qemu_user
        self._sockets_directory = sockets_directory

    async def make(self, arrival: Arrival) -> None:
        """Guard first, then what libvirt needs: from the first line on nothing but the migration may start
        it."""
        sentence = (
            f"VM {arrival.name} is arriving from {arrival.peer} (job {arrival.id}) and was not released by "
            f"it yet; "
            f"it may run there. Wait, or settle it: precache-proxy settle {arrival.id} source-dead"
        )
        forbidden = Forbidden(arrival.vm, ARRIVAL, sentence, arrival.id, arrival.epoch)
        await asyncio.to_thread(self._guard.forbid, forbidden)
        crash_point("arrival-guarded")

        def make_directories() -> None:
            for directory in {Path(disk.overlay).parent for disk in arrival.disks.values()}:
                directory.mkdir(exist_ok=True, mode=0o711)
                directory.chmod(0o711)
                durable.sync_directory(directory.parent)
            owner = (self._qemu_user.uid, self._qemu_user.gid)
            make_job_directory(self._sockets_directory / arrival.id, owner)
            if not arrival.restarts:
                self._guard.let_arrive(arrival.vm)

        await asyncio.to_thread(make_directories)
        for disk in arrival.disks.values():
            await create_overlay(Path(disk.overlay), disk.replica, disk.replica_format, disk.size_bytes)

    async def remove(self, arrival: Arrival) -> None:
        """Remove everything of an arrival that will never run here; repeatable after a crash at any line."""
        if arrival.state is ArrivalState.ABORTED:
            return
        # Of one that a crash left half removed nobody knows any more: withdrawing twice is no harm.
        was_released = arrival.state is not ArrivalState.PREPARED
        if arrival.state is not ArrivalState.ABORTING:
            await self._records.enter(arrival, ArrivalState.ABORTING)
        crash_point("arrival-aborting")
        await self._domains.destroy(arrival.vm)
        await forget_definition(self._domains, arrival.vm)
        if was_released:
            await self._network.remove(arrival)

        def remove_files() -> None:
            for disk in arrival.disks.values():
                durable.remove(Path(disk.overlay))
                durable.remove(Path(disk.top))
            self._guard.arrived(arrival.vm)
            if arrival.tombstone is not None:
                self._guard.forbid(Forbidden(**arrival.tombstone))
            else:
                self._guard.allow(arrival.vm, job=arrival.id)
            remove_job_directory(self._sockets_directory / arrival.id)

        await asyncio.to_thread(remove_files)
        await self._store.thaw(arrival.vm)
        await self._records.enter(arrival, ArrivalState.ABORTED)

    async def thaw_unclaimed(self) -> None:
        """Replicas that a killed `prepare` froze before its arrival was on record take generations again.

        Called after the records were read and before any peer is answered.
        """
        for status in await self._store.statuses():
            if status["state"] == "frozen":
                await self.thaw_if_unclaimed(str(status["vm"]))

    async def thaw_if_unclaimed(self, vm: str) -> None:
        """The same for one VM."""
        # An activated arrival holds it too: the VM runs on those files until the store has let them go.
        if any(not item.ended for item in self._records.of(vm)):
            return
        with contextlib.suppress(NotFound):
            if (await self._store.status(vm))["state"] == "frozen":
                logger.warning("VM %s: its replica was held for an arrival that is not on record", vm)
                await self._store.thaw(vm)
