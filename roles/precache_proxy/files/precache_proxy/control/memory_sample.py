# SPDX-License-Identifier: GPL-3.0-or-later
"""What a guest's memory will be on the wire: a sample of its pages is read while it runs, and packed.

Half a forecast is this ratio: memory that is never touched, or full of zeros, costs nothing to move, and the
rest packs to a tenth or not at all.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import libvirt
import zstandard

from precache_proxy.units import GIB, KIB

PIECE_BYTES = 128 * KIB
_PAGE_BYTES = 4 * KIB
# Of each guest in each second. Memory that is in use lies in lumps: 32 pieces told 10 to 34 MB of idle guests
# of 96 MiB of which 22 crossed.
PIECES_PER_SECOND = 32
# Whatever machine type: this is memory, and what lies between may be devices.
_LOW_END, _HIGH_BEGIN, _HOLE_BYTES = 2 * GIB, 4 * GIB, 2 * GIB
_NOTHING = bytes(_PAGE_BYTES)
# The real stream is packed over a window as long as the memory, a sample sees only itself. Eight samples of
# idle guests of 96 MiB came to 25 MB each where 22.4 MB crossed; such memory packs to 0.49 in short windows.
# What is full of page cache packs to 0.86 in short windows as in long ones. Else a straight line.
_ALONE_AND_GAIN = ((0.49, 0.89), (0.86, 1.0))
_LEAST_GAIN = 0.8


def offsets(memory_bytes: int, pieces: int, chance: random.Random) -> list[int]:
    """Guest-physical addresses to look at, one at random in each of ``pieces`` equal parts of the memory."""
    low = min(memory_bytes, _LOW_END)
    high = max(0, memory_bytes - _LOW_END - _HOLE_BYTES)
    part = (low + high) // pieces
    told = []
    for number in range(pieces):
        at = number * part + int(chance.random() * max(1, part - PIECE_BYTES))
        at -= at % _PAGE_BYTES
        if at < low:
            told.append(max(0, min(at, low - PIECE_BYTES)))
        else:
            told.append(_HIGH_BEGIN + at - low)
    return told


def without_nothing(piece: bytes) -> bytes:
    """The pages of a piece that are not all zero: those others are a mark of some bytes in the stream."""
    pages = (piece[at : at + _PAGE_BYTES] for at in range(0, len(piece), _PAGE_BYTES))
    return b"".join(page for page in pages if page != _NOTHING)


def long_window_gain(packed_share: float) -> float:
    """What a sample's packed size is to be multiplied with, given the share that packing it alone left."""
    (low, low_gain), (high, high_gain) = _ALONE_AND_GAIN
    gain = low_gain + (packed_share - low) * (high_gain - low_gain) / (high - low)
    return min(1.0, max(_LEAST_GAIN, gain))


class Sample:
    """One guest's sample, taken piece by piece; of a small memory fewer than ``pieces``."""

    def __init__(self, memory_bytes: int, pieces: int, chance: random.Random) -> None:
        self.memory_bytes = memory_bytes
        self._offsets = offsets(memory_bytes, max(1, min(pieces, memory_bytes // PIECE_BYTES)), chance)
        chance.shuffle(self._offsets)
        # One stream, as the real one: what repeats from piece to piece costs once.
        self._packer = zstandard.ZstdCompressor(level=1).compressobj()
        self._seen = self._packed = self._something = 0

    def take(self, peek: Callable[[int, int], bytes]) -> bool:
        """Look at one more piece; False: there are no more."""
        if not self._offsets:
            return False
        piece = peek(self._offsets.pop(), PIECE_BYTES)
        self._seen += len(piece)
        something = without_nothing(piece)
        self._something += len(something)
        self._packed += len(self._packer.compress(something))
        self._packed += len(self._packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
        return True

    @property
    def wire_bytes(self) -> float | None:
        """What all of the memory would be on the wire; None: too little was seen."""
        if self._seen < 8 * PIECE_BYTES:
            return None
        gain = long_window_gain(self._packed / self._something) if self._something else 1.0
        return self.memory_bytes * self._packed * gain / self._seen


def _peek_at(domain: Any) -> Callable[[int, int], bytes]:
    return lambda at, count: bytes(domain.memoryPeek(at, count, libvirt.VIR_MEMORY_PHYSICAL))


def sample_memories(connection: Any, vms: Mapping[str, int], seconds: float, pieces: int) -> dict[str, float]:
    """Wire bytes of the memory of running guests (UUID to bytes of memory), in turn until time is over, or
    each was looked at in so many places."""
    chance = random.Random()
    samples = {uuid: Sample(size, pieces, chance) for uuid, size in vms.items() if size >= 16 * PIECE_BYTES}
    peeks: dict[str, Callable[[int, int], bytes]] = {}
    for uuid in samples:
        with contextlib.suppress(libvirt.libvirtError):
            domain = connection.lookupByUUIDString(uuid)
            peeks[uuid] = _peek_at(domain)
    until = time.monotonic() + seconds
    while peeks and time.monotonic() < until:
        for uuid in list(peeks):
            more = False
            with contextlib.suppress(libvirt.libvirtError):
                more = samples[uuid].take(peeks[uuid])
            if not more:
                del peeks[uuid]
    told = {uuid: sample.wire_bytes for uuid, sample in samples.items()}
    return {uuid: count for uuid, count in told.items() if count is not None}
