# SPDX-License-Identifier: GPL-3.0-or-later
"""Blocks of an open view compared with the peer's sealed replica, digest by digest.

Serves resync (everything, nothing is counted), scrub (a slice inside an ordinary pass) and verify.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

from precache_proxy.blocks.extents import Extents
from precache_proxy.channel.link import Link
from precache_proxy.channel.settings import TrafficClass
from precache_proxy.channel.stream import Stream
from precache_proxy.errors import Cancelled, ProtocolError
from precache_proxy.source.reader import BLOCK_BYTES, DiskReader, Piece
from precache_proxy.units import MIB

DIGEST_BYTES = 32
ZERO_DIGEST = bytes(DIGEST_BYTES)
# So much of the disk is asked for in one stream.
_RANGE_BYTES = 256 * MIB
_workers = ThreadPoolExecutor(2, thread_name_prefix="compare")
_ZERO_BLOCK = bytes(BLOCK_BYTES)


def block_digest(block: bytes | memoryview) -> bytes:
    """SHA-256 of a block; a block of nothing but zeroes has the zero digest, so holes cost no hashing."""
    content = bytes(block)
    if content == _ZERO_BLOCK[: len(content)]:
        return ZERO_DIGEST
    return hashlib.sha256(content).digest()


def block_digests(data: memoryview) -> list[bytes]:
    """The digests of consecutive blocks (blocking)."""
    return [block_digest(data[at : at + BLOCK_BYTES]) for at in range(0, len(data), BLOCK_BYTES)]


def align(extents: Extents, size_bytes: int) -> Extents:
    """Grown to whole blocks, cut at the disk's end."""
    aligned = Extents()
    for start, end in extents:
        up = -(-end // BLOCK_BYTES) * BLOCK_BYTES
        aligned.add(start - start % BLOCK_BYTES, min(up, size_bytes))
    return aligned


class Comparison:
    """Compares with one sealed generation of the replica. Counts what it compared and what differed."""

    def __init__(self, link: Link, vm_uuid: str, generation: int) -> None:
        self.compared_bytes = 0
        self.different_bytes = 0
        self._link = link
        self._vm_uuid = vm_uuid
        self._generation = generation

    async def pieces(
        self, disk: str, reader: DiskReader, extents: Extents, over: Callable[[], bool]
    ) -> AsyncIterator[tuple[Piece, bool]]:
        """Every range of ``extents`` in ascending order, and whether its content differs from the replica."""
        for offset, length in align(extents, reader.size_bytes).pieces(_RANGE_BYTES):
            header = {
                "vm": self._vm_uuid,
                "disk": disk,
                "block_bytes": BLOCK_BYTES,
                "offset": offset,
                "length": length,
                "generation": self._generation,
            }
            stream = await self._link.open_stream(
                "digests", TrafficClass.PRECACHE, header, label=self._vm_uuid
            )
            digests = _Digests(stream, offset, offset + length)
            try:
                await stream.close()
                async for piece in reader.pieces(
                    Extents([(offset, offset + length)]), over, whole_blocks=True
                ):
                    async for part, differs in self._judge(piece, digests):
                        self.compared_bytes += part.length
                        if differs:
                            self.different_bytes += part.length
                        yield part, differs
            finally:
                await digests.finish()
            if over():
                return

    async def _judge(self, piece: Piece, digests: _Digests) -> AsyncIterator[tuple[Piece, bool]]:
        """``piece`` cut where equal and different blocks meet."""
        count = -(-piece.length // BLOCK_BYTES)
        theirs = await digests.take(piece.offset, count)
        if piece.data is None:
            ours = [ZERO_DIGEST] * count
        else:
            ours = await asyncio.get_running_loop().run_in_executor(_workers, block_digests, piece.data)
        equal = [mine == other for mine, other in zip(ours, theirs, strict=True)]
        start = 0
        for number in range(1, count + 1):
            if number < count and equal[number] == equal[start]:
                continue
            begin, end = start * BLOCK_BYTES, min(number * BLOCK_BYTES, piece.length)
            data = None if piece.data is None else piece.data[begin:end]
            yield Piece(piece.offset + begin, end - begin, data), not equal[start]
            start = number


class _Digests:
    """The digests of one range, as they arrive. Pieces may begin anywhere on a block's border."""

    def __init__(self, stream: Stream, offset: int, end: int) -> None:
        self._stream = stream
        self._end = end
        self._at = offset
        self._held = b""

    async def take(self, offset: int, count: int) -> list[bytes]:
        if offset != self._at or offset % BLOCK_BYTES:
            raise ProtocolError(f"digests at offset {self._at} cannot be compared with a piece at {offset}")
        while len(self._held) < count * DIGEST_BYTES:
            message = await self._stream.receive()
            if message is None:
                raise ProtocolError(
                    f"the peer ended its digests at offset {self._at}, before their range was over"
                )
            self._held += message
        taken, self._held = self._held[: count * DIGEST_BYTES], self._held[count * DIGEST_BYTES :]
        self._at += count * BLOCK_BYTES
        return [taken[at : at + DIGEST_BYTES] for at in range(0, len(taken), DIGEST_BYTES)]

    async def finish(self) -> None:
        """Take what is left so that the stream closes in order, or give it up."""
        if self._at >= self._end and not self._held and await self._stream.receive() is None:
            return
        self._stream.reset(Cancelled("no more digests are needed"))
