# SPDX-License-Identifier: GPL-3.0-or-later
"""A share of the wire, lent for a time."""

from __future__ import annotations

import asyncio
import time

import pytest

from precache_proxy.errors import InvalidInput
from precache_proxy.evacuation.pace import LEAST_BYTES_PER_SECOND, Pace


class Clock:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_without_a_share_nothing_waits() -> None:
    pace = Pace()
    began = time.monotonic()
    for _unused in range(100):
        await pace.wait(10**9)
    assert time.monotonic() - began < 1.0


async def test_a_share_holds_back_what_is_beyond_it_and_is_lifted_by_itself() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.lend(100_000, 60)
    await pace.wait(100_000)
    second = asyncio.create_task(pace.wait(50_000))
    await asyncio.sleep(0.25)
    assert not second.done(), "100 KB are not paid yet"
    clock.now += 1.1
    await asyncio.wait_for(second, 2)
    third = asyncio.create_task(pace.wait(1))
    await asyncio.sleep(0.25)
    assert not third.done()
    clock.now += 60
    await asyncio.wait_for(third, 2)
    assert pace.share_bytes_per_second is None, "the lease is over: nobody renewed it"


async def test_lifting_lets_go_at_once() -> None:
    pace = Pace()
    pace.lend(LEAST_BYTES_PER_SECOND, 60)
    await pace.wait(10**8)
    waiting = asyncio.create_task(pace.wait(1))
    await asyncio.sleep(0.15)
    assert not waiting.done()
    pace.lend(None, 60)
    await asyncio.wait_for(waiting, 2)


async def test_a_guest_that_stands_still_has_no_limit_whatever_is_lent() -> None:
    pace = Pace()
    pace.lend(LEAST_BYTES_PER_SECOND, 60)
    await pace.wait(10**8)
    waiting = asyncio.create_task(pace.wait(1))
    await asyncio.sleep(0.15)
    assert not waiting.done()
    pace.changed_here("suspended")
    await asyncio.wait_for(waiting, 2)
    pace.lend(LEAST_BYTES_PER_SECOND, 60)
    assert pace.share_bytes_per_second is None
    pace.changed_here("resumed")
    assert pace.share_bytes_per_second == LEAST_BYTES_PER_SECOND, "called off, it goes on"


@pytest.mark.parametrize(("share", "seconds"), [(0.0, 30.0), (100.0, 30.0), (10**6, 0.0), (10**6, 10**6)])
def test_what_cannot_be_meant_is_refused(share: float, seconds: float) -> None:
    with pytest.raises(InvalidInput):
        Pace().lend(share, seconds)
