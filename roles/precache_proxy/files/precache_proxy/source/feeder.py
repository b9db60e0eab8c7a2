# SPDX-License-Identifier: GPL-3.0-or-later
"""Blocks become records on a stream: compressed where it pays, digested in order, counted."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import zstandard

from precache_proxy.store.records import DIGESTED, Flag, Payload, Record, RecordType
from precache_proxy.units import KIB, MIB

MAX_PAYLOAD_BYTES = MIB
# How much is read ahead of the link: enough to keep it busy while the next slice's job opens.
QUEUE_BYTES = 24 * MIB
# what a record takes in memory beside its payload: many holes in a row are records too
_RECORD_BYTES = 256
_REGION_BYTES = 16 * MIB
_SAMPLE_BYTES = 4 * KIB
# Compression is worth its time when it takes off at least a tenth.
_WORTH = 0.9
_LONGEST_PAUSE = 64
_FAST_LEVEL = 1
_SLOW_LINK_LEVEL = 3
_ZEROES = bytes(MAX_PAYLOAD_BYTES)

# Shared by all passes: compression and hashing leave the interpreter's lock, so two threads are two cores.
_workers = ThreadPoolExecutor(2, thread_name_prefix="feeder")


class RecordStream(Protocol):
    """What the feeder needs of a channel stream."""

    async def send(self, *parts: bytes | bytearray | memoryview) -> None:
        """Send one message."""


class Pace(Protocol):
    """Holds back what is sent."""

    async def wait(self, count: int) -> None:
        """Return when that many bytes may be sent."""


class Compressor:
    """Decides per region of a disk whether to compress. Not for several threads at once."""

    def __init__(self) -> None:
        self.level = _FAST_LEVEL
        self._compressors: dict[int, zstandard.ZstdCompressor] = {}
        # region -> (records still to leave alone, how long the last such pause was)
        self._pauses: dict[tuple[int, int], tuple[int, int]] = {}

    def _compress(self, data: bytes | memoryview) -> bytes:
        compressor = self._compressors.get(self.level)
        if compressor is None:
            compressor = zstandard.ZstdCompressor(level=self.level, write_checksum=False)
            self._compressors[self.level] = compressor
        return compressor.compress(data)

    def __call__(self, disk: int, offset: int, data: bytes) -> bytes | None:
        """The compressed form, or None where it is not worth it."""
        region = (disk, offset // _REGION_BYTES)
        left, pause = self._pauses.get(region, (0, 0))
        if left > 0:
            self._pauses[region] = (left - 1, pause)
            return None
        if len(data) > 4 * _SAMPLE_BYTES:
            middle = len(data) // 2
            sample = self._compress(memoryview(data)[middle : middle + _SAMPLE_BYTES])
            worth = len(sample) < _SAMPLE_BYTES * _WORTH
        else:
            worth = True
        packed = self._compress(data) if worth else b""
        if worth and len(packed) < len(data) * _WORTH:
            self._pauses.pop(region, None)
            return packed
        pause = min(max(1, pause * 2), _LONGEST_PAUSE)
        if len(self._pauses) > 4096:  # bounded, whatever the disk's size: only recent regions matter
            self._pauses.clear()
        self._pauses[region] = (pause, pause)
        return None


@dataclass
class FeedCounts:
    """What went into the stream."""

    data_bytes: int = 0
    zero_bytes: int = 0
    payload_bytes: int = 0
    records: int = 0


@dataclass
class _Batch:
    """Records that one call in a thread prepares together."""

    records: list[tuple[RecordType, int, int, int, bytes]] = field(default_factory=list)
    raw_bytes: int = 0


class Feeder:
    """Orders, compresses, digests and sends. ``disks`` is the order of the stream's header.

    Producers call :meth:`data`, :meth:`zero`, ... which wait while the queue is full; one task sends.
    """

    def __init__(
        self,
        stream: RecordStream,
        disks: Sequence[str],
        *,
        digest: bool = True,
        pace: Pace | None = None,
    ) -> None:
        self.counts = FeedCounts()
        self._stream = stream
        self._pace = pace
        self._index = {key: number for number, key in enumerate(disks)}
        self._hash = hashlib.sha256() if digest else None
        self._compressor = Compressor()
        self._batch = _Batch()
        self._queue: asyncio.Queue[_Batch] = asyncio.Queue()
        self._queued_bytes = 0
        self._room = asyncio.Condition()
        self._failure: BaseException | None = None
        self._prepared: asyncio.Queue[tuple[list[tuple[bytes, Payload]], int]] = asyncio.Queue(1)
        self._tasks = [
            asyncio.create_task(self._guarded(work)) for work in (self._prepare_all(), self._send_all())
        ]
        self._waited_seconds = 0.0

    @property
    def digest(self) -> str:
        """Of all records so far; only after :meth:`flush`."""
        return "" if self._hash is None else self._hash.hexdigest()

    async def data(self, disk: str, offset: int, payload: bytes | memoryview) -> None:
        """Blocks with content; blocks of nothing but zeroes go as a hole."""
        content = bytes(payload)
        kind = RecordType.ZERO if content == _ZEROES[: len(content)] else RecordType.DATA
        if kind == RecordType.ZERO:
            await self.zero(disk, offset, len(content))
        else:
            await self._add(kind, self._index[disk], offset, len(content), content)

    async def zero(self, disk: str, offset: int, length: int) -> None:
        """A range that reads as zeroes."""
        await self._add(RecordType.ZERO, self._index[disk], offset, length, b"")

    async def record(self, record: Record) -> None:
        """A record that is none of a disk's content: SLICE, SEAL, MARK, a piece of an ATTACHMENT."""
        await self._add(record.type, record.disk, record.offset, record.length, bytes(record.payload))

    async def flush_queue(self) -> None:
        """Hand what was added so far to the sending task, without waiting for it."""
        await self._push()

    async def flush(self) -> None:
        """Wait until everything was handed to the stream. Raises what stopped the sender."""
        await self._push()
        async with self._room:
            await self._room.wait_for(lambda: self._queued_bytes == 0 or self._failure is not None)
        self._check()

    async def close(self) -> None:
        """End the sending tasks; what is still queued is dropped."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def _add(self, kind: RecordType, disk: int, offset: int, length: int, payload: bytes) -> None:
        self._check()
        batch = self._batch
        batch.records.append((kind, disk, offset, length, payload))
        batch.raw_bytes += len(payload) + _RECORD_BYTES
        if batch.raw_bytes >= MAX_PAYLOAD_BYTES or len(batch.records) >= 64:
            await self._push()

    async def _push(self) -> None:
        batch, self._batch = self._batch, _Batch()
        if not batch.records:
            return
        async with self._room:
            await self._room.wait_for(lambda: self._queued_bytes < QUEUE_BYTES or self._failure is not None)
            self._check()
            self._queued_bytes += batch.raw_bytes
        self._queue.put_nowait(batch)

    async def _prepare_all(self) -> None:
        """One batch after the other, for the digest has their order; one is made while one is sent."""
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._queue.get()
            await self._prepared.put(
                (await loop.run_in_executor(_workers, self._prepare, batch), batch.raw_bytes)
            )

    async def _send_all(self) -> None:
        while True:
            parts, raw_bytes = await self._prepared.get()
            began = time.monotonic()
            for header, payload in parts:
                self.counts.payload_bytes += len(header) + len(payload)
                if self._pace is not None:
                    await self._pace.wait(len(header) + len(payload))
                await self._stream.send(header, payload)
            self._steer(time.monotonic() - began)
            async with self._room:
                self._queued_bytes -= raw_bytes
                self._room.notify_all()

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001 - whatever it was, the producers have to end with it
            async with self._room:
                self._failure = self._failure or error
                self._room.notify_all()

    def _steer(self, waited_seconds: float) -> None:
        """A link that we wait for is worth more of the processor."""
        self._waited_seconds = 0.8 * self._waited_seconds + 0.2 * waited_seconds
        self._compressor.level = _SLOW_LINK_LEVEL if self._waited_seconds > 0.01 else _FAST_LEVEL

    def _prepare(self, batch: _Batch) -> list[tuple[bytes, Payload]]:
        """In a worker thread: digest in order, compress, pack."""
        parts: list[tuple[bytes, Payload]] = []
        counts = self.counts
        for kind, disk, offset, length, payload in batch.records:
            record = Record(kind, disk, offset, length, payload)
            counts.records += 1
            if kind == RecordType.DATA:
                counts.data_bytes += length
            elif kind == RecordType.ZERO:
                counts.zero_bytes += length
            if self._hash is not None and kind in DIGESTED:
                self._hash.update(record.digest_header())
                self._hash.update(payload)
            packed = self._compressor(disk, offset, payload) if kind == RecordType.DATA else None
            parts.append(record.pack(packed, Flag.ZSTD) if packed is not None else record.pack())
        return parts
