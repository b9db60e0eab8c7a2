# SPDX-License-Identifier: GPL-3.0-or-later
"""The tracking of the way back, put in place while an arrival stands here complete and paused."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from precache_proxy import durable
from precache_proxy.crash_points import crash_point
from precache_proxy.errors import Conflict, LifeboatError
from precache_proxy.evacuation import layers
from precache_proxy.evacuation.arrival import Arrival
from precache_proxy.evacuation.arrival_records import ArrivalRecords
from precache_proxy.evacuation.domains import Domains
from precache_proxy.evacuation.reconcile import Presence

logger = logging.getLogger(__name__)


class Tracking:
    """Top overlays and the checkpoint of arrivals. The VM's lock is held by the caller."""

    def __init__(self, domains: Domains, records: ArrivalRecords) -> None:
        self._domains = domains
        self._records = records

    async def begin(self, arrival: Arrival, seen: Presence | None = None) -> None:
        """Put the top overlays on and the checkpoint in, while paused: the way back is tracked from the first
        instant.

        What arrived stands still below, flushed and synced. A failure costs the way back its bitmap, not the
        VM its run. Repeating it is no error. ``seen``: what libvirt has just said of the VM.
        """
        if arrival.checkpoint:
            return
        checkpoint = f"lifeboat-e{arrival.epoch}-g{arrival.generation + 1}"
        tops = {key: disk.top for key, disk in arrival.disks.items()}
        failure = ""
        try:
            await self._refuse_when_late(arrival, checkpoint, seen)
            definition = await self._domains.definition(arrival.vm)
            on_top = [key for key, top in tops.items() if (disk := definition.disk(key)) and disk.path == top]
            if len(on_top) < len(tops):
                await layers.put_overlays(self._domains, arrival.vm, tops, definition)
            await layers.create_checkpoint(self._domains, arrival.vm, checkpoint, tops, definition)
        except LifeboatError as error:
            failure = str(error)
        except OSError as error:
            failure = f"names of what arrived cannot be made durable: {error}"

        def sync() -> None:
            # The VM runs in the tops, also where they are on since before a kill: their names come first, and
            # the definition that has them.
            layers.sync_names(tops.values())
            for disk in arrival.disks.values():
                durable.sync_file(Path(disk.overlay))

        try:
            await asyncio.to_thread(sync)
        except OSError as error:
            failure = failure or f"what arrived cannot be made durable: {error}"
        if not failure:
            arrival.checkpoint = checkpoint
        else:
            logger.error(
                "VM %s: the way back is not tracked and will need a comparison: %s", arrival.vm, failure
            )
            arrival.cause, arrival.sentence = "tracking-lost", failure
        await self._records.save(arrival)
        crash_point("arrival-tracked")

    async def _refuse_when_late(self, arrival: Arrival, checkpoint: str, seen: Presence | None) -> None:
        """Raise where the VM has run untracked: between overlay and checkpoint its writes would be lost."""
        if (seen or await self._domains.presence(arrival.vm)) is not Presence.RUNNING:
            return
        if not await layers.has_checkpoint(self._domains, arrival.vm, checkpoint):
            raise Conflict(f"VM {arrival.name}: it ran before its writes were counted from {checkpoint}")
