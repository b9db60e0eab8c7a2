# SPDX-License-Identifier: GPL-3.0-or-later
"""Autostart of protected VMs is ours: a host that comes back must not start what runs elsewhere by now."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from precache_proxy import durable
from precache_proxy.errors import HypervisorError, IntegrityError, LifeboatError, NotFound
from precache_proxy.hypervisor.connection import Hypervisor
from precache_proxy.source.environment import Environment
from precache_proxy.source.record import ProtectionRecord

logger = logging.getLogger(__name__)

_ASK_AGAIN_SECONDS = 10.0
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


async def start_after_boot(environment: Environment, records: Sequence[ProtectionRecord]) -> None:
    """Once after a boot of the host: start protected VMs that had autostart, where nothing speaks against it.

    The guard must have no tombstone (what else forbids a start is waited for), and the peer must say that it
    holds no newer epoch; a peer that does not answer is waited for. A VM that somebody stops later stays
    stopped: the mark goes with the next boot only.
    """
    mark = environment.run_directory / "autostart.done"
    if mark.exists():
        return
    mark.touch()
    await asyncio.gather(
        *(_start(environment, record) for record in records if record.autostart), return_exceptions=False
    )


def _forbidden(guard: Path) -> str:
    """What forbids a start (blocking): nothing (""), a hand-off that is not over, or :data:`_FOR_GOOD`."""
    try:
        told = durable.read_json(guard)
        return "" if told is None else str(told["cause"])
    except (OSError, IntegrityError, KeyError, TypeError) as error:
        return f"{guard} cannot be read ({error})"


async def _start(environment: Environment, record: ProtectionRecord) -> None:
    subject = f"VM {record.name}"
    guard = environment.directory.parent / "guard" / f"{record.uuid}.json"
    link = environment.link(record.peer)
    said = ""
    while True:
        forbidden = await asyncio.to_thread(_forbidden, guard)
        if forbidden == _FOR_GOOD:
            logger.warning("%s: not started after boot: a tombstone says that it may not run here", subject)
            return
        if forbidden:
            # A hand-off is under way, or its end is not known yet: what comes of it decides.
            if forbidden != said:
                logger.warning("%s: its start after boot waits: %s", subject, forbidden)
            said = forbidden
            await asyncio.sleep(_ASK_AGAIN_SECONDS)
            continue
        await link.wait_up(None)
        try:
            status = await link.call("store.status", {"vm": record.uuid})
            if status.get("exists") and int(status["epoch"]) > record.epoch:
                logger.warning("%s: not started after boot: its home has moved to %s", subject, record.peer)
                return
            if status.get("state") == "frozen":
                # A hand-off was under way when this host went down: who runs the VM is decided by that.
                await asyncio.sleep(_ASK_AGAIN_SECONDS)
                continue
            domain = await environment.hypervisor.lookup(record.uuid)
            if not await environment.hypervisor.is_active(domain, subject=subject):
                # looked at again: the answer took its time, and the hook judges once more
                if guard.exists():
                    continue
                await environment.hypervisor.call(domain.create, subject=subject)
                logger.info("%s: started after boot, as its autostart says", subject)
            return
        except NotFound as error:
            logger.warning("%s: not started after boot: %s", subject, error)
            return
        except LifeboatError as error:
            logger.warning("%s: start after boot waits: %s", subject, error)
            await asyncio.sleep(_ASK_AGAIN_SECONDS)
