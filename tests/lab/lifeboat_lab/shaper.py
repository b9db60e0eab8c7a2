# SPDX-License-Identifier: GPL-3.0-or-later
"""One direction of the WAN between two sites: when does a packet that arrives now come out at the other end?

Pure arithmetic on a clock that is passed in, so that the rate and the queue can be tested to the byte.
"""

import random
from collections import deque
from dataclasses import dataclass

from lifeboat_lab.profiles import Profile

# A path without a rate limit still may not hold more than this in memory.
IN_FLIGHT_LIMIT_BYTES = 256 << 20


@dataclass
class Counters:
    """What happened to the packets of one direction."""

    delivered_bytes: int = 0
    delivered_packets: int = 0
    dropped_queue_full: int = 0
    dropped_loss: int = 0
    dropped_cut: int = 0


class Path:
    """Delay, rate and loss of one direction; packets never overtake each other."""

    def __init__(self, random_source: random.Random) -> None:
        self.counters = Counters()
        self._random = random_source
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._held_bytes = 0
        self._line_free_at = 0.0
        self._last_due = 0.0

    def offer(self, packet: bytes, size_bytes: int, now: float, profile: Profile) -> None:
        """Take in a packet; it is dropped when the queue is full or by chance."""
        if profile.loss and self._random.random() < profile.loss:
            self.counters.dropped_loss += 1
            return
        line_free_at = max(self._line_free_at, now)
        rate_bytes = profile.rate_bits_per_second / 8
        if (rate_bytes and (line_free_at - now) * rate_bytes + size_bytes > profile.queue_bytes) or (
            self._held_bytes + len(packet) > IN_FLIGHT_LIMIT_BYTES
        ):
            self.counters.dropped_queue_full += 1
            return
        self._line_free_at = line_free_at + (size_bytes / rate_bytes if rate_bytes else 0.0)
        # A delay that was just shortened must not let this packet pass those that are on their way.
        self._last_due = max(self._last_due, self._line_free_at + profile.round_trip_seconds / 2)
        self._waiting.append((self._last_due, packet))
        self._held_bytes += len(packet)

    @property
    def next_due(self) -> float | None:
        """When the first packet comes out; None when there is none."""
        return self._waiting[0][0] if self._waiting else None

    def take_due(self, now: float) -> bytes | None:
        """The next packet whose time has come."""
        if not self._waiting or self._waiting[0][0] > now:
            return None
        packet = self._waiting.popleft()[1]
        self._held_bytes -= len(packet)
        return packet

    def clear(self) -> None:
        """Lose everything that is on its way, as a cut cable does; also after a change of profile to a faster one."""
        self.counters.dropped_cut += len(self._waiting)
        self._waiting.clear()
        self._held_bytes = 0
        self._line_free_at = self._last_due = 0.0
