# SPDX-License-Identifier: GPL-3.0-or-later
"""Who may open a replica's chain: many that read its sealed layers, or one that writes into its base."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class ChainLock:
    """QEMU's own locks refuse a writer of the base beside readers: this one has them wait for each other."""

    def __init__(self) -> None:
        self._readers = 0
        self._writing = False
        self._waiting_readers = 0
        self._changed = asyncio.Condition()

    @property
    def wanted(self) -> bool:
        """A reader waits: a writer in the background should pause."""
        return self._waiting_readers > 0

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """The layers stand still. Does not wait for a waiting writer: commits have time, passes have not."""
        async with self._changed:
            self._waiting_readers += 1
            try:
                await self._changed.wait_for(lambda: not self._writing)
            except BaseException:
                self._waiting_readers -= 1
                self._changed.notify_all()
                raise
            self._waiting_readers -= 1
            self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1
            await self._notify()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Nobody else has any layer open."""
        async with self._changed:
            # Also behind readers that only wait to be woken: or a merge that gave way would be first again.
            await self._changed.wait_for(
                lambda: not (self._writing or self._readers or self._waiting_readers)
            )
            self._writing = True
        try:
            yield
        finally:
            self._writing = False
            await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
