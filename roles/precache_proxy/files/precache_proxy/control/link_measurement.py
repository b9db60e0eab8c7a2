# SPDX-License-Identifier: GPL-3.0-or-later
"""What a link carries now, found by sending for a few seconds what means nothing, in the lowest class.

Precaching shares that class, and everything above it goes first: a rehearsal disturbs no evacuation.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from precache_proxy.channel import Stream, TrafficClass
from precache_proxy.errors import LifeboatError

STREAM_KIND = "measure"
LONGEST_SECONDS = 10.0
_PIECE_BYTES = 128 * 1024


def register(channel: Any) -> None:
    """Take what peers send to measure, and forget it."""
    channel.handle_stream(STREAM_KIND, _swallow)


async def _swallow(stream: Stream) -> None:
    taken = 0
    while (message := await stream.receive()) is not None:
        taken += len(message)
    await stream.send(str(taken).encode())
    await stream.close()


async def measure(link: Any, seconds: float) -> dict[str, Any]:
    """Send for so long: bytes that arrived, seconds until all had, and the rate.

    Raises PeerUnreachable, StreamReset (a peer of an older version does not know this).
    """
    stream = await link.open_stream(STREAM_KIND, TrafficClass.PRECACHE, {})
    began = time.monotonic()
    piece = os.urandom(_PIECE_BYTES)
    try:
        while time.monotonic() - began < seconds:
            await stream.send(piece)
        await stream.close()
        answer = await asyncio.wait_for(stream.receive(), 30.0)
    except BaseException as error:
        reason = error if isinstance(error, LifeboatError) else LifeboatError("the measurement was given up")
        stream.reset(reason)
        raise
    # The word that all had come took half a round trip.
    took = time.monotonic() - began - (getattr(link, "least_round_trip_seconds", None) or 0.0) / 2
    arrived = int(answer or b"0")
    return {"bytes": arrived, "seconds": took, "bytes_per_second": arrived / max(took, 1e-3)}
