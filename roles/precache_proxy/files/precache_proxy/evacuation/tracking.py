# SPDX-License-Identifier: GPL-3.0-or-later
"""The tracking of the way back: the layer that arrived stands still, and what comes after it is counted.

A VM that stands here paused for a while gets it then, and runs in its top overlay from the first instant.
One that is resumed as soon as it has come gets it while it runs: it would stand still for that otherwise,
for 60 to 175 ms as measured. Nothing is lost by that: what it writes until then is in the layer that arrived,
which is sealed as a whole. Only the order is another one: the checkpoint comes first, in that layer, and the
snapshot takes its bitmap along to the overlay, in one transaction of QEMU's (qemuSnapshotDiskBitmapsPropagate
in libvirt's src/qemu/qemu_snapshot.c). A write between the two is in the layer and counted: it is sent twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from precache_proxy import durable
from precache_proxy.crash_points import crash_point
from precache_proxy.errors import Conflict, HypervisorError, LifeboatError
from precache_proxy.evacuation import layers
from precache_proxy.evacuation.arrival import Arrival
from precache_proxy.evacuation.arrival_records import ArrivalRecords
from precache_proxy.evacuation.domains import Domains
from precache_proxy.evacuation.images import create_overlay
from precache_proxy.evacuation.reconcile import Presence
from precache_proxy.hypervisor.domain_xml import Definition

logger = logging.getLogger(__name__)

TRACKING_LOST: Final = "tracking-lost"
_ACTIVE = frozenset({Presence.RUNNING, Presence.ARRIVED, Presence.PAUSED})


def _checkpoint(arrival: Arrival) -> str:
    return f"lifeboat-e{arrival.epoch}-g{arrival.generation + 1}"


def _tops(arrival: Arrival) -> dict[str, str]:
    return {key: disk.top for key, disk in arrival.disks.items()}


def _in_tops(arrival: Arrival, definition: Definition) -> list[str]:
    """The disks that write to their top overlays, by this definition."""
    tops = _tops(arrival).items()
    return [key for key, top in tops if (disk := definition.disk(key)) and disk.path == top]


def _sync(arrival: Arrival, names: Iterable[str]) -> None:
    """These files' names, the definition that has them, and what arrived are on disk (blocking)."""
    layers.sync_names(names)
    for disk in arrival.disks.values():
        durable.sync_file(Path(disk.overlay))


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
        checkpoint, tops, failure = _checkpoint(arrival), _tops(arrival), ""
        try:
            await self._refuse_when_late(arrival, checkpoint, seen)
            definition = await self._domains.definition(arrival.vm)
            if len(_in_tops(arrival, definition)) < len(tops):
                await layers.put_overlays(self._domains, arrival.vm, tops, definition)
            await layers.create_checkpoint(self._domains, arrival.vm, checkpoint, tops, definition)
        except LifeboatError as error:
            failure = str(error)
        except OSError as error:
            failure = f"names of what arrived cannot be made durable: {error}"

        await self._conclude(arrival, checkpoint, failure)

    async def make_durable(self, arrival: Arrival) -> None:
        """What arrived is on disk, names and all, before a VM that is not tracked yet runs on it.

        A disk that fails here costs nothing but this: the VM has no other place any more.
        """
        try:
            await asyncio.to_thread(_sync, arrival, [disk.overlay for disk in arrival.disks.values()])
        except OSError as error:
            logger.error("VM %s: what arrived cannot be made durable: %s", arrival.vm, error)

    async def begin_while_running(self, arrival: Arrival) -> None:
        """The same for a VM that runs already, from the layer that arrived. Repeating it is no error.

        Raises LifeboatError, OSError where it is not known how far that came: then it is to be repeated, and
        no layer merged before.
        """
        if arrival.checkpoint:
            return
        checkpoint, tops = _checkpoint(arrival), _tops(arrival)
        presence = await self._domains.presence(arrival.vm)
        if presence in {Presence.UNKNOWN, Presence.INCOMING}:
            raise HypervisorError(f"VM {arrival.name}: libvirt here says {presence.value}; asked again")
        if presence not in _ACTIVE:
            await self._conclude(arrival, checkpoint, "it ended before its writes were counted")
            return
        definition = await self._domains.definition(arrival.vm)
        failure = ""
        if _in_tops(arrival, definition):
            # Since before a kill. One that was started from there since has no bitmap: a pass finds that.
            if not await layers.has_checkpoint(self._domains, arrival.vm, checkpoint):
                failure = f"it ran before its writes were counted from {checkpoint}"
        else:
            await layers.create_checkpoint(self._domains, arrival.vm, checkpoint, tops, definition)
            await self._change_over(arrival, definition)
        crash_point("arrival-changed-over")
        await self._conclude(arrival, checkpoint, failure)

    async def _change_over(self, arrival: Arrival, definition: Definition) -> None:
        """From the layer that arrived to the top overlays, while the VM writes.

        libvirt writes the definition after the change: what the guest syncs in between would not be where the
        VM is started from after a power cut. So the definition names the empty overlays first, and goes on to
        where the change fails: whenever the power goes, it leads to all that was written.
        """
        vm, tops = arrival.vm, _tops(arrival)
        persistent = await self._domains.definition(vm, inactive=True)
        for key, disk in arrival.disks.items():
            named = persistent.disk(key)
            if named is None or named.path != disk.top:
                await create_overlay(Path(disk.top), disk.overlay, "qcow2", disk.size_bytes)
        await layers.name_in_definition(self._domains, vm, {key: (top, "qcow2") for key, top in tops.items()})
        crash_point("arrival-tops-named")
        await layers.put_overlays(self._domains, vm, tops, definition, made=True)

    async def _conclude(self, arrival: Arrival, checkpoint: str, failure: str) -> None:
        """Durable before it is on record."""
        try:
            # The VM runs in the tops, also where they are on since before a kill: their names come first, and
            # the definition that has them.
            await asyncio.to_thread(_sync, arrival, _tops(arrival).values())
        except OSError as error:
            failure = failure or f"what arrived cannot be made durable: {error}"
        if not failure:
            arrival.checkpoint = checkpoint
            if arrival.cause == TRACKING_LOST:
                # Refused while it stood still, and not since.
                arrival.cause = arrival.sentence = ""
        else:
            logger.error(
                "VM %s: the way back is not tracked and will need a comparison: %s", arrival.vm, failure
            )
            arrival.cause, arrival.sentence = TRACKING_LOST, failure
        await self._records.save(arrival)
        crash_point("arrival-tracked")

    async def _refuse_when_late(self, arrival: Arrival, checkpoint: str, seen: Presence | None) -> None:
        """Raise where the VM has run untracked in its top: writes before the checkpoint would be lost."""
        if (seen or await self._domains.presence(arrival.vm)) is not Presence.RUNNING:
            return
        if not await layers.has_checkpoint(self._domains, arrival.vm, checkpoint):
            raise Conflict(f"VM {arrival.name}: it ran before its writes were counted from {checkpoint}")
