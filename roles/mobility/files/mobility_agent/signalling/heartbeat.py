# SPDX-License-Identifier: GPL-3.0-or-later
"""Is the anchor there, is it still the one we knew, how far is it, how late is its clock (RFC 5847).

Pure: one :class:`Pulse` for each anchor.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from dataclasses import dataclass

from mobility_agent.messages.headers import Heartbeat
from mobility_agent.messages.options import RestartCounter, Timestamp, find

#: So many requests without an answer are silence.
MISSED = 3
_REMEMBERED = 32


@dataclass(frozen=True, slots=True)
class Beat:
    """What an answer says. ``returned``: it was silent before; ``restarted``: it may have forgotten."""

    round_trip_seconds: float
    clock_offset_seconds: float
    returned: bool
    restarted: bool


class Pulse:
    """The heartbeat with one anchor."""

    def __init__(self, interval_seconds: float, now: float) -> None:
        self._interval = interval_seconds
        # Not the same at every start: else answers to the one before would fit again.
        self._sequence = secrets.randbits(32)
        self._sent: OrderedDict[int, tuple[float, float]] = OrderedDict()
        self._next_at = now
        # When what was not answered since the last answer was asked first: our own standing still is nobody's
        # silence.
        self._asked_at: float | None = None
        self._restarts: int | None = None
        self.up = False
        self.round_trip_seconds: float | None = None
        self.clock_offset_seconds = 0.0

    @property
    def next_at(self) -> float:
        """When :meth:`due` or :meth:`fell_silent` has something to say (monotonic seconds)."""
        return min(self._next_at, self._silent_at())

    def _silent_at(self) -> float:
        if not self.up or self._asked_at is None:
            return float("inf")
        return self._asked_at + (MISSED - 1) * self._interval + (self.round_trip_seconds or 0.0)

    def due(self, now: float, wall: float) -> Heartbeat | None:
        """The request to send now, if it is time."""
        if now < self._next_at:
            return None
        if self._asked_at is None or now > self._next_at + self._interval:
            self._asked_at = now
        self._next_at = now + self._interval
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        self._sent[self._sequence] = (now, wall)
        while len(self._sent) > _REMEMBERED:
            self._sent.popitem(last=False)
        return Heartbeat(self._sequence, response=False)

    def answered(self, beat: Heartbeat, now: float) -> Beat | None:
        """Take a response; None for one that was not asked for."""
        sent = self._sent.pop(beat.sequence, None)
        if sent is None:
            return None
        sent_at, sent_wall = sent
        round_trip = now - sent_at
        counter, timestamp = find(beat.options, RestartCounter), find(beat.options, Timestamp)
        offset = 0.0
        if timestamp is not None:
            # As if the anchor had read its clock half-way.
            offset = timestamp.ticks / Timestamp.TICKS_PER_SECOND - (sent_wall + round_trip / 2)
        restarts = counter.count if counter is not None else 0
        restarted = self._restarts is not None and restarts != self._restarts
        returned = not self.up
        self._restarts, self._asked_at, self.up = restarts, None, True
        self.round_trip_seconds, self.clock_offset_seconds = round_trip, offset
        return Beat(round_trip, offset, returned, restarted)

    def fell_silent(self, now: float) -> bool:
        """True once, when the anchor has not answered for as long as three requests take. Ask :meth:`due`
        before."""
        if now <= self._silent_at():
            return False
        self.up = False
        return True


def answer(request: Heartbeat, restarts: int, wall: float) -> Heartbeat:
    """An anchor's answer: how often it started, and what its clock says."""
    options = (RestartCounter(restarts), Timestamp.of_seconds(wall))
    return Heartbeat(request.sequence, response=True, options=options)
