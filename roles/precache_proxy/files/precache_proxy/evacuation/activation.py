# SPDX-License-Identifier: GPL-3.0-or-later
"""A released arrival becomes the VM: resumed as it stands here, or started anew where its memory was lost."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from precache_proxy.crash_points import crash_point
from precache_proxy.errors import Conflict, HypervisorError, LifeboatError
from precache_proxy.evacuation.arrival import RUNS_HERE, Arrival, ArrivalState
from precache_proxy.evacuation.arrival_network import ArrivalNetwork
from precache_proxy.evacuation.arrival_records import ArrivalRecords
from precache_proxy.evacuation.domains import Domains
from precache_proxy.evacuation.guard import Guard
from precache_proxy.evacuation.reconcile import Presence
from precache_proxy.evacuation.relay import remove_job_directory
from precache_proxy.evacuation.tracking import Tracking

logger = logging.getLogger(__name__)


class Activation:
    """Lets released arrivals run. The VM's lock is held by the caller."""

    def __init__(
        self,
        records: ArrivalRecords,
        domains: Domains,
        guard: Guard,
        network: ArrivalNetwork,
        tracking: Tracking,
        sockets_directory: Path,
    ) -> None:
        self._records = records
        self._domains = domains
        self._guard = guard
        self._network = network
        self._tracking = tracking
        self._sockets_directory = sockets_directory

    async def run(self, arrival: Arrival, seen: Presence | None = None) -> None:
        """Run a released VM. ``seen``: what libvirt has just said of it. Raises Conflict where libvirt does
        not say what there is to run."""
        presence = seen or await self._domains.presence(arrival.vm)
        arrival.contact_matters_no_more()
        if presence in {Presence.ARRIVED, Presence.PAUSED, Presence.RUNNING}:
            await self._resume(arrival)
        elif presence in {Presence.SHUT_OFF, Presence.ABSENT, Presence.ENDED}:
            await self._start_anew(arrival)
        else:
            raise Conflict(f"VM {arrival.name}: libvirt here says {presence.value}; asked again shortly")

    async def _resume(self, arrival: Arrival) -> None:
        if arrival.restarts:
            await self._tracking.begin(arrival)
        # Else it runs in what arrived until the landing has it tracked (tracking.py).
        await self._install_network(arrival)
        if arrival.boots:
            await self._domains.resume(arrival.vm)
            arrival.timings["resumed_monotonic"] = time.monotonic()
        crash_point("arrival-resumed")
        await self._records.enter(arrival, ArrivalState.ACTIVATED)
        crash_point("arrival-activated")
        await self.settle_down(arrival)

    async def _start_anew(self, arrival: Arrival) -> None:
        """The memory is gone, the disks are whole: ACTIVATED is durable first, for the guard must go before a
        start."""
        arrival.memory_lost = True
        await self._install_network(arrival)
        await self._records.enter(arrival, ArrivalState.ACTIVATED)
        await self.settle_down(arrival)

    async def _leave_off(self, arrival: Arrival) -> None:
        """It was shut off at its old home: it has stood here without running an instruction, and ends."""
        if "ended_at" in arrival.timings:
            return
        presence = await self._domains.presence(arrival.vm)
        if presence in {Presence.ARRIVED, Presence.PAUSED}:
            await self._domains.destroy(arrival.vm)
        elif presence is Presence.ABSENT:
            await self._domains.define(arrival.definition, arrival.name)
        elif presence in {Presence.UNKNOWN, Presence.INCOMING}:
            # Said to be off, one that stands here paused would stand for ever.
            raise HypervisorError(
                f"VM {arrival.name}: libvirt here does not say that it has ended ({presence.value}); asked "
                "again"
            )
        arrival.timings["ended_at"] = time.time()
        await self._records.save(arrival)

    async def _install_network(self, arrival: Arrival) -> None:
        try:
            await self._network.install(arrival.definition, arrival)
        except LifeboatError as error:
            # A VM without its routes is better than no VM; it is tried again while it runs.
            logger.error("VM %s: network not installed before it runs: %s", arrival.vm, error)
            arrival.network_owed = True
            arrival.cause, arrival.sentence = "network", str(error)

    async def install_owed_network(self, arrival: Arrival) -> None:
        """Try again to make the addresses of a VM that runs here lead here; one that left owes nothing."""
        if arrival.state not in RUNS_HERE or self._records.latest_of(arrival.vm) is not arrival:
            return
        try:
            await self._network.install(arrival.definition, arrival)
        except LifeboatError as error:
            logger.warning("VM %s: its network is still not installed: %s; tried again", arrival.vm, error)
            return
        arrival.network_owed = False
        if arrival.cause == "network":
            arrival.cause = arrival.sentence = ""
        await self._records.save(arrival)

    async def settle_down(self, arrival: Arrival) -> None:
        """After ACTIVATED, repeatable: lift the guard, run if it has to be started, autostart, close the
        sockets."""
        await asyncio.to_thread(self._guard.arrived, arrival.vm)
        await asyncio.to_thread(self._guard.allow, arrival.vm, job=arrival.id)
        if not arrival.boots:
            await self._leave_off(arrival)
        elif arrival.memory_lost and "started_at" not in arrival.timings:
            if await self._domains.presence(arrival.vm) is Presence.ABSENT:
                await self._domains.define(arrival.definition, arrival.name)
            await self._domains.start(arrival.vm)
            arrival.timings["started_at"] = time.time()
            await self._records.save(arrival)
        await asyncio.to_thread(remove_job_directory, self._sockets_directory / arrival.id)
        logger.info("VM %s is here since the release by %s", arrival.vm, arrival.peer)
