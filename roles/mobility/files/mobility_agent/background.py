# SPDX-License-Identifier: GPL-3.0-or-later
"""Work that goes on beside everything else, from a start to a stop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine


class Background:
    """One coroutine that runs until it is stopped. What it raises comes out of :meth:`stop`."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    def start(self, work: Coroutine[None, None, None]) -> None:
        """Let ``work`` run."""
        self._task = asyncio.get_running_loop().create_task(work)

    async def stop(self) -> None:
        """Cancel it and wait until it has ended; nothing happens where none was started."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
