# SPDX-License-Identifier: GPL-3.0-or-later
"""What all protections of a proxy share, and a gate that lets the most important through first."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from precache_proxy.channel.channel import Channel
from precache_proxy.channel.link import Link
from precache_proxy.errors import NotFound
from precache_proxy.hypervisor.connection import Hypervisor
from precache_proxy.source.backups import Backups
from precache_proxy.source.settings import SourceSettings
from precache_proxy.source.tracker import Tracker
from precache_proxy.store.media import MediaIndex


class PriorityGate:
    """So many at once; of those that wait the highest priority first, then who came first."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._order = count()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []

    @contextlib.asynccontextmanager
    async def turn(self, priority: int) -> AsyncIterator[None]:
        """Wait for a turn and hold it."""
        if self._free > 0:
            self._free -= 1
        else:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (-priority, next(self._order), waiter))
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._pass_on()
                raise
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            _unused, _unused, waiter = heapq.heappop(self._waiting)
            if not waiter.done():
                waiter.set_result(None)
                return
        self._free += 1


@dataclass(frozen=True)
class Environment:
    """The proxy's parts as protections use them."""

    directory: Path
    run_directory: Path
    settings: SourceSettings
    hypervisor: Hypervisor
    channel: Channel
    tracker: Tracker
    backups: Backups
    # passes, and what takes long (first copies, resyncs): they may not keep each other out
    passes: PriorityGate
    long_work: PriorityGate
    # media are carried one at a time, beside both
    media: PriorityGate
    media_index: MediaIndex

    def link(self, peer: str) -> Link:
        """The link to a peer. Raises NotFound."""
        link = self.channel.links.get(peer)
        if link is None:
            raise NotFound(f"peer {peer}: not in this proxy's configuration; add it to [[peers]]")
        return link
