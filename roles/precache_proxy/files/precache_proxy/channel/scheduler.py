# SPDX-License-Identifier: GPL-3.0-or-later
"""Which stream sends next: strict classes with a floor for the lowest, deficit round robin within a class."""

from __future__ import annotations

from collections import deque

from precache_proxy.channel.sent_frame import SentFrame
from precache_proxy.channel.settings import TrafficClass
from precache_proxy.channel.stream import Stream

_LOWEST = max(TrafficClass)


class Scheduler:
    """Pure: knows streams, not connections."""

    def __init__(self, floor_share: float) -> None:
        self._queues: dict[TrafficClass, deque[Stream]] = {member: deque() for member in TrafficClass}
        self._floor_share = floor_share
        self._floor_bytes = 0.0

    def activate(self, stream: Stream) -> bool:
        """The stream has work. True when it was not in a queue before."""
        if stream.scheduled:
            return False
        stream.scheduled = True
        self._queues[stream.traffic_class].append(stream)
        return True

    def remove(self, stream: Stream, traffic_class: TrafficClass) -> None:
        """Take the stream out of the queue of a class that it was in."""
        if stream.scheduled:
            stream.scheduled = False
            stream.deficit_bytes = 0
            self._queues[traffic_class].remove(stream)

    def highest(self) -> TrafficClass | None:
        """The highest class with work."""
        return next((member for member, queue in self._queues.items() if queue), None)

    def next_frame(
        self,
        quantum_bytes: int,
        lowest_allowed: TrafficClass = _LOWEST,
        highest_allowed: TrafficClass = TrafficClass.CONTROL,
    ) -> tuple[Stream, SentFrame] | None:
        """The next frame of the classes allowed, at most ``quantum_bytes`` long; streams without work or
        credit leave their queue.
        """
        if self._floor_bytes >= quantum_bytes and lowest_allowed == _LOWEST and self._queues[_LOWEST]:
            found = self._from_class(_LOWEST, quantum_bytes)
            if found is not None:
                self._floor_bytes -= quantum_bytes
                return found
        for member in TrafficClass:
            if member > lowest_allowed:
                break
            if member >= highest_allowed and self._queues[member]:
                found = self._from_class(member, quantum_bytes)
                if found is not None:
                    if member is not _LOWEST:
                        # Saved up only while the lowest class waits: the floor is a share, not a
                        # debt of an hour ago.
                        owed = found[1].length * self._floor_share if self._queues[_LOWEST] else 0.0
                        self._floor_bytes = min(self._floor_bytes + owed, 4.0 * quantum_bytes)
                    return found
        return None

    def _from_class(self, member: TrafficClass, quantum_bytes: int) -> tuple[Stream, SentFrame] | None:
        queue = self._queues[member]
        while queue:
            stream = queue[0]
            frame = stream.next_frame(quantum_bytes)
            if frame is None:
                queue.popleft()
                stream.scheduled = False
                stream.deficit_bytes = 0
                continue
            # In arrears after a turn: the quantum is paid back while the others have theirs.
            stream.deficit_bytes += frame.length + 1
            if stream.deficit_bytes >= quantum_bytes:
                stream.deficit_bytes -= quantum_bytes
                queue.rotate(-1)
            return stream, frame
        return None
