# SPDX-License-Identifier: GPL-3.0-or-later
"""Everything that stands in the way of an evacuation, found on both sides before anything is changed."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import libvirt
from lxml import etree

from precache_proxy.errors import Finding, HypervisorError, NotFound
from precache_proxy.evacuation.boot_needs import boot_findings
from precache_proxy.evacuation.domains import Domains
from precache_proxy.evacuation.guard import TOMBSTONE, Guard, hook_findings
from precache_proxy.evacuation.job import FENCE_SHARE
from precache_proxy.evacuation.media_places import Shelf, find_places
from precache_proxy.evacuation.reconcile import Presence
from precache_proxy.hypervisor.domain_xml import Definition, parse_definition
from precache_proxy.source.layout import plan_layout
from precache_proxy.units import MIB, format_bytes

# What an overlay may take at least: a guest goes on writing while RAM crosses.
OVERLAY_RESERVE_BYTES = 256 * MIB
# QEMU's own need beside the guest's memory.
QEMU_OVERHEAD_BYTES = 128 * MIB


def covered_disks(definition: Definition) -> list[str]:
    """Target names of the disks that must go along."""
    return [disk.target for disk in definition.disks if disk.is_writable_disk]


def source_findings(
    definition: Definition,
    presence: Presence,
    status: Mapping[str, Any] | None,
    peer: str | None,
    *,
    may_be_off: bool = False,
) -> list[Finding]:
    """What the source itself can see. ``status`` None: the VM is not protected. ``may_be_off``: it goes by
    restart, for which it need not run."""
    vm = f"VM {definition.name}"
    found: list[Finding] = []
    if presence is Presence.PAUSED:
        found.append(Finding(vm, "it is paused", "resume it, or shut it off and fail it over", "conflict"))
    elif presence is not Presence.RUNNING and not (
        may_be_off and presence in {Presence.SHUT_OFF, Presence.ENDED}
    ):
        way_out = "start it, or evacuate it by restart, which leaves it shut off"
        found.append(Finding(vm, "it does not run", way_out, "conflict"))
    for device in definition.hostdevs:
        found.append(
            Finding(vm, f"host device {device.description} cannot go along", "detach it first", "unsupported")
        )
    for filesystem in definition.filesystems:
        found.append(
            Finding(vm, f"shared folder {filesystem} cannot go along", "remove it first", "unsupported")
        )
    found += [
        Finding(
            vm,
            f"the guest can write to the floppy {drive.path}, and nobody counts what",
            "eject it, or put it in read-only",
            "unsupported",
        )
        for drive in definition.disks
        if drive.device == "floppy" and drive.path and not drive.readonly
    ]
    if status is None:
        found.append(
            Finding(vm, "it is not protected", "protect it first (playbooks/protect.yml)", "not-found")
        )
        return found
    if peer is not None and status.get("peer") != peer:
        found.append(
            Finding(
                vm,
                f"its replica is at {status.get('peer')}, not at {peer}",
                f"evacuate it to {status.get('peer')}, or protect it at {peer} first",
                "invalid",
            )
        )
    if not status.get("generation"):
        found.append(
            Finding(
                vm,
                f"its replica has no sealed generation yet (state {status.get('state')})",
                "wait until seeding is done, see `precache-proxy status`",
                "conflict",
            )
        )
    found += _left_out(definition, status.get("disks"))
    protected = set(status.get("disks") or covered_disks(definition))
    for key in covered_disks(definition):
        disk = definition.disk(key)
        if key not in protected:
            found.append(
                Finding(
                    vm, f"disk {key} is not protected", "protect the VM anew with all its disks", "conflict"
                )
            )
        if disk is not None and disk.mirror:
            found.append(
                Finding(
                    vm,
                    f"a block job ({disk.mirror}) runs on disk {key}",
                    "wait for it or end it (`virsh blockjob`)",
                    "conflict",
                )
            )
    return found


def _left_out(definition: Definition, only: Collection[str] | None) -> list[Finding]:
    """Disks that the VM got since it was protected, and that no pass carries."""
    found: list[Finding] = []
    for target in plan_layout(definition, only).refused:
        disk = definition.disk(target)
        if disk is None or disk.device not in {"disk", "lun"}:
            continue
        is_raw = disk.is_writable_disk and disk.format == "raw" and bool(disk.path)
        what = f"{disk.format} on {disk.path or disk.image.location or disk.image.kind}"
        way_out = "protect the VM again with raw_overlay_consent, or detach the disk"
        found.append(
            Finding(
                f"VM {definition.name}, disk {target}",
                f"it is {what}, cannot be protected as it is, and would be left behind",
                way_out if is_raw else "detach it, or put its content on a disk in qcow2",
                "unsupported",
            )
        )
    return found


def restart_findings(
    definition: Definition, persistent: Definition | None, *, saved: bool = False
) -> list[Finding]:
    """What a VM would lose by being booted from its persistent definition (None: it has none).

    ``saved``: its memory is kept on disk (managed save).
    """
    vm = f"VM {definition.name}"
    if saved:
        return [
            Finding(
                vm,
                "its memory is kept on disk (managed save) and would be lost",
                "start it, or give that memory up (`virsh managedsave-remove`)",
                "unsupported",
            )
        ]
    if persistent is None:
        return [
            Finding(
                vm,
                "it is transient: libvirt forgets it when it is shut down",
                "define it (`virsh dumpxml` and `virsh define`), or evacuate it live",
                "unsupported",
            )
        ]
    now = {key: _path_of(definition, key) for key in covered_disks(definition)}
    then = {key: _path_of(persistent, key) for key in covered_disks(persistent)}
    return [
        Finding(
            f"{vm}, disk {key}",
            f"it runs with {now.get(key) or 'none'} and would boot with {then.get(key) or 'none'}",
            "make both the same (`virsh attach-disk --config`, `virsh detach-disk --config`)",
            "conflict",
        )
        for key in sorted({*now, *then})
        if now.get(key) != then.get(key)
    ]


def _path_of(definition: Definition, key: str) -> str:
    disk = definition.disk(key)
    return "" if disk is None else disk.path


def overlay_findings(definition: Definition, fallback_directory: Path) -> list[Finding]:
    """Room for the writes between freeze and switch-over, at the source (blocking)."""
    found: list[Finding] = []
    for key in covered_disks(definition):
        disk = definition.disk(key)
        if disk is None:
            continue
        directory = Path(disk.path).parent if disk.image.kind == "file" else fallback_directory
        found.extend(space_findings(f"VM {definition.name}, disk {key}", directory, OVERLAY_RESERVE_BYTES))
    return found


def space_findings(subject: str, directory: Path, needed_bytes: int) -> list[Finding]:
    """Whether a file system has room (blocking)."""
    try:
        status = os.statvfs(directory)
    except OSError as error:
        return [
            Finding(
                subject, f"{directory} cannot be read ({error.strerror})", "make it accessible", "no-space"
            )
        ]
    free_bytes = status.f_bavail * status.f_frsize
    if free_bytes >= needed_bytes:
        return []
    fact = f"{format_bytes(needed_bytes)} needed on {directory}, {format_bytes(free_bytes)} free"
    return [Finding(subject, fact, "free space there", "no-space")]


async def destination_findings(
    domains: Domains, guard: Guard, definition_xml: str, disks_directory: Path, shelf: Shelf | None = None
) -> list[Finding]:
    """What the destination sees: name and UUID, machine, CPU, memory, networks, files, reach of QEMU's
    user."""
    definition = parse_definition(definition_xml)
    found = hook_findings("destination")
    found += await _clashes(domains, guard, definition)
    found += await _machine(domains, definition, definition_xml)
    found += await _memory(domains, definition)
    found += await _networks(domains, definition)
    found += await asyncio.to_thread(boot_findings, definition)
    found += (await asyncio.to_thread(find_places, definition, shelf)).findings
    found += _reach(disks_directory)
    found += space_findings(
        f"VM {definition.name}",
        disks_directory,
        OVERLAY_RESERVE_BYTES * max(1, len(covered_disks(definition))),
    )
    return found


async def _clashes(domains: Domains, guard: Guard, definition: Definition) -> list[Finding]:
    found: list[Finding] = []
    presence = await domains.presence(definition.uuid)
    if presence is not Presence.ABSENT:
        found.append(
            Finding(
                f"VM {definition.name}",
                f"a domain with its UUID {definition.uuid} is defined at the destination ({presence.value})",
                "remove that one (`virsh undefine`) if it is a leftover",
                "conflict",
            )
        )
    try:
        other = await domains.hypervisor.lookup(definition.name)
        uuid = await domains.hypervisor.call(other.UUIDString, subject=f"VM {definition.name}")
        if uuid != definition.uuid:
            found.append(
                Finding(
                    f"VM {definition.name}",
                    f"another domain ({uuid}) has its name at the destination",
                    "rename one of them (`virsh domrename`)",
                    "conflict",
                )
            )
    except NotFound:
        pass
    forbidden = guard.forbidden(definition.uuid)
    if forbidden is not None and forbidden.cause != TOMBSTONE:
        found.append(
            Finding(
                f"VM {definition.name}",
                f"an earlier arrival at the destination is not settled (job {forbidden.job})",
                "see `precache-proxy status` there and settle it",
                "conflict",
            )
        )
    return found


async def _machine(domains: Domains, definition: Definition, xml: str) -> list[Finding]:
    vm = f"VM {definition.name}"
    connection = domains.hypervisor.connection

    def capabilities() -> str:
        return str(
            connection.getDomainCapabilities(None, definition.arch, definition.machine, definition.type, 0)
        )

    try:
        await domains.hypervisor.call(capabilities, subject=vm)
    except HypervisorError as error:
        return [
            Finding(
                vm,
                f"machine type {definition.machine} ({definition.type}, {definition.arch}) is not known at "
                f"the "
                f"destination: {error}",
                "install the QEMU of the source there, or give the VM a machine type that both know",
                "unsupported",
            )
        ]
    return await _cpu(domains, definition, xml)


async def _cpu(domains: Domains, definition: Definition, xml: str) -> list[Finding]:
    cpu = etree.fromstring(xml.encode()).find("cpu")
    if cpu is None or cpu.get("mode") in {"host-model", "maximum"}:
        # host-model is expanded in the live definition; a live XML that still says so has nothing to compare
        return []
    connection = domains.hypervisor.connection
    text = etree.tostring(cpu, encoding="unicode")

    def compare() -> int:
        return int(
            connection.compareHypervisorCPU(
                None, definition.arch, definition.machine, definition.type, text, 0
            )
        )

    try:
        result = await domains.hypervisor.call(compare, subject=f"VM {definition.name}")
    except HypervisorError as error:
        # host-passthrough and emulated CPUs cannot always be compared: libvirt itself decides at the
        # migration
        if cpu.get("mode") == "host-passthrough" or definition.type == "qemu":
            return []
        return [_cpu_finding(definition, str(error))]
    if result == libvirt.VIR_CPU_COMPARE_INCOMPATIBLE:
        return [_cpu_finding(definition, "the destination's processor lacks features of it")]
    return []


def _cpu_finding(definition: Definition, fact: str) -> Finding:
    return Finding(
        f"VM {definition.name}",
        f"its CPU model {definition.cpu or 'host'} does not fit: {fact}",
        "give the VM a CPU model that both hosts have and restart it",
        "unsupported",
    )


async def _memory(domains: Domains, definition: Definition) -> list[Finding]:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        available = next(line for line in text.splitlines() if line.startswith("MemAvailable:"))
        available_bytes = int(available.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        connection = domains.hypervisor.connection
        available_bytes = int(await domains.hypervisor.call(connection.getFreeMemory, subject="memory"))
    needed_bytes = definition.memory_bytes + QEMU_OVERHEAD_BYTES
    if available_bytes >= needed_bytes:
        return []
    needed, free = format_bytes(needed_bytes), format_bytes(available_bytes)
    fact = f"{needed} of memory needed at the destination, {free} free"
    return [
        Finding(f"VM {definition.name}", fact, "end something there or evacuate it elsewhere", "no-space")
    ]


async def _networks(domains: Domains, definition: Definition) -> list[Finding]:
    found: list[Finding] = []
    connection = domains.hypervisor.connection
    for interface in definition.interfaces:
        vm = f"VM {definition.name}, interface {interface.mac}"
        if interface.kind == "network":

            def active(name: str = interface.source) -> bool:
                return bool(connection.networkLookupByName(name).isActive())

            try:
                if await domains.hypervisor.call(active, subject=f"network {interface.source}"):
                    continue
                fact, way_out = (
                    f"network {interface.source} is not active",
                    f"`virsh net-start {interface.source}`",
                )
            except HypervisorError:
                fact, way_out = f"there is no network {interface.source}", "define it there"
            found.append(Finding(vm, f"{fact} at the destination", way_out, "not-found"))
        elif interface.kind in {"bridge", "direct"} and interface.source not in _network_devices():
            what = "bridge" if interface.kind == "bridge" else "device"
            found.append(
                Finding(
                    vm,
                    f"there is no {what} {interface.source} at the destination",
                    "make one there",
                    "not-found",
                )
            )
    return found


def _network_devices() -> set[str]:
    # Not from /sys: in a container that shows another network namespace's devices.
    return {name for _index, name in socket.if_nameindex()}


def _reach(directory: Path) -> list[Finding]:
    """QEMU runs as a user of its own and must be able to walk to its disks (blocking)."""
    return [
        Finding(
            str(parent),
            "QEMU's user cannot pass through it",
            f"`chmod o+x {parent}`",
            "invalid",
        )
        for parent in (directory, *directory.parents)
        if parent.exists() and not parent.stat().st_mode & 0o001
    ]


def stall_findings(
    stall_seconds: float, peer: str, presumed_dead_after_seconds: float | None
) -> list[Finding]:
    """A migration that stalls must be over before the VM is fenced here.

    For libvirt lets the guest go on when that ends, and the peer may run it by then. Half of the time is for
    libvirt's own end of it.
    """
    most = (presumed_dead_after_seconds or 0.0) * FENCE_SHARE / 2
    if presumed_dead_after_seconds is None or stall_seconds <= most:
        return []
    return [
        Finding(
            f"peer {peer}",
            f"it presumes this host dead after {presumed_dead_after_seconds:.0f} s without a word, and a "
            f"migration is given up here only after {stall_seconds:.0f} s without progress",
            f"set precache_proxy_stall_seconds to {most:.0f} or less here, or "
            "precache_proxy_presume_source_dead_after to more there",
            "conflict",
        )
    ]


def sentence(findings: Iterable[Finding]) -> str:
    """All findings as one text."""
    return "\n".join(str(finding) for finding in findings)
