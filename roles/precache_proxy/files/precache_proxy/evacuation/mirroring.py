# SPDX-License-Identifier: GPL-3.0-or-later
"""A guest that writes again before its last write has crossed: its mirror must not run after it for ever.

QEMU's mirror of the overlay is *ready* at the first instant at which no block is left to send; only then
does libvirt begin with the memory. In the background a guest that writes more often than once in a round
trip never gives it such an instant, however little it writes. With synchronous writes ("write-blocking")
each write waits for its way over the WAN, and there is one. Chosen at the start where it can be foreseen,
else when the mirror is seen not to get on.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import libvirt
import libvirt_qemu

from precache_proxy.errors import HypervisorError, NotFound
from precache_proxy.evacuation.domains import Domains

logger = logging.getLogger(__name__)

_CHANGEABLE_FROM: Final = 8_002_000
_PATIENCE_SECONDS: Final = 1.0
_PATIENCE_ROUND_TRIPS: Final = 6


@dataclass(frozen=True)
class GuestWrites:
    """How much a guest has written since its QEMU began, by QEMU's count; ``at``: asked when, monotonic."""

    requests: int
    bytes: int
    at: float

    def since(self, earlier: GuestWrites) -> WriteRate:
        """What it wrote a second between then and now."""
        seconds = max(self.at - earlier.at, 1e-3)
        return WriteRate(
            max(0, self.requests - earlier.requests) / seconds, max(0, self.bytes - earlier.bytes) / seconds
        )


@dataclass(frozen=True)
class WriteRate:
    """How often a guest writes, and how much, a second."""

    requests_per_second: float
    bytes_per_second: float


async def guest_writes(domains: Domains, vm: str) -> GuestWrites | None:
    """What the guest has written to all its disks so far; None where libvirt does not say."""

    def work(domain: Any) -> GuestWrites:
        # libvirt takes no disk for all of them together.
        _reads, _read_bytes, requests, written_bytes, _errors = domain.blockStats("")
        return GuestWrites(int(requests), int(written_bytes), time.monotonic())

    try:
        return await domains.run(vm, work)
    except (HypervisorError, NotFound) as error:
        logger.warning("VM %s: what its guest has written is not told: %s", vm, error)
        return None


def needs_synchronous_writes(
    written: WriteRate | None,
    channel_bytes_per_second: float | None,
    round_trip_seconds: float | None,
    *,
    changeable: bool = True,
) -> bool:
    """Whether a mirror in the background would run after the guest for ever.

    It does where the guest writes more than half of what can be sent, or once within two round trips.
    What is not known (None) speaks for the background. ``changeable``: a wrong guess can be mended under way
    (:func:`write_synchronously`); where not, any write at all is one too many.
    """
    if not changeable:
        return written is None or written.requests_per_second > 0
    if written is None:
        return False
    if channel_bytes_per_second and written.bytes_per_second > channel_bytes_per_second / 2:
        return True
    return written.requests_per_second * 2 * (round_trip_seconds or 0.0) >= 1


class MirrorWatch:
    """Watches a mirror in the background until the memory begins."""

    def __init__(self, round_trip_seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience = max(_PATIENCE_SECONDS, _PATIENCE_ROUND_TRIPS * (round_trip_seconds or 0.0))
        self._clock = clock
        self._least: int | None = None
        self._since = 0.0
        self._over = False

    def observe(self, progress: Mapping[str, Any]) -> bool:
        """Take in libvirt's figures (``disk_total_bytes``, ``disk_remaining_bytes``, ``memory_total_bytes``).

        True when there has been no less to send than before for some round trips, until :meth:`mended`.
        """
        if self._over or progress.get("memory_total_bytes"):
            self._over = True
            return False
        if not progress.get("disk_total_bytes"):
            return False
        remaining, now = int(progress.get("disk_remaining_bytes") or 0), self._clock()
        if self._least is None or remaining < self._least or not remaining:
            self._least, self._since = remaining, now
            return False
        if now - self._since < self._patience:
            return False
        # Where it cannot be changed now, it is tried again after as long a time.
        self._since = now
        return True

    def mended(self) -> None:
        """Its writes wait now: there is nothing more to watch."""
        self._over = True


def changeable(emulator_version: int | None) -> bool:
    """Whether QEMU of this version (8.2.0 is 8002000; None unknown) knows ``block-job-change``."""
    return emulator_version is None or emulator_version >= _CHANGEABLE_FROM


async def emulator_version(domains: Domains, vm: str, *, decides: bool = True) -> int | None:
    """The version of the QEMU that the VM runs in, as 8002000; None where it does not say.

    libvirt tells that of the host's default binary only: a VM may have an emulator of its own, or run since
    before an upgrade. The VM's own is asked only where that ``decides`` something, for libvirt taints a
    domain whose monitor was asked ("custom-monitor"); else the default's is a guess that costs little.
    """

    def work(domain: Any) -> int:
        if not decides:
            return int(domain.connect().getVersion())
        told = _monitor(domain, "query-version")["qemu"]
        return int(told["major"]) * 1_000_000 + int(told["minor"]) * 1_000 + int(told["micro"])

    try:
        return await domains.run(vm, work)
    except (HypervisorError, NotFound) as error:
        logger.warning("VM %s: its QEMU does not tell its version: %s", vm, error)
        return None


def _monitor(domain: Any, command: str, **arguments: Any) -> Any:
    """What QEMU answers to a command (blocking). Raises libvirtError."""
    text = json.dumps({"execute": command, "arguments": arguments} if arguments else {"execute": command})
    answer = json.loads(libvirt_qemu.qemuMonitorCommand(domain, text, 0))
    if "error" in answer:
        raise libvirt.libvirtError(f"{command}: {answer['error'].get('desc')}")
    return answer["return"]


async def write_synchronously(domains: Domains, vm: str) -> None:
    """Have the VM's mirrors under way wait with each write of the guest (QEMU 8.2 and newer; libvirt has no
    call of its own for it, and notes "custom-monitor" in its log). Raises HypervisorError."""

    def work(domain: Any) -> None:
        for job in _monitor(domain, "query-block-jobs"):
            if job["type"] == "mirror" and not job.get("actively-synced"):
                way = {"copy-mode": "write-blocking"}
                _monitor(domain, "block-job-change", id=job["device"], type="mirror", **way)

    await domains.run(vm, work)
