# SPDX-License-Identifier: GPL-3.0-or-later
"""Which streams a session has, and which it once had: one side numbers them, the other meets the numbers."""

from __future__ import annotations

from typing import Any

from precache_proxy.channel.counters import LinkCounters
from precache_proxy.channel.frames import Frame
from precache_proxy.channel.identifiers import IdentifierSet
from precache_proxy.channel.opening import Opening
from precache_proxy.channel.settings import CLASS_LIMITS, TrafficClass
from precache_proxy.channel.stream import Stream, StreamOwner
from precache_proxy.channel.window import INITIAL_WINDOW_BYTES, ReceiveWindow, RoundTrip
from precache_proxy.errors import Conflict, ProtocolError

MAXIMUM_STREAMS = 4096


class StreamTable:
    """``ours``: we open the streams; else the peer does."""

    def __init__(
        self, owner: StreamOwner, peer: str, *, ours: bool, counters: LinkCounters, round_trip: RoundTrip
    ) -> None:
        self.streams: dict[int, Stream] = {}
        self._owner = owner
        self._peer = peer
        self._ours = ours
        self._counters = counters
        self._round_trip = round_trip
        self._next_identifier = 1
        self._seen = IdentifierSet()

    def open(
        self,
        kind: str,
        traffic_class: TrafficClass,
        header: dict[str, Any],
        label: str,
        window_bytes: int | None,
    ) -> Stream:
        """A new stream of ours. Raises Conflict when too many are open, InvalidInput on a long header."""
        if len(self.streams) >= MAXIMUM_STREAMS:
            raise Conflict(
                f"{len(self.streams)} streams to {self._peer} are open: no more are allowed; let some end"
            )
        payload = Opening(kind, header, label, window_bytes).pack()
        identifier, self._next_identifier = self._next_identifier, self._next_identifier + 1
        stream = self._make(identifier, traffic_class, label, window_bytes)
        stream.kind, stream.header = kind, header
        stream.begin(payload, traffic_class)
        return stream

    def _make(
        self, identifier: int, traffic_class: TrafficClass, label: str, window_bytes: int | None
    ) -> Stream:
        stream = Stream(
            self._owner,
            identifier,
            peer=self._peer,
            window=ReceiveWindow(CLASS_LIMITS[traffic_class], self._round_trip, window_bytes),
            peer_limit_bytes=INITIAL_WINDOW_BYTES,
            tally=self._counters.label(label),
        )
        stream.label = label
        self.streams[identifier] = stream
        return stream

    def meet(self, frame: Frame) -> Stream | None:
        """The stream of a frame whose number is not in the table: a new one of the peer's, or None where it
        is over here. Raises ProtocolError.
        """
        identifier = frame.stream
        if self._ours:
            if identifier == 0 or identifier >= self._next_identifier:
                raise ProtocolError(f"{self._peer} sends on stream {identifier}, which we never opened")
        elif identifier == 0:
            raise ProtocolError(f"{self._peer} sends on stream 0, which cannot be")
        elif identifier not in self._seen:
            # Frames of a stream may overtake its OPEN on another connection.
            if (
                len(self.streams) >= 2 * MAXIMUM_STREAMS
                or self._seen.missing_before(identifier) > 8 * MAXIMUM_STREAMS
            ):
                raise ProtocolError(f"{self._peer} opens stream {identifier}: too many at once")
            self._seen.add(identifier)
            return self._make(identifier, TrafficClass(frame.traffic_class), "", None)
        return None

    def introduce(self, stream: Stream, frame: Frame) -> None:
        """The peer's OPEN frame says what the stream is. Raises ProtocolError."""
        if self._ours:
            raise ProtocolError(f"{self._peer} opens a stream in our session; it has its own")
        opening = Opening.unpack(frame.payload, self._peer)
        if opening.window_bytes is not None:
            stream.window.maximum_bytes = opening.window_bytes
        stream.kind, stream.header, stream.label = opening.kind, opening.header, opening.label
        stream.tally = self._counters.label(opening.label)
        stream.opened = True
        stream.window.limits = CLASS_LIMITS[TrafficClass(frame.traffic_class)]
        stream.window.begin()

    def never_again(self, identifier: int) -> None:
        """The peer has reset one of its streams, perhaps before we met it."""
        if not self._ours and identifier:
            self._seen.add(identifier)
