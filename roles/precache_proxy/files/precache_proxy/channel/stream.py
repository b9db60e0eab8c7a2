# SPDX-License-Identifier: GPL-3.0-or-later
"""One stream: ordered, reliable messages in both directions, with credit; it outlives a TCP connection."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any, Protocol

from precache_proxy.channel.counters import Tally
from precache_proxy.channel.frames import (
    FRAME_CHARGE_BYTES,
    MAX_MESSAGE_BYTES,
    Frame,
    FrameFlag,
    FrameType,
)
from precache_proxy.channel.reset import StreamReset
from precache_proxy.channel.sent_frame import SentFrame
from precache_proxy.channel.settings import CLASS_LIMITS, TrafficClass
from precache_proxy.channel.window import ReceiveWindow
from precache_proxy.errors import Conflict, InvalidInput, LifeboatError, ProtocolError

_SMALLEST_FRAGMENT_BYTES = 16 * 1024


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
        self.received_raw_bytes = 0
        self._owner = owner
        self._traffic_class = TrafficClass.CONTROL
        self._error: LifeboatError | None = None
        self._progress_at = time.monotonic()
        # Sending half: pending messages -> unacknowledged frames (-> resend, when their connection broke).
        self._pending: deque[SentFrame] = deque()
        self._pending_offset = 0
        self._pending_bytes = 0
        self._next_sequence = 0
        self._unacknowledged: deque[SentFrame] = deque()
        self._resend: deque[SentFrame] = deque()
        self._sent_charge = 0
        self._peer_limit = peer_limit_bytes
        self._sending_closed = False
        self._close_acknowledged = False
        self._order = asyncio.Lock()
        self._room_waiters: list[asyncio.Future[None]] = []
        self._drain_waiters: list[asyncio.Future[None]] = []
        # Receiving half: frames out of order -> parts of the message that arrives -> whole messages.
        self.window = window
        self._expected = 0
        self._early: dict[int, Frame] = {}
        self._early_charge = 0
        self._parts: list[bytearray | bytes] = []
        self._parts_bytes = 0
        self._parts_charge = 0
        self._messages: deque[tuple[bytes, int]] = deque()
        self._arrived_charge = 0
        self._consumed_charge = 0
        self._advertised = window.initial_bytes
        self._acknowledged_charge = 0
        self._ended = False
        self._discarding = False
        self._receive_waiter: asyncio.Future[None] | None = None

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
            limit = CLASS_LIMITS[self._traffic_class].send_queue_bytes
            while self._pending_bytes >= limit or self._owes_too_many_frames():
                waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._room_waiters.append(waiter)
                await waiter
                self._check_sending()
                limit = CLASS_LIMITS[self._traffic_class].send_queue_bytes
            views = [
                memoryview(part if isinstance(part, bytes) else bytes(part)) for part in parts if len(part)
            ]
            self._pending.append(SentFrame(FrameType.DATA, FrameFlag.END_OF_MESSAGE, 0, views, length))
            self._pending_bytes += length + FRAME_CHARGE_BYTES
            self.sent_raw_bytes += length
        self._owner.activate(self)

    async def receive(self) -> bytes | None:
        """The next message; None when the other side has closed its sending half. Raises StreamReset."""
        while not self._messages:
            if self._error is not None:
                raise StreamReset(self._error)
            if self._ended:
                return None
            if self._receive_waiter is not None:
                raise Conflict(
                    f"stream {self.kind!r}: two tasks receive at once; only one can know the order"
                )
            self._receive_waiter = asyncio.get_running_loop().create_future()
            try:
                await self._receive_waiter
            finally:
                self._receive_waiter = None
        message, charge = self._messages.popleft()
        self._consume(charge)
        return message

    async def close(self) -> None:
        """Say that nothing more will be sent; what is queued still goes. Closing twice is no error."""
        if self._sending_closed or self._error is not None:
            return
        self._sending_closed = True
        self._pending.append(SentFrame(FrameType.CLOSE, 0, 0, [], 0))
        self._owner.activate(self)

    async def drained(self) -> None:
        """Wait until all that was sent stands in the peer's application queue. Raises StreamReset."""
        while self._pending or self._unacknowledged:
            if self._error is not None:
                raise StreamReset(self._error)
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._drain_waiters.append(waiter)
            await waiter
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
        return self._error is not None or (self._ended and self._close_acknowledged)

    @property
    def sending_closed(self) -> bool:
        """:meth:`close` was called."""
        return self._sending_closed

    @property
    def has_work(self) -> bool:
        """There may be a frame to send (credit is looked at later)."""
        return bool(self._resend or self._pending)

    def begin(self, payload: bytes, traffic_class: TrafficClass) -> None:
        """Opener: queue the OPEN frame."""
        self._traffic_class = traffic_class
        self.window.limits = CLASS_LIMITS[traffic_class]
        self.window.begin()
        self.opened = True
        self._pending.append(SentFrame(FrameType.OPEN, 0, 0, [memoryview(payload)], len(payload)))

    def fail(self, error: LifeboatError) -> None:
        """Reset without telling the peer: it told us, or it is gone."""
        if self._error is not None:
            return
        self._error = error
        self._pending.clear()
        self._unacknowledged.clear()
        self._resend.clear()
        self._early.clear()
        self._parts.clear()
        self._messages.clear()
        self._pending_bytes = 0
        self._wake_all()

    def discard(self) -> None:
        """Nobody reads any more: drop what comes until the peer closes its half."""
        self._discarding = True
        while self._messages:
            self._consume(self._messages.popleft()[1])

    def next_frame(self, most_bytes: int) -> SentFrame | None:
        """The next frame to put on a connection, at most ``most_bytes`` of payload; None = nothing
        or no credit.
        """
        if self._resend:
            frame = self._resend.popleft()
            frame.resent = True
            return frame
        if not self._pending:
            return None
        message = self._pending[0]
        room = self._peer_limit - self._sent_charge - FRAME_CHARGE_BYTES
        length = message.length - self._pending_offset
        if message.kind is FrameType.DATA:
            # No crumbs: a fragment is a whole rest of a message or worth its header.
            if room < min(length, _SMALLEST_FRAGMENT_BYTES):
                return None
            length = min(length, most_bytes, room)
        elif message.kind is FrameType.OPEN and room < length:
            return None
        if length == message.length:
            frame = message
            self._pending.popleft()
        else:
            frame = self._fragment(message, length)
        frame.sequence = self._next_sequence
        frame.traffic_class = self._traffic_class
        self._next_sequence += 1
        self._sent_charge += frame.length + FRAME_CHARGE_BYTES
        self._unacknowledged.append(frame)
        if frame.kind is FrameType.DATA:
            self._pending_bytes -= frame.length
            if frame.flags & FrameFlag.END_OF_MESSAGE:
                self._pending_bytes -= FRAME_CHARGE_BYTES
            self._wake_room()
        return frame

    def _fragment(self, message: SentFrame, length: int) -> SentFrame:
        end = self._pending_offset + length
        views, position = [], 0
        for view in message.views:
            first = max(self._pending_offset - position, 0)
            last = min(end - position, len(view))
            if first < last:
                views.append(view[first:last])
            position += len(view)
        flags = 0
        self._pending_offset = end
        if end == message.length:
            flags = int(FrameFlag.END_OF_MESSAGE)
            self._pending_offset = 0
            self._pending.popleft()
        return SentFrame(FrameType.DATA, flags, 0, views, length)

    def connection_lost(self, connection: object) -> None:
        """What went out on this connection and was not acknowledged has to go again."""
        lost = [frame for frame in self._unacknowledged if frame.connection is connection]
        if lost:
            for frame in lost:
                frame.connection = None
            self._resend = deque(sorted({*self._resend, *lost}, key=lambda frame: frame.sequence))
            self._owner.activate(self)

    def acknowledged(self, next_sequence: int, limit_bytes: int, *, gone: bool) -> None:
        """The peer has everything before ``next_sequence`` and allows ``limit_bytes`` in all."""
        if gone:
            next_sequence = self._next_sequence
        elif next_sequence > self._next_sequence:
            raise ProtocolError(
                f"stream {self.identifier}: frame {next_sequence} acknowledged but never sent"
            )
        progress = raw = 0
        while self._unacknowledged and self._unacknowledged[0].sequence < next_sequence:
            frame = self._unacknowledged.popleft()
            progress += 1
            if frame.kind is FrameType.DATA:
                raw += frame.length
            elif frame.kind is FrameType.CLOSE:
                self._close_acknowledged = True
        if progress:
            self._progress_at = time.monotonic()
            self._owner.count_acknowledged(raw)
            while self._resend and self._resend[0].sequence < next_sequence:
                self._resend.popleft()
            self._wake_room()
            if not self._unacknowledged and not self._pending:
                self._wake(self._drain_waiters)
        if limit_bytes > self._peer_limit:
            self._peer_limit = limit_bytes
            self._wake_room()
            if self._pending:
                self._owner.activate(self)
        if self.over:
            self._owner.forget(self)

    def arrived(self, frame: Frame) -> bool:
        """A numbered frame, in whatever order; False: it was here before. Raises ProtocolError on
        overrun credit.
        """
        charge = len(frame.payload) + FRAME_CHARGE_BYTES
        if frame.sequence < self._expected or frame.sequence in self._early:
            self._owner.owe_acknowledgement(self, soon=True)
            return False
        if self._arrived_charge + self._early_charge + charge > self._advertised + FRAME_CHARGE_BYTES:
            raise ProtocolError(
                f"stream {self.identifier} ({self.kind}): {charge} bytes beyond the credit of "
                f"{self._advertised}"
            )
        if frame.sequence != self._expected:
            self._early[frame.sequence] = frame
            self._early_charge += charge
            return True
        self._progress_at = time.monotonic()
        following: Frame | None = frame
        while following is not None:
            self._take(following)
            self._expected += 1
            following = self._early.pop(self._expected, None)
            if following is not None:
                self._early_charge -= len(following.payload) + FRAME_CHARGE_BYTES
        if not self._messages:
            # The reader waits for the rest of the message: that it has not taken it yet is not its fault.
            self.window.consumed(self._consumed_charge + self._parts_charge, self._progress_at)
        pressing = (
            self._arrived_charge - self._acknowledged_charge >= self.window.acknowledge_bytes
            or self.window.size_bytes - self.window.initial_bytes > self._advertised
        )
        self._owner.owe_acknowledgement(self, soon=pressing)
        if self.over:
            self._owner.forget(self)
        return True

    def acknowledgement(self) -> tuple[int, int]:
        """(next frame expected, limit in bytes) to tell the peer now."""
        self._acknowledged_charge = self._arrived_charge
        # The message that is still arriving does not count: it could never become whole in a small window.
        limit = self._consumed_charge + self._parts_charge + self.window.size_bytes
        self._advertised = max(self._advertised, limit)
        return self._expected, self._advertised

    def _take(self, frame: Frame) -> None:
        charge = len(frame.payload) + FRAME_CHARGE_BYTES
        self._arrived_charge += charge
        if self._ended:
            raise ProtocolError(f"stream {self.identifier} ({self.kind}): data after its end")
        if frame.type is FrameType.DATA and self.opened:
            self._parts.append(frame.payload)
            self._parts_bytes += len(frame.payload)
            self._parts_charge += charge
            self.received_raw_bytes += len(frame.payload)
            if self._parts_bytes > MAX_MESSAGE_BYTES:
                raise ProtocolError(
                    f"stream {self.identifier} ({self.kind}): message beyond {MAX_MESSAGE_BYTES} bytes"
                )
            if frame.flags & FrameFlag.END_OF_MESSAGE:
                message = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
                charge, self._parts, self._parts_bytes, self._parts_charge = self._parts_charge, [], 0, 0
                if self._discarding:
                    self._consume(charge)
                else:
                    self._messages.append((bytes(message), charge))
                    self._wake_receiver()
            return
        if frame.type is FrameType.CLOSE and self.opened and not self._parts:
            self._ended = True
            self._wake_receiver()
        elif frame.type is not FrameType.OPEN or frame.sequence != 0:
            raise ProtocolError(
                f"stream {self.identifier}: {frame.type.name} out of place (frame {frame.sequence})"
            )
        self._consumed_charge += charge

    def _consume(self, charge: int) -> None:
        self._consumed_charge += charge
        self.window.consumed(self._consumed_charge, time.monotonic())
        if not self._ended and self._error is None:
            limit = self._consumed_charge + self._parts_charge + self.window.size_bytes
            if limit - self._advertised >= self.window.size_bytes // 4:
                self._owner.owe_acknowledgement(self, soon=True)

    def _owes_too_many_frames(self) -> bool:
        # Credit bounds bytes in flight; without credit nothing more than one message waits here.
        return bool(self._pending) and self._peer_limit - self._sent_charge <= FRAME_CHARGE_BYTES

    def _check_sending(self) -> None:
        if self._error is not None:
            raise StreamReset(self._error)
        if self._sending_closed:
            raise Conflict(f"stream {self.kind!r} to {self.peer}: sending after close")

    def _wake_room(self) -> None:
        if self._room_waiters:
            self._wake(self._room_waiters)

    def _wake_receiver(self) -> None:
        if self._receive_waiter is not None and not self._receive_waiter.done():
            self._receive_waiter.set_result(None)

    def _wake_all(self) -> None:
        self._wake(self._room_waiters)
        self._wake(self._drain_waiters)
        self._wake_receiver()

    @staticmethod
    def _wake(waiters: list[asyncio.Future[None]]) -> None:
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        waiters.clear()
