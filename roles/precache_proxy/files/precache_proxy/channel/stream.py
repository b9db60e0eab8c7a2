# SPDX-License-Identifier: GPL-3.0-or-later
"""One stream: ordered, reliable messages in both directions, with credit; it outlives a TCP connection."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Protocol

from precache_proxy.channel.counters import Tally
from precache_proxy.channel.frames import MAX_MESSAGE_BYTES, Frame
from precache_proxy.channel.receiving_half import Arrival, ReceivingHalf
from precache_proxy.channel.reset import StreamReset
from precache_proxy.channel.sending_half import SendingHalf
from precache_proxy.channel.sent_frame import SentFrame
from precache_proxy.channel.settings import CLASS_LIMITS, TrafficClass
from precache_proxy.channel.window import ReceiveWindow
from precache_proxy.errors import Conflict, InvalidInput, LifeboatError


class StreamOwner(Protocol):
    """What a stream needs of its session."""

    def activate(self, stream: Stream) -> None:
        """The stream has something to send."""

    def reclassify(self, stream: Stream, before: TrafficClass) -> None:
        """The stream's class has changed."""

    def owe_acknowledgement(self, stream: Stream, *, soon: bool) -> None:
        """Tell the peer what has arrived and how much more may come."""

    def announce_reset(self, stream: Stream, error: LifeboatError) -> None:
        """Tell the peer that the stream is reset, and forget it."""

    def forget(self, stream: Stream) -> None:
        """Both halves are over."""

    def count_acknowledged(self, raw_bytes: int) -> None:
        """The peer has these bytes."""


