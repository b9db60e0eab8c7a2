# SPDX-License-Identifier: GPL-3.0-or-later
"""Older generations are merged into their bases in the background, one replica at a time."""

from __future__ import annotations

import asyncio
import logging

from precache_proxy.errors import LifeboatError
from precache_proxy.store import commit
from precache_proxy.store.replica import Replica

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 300.0


class Merging:
    """A task for each replica that has something to merge."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._slot = asyncio.Semaphore(1)
        self._stopping = False

    def begin(self, replica: Replica) -> None:
        """Merge what is due, unless that is under way."""
        running = self._tasks.get(replica.record.vm)
        if not self._stopping and (running is None or running.done()):
            self._tasks[replica.record.vm] = asyncio.create_task(self._merge(replica))

    async def end(self, vm: str) -> None:
        """Stop merging a VM's replica, where it stands: what is done of a merge stays done."""
        task = self._tasks.pop(vm, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def stop(self) -> None:
        """End all merges for good."""
        self._stopping = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _merge(self, replica: Replica) -> None:
        while True:
            try:
                while (merge := commit.due(replica)) is not None:
                    done = False
                    while not done:
                        async with self._slot:  # one at a time: passes need the storage more
                            done = await commit.step(replica, merge)
                await commit.trim(replica)
                replica.commit_failure = None
                return
            except (LifeboatError, OSError) as error:
                if (
                    replica.record.frozen_epoch is not None
                    or replica.record.removing
                    or replica.record.detached
                ):
                    return
                replica.commit_failure = str(error)
                logger.warning("%s: merging older generations: %s", replica.subject, error)
                await asyncio.sleep(_RETRY_SECONDS)
