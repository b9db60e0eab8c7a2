# SPDX-License-Identifier: GPL-3.0-or-later
"""Keeps libvirt's one worker for events from standing still for the sake of a backup of ours.

A port of a guest's virtio serial bus that opens or closes (its agent, mostly) is an event that libvirt deals
with under a job of its own kind (VIR_JOB_MODIFY_MIGRATION_SAFE), which it lets into a migration but not into
a backup. Its worker, one for all VMs of a host, waits 30 s then (QEMU_JOB_WAIT_TIME), for a backup whose end
only that worker could see, and forgets the event: the agent counts as not connected from then on. Meanwhile
no backup of any VM ends. Seen with libvirt 11.3 ("Cannot start job (modify migration safe, none, none) in API
qemu-event ..., current job is (none, none, backup)"), in a move 22 s after other VMs had booted: it took 37 s
more.

So nothing is begun on a VM that has just booted until its ports are open, and nothing on any VM while the
worker is seen to stand still. A pass asks before it queues and again where its backup begins: the VM may have
been started in between, and libvirt's word of that may still be on its way.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final

import libvirt
from lxml import etree

from precache_proxy.errors import GuestBoots

if TYPE_CHECKING:
    from precache_proxy.hypervisor.handles import DomainHandle
    from precache_proxy.source.tracker import Tracker, VmReference

# A guest without an agent never opens its port: waited for as long as libvirt would stand still at worst.
BOOT_SECONDS: Final = 30.0
# An end of a backup takes some ms; one that takes longer than this waits for the worker.
STUCK_SECONDS: Final = 2.0
_LOOK_AGAIN_SECONDS = 1.0


class EventWorker:
    """What is known of it: who has booted of late, and which ends of backups are overdue."""

    def __init__(self) -> None:
        self._booted_at: dict[str, float] = {}
        # libvirt's number of each VM when its last backup began; a start makes a new one
        self._numbers: dict[str, int] = {}
        self._overdue = 0

    def booted(self, uuid: str) -> None:
        """A VM began to boot just now: its guest opens its ports in a while."""
        now = time.monotonic()
        recent = {vm: at for vm, at in self._booted_at.items() if now - at < BOOT_SECONDS}
        self._booted_at = {**recent, uuid: now}

    @property
    def stands_still(self) -> bool:
        """Whether a backup was asked to end and that is not seen."""
        return self._overdue > 0

    @contextlib.asynccontextmanager
    async def ending(self) -> AsyncIterator[None]:
        """While a backup is waited for that was asked to end."""
        told = False

        def overdue() -> None:
            nonlocal told
            told = True
            self._overdue += 1

        timer = asyncio.get_running_loop().call_later(STUCK_SECONDS, overdue)
        try:
            yield
        finally:
            timer.cancel()
            self._overdue -= told

    async def wait_seconds(self, tracker: Tracker, vm: VmReference) -> float:
        """In how many seconds to ask again whether a backup may begin; 0: it may. Raises HypervisorError."""
        if self.stands_still:
            return _LOOK_AGAIN_SECONDS
        left = self._boot_seconds_left(vm)
        if left > 0 and await tracker.on_domain(vm, _opens_ports):
            return min(left, _LOOK_AGAIN_SECONDS)
        return 0.0

    def check(self, vm: VmReference, domain: DomainHandle) -> None:
        """Where a backup is about to begin (blocking). Raises GuestBoots: then it must not."""
        number = domain.ID()
        if self._numbers.setdefault(vm.uuid, number) != number:
            self._numbers[vm.uuid] = number
            self.booted(vm.uuid)
        left = self._boot_seconds_left(vm)
        if left > 0 and _opens_ports(domain):
            raise GuestBoots(f"{vm}: its guest boots and opens its ports; ask again in at most {left:.0f} s")

    def _boot_seconds_left(self, vm: VmReference) -> float:
        booted_at = self._booted_at.get(vm.uuid)
        return 0.0 if booted_at is None else booted_at + BOOT_SECONDS - time.monotonic()


def _opens_ports(domain: DomainHandle) -> bool:
    """Whether a running guest has a port that it has not opened (blocking)."""
    if domain.state()[0] != libvirt.VIR_DOMAIN_RUNNING:
        return False
    root = etree.fromstring(domain.XMLDesc(0).encode())
    return any(
        target.get("type") == "virtio" and target.get("state") == "disconnected"
        for target in root.iterfind("./devices/channel/target")
    )
