# SPDX-License-Identifier: GPL-3.0-or-later
"""A stream to a connection that was held ready, and that may have ended before anything of ours reached it.

The destination says so by the cause ``not-used`` (held_opening.py): it has dropped what we sent, and the
libvirt or QEMU there has never seen it. Only then, and at most once, a new connection is brought to where the
old one was and is sent the same; whoever speaks here does not notice. Any other end is an end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from precache_proxy.errors import LifeboatError, NotUsed
from precache_proxy.evacuation.packing import PIECE_BYTES, RAW, Unpacker
from precache_proxy.evacuation.relay import RelayStream

logger = logging.getLogger(__name__)

# What libvirt says first, its Prepare, is a tenth of this; of what is longer no copy is kept.
KEPT_BYTES: Final = 2 * PIECE_BYTES
# A new stream, its unpacker, and what of the new connection is unpacked already.
Another = Callable[[], Awaitable[tuple[RelayStream, Unpacker, bytes]]]


class ReplaceableStream:
    """What a relay needs of a stream (relay.RelayStream). ``another`` gives the new one."""

    def __init__(self, stream: RelayStream, another: Another) -> None:
        self._stream = stream
        self._another: Another | None = another
        # What was sent, while nobody has said that it has arrived.
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self._closed = False
        self._over: LifeboatError | None = None
        # Of a new stream: messages of it are unpacked here, for it has begun before its relay.
        self._unpacker: Unpacker | None = None
        self._rest = b""
        # Nothing is sent beside the replacement, or it would come before what was sent first.
        self._order = asyncio.Lock()

    @property
    def idle_seconds(self) -> float:
        """Of the stream that it is now."""
        return self._stream.idle_seconds

    async def send(self, *parts: bytes | bytearray | memoryview) -> None:
        """Send one message, and keep a copy for as long as it may have to be sent again."""
        async with self._order:
            if self._another is not None:
                message = b"".join(bytes(part) for part in parts)
                self._kept.append(message)
                self._kept_bytes += len(message)
                if self._kept_bytes > KEPT_BYTES:
                    self._settle()
            try:
                await self._stream.send(*parts)
            except LifeboatError as error:
                # Whoever receives hears the same, and sends it again.
                if not self._may_be_replaced(error):
                    raise

    async def receive(self) -> bytes | None:
        """The next message. The first one says that what was sent has arrived."""
        while True:
            if self._rest:
                piece, self._rest = self._rest[:PIECE_BYTES], self._rest[PIECE_BYTES:]
                return RAW + piece
            try:
                message = await self._stream.receive()
            except LifeboatError as error:
                if not self._may_be_replaced(error):
                    raise
                await self._replace(error)
                continue
            self._settle()
            if message is None or self._unpacker is None:
                return message
            return RAW + self._unpacker.unpack(message)

    async def close(self) -> None:
        """Nothing more will be sent."""
        async with self._order:
            self._closed = True
            await self._stream.close()

    async def drained(self) -> None:
        """Wait until all that was sent has arrived; of a stream that is to be replaced nobody asks that."""
        try:
            await self._stream.drained()
        except LifeboatError as error:
            if not self._may_be_replaced(error):
                raise

    def reset(self, error: LifeboatError) -> None:
        """End it, and let none come in its place."""
        self._over = error
        self._settle()
        self._stream.reset(error)

    def _may_be_replaced(self, error: LifeboatError) -> bool:
        return self._another is not None and error.cause == NotUsed.cause

    def _settle(self) -> None:
        self._another = None
        self._kept.clear()

    async def _replace(self, error: LifeboatError) -> None:
        async with self._order:
            another, kept = self._another, list(self._kept)
            if another is None:
                raise error
            logger.info("%s; what was sent on it is sent on another", error)
            # From here on one more end is the end.
            self._another = None
            stream, self._unpacker, self._rest = await another()
            self._stream = stream
            with contextlib.ExitStack() as undo:
                undo.callback(stream.reset, LifeboatError("relay: its connection was given up"))
                if self._over is not None:
                    raise self._over
                for message in kept:
                    await stream.send(message)
                if self._closed:
                    await stream.close()
                undo.pop_all()
            self._kept.clear()
