# SPDX-License-Identifier: GPL-3.0-or-later
"""Checkpoints and pull backups of running VMs: what changed since when, and a view of one instant."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import libvirt
from lxml import etree

from precache_proxy.crash_points import crash_point
from precache_proxy.errors import Conflict, HypervisorError, LifeboatError, NotFound, TrackingLost
from precache_proxy.hypervisor.connection import Hypervisor, libvirt_code
from precache_proxy.hypervisor.handles import DomainHandle
from precache_proxy.hypervisor.qemu_user import QemuUser, make_qemu_directory
from precache_proxy.source.scratch import GRACE_SECONDS, Lease, PassRecord, ScratchPool
from precache_proxy.source.totals import PassTotals

logger = logging.getLogger(__name__)

EXPORT_BITMAP = "dirty"
_CHECKPOINT_NAME = re.compile(r"^lifeboat-e(\d+)-g(\d+)(?:-s(\d+))?$")
_END_SECONDS = 60.0
# beside its two codes for it libvirt reports a bitmap that QEMU lacks as an invalid argument
_LOST_WORDS = ("bitmap", "checkpoint")


def checkpoint_name(epoch: int, generation: int, slice_number: int = 1) -> str:
    """The name of a checkpoint (and of its bitmaps): from its instant on, changes are counted.

    A generation that goes over in several slices makes one each; the last of them is its instant.
    """
    name = f"lifeboat-e{epoch}-g{generation}"
    return name if slice_number == 1 else f"{name}-s{slice_number}"


def parse_checkpoint_name(name: str) -> tuple[int, int, int] | None:
    """Epoch, generation and slice number, or None for a checkpoint that is not ours."""
    match = _CHECKPOINT_NAME.match(name)
    return (int(match.group(1)), int(match.group(2)), int(match.group(3) or 1)) if match else None


def is_of_generation(name: str, epoch: int, generation: int) -> bool:
    """Whether a checkpoint was made by (a slice of) this generation."""
    parsed = parse_checkpoint_name(name)
    return parsed is not None and parsed[:2] == (epoch, generation)


@dataclass(frozen=True)
class VmReference:
    """Which VM, for libvirt (``uuid``) and for people (``name``)."""

    uuid: str
    name: str

    def __str__(self) -> str:
        return f"VM {self.name}"


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


def checkpoint_xml(name: str, disks: Sequence[str], absent: Sequence[str]) -> str:
    """The ``<domaincheckpoint>`` over ``disks``."""
    root = etree.Element("domaincheckpoint")
    etree.SubElement(root, "name").text = name
    element = etree.SubElement(root, "disks")
    for target in disks:
        etree.SubElement(element, "disk", name=target, checkpoint="bitmap", bitmap=name)
    for target in absent:
        etree.SubElement(element, "disk", name=target, checkpoint="no")
    return etree.tostring(root, encoding="unicode")


def backup_socket(xml: str) -> str:
    """The UNIX socket that an open backup's description names, or ""."""
    server = etree.fromstring(xml.encode()).find("server")
    return "" if server is None else server.get("socket", "")


def _as_tracking_lost(error: LifeboatError, vm: VmReference, checkpoint: str) -> LifeboatError:
    code = libvirt_code(error)
    lost = code in {libvirt.VIR_ERR_CHECKPOINT_INCONSISTENT, libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT} or (
        code
        in {
            libvirt.VIR_ERR_INVALID_ARG,
            libvirt.VIR_ERR_OPERATION_INVALID,
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
        }
        and any(word in error.message for word in _LOST_WORDS)
    )
    if not lost:
        return error
    return TrackingLost(
        f"{vm}: changes since {checkpoint} are not known any more ({error.message}); "
        "what differs is found by digest"
    )


