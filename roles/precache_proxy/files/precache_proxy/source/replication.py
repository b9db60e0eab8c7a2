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

from precache_proxy.blocks.images import ImageReference, stamp
from precache_proxy.channel.settings import TrafficClass
from precache_proxy.crash_points import crash_point
from precache_proxy.errors import Conflict, LifeboatError, NotFound, TrackingLost
from precache_proxy.source import autostart, offline, scrub
from precache_proxy.source.attachments import changed_attachments, read_attachments
from precache_proxy.source.disks import VmDisks
from precache_proxy.source.environment import Environment
from precache_proxy.source.feeder import Pace
from precache_proxy.source.layout import Layout
from precache_proxy.source.passes import Generation, GenerationPlan, PassResult
from precache_proxy.source.record import ProtectionRecord, Sealed
from precache_proxy.source.seeding import Seeding
from precache_proxy.source.standing import PeerStanding
from precache_proxy.source.totals import PassTotals
from precache_proxy.source.tracker import Tracker, VmReference, checkpoint_name
from precache_proxy.source.views import ClosedImages, ViewSource
from precache_proxy.source.written_rate import WrittenRate

logger = logging.getLogger(__name__)


class Replication:
    """The work on one VM: ``disks`` are what it has now, ``standing`` is what its peer has of them."""

    def __init__(self, record: ProtectionRecord, environment: Environment) -> None:
        self.record = record
        self.environment = environment
        self.totals = PassTotals()
        self.disks = VmDisks(record, environment, self.totals)
        self.standing = PeerStanding(record, environment, self.disks)
        self.seeding: Seeding | None = None
        self.generation: Generation | None = None
        # what generations may put on the wire, where whoever holds the VM wants less than the link's rate
        self.pace: Pace | None = None
        # an evacuation waits for what is sent now: it goes before other VMs' passes
        self.urgent = False
        self.last_pass: PassResult | None = None
        self.last_pass_at: float | None = None
        self.dirty_bytes = 0
        # until when the peer is known to hold everything; monotonic
        self.clean_at: float | None = None
        # when ``dirty_bytes`` was asked for; monotonic. None: not since the last seal
        self.dirty_at: float | None = None
        self.written = WrittenRate()

    @property
    def written_bytes_per_second(self) -> float | None:
        """What the guest changes a second that its replica has to be sent; None: not known yet."""
        since = None
        # Of what changed after it was asked for, nothing is known: that time does not count either.
        if self.clean_at is not None and self.dirty_at is not None:
            since = max(0.0, self.dirty_at - self.clean_at)
        return self.written.bytes_per_second(self.dirty_bytes, since)

    def note_dirty(self, changed_bytes: int, sealed: Sealed) -> None:
        """So much has changed by now since the generation ``sealed``, unless that was overtaken meanwhile."""
        if self.generation is None and self.record.sealed is sealed:
            self.dirty_bytes, self.dirty_at = changed_bytes, time.monotonic()

    def hasten(self) -> None:
        """From now on, the pass under way as well, nothing waits behind the memory of VMs that leave."""
        self.urgent = True
        self.environment.backups.hasten(self.record.uuid)
        if self.generation is not None:
            self.generation.hasten()

    def ease(self) -> None:
        """From the next pass on, as any other."""
        self.urgent = False
        self.environment.backups.ease(self.record.uuid)

    @property
    def vm(self) -> VmReference:
        """The VM for libvirt and for people."""
        return self.disks.vm

    @property
    def _tracker(self) -> Tracker:
        return self.environment.tracker

    # -- the way back ------------------------------------------------------------------------------

    async def send_return(self) -> PassResult:
        """The first generation of the way back: what the arrival overlays, frozen by now, hold."""
        record = self.record
        overlays = {
            target: ImageReference(offline.path(image[0]), image[1], int(image[2]))
            for target, image in record.return_overlays.items()
        }
        definition, layout, _unused = await self.disks.look()
        contents = await asyncio.to_thread(read_attachments, definition)
        attachments, digests = changed_attachments(contents, {})
        plan = GenerationPlan(
            vm_uuid=record.uuid,
            vm_name=record.name,
            epoch=record.epoch,
            generation=record.return_generation + 1,
            leads_from=record.return_generation,
            definition_xml=await self.disks.transferable_xml(),
            disks={target: image.size_bytes for target, image in overlays.items()},
            since={},
            attachments=attachments,
            checkpoint=record.return_checkpoint,
        )
        source = ClosedImages(
            self.vm, overlays, socket_directory=self.environment.run_directory / "nbd", top_layers=True
        )
        result = await self._make(plan, source, layout, reason="way back", disks=list(overlays))
        crash_point("return-sealed")
        record.return_overlays = {}
        record.attachments = digests
        await self.standing.save()
        return result

    # -- the first copy ----------------------------------------------------------------------------

    async def seed(self) -> None:
        """The first copy, from where it stood. Generation 1 is left to the next pass."""
        record = self.record
        definition, layout, active = await self.disks.look()
        sizes = await self.disks.sizes(definition, layout.tracked, active=active)
        needed_bytes = await self.disks.first_copy_bytes(layout, sizes)
        answer = await self.standing.prepare_replica(sizes, definition, needed_bytes)
        created = bool(answer.get("created", False))
        # The peer's marks, not those remembered: the word that the replica is new comes once, and whoever was
        # cut before it heard it would leave out the beginning of a replica that holds nothing.
        record.seeding_offsets = {key: int(value) for key, value in (answer.get("seeding") or {}).items()}
        seeding = Seeding(
            self.environment.link(record.peer),
            vm_uuid=record.uuid,
            vm_name=record.name,
            epoch=record.epoch,
            disks=sizes,
            offsets=record.seeding_offsets,
            mark_bytes=self.environment.settings.slice_bytes,
        )
        try:
            if created:
                raise TrackingLost(f"{self.vm}: peer {record.peer} holds nothing of it")
            await self._keep_seeding_checkpoint(layout, active=active)
        except TrackingLost as error:
            logger.info("%s: the first copy begins at the start: %s", self.vm, error)
            await seeding.begin_anew(has_marks=not created)
            await self._begin_seeding(layout, active=active)
        self.seeding = seeding
        try:
            await seeding.run(self.disks.source(layout, active=active))
        finally:
            record.seeding_offsets = dict(seeding.offsets)
            await self.standing.save()
        crash_point("seed-copied")

    async def _keep_seeding_checkpoint(self, layout: Layout, *, active: bool) -> None:
        """The checkpoint that stood before the first block was read counts still. Raises TrackingLost."""
        name = self.record.seeding_checkpoint
        if not name:
            raise TrackingLost(f"{self.vm}: changes are not counted yet")
        self.disks.check_images(layout)
        async with self.disks.unchanged(active=active):
            if active:
                await self._have_checkpoint(name, layout, list(layout.tracked))
            else:
                await offline.check_bitmaps(self.vm, layout.tracked, name)

    async def _begin_seeding(self, layout: Layout, *, active: bool) -> None:
        """A checkpoint stands before the first block is read."""
        record = self.record
        name = checkpoint_name(record.epoch, 0)
        if active:
            await self._tracker.keep_only(self.vm, None)
            await self._tracker.create_checkpoint(self.vm, name, list(layout.tracked), layout.absent)
        else:
            await offline.replace_bitmaps(self.disks.claims, layout.tracked, name)
        crash_point("seed-checkpointed")
        record.seeding_checkpoint = name
        record.seeding_offsets = {}
        record.disks = self.disks.records(layout, {})
        await self.standing.save()

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

    async def run_pass(
        self, *, reason: str, compare_all: bool = False, scrub_bytes: int = 0, leave_bytes: int = 0
    ) -> PassResult:
        """One generation, or nothing where nothing changed. Raises TrackingLost: then only a resync helps.

        ``compare_all`` compares every block with the replica (resync, verify), ``scrub_bytes`` some. So much
        as ``leave_bytes`` of a running VM may wait for the next pass, which its caller makes: then, too, this
        one is skipped, and they stay counted.
        """
        record = self.record
        sealed = record.sealed
        definition, layout, active = await self.disks.look()
        looked_at = time.monotonic()
        if definition.autostart:
            # Set since the VM was protected: it must not start by itself where it has left by the next boot.
            await autostart.take_over(self.environment.hypervisor, record, self.standing.save)
            logger.info("%s: autostart was set; it is kept in mind while the VM is protected", self.vm)
        if not compare_all:
            self.disks.check_images(layout)
        checkpoint = record.seeding_checkpoint if sealed is None else sealed.checkpoint
        known = list(layout.tracked) if sealed is None else sealed.disks
        covered = {target: checkpoint for target in layout.tracked if target in known}
        resync = compare_all and bool(record.resync_cause)
        if resync:
            covered = {}
        async with self.disks.unchanged(active=active):
            dirty = await self._dirty(covered, layout, active=active)
        contents = await asyncio.to_thread(read_attachments, definition)
        attachments, digests = changed_attachments(contents, record.attachments)
        new = [] if resync else [target for target in layout.tracked if target not in covered]
        gone = sealed is not None and set(record.disks) != set(layout.tracked)
        self.dirty_bytes, self.dirty_at = sum(dirty.values()), None
        interval: tuple[int, float] | None = None
        if self.clean_at is not None and sealed is not None and not resync:
            self.dirty_at = looked_at
            interval = self.dirty_bytes, looked_at - self.clean_at
        nothing = not (self.dirty_bytes or attachments or new or gone or compare_all or sealed is None)
        if self.standing.replica_protection not in (None, self.standing.protection):
            # Should this host die, that is what the VM is to be there.
            known_sizes = await self.disks.sizes(definition, layout.tracked, active=active)
            await self.standing.prepare_replica(known_sizes, definition, 0)
        if nothing and not scrub_bytes and (active or self._unchanged_off(layout)):
            self._close(interval, looked_at)
            self.totals.empty += 1
            return PassResult(record.next_generation - 1, skipped=True, reason=reason)
        sizes = await self.disks.sizes(definition, layout.tracked, active=active)
        held = self.standing.replica_sizes
        # A residual goes by bitmaps alone, which do not count what a disk has grown by.
        grown = {} if sealed is None else scrub.beyond_replica(layout, sizes, held)
        little = active and sealed is not None and self.dirty_bytes <= leave_bytes
        if little and not (attachments or new or gone or grown or compare_all or scrub_bytes):
            return PassResult(record.next_generation - 1, skipped=True, reason=reason)
        if self.standing.replica_name not in {"", record.name}:
            await self.standing.prepare_replica(sizes, definition, 0)  # the name that people see there
        plan = GenerationPlan(
            vm_uuid=record.uuid,
            vm_name=record.name,
            epoch=record.epoch,
            generation=record.next_generation,
            leads_from=0 if sealed is None else sealed.generation,
            definition_xml=await self.disks.transferable_xml(),
            disks=sizes,
            since=covered,
            whole=frozenset(new),
            attachments=attachments,
            checkpoint=None if active else await self._offline_checkpoint(layout, checkpoint, fresh=resync),
            compare=(
                scrub.all_ranges(layout, sizes, held)
                if compare_all
                else scrub.next_slice(record, layout, sizes, held, scrub_bytes)
            ),
            send=grown,
            traffic_class=TrafficClass.MIGRATION if self.urgent else TrafficClass.PRECACHE,
        )
        before_off = {target: stamp(disk.path) for target, disk in layout.tracked.items()}
        source = self.disks.source(layout, active=active)
        result = await self._make(plan, source, layout, reason=reason, interval=interval)
        if resync:
            crash_point("resync-sealed")
        record.attachments = digests
        record.passed_off = {} if active else before_off
        if scrub_bytes or compare_all:
            scrub.note_comparison(record, result, plan, whole=compare_all)
        await self.standing.save()
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
            target: stamp(disk.path) for target, disk in layout.tracked.items()
        }

    async def _offline_checkpoint(self, layout: Layout, checkpoint: str, *, fresh: bool) -> str:
        """What counts on from a generation of a shut-off VM: the old bitmaps, or new ones after a resync."""
        if not fresh:
            return checkpoint
        name = checkpoint_name(self.record.epoch, self.record.next_generation)
        await offline.replace_bitmaps(self.disks.claims, layout.tracked, name)
        return name

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
        definition, layout, active = await self.disks.look()
        contents = await asyncio.to_thread(read_attachments, definition)
        attachments, digests = changed_attachments(contents, record.attachments)
        sizes = {target: image.size_bytes for target, image in frozen.items()}
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
        result = await self._make(plan, source, layout, reason="residual", keep_disks=True)
        record.attachments = digests
        await self.standing.save()
        return result

    async def _make(
        self,
        plan: GenerationPlan,
        source: ViewSource,
        layout: Layout,
        *,
        reason: str,
        keep_disks: bool = False,
        disks: list[str] | None = None,
        interval: tuple[int, float] | None = None,
    ) -> PassResult:
        """Send a generation; on its seal, and only then, what it supersedes is dropped."""
        record = self.record
        began = time.monotonic()
        generation = Generation(self.environment.link(record.peer), plan, self.pace)
        generation.result.reason = reason
        self.generation = generation
        try:
            answer = await generation.run(source)
            crash_point("pass-sealed")
        except BaseException:
            if generation.seal_sent:
                self.standing.needs_reconcile = True
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
            record.disks = self.disks.records(layout, plan.disks)
        self.standing.replica_sizes = dict(plan.disks)
        self._close(interval, began)
        try:
            await self.standing.save()
        except BaseException:
            # the old checkpoint stays until that is durable: the next turn has to look after both
            self.standing.needs_reconcile = True
            raise
        crash_point("pass-recorded")
        if plan.makes_checkpoints:
            # durable first: a kill here leaves one checkpoint too many, never one too few
            try:
                await self.standing.drop_superseded()
            except LifeboatError as error:
                logger.warning("%s: superseded checkpoints wait for the next pass: %s", self.vm, error)
                self.standing.needs_reconcile = True
        return generation.result

    def _close(self, interval: tuple[int, float] | None, clean_at: float) -> None:
        """The peer holds what there was at ``clean_at``; a pass that failed leaves its interval open."""
        if interval is not None:
            self.written.passed(*interval)
        self.clean_at, self.dirty_bytes, self.dirty_at = clean_at, 0, None

    async def _take_back(self, generation: Generation) -> None:
        """Drop the checkpoints of a failed generation: the kept one goes on counting for both."""
        try:
            for name in reversed(generation.made):
                await self._tracker.delete_checkpoint(self.vm, name)
        except LifeboatError as error:
            logger.warning("%s: a failed pass's checkpoint waits for the next one: %s", self.vm, error)
            self.standing.needs_reconcile = True

    # -- small things ------------------------------------------------------------------------------

    async def drop_checkpoints(self) -> None:
        """Remove every checkpoint and bitmap of ours: the VM is not protected any more."""
        with contextlib.suppress(NotFound):
            _unused, layout, active = await self.disks.look()
            if active:
                await self._tracker.keep_only(self.vm, None)
            else:
                await offline.replace_bitmaps(self.disks.claims, layout.tracked, None)
                for name in await self._tracker.checkpoints(self.vm):
                    await self._tracker.forget_checkpoint(self.vm, name)
