# SPDX-License-Identifier: GPL-3.0-or-later
"""Pull backups of running VMs: a view of all disks at one instant, open for a bounded time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import libvirt
from lxml import etree

from precache_proxy.crash_points import crash_point
from precache_proxy.errors import Conflict, GuestBoots, HypervisorError, LifeboatError, NotFound
from precache_proxy.hypervisor.connection import libvirt_code
from precache_proxy.hypervisor.handles import DomainHandle
from precache_proxy.hypervisor.qemu_user import QemuUser, make_qemu_directory
from precache_proxy.source.event_worker import EventWorker
from precache_proxy.source.scratch import GRACE_SECONDS, Lease, PassRecord, ScratchPool
from precache_proxy.source.totals import PassTotals
from precache_proxy.source.tracker import Tracker, VmReference, as_tracking_lost, checkpoint_xml

logger = logging.getLogger(__name__)

EXPORT_BITMAP = "dirty"
_END_SECONDS = 60.0


@dataclass(frozen=True)
class Backup:
    """An open pull backup: connect to ``socket``, one export per disk target."""

    vm: VmReference
    socket: Path
    disks: tuple[str, ...]
    # disks whose changes are exposed as the bitmap context; the others are to be read whole
    incremental: frozenset[str]
    checkpoint: str | None
    lease: Lease


def backup_xml(
    socket: Path, scratch: Mapping[str, Path], incremental: Mapping[str, str], absent: Sequence[str]
) -> str:
    """The ``<domainbackup>`` for pull mode: disks with their scratch files, others left out by name."""
    root = etree.Element("domainbackup", mode="pull")
    etree.SubElement(root, "server", transport="unix", socket=str(socket))
    disks = etree.SubElement(root, "disks")
    for target, path in scratch.items():
        disk = etree.SubElement(disks, "disk", name=target, backup="yes", type="file", exportname=target)
        if target in incremental:
            disk.set("backupmode", "incremental")
            disk.set("incremental", incremental[target])
            disk.set("exportbitmap", EXPORT_BITMAP)
        else:
            disk.set("backupmode", "full")
        etree.SubElement(disk, "driver", type="qcow2")
        etree.SubElement(disk, "scratch", file=str(path))
    for target in absent:
        etree.SubElement(disks, "disk", name=target, backup="no")
    return etree.tostring(root, encoding="unicode")


def backup_socket(xml: str) -> str:
    """The UNIX socket that an open backup's description names, or ""."""
    server = etree.fromstring(xml.encode()).find("server")
    return "" if server is None else server.get("socket", "")


