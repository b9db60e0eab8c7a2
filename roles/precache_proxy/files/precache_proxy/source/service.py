# SPDX-License-Identifier: GPL-3.0-or-later
"""The source side of the proxy: every VM of this host that is protected at a peer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import libvirt

from precache_proxy import durable
from precache_proxy.blocks.images import ImageReference
from precache_proxy.channel.channel import Channel
from precache_proxy.crash_points import crash_point
from precache_proxy.errors import Conflict, Finding, IntegrityError, LifeboatError, NotFound
from precache_proxy.hypervisor.connection import Hypervisor
from precache_proxy.hypervisor.domain_xml import Definition
from precache_proxy.hypervisor.events import DomainEvent
from precache_proxy.hypervisor.qemu_user import find_qemu_user
from precache_proxy.source import autostart, raw_overlay
from precache_proxy.source.backups import Backups
from precache_proxy.source.damaged import damaged_protection
from precache_proxy.source.environment import Environment
from precache_proxy.source.epochs import keep_epoch, last_epoch
from precache_proxy.source.feeder import Pace
from precache_proxy.source.gate import PriorityGate
from precache_proxy.source.layout import plan_layout, raise_findings
from precache_proxy.source.passes import PassResult
from precache_proxy.source.peer_check import PeerAnswer, ask_peer
from precache_proxy.source.protection import Protection
from precache_proxy.source.record import ProtectionRecord
from precache_proxy.source.request import ProtectSpec, request_findings, vm_findings
from precache_proxy.source.scratch import ScratchPool
from precache_proxy.source.settings import SourceSettings
from precache_proxy.source.tracker import Tracker
from precache_proxy.store.media import MediaIndex

logger = logging.getLogger(__name__)

# What may have changed which disks a VM has, or whether it runs.
_TELLING_EVENTS = {"device-added", "device-removed"}
_TELLING_CHANGES = {"started", "stopped", "defined", "undefined"}


class Source:
    """All protections. Started after the channel and the hypervisor connection."""

    def __init__(
        self,
        directory: Path,
        run_directory: Path,
        hypervisor: Hypervisor,
        channel: Channel,
        settings: SourceSettings,
        *,
        media_index: MediaIndex | None = None,
    ) -> None:
        self.directory = directory
        self._media_index = media_index or MediaIndex(directory / "media")
        self.settings = settings
        self._run_directory = run_directory
        self._hypervisor = hypervisor
        self._channel = channel
        self._protections: dict[str, Protection] = {}
        # who holds which VM before its record is read
        self._held_from_start: dict[str, set[str]] = {}
        # VMs whose records cannot be read: shown, never worked on
        self._damaged: dict[str, Protection] = {}
        self._environment: Environment | None = None
        self._unsubscribe: Callable[[], None] = lambda: None
        self._tasks: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()

    # -- life --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take the records up again; what they say is reconciled with the peers as links come up.

        A record that is none keeps its own VM from being passed, and no other. Raises ConfigurationError
        where QEMU's user is not found.
        """
        settings = self.settings
        scratch = ScratchPool(
            settings.scratch_directory,
            pass_limit_bytes=settings.pass_scratch_limit_bytes,
            open_pass_limit=settings.open_backup_limit,
        )
        await asyncio.to_thread(scratch.clean)
        await asyncio.to_thread(durable.make_directory, self.directory, 0o750)
        user = await asyncio.to_thread(find_qemu_user, settings.qemu_user)
        tracker = Tracker(self._hypervisor)
        self._environment = Environment(
            directory=self.directory,
            run_directory=self._run_directory,
            settings=settings,
            hypervisor=self._hypervisor,
            channel=self._channel,
            tracker=tracker,
            backups=Backups(tracker, self._run_directory, scratch, user),
            passes=PriorityGate(settings.open_pass_limit),
            long_work=PriorityGate(max(1, settings.open_pass_limit // 2)),
            media=PriorityGate(1),
            media_index=self._media_index,
            after_boot=autostart.AfterBoot(self._run_directory / "autostart.json"),
        )
        await self._environment.backups.end_leftovers()
        for path in sorted(self.directory.glob("*.json")):
            try:
                record = await asyncio.to_thread(ProtectionRecord.read, path)
            except (IntegrityError, OSError) as error:
                self._damaged[path.stem] = await damaged_protection(path, error, self._environment)
                continue
            if record is not None:
                self._add(record)
        # A VM without a record here may be protected later, when the move is long over.
        self._held_from_start.clear()
        self._unsubscribe = self._hypervisor.subscribe(self._on_event)
        self._spawn(autostart.start_after_boot(self._environment, self.records()))

    async def stop(self) -> None:
        """End passes in order; backup jobs are closed before this returns."""
        self._unsubscribe()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(protection.stop() for protection in self._protections.values()))
        self._protections.clear()

    def records(self) -> list[ProtectionRecord]:
        """The records of all protected VMs."""
        return [protection.record for protection in self._protections.values()]

    def _add(self, record: ProtectionRecord) -> Protection:
        protection = Protection(record, self._here)
        self._protections[record.uuid] = protection
        protection.start(self._held_from_start.pop(record.uuid, ()))
        return protection

    @property
    def _here(self) -> Environment:
        if self._environment is None:
            raise NotFound("the source side has not been started; wait until the proxy says that it is ready")
        return self._environment

    def _spawn(self, work: Any) -> None:
        async def guarded() -> None:
            try:
                await work
            except LifeboatError as error:
                logger.warning("%s", error)

        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_event(self, event: DomainEvent) -> None:
        if event.kind == "connected":
            for protection in self._protections.values():
                protection.changed()
            return
        booted = event.what == "started" and event.detail == libvirt.VIR_DOMAIN_EVENT_STARTED_BOOTED
        if event.kind == "reboot" or (event.kind == "lifecycle" and booted):
            self._here.backups.event_worker.booted(event.uuid)
        told = self._protections.get(event.uuid)
        if told is not None and (
            event.kind in _TELLING_EVENTS or (event.kind == "lifecycle" and event.what in _TELLING_CHANGES)
        ):
            # a VM that was started may have lost its bitmaps, one that stopped has a last few changes
            told.changed()

    # -- which -------------------------------------------------------------------------------------

    def _find(self, vm: str) -> Protection:
        protection = self._protections.get(vm.lower())
        if protection is not None:
            return protection
        named = [one for one in self._protections.values() if one.record.name == vm]
        if len(named) == 1:
            return named[0]
        damaged = self._find_damaged(vm)
        if damaged is not None:
            raise IntegrityError(damaged.sentence)
        raise NotFound(
            f"VM {vm}: not protected on {self.settings.name}; see `precache-proxy status`, or protect it"
        )

    def _find_damaged(self, vm: str) -> Protection | None:
        return next((one for one in self._damaged.values() if vm in {one.record.uuid, one.record.name}), None)

    def statuses(self) -> list[dict[str, Any]]:
        """Of all protected VMs, by name."""
        everyone = [*self._protections.values(), *self._damaged.values()]
        return sorted((one.status() for one in everyone), key=lambda one: one["name"])

    def status(self, vm: str) -> dict[str, Any]:
        """Of one VM by name or UUID. Raises NotFound."""
        return self._find(vm).status()

    # -- protect, unprotect ------------------------------------------------------------------------

    async def check(self, spec: ProtectSpec) -> list[str]:
        """Everything that keeps the VM from being protected as asked, raised at once; changes nothing.

        Returns what could not be found out, in sentences.
        """
        _definition, answer = await self._judge(spec)
        return [answer.note] if answer.note else []

    async def _judge(self, spec: ProtectSpec) -> tuple[Definition, PeerAnswer]:
        findings = request_findings(
            spec, self.settings.name, sorted(self._channel.links), self._hypervisor.features
        )
        try:
            definition = await self._hypervisor.definition(spec.vm)
        except NotFound as error:
            way_out = "see `virsh list --all` for the VMs of this host"
            findings.append(Finding(f"VM {spec.vm}", "it is not defined on this host", way_out, error.cause))
            raise_findings(findings, f"VM {spec.vm} cannot be protected")
            raise
        present = self._protections.get(definition.uuid)
        findings += vm_findings(spec, definition, None if present is None else present.record.peer)
        link = self._channel.links.get(spec.peer)
        answer = PeerAnswer()
        # One that is protected already says by its state what its peer has against it.
        if present is None and link is not None:
            epoch = await asyncio.to_thread(last_epoch, self.directory, definition.uuid)
            answer = await ask_peer(link, spec, definition, epoch)
            findings += answer.objections
        raise_findings(findings, f"VM {spec.vm} cannot be protected")
        return definition, answer

    async def protect(self, spec: ProtectSpec) -> dict[str, Any]:
        """Protect a VM, or change how it is. Raises all findings at once, with nothing changed."""
        async with self._changing:
            definition, answer = await self._judge(spec)
            present = self._protections.get(definition.uuid)
            if spec.raw_overlay_consent:
                await raw_overlay.put_on(self._hypervisor, definition, spec.disks)
                crash_point("raw-overlay-on")
            wanted: dict[str, Any] = {
                "rpo_seconds": spec.rpo_seconds,
                "priority": spec.priority,
                "only_disks": None if spec.disks is None else list(spec.disks),
                "raw_overlay_consent": spec.raw_overlay_consent,
            }
            if present is not None:
                record = present.record
                await self._change(record, wanted)
            else:
                record = ProtectionRecord(
                    uuid=definition.uuid,
                    name=definition.name,
                    peer=spec.peer,
                    epoch=await asyncio.to_thread(last_epoch, self.directory, definition.uuid),
                    **wanted,
                )
                if definition.uuid in self._damaged:
                    # Checkpoints of the lost record may be there: what they count from is not known any more.
                    record.resync_cause = "the record of its protection was lost"
                await self._save(record)
            try:
                await autostart.take_over(self._hypervisor, record, partial(self._save, record))
            except LifeboatError as error:
                logger.warning("VM %s: its autostart stays with libvirt until a pass: %s", record.name, error)
            if present is None:
                self._damaged.pop(definition.uuid, None)
                present = self._add(record)
                if answer.status is not None:
                    present.replication.standing.hear(answer.status, answer.asked_at)
            else:
                present.wake()
            return present.status()

    async def _change(self, record: ProtectionRecord, wanted: Mapping[str, Any]) -> None:
        """All of it, durably, or nothing. Not on a copy: what a pass notes meanwhile must not be lost."""
        before = {name: getattr(record, name) for name in wanted}
        try:
            for name, value in wanted.items():
                setattr(record, name, value)
            await self._save(record)
        except BaseException:
            for name, value in before.items():
                setattr(record, name, value)
            raise

    async def _save(self, record: ProtectionRecord) -> None:
        await record.save(self.directory)

    async def unprotect(self, vm: str, keep_replica: bool) -> None:
        """End a VM's protection. The replica is removed unless kept; a peer that is away keeps it for now.

        Raises NotFound, and PeerUnreachable where the replica should go and the peer cannot be asked: then
        nothing was changed.
        """
        async with self._changing:
            damaged = self._find_damaged(vm)
            protection = damaged or self._find(vm)
            record = protection.record
            if damaged is not None and not keep_replica:
                raise Conflict(
                    f"VM {record.name}: its record, which names its peer, cannot be read; unprotect it and "
                    "keep the replica, or protect it again first"
                )
            if protection.held_by:
                raise Conflict(
                    f"VM {record.name}: it is being moved, or has just been (held by "
                    f"{', '.join(protection.held_by)}); wait for that to end, or cancel it"
                )
            if not keep_replica:
                link = self._here.link(record.peer)
                await link.call("store.remove", {"vm": record.uuid, "epoch": record.epoch})
                await protection.replication.disks.media.forget()
            await protection.stop()
            try:
                await protection.replication.drop_checkpoints()
            except LifeboatError as error:
                logger.warning("VM %s: its bitmaps could not be removed: %s", record.name, error)
            await autostart.give_back(self._hypervisor, record)
            await self._forget(record)

    async def _forget(self, record: ProtectionRecord) -> None:
        self._protections.pop(record.uuid, None)
        self._damaged.pop(record.uuid, None)
        await asyncio.to_thread(self._here.after_boot.decided, record.uuid)
        await asyncio.to_thread(keep_epoch, self.directory, record.uuid, record.epoch)
        await asyncio.to_thread(record.remove, self.directory)

    # -- work on demand ----------------------------------------------------------------------------

    async def run_pass(self, vm: str, *, reason: str, leave_bytes: int = 0) -> PassResult:
        """A pass now, also while held, where more than ``leave_bytes`` changed."""
        return await self._find(vm).run_pass(reason=reason, leave_bytes=leave_bytes)

    def libvirt_stands_still(self) -> bool:
        """Whether the end of a pass's backup job is overdue: another one begun now would wait for it."""
        return self._here.backups.event_worker.stands_still

    def hold_from_start(self, vm: str, holder: str) -> None:
        """Called before :meth:`start`: not even a first periodic pass of the VM while held."""
        self._held_from_start.setdefault(vm, set()).add(holder)

    async def hold(self, vm: str, holder: str) -> None:
        """No periodic passes while held; returns when none is under way."""
        await self._find(vm).hold(holder)

    def pace(self, vm: str, pace: Pace) -> None:
        """What passes and the residual of a held VM may put on the wire, until nobody holds it."""
        self._find(vm).replication.pace = pace

    async def release(self, vm: str, holder: str) -> None:
        """Periodic passes again, once nobody holds."""
        self._find(vm).release(holder)

    def postpone(self, vm: str, seconds: float) -> dict[str, Any]:
        """Let a VM's periodic passes wait for so long; 0: no longer. Raises NotFound."""
        protection = self._find(vm)
        protection.postpone(seconds)
        return protection.status()

    async def verify(self, vm: str) -> dict[str, Any]:
        """Compare every block with the replica at one generation; differences are told and repaired."""
        result = await self._find(vm).run_pass(reason="verify", compare_all=True)
        return {
            "vm": self._find(vm).record.uuid,
            "name": self._find(vm).record.name,
            "generation": result.generation,
            "equal": result.different_bytes == 0,
            "compared_bytes": result.compared_bytes,
            "different_bytes": result.different_bytes,
            "digest": result.digest,
            "seconds": result.total_seconds,
        }

    async def resync(self, vm: str) -> dict[str, Any]:
        """Trust no bitmap: find by digest what differs and send that. Returns when it is under way."""
        protection = self._find(vm)
        if protection.record.return_overlays:
            protection.record.return_overlays = {}
            await self._save(protection.record)
        elif protection.record.sealed is not None:
            protection.record.resync_cause = "asked for by an operator"
            await self._save(protection.record)
        # A pass may be under way that began before the word: it is looked at soon after it, too.
        protection.changed()
        return protection.status()

    async def measure_lags(self) -> None:
        """Ask QEMU for the lag of every VM: for a status that shall be fresh."""
        await asyncio.gather(*(protection.measure_lag() for protection in self._protections.values()))

    # -- what an evacuation needs ------------------------------------------------------------------

    async def send_residual(
        self, vm: str, frozen: Mapping[str, ImageReference], bitmap: str, definition: str
    ) -> PassResult:
        """What frozen images hold beyond the last generation, sealed as the next. The VM must be held."""
        protection = self._find(vm)

        async def work() -> PassResult:
            if protection.replication.standing.needs_reconcile:
                await protection.replication.standing.reconcile()
            with protection.replication.totals.counted():
                return await protection.replication.send_residual(frozen, bitmap, definition)

        return await protection.exclusive(work)

    async def after_rollback(self, vm: str) -> None:
        """The VM runs on here: see what the peer holds and go on; whoever holds still has to release."""
        protection = self._find(vm)
        protection.replication.standing.needs_reconcile = True
        protection.wake()

    async def handed_over(self, vm: str) -> None:
        """The VM lives at the peer now: forget its protection, leave its images. Unknown is no error."""
        try:
            protection = self._find(vm)
        except NotFound:
            return
        await protection.stop()
        await self._forget(protection.record)

    async def adopt_for_return(
        self,
        vm: str,
        *,
        name: str = "",
        peer: str,
        epoch: int,
        generation: int,
        checkpoint: str,
        overlays: Mapping[str, ImageReference],
        rpo_seconds: float | None = None,
        priority: int = 50,
        autostart_wanted: bool = False,
    ) -> dict[str, Any]:
        """Protect a VM that has just arrived towards its old home, which keeps its images at ``generation``.

        ``overlays``: the frozen arrival overlays, whose own clusters are what changed since; ``checkpoint``
        was made at the instant at which they were frozen. Calling it again for an epoch changes nothing.
        """
        async with self._changing:
            present = self._protections.get(vm)
            if present is not None and present.record.epoch >= epoch:
                return present.status()
            if present is not None:
                await present.stop()
            domain = await self._hypervisor.lookup(vm)
            definition = await self._hypervisor.definition_of(domain, subject=f"VM {vm}")
            # What did not come along (a shared disk, say) was left out on somebody's word, and stays so.
            left_out = plan_layout(definition, None).refused
            record = ProtectionRecord(
                uuid=vm,
                name=name or definition.name,
                peer=peer,
                only_disks=sorted(overlays) if left_out else None,
                rpo_seconds=self.settings.rpo_seconds if rpo_seconds is None else rpo_seconds,
                priority=priority,
                epoch=epoch,
                autostart=autostart_wanted,
                return_generation=generation,
                return_checkpoint=checkpoint,
                return_overlays={
                    target: [str(image.path), image.format, image.size_bytes]
                    for target, image in overlays.items()
                },
            )
            await asyncio.to_thread(keep_epoch, self.directory, record.uuid, record.epoch)
            await self._save(record)
            self._damaged.pop(vm, None)
            await autostart.take_over(self._hypervisor, record, partial(self._save, record))
            return self._add(record).status()
