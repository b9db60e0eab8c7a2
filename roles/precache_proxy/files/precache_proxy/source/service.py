# SPDX-License-Identifier: GPL-3.0-or-later
"""The source side of the proxy: every VM of this host that is protected at a peer."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from precache_proxy import durable
from precache_proxy.blocks.images import ImageReference
from precache_proxy.channel.channel import Channel
from precache_proxy.errors import Conflict, Finding, LifeboatError, NotFound
from precache_proxy.hypervisor.connection import Hypervisor
from precache_proxy.hypervisor.domain_xml import Definition
from precache_proxy.hypervisor.events import DomainEvent
from precache_proxy.hypervisor.qemu_user import find_qemu_user
from precache_proxy.source import autostart, raw_overlay
from precache_proxy.source.backups import Backups
from precache_proxy.source.environment import Environment, PriorityGate
from precache_proxy.source.layout import device_findings, disk_findings, raise_findings
from precache_proxy.source.passes import PassResult
from precache_proxy.source.protection import Protection
from precache_proxy.source.record import ProtectionRecord
from precache_proxy.source.scratch import ScratchPool
from precache_proxy.source.settings import SourceSettings
from precache_proxy.source.tracker import Tracker

logger = logging.getLogger(__name__)

# What may have changed which disks a VM has, or whether it runs.
_TELLING_EVENTS = {"device-added", "device-removed"}
_TELLING_CHANGES = {"started", "stopped", "defined", "undefined"}


class ProtectSpec(Protocol):
    """What an operator asks for. ``vm`` is a name or a UUID; ``disks`` None means all."""

    @property
    def vm(self) -> str: ...
    @property
    def peer(self) -> str: ...
    @property
    def rpo_seconds(self) -> float: ...
    @property
    def priority(self) -> int: ...
    @property
    def disks(self) -> Sequence[str] | None: ...
    @property
    def raw_overlay_consent(self) -> bool: ...


@dataclass(frozen=True)
class Protect:
    """A plain :class:`ProtectSpec`."""

    vm: str
    peer: str
    rpo_seconds: float = 15.0
    priority: int = 50
    disks: tuple[str, ...] | None = None
    raw_overlay_consent: bool = False


class Source:
    """All protections. Started after the channel and the hypervisor connection."""

    def __init__(
        self,
        directory: Path,
        run_directory: Path,
        hypervisor: Hypervisor,
        channel: Channel,
        settings: SourceSettings,
    ) -> None:
        self.directory = directory
        self.settings = settings
        self._run_directory = run_directory
        self._hypervisor = hypervisor
        self._channel = channel
        self._protections: dict[str, Protection] = {}
        self._environment: Environment | None = None
        self._unsubscribe: Callable[[], None] = lambda: None
        self._tasks: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()

    # -- life --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take the records up again; what they say is reconciled with the peers as links come up.

        Raises IntegrityError for a record that is none, ConfigurationError where QEMU's user is not found.
        """
        settings = self.settings
        scratch = ScratchPool(
            settings.scratch_directory,
            pass_limit_bytes=settings.pass_scratch_limit_bytes,
            open_pass_limit=settings.open_pass_limit * 2,
        )
        await asyncio.to_thread(scratch.clean)
        await asyncio.to_thread(self.directory.mkdir, mode=0o750, parents=True, exist_ok=True)
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
        )
        await self._environment.backups.end_leftovers()
        for path in sorted(self.directory.glob("*.json")):
            record = await asyncio.to_thread(ProtectionRecord.read, path)
            if record is not None:
                self._add(record)
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
        protection.start()
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
                protection.replication.needs_reconcile = True
                protection.wake()
            return
        told = self._protections.get(event.uuid)
        if told is not None and (
            event.kind in _TELLING_EVENTS or (event.kind == "lifecycle" and event.what in _TELLING_CHANGES)
        ):
            # a VM that was started may have lost its bitmaps, one that stopped has a last few changes
            told.replication.needs_reconcile = True
            told.wake()

    # -- which -------------------------------------------------------------------------------------

    def _find(self, vm: str) -> Protection:
        protection = self._protections.get(vm.lower())
        if protection is not None:
            return protection
        named = [one for one in self._protections.values() if one.record.name == vm]
        if len(named) == 1:
            return named[0]
        raise NotFound(
            f"VM {vm}: not protected on {self.settings.name}; see `precache-proxy status`, or protect it"
        )

    def statuses(self) -> list[dict[str, Any]]:
        """Of all protected VMs, by name."""
        return sorted((one.status() for one in self._protections.values()), key=lambda one: one["name"])

    def status(self, vm: str) -> dict[str, Any]:
        """Of one VM by name or UUID. Raises NotFound."""
        return self._find(vm).status()

    # -- protect, unprotect ------------------------------------------------------------------------

    async def check(self, spec: ProtectSpec) -> Definition:
        """Everything that keeps the VM from being protected as asked, raised at once; changes nothing."""
        findings = self._judge_request(spec)
        definition: Definition | None = None
        try:
            definition = await self._hypervisor.definition(spec.vm)
        except NotFound as error:
            way_out = "see `virsh list --all` for the VMs of this host"
            findings.append(Finding(f"VM {spec.vm}", "it is not defined on this host", way_out, error.cause))
        if definition is not None:
            findings += disk_findings(definition, spec.disks, raw_overlay_consent=spec.raw_overlay_consent)
            findings += device_findings(definition)
            findings += raw_overlay.findings(definition, spec)
            present = self._protections.get(definition.uuid)
            if present is not None and spec.peer != present.record.peer:
                findings.append(
                    Finding(
                        f"VM {definition.name}",
                        f"it is protected at {present.record.peer} already, and one peer holds its replica",
                        f"unprotect it first, or keep {present.record.peer}",
                        "conflict",
                    )
                )
        raise_findings(findings, f"VM {spec.vm} cannot be protected")
        assert definition is not None
        return definition

    def _judge_request(self, spec: ProtectSpec) -> list[Finding]:
        settings = self.settings
        found: list[Finding] = []
        if spec.peer == settings.name:
            found.append(
                Finding(f"peer {spec.peer}", "it is this host itself", "name a hypervisor at another site")
            )
        elif spec.peer not in self._channel.links:
            known = ", ".join(sorted(self._channel.links)) or "none"
            found.append(
                Finding(
                    f"peer {spec.peer}",
                    "it is not configured here",
                    f"name one of: {known}; or add it to the proxy's peers",
                    "not-found",
                )
            )
        if not (math.isfinite(spec.rpo_seconds) and spec.rpo_seconds > 0):
            found.append(
                Finding(
                    f"RPO {spec.rpo_seconds} s",
                    "changes cannot be at the peer before they were made",
                    "ask for some seconds, such as 15",
                )
            )
        features = self._hypervisor.features
        if features is not None and not features.backup:
            found += features.findings()
        return found

    async def protect(self, spec: ProtectSpec) -> dict[str, Any]:
        """Protect a VM, or change how it is. Raises all findings at once, with nothing changed."""
        async with self._changing:
            definition = await self.check(spec)
            present = self._protections.get(definition.uuid)
            disks = None if spec.disks is None else list(spec.disks)
            if present is not None:
                record = present.record
                record.rpo_seconds, record.priority = spec.rpo_seconds, spec.priority
                record.only_disks, record.raw_overlay_consent = disks, spec.raw_overlay_consent
            else:
                record = ProtectionRecord(
                    uuid=definition.uuid,
                    name=definition.name,
                    peer=spec.peer,
                    rpo_seconds=spec.rpo_seconds,
                    priority=spec.priority,
                    only_disks=disks,
                    raw_overlay_consent=spec.raw_overlay_consent,
                    epoch=await self._last_epoch(definition.uuid),
                )
            if spec.raw_overlay_consent:
                record.raw_overlays.update(await raw_overlay.put_on(self._hypervisor, definition, spec.disks))
            await autostart.take_over(self._hypervisor, record, self._save)
            await self._save(record)
            if present is None:
                present = self._add(record)
            else:
                present.wake()
            return present.status()

    async def _save(self, record: ProtectionRecord) -> None:
        await asyncio.to_thread(record.write, self.directory)

    async def unprotect(self, vm: str, keep_replica: bool) -> None:
        """End a VM's protection. The replica is removed unless kept; a peer that is away keeps it for now.

        Raises NotFound, and PeerUnreachable where the replica should go and the peer cannot be asked: then
        nothing was changed.
        """
        async with self._changing:
            protection = self._find(vm)
            record = protection.record
            if protection.held_by:
                raise Conflict(
                    f"VM {record.name}: it is being moved, or has just been (held by "
                    f"{', '.join(protection.held_by)}); wait for that to end, or cancel it"
                )
            if not keep_replica:
                link = self._here.link(record.peer)
                await link.call("store.remove", {"vm": record.uuid, "epoch": record.epoch})
            await protection.stop()
            try:
                await protection.replication.drop_checkpoints()
            except LifeboatError as error:
                logger.warning("VM %s: its bitmaps could not be removed: %s", record.name, error)
            await autostart.give_back(self._hypervisor, record)
            await self._forget(record)

    def _epoch_path(self, uuid: str) -> Path:
        return self.directory / "epochs" / f"{uuid}.json"

    async def _last_epoch(self, uuid: str) -> int:
        """The epoch that the VM had when its protection here ended: peers refuse older ones, and rightly."""
        kept = await asyncio.to_thread(durable.read_json, self._epoch_path(uuid))
        return 0 if kept is None else int(kept["epoch"])

    async def _forget(self, record: ProtectionRecord) -> None:
        self._protections.pop(record.uuid, None)
        if record.epoch:
            path = self._epoch_path(record.uuid)
            await asyncio.to_thread(path.parent.mkdir, mode=0o750, exist_ok=True)
            await asyncio.to_thread(durable.write_json, path, {"epoch": record.epoch})
        await asyncio.to_thread(record.remove, self.directory)

    # -- work on demand ----------------------------------------------------------------------------

    async def run_pass(self, vm: str, *, reason: str) -> PassResult:
        """A pass now, also while held."""
        return await self._find(vm).run_pass(reason=reason)

    async def hold(self, vm: str, holder: str) -> None:
        """No periodic passes while held; returns when none is under way."""
        await self._find(vm).hold(holder)

    async def release(self, vm: str, holder: str) -> None:
        """Periodic passes again, once nobody holds."""
        self._find(vm).release(holder)

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
        protection.wake()
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
            if protection.replication.needs_reconcile:
                await protection.replication.reconcile()
            with protection.replication.totals.counted():
                return await protection.replication.send_residual(frozen, bitmap, definition)

        return await protection.exclusive(work)

    async def after_rollback(self, vm: str) -> None:
        """The VM runs on here: see what the peer holds and go on; whoever holds still has to release."""
        protection = self._find(vm)
        protection.replication.needs_reconcile = True
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
            record = ProtectionRecord(
                uuid=vm,
                name=name or await self._hypervisor.call(domain.name, subject=f"VM {vm}"),
                peer=peer,
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
            await self._save(record)
            await autostart.take_over(self._hypervisor, record, self._save)
            return self._add(record).status()
