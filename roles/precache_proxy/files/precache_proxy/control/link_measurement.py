# SPDX-License-Identifier: GPL-3.0-or-later
"""What a link carries now, found by sending for a few seconds what means nothing, in the lowest class.

Precaching shares that class, and everything above it goes first: a rehearsal disturbs no evacuation.

A long path needs seconds to come up to its rate (slow start, growing windows). So the peer notes when how
much had arrived, by its own clock, and the rate is that of the later part of the time, not the mean of all.
(Not that of the best part: of two pairs that share a link each has its best when the other has not.) Several
streams share the work, as those of several VMs would.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Sequence
from typing import Any

from precache_proxy.channel import Stream, TrafficClass
from precache_proxy.errors import LifeboatError

STREAM_KIND = "measure"
LONGEST_SECONDS = 10.0
_PIECE_BYTES = 128 * 1024
_STREAMS = 4
_NOTE_SECONDS = 0.1
# So much of the time a path is given to come up to its rate.
_RAMP = 0.4
# Halves of the rest that differ by more, or a longer queue, say that it had not come up to it yet.
_STEADY_SHARE = 0.25
_STEADY_QUEUE_SECONDS = 0.04

Note = tuple[float, int]


def register(channel: Any) -> None:
    """Take what peers send to measure, and forget it."""
    channel.handle_stream(STREAM_KIND, _swallow)


async def _swallow(stream: Stream) -> None:
    taken = 0
    # From the opening on, not from the first byte: so the times of all pairs that measure together agree.
    notes: list[Note] = [(time.monotonic(), 0)]
    while (message := await stream.receive()) is not None:
        taken += len(message)
        now = time.monotonic()
        if now - notes[-1][0] >= _NOTE_SECONDS:
            notes.append((now, taken))
    notes.append((time.monotonic(), taken))
    # Who does not ask for notes is of an older version and wants the number alone.
    told = json.dumps(notes) if stream.header.get("notes") else str(taken)
    await stream.send(told.encode())
    await stream.close()


async def measure(link: Any, seconds: float) -> dict[str, Any]:
    """Send for so long: bytes that arrived, how long the peer took them, and the rate once it was steady.

    ``halves_bytes_per_second`` of that part, ``queue_seconds`` that it left behind, and ``unsteady``: the
    rate is not to be relied on, and should be measured again (by all who share the path, together).

    Raises PeerUnreachable, StreamReset (a peer of an older version does not know this).
    """
    until = time.monotonic() + seconds
    piece = os.urandom(_PIECE_BYTES)
    told = await asyncio.gather(*(_send(link, piece, until) for _stream in range(_STREAMS)))
    queue = _queue_seconds(link)
    notes = together(told)
    halves = [
        steady_rate(notes, begins * seconds, ends * seconds)
        for begins, ends in ((_RAMP, (1 + _RAMP) / 2), ((1 + _RAMP) / 2, 1.0))
    ]
    arrived, took = sum(stream[-1][1] for stream in told), notes[-1][0] - notes[0][0]
    return {
        "bytes": arrived,
        "seconds": took,
        "bytes_per_second": steady_rate(notes, _RAMP * seconds, seconds),
        "halves_bytes_per_second": halves,
        "queue_seconds": queue,
        "unsteady": is_unsteady(halves, queue),
    }


def is_unsteady(halves: Sequence[float], queue_seconds: float | None) -> bool:
    """Whether a rate whose two halves were these, with that queue left behind, is no rate of the path."""
    slow, fast = min(halves), max(halves)
    return fast <= 0 or fast - slow > _STEADY_SHARE * fast or (queue_seconds or 0.0) > _STEADY_QUEUE_SECONDS


def _queue_seconds(link: Any) -> float | None:
    """How much longer a round trip takes now than it must; None: not known."""
    now, least = link.round_trip_seconds, link.least_round_trip_seconds
    return None if now is None or least is None else max(0.0, now - least)


async def _send(link: Any, piece: bytes, until: float) -> list[Note]:
    stream = await link.open_stream(STREAM_KIND, TrafficClass.PRECACHE, {"notes": True})
    began = time.monotonic()
    try:
        while time.monotonic() < until:
            await stream.send(piece)
        await stream.close()
        async with asyncio.timeout(30.0):
            answer = json.loads(await stream.receive() or b"0")
    except BaseException as error:
        reason = error if isinstance(error, LifeboatError) else LifeboatError("the measurement was given up")
        stream.reset(reason)
        raise
    if isinstance(answer, int):
        # By our clock then; the word that all had come took half a round trip.
        ended = time.monotonic() - (getattr(link, "least_round_trip_seconds", None) or 0.0) / 2
        return [(began, 0), (max(ended, began + 1e-3), answer)]
    return [(float(at), int(count)) for at, count in answer]


def together(streams: Sequence[Sequence[Note]]) -> list[Note]:
    """Notes of all streams as those of one: at each instant what had arrived of all."""
    counts = [0] * len(streams)
    notes: list[Note] = []
    for at, stream, count in sorted(
        (at, number, count) for number, notes_of in enumerate(streams) for at, count in notes_of
    ):
        counts[stream] = count
        notes.append((at, sum(counts)))
    return notes


def steady_rate(notes: Sequence[Note], ramp_seconds: float, until_seconds: float) -> float:
    """Bytes per second between two times after the first note; over all notes where it was over before."""
    began = notes[0][0]
    part = [note for note in notes if ramp_seconds <= note[0] - began <= until_seconds]
    if len(part) < 2 or part[-1][0] - part[0][0] < 0.5 * (until_seconds - ramp_seconds):
        part = [notes[0], notes[-1]]
    return (part[-1][1] - part[0][1]) / max(part[-1][0] - part[0][0], 1e-3)
