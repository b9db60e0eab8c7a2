# SPDX-License-Identifier: GPL-3.0-or-later
"""What comes in on a stream: frames out of order -> parts of the message that arrives -> whole messages."""

from __future__ import annotations

import asyncio
import enum
from collections import deque
from typing import Protocol

from precache_proxy.channel.frames import FRAME_CHARGE_BYTES, MAX_MESSAGE_BYTES, Frame, FrameFlag, FrameType
from precache_proxy.channel.window import ReceiveWindow
from precache_proxy.errors import Conflict, ProtocolError


class Arrival(enum.Enum):
    """What a frame was."""

    REPEATED = enum.auto()
    EARLY = enum.auto()
    NEXT = enum.auto()
    # the next one, and the peer should hear of it soon
    PRESSING = enum.auto()


class Receiver(Protocol):
    """The stream, as far as its receiving half looks at it."""

    identifier: int
    kind: str
    opened: bool


class ReceivingHalf:
    """``window``: how much more may come than was taken."""

    def __init__(self, stream: Receiver, window: ReceiveWindow) -> None:
        self.window = window
        self.ended = False  # the peer has closed its sending half
        self.received_raw_bytes = 0
        self._stream = stream
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
        self._discarding = False
        self._waiter: asyncio.Future[None] | None = None

    # -- from the peer

    def arrived(self, frame: Frame, now: float) -> Arrival:
        """A numbered frame, in whatever order. Raises ProtocolError on overrun credit."""
        charge = len(frame.payload) + FRAME_CHARGE_BYTES
        if frame.sequence < self._expected or frame.sequence in self._early:
            return Arrival.REPEATED
        if self._arrived_charge + self._early_charge + charge > self._advertised + FRAME_CHARGE_BYTES:
            raise ProtocolError(
                f"stream {self._stream.identifier} ({self._stream.kind}): {charge} bytes beyond the credit "
                f"of {self._advertised}"
            )
        if frame.sequence != self._expected:
            self._early[frame.sequence] = frame
            self._early_charge += charge
            return Arrival.EARLY
        pressing = False
        following: Frame | None = frame
        while following is not None:
            pressing |= self._take(following, now)
            self._expected += 1
            following = self._early.pop(self._expected, None)
            if following is not None:
                self._early_charge -= len(following.payload) + FRAME_CHARGE_BYTES
        if not self._messages:
            # The reader waits for the rest of the message: that it has not taken it yet is not its fault.
            self.window.consumed(self._consumed_charge + self._parts_charge, now)
        pressing = (
            pressing
            or self._arrived_charge - self._acknowledged_charge >= self.window.acknowledge_bytes
            or self.window.size_bytes - self.window.initial_bytes > self._advertised
        )
        return Arrival.PRESSING if pressing else Arrival.NEXT

    def _take(self, frame: Frame, now: float) -> bool:
        """The next frame in order; whether it made room that the peer should hear of."""
        charge = len(frame.payload) + FRAME_CHARGE_BYTES
        stream = self._stream
        self._arrived_charge += charge
        if self.ended:
            raise ProtocolError(f"stream {stream.identifier} ({stream.kind}): data after its end")
        if frame.type is FrameType.DATA and stream.opened:
            self._parts.append(frame.payload)
            self._parts_bytes += len(frame.payload)
            self._parts_charge += charge
            self.received_raw_bytes += len(frame.payload)
            if self._parts_bytes > MAX_MESSAGE_BYTES:
                raise ProtocolError(
                    f"stream {stream.identifier} ({stream.kind}): message beyond {MAX_MESSAGE_BYTES} bytes"
                )
            if frame.flags & FrameFlag.END_OF_MESSAGE:
                message = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
                charge, self._parts, self._parts_bytes, self._parts_charge = self._parts_charge, [], 0, 0
                if self._discarding:
                    return self._consume(charge, now)
                self._messages.append((bytes(message), charge))
                self._wake()
            return False
        if frame.type is FrameType.CLOSE and stream.opened and not self._parts:
            self.ended = True
            self._wake()
        elif frame.type is not FrameType.OPEN or frame.sequence != 0:
            raise ProtocolError(
                f"stream {stream.identifier}: {frame.type.name} out of place (frame {frame.sequence})"
            )
        self._consumed_charge += charge
        return False

    def acknowledgement(self) -> tuple[int, int]:
        """(next frame expected, limit in bytes) to tell the peer now."""
        self._acknowledged_charge = self._arrived_charge
        # The message that is still arriving does not count: it could never become whole in a small window.
        limit = self._consumed_charge + self._parts_charge + self.window.size_bytes
        self._advertised = max(self._advertised, limit)
        return self._expected, self._advertised

    # -- to the reader

    @property
    def has_message(self) -> bool:
        """A whole message waits."""
        return bool(self._messages)

    async def wait(self) -> None:
        """Until there may be a message, the end or a failure. Raises Conflict."""
        if self._waiter is not None:
            raise Conflict(
                f"stream {self._stream.kind!r}: two tasks receive at once; only one can know the order"
            )
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def next_message(self, now: float) -> tuple[bytes, bool]:
        """The first message that waits, and whether the peer should hear of the room that it leaves."""
        message, charge = self._messages.popleft()
        return message, self._consume(charge, now)

    def discard(self, now: float) -> bool:
        """Drop what is here and what comes; whether the peer should hear of the room."""
        self._discarding = True
        made_room = False
        while self._messages:
            made_room |= self._consume(self._messages.popleft()[1], now)
        return made_room

    def fail(self) -> None:
        """Nothing of it will be read."""
        self._early.clear()
        self._parts.clear()
        self._messages.clear()
        self._wake()

    def _consume(self, charge: int, now: float) -> bool:
        self._consumed_charge += charge
        self.window.consumed(self._consumed_charge, now)
        if self.ended:
            return False
        limit = self._consumed_charge + self._parts_charge + self.window.size_bytes
        return limit - self._advertised >= self.window.size_bytes // 4

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
