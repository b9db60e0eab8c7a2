# SPDX-License-Identifier: GPL-3.0-or-later
"""Autostart of protected VMs is ours: a host that comes back must not start what runs elsewhere by now."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from precache_proxy import durable
from precache_proxy.errors import HypervisorError, IntegrityError, LifeboatError, NotFound
from precache_proxy.hypervisor.connection import Hypervisor
from precache_proxy.source.record import ProtectionRecord

if TYPE_CHECKING:
    from precache_proxy.source.environment import Environment

logger = logging.getLogger(__name__)

_ASK_AGAIN_SECONDS = 10.0
# What the release of before left beside ours once it had started whom it had to.
_FORMER = "autostart.done"
# The cause in a guard file that only a new arrival of the VM takes away.
_FOR_GOOD = "moved-away"


async def take_over(
    hypervisor: Hypervisor, record: ProtectionRecord, save: Callable[[], Awaitable[None]]
) -> None:
    """Record libvirt's autostart, durably by ``save``, and only then clear it."""
    domain = await hypervisor.lookup(record.uuid)
    subject = f"VM {record.name}"
    with contextlib.suppress(HypervisorError):  # a transient VM has none
        if await hypervisor.call(domain.autostart, subject=subject):
            record.autostart = True
            await save()
            await hypervisor.call(domain.setAutostart, 0, subject=subject)


async def give_back(hypervisor: Hypervisor, record: ProtectionRecord) -> None:
    """Set libvirt's autostart again where the VM had it."""
    if not record.autostart:
        return
    try:
        domain = await hypervisor.lookup(record.uuid)
        await hypervisor.call(domain.setAutostart, 1, subject=f"VM {record.name}")
    except LifeboatError as error:
        logger.warning("VM %s: its autostart could not be set again: %s", record.name, error)


class AfterBoot:
    """Which protected VMs are still to be started since this host booted. ``waits``: VM -> why it waits.

    Who that is is settled when the proxy first starts after the boot, and kept in ``path``, which a boot
    clears: so a restart of the proxy forgets none, and starts none that somebody has stopped since.
    """

    def __init__(self, path: Path) -> None:
        self.waits: dict[str, str] = {}
        self._path = path
        # Many are decided at the same time, each in a thread: what was written last must be what holds.
        self._writing = threading.Lock()

    def begin(self, records: Sequence[ProtectionRecord]) -> None:
        """Find out who is to be started (blocking)."""
        known = {record.uuid for record in records if record.autostart}
        try:
            told = durable.read_json(self._path)
            waiting = known if told is None else known & set(told["waiting"])
            if told is None and self._path.with_name(_FORMER).exists():
                # Another release had started them after this boot: what is off since then is so on purpose.
                waiting = set()
        except (IntegrityError, KeyError, TypeError) as error:
            logger.error("no VM is started after boot: %s: %s", self._path, error)
            waiting = set()
        self.waits = dict.fromkeys(waiting, "")
        self._write()

    def decided(self, vm: str) -> None:
        """It was started, or is not to be, or is not protected any more (blocking)."""
        with self._writing:
            if self.waits.pop(vm, None) is not None:
                self._write()

    def _write(self) -> None:
        try:
            durable.write_json(self._path, {"waiting": sorted(self.waits)})
        except OSError as error:
            logger.error("%s: %s; a restart of the proxy may start VMs again", self._path, error)


async def start_after_boot(environment: Environment, records: Sequence[ProtectionRecord]) -> None:
    """Once after a boot of the host: start protected VMs that had autostart, where nothing speaks against it.

    The guard must have no tombstone (what else forbids a start is waited for), and the peer must say that it
    holds no newer epoch; a peer that does not answer is waited for. A VM that somebody stops later stays
    stopped.
    """
    after_boot = environment.after_boot
    await asyncio.to_thread(after_boot.begin, records)
    waiting = [record for record in records if record.uuid in after_boot.waits]
    await asyncio.gather(*(_start(environment, record) for record in waiting))


def _forbidden(guard: Path) -> str:
    """What forbids a start (blocking): nothing (""), a hand-off that is not over, or :data:`_FOR_GOOD`."""
    try:
        told = durable.read_json(guard)
        return "" if told is None else str(told["cause"])
    except (OSError, IntegrityError, KeyError, TypeError) as error:
        return f"{guard} cannot be read ({error})"


async def _start(environment: Environment, record: ProtectionRecord) -> None:
    """Ask until it is decided, or the VM is not protected any more."""
    after_boot = environment.after_boot
    while record.uuid in after_boot.waits:
        began_at = time.monotonic()
        try:
            why = await _try_to_start(environment, record)
        except NotFound as error:
            logger.warning("VM %s: not started after boot: %s", record.name, error)
            why = ""
        except LifeboatError as error:
            why = f"{error}; asked again"
        if not why:
            await asyncio.to_thread(after_boot.decided, record.uuid)
            return
        if record.uuid in after_boot.waits and why != after_boot.waits[record.uuid]:
            logger.warning("VM %s: its start after boot waits: %s", record.name, why)
            after_boot.waits[record.uuid] = why
        # A link that was waited for in vain has taken that time already.
        await asyncio.sleep(max(0.0, began_at + _ASK_AGAIN_SECONDS - time.monotonic()))


async def _try_to_start(environment: Environment, record: ProtectionRecord) -> str:
    """Start it, or find that it is not to be started (""); else why that is not known yet."""
    subject = f"VM {record.name}"
    guard = environment.directory.parent / "guard" / f"{record.uuid}.json"
    forbidden = await asyncio.to_thread(_forbidden, guard)
    if forbidden == _FOR_GOOD:
        logger.warning("%s: not started after boot: a tombstone says that it may not run here", subject)
        return ""
    if forbidden:
        # What comes of it decides.
        return f"a hand-off that is not over, or whose end is not known yet, forbids it ({forbidden})"
    domain = await environment.hypervisor.lookup(record.uuid)
    if await environment.hypervisor.is_active(domain, subject=subject):
        return ""
    try:
        link = environment.link(record.peer)
        await link.wait_up(_ASK_AGAIN_SECONDS)
        status = await link.call("store.status", {"vm": record.uuid})
    except LifeboatError:
        return (
            f"waits for {record.peer} to say that it does not run there; where you know that, "
            f"`virsh start {record.name}`"
        )
    if status.get("exists") and int(status["epoch"]) > record.epoch:
        logger.warning("%s: not started after boot: its home has moved to %s", subject, record.peer)
        return ""
    if status.get("state") == "frozen":
        # A hand-off was under way when this host went down: who runs the VM is decided by that.
        return f"{record.peer} holds its replica for an arrival; what comes of that decides"
    # looked at again: the answer took its time, and the hook judges once more
    if guard.exists():
        return "a hand-off has begun meanwhile"
    await environment.hypervisor.call(domain.create, subject=subject)
    logger.info("%s: started after boot, as its autostart says", subject)
    return ""
