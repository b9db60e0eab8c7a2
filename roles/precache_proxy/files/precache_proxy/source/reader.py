# SPDX-License-Identifier: GPL-3.0-or-later
"""What is to be sent of one disk, and its blocks, read with many requests in flight."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

from precache_proxy.blocks.extents import Extents
from precache_proxy.blocks.nbd import (
    ALLOCATION,
    ALLOCATION_DEPTH,
    NbdClient,
    dirty_bitmap,
    is_dirty,
    reads_zero,
)
from precache_proxy.units import GIB, KIB

REQUEST_BYTES = 512 * KIB
IN_FLIGHT = 16
# Allocation is asked for in steps, so that memory does not grow with the disk.
WINDOW_BYTES = 4 * GIB
# The bitmap's granularity: what is compared and repaired is whole blocks of it.
BLOCK_BYTES = 64 * KIB


# What is remembered of a disk may take 16 bytes a block; the sets that a pass has at once share that.
_BLOCKS_PER_RANGE = 8
_FEWEST_RANGES = 64


def most_ranges(size_bytes: int) -> int:
    """How many ranges a set of this disk may have: beyond that unchanged blocks in between go along."""
    return max(_FEWEST_RANGES, size_bytes // BLOCK_BYTES // _BLOCKS_PER_RANGE)


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of a disk: with its content, or None where it reads as zeroes."""

    offset: int
    length: int
    data: memoryview | None


class DiskReader:
    """A disk of an open view. Ranges beyond its end are cut off."""

    def __init__(self, client: NbdClient, bitmap: str | None = None, *, top_layer: bool = False) -> None:
        self.client = client
        self._bitmap = None if bitmap is None else dirty_bitmap(bitmap)
        self._top_layer = top_layer

    @property
    def size_bytes(self) -> int:
        """The size at the instant of the view."""
        return self.client.size_bytes

    async def changed(self) -> Extents:
        """What changed since the checkpoint, what the top layer holds itself, or else the whole disk."""
        limit = most_ranges(self.size_bytes)
        if self._top_layer:
            return await self.client.extents(ALLOCATION_DEPTH, lambda depth: depth == 1, limit=limit)
        if self._bitmap is None:
            return Extents([(0, self.size_bytes)])
        return await self.client.extents(self._bitmap, is_dirty, limit=limit)

    async def allocated_bytes(self, start: int, end: int) -> int:
        """How much of ``[start, end)`` does not read as zeroes."""
        allocated = end - start
        for at in range(start, end, WINDOW_BYTES):
            length = min(WINDOW_BYTES, end - at)
            allocated -= (await self.client.extents(ALLOCATION, reads_zero, at, length)).total_bytes
        return allocated

    async def pieces(
        self, extents: Extents, over: Callable[[], bool] = lambda: False, *, whole_blocks: bool = False
    ) -> AsyncIterator[Piece]:
        """The content of ``extents`` in ascending order until ``over()``; holes are told, not read.

        ``whole_blocks``: no piece begins or ends inside a block, except at the disk's end.
        """
        for window in _windows(extents, self.size_bytes):
            if over():
                return
            start, end = _span(window)
            zero = await self.client.extents(ALLOCATION, reads_zero, start, end - start)
            if whole_blocks:
                zero = _whole_blocks(zero, self.size_bytes)
            zeroes = iter(window.intersection(zero).pieces(WINDOW_BYTES))
            hole = next(zeroes, None)
            async for offset, length, data in self.client.read_extents(
                window.difference(zero), request_bytes=REQUEST_BYTES, in_flight=IN_FLIGHT
            ):
                while hole is not None and hole[0] < offset:
                    yield Piece(hole[0], hole[1], None)
                    hole = next(zeroes, None)
                yield Piece(offset, length, data)
                if over():
                    return
            while hole is not None:
                yield Piece(hole[0], hole[1], None)
                hole = next(zeroes, None)

    @classmethod
    def contexts(cls, bitmap: str | None, *, top_layer: bool = False) -> list[str]:
        """The meta contexts to ask for when connecting."""
        if top_layer:
            return [ALLOCATION, ALLOCATION_DEPTH]
        return [ALLOCATION] if bitmap is None else [dirty_bitmap(bitmap), ALLOCATION]


def _span(window: Extents) -> tuple[int, int]:
    ranges = list(window)
    return ranges[0][0], ranges[-1][1]


def _whole_blocks(extents: Extents, size_bytes: int) -> Extents:
    """The blocks that lie in ``extents`` with all their bytes."""
    whole = Extents()
    for start, end in extents:
        stop = end if end >= size_bytes else end - end % BLOCK_BYTES
        whole.add(-(-start // BLOCK_BYTES) * BLOCK_BYTES, stop)
    return whole


def _windows(extents: Extents, size_bytes: int) -> Iterable[Extents]:
    """``extents`` within the disk, cut where a window of the disk ends."""
    window = Extents()
    limit = WINDOW_BYTES
    for start, end in extents:
        at, stop = start, min(end, size_bytes)
        while at < stop:
            if at >= limit:
                if len(window):
                    yield window
                    window = Extents()
                limit = (at // WINDOW_BYTES + 1) * WINDOW_BYTES
            part = min(stop, limit)
            window.add(at, part)
            at = part
    if len(window):
        yield window