class Tracker:
    """Checkpoints and backups. Every method takes the VM and looks it up anew: connections come and go."""

    def __init__(
        self, hypervisor: Hypervisor, run_directory: Path, scratch: ScratchPool, user: QemuUser
    ) -> None:
        self._hypervisor = hypervisor
        self._passes = run_directory / "passes"
        self._sockets = run_directory / "nbd" / "qemu"
        self._scratch = scratch
        self._user = user

    async def _domain(self, vm: VmReference) -> DomainHandle:
        try:
            return await self._hypervisor.lookup(vm.uuid)
        except NotFound as error:
            raise NotFound(
                f"{vm}: libvirt knows no VM with UUID {vm.uuid} any more; see `virsh list --all`"
            ) from error

    async def checkpoints(self, vm: VmReference) -> list[str]:
        """The names of our checkpoints, oldest generation first."""
        domain = await self._domain(vm)
        names = await self._hypervisor.call(
            lambda: [checkpoint.getName() for checkpoint in domain.listAllCheckpoints(0)], subject=str(vm)
        )
        ours = [(key, name) for name in names if (key := parse_checkpoint_name(name)) is not None]
        return [name for _unused, name in sorted(ours)]

    async def dirty_bytes(self, vm: VmReference, checkpoint: str) -> dict[str, int]:
        """Bytes changed since the checkpoint, per disk that it covers and the VM has. Raises TrackingLost."""
        domain = await self._domain(vm)

        def ask() -> tuple[str, str]:
            flags = libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE | libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
            xml = str(domain.checkpointLookupByName(checkpoint, 0).getXMLDesc(flags))
            return xml, str(domain.XMLDesc(0))

        try:
            xml, now = await self._hypervisor.call(ask, subject=str(vm))
        except LifeboatError as error:
            raise _as_tracking_lost(error, vm, checkpoint) from error
        sizes: dict[str, int] = {}
        present = {
            target.get("dev") for target in etree.fromstring(now.encode()).findall("devices/disk/target")
        }
        for disk in etree.fromstring(xml.encode()).findall("disks/disk"):
            # A disk that was taken away since has no bitmap to ask for, and nothing that could be lost.
            if disk.get("checkpoint") != "bitmap" or disk.get("name") not in present:
                continue
            size = disk.get("size")
            if size is None:  # how libvirt says that the bitmap is inconsistent, or not there
                raise TrackingLost(
                    f"{vm} disk {disk.get('name')}: its bitmap of {checkpoint} is gone or inconsistent "
                    "(QEMU was killed, or the image was changed behind its back); "
                    "what differs is found by digest"
                )
            sizes[disk.get("name", "")] = int(size)
        return sizes

    async def restore_checkpoint(
        self, vm: VmReference, name: str, disks: Sequence[str], absent: Sequence[str]
    ) -> None:
        """Tell libvirt of a checkpoint whose bitmaps are in the images but that it does not know (any more).

        Raises TrackingLost where a bitmap is not there or not consistent; nothing is left of it then.
        """
        domain = await self._domain(vm)

        def redefine() -> None:
            root = etree.fromstring(checkpoint_xml(name, disks, absent).encode())
            etree.SubElement(root, "creationTime").text = str(int(time.time()))
            root.append(etree.fromstring(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE).encode()))
            flags = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
            domain.checkpointCreateXML(etree.tostring(root, encoding="unicode"), flags)

        try:
            await self._hypervisor.call(redefine, subject=str(vm))
            await self.dirty_bytes(vm, name)
        except (TrackingLost, HypervisorError) as error:
            await self.forget_checkpoint(vm, name)
            raise TrackingLost(
                f"{vm}: changes since {name} are not known any more ({error}); "
                "what differs is found by digest"
            ) from error

    async def forget_checkpoint(self, vm: VmReference, name: str) -> None:
        """Delete libvirt's note of a checkpoint and leave the bitmaps alone; none is no error."""
        domain = await self._domain(vm)
        with contextlib.suppress(NotFound):
            await self._hypervisor.call(
                lambda: domain.checkpointLookupByName(name, 0).delete(
                    libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY
                ),
                subject=str(vm),
            )

    async def create_checkpoint(
        self, vm: VmReference, name: str, disks: Sequence[str], absent: Sequence[str]
    ) -> None:
        """Begin to count changes now, on all ``disks`` at one instant."""
        domain = await self._domain(vm)
        await self._hypervisor.call(
            domain.checkpointCreateXML, checkpoint_xml(name, disks, absent), 0, subject=str(vm)
        )

    async def delete_checkpoint(self, vm: VmReference, name: str) -> None:
        """Delete a checkpoint; its changes go to its parent. One that is not there is no error.

        Where the bitmap is gone or broken only libvirt's note of it is deleted.
        """
        domain = await self._domain(vm)

        def delete() -> None:
            try:
                checkpoint = domain.checkpointLookupByName(name, 0)
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT:
                    return
                raise
            try:
                checkpoint.delete(0)
            except libvirt.libvirtError:
                checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)

        await self._hypervisor.call(delete, subject=str(vm))

    async def keep_only(self, vm: VmReference, keep: str | None) -> None:
        """Delete all of our checkpoints but ``keep``; newest first, so that changes go to older ones."""
        for name in reversed(await self.checkpoints(vm)):
            if name != keep:
                await self.delete_checkpoint(vm, name)

    async def open_socket(self, vm: VmReference) -> str:
        """The socket of the VM's open backup job, "" where none is open."""
        domain = await self._domain(vm)
        try:
            return backup_socket(await self._hypervisor.call(domain.backupGetXMLDesc, 0, subject=str(vm)))
        except LifeboatError as error:
            if libvirt_code(error) in {libvirt.VIR_ERR_NO_DOMAIN_BACKUP, libvirt.VIR_ERR_OPERATION_INVALID}:
                return ""
            raise

    async def end_backup(self, vm: VmReference) -> bool:
        """End the VM's backup job if there is one and it is ours; waits until it is gone. False: none was."""
        socket = await self.open_socket(vm)
        if not socket or not Path(socket).is_relative_to(self._sockets):
            return False
        domain = await self._domain(vm)
        with contextlib.suppress(HypervisorError):  # it ended by itself meanwhile
            await self._hypervisor.call(domain.abortJob, subject=str(vm))
        delay = 0.01
        async with asyncio.timeout(_END_SECONDS):
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
    async def backup(
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
        left. Raises TrackingLost, NoSpace, Conflict (somebody else's job), HypervisorError.
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
        domain = await self._domain(vm)
        if await self.end_backup(vm):
            logger.warning("%s: ended a backup job of ours that was left open", vm)
        socket.unlink(missing_ok=True)
        new = None if checkpoint is None else checkpoint_xml(checkpoint, disks, absent)
        begun = asyncio.ensure_future(self._hypervisor.call(domain.backupBegin, xml, new, 0, subject=str(vm)))
        try:
            await asyncio.shield(begun)
        except asyncio.CancelledError:
            # libvirt goes on beginning: wait for it, then take it back
            await asyncio.gather(begun, return_exceptions=True)
            await self._end_quietly(vm)
            if checkpoint is not None:
                await self.delete_checkpoint(vm, checkpoint)
            raise
        except LifeboatError as error:
            await self._end_quietly(vm)
            if checkpoint is not None:
                # libvirt keeps the new checkpoint when it fails after the transaction
                with contextlib.suppress(LifeboatError):
                    await self.delete_checkpoint(vm, checkpoint)
            other = await self._foreign_job(vm)
            if other:
                raise Conflict(
                    f"{vm}: a backup job of somebody else is open ({other}); wait for it, or end it with "
                    "`virsh domjobabort`"
                ) from error
            raise _as_tracking_lost(error, vm, ", ".join(sorted(set(incremental.values()))) or "-") from error

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
            await self.end_backup(vm)
        except NotFound:
            pass  # with the VM went its job
        except (LifeboatError, TimeoutError) as error:
            logger.warning("%s: the backup job could not be seen to end: %s", vm, error)
            return False
        return True
