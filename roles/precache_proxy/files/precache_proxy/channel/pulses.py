# SPDX-License-Identifier: GPL-3.0-or-later
"""How a rate is tried on a path without filling its queue: for a moment, and what arrives tells.

Who sends twice as much for a whole round trip may have put up to a round trip of data into the queue before
the first of it is acknowledged. A pulse of 30 ms at 2.25 times a rate that the path carries leaves 38 ms at
most, and it arrives as fast as the bottleneck lets it through: that is what the path carries, or all that was
tried. Pure: samples come in.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

PULSE_SECONDS = 0.03
PULSE_FACTOR = 2.25
# How often to look while pulses are sent: a few times in each, and in its echo.
PULSE_BEAT_SECONDS = 0.01
# Arriving is measured over so long: shorter, a few packets that come together would be a rate.
_WINDOW_SECONDS = 0.026
# A look that had such a hole in it was a busy processor's: it does not show what the path did.
_HOLE_SECONDS = 0.03


@dataclass(frozen=True, slots=True)
class Pulse:
    """A rate that holds until an instant, whoever looks when."""

    bytes_per_second: float
    until: float


class PulseEcho:
    """The highest rate at which bytes were seen to arrive since the last :meth:`begin`.

    Never more than the bottleneck's rate, but for acknowledgements that something kept back and let go
    together.
    """

    def __init__(self) -> None:
        self.swiftest_bytes_per_second = 0.0
        self._longest_gap = 0.0
        self._window: deque[tuple[float, int]] = deque()

    @property
    def is_whole(self) -> bool:
        """Nothing kept us from looking: what is missing did not arrive."""
        return self._longest_gap < _HOLE_SECONDS

    def begin(self) -> None:
        """A new look."""
        self.swiftest_bytes_per_second = self._longest_gap = 0.0

    def sample(self, at: float, acknowledged_bytes: int) -> None:
        """So many bytes were acknowledged since ever."""
        if self._window:
            self._longest_gap = max(self._longest_gap, at - self._window[-1][0])
        self._window.append((at, acknowledged_bytes))
        while len(self._window) > 2 and at - self._window[1][0] >= _WINDOW_SECONDS:
            self._window.popleft()
        since, before = self._window[0]
        if at - since >= _WINDOW_SECONDS:
            rate = (acknowledged_bytes - before) / (at - since)
            self.swiftest_bytes_per_second = max(self.swiftest_bytes_per_second, rate)
