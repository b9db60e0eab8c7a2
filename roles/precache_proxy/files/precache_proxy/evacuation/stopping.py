# SPDX-License-Identifier: GPL-3.0-or-later
"""Before a proxy stops, what it carries is brought to an end, for some seconds.

With the proxy its relays end, and with them the mirrors of a live move: where the guest's writes wait for
them QEMU may crash (calling_off.py), and a VM between two hosts waits, paused, until the proxy is back. So a
move whose memory is still crossing is called off in order, and one that is being handed over is let through.
What does not come to its end in that time is left as by a kill.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from precache_proxy.errors import LifeboatError, ProxyRestarted
from precache_proxy.evacuation.arrival import Arrival, ArrivalState
from precache_proxy.evacuation.job import Step

if TYPE_CHECKING:
    from precache_proxy.evacuation.departure import Departure

logger = logging.getLogger(__name__)

# Less than what the daemon gives a part of it to stop in.
STOP_SECONDS: Final = 20.0
LOOK_SECONDS: Final = 0.1
METHOD: Final = "end"
_NOT_YET: Final = frozenset({ArrivalState.PREPARED, ArrivalState.RELEASED})
_HANDED_OVER: Final = frozenset({Step.CONFIRM, Step.RELEASED, Step.FINISH})


def call_off(departure: Departure, host: str) -> None:
    """Have a move whose memory is still crossing end, as the proxy of ``host`` stops; any other goes on."""
    job = departure.job
    if job.step is Step.MIGRATE and not departure.enough.is_set():
        departure.called_off_for = ProxyRestarted(
            f"evacuation of {job.name}: the proxy of {host} is being stopped; the VM stays here, evacuate it "
            f"again"
        )
        departure.enough.set()


async def end_moves(under_way: Iterable[tuple[Departure, asyncio.Task[None]]]) -> None:
    """Bring the moves that leave this host, and somebody works on, to their ends or to where a kill does no
    harm. Returns after :data:`STOP_SECONDS` at the latest."""
    waited: list[asyncio.Task[None]] = []
    for departure, task in under_way:
        job = departure.job
        if job.step is Step.MIGRATE:
            call_off(departure, "this host")
        elif (
            job.step not in _HANDED_OVER or getattr(departure.around.links.get(job.peer), "state", "") != "up"
        ):
            continue
        logger.info("evacuation %s of VM %s: at step %s as we stop", job.id, job.vm, job.step.value)
        waited.append(task)
    if waited:
        await asyncio.wait(waited, timeout=STOP_SECONDS)


async def end_asked(departure: Departure | None, peer: str) -> dict[str, Any]:
    """The proxy of a destination stops: at which step its job is once its memory crosses no more; None: no
    such job."""
    if departure is None or departure.job.peer != peer:
        return {"known": False, "step": None}
    call_off(departure, peer)
    deadline = time.monotonic() + STOP_SECONDS
    while departure.job.step is Step.MIGRATE and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(LOOK_SECONDS)
    return {"known": True, "step": departure.job.effective_step.value}


async def see_arrivals_off(
    arrivals: Iterable[Arrival], carried: Callable[[str], list[str]], links: Mapping[str, Any]
) -> None:
    """Have the sources of what is carried end it, and wait for what is being handed over here. Returns after
    :data:`STOP_SECONDS` at the latest."""

    async def see_off(arrival: Arrival) -> None:
        handed_over = arrival.state is ArrivalState.RELEASED
        link = links.get(arrival.peer)
        if not handed_over and link is not None:
            try:
                answer = await link.call(
                    f"evacuation.{METHOD}", {"job": arrival.id}, timeout_seconds=STOP_SECONDS
                )
                handed_over = answer.get("step") in {step.value for step in _HANDED_OVER}
            except LifeboatError as error:
                # Of an older version, or not heard: its move breaks off with our relays.
                logger.info("arrival %s of VM %s: not ended in order: %s", arrival.id, arrival.vm, error)
        while handed_over and arrival.state in _NOT_YET:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_SECONDS)

    concerned = [
        asyncio.create_task(see_off(arrival))
        for arrival in arrivals
        if arrival.state is ArrivalState.RELEASED
        or (arrival.state is ArrivalState.PREPARED and carried(arrival.id))
    ]
    if concerned:
        _done, late = await asyncio.wait(concerned, timeout=STOP_SECONDS)
        for task in late:
            task.cancel()
        await asyncio.gather(*concerned, return_exceptions=True)
