# SPDX-License-Identifier: GPL-3.0-or-later
"""libvirt's peer-to-peer migration over the job's sockets: the destination arrives paused, the source stays
defined."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt

from precache_proxy.errors import HypervisorError, NotFound
from precache_proxy.evacuation.convergence import Convergence
from precache_proxy.evacuation.domains import Domains
from precache_proxy.evacuation.job import EvacuationOptions
from precache_proxy.evacuation.mirroring import MirrorWatch, write_synchronously
from precache_proxy.units import MIB

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 0.5
# Figures of libvirt's job statistics that tell people and the coordinator something (bytes unless named
# otherwise).
_SHOWN = (
    "memory_total", "memory_processed", "memory_remaining", "memory_bps", "memory_dirty_rate",
    "memory_page_size", "memory_iteration", "memory_normal_bytes", "memory_constant", "disk_total",
    "disk_processed", "disk_remaining", "disk_bps", "downtime", "setup_time", "time_elapsed",
)  # fmt: skip
FLAGS = (
    libvirt.VIR_MIGRATE_LIVE
    | libvirt.VIR_MIGRATE_PEER2PEER
    | libvirt.VIR_MIGRATE_PERSIST_DEST
    | libvirt.VIR_MIGRATE_NON_SHARED_INC
    | libvirt.VIR_MIGRATE_ABORT_ON_ERROR
    # Paused there and still defined here: if libvirt's last reply is lost, *we* decide who runs the VM.
    | libvirt.VIR_MIGRATE_PAUSED
)
_BANDWIDTH_FOR_SWITCH_OVER = getattr(libvirt, "VIR_MIGRATE_PARAM_BANDWIDTH_AVAIL_SWITCHOVER", None)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that libvirt is told. Rates in bytes per second, None: unknown or unlimited."""

    sockets: Path
    disks: tuple[str, ...]
    destination_xml: str
    persistent_xml: str
    options: EvacuationOptions
    channel_bytes_per_second: float | None
    round_trip_seconds: float | None
    synchronous_writes: bool

    @property
    def flags(self) -> int:
        """The flags of the migration call."""
        return int(
            FLAGS | (libvirt.VIR_MIGRATE_NON_SHARED_SYNCHRONOUS_WRITES if self.synchronous_writes else 0)
        )

    @property
    def libvirt_uri(self) -> str:
        """The destination's libvirt as the source's libvirt connects to it."""
        return f"qemu+unix:///system?socket={self.sockets / 'libvirt.sock'}"

    def parameters(self) -> dict[str, Any]:
        """The typed parameters of the migration call."""
        parameters: dict[str, Any] = {
            libvirt.VIR_MIGRATE_PARAM_URI: f"unix://{self.sockets / 'ram.sock'}",
            libvirt.VIR_MIGRATE_PARAM_DISKS_URI: f"unix://{self.sockets / 'disk.sock'}",
            libvirt.VIR_MIGRATE_PARAM_DEST_XML: self.destination_xml,
            libvirt.VIR_MIGRATE_PARAM_PERSIST_XML: self.persistent_xml,
            libvirt.VIR_MIGRATE_PARAM_MIGRATE_DISKS: list(self.disks),
        }
        limit = self.options.bandwidth_bytes_per_second
        if limit is not None:
            parameters[libvirt.VIR_MIGRATE_PARAM_BANDWIDTH] = mebibytes(limit)
        if _BANDWIDTH_FOR_SWITCH_OVER and self.channel_bytes_per_second:
            # Without it QEMU judges by what it happened to see, and stops the guest too early or too late.
            parameters[_BANDWIDTH_FOR_SWITCH_OVER] = mebibytes(self.channel_bytes_per_second)
        return parameters


def mebibytes(bytes_per_second: float) -> int:
    """A rate in libvirt's MiB/s, at least 1 (0 would mean no limit)."""
    return max(1, round(bytes_per_second / MIB))


async def migrate(
    domains: Domains,
    vm: str,
    plan: Plan,
    on_progress: Callable[[dict[str, Any]], None],
    on_synchronous: Callable[[], bool],
    looking: asyncio.Lock,
) -> None:
    """Run the migration to its end. Raises HypervisorError: then *who runs the VM is not said*, ask both
    sides.

    ``on_synchronous`` is asked before a mirror in the background is told to wait with the guest's writes; on
    False it is left as it is.
    ``looking`` is held while QEMU is asked how far it is: whoever has it keeps it from being asked.
    """

    def work(domain: Any) -> None:
        with contextlib.suppress(libvirt.libvirtError):
            # Persists in QEMU's parameters until the job; refused where the driver wants a running job for
            # it.
            domain.migrateSetMaxDowntime(max(1, round(plan.options.downtime_limit_seconds * 1000)), 0)
        domain.migrateToURI3(plan.libvirt_uri, plan.parameters(), plan.flags)

    convergence = Convergence(plan.options.downtime_limit_seconds, plan.options.downtime_limit_most_seconds)
    left_to_us = plan.options.synchronous_writes is None and not plan.synchronous_writes
    mirror = MirrorWatch(plan.round_trip_seconds) if left_to_us else None
    watch = asyncio.create_task(
        _watch(domains, vm, on_progress, convergence, mirror, on_synchronous, looking)
    )
    try:
        await domains.run(vm, work, timeout_seconds=None)
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)


