# SPDX-License-Identifier: GPL-3.0-or-later
"""What the answers to its pings prove of a connection: that it carries both ways, and what has come there.

What arrives is no measure: where only the direction to the peer is lost, the peer's own pings still come.
Pure: it is told the time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

# So long others are seen to answer pings that are no older before one that does not is taken for broken.
SILENT_SECONDS = 3.0
# Looks are a quarter of a second apart. In a longer gap we did not look, and may not have read either.
_LONGEST_GAP_SECONDS = 0.5


class Liveness:
    """Of one connection. Pings are known by their time: the monotonic clock in nanoseconds, as sent."""

    def __init__(self) -> None:
        self.silent = False
        self.answered_ns = 0  # the newest ping that was answered
        self._unanswered: deque[int] = deque()
        self._overtaken_ns = 0
        self._late_seconds = 0.0
        self._told: deque[tuple[int, bytes]] = deque()

    def pinged(self, at_ns: int) -> None:
        """A PING goes out, after all that was told before."""
        self._unanswered.append(at_ns)

    def answered(self, at_ns: int) -> bool:
        """Its PONG came; False: there was no such ping."""
        if at_ns not in self._unanswered:
            return False
        while self._unanswered and self._unanswered[0] <= at_ns:
            self._unanswered.popleft()
        self.answered_ns = at_ns
        while self._told and self._told[0][0] < at_ns:
            self._told.popleft()
        return True

    def told(self, at_ns: int, frames: Iterable[bytes]) -> None:
        """Frames that went out, and matter until it is proved that they have come."""
        self._told.extend((at_ns, frame) for frame in frames)

    def take_unproved(self) -> list[bytes]:
        """What has to be told again elsewhere."""
        frames = [frame for _at, frame in self._told]
        self._told.clear()
        return frames

    def look(self, answered_elsewhere_ns: int, gap_seconds: float) -> bool:
        """Whether it has become silent, or is no longer. ``gap_seconds``: since the last look."""
        oldest = self._unanswered[0] if self._unanswered else 0
        if not oldest or oldest > answered_elsewhere_ns:
            self._overtaken_ns, self._late_seconds = 0, 0.0
        elif oldest != self._overtaken_ns:
            # Now it counts, not since the ping: peer and path may both have stood still until now.
            self._overtaken_ns, self._late_seconds = oldest, 0.0
        else:
            self._late_seconds += min(gap_seconds, _LONGEST_GAP_SECONDS)
        before, self.silent = self.silent, self._late_seconds >= SILENT_SECONDS
        return self.silent is not before


class SilenceWatch:
    """All connections of a session."""

    def __init__(self, now: float) -> None:
        self._looked_at = now

    def look(self, now: float, slots: Mapping[int, Liveness]) -> list[int]:
        """The slots whose connection has become silent since the last look, or has begun to answer again."""
        gap, self._looked_at = now - self._looked_at, now
        changed = []
        for slot, liveness in slots.items():
            elsewhere = max(
                (other.answered_ns for other in slots.values() if other is not liveness), default=0
            )
            if liveness.look(elsewhere, gap):
                changed.append(slot)
        return changed
