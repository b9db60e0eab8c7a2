# SPDX-License-Identifier: GPL-3.0-or-later
"""What goes out on a stream: pending messages -> unacknowledged frames -> (their connection broke) resend.

It knows credit and numbers, no sessions and no clock.
"""

from __future__ import annotations

import asyncio
from collections import deque

from precache_proxy.channel.frames import FRAME_CHARGE_BYTES, FrameFlag, FrameType
from precache_proxy.channel.sent_frame import SentFrame
from precache_proxy.channel.settings import TrafficClass
from precache_proxy.errors import ProtocolError

_SMALLEST_FRAGMENT_BYTES = 16 * 1024


class SendingHalf:
    """``peer_limit_bytes``: the credit to begin with."""

    def __init__(self, identifier: int, peer_limit_bytes: int) -> None:
        self.closed = False  # nothing more will be queued
        self.close_acknowledged = False
        self.pending_bytes = 0
        self._identifier = identifier
        self._pending: deque[SentFrame] = deque()
        self._pending_offset = 0
        self._next_sequence = 0
        self._unacknowledged: deque[SentFrame] = deque()
        self._resend: deque[SentFrame] = deque()
        self._sent_charge = 0
        self._peer_limit = peer_limit_bytes
        self._room_waiters: list[asyncio.Future[None]] = []
        self._drain_waiters: list[asyncio.Future[None]] = []

    @property
    def has_work(self) -> bool:
        """There may be a frame to send (credit is looked at later)."""
        return bool(self._resend or self._pending)

    @property
    def drained(self) -> bool:
        """All that was queued is acknowledged."""
        return not self._pending and not self._unacknowledged

    # -- into it

    def queue_opening(self, payload: bytes) -> None:
        """The OPEN frame."""
        self._pending.append(SentFrame(FrameType.OPEN, 0, 0, [memoryview(payload)], len(payload)))

    def queue_message(self, views: list[memoryview], length: int) -> None:
        """A whole message."""
        self._pending.append(SentFrame(FrameType.DATA, FrameFlag.END_OF_MESSAGE, 0, views, length))
        self.pending_bytes += length + FRAME_CHARGE_BYTES

    def queue_close(self) -> None:
        """The CLOSE frame, after all that was queued before."""
        self.closed = True
        self._pending.append(SentFrame(FrameType.CLOSE, 0, 0, [], 0))

    def is_full(self, limit_bytes: int) -> bool:
        """Whether a message more has to wait."""
        # Credit bounds bytes in flight; without credit nothing more than one message waits here.
        return self.pending_bytes >= limit_bytes or (
            bool(self._pending) and self._peer_limit - self._sent_charge <= FRAME_CHARGE_BYTES
        )

    async def wait_room(self) -> None:
        """Until it may not be full any more, or has failed."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._room_waiters.append(waiter)
        await waiter

    async def wait_drained(self) -> None:
        """Until it may be drained, or has failed."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._drain_waiters.append(waiter)
        await waiter

    # -- out of it

    def next_frame(self, most_bytes: int, traffic_class: TrafficClass) -> SentFrame | None:
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
        frame.traffic_class = traffic_class
        self._next_sequence += 1
        self._sent_charge += frame.length + FRAME_CHARGE_BYTES
        self._unacknowledged.append(frame)
        if frame.kind is FrameType.DATA:
            self.pending_bytes -= frame.length
            if frame.flags & FrameFlag.END_OF_MESSAGE:
                self.pending_bytes -= FRAME_CHARGE_BYTES
            _wake(self._room_waiters)
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

    # -- what becomes of it

    def connection_lost(self, connection: object) -> bool:
        """What went out on this connection and was not acknowledged has to go again; whether there is any."""
        lost = [frame for frame in self._unacknowledged if frame.connection is connection]
        for frame in lost:
            frame.connection = None
        if lost:
            self._resend = deque(sorted({*self._resend, *lost}, key=lambda frame: frame.sequence))
        return bool(lost)

    def acknowledged(self, next_sequence: int, *, gone: bool) -> int | None:
        """The peer has everything before ``next_sequence`` (``gone``: whatever was sent). So many bytes of
        messages are news; None where it had all that before. Raises ProtocolError.
        """
        if gone:
            next_sequence = self._next_sequence
        elif next_sequence > self._next_sequence:
            raise ProtocolError(
                f"stream {self._identifier}: frame {next_sequence} acknowledged but never sent"
            )
        progress = raw = 0
        while self._unacknowledged and self._unacknowledged[0].sequence < next_sequence:
            frame = self._unacknowledged.popleft()
            progress += 1
            if frame.kind is FrameType.DATA:
                raw += frame.length
            elif frame.kind is FrameType.CLOSE:
                self.close_acknowledged = True
        if not progress:
            return None
        while self._resend and self._resend[0].sequence < next_sequence:
            self._resend.popleft()
        _wake(self._room_waiters)
        if self.drained:
            _wake(self._drain_waiters)
        return raw

    def allow(self, limit_bytes: int) -> bool:
        """The peer allows so much in all; whether that is more than before, and wanted."""
        if limit_bytes <= self._peer_limit:
            return False
        self._peer_limit = limit_bytes
        _wake(self._room_waiters)
        return bool(self._pending)

    def fail(self) -> None:
        """Nothing of it will be sent."""
        self._pending.clear()
        self._unacknowledged.clear()
        self._resend.clear()
        self.pending_bytes = 0
        _wake(self._room_waiters)
        _wake(self._drain_waiters)


def _wake(waiters: list[asyncio.Future[None]]) -> None:
    if waiters:
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        waiters.clear()
