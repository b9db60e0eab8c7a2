# SPDX-License-Identifier: GPL-3.0-or-later
"""Checkpoints of running VMs: what changed since when."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import libvirt
from lxml import etree

from precache_proxy.errors import HypervisorError, LifeboatError, NotFound, TrackingLost
from precache_proxy.hypervisor.connection import Hypervisor, libvirt_code
from precache_proxy.hypervisor.handles import CheckpointHandle, DomainHandle

T = TypeVar("T")

_CHECKPOINT_NAME = re.compile(r"^lifeboat-e(\d+)-g(\d+)(?:-s(\d+))?$")
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


@contextlib.contextmanager
def says_if_undefined(vm: VmReference) -> Iterator[None]:
    """The same NotFound for a VM that libvirt does not know any more, whatever was asked of it."""
    try:
        yield
    except NotFound as error:
        if libvirt_code(error) != libvirt.VIR_ERR_NO_DOMAIN:
            raise
        raise NotFound(
            f"{vm}: not defined on this host any more; unprotect it, or define it again"
        ) from error


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


def as_tracking_lost(error: LifeboatError, vm: VmReference, checkpoint: str) -> LifeboatError:
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
    """Checkpoints of ours. Every method takes the VM and looks it up anew: connections come and go."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._hypervisor = hypervisor

    async def on_domain(self, vm: VmReference, work: Callable[[DomainHandle], T]) -> T:
        """Run a blocking function on the domain, in the VM's turn. Raises NotFound, HypervisorError."""
        connection = self._hypervisor.connection

        def look_up_and_work() -> T:
            return work(connection.lookupByUUIDString(vm.uuid))

        with says_if_undefined(vm):
            return await self._hypervisor.call_in_turn(vm.uuid, look_up_and_work, subject=str(vm))

    async def checkpoints(self, vm: VmReference) -> list[str]:
        """The names of our checkpoints, oldest generation first."""
        names = await self.on_domain(
            vm, lambda domain: [checkpoint.getName() for checkpoint in domain.listAllCheckpoints(0)]
        )
        ours = [(key, name) for name in names if (key := parse_checkpoint_name(name)) is not None]
        return [name for _unused, name in sorted(ours)]

    async def dirty_bytes(
        self, vm: VmReference, checkpoint: str, present: Collection[str]
    ) -> dict[str, int] | None:
        """Bytes changed since the checkpoint, per disk that it covers and that is ``present``.

        None: libvirt knows no such checkpoint (any more). Raises TrackingLost where its bitmaps are lost.
        """

        def ask(domain: DomainHandle) -> str:
            flags = libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE | libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
            return str(domain.checkpointLookupByName(checkpoint, 0).getXMLDesc(flags))

        try:
            xml = await self.on_domain(vm, ask)
        except LifeboatError as error:
            if libvirt_code(error) == libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT:
                return None
            raise as_tracking_lost(error, vm, checkpoint) from error
        sizes: dict[str, int] = {}
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
    ) -> dict[str, int]:
        """Tell libvirt of a checkpoint whose bitmaps are in the images but that it does not know (any more).

        Returns the bytes changed since. Raises TrackingLost where a bitmap is not there or not consistent;
        nothing is left of it then.
        """

        def redefine(domain: DomainHandle) -> None:
            root = etree.fromstring(checkpoint_xml(name, disks, absent).encode())
            etree.SubElement(root, "creationTime").text = str(int(time.time()))
            root.append(etree.fromstring(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE).encode()))
            flags = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
            domain.checkpointCreateXML(etree.tostring(root, encoding="unicode"), flags)

        try:
            await self.on_domain(vm, redefine)
            dirty = await self.dirty_bytes(vm, name, disks)
        except (TrackingLost, HypervisorError) as error:
            await self.forget_checkpoint(vm, name)
            raise TrackingLost(
                f"{vm}: changes since {name} are not known any more ({error}); "
                "what differs is found by digest"
            ) from error
        if dirty is None:
            raise TrackingLost(f"{vm}: somebody deleted {name} just now; what differs is found by digest")
        return dirty

    async def forget_checkpoint(self, vm: VmReference, name: str) -> None:
        """Delete libvirt's note of a checkpoint and leave the bitmaps alone; none is no error."""

        def forget(domain: DomainHandle) -> None:
            checkpoint = _find(domain, name)
            if checkpoint is not None:
                checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)

        await self.on_domain(vm, forget)

    async def create_checkpoint(
        self, vm: VmReference, name: str, disks: Sequence[str], absent: Sequence[str]
    ) -> None:
        """Begin to count changes now, on all ``disks`` at one instant."""
        xml = checkpoint_xml(name, disks, absent)
        await self.on_domain(vm, lambda domain: domain.checkpointCreateXML(xml, 0))

    async def delete_checkpoint(self, vm: VmReference, name: str) -> None:
        """Delete a checkpoint; its changes go to its parent. One that is not there is no error.

        Where the bitmap is gone or broken only libvirt's note of it is deleted.
        """

        def delete(domain: DomainHandle) -> None:
            checkpoint = _find(domain, name)
            if checkpoint is None:
                return
            try:
                checkpoint.delete(0)
            except libvirt.libvirtError:
                checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)

        await self.on_domain(vm, delete)

    async def keep_only(self, vm: VmReference, keep: str | None) -> None:
        """Delete all of our checkpoints but ``keep``; newest first, so that changes go to older ones."""
        for name in reversed(await self.checkpoints(vm)):
            if name != keep:
                await self.delete_checkpoint(vm, name)


def _find(domain: DomainHandle, name: str) -> CheckpointHandle | None:
    try:
        return domain.checkpointLookupByName(name, 0)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT:
            return None
        raise