async def _watch(
    domains: Domains,
    vm: str,
    on_progress: Callable[[dict[str, Any]], None],
    convergence: Convergence,
    mirror: MirrorWatch | None,
    on_synchronous: Callable[[], bool],
    looking: asyncio.Lock,
) -> None:
    while True:
        await asyncio.sleep(PROGRESS_SECONDS)
        async with looking:
            with contextlib.suppress(HypervisorError, NotFound):
                progress = await statistics(domains, vm)
                raised = convergence.observe(progress)
                if raised is not None:
                    logger.warning(
                        "VM %s dirties memory as fast as it is sent; may stop for %.1f s", vm, raised
                    )
                    await allow_downtime(domains, vm, raised)
                if mirror is not None and mirror.observe(progress) and on_synchronous():
                    await _mend_mirror(domains, vm, mirror)
                limit, hopeless = convergence.limit, convergence.hopeless
                on_progress({**progress, "downtime_limit_seconds": limit, "hopeless": hopeless})


async def statistics(domains: Domains, vm: str, *, timeout_seconds: float | None = 60.0) -> dict[str, Any]:
    """What libvirt says of the migration under way. Raises HypervisorError, NotFound."""

    def work(domain: Any) -> dict[str, Any]:
        return shown(dict(domain.jobStats()))

    return await domains.run(vm, work, timeout_seconds=timeout_seconds)


async def _mend_mirror(domains: Domains, vm: str, mirror: MirrorWatch) -> None:
    logger.warning("VM %s writes again before what it wrote has crossed; its writes wait for the WAN now", vm)
    try:
        await write_synchronously(domains, vm)
        mirror.mended()
    except HypervisorError as error:
        logger.error(
            "VM %s: its mirror cannot be changed under way (%s) and may never end; pause it, or cancel and "
            "evacuate it with synchronous_writes",
            vm,
            error,
        )


async def allow_downtime(domains: Domains, vm: str, seconds: float) -> None:
    """Let QEMU stop the guest once what is left takes no longer than this. Raises HypervisorError."""
    await domains.run(vm, lambda domain: domain.migrateSetMaxDowntime(max(1, round(seconds * 1000)), 0))


def shown(statistics: dict[str, Any]) -> dict[str, Any]:
    """The figures of a migration job that we report, with units in their names."""
    renamed = {
        "memory_bps": "memory_bytes_per_second",
        "disk_bps": "disk_bytes_per_second",
        "memory_dirty_rate": "memory_dirty_pages_per_second",
        "downtime": "downtime_milliseconds",
        "setup_time": "setup_milliseconds",
        "time_elapsed": "elapsed_milliseconds",
    }
    result: dict[str, Any] = {}
    for key in _SHOWN:
        if key in statistics:
            name = renamed.get(key, key)
            if key in {"memory_total", "memory_processed", "memory_remaining"} or key.startswith("disk_"):
                name = name if name.endswith("_second") else f"{name}_bytes"
            result[name] = statistics[key]
    return result


async def completed_statistics(domains: Domains, vm: str) -> dict[str, Any]:
    """What libvirt kept of the migration that has just ended; {} where it kept nothing."""

    def work(domain: Any) -> dict[str, Any]:
        flags = libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED | libvirt.VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED
        return shown(dict(domain.jobStats(flags)))

    with contextlib.suppress(HypervisorError, NotFound):
        return await domains.run(vm, work)
    return {}


async def abort(domains: Domains, vm: str) -> None:
    """End a migration under way; none under way is no error."""
    with contextlib.suppress(HypervisorError, NotFound):
        await domains.run(vm, lambda domain: domain.abortJob())


async def steer(domains: Domains, vm: str, bytes_per_second: float) -> None:
    """Change the bandwidth of a migration under way. Raises HypervisorError."""
    await domains.run(vm, lambda domain: domain.migrateSetMaxSpeed(mebibytes(bytes_per_second), 0))
