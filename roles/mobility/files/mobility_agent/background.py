# SPDX-License-Identifier: GPL-3.0-or-later
"""Work that goes on beside everything else, from a start to a stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine

logger = logging.getLogger(__name__)

_AFTER_FAILURE_SECONDS = 1.0


class Background:
    """One coroutine that runs until it is stopped. What it raises comes out of :meth:`stop`."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    def start(self, work: Coroutine[None, None, None]) -> None:
        """Let ``work`` run."""
        self._task = asyncio.get_running_loop().create_task(work)

    def failure(self) -> BaseException | None:
        """What ended the work before anybody stopped it, if anything did."""
        task = self._task
        return task.exception() if task is not None and task.done() and not task.cancelled() else None

    async def stop(self) -> None:
        """Cancel it and wait until it has ended; nothing happens where none was started."""
        task, self._task = self._task, None
        if task is None:
            return
        while not task.done():
            # Asked for until it listens: asyncio.wait_for may swallow it.
            task.cancel()
            await asyncio.wait({task}, timeout=_AFTER_FAILURE_SECONDS)
        with contextlib.suppress(asyncio.CancelledError):
            task.result()


async def again_and_again(
    subject: str, one_round: Callable[[], float], wake: asyncio.Event, least_seconds: float
) -> None:
    """``one_round`` when ``wake`` is set, or after as many seconds as the last round said.

    A round that fails is told of, and the next one comes all the same: what is due must not end with it.
    """
    while True:
        wake.clear()
        try:
            pause = max(one_round(), least_seconds)
        except Exception:
            logger.exception("%s: a round of its work failed; going on", subject)
            await asyncio.sleep(_AFTER_FAILURE_SECONDS)
            continue
        with contextlib.suppress(TimeoutError):
            # Not wait_for: it may swallow being stopped when it is woken just then.
            async with asyncio.timeout(pause):
                await wake.wait()
