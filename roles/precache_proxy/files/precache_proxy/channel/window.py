# SPDX-License-Identifier: GPL-3.0-or-later
"""How much of a stream may be under way: the receive window, sized by what the reader really takes."""

from __future__ import annotations

from precache_proxy.channel.settings import ClassLimits
from precache_proxy.units import KIB

# Part of the protocol: what may be sent on a stream before the first acknowledgement.
INITIAL_WINDOW_BYTES = 256 * KIB
# Two event loops and their batching sit in the path beside the network.
_LOOP_SECONDS = 0.02
_SLACK_BYTES = 256 * KIB
_UNKNOWN_SECONDS = 0.05
_MEMORY_SECONDS = 15.0
# Pings come once a second and connection, when idle every 2.5 s.
_LATELY_SECONDS = 2.0


class _Least:
    """The least of the last ``seconds``, and of as much again before them."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._halves = [float("inf"), float("inf")]
        self._turn_at = 0.0

    def sample(self, value: float, now: float) -> None:
        since = now - self._turn_at
        if since > self._seconds:
            self._halves = [value, self._halves[0] if since < 2 * self._seconds else value]
            self._turn_at = now
        self._halves[0] = min(self._halves[0], value)

    @property
    def value(self) -> float:
        least = min(self._halves)
        return _UNKNOWN_SECONDS if least == float("inf") else least


class RoundTrip:
    """Round trip of a session: smoothed over recent samples, and the least of the last 15 to 30 seconds."""

    def __init__(self) -> None:
        self.smoothed_seconds: float | None = None
        self.latest_seconds: float | None = None
        self.flight_bytes = 0.0  # what streams had under way lately: new ones need not find out again
        self._least = _Least(_MEMORY_SECONDS)
        self._lately = _Least(_LATELY_SECONDS)

    def sample(self, seconds: float, now: float) -> None:
        """A ping came back."""
        before = self.smoothed_seconds
        self.latest_seconds = seconds
        self.smoothed_seconds = seconds if before is None else before + 0.25 * (seconds - before)
        self._least.sample(seconds, now)
        self._lately.sample(seconds, now)

    @property
    def least_seconds(self) -> float:
        """The round trip without queues; 50 ms while nothing was measured."""
        return self._least.value

    @property
    def lately_seconds(self) -> float:
        """The least of the last few seconds: so soon a path is believed to have become longer."""
        return self._lately.value


class ReceiveWindow:
    """Grows to about 2 x rate x round trip within the class's bounds (MIGRATION: 1 x, and a little)."""

    def __init__(self, limits: ClassLimits, round_trip: RoundTrip, maximum_bytes: int | None = None) -> None:
        self.limits = limits
        self.initial_bytes = INITIAL_WINDOW_BYTES
        self.size_bytes = INITIAL_WINDOW_BYTES
        self.maximum_bytes = maximum_bytes
        self._round_trip = round_trip
        self._mark_at = 0.0
        self._mark_bytes = 0

    def begin(self) -> None:
        """Class and maximum are known: start from what other streams of the session found."""
        if self._round_trip.flight_bytes > self.size_bytes:
            self._resize(self._target(self._round_trip.flight_bytes))

    @property
    def acknowledge_bytes(self) -> int:
        """So much may arrive before an acknowledgement is due at once."""
        return max(self.size_bytes // 16, 64 * KIB)

    def consumed(self, total_bytes: int, now: float) -> None:
        """The reader has taken ``total_bytes`` since the beginning."""
        trip = self._round_trip.lately_seconds + _LOOP_SECONDS
        elapsed = now - self._mark_at
        if elapsed < trip:
            return
        taken = total_bytes - self._mark_bytes
        self._mark_at, self._mark_bytes = now, total_bytes
        if elapsed > 4 * trip + 1:
            return  # first sample, or an idle time lies between: it says nothing about the rate
        flight = taken * trip / elapsed
        self._round_trip.flight_bytes = max(flight, self._round_trip.flight_bytes * 0.98)
        # A window that was used up says nothing about how much would fit.
        used_up = flight > (0.8 if self.limits.short else 0.6) * self.size_bytes
        self._resize(4 * flight if used_up else self._target(flight))

    def _target(self, flight: float) -> float:
        return flight + max(_SLACK_BYTES, flight / 3) if self.limits.short else 2 * flight

    def _resize(self, target: float) -> None:
        most = self.limits.maximum_window_bytes
        if self.maximum_bytes is not None:
            most = min(most, self.maximum_bytes)
        least = min(self.limits.minimum_window_bytes, most)
        # Down slowly: a pause of the reader (a flush, a seal) must not cost the next round trips.
        target = max(target, self.size_bytes * 7 / 8)
        self.size_bytes = int(min(max(target, least), most))
