# SPDX-License-Identifier: GPL-3.0-or-later
"""Scratch space of pull backups: reserved before a pass opens, watched while it is open.

While a backup job is open QEMU copies old data aside before the guest overwrites it; a full scratch file
system would give the *guest* an I/O error. So the space is taken first, by a ballast file that shrinks as the
scratch files grow, and the job is ended long before its share is used up.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from precache_proxy.errors import NoSpace
from precache_proxy.source.gate import PriorityGate
from precache_proxy.units import MIB, format_bytes

# A pass is asked to end at the first share of its limit, and its job is aborted at the second.
SOFT_SHARE = 0.5
HARD_SHARE = 0.8
# What the reservation leaves free beside the ballast: scratch grows into it between two looks.
HEADROOM_SHARE = 0.5
WATCH_SECONDS = 0.1
# After its time a pass may finish what it has in flight; then the job is aborted.
GRACE_SECONDS = 10.0
# Among those that wait for their turn; all others have 0.
_URGENT = 1


def boottime_seconds() -> float:
    """Seconds since boot, suspended time included: the same in all processes, whatever the clock does."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class PassRecord:
    """An open backup job, for the watchdog: /run/lifeboat/passes/<uuid>.json."""

    domain: str
    socket: str
    scratch: list[str]
    scratch_limit_bytes: int
    deadline_boottime_seconds: float
    proxy_pid: int

    def write(self, path: Path) -> None:
        """Written before the job begins. On tmpfs, so whole by rename and with no sync."""
        path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.new")
        beside.write_text(json.dumps(asdict(self), ensure_ascii=False))
        beside.rename(path)

    @classmethod
    def read(cls, path: Path) -> PassRecord | None:
        """The record, or None where there is none or none that is whole."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None


def allocated_bytes(paths: Sequence[Path]) -> int:
    """What files really take on their file system; a file that is not there takes nothing."""
    total = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


class Lease:
    """One open pass's right to scratch space and time."""

    def __init__(self, name: str, directory: Path, limit_bytes: int, limit_seconds: float) -> None:
        self.name = name
        self.limit_bytes = limit_bytes
        self.limit_seconds = limit_seconds
        self.deadline = boottime_seconds() + limit_seconds
        self.used_bytes = 0
        # Set when the slice shall end: what is in flight may finish.
        self.over = asyncio.Event()
        # The job was aborted under the reader.
        self.aborted = False
        self.reason = ""
        self._directory = directory
        self._ballast = directory / f".ballast.{name}"
        self._paths: list[Path] = []

    def path(self, disk: str) -> Path:
        """Where the scratch file of ``disk`` goes; it may not exist, libvirt creates it."""
        path = self._directory / f"{self.name}.{disk}.scratch"
        path.unlink(missing_ok=True)
        if path not in self._paths:
            self._paths.append(path)
        return path

    @property
    def paths(self) -> list[Path]:
        """The scratch files handed out."""
        return list(self._paths)

    def reserve(self) -> None:
        """Take the space (blocking). Raises NoSpace, with nothing left behind."""
        self._directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        descriptor = os.open(self._ballast, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                os.posix_fallocate(descriptor, 0, self.limit_bytes)
            except OSError as error:
                self._ballast.unlink(missing_ok=True)
                if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
                    raise
                free = os.statvfs(self._directory).f_bavail * os.statvfs(self._directory).f_frsize
                raise NoSpace(
                    f"scratch of VM {self.name}: {format_bytes(self.limit_bytes)} needed, "
                    f"{format_bytes(free)} free on {self._directory}; "
                    "free space there or lower source.scratch_limit_bytes"
                ) from error
            os.ftruncate(descriptor, int(self.limit_bytes * (1 - HEADROOM_SHARE)))
        finally:
            os.close(descriptor)

    def release(self) -> None:
        """Give the space back (blocking); scratch files that libvirt left are removed."""
        self._ballast.unlink(missing_ok=True)
        for path in self._paths:
            path.unlink(missing_ok=True)

    def end(self, reason: str) -> None:
        """Ask the reader to end its slice; what is in flight may finish."""
        if not self.over.is_set():
            self.reason = reason
            self.over.set()

    def look(self) -> str:
        """See what is used and shrink the ballast. Returns why the pass must end now, or ""."""
        self.used_bytes = allocated_bytes(self._paths)
        keep = max(0, int(self.limit_bytes * (1 - HEADROOM_SHARE)) - self.used_bytes)
        with contextlib.suppress(FileNotFoundError):
            if self._ballast.stat().st_size > keep:
                os.truncate(self._ballast, keep)
        if self.used_bytes >= self.limit_bytes * SOFT_SHARE:
            return f"scratch at {format_bytes(self.used_bytes)} of {format_bytes(self.limit_bytes)}"
        status = os.statvfs(self._directory)
        free = status.f_bavail * status.f_frsize
        if free < min(16 * MIB, self.limit_bytes * HEADROOM_SHARE / 2):
            return f"only {format_bytes(free)} free on {self._directory}"
        if boottime_seconds() >= self.deadline:
            return f"open for {self.limit_seconds:.0f} s"
        return ""

    def beyond_hard_limit(self) -> bool:
        """Whether waiting for requests in flight is no longer safe."""
        return (
            self.used_bytes >= self.limit_bytes * HARD_SHARE
            or boottime_seconds() >= self.deadline + GRACE_SECONDS
        )

    async def watch(self, abort: Callable[[], Awaitable[None]]) -> None:
        """Until cancelled: end the slice in time, and abort the job of a reader that does not end."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            reason = self.look()
            if reason:
                self.end(reason)
            if reason and self.beyond_hard_limit():
                self.aborted = True
                await abort()
                return


class ScratchPool:
    """The scratch directory, and how many passes may be open at once."""

    def __init__(self, directory: Path, *, pass_limit_bytes: int, open_pass_limit: int) -> None:
        self.directory = directory
        self.pass_limit_bytes = pass_limit_bytes
        self._gate = PriorityGate(open_pass_limit, self._make_way)
        # oldest first
        self._leases: list[Lease] = []
        self._urgent: set[str] = set()
        self.open_passes = 0

    def clean(self) -> None:
        """Remove ballast that a dead proxy left (blocking); scratch files belong to jobs still open."""
        if self.directory.is_dir():
            for path in self.directory.glob(".ballast.*"):
                path.unlink(missing_ok=True)

    @contextlib.asynccontextmanager
    async def lease(self, name: str, *, limit_seconds: float) -> AsyncIterator[Lease]:
        """Wait for a turn and take the space. Raises NoSpace."""
        async with self._gate.turn(lambda: self._priority(name)):
            lease = Lease(name, self.directory, self.pass_limit_bytes, limit_seconds)
            self._leases.append(lease)
            self._make_way()
            try:
                await asyncio.to_thread(lease.reserve)
                self.open_passes += 1
                try:
                    yield lease
                finally:
                    self.open_passes -= 1
                    await asyncio.shield(asyncio.to_thread(lease.release))
            finally:
                self._leases.remove(lease)

    def hasten(self, name: str) -> None:
        """An evacuation waits for that VM's passes: they go first, and another VM's slice ends for them."""
        self._urgent.add(name)
        self._make_way()

    def ease(self, name: str) -> None:
        """Its passes are like those of any other again."""
        self._urgent.discard(name)

    def _priority(self, name: str) -> int:
        return _URGENT if name in self._urgent else 0

    def _make_way(self) -> None:
        """Slices of the lowest class may stay a whole minute, behind the memory of those that leave."""
        wanted = self._gate.waiting(_URGENT)
        ending = sum(lease.over.is_set() for lease in self._leases)
        for lease in self._leases:
            if ending >= wanted:
                return
            if lease.name not in self._urgent and not lease.over.is_set():
                lease.end("an evacuation waits for its turn")
                ending += 1
