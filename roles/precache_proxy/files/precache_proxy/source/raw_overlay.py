# SPDX-License-Identifier: GPL-3.0-or-later
"""Raw disks cannot hold bitmaps: with the operator's word a qcow2 overlay goes on them, live."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import libvirt
from lxml import etree

from precache_proxy import durable
from precache_proxy.errors import Finding
from precache_proxy.hypervisor.connection import Hypervisor
from precache_proxy.hypervisor.domain_xml import Definition, Disk
from precache_proxy.units import GIB, format_bytes

if TYPE_CHECKING:
    from precache_proxy.source.request import ProtectSpec

SUFFIX = ".lifeboat.qcow2"
FALLBACK_DIRECTORY = Path("/var/lib/libvirt/images")
_LEAST_FREE_BYTES = 1 * GIB


def raw_disks(definition: Definition, only: Sequence[str] | None) -> list[Disk]:
    """The writable raw disks among those to protect."""
    return [
        disk
        for disk in definition.disks
        if (only is None or disk.target in only)
        and disk.device == "disk"
        and disk.is_writable_disk
        and disk.format == "raw"
        and disk.path
        and disk.image.kind in {"file", "block"}
    ]


def overlay_path(disk: Disk, name: str) -> Path:
    """Beside an image file; for a block device in libvirt's directory of images."""
    path = Path(disk.path)
    if disk.image.kind == "block":
        return FALLBACK_DIRECTORY / f"{name}.{disk.target}{SUFFIX}".replace("/", "_")
    return path.with_name(path.name + SUFFIX)


def findings(definition: Definition, spec: ProtectSpec) -> list[Finding]:
    """What keeps overlays from being put on, where consent was given; changes nothing."""
    found: list[Finding] = []
    if not spec.raw_overlay_consent:
        return found
    for disk in raw_disks(definition, spec.disks):
        subject = f"VM {definition.name} disk {disk.target}"
        overlay = overlay_path(disk, definition.name)
        if not definition.running_id:
            found.append(
                Finding(
                    subject, "it is raw, and an overlay goes on while the VM runs", "start the VM", "conflict"
                )
            )
        if overlay.exists():
            found.append(Finding(subject, f"{overlay} is there already", "move that file away", "conflict"))
        try:
            status = os.statvfs(overlay.parent)
            free = status.f_bavail * status.f_frsize
        except OSError as error:
            found.append(Finding(subject, f"{overlay.parent}: {error.strerror}", "create it", "not-found"))
            continue
        if free < _LEAST_FREE_BYTES:
            found.append(
                Finding(
                    subject,
                    f"{format_bytes(free)} free on {overlay.parent}, where every write goes from now on",
                    f"free at least {format_bytes(_LEAST_FREE_BYTES)}",
                    "no-space",
                )
            )
    return found


async def put_on(hypervisor: Hypervisor, definition: Definition, only: Sequence[str] | None) -> None:
    """An external snapshot of just the raw disks, all at one instant; durable when this returns."""
    disks = raw_disks(definition, only)
    if not disks:
        await asyncio.to_thread(durable.sync_parents, _put_on_before(definition))
        return
    root = etree.Element("domainsnapshot")
    element = etree.SubElement(root, "disks")
    for disk in disks:
        overlay = overlay_path(disk, definition.name)
        one = etree.SubElement(element, "disk", name=disk.target, snapshot="external", type="file")
        etree.SubElement(one, "driver", type="qcow2")
        etree.SubElement(one, "source", file=str(overlay))
    for disk in definition.disks:
        if disk not in disks:
            etree.SubElement(element, "disk", name=disk.target, snapshot="no")
    domain = await hypervisor.lookup(definition.uuid)
    flags = (
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    )
    await hypervisor.call_in_turn(
        definition.uuid,
        domain.snapshotCreateXML,
        etree.tostring(root, encoding="unicode"),
        flags,
        subject=f"VM {definition.name}",
    )
    # QEMU syncs what the guest wrote, never the directory: a power cut could take the file's name.
    overlays = [overlay_path(disk, definition.name) for disk in disks]
    await asyncio.to_thread(durable.sync_parents, [*overlays, *_put_on_before(definition)])


def _put_on_before(definition: Definition) -> list[Path]:
    """Overlays of ours that are on: a kill may have come before their names were durable."""
    paths = [Path(disk.path) for disk in definition.disks if disk.path.endswith(SUFFIX)]
    return [path for path in paths if path.exists()]
