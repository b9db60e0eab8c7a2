# SPDX-License-Identifier: GPL-3.0-or-later
"""One call at a time on the checkpoints, backups and layers of one VM.

libvirtd 11.3 was seen to crash when a checkpoint was deleted while a backup of the same VM began. The rooms
of a proxy take turns by a lock in memory; the watchdog, a process of its own, by a lock on a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import TypeVar

from precache_proxy.errors import HypervisorError

T = TypeVar("T")

# the directory of the locks, below the run directory
TURNS = "turns"
POLL_SECONDS = 0.05


@contextlib.contextmanager
def file_turn(path: Path | None, *, patience_seconds: float | None = None) -> Iterator[bool]:
    """Hold the lock on ``path`` (blocking); False when it was not given within ``patience_seconds``.

    The file stays: removing a file that others lock would let two of them in.
    """
    if path is None:
        yield True
        return
    path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        yield _lock(descriptor, patience_seconds)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, patience_seconds: float | None) -> bool:
    if patience_seconds is None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return True
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
        else:
            return True


def turn_path(directory: Path, uuid: str) -> Path:
    """The file that is locked for a VM's turn."""
    return directory / f"{uuid}.lock"


class Turns:
    """Per VM one call after the other. A turn ends when its call does, also when nobody waits for that."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def run(
        self,
        executor: Executor,
        uuid: str,
        work: Callable[[], T],
        *,
        subject: str,
        timeout_seconds: float | None,
    ) -> T:
        """Run ``work`` in a thread in the VM's turn.

        Raises HypervisorError where the turn does not come, TimeoutError where the call takes too long.
        """
        lock = self._locks.get(uuid)
        if lock is None:
            lock = self._locks[uuid] = asyncio.Lock()
        try:
            async with asyncio.timeout(timeout_seconds):
                await lock.acquire()
        except TimeoutError as error:
            raise HypervisorError(
                f"{subject}: libvirt has not answered an earlier call on its checkpoints or layers within "
                f"{timeout_seconds} s; see `virsh domjobinfo` and `systemctl status libvirtd`"
            ) from error
        path = None if self._directory is None else turn_path(self._directory, uuid)

        def in_turn() -> T:
            with file_turn(path):
                return work()

        try:
            future = executor.submit(in_turn)
        except BaseException:
            lock.release()
            raise
        loop = asyncio.get_running_loop()

        def over(_future: Future[T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop ended first: nobody waits for turns any more
                loop.call_soon_threadsafe(lock.release)

        future.add_done_callback(over)
        async with asyncio.timeout(timeout_seconds):
            return await asyncio.wrap_future(future)
