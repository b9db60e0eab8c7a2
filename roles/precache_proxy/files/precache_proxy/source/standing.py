# SPDX-License-Identifier: GPL-3.0-or-later
"""Where a VM's replica stands at its peer, and what of that this host can go on from."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from precache_proxy.errors import Conflict, StaleEpoch
from precache_proxy.hypervisor.domain_xml import Definition
from precache_proxy.source.disks import VmDisks
from precache_proxy.source.environment import Environment
from precache_proxy.source.record import ProtectionRecord, Sealed
from precache_proxy.source.tracker import VmReference, is_of_generation

logger = logging.getLogger(__name__)

PREPARE_TIMEOUT_SECONDS = 120.0
# Longer after the question a peer is asked again how it stands.
_HEARD_SECONDS = 2.0


class OldHomeNotReady(Conflict):
    """A VM has just arrived, and its old home is still making what it kept the base of a replica."""

    cause = "way-back"


class PeerStanding:
    """``needs_reconcile``: only the peer knows where we stand."""

    def __init__(self, record: ProtectionRecord, environment: Environment, disks: VmDisks) -> None:
        self.needs_reconcile = True
        self.replica_name = ""
        self.replica_sizes: dict[str, int] = {}
        # what the peer knows of :attr:`protection`; None: nothing is there, or its release keeps none
        self.replica_protection: dict[str, Any] | None = None
        self._heard: tuple[float, dict[str, Any]] | None = None
        self._record = record
        self._environment = environment
        self._disks = disks

    @property
    def _vm(self) -> VmReference:
        return self._disks.vm

    @property
    def protection(self) -> dict[str, Any]:
        """What was asked for, as the peer keeps it for the case that this host dies."""
        record = self._record
        return {
            "rpo_seconds": record.rpo_seconds,
            "priority": record.priority,
            "autostart": record.autostart,
        }

    async def save(self) -> None:
        """Make the record durable. Raises NoSpace."""
        await self._record.save(self._environment.directory)

    def hear(self, status: dict[str, Any], asked_at: float) -> None:
        """What the peer told of the replica when it was asked (monotonic) for something else: the next
        :meth:`reconcile` goes by it, if it comes at once.
        """
        self._heard = asked_at, status

    async def _status(self) -> dict[str, Any]:
        heard, self._heard = self._heard, None
        if heard is not None and time.monotonic() - heard[0] < _HEARD_SECONDS:
            return heard[1]
        link = self._environment.link(self._record.peer)
        return await link.call("store.status", {"vm": self._record.uuid})

    async def reconcile(self) -> None:
        """Adopt what the peer holds: drop what it has sealed, keep what it has not. Raises StaleEpoch."""
        record = self._record
        self._disks.media.ask_again()
        status = await self._status()
        if status.get("exists") and int(status["epoch"]) > record.epoch:
            raise StaleEpoch(
                f"{self._vm}: peer {record.peer} holds epoch {status['epoch']}, this host {record.epoch}: "
                "its home has moved; unprotect it here, or settle the evacuation"
            )
        # What is detached is history: the files that the VM ran on there, until it left them behind.
        is_there = bool(status.get("exists")) and status.get("state") != "detached"
        if not is_there and record.return_overlays:
            raise OldHomeNotReady(
                f"{self._vm}: its old home {record.peer} has not yet taken what it kept as a replica; "
                "wait for it, or resync to copy anew"
            )
        if not is_there:
            if record.sealed is not None or record.seeding_offsets:
                logger.warning("%s: peer %s has no replica any more; copying it anew", self._vm, record.peer)
            record.sealed, record.seeding_checkpoint, record.seeding_offsets = None, "", {}
            record.attachments, record.disks = {}, {}
            record.resync_cause = ""  # nothing is there to compare with
            await self.save()
            self.needs_reconcile = False
            return
        self.replica_sizes = {key: int(disk["size_bytes"]) for key, disk in status.get("disks", {}).items()}
        self.replica_name = str(status.get("name", ""))
        self.replica_protection = status.get("protection")
        if record.return_overlays:
            await self._reconcile_return(status.get("sealed"))
            return
        sealed = status.get("sealed")
        if sealed is None:
            offsets = status.get("seeding") or {}
            record.sealed, record.resync_cause = None, ""
            record.seeding_offsets = {key: int(value) for key, value in offsets.items()}
        else:
            await self._adopt(int(sealed["generation"]), str(sealed.get("checkpoint") or ""))
        await self.save()
        await self.drop_superseded()
        self.needs_reconcile = False

    async def _reconcile_return(self, sealed: Mapping[str, Any] | None) -> None:
        """The first generation of the way back is sealed there, or is still to be sent."""
        record = self._record
        generation = 0 if sealed is None else int(sealed["generation"])
        if generation == record.return_generation + 1:
            disks = list(record.return_overlays)
            record.sealed = Sealed(
                generation, record.return_checkpoint, time.time(), time.time(), disks=disks
            )
            record.return_overlays = {}
        elif generation == record.return_generation and not record.return_checkpoint:
            # The overlays alone do not say what was written since they were put on.
            record.sealed = Sealed(generation, "", time.time(), 0.0)
            record.return_overlays = {}
            record.resync_cause = "changes since the VM arrived here are not counted"
        elif generation != record.return_generation:
            record.sealed = Sealed(generation, "", time.time(), 0.0)
            record.return_overlays = {}
            record.resync_cause = (
                f"{record.peer} holds generation {generation}, not generation {record.return_generation} "
                "with which the VM left it"
            )
        await self.save()
        self.needs_reconcile = False

    async def _adopt(self, generation: int, named: str) -> None:
        record = self._record
        if record.sealed is not None and record.sealed.generation == generation:
            return
        before = record.sealed
        candidates: list[str] = []
        if await self._disks.is_active():
            ours = await self._environment.tracker.checkpoints(self._vm)
            of_it = [name for name in ours if is_of_generation(name, record.epoch, generation)]
            candidates = [*([named] if named in ours else []), *of_it]
        elif named:
            candidates = [named]
        covered = list(record.disks) if before is None else before.disks
        if candidates:
            # its seal was acknowledged, and the acknowledgement was lost: the newest slice is its instant
            record.sealed = Sealed(generation, candidates[-1], time.time(), time.time(), disks=covered)
            logger.info(
                "%s: peer %s holds generation %d; going on from there", self._vm, record.peer, generation
            )
            return
        record.sealed = Sealed(generation, "", time.time(), 0.0, disks=[])
        had = "nothing" if before is None else f"generation {before.generation}"
        record.resync_cause = (
            f"peer {record.peer} holds generation {generation}, this host knows {had}: "
            "no checkpoint leads on from there"
        )

    async def drop_superseded(self) -> None:
        """Exactly one checkpoint of ours in peacetime. Of a shut-off VM they wait until it runs."""
        record = self._record
        if not await self._disks.is_active():
            return
        keep = (
            record.seeding_checkpoint or None if record.sealed is None else record.sealed.checkpoint or None
        )
        await self._environment.tracker.keep_only(self._vm, keep)

    async def prepare_replica(
        self, sizes: Mapping[str, int], definition: Definition, needed_bytes: int
    ) -> dict[str, Any]:
        """Have the peer make or accept the replica; its status, and ``created``: whether it was made now (a
        release that does not say may hold an old one). Raises NoSpace, StaleEpoch, Conflict.
        """
        record = self._record
        parameters = {
            "vm": record.uuid,
            "name": record.name,
            "epoch": record.epoch,
            "disks": dict(sizes),
            "definition": definition.xml,
            "needed_bytes": needed_bytes,
            "protection": self.protection,
        }
        link = self._environment.link(record.peer)
        answer = await link.call("store.prepare", parameters, timeout_seconds=PREPARE_TIMEOUT_SECONDS)
        self.replica_name = record.name
        self.replica_protection = answer.get("protection")
        return answer
