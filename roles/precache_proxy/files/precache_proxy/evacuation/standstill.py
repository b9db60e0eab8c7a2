# SPDX-License-Identifier: GPL-3.0-or-later
"""While a VM stands still in the middle of its move, what comes for it waits at the gateway that it leaves.

The mobility agent begins that by libvirt's word and goes on for ten seconds. A guest that is paused so that
its memory crosses only once, or whose last stop is long, stands still for longer: its clients' segments would
be lost then, and the pauses between what a sender sends again double, so that a connection could stand still
for as long again after the guest has gone on. So the agent is told for as long as the VM stands still.
"""

from __future__ import annotations

import asyncio
from typing import Final

from precache_proxy.evacuation.arrival_network import ArrivalNetwork
from precache_proxy.evacuation.job import Job

# A third of the time for which the agent goes on without our word.
AGAIN_SECONDS: Final = 3.0


class Standstill:
    """That of one VM during its migration from here."""

    def __init__(self, network: ArrivalNetwork, job: Job) -> None:
        self._network = network
        self._job = job
        self._telling: asyncio.Task[None] | None = None

    def changed_here(self, what: str) -> None:
        """The VM's life here, in the words of libvirt's events."""
        if what == "suspended" and (self._telling is None or self._telling.done()):
            self._telling = asyncio.create_task(self._tell())
        elif what == "resumed" and self._telling is not None:
            self._telling.cancel()

    async def _tell(self) -> None:
        again = True
        while again:
            await asyncio.sleep(AGAIN_SECONDS)
            again = await self._network.stands_still(self._job)

    async def over(self) -> None:
        """The migration has ended; what follows takes less than the agent goes on for."""
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.gather(self._telling, return_exceptions=True)
