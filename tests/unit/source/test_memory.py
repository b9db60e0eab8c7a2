# SPDX-License-Identifier: GPL-3.0-or-later
"""What a pass remembers of a disk is bounded by 16 bytes for each 64 KiB of it, however it was written."""

from __future__ import annotations

import asyncio
import contextlib
import tracemalloc
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from precache_proxy.blocks import images
from precache_proxy.blocks.export import open_export
from precache_proxy.blocks.extents import Extents
from precache_proxy.blocks.nbd import NbdClient
from precache_proxy.channel.link import Link
from precache_proxy.source.passes import Generation, GenerationPlan
from precache_proxy.source.reader import BLOCK_BYTES, DiskReader, Piece
from precache_proxy.source.views import View
from precache_proxy.store.records import Record, RecordType, json_record
from precache_proxy.units import GIB, MIB

DISK_BYTES = 8 * GIB
BOUND_BYTES = DISK_BYTES // BLOCK_BYTES * 16
# what a pass takes whatever the disk: one answer of an NBD server, some records on their way
FIXED_BYTES = 3 * MIB


class Statuses(NbdClient):
    """A server that tells of every other block that it changed, as many entries an answer as a real one."""

    def __init__(self, first: int) -> None:
        super().__init__("test")
        self.size_bytes = DISK_BYTES
        self.contexts = ("qemu:dirty-bitmap:dirty",)
        self._first = first

    async def block_status(
        self, context: str, offset: int = 0, length: int | None = None
    ) -> list[tuple[int, int, int]]:
        assert context in self.contexts
        assert length is not None
        return [
            (at, BLOCK_BYTES, (at // BLOCK_BYTES) % 2 == self._first)
            for at in range(offset, offset + length, BLOCK_BYTES)
        ]


class Reader(DiskReader):
    """Of such a disk; what is read are zeroes, and of 64 ranges one is told, and the last."""

    async def pieces(
        self, extents: Extents, over: Callable[[], bool] = lambda: False, *, whole_blocks: bool = False
    ) -> AsyncIterator[Piece]:
        for number, (start, end) in enumerate(extents):
            if number % 64 and number < len(extents) - 1:
                continue
            yield Piece(start, end - start, None)
            if over():
                return


class Source:
    """Views of which the first is over in the midst of the disk, the second sees the other blocks changed."""

    sliced = True

    def __init__(self) -> None:
        self.views = 0

    @contextlib.asynccontextmanager
    async def open(self, since: Mapping[str, str], checkpoint: str | None) -> AsyncIterator[View]:
        self.views += 1
        pieces = 0

        def over() -> bool:
            nonlocal pieces
            pieces += 1
            return self.views == 1 and pieces > 100

        yield View({"vda": Reader(Statuses(self.views % 2), "dirty")}, over)


class Store:
    """Takes everything and acknowledges the seal."""

    def __init__(self) -> None:
        self._sealed: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def open_stream(self, *_arguments: object, **_keywords: object) -> Store:
        return self

    async def send(self, *parts: bytes | memoryview) -> None:
        record = Record.unpack(b"".join(bytes(part) for part in parts))
        if record.type is RecordType.SEAL:
            content: dict[str, Any] = record.json()
            value = {"generation": 1, "sealed_at": 1.0, "digest": content["digest"]}
            self._sealed.set_result(
                b"".join(bytes(part) for part in json_record(RecordType.SEALED, value).pack())
            )

    async def receive(self) -> bytes:
        return await self._sealed

    async def close(self) -> None: ...

    def reset(self, error: Exception) -> None:
        raise error


async def test_a_pass_over_the_most_fragmented_disk_stays_within_the_bound() -> None:
    uuid = "11111111-1111-4111-8111-111111111111"
    disks, since = {"vda": DISK_BYTES}, {"vda": "checkpoint"}
    plan = GenerationPlan(uuid, "web1", 0, 1, 0, "<domain/>", disks, since)
    source = Source()
    tracemalloc.start()
    try:
        generation = Generation(cast(Link, Store()), plan)
        await generation.run(source)
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert source.views == 2
    assert generation.result.zero_bytes > 0
    assert peak <= BOUND_BYTES + FIXED_BYTES, f"{peak} bytes, {BOUND_BYTES} for the disk"


@pytest.mark.parametrize("size_bytes", [GIB, 1024 * GIB])
async def test_a_large_sparse_disk_takes_no_more_than_a_small_one(tmp_path: Path, size_bytes: int) -> None:
    path = tmp_path / "disk.qcow2"
    await images.create(path, size_bytes)
    export = await open_export(path, format="qcow2", socket_directory=tmp_path / "nbd", name="read")
    try:
        client = await NbdClient.connect(export.socket, "", DiskReader.contexts(None), subject="disk")
        tracemalloc.start()
        async with client:
            reader = DiskReader(client)
            assert await reader.allocated_bytes(0, reader.size_bytes) == 0
            read = 0
            async for piece in reader.pieces(await reader.changed()):
                assert piece.data is None
                read += piece.length
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        await export.kill()
    assert read == size_bytes
    assert peak < MIB
