# SPDX-License-Identifier: GPL-3.0-or-later
"""Which of a VM's disks go along, and how; and everything that keeps a VM from being protected."""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from precache_proxy.errors import (
    Conflict,
    Finding,
    InvalidInput,
    LifeboatError,
    NoSpace,
    NotFound,
    StaleEpoch,
    Unsupported,
)
from precache_proxy.hypervisor.domain_xml import Definition, Disk

_LOCAL_KINDS = {"file", "block"}
_ERRORS: dict[str, type[LifeboatError]] = {
    "not-found": NotFound,
    "conflict": Conflict,
    "no-space": NoSpace,
    "stale-epoch": StaleEpoch,
    "unsupported": Unsupported,
    "invalid": InvalidInput,
}


@dataclass(frozen=True)
class Layout:
    """Disks by target name. ``tracked``: changes are counted; ``static``: media, carried beside the disks.

    ``absent`` are those that backups and checkpoints must leave out; ``refused`` cannot be protected.
    """

    tracked: dict[str, Disk] = field(default_factory=dict)
    static: dict[str, Disk] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def _selected(definition: Definition, only: Collection[str] | None) -> list[Disk]:
    return [disk for disk in definition.disks if only is None or disk.target in only]


def plan_layout(definition: Definition, only: Collection[str] | None) -> Layout:
    """The disks that are protected. Disks that :func:`disk_findings` refuses are left out."""
    tracked: dict[str, Disk] = {}
    static: dict[str, Disk] = {}
    refused: list[str] = []
    for disk in _selected(definition, only):
        removable = disk.device in {"cdrom", "floppy"}
        if removable and not disk.path and not disk.image.location:
            continue
        if not disk.path or disk.image.kind not in _LOCAL_KINDS:
            if not removable:  # a drive whose medium is on the network reads it wherever it is
                refused.append(disk.target)
        elif disk.is_writable_disk and disk.device == "disk" and disk.format == "qcow2":
            tracked[disk.target] = disk
        elif disk.readonly or removable:
            static[disk.target] = disk
        else:
            refused.append(disk.target)
    absent = [disk.target for disk in definition.disks if disk.target not in tracked]
    return Layout(tracked, static, absent, refused)


def qcow2_version(path: Path) -> int | None:
    """The version in a qcow2 header, None where there is none. Bitmaps need 3."""
    try:
        with path.open("rb") as file:
            header = file.read(8)
    except OSError:
        return None
    if len(header) < 8 or header[:4] != b"QFI\xfb":
        return None
    return int(struct.unpack(">I", header[4:8])[0])


def disk_findings(
    definition: Definition, only: Collection[str] | None, *, raw_overlay_consent: bool
) -> list[Finding]:
    """Everything about its disks that keeps a VM from being protected."""
    found: list[Finding] = []

    def find(disk: Disk, fact: str, way_out: str) -> None:
        found.append(Finding(f"VM {definition.name} disk {disk.target}", fact, way_out, "unsupported"))

    known = {disk.target for disk in definition.disks}
    for target in sorted(set(only or ()) - known):
        there = ", ".join(sorted(known)) or "none"
        found.append(
            Finding(
                f"VM {definition.name} disk {target}",
                "it has no such disk",
                f"name some of: {there}",
                "not-found",
            )
        )
    leave_out = "leave it out by naming the disks to protect"
    for disk in _selected(definition, only):
        removable = disk.device in {"cdrom", "floppy"}
        if removable and not disk.path and not disk.image.location:
            continue  # an empty drive
        if disk.image.kind == "network":
            find(
                disk,
                f"it is on network storage ({disk.image.location}), which only its own storage can copy",
                f"protect it there and {leave_out}",
            )
        elif disk.image.kind == "volume" and not disk.path:
            find(
                disk, f"its volume {disk.image.location} has no local path", f"give it by file or {leave_out}"
            )
        elif disk.image.kind not in _LOCAL_KINDS:
            find(disk, f"its source is of type {disk.image.kind}, which cannot be read here", leave_out)
        elif disk.transient:
            find(disk, "it is transient: what is written to it is dropped", leave_out)
        elif disk.shareable:
            find(disk, "it is shared with other VMs, so no instant of one VM is an instant of it", leave_out)
        elif disk.device == "lun":
            find(disk, "it is a passed-through SCSI device", leave_out)
        elif disk.mirror:
            find(
                disk,
                f"a block job ({disk.mirror}) runs on it",
                "wait for it or end it with `virsh blockjob --abort`",
            )
        elif disk.is_writable_disk and not removable:
            _judge_format(disk, find, raw_overlay_consent=raw_overlay_consent, name=definition.name)
    layout = plan_layout(definition, only)
    # refused and yet not found wanting: raw disks that get an overlay
    if not found and not layout.tracked and not layout.refused:
        found.append(
            Finding(
                f"VM {definition.name}",
                "it has no disk of its own that could be protected",
                "give it one, or name its disks",
                "unsupported",
            )
        )
    return found


def _judge_format(
    disk: Disk, find: Callable[[Disk, str, str], None], *, raw_overlay_consent: bool, name: str
) -> None:
    if disk.format == "raw":
        if not raw_overlay_consent:
            find(
                disk,
                "it is raw, and a raw image cannot hold the bitmaps that count changes",
                "consent to a qcow2 overlay on it (raw_overlay_consent), or convert it to qcow2",
            )
    elif disk.format != "qcow2":
        find(disk, f"its format {disk.format} cannot hold bitmaps", "convert it to qcow2")
    elif qcow2_version(Path(disk.path)) == 2:
        find(
            disk,
            "it is qcow2 of version 2 (compat 0.10), which cannot hold bitmaps",
            f"shut {name} down and run `qemu-img amend -f qcow2 -o compat=1.1 {disk.path}`",
        )


def device_findings(definition: Definition) -> list[Finding]:
    """Everything beside its disks that keeps a VM from being protected."""
    subject = f"VM {definition.name}"
    found = [
        Finding(subject, f"it uses a device of this host ({device.description})", "detach it", "unsupported")
        for device in definition.hostdevs
    ]
    found += [
        Finding(
            subject,
            f"it uses a shared folder of this host ({share})",
            "detach it, or put the files on a disk of the VM",
            "unsupported",
        )
        for share in definition.filesystems
    ]
    if definition.tpm is not None and definition.tpm.kind != "emulator":
        found.append(
            Finding(
                subject,
                f"its TPM is a device of this host ({definition.tpm.kind})",
                "give it an emulated TPM",
                "unsupported",
            )
        )
    return found


def raise_findings(findings: Iterable[Finding], what: str) -> None:
    """Raise all findings as one error, of their class where they agree, else InvalidInput."""
    found = list(findings)
    if not found:
        return
    causes = {finding.cause for finding in found}
    klass = _ERRORS.get(next(iter(causes)), InvalidInput) if len(causes) == 1 else InvalidInput
    sentences = "; ".join(str(finding) for finding in found)
    raise klass(f"{what}: {sentences}; nothing was changed", found)
