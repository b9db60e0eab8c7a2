# SPDX-License-Identifier: GPL-3.0-or-later
"""The work for one protected VM: where its peer stands, first copy, passes, resync, residual.

One at a time per VM (its protection sees to that). Every method may be cut anywhere: the record and the
checkpoints are changed in an order in which the next :meth:`reconcile` finds its way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from typing import Any

from precache_proxy.blocks import images
from precache_proxy.blocks.extents import Extents
from precache_proxy.blocks.images import ImageReference
from precache_proxy.channel.settings import TrafficClass
from precache_proxy.crash_points import crash_point
from precache_proxy.errors import Conflict, LifeboatError, NotFound, StaleEpoch, TrackingLost
from precache_proxy.hypervisor.domain_xml import Definition, Disk
from precache_proxy.source import offline
from precache_proxy.source.attachments import changed_attachments, read_attachments
from precache_proxy.source.environment import Environment
from precache_proxy.source.layout import Layout, plan_layout
from precache_proxy.source.passes import Generation, GenerationPlan, PassResult
from precache_proxy.source.reader import BLOCK_BYTES
from precache_proxy.source.record import DiskRecord, ProtectionRecord, Sealed
from precache_proxy.source.seeding import Seeding
from precache_proxy.source.totals import PassTotals
from precache_proxy.source.tracker import Tracker, VmReference, checkpoint_name, is_of_generation
from precache_proxy.source.views import ClosedImages, RunningVm, ViewSource

logger = logging.getLogger(__name__)

PREPARE_TIMEOUT_SECONDS = 120.0


class OldHomeNotReady(Conflict):
    """A VM has just arrived, and its old home is still making what it kept the base of a replica."""

    cause = "way-back"


class Replication:
    """The work on one VM. ``needs_reconcile``: only the peer knows where we stand."""

    def __init__(self, record: ProtectionRecord, environment: Environment) -> None:
        self.record = record
        self.environment = environment
        self.needs_reconcile = True
        self.seeding: Seeding | None = None
        self.generation: Generation | None = None
        self.totals = PassTotals()
        self.last_pass: PassResult | None = None
        self.last_pass_at: float | None = None
        self.replica_name = ""
        self.dirty_bytes = 0
        # until when the peer is known to hold everything; monotonic
        self.clean_at: float | None = None
        self.refused_disks: list[str] = []
        self.replica_sizes: dict[str, int] = {}

    @property
    def vm(self) -> VmReference:
        """The VM for libvirt and for people."""
        return VmReference(self.record.uuid, self.record.name)

    @property
    def _tracker(self) -> Tracker:
        return self.environment.tracker

    async def save(self) -> None:
        """Make the record durable."""
        await asyncio.to_thread(self.record.write, self.environment.directory)

    # -- where we stand ----------------------------------------------------------------------------

    async def reconcile(self) -> None:
        """Adopt what the peer holds: drop what it has sealed, keep what it has not. Raises StaleEpoch."""
        record = self.record
        status = await self.environment.link(record.peer).call("store.status", {"vm": record.uuid})
        if not status.get("exists") and record.return_overlays:
            raise OldHomeNotReady(
                f"{self.vm}: its old home {record.peer} has not yet taken what it kept as a replica; "
                "wait for it, or resync to copy anew"
            )
        if not status.get("exists"):
            if record.sealed is not None or record.seeding_offsets:
                logger.warning("%s: peer %s has no replica any more; copying it anew", self.vm, record.peer)
            record.sealed, record.seeding_checkpoint, record.seeding_offsets = None, "", {}
            record.attachments, record.disks = {}, {}
            record.resync_cause = ""  # nothing is there to compare with
            await self.save()
            self.needs_reconcile = False
            return
        if int(status["epoch"]) > record.epoch:
            raise StaleEpoch(
                f"{self.vm}: peer {record.peer} holds epoch {status['epoch']}, this host {record.epoch}: "
                "its home has moved; unprotect it here, or settle the evacuation"
            )
        self.replica_sizes = {key: int(disk["size_bytes"]) for key, disk in status.get("disks", {}).items()}
        self.replica_name = str(status.get("name", ""))
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
        await self._drop_superseded()
        self.needs_reconcile = False

    async def _reconcile_return(self, sealed: Mapping[str, Any] | None) -> None:
        """The first generation of the way back is sealed there, or is still to be sent."""
        record = self.record
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

    async def send_return(self) -> PassResult:
        """The first generation of the way back: what the arrival overlays, frozen by now, hold."""
        record = self.record
        overlays = {
            target: ImageReference(offline.path(image[0]), image[1], int(image[2]))
            for target, image in record.return_overlays.items()
        }
        definition, layout, _unused = await self.look()
        contents = await asyncio.to_thread(read_attachments, definition)
        attachments, digests = changed_attachments(contents, {})
        plan = GenerationPlan(
            vm_uuid=record.uuid,
            vm_name=record.name,
            epoch=record.epoch,
            generation=record.return_generation + 1,
            leads_from=record.return_generation,
            definition_xml=await self._transferable_xml(),
            disks={target: image.size_bytes for target, image in overlays.items()},
            since={},
            attachments=attachments,
            checkpoint=record.return_checkpoint,
        )
        source = ClosedImages(
            self.vm, overlays, socket_directory=self.environment.run_directory / "nbd", top_layers=True
        )
        result = await self._make(plan, source, None, layout, reason="way back", disks=list(overlays))
        record.return_overlays = {}
        record.attachments = digests
        await self.save()
        return result

    async def _adopt(self, generation: int, named: str) -> None:
        record = self.record
        if record.sealed is not None and record.sealed.generation == generation:
            return
        before = record.sealed
        candidates: list[str] = []
        if await self._is_active():
            ours = await self._tracker.checkpoints(self.vm)
            of_it = [name for name in ours if is_of_generation(name, record.epoch, generation)]
            candidates = [*([named] if named in ours else []), *of_it]
        elif named:
            candidates = [named]
        covered = list(record.disks) if before is None else before.disks
        if candidates:
            # its seal was acknowledged, and the acknowledgement was lost: the newest slice is its instant
            record.sealed = Sealed(generation, candidates[-1], time.time(), time.time(), disks=covered)
            logger.info(
                "%s: peer %s holds generation %d; going on from there", self.vm, record.peer, generation
            )
            return
        record.sealed = Sealed(generation, "", time.time(), 0.0, disks=[])
        had = "nothing" if before is None else f"generation {before.generation}"
        record.resync_cause = (
            f"peer {record.peer} holds generation {generation}, this host knows {had}: "
            "no checkpoint leads on from there"
        )

    async def _is_active(self) -> bool:
        hypervisor = self.environment.hypervisor
        domain = await hypervisor.lookup(self.record.uuid)
        return await hypervisor.is_active(domain, subject=str(self.vm))

    async def _drop_superseded(self) -> None:
        """Exactly one checkpoint of ours in peacetime. Of a shut-off VM they wait until it runs."""
        record = self.record
        if not await self._is_active():
            return
        keep = (
            record.seeding_checkpoint or None if record.sealed is None else record.sealed.checkpoint or None
        )
        await self._tracker.keep_only(self.vm, keep)

    # -- the VM as it is now -----------------------------------------------------------------------

    async def look(self) -> tuple[Definition, Layout, bool]:
        """The VM's definition, which disks go along, and whether it runs; a new name is taken over."""
        hypervisor = self.environment.hypervisor
        try:
            domain = await hypervisor.lookup(self.record.uuid)
        except NotFound as error:
            raise NotFound(
                f"{self.vm}: not defined on this host any more; unprotect it, or define it again"
            ) from error
        definition = await hypervisor.definition_of(domain, subject=str(self.vm))
        if definition.name != self.record.name:
            logger.info("%s is called %s now", self.vm, definition.name)
            self.record.name = definition.name
            await self.save()
        layout = plan_layout(definition, self.record.only_disks)
        self.refused_disks = layout.refused
        return definition, layout, bool(definition.running_id)

    def _check_images(self, layout: Layout) -> None:
        """Raise TrackingLost where an image is not the one whose changes were counted."""
        for target, disk in layout.tracked.items():
            known = self.record.disks.get(target)
            if known is None or not known.tracked:
                continue
            below = {image.path for image in disk.backing}
            swapped = disk.path != known.path and known.path not in below and disk.path not in known.chain
            replaced = disk.path == known.path and known.inode not in {0, offline.inode(disk.path)}
            if swapped or replaced:
                now = "another file under the same name" if replaced else disk.path
                raise TrackingLost(
                    f"{self.vm} disk {target}: its image was {known.path} and is {now} now; "
                    "what differs is found by digest"
                )

    # -- the first copy ----------------------------------------------------------------------------

    async def prepare_replica(
        self, sizes: Mapping[str, int], definition: Definition, needed_bytes: int
    ) -> None:
        """Have the peer make or accept the replica. Raises NoSpace, StaleEpoch, Conflict."""
        record = self.record
        parameters = {
            "vm": record.uuid,
            "name": record.name,
            "epoch": record.epoch,
            "disks": dict(sizes),
            "definition": definition.xml,
            "needed_bytes": needed_bytes,
        }
        link = self.environment.link(record.peer)
        await link.call("store.prepare", parameters, timeout_seconds=PREPARE_TIMEOUT_SECONDS)

    async def seed(self) -> None:
        """The first copy, from where it stood. Generation 1 is left to the next pass."""
        record = self.record
        definition, layout, active = await self.look()
        disks = {**layout.tracked, **layout.static}
        sizes = await self.sizes(definition, disks, active=active)
        allocated = sum(offline.allocated_bytes(disk.path) for disk in disks.values())
        await self.prepare_replica(sizes, definition, allocated)
        # static disks go with generation 1, as a whole
        seeding = Seeding(
            self.environment.link(record.peer),
            vm_uuid=record.uuid,
            vm_name=record.name,
            epoch=record.epoch,
            disks={target: sizes[target] for target in layout.tracked},
            offsets=record.seeding_offsets,
            mark_bytes=self.environment.settings.slice_bytes,
        )
        try:
            await self._keep_seeding_checkpoint(layout, active=active)
        except TrackingLost as error:
            logger.info("%s: the first copy begins at the start: %s", self.vm, error)
            await self._begin_seeding(seeding, layout, active=active)
        self.seeding = seeding
        try:
            await seeding.run(self._source(layout, active=active))
        finally:
            record.seeding_offsets = dict(seeding.offsets)
            await self.save()

    async def _keep_seeding_checkpoint(self, layout: Layout, *, active: bool) -> None:
        """The checkpoint that stood before the first block was read counts still. Raises TrackingLost."""
        name = self.record.seeding_checkpoint
        if not name:
            raise TrackingLost(f"{self.vm}: changes are not counted yet")
        self._check_images(layout)
        if active:
            await self._have_checkpoint(name, layout, list(layout.tracked))
        else:
            await offline.check_bitmaps(self.vm, layout.tracked, name)

    async def _begin_seeding(self, seeding: Seeding, layout: Layout, *, active: bool) -> None:
        """A checkpoint stands before the first block is read, and the peer's marks are of this copy."""
        record = self.record
        await seeding.begin_anew()
        name = checkpoint_name(record.epoch, 0)
        if active:
            await self._tracker.keep_only(self.vm, None)
            await self._tracker.create_checkpoint(self.vm, name, list(layout.tracked), layout.absent)
        else:
            await offline.replace_bitmaps(self.vm, layout.tracked, name)
        record.seeding_checkpoint = name
        record.seeding_offsets = {}
        record.disks = self._disk_records(layout, {})
        await self.save()

    async def _have_checkpoint(self, name: str, layout: Layout, disks: list[str]) -> dict[str, int]:
        """Bytes changed since the checkpoint; libvirt is told of it where it forgot. Raises TrackingLost."""
        if not name:
            raise TrackingLost(f"{self.vm}: changes are not counted; what differs is found by digest")
        present = [disk for disk in disks if disk in layout.tracked]
        dirty = await self._tracker.dirty_bytes(self.vm, name, present)
        if dirty is None:
            absent = [*layout.absent, *(disk for disk in layout.tracked if disk not in disks)]
            dirty = await self._tracker.restore_checkpoint(self.vm, name, present, absent)
        return dirty

    # -- passes ------------------------------------------------------------------------------------

    async def run_pass(self, *, reason: str, compare_all: bool = False, scrub_bytes: int = 0) -> PassResult:
        """One generation, or nothing where nothing changed. Raises TrackingLost: then only a resync helps.

        ``compare_all`` compares every block with the replica (resync, verify), ``scrub_bytes`` some.
        """
        record = self.record
        sealed = record.sealed
        definition, layout, active = await self.look()
        looked_at = time.monotonic()
        if not compare_all:
            self._check_images(layout)
        checkpoint = record.seeding_checkpoint if sealed is None else sealed.checkpoint
        known = list(layout.tracked) if sealed is None else sealed.disks
        covered = {target: checkpoint for target in layout.tracked if target in known}
        resync = compare_all and bool(record.resync_cause)
        if resync:
            covered = {}
        dirty = await self._dirty(covered, layout, active=active)
        contents = await asyncio.to_thread(read_attachments, definition)
        attachments, digests = changed_attachments(contents, record.attachments)
        static = {
            target: disk
            for target, disk in layout.static.items()
            if (old := record.disks.get(target)) is None or old.stamp != offline.stamp(disk.path)
        }
        new = [] if resync else [target for target in layout.tracked if target not in covered]
        gone = sealed is not None and set(record.disks) != {*layout.tracked, *layout.static}
        self.dirty_bytes = sum(dirty.values())
        nothing = not (
            self.dirty_bytes or attachments or static or new or gone or compare_all or sealed is None
        )
        if nothing and not scrub_bytes and (active or self._unchanged_off(layout)):
            self.clean_at = looked_at
            self.totals.empty += 1
            return PassResult(record.next_generation - 1, skipped=True, reason=reason)
        sizes = await self.sizes(definition, {**layout.tracked, **layout.static}, active=active)
        if self.replica_name not in {"", record.name}:
            await self.prepare_replica(sizes, definition, 0)  # the name that people see there
            self.replica_name = record.name
        plan = GenerationPlan(
            vm_uuid=record.uuid,
            vm_name=record.name,
            epoch=record.epoch,
            generation=record.next_generation,
            leads_from=0 if sealed is None else sealed.generation,
            definition_xml=await self._transferable_xml(),
            disks=sizes,
            since=covered,
            whole=frozenset(new),
            attachments=attachments,
            checkpoint=None if active else await self._offline_checkpoint(layout, checkpoint, fresh=resync),
            compare=self._to_compare(layout, sizes, compare_all=compare_all, scrub_bytes=scrub_bytes),
            send=self._beyond_replica(layout, sizes),
        )
        closed = self._closed(static) if static else None
        before_off = {target: offline.stamp(disk.path) for target, disk in layout.tracked.items()}
        result = await self._make(plan, self._source(layout, active=active), closed, layout, reason=reason)
        record.attachments = digests
        record.passed_off = {} if active else before_off
        if scrub_bytes or compare_all:
            self._note_comparison(result, plan, whole=compare_all)
        await self.save()
        return result

    async def _dirty(self, covered: Mapping[str, str], layout: Layout, *, active: bool) -> dict[str, int]:
        if not covered:
            return {}
        checkpoint = next(iter(covered.values()))
        if active:
            dirty = await self._have_checkpoint(checkpoint, layout, list(covered))
            missing = [target for target in covered if target not in dirty]
            if missing:
                raise TrackingLost(f"{self.vm} disk {missing[0]}: {checkpoint} does not count its changes")
            return dirty
        await offline.check_bitmaps(
            self.vm, {target: layout.tracked[target] for target in covered}, checkpoint
        )
        return {}

    def _unchanged_off(self, layout: Layout) -> bool:
        passed = self.record.passed_off
        return bool(passed) and passed == {
            target: offline.stamp(disk.path) for target, disk in layout.tracked.items()
        }

    async def _offline_checkpoint(self, layout: Layout, checkpoint: str, *, fresh: bool) -> str:
        """What counts on from a generation of a shut-off VM: the old bitmaps, or new ones after a resync."""
        if not fresh:
            return checkpoint
        name = checkpoint_name(self.record.epoch, self.record.next_generation)
        await offline.replace_bitmaps(self.vm, layout.tracked, name)
        return name

    def _to_compare(
        self, layout: Layout, sizes: Mapping[str, int], *, compare_all: bool, scrub_bytes: int
    ) -> dict[str, Extents]:
        if compare_all:
            return {target: Extents([(0, self._held(target, sizes[target]))]) for target in layout.tracked}
        compare: dict[str, Extents] = {}
        left = scrub_bytes
        for target in sorted(layout.tracked):
            at = self.record.scrub_offsets.get(target, 0)
            limit = self._held(target, sizes[target])
            if at >= limit or left <= 0:
                continue
            end = min(limit, at + left)
            compare[target] = Extents([(at, end)])
            left -= end - at
        return compare

    def _held(self, target: str, size_bytes: int) -> int:
        """Up to where the sealed replica has this disk, in whole blocks unless that is all of it."""
        held = self.replica_sizes.get(target, 0)
        return size_bytes if held >= size_bytes else held - held % BLOCK_BYTES

    def _beyond_replica(self, layout: Layout, sizes: Mapping[str, int]) -> dict[str, Extents]:
        """What a disk has grown by: bitmaps do not count it, and there is nothing to compare it with."""
        if self.record.sealed is None:
            return {}
        grown = {
            target: Extents([(self._held(target, sizes[target]), sizes[target])]) for target in layout.tracked
        }
        return {target: extents for target, extents in grown.items() if len(extents)}

    def _note_comparison(self, result: PassResult, plan: GenerationPlan, *, whole: bool) -> None:
        record = self.record
        if whole and record.resync_cause:
            record.resync_cause = ""
            return
        record.scrub_differences += -(-result.different_bytes // BLOCK_BYTES)
        if result.different_bytes:
            logger.error(
                "%s: %d bytes of the replica differed from the disk and were repaired in generation %d",
                self.vm, result.different_bytes, result.generation,
            )  # fmt: skip
        for target, extents in plan.compare.items():
            record.scrub_offsets[target] = max(end for _unused, end in extents)
        if all(record.scrub_offsets.get(target, 0) >= plan.disks[target] for target in plan.since):
            record.scrub_offsets = {}
            record.scrub_turns += 1

    async def send_residual(
        self, frozen: Mapping[str, ImageReference], bitmap: str, definition_xml: str
    ) -> PassResult:
        """What frozen images hold beyond the last generation, sealed as the last one of this home."""
        record = self.record
        if record.sealed is None or bitmap != record.sealed.checkpoint:
            has = "none" if record.sealed is None else record.sealed.checkpoint
            raise Conflict(
                f"{self.vm}: its last generation is counted from {has}, not from {bitmap}; run a pass first"
            )
        definition, layout, active = await self.look()
        contents = await asyncio.to_thread(read_attachments, definition)
        attachments, digests = changed_attachments(contents, record.attachments)
        sizes = {target: image.size_bytes for target, image in frozen.items()}
        for target, known in record.disks.items():
            if target not in sizes and not known.tracked:
                sizes[target] = known.size_bytes
        plan = GenerationPlan(
            vm_uuid=record.uuid,
            vm_name=record.name,
            epoch=record.epoch,
            generation=record.next_generation,
            leads_from=record.sealed.generation,
            definition_xml=definition_xml,
            disks=sizes,
            since=dict.fromkeys(frozen, bitmap),
            attachments=attachments,
            checkpoint=bitmap,
            residual=True,
            traffic_class=TrafficClass.HANDOFF,
        )
        del active
        source = ClosedImages(self.vm, frozen, socket_directory=self.environment.run_directory / "nbd")
        result = await self._make(plan, source, None, layout, reason="residual", keep_disks=True)
        record.attachments = digests
        await self.save()
        return result

    async def _make(
        self,
        plan: GenerationPlan,
        source: ViewSource,
        static: ViewSource | None,
        layout: Layout,
        *,
        reason: str,
        keep_disks: bool = False,
        disks: list[str] | None = None,
    ) -> PassResult:
        """Send a generation; on its seal, and only then, what it supersedes is dropped."""
        record = self.record
        began = time.monotonic()
        generation = Generation(self.environment.link(record.peer), plan)
        generation.result.reason = reason
        self.generation = generation
        try:
            answer = await generation.run(source, static)
            crash_point("pass-sealed")
        except BaseException:
            if generation.seal_sent:
                self.needs_reconcile = True
            else:
                await asyncio.shield(self._take_back(generation))
            raise
        finally:
            self.generation = None
            sent = generation.result
            self.totals.add_sent(
                data_bytes=sent.data_bytes, zero_bytes=sent.zero_bytes, wire_bytes=sent.wire_bytes
            )
        self.totals.made += 1
        checkpoint = plan.checkpoint or generation.made[-1]
        self.last_pass, self.last_pass_at = generation.result, time.time()
        if disks is None:
            disks = record.sealed.disks if keep_disks and record.sealed is not None else list(layout.tracked)
        record.sealed = Sealed(
            generation=plan.generation,
            checkpoint=checkpoint,
            sealed_at=float(answer.get("sealed_at", time.time())),
            source_time=time.time() - (time.monotonic() - began),
            digest=generation.result.digest,
            disks=disks,
        )
        record.seeding_checkpoint, record.seeding_offsets = "", {}
        if not keep_disks:
            record.disks = self._disk_records(layout, plan.disks)
        self.replica_sizes = dict(plan.disks)
        self.clean_at, self.dirty_bytes = began, 0
        await self.save()
        if plan.makes_checkpoints:
            # durable first: a kill here leaves one checkpoint too many, never one too few
            try:
                await self._drop_superseded()
            except LifeboatError as error:
                logger.warning("%s: superseded checkpoints wait for the next pass: %s", self.vm, error)
                self.needs_reconcile = True
        return generation.result

    async def _take_back(self, generation: Generation) -> None:
        """Drop the checkpoints of a failed generation: the kept one goes on counting for both."""
        try:
            for name in reversed(generation.made):
                await self._tracker.delete_checkpoint(self.vm, name)
        except LifeboatError as error:
            logger.warning("%s: a failed pass's checkpoint waits for the next one: %s", self.vm, error)
            self.needs_reconcile = True

    # -- small things ------------------------------------------------------------------------------

    def _source(self, layout: Layout, *, active: bool) -> ViewSource:
        if active:
            return RunningVm(
                self.environment.backups,
                self.vm,
                list(layout.tracked),
                layout.absent,
                limit_seconds=self.environment.settings.pass_limit_seconds,
                totals=self.totals,
            )
        return self._closed(layout.tracked)

    def _closed(self, disks: Mapping[str, Disk]) -> ClosedImages:
        run = self.environment.run_directory
        references = {
            target: ImageReference(offline.path(disk.path), disk.format, 0) for target, disk in disks.items()
        }
        return ClosedImages(
            self.vm,
            references,
            socket_directory=run / "nbd",
            readers_path=run / "readers" / f"{self.record.uuid}.json",
        )

    def _disk_records(self, layout: Layout, sizes: Mapping[str, int]) -> dict[str, DiskRecord]:
        records = {
            target: DiskRecord(
                disk.path,
                sizes.get(target, 0),
                inode=offline.inode(disk.path),
                chain=[image.path for image in disk.backing],
            )
            for target, disk in layout.tracked.items()
        }
        for target, disk in layout.static.items():
            stamp = offline.stamp(disk.path)
            records[target] = DiskRecord(disk.path, sizes.get(target, 0), tracked=False, stamp=stamp)
        return records

    async def sizes(
        self, definition: Definition, disks: Mapping[str, Disk], *, active: bool
    ) -> dict[str, int]:
        """Sizes in bytes as the guest sees the disks."""
        hypervisor = self.environment.hypervisor
        sizes: dict[str, int] = {}
        live = [target for target, disk in disks.items() if active and disk.device == "disk"]
        if live:
            domain = await hypervisor.lookup(definition.uuid)

            def ask() -> dict[str, int]:
                return {target: int(domain.blockInfo(target)[0]) for target in live}

            sizes = await hypervisor.call(ask, subject=str(self.vm))
        for target, disk in disks.items():
            if target not in sizes:
                described = await images.info(offline.path(disk.path), disk.format, in_use=True)
                sizes[target] = described[0].size_bytes
        return sizes

    async def _transferable_xml(self) -> str:
        hypervisor = self.environment.hypervisor
        domain = await hypervisor.lookup(self.record.uuid)
        return await hypervisor.transferable_xml(domain, subject=str(self.vm))

    async def drop_checkpoints(self) -> None:
        """Remove every checkpoint and bitmap of ours: the VM is not protected any more."""
        with contextlib.suppress(NotFound):
            _unused, layout, active = await self.look()
            if active:
                await self._tracker.keep_only(self.vm, None)
            else:
                await offline.replace_bitmaps(self.vm, layout.tracked, None)
                for name in await self._tracker.checkpoints(self.vm):
                    await self._tracker.forget_checkpoint(self.vm, name)

    def describe(self) -> dict[str, Any]:
        """Figures for the status."""
        return {"dirty_bytes": self.dirty_bytes, "refused_disks": self.refused_disks}
