# SPDX-License-Identifier: GPL-3.0-or-later
"""When a mirror that is followed (nbd_flushes.py) is flushed while its guest runs: its end need not be."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from precache_proxy.evacuation.nbd_flushes import Flushes

# Without anything under way: in the middle of a copy there is always more to come.
QUIET_SECONDS: Final = 0.05
# Each one is a sync of the disk there.
EVERY_SECONDS: Final = 0.25


class FlushAhead:
    """Of one connection: says when, and what, goes out before the client says its next."""

    def __init__(self, flushes: Flushes) -> None:
        self._flushes = flushes
        self._due: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._last = float("-inf")

    def heard(self) -> None:
        """The server has said something: it may have been the last that was under way."""
        if self._timer is None and self._flushes.wants_flush:
            loop = asyncio.get_running_loop()
            wait_seconds = max(QUIET_SECONDS, self._last + EVERY_SECONDS - loop.time())
            self._timer = loop.call_later(wait_seconds, self._time_is_up)

    def _time_is_up(self) -> None:
        self._timer = None
        self._last = asyncio.get_running_loop().time()
        if not self._due.done():
            self._due.set_result(None)

    async def before(self, reading: asyncio.Task[Any]) -> bytes:
        """A flush that goes out before the client's next piece is read; nothing once that is there."""
        while not reading.done():
            await asyncio.wait({reading, self._due}, return_when=asyncio.FIRST_COMPLETED)
            if self._due.done():
                self._due = asyncio.get_running_loop().create_future()
                if not reading.done() and (flush := self._flushes.flush()):
                    return flush
        return b""

    def close(self) -> None:
        """The connection has ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
