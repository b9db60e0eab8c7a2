# SPDX-License-Identifier: GPL-3.0-or-later
"""What the VMs of this host are doing: memory in use, memory dirtied a second, and what the host has free.

libvirt's dirty-rate calculation samples pages while the guest runs; it costs the guest next to nothing and
takes as long as it is told to look. Meanwhile a sample of its memory is packed, for what that will be on the
wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from typing import Any

import libvirt

from precache_proxy.control.memory_sample import PIECES_PER_SECOND, sample_memories
from precache_proxy.units import KIB, MIB

_MEASURED = 2
# libvirt tells whole MiB a second, rounded down: what is cut off is half of one in the mean.
_ROUNDED_OFF = 0.5
_SAMPLED_SHARE = 0.8
_PATIENCE_SECONDS = 5.0
_POLL_SECONDS = 0.2


async def measure_workload(hypervisor: Any, vms: Mapping[str, str], seconds: int) -> dict[str, Any]:
    """Of each VM (UUID to name) that is known here; figures that libvirt does not give are None."""
    connection = hypervisor.connection

    def begin() -> dict[str, int]:
        started = {}
        for uuid in vms:
            with contextlib.suppress(libvirt.libvirtError):
                domain = connection.lookupByUUIDString(uuid)
                if domain.isActive():
                    domain.startDirtyRateCalc(seconds, 0)
                    started[uuid] = int(domain.info()[1]) * KIB
        return started

    started = await hypervisor.call(begin, subject="dirty rates", timeout_seconds=30)
    began, packed = asyncio.get_running_loop().time(), {}
    if started:
        packed = await hypervisor.call(
            lambda: sample_memories(
                connection, started, seconds * _SAMPLED_SHARE, PIECES_PER_SECOND * seconds
            ),
            subject="memory samples",
            timeout_seconds=30,
        )
        await asyncio.sleep(max(0.0, began + seconds - asyncio.get_running_loop().time()))
    until = asyncio.get_running_loop().time() + _PATIENCE_SECONDS
    while True:
        told = await hypervisor.call(
            lambda: [_of_vm(connection, uuid, name) for uuid, name in vms.items()],
            subject="workload",
            timeout_seconds=30,
        )
        late = [vm for vm in told if vm["uuid"] in started and vm["dirty_bytes_per_second"] is None]
        if not late or asyncio.get_running_loop().time() > until:
            break
        await asyncio.sleep(_POLL_SECONDS)
    for vm in told:
        used, wire = vm["memory_used_bytes"], packed.get(vm["uuid"])
        vm["packed_ratio"] = wire / used if used and wire is not None else None
    memory = await hypervisor.call(lambda: _host_memory(connection), subject="host", timeout_seconds=30)
    return {"vms": told, "processors": os.cpu_count(), **memory}


def _of_vm(connection: Any, uuid: str, name: str) -> dict[str, Any]:
    told: dict[str, Any] = {
        "uuid": uuid,
        "name": name,
        "running": False,
        "memory_bytes": None,
        "memory_used_bytes": None,
        "dirty_bytes_per_second": None,
    }
    with contextlib.suppress(libvirt.libvirtError):
        domain = connection.lookupByUUIDString(uuid)
        told["memory_bytes"] = domain.info()[1] * KIB
        told["running"] = bool(domain.isActive())
        if told["running"]:
            flags = libvirt.VIR_DOMAIN_STATS_BALLOON | libvirt.VIR_DOMAIN_STATS_DIRTYRATE
            figures = connection.domainListGetStats([domain], flags)[0][1]
            used = figures.get("balloon.rss")
            # Pages that QEMU never touched are zero and cross as such; it has its own beside the guest's.
            told["memory_used_bytes"] = (
                None if used is None else min(int(used) * KIB, int(told["memory_bytes"]))
            )
            if figures.get("dirtyrate.calc_status") == _MEASURED:
                whole = int(figures["dirtyrate.megabytes_per_second"])
                told["dirty_bytes_per_second"] = round((whole + _ROUNDED_OFF) * MIB)
    return told


def _host_memory(connection: Any) -> dict[str, int | None]:
    with contextlib.suppress(libvirt.libvirtError):
        figures = connection.getMemoryStats(libvirt.VIR_NODE_MEMORY_STATS_ALL_CELLS, 0)
        free = sum(int(figures.get(key, 0)) for key in ("free", "buffers", "cached"))
        return {"memory_total_bytes": int(figures["total"]) * KIB, "memory_free_bytes": free * KIB}
    return {"memory_total_bytes": None, "memory_free_bytes": None}