class Stream:
    """An open stream. Made by ``Link.open_stream`` or handed to a stream handler, not by users."""

    def __init__(
        self,
        owner: StreamOwner,
        identifier: int,
        *,
        peer: str,
        window: ReceiveWindow,
        peer_limit_bytes: int,
        tally: Tally,
    ) -> None:
        self.identifier = identifier
        self.peer = peer
        self.kind = ""
        self.header: dict[str, Any] = {}
        self.label = ""
        self.tally = tally
        self.opened = False  # the OPEN frame is known (sent or received)
        self.scheduled = False
        self.deficit_bytes = 0
        self.steered_sequence = 0  # the newest frame by which the opener told its class
        self.sent_raw_bytes = 0
        self.window = window
        self._owner = owner
        self._traffic_class = TrafficClass.CONTROL
        self._error: LifeboatError | None = None
        self._progress_at = time.monotonic()
        self._order = asyncio.Lock()
        self._sending = SendingHalf(identifier, peer_limit_bytes)
        self._receiving = ReceivingHalf(self, window)

    # -- what users see

    @property
    def traffic_class(self) -> TrafficClass:
        """The class in which this side sends; writable while open. The side that opened steers both."""
        return self._traffic_class

    @traffic_class.setter
    def traffic_class(self, value: TrafficClass) -> None:
        before, self._traffic_class = self._traffic_class, TrafficClass(value)
        if before != self._traffic_class:
            self.window.limits = CLASS_LIMITS[self._traffic_class]
            self._owner.reclassify(self, before)

    @property
    def received_raw_bytes(self) -> int:
        """Payload that has arrived in order."""
        return self._receiving.received_raw_bytes

    @property
    def idle_seconds(self) -> float:
        """Seconds since something of this stream last arrived or was acknowledged."""
        return time.monotonic() - self._progress_at

    @property
    def error(self) -> LifeboatError | None:
        """Why the stream was reset; None while it was not."""
        return self._error

    async def send(self, *parts: bytes | bytearray | memoryview) -> None:
        """Send one message made of ``parts``; returns when it is queued, which waits for room and credit.

        ``bytes`` are held until acknowledged, anything else is copied before the call returns.
        Raises StreamReset, Conflict after :meth:`close`, InvalidInput beyond MAX_MESSAGE_BYTES.
        """
        length = sum(part.nbytes if isinstance(part, memoryview) else len(part) for part in parts)
        if length > MAX_MESSAGE_BYTES:
            raise InvalidInput(
                f"message of {length} bytes on stream {self.kind!r}: at most {MAX_MESSAGE_BYTES} "
                f"are allowed; cut it"
            )
        async with self._order:
            self._check_sending()
            while self._sending.is_full(CLASS_LIMITS[self._traffic_class].send_queue_bytes):
                await self._sending.wait_room()
                self._check_sending()
            views = [
                memoryview(part if isinstance(part, bytes) else bytes(part)) for part in parts if len(part)
            ]
            self._sending.queue_message(views, length)
            self.sent_raw_bytes += length
        self._owner.activate(self)

    async def receive(self) -> bytes | None:
        """The next message; None when the other side has closed its sending half. Raises StreamReset."""
        while not self._receiving.has_message:
            if self._error is not None:
                raise StreamReset(self._error)
            if self._receiving.ended:
                return None
            await self._receiving.wait()
        message, made_room = self._receiving.next_message(time.monotonic())
        if made_room and self._error is None:
            self._owner.owe_acknowledgement(self, soon=True)
        return message

    async def close(self) -> None:
        """Say that nothing more will be sent; what is queued still goes. Closing twice is no error."""
        if self._sending.closed or self._error is not None:
            return
        self._sending.queue_close()
        self._owner.activate(self)

    async def drained(self) -> None:
        """Wait until all that was sent stands in the peer's application queue. Raises StreamReset."""
        while not self._sending.drained:
            if self._error is not None:
                raise StreamReset(self._error)
            await self._sending.wait_drained()
        if self._error is not None:
            raise StreamReset(self._error)

    def reset(self, error: LifeboatError) -> None:
        """End the stream at once: both sides' calls raise StreamReset with this cause and sentence."""
        if self._error is None and not self.over:
            self._owner.announce_reset(self, error)
            self.fail(error)

    # -- what the session calls

    @property
    def over(self) -> bool:
        """Both halves have ended and the peer knows it."""
        return self._error is not None or (self._receiving.ended and self._sending.close_acknowledged)

    @property
    def sending_closed(self) -> bool:
        """:meth:`close` was called."""
        return self._sending.closed

    @property
    def has_work(self) -> bool:
        """There may be a frame to send (credit is looked at later)."""
        return self._sending.has_work

    def begin(self, payload: bytes, traffic_class: TrafficClass) -> None:
        """Opener: queue the OPEN frame."""
        self._traffic_class = traffic_class
        self.window.limits = CLASS_LIMITS[traffic_class]
        self.window.begin()
        self.opened = True
        self._sending.queue_opening(payload)

    def fail(self, error: LifeboatError) -> None:
        """Reset without telling the peer: it told us, or it is gone."""
        if self._error is not None:
            return
        self._error = error
        self._sending.fail()
        self._receiving.fail()

    def discard(self) -> None:
        """Nobody reads any more: drop what comes until the peer closes its half."""
        if self._receiving.discard(time.monotonic()) and self._error is None:
            self._owner.owe_acknowledgement(self, soon=True)

    def next_frame(self, most_bytes: int) -> SentFrame | None:
        """The next frame to put on a connection, at most ``most_bytes`` of payload; None = nothing
        or no credit.
        """
        return self._sending.next_frame(most_bytes, self._traffic_class)

    def connection_lost(self, connection: object) -> None:
        """What went out on this connection and was not acknowledged has to go again."""
        if self._sending.connection_lost(connection):
            self._owner.activate(self)

    def acknowledged(self, next_sequence: int, limit_bytes: int, *, gone: bool) -> None:
        """The peer has everything before ``next_sequence`` and allows ``limit_bytes`` in all."""
        raw = self._sending.acknowledged(next_sequence, gone=gone)
        if raw is not None:
            self._progress_at = time.monotonic()
            self._owner.count_acknowledged(raw)
        if self._sending.allow(limit_bytes):
            self._owner.activate(self)
        if self.over:
            self._owner.forget(self)

    def arrived(self, frame: Frame) -> bool:
        """A numbered frame, in whatever order; False: it was here before. Raises ProtocolError on
        overrun credit.
        """
        now = time.monotonic()
        arrival = self._receiving.arrived(frame, now)
        if arrival is Arrival.EARLY:
            return True
        if arrival is Arrival.REPEATED:
            self._owner.owe_acknowledgement(self, soon=True)
            return False
        self._progress_at = now
        self._owner.owe_acknowledgement(self, soon=arrival is Arrival.PRESSING)
        if self.over:
            self._owner.forget(self)
        return True

    def acknowledgement(self) -> tuple[int, int]:
        """(next frame expected, limit in bytes) to tell the peer now."""
        return self._receiving.acknowledgement()

    def _check_sending(self) -> None:
        if self._error is not None:
            raise StreamReset(self._error)
        if self._sending.closed:
            raise Conflict(f"stream {self.kind!r} to {self.peer}: sending after close")
