# SPDX-License-Identifier: GPL-3.0-or-later
"""All arrivals that this host remembers, in memory and on disk, and the lock of each VM."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from pathlib import Path

from precache_proxy.evacuation.arrival import RUNS_HERE, Arrival, ArrivalJournal, ArrivalState
from precache_proxy.evacuation.pruning import Entry, superseded

logger = logging.getLogger(__name__)

_ROLLED_BACK = frozenset({ArrivalState.ABORTING, ArrivalState.ABORTED})


class ArrivalRecords:
    """The arrivals of this host. ``directory`` is theirs alone."""

    def __init__(self, directory: Path) -> None:
        self._journal = ArrivalJournal(directory)
        self._arrivals: dict[str, Arrival] = {}
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def load(self) -> None:
        """Read the records (blocking)."""
        self._arrivals = {arrival.id: arrival for arrival in self._journal.load()}

    def all(self) -> list[Arrival]:
        """Every arrival on record."""
        return list(self._arrivals.values())

    def of(self, vm: str) -> list[Arrival]:
        """Every arrival of one VM."""
        return [arrival for arrival in self._arrivals.values() if arrival.vm == vm]

    def get(self, job_id: str) -> Arrival | None:
        """The arrival of a job, or None."""
        return self._arrivals.get(job_id)

    def add(self, arrival: Arrival) -> None:
        """Remember a new one, which is on disk already."""
        self._arrivals[arrival.id] = arrival

    def latest_of(self, vm: str) -> Arrival | None:
        """The newest arrival of a VM, or None. Attempts that were rolled back share an epoch: the later
        counts, and above all of them the one that was not."""

        # Whether a VM may run elsewhere hangs on this; the clock, which may be set back, decides last.
        def age(item: Arrival) -> tuple[int, bool, float]:
            return item.epoch, item.state not in _ROLLED_BACK, item.since

        return max(self.of(vm), key=age, default=None)

    def lock(self, vm: str) -> asyncio.Lock:
        """What orders everything done to one VM's arrivals."""
        return self._locks[vm]

    async def save(self, arrival: Arrival) -> None:
        """Make the record durable."""
        await asyncio.to_thread(self._journal.save, arrival)

    async def enter(self, arrival: Arrival, state: ArrivalState) -> None:
        """Go on to a state, durably."""
        await asyncio.to_thread(self._journal.enter, arrival, state)
        logger.info("arrival %s of VM %s: %s", arrival.id, arrival.vm, state.value)

    async def prune(self, now: float | None = None) -> list[str]:
        """Forget arrivals that are history; what they are is in pruning.py. Their numbers."""
        # The highest epoch that came to run here is what an old copy is refused by.
        ran = {
            max((item for item in self.of(vm) if item.state in RUNS_HERE), key=lambda item: item.epoch).id
            for vm in {item.vm for item in self._arrivals.values() if item.state in RUNS_HERE}
        }
        entries = [
            Entry(item.id, item.vm, item.epoch, item.since, not item.ended)
            for item in self._arrivals.values()
        ]
        gone = superseded(entries, time.time() if now is None else now, ran)
        for job_id in gone:
            await asyncio.to_thread(self._journal.remove, job_id)
            del self._arrivals[job_id]
        return gone
