# SPDX-License-Identifier: GPL-3.0-or-later
"""Ends backup jobs that a dead or stuck proxy left open, from a process of its own.

While a backup job is open QEMU copies old data into its scratch file before the guest overwrites it, and a
full scratch is an I/O error in the guest. So nothing may leave one open for longer than it said beforehand:
the proxy writes /run/lifeboat/passes/<uuid>.json before it begins one, and this reads it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from pathlib import Path

from precache_proxy.config import Config
from precache_proxy.control import journal
from precache_proxy.errors import LifeboatError, NotFound
from precache_proxy.hypervisor.connection import Hypervisor
from precache_proxy.hypervisor.qemu_user import find_qemu_user
from precache_proxy.source.scratch import PassRecord, ScratchPool, allocated_bytes, boottime_seconds
from precache_proxy.source.tracker import Tracker, VmReference

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
# The proxy itself ends a pass at its deadline; this much later it has had its chance.
_MARGIN_SECONDS = 5.0
# The proxy aborts at 80 % of the limit.
_SCRATCH_SHARE = 0.9


def alive(pid: int) -> bool:
    """Whether a process of that number exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def reason_to_end(record: PassRecord, now_boottime_seconds: float) -> str:
    """Why this backup job must not stay open, "" where it may."""
    if not alive(record.proxy_pid):
        return f"its proxy (process {record.proxy_pid}) is dead"
    late = now_boottime_seconds - record.deadline_boottime_seconds
    if late > _MARGIN_SECONDS:
        return f"it is open for {late:.0f} s longer than it may be"
    used = allocated_bytes([Path(path) for path in record.scratch])
    if used > record.scratch_limit_bytes * _SCRATCH_SHARE:
        return f"its scratch holds {used} of {record.scratch_limit_bytes} bytes"
    return ""


class Watchdog:
    """Looks at the records of open passes for ever."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._passes = config.paths.run / "passes"

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(_LOOK_SECONDS)

    async def look(self) -> None:
        """End what must be ended now; only then is libvirt asked: a healthy host costs a directory list."""
        if not self._passes.is_dir():
            return
        for path in sorted(self._passes.glob("*.json")):
            record = PassRecord.read(path)
            if record is None:
                continue
            reason = reason_to_end(record, boottime_seconds())
            if not reason:
                continue
            try:
                await self._end(path, record, reason)
            except (LifeboatError, TimeoutError, OSError) as error:
                logger.error("backup of VM %s cannot be ended: %s; tried again", record.domain, error)

    async def _end(self, path: Path, record: PassRecord, reason: str) -> None:
        extra = {"vm": record.domain}
        logger.warning("ending the backup job of VM %s: %s", record.domain, reason, extra=extra)
        hypervisor = Hypervisor(self._config.hypervisor.uri)
        await hypervisor.start()
        try:
            tracker = self._tracker(hypervisor)
            # A proxy that was started meanwhile may have begun a pass of its own.
            if PassRecord.read(path) != record:
                return
            with contextlib.suppress(NotFound):
                if await tracker.end_backup(VmReference(record.domain, record.domain)):
                    logger.warning("backup job of VM %s: ended", record.domain, extra=extra)
        finally:
            await hypervisor.stop()
        if PassRecord.read(path) == record:
            self._remove_leftovers(path, record)

    def _tracker(self, hypervisor: Hypervisor) -> Tracker:
        source = self._config.source
        scratch = ScratchPool(
            source.scratch_directory, pass_limit_bytes=source.scratch_limit_bytes, open_pass_limit=1
        )
        user = find_qemu_user(self._config.hypervisor.qemu_user)
        return Tracker(hypervisor, self._config.paths.run, scratch, user)

    def _remove_leftovers(self, path: Path, record: PassRecord) -> None:
        ballast = self._config.source.scratch_directory / f".ballast.{record.domain}"
        for leftover in (*map(Path, record.scratch), ballast, Path(record.socket), path):
            leftover.unlink(missing_ok=True)


async def _until_told(watchdog: Watchdog) -> None:
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(watchdog.run())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


def run(config: Config) -> int:
    """Watch until SIGTERM."""
    journal.set_up("info")
    asyncio.run(_until_told(Watchdog(config)))
    return 0
