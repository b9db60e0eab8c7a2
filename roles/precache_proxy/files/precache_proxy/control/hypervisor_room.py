# SPDX-License-Identifier: GPL-3.0-or-later
"""Which VMs a hypervisor has, what they would take at a peer, and what it has room for itself.

Whoever places replicas asks this of both sides; nothing here is measured or kept.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from precache_proxy.control import answers
from precache_proxy.control.parts import Parts
from precache_proxy.errors import LifeboatError
from precache_proxy.hypervisor.domain_xml import Definition
from precache_proxy.source.offline import allocated_bytes
from precache_proxy.units import KIB


def memory_bytes(path: Path = Path("/proc/meminfo")) -> tuple[int | None, int | None]:
    """All memory of this host, and what a new guest could have of it; None: the kernel does not say."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
        told = {line.partition(":")[0]: int(line.split()[1]) * KIB for line in lines if line.endswith(" kB")}
    except (OSError, ValueError, IndexError):
        return None, None
    return told.get("MemTotal"), told.get("MemAvailable")


def disk_bytes(definition: Definition) -> int | None:
    """What a first copy of the VM's own disks would take now, backing images included; None: not known."""
    total = 0
    for disk in definition.disks:
        if not disk.is_writable_disk or not disk.path:
            continue
        for image in (disk.image, *disk.backing):
            taken = allocated_bytes(image.path) if image.path else None
            if taken is None:
                return None
            total += taken
    return total


async def room_answer(parts: Parts) -> dict[str, Any]:
    """GET /v1/hypervisor. ``domains`` is None where libvirt does not answer."""
    total, free = await asyncio.to_thread(memory_bytes)
    store = await asyncio.to_thread(answers.store_space, parts)
    links = [{"name": link["peer"], "state": link["state"]} for link in answers.links_answer(parts)]
    return {
        "name": parts.config.name,
        "site": parts.config.site,
        "memory_total_bytes": total,
        "memory_free_bytes": free,
        "store": store,
        "peers": links,
        "domains": await _domains(parts),
        "moved_away": [
            {"uuid": gone.vm, "name": gone.name, "peer": gone.peer, "sentence": gone.sentence}
            for gone in await parts.evacuation.moved_away()
        ],
    }


async def _domains(parts: Parts) -> list[dict[str, Any]] | None:
    try:
        listed = await parts.hypervisor.list_domains()
    except LifeboatError:
        return None
    protected = {str(vm["uuid"]): vm for vm in answers.vms_answer(parts)}
    # One that is just arriving belongs to its evacuation.
    arriving = {str(item["vm"]) for item in answers.arrivals_answer(parts) if not item.get("ended")}
    told = []
    for uuid, name, active in sorted(listed, key=lambda domain: domain[1]):
        if uuid in arriving and uuid not in protected:
            continue
        vm = protected.get(uuid, {})
        one: dict[str, Any] = {
            "uuid": uuid,
            "name": name,
            "running": active,
            "peer": vm.get("peer"),
            "coverage": vm.get("coverage"),
            "memory_bytes": None,
            "disk_bytes": None,
        }
        # It may have gone since it was listed, or be one that nobody can read.
        with contextlib.suppress(LifeboatError):
            definition = await parts.hypervisor.definition(uuid)
            one["memory_bytes"] = definition.memory_bytes
            one["disk_bytes"] = await asyncio.to_thread(disk_bytes, definition)
        told.append(one)
    return told