class Backups:
    """Opens and ends backup jobs of ours; jobs of others are left alone."""

    def __init__(
        self,
        tracker: Tracker,
        run_directory: Path,
        scratch: ScratchPool,
        user: QemuUser,
    ) -> None:
        self._tracker = tracker
        self._passes = run_directory / "passes"
        self._sockets = run_directory / "nbd" / "qemu"
        self._scratch = scratch
        self._user = user
        self.event_worker = EventWorker()

    async def wait_seconds(self, vm: VmReference) -> float:
        """See :meth:`EventWorker.wait_seconds`."""
        return await self.event_worker.wait_seconds(self._tracker, vm)

    def hasten(self, uuid: str) -> None:
        """See :meth:`ScratchPool.hasten`."""
        self._scratch.hasten(uuid)

    def ease(self, uuid: str) -> None:
        """See :meth:`ScratchPool.ease`."""
        self._scratch.ease(uuid)

    async def open_socket(self, vm: VmReference) -> str:
        """The socket of the VM's open backup job, "" where none is open."""
        try:
            xml = await self._tracker.on_domain(vm, lambda domain: str(domain.backupGetXMLDesc(0)))
        except LifeboatError as error:
            if libvirt_code(error) in {libvirt.VIR_ERR_NO_DOMAIN_BACKUP, libvirt.VIR_ERR_OPERATION_INVALID}:
                return ""
            raise
        return backup_socket(xml)

    async def end(self, vm: VmReference) -> bool:
        """End the VM's backup job if there is one and it is ours; waits until it is gone. False: none was."""
        socket = await self.open_socket(vm)
        if not socket or not Path(socket).is_relative_to(self._sockets):
            return False
        with contextlib.suppress(HypervisorError):  # it ended by itself meanwhile
            await self._tracker.on_domain(vm, lambda domain: domain.abortJob())
        delay = 0.01
        async with self.event_worker.ending(), asyncio.timeout(_END_SECONDS):
            while await self.open_socket(vm) == socket:
                await asyncio.sleep(delay)
                delay = min(delay * 1.5, 0.5)
        return True

    async def end_leftovers(self) -> None:
        """End the jobs that a former process of ours left open, as its records say."""
        for path in sorted(self._passes.glob("*.json")) if self._passes.is_dir() else ():
            record = PassRecord.read(path)
            if record is not None and record.proxy_pid != os.getpid():
                vm = VmReference(record.domain, record.domain)
                if not await self._end_quietly(vm):
                    continue  # the watchdog ends it when its time is over
            path.unlink(missing_ok=True)

    @contextlib.asynccontextmanager
    async def open(
        self,
        vm: VmReference,
        *,
        disks: Sequence[str],
        absent: Sequence[str],
        incremental: Mapping[str, str],
        checkpoint: str | None,
        limit_seconds: float,
        totals: PassTotals,
    ) -> AsyncIterator[Backup]:
        """A view of all ``disks`` at one instant, for a bounded time and with bounded scratch space.

        ``incremental`` names the checkpoint per disk since which changes are exposed; disks that it does not
        name can only be read whole. ``checkpoint`` is created at the same instant; when this raises, none is
        left. Raises TrackingLost, NoSpace, Conflict (somebody else's job), GuestBoots, HypervisorError.
        """
        async with self._scratch.lease(vm.uuid, limit_seconds=limit_seconds) as lease:
            await asyncio.to_thread(make_qemu_directory, self._sockets, self._user)
            socket = self._sockets / f"{vm.uuid}.sock"
            record_path = self._passes / f"{vm.uuid}.json"
            scratch = {disk: lease.path(disk) for disk in disks}
            PassRecord(
                domain=vm.uuid,
                socket=str(socket),
                scratch=[str(path) for path in lease.paths],
                scratch_limit_bytes=lease.limit_bytes,
                deadline_boottime_seconds=lease.deadline + GRACE_SECONDS,
                proxy_pid=os.getpid(),
            ).write(record_path)
            crash_point("pass-begun")
            # Where libvirt was not seen to end the job, the record stays: the watchdog goes by it.
            ended = True
            try:
                with totals.backup_open():
                    xml = backup_xml(socket, scratch, incremental, absent)
                    try:
                        await self._begin(vm, xml, socket, incremental, checkpoint, [*disks], [*absent])
                    except HypervisorError as error:
                        # without an answer of libvirt the job may still begin, after we have gone
                        ended = libvirt_code(error) is not None
                        raise
                    crash_point("pass-open")
                    watch = asyncio.create_task(lease.watch(lambda: self._abort(vm)))
                    try:
                        yield Backup(vm, socket, tuple(disks), frozenset(incremental), checkpoint, lease)
                    finally:
                        watch.cancel()
                        # cancelled or not, the job must not stay open: QEMU would go on copying
                        ended = await asyncio.shield(self._end_quietly(vm))
                        await asyncio.gather(watch, return_exceptions=True)
            finally:
                if ended:
                    record_path.unlink(missing_ok=True)
                socket.unlink(missing_ok=True)

    async def _begin(
        self,
        vm: VmReference,
        xml: str,
        socket: Path,
        incremental: Mapping[str, str],
        checkpoint: str | None,
        disks: list[str],
        absent: list[str],
    ) -> None:
        if await self.end(vm):
            logger.warning("%s: ended a backup job of ours that was left open", vm)
        socket.unlink(missing_ok=True)
        new = None if checkpoint is None else checkpoint_xml(checkpoint, disks, absent)

        def begin(domain: DomainHandle) -> None:
            self.event_worker.check(vm, domain)
            domain.backupBegin(xml, new, 0)

        begun = asyncio.ensure_future(self._tracker.on_domain(vm, begin))
        try:
            await asyncio.shield(begun)
        except asyncio.CancelledError:
            # libvirt goes on beginning: wait for it, then take it back
            await asyncio.gather(begun, return_exceptions=True)
            await self._end_quietly(vm)
            if checkpoint is not None:
                await self._tracker.delete_checkpoint(vm, checkpoint)
            raise
        except GuestBoots:
            raise  # nothing was begun
        except LifeboatError as error:
            await self._end_quietly(vm)
            if checkpoint is not None:
                # libvirt keeps the new checkpoint when it fails after the transaction
                with contextlib.suppress(LifeboatError):
                    await self._tracker.delete_checkpoint(vm, checkpoint)
            other = await self._foreign_job(vm)
            if other:
                raise Conflict(
                    f"{vm}: a backup job of somebody else is open ({other}); wait for it, or end it with "
                    "`virsh domjobabort`"
                ) from error
            raise as_tracking_lost(error, vm, ", ".join(sorted(set(incremental.values()))) or "-") from error

    async def _foreign_job(self, vm: VmReference) -> str:
        try:
            socket = await self.open_socket(vm)
        except LifeboatError:
            return ""
        return "" if not socket or Path(socket).is_relative_to(self._sockets) else socket

    async def _abort(self, vm: VmReference) -> None:
        logger.warning("%s: pass reached its hard limit; ending its backup job", vm)
        await self._end_quietly(vm)

    async def _end_quietly(self, vm: VmReference) -> bool:
        """End our job; False when that could not be seen: then it is the watchdog's matter."""
        try:
            await self.end(vm)
        except NotFound:
            pass  # with the VM went its job
        except (LifeboatError, TimeoutError) as error:
            logger.warning("%s: the backup job could not be seen to end: %s", vm, error)
            return False
        return True
