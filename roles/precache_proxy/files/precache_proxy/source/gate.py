# SPDX-License-Identifier: GPL-3.0-or-later
"""A gate that lets the most important through first."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable


class PriorityGate:
    """So many at once; of those that wait the highest priority first, then who came first.

    ``on_wait`` is called when somebody has begun to wait.
    """

    def __init__(self, limit: int, on_wait: Callable[[], None] = lambda: None) -> None:
        self._free = limit
        self._on_wait = on_wait
        # in the order in which they came
        self._waiting: list[tuple[Callable[[], int], asyncio.Future[None]]] = []

    def waiting(self, priority: int) -> int:
        """How many wait whose priority is that, or higher."""
        return sum(each() >= priority and not waiter.done() for each, waiter in self._waiting)

    @contextlib.asynccontextmanager
    async def turn(self, priority: int | Callable[[], int]) -> AsyncIterator[None]:
        """Wait for a turn and hold it. A priority that may change meanwhile is asked for when it counts."""
        if self._free > 0:
            self._free -= 1
        else:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((priority if callable(priority) else lambda: priority, waiter))
            self._on_wait()
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
        self._waiting = [entry for entry in self._waiting if not entry[1].done()]
        if not self._waiting:
            self._free += 1
            return
        chosen = max(self._waiting, key=lambda entry: entry[0]())
        self._waiting.remove(chosen)
        chosen[1].set_result(None)
