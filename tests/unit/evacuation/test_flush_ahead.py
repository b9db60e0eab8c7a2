# SPDX-License-Identifier: GPL-3.0-or-later
"""A mirror is flushed while its guest runs: when it is quiet, and not all the time."""

from __future__ import annotations

import asyncio
import time

from precache_proxy.evacuation.flush_ahead import EVERY_SECONDS, QUIET_SECONDS, FlushAhead
from precache_proxy.evacuation.nbd_flushes import Flushes
from unit.evacuation.test_nbd_flushes import FLUSH, OWN, REQUEST, WRITE, reply, request

OURS = REQUEST.pack(0x21E41C71, 0, FLUSH, OWN, 0, 0)


def written(flushes: Flushes, ahead: FlushAhead, cookie: int) -> None:
    flushes.outward(request(WRITE, cookie, bytes(64)))
    flushes.inward(reply(cookie))
    ahead.heard()


async def test_it_goes_out_when_it_has_been_quiet_for_a_moment() -> None:
    flushes = Flushes()
    ahead = FlushAhead(flushes)
    reading = asyncio.create_task(asyncio.sleep(60))
    began = time.monotonic()
    written(flushes, ahead, 1)
    assert await asyncio.wait_for(ahead.before(reading), 5) == OURS
    assert time.monotonic() - began >= QUIET_SECONDS
    flushes.inward(reply(OWN))
    ahead.heard()
    # The next one waits for its turn, however quiet it is.
    written(flushes, ahead, 2)
    flushed = time.monotonic()
    assert await asyncio.wait_for(ahead.before(reading), 5) == OURS
    assert time.monotonic() - flushed >= EVERY_SECONDS / 2
    reading.cancel()
    ahead.close()


async def test_none_goes_out_while_something_is_under_way() -> None:
    flushes = Flushes()
    ahead = FlushAhead(flushes)
    written(flushes, ahead, 1)
    flushes.outward(request(WRITE, 2, bytes(64)))
    reading = asyncio.create_task(asyncio.sleep(QUIET_SECONDS * 4))
    assert await asyncio.wait_for(ahead.before(reading), 5) == b"", "the client's next piece came first"
    flushes.inward(reply(2))
    ahead.heard()
    later = asyncio.create_task(asyncio.sleep(60))
    assert await asyncio.wait_for(ahead.before(later), 5) == OURS, "its last answer makes it quiet"
    later.cancel()
    ahead.close()


async def test_what_is_read_is_not_kept_waiting() -> None:
    flushes = Flushes()
    ahead = FlushAhead(flushes)
    written(flushes, ahead, 1)
    reading = asyncio.create_task(asyncio.sleep(0))
    await reading
    assert await asyncio.wait_for(ahead.before(reading), 1) == b""
    ahead.close()
