# SPDX-License-Identifier: GPL-3.0-or-later
"""Marks of a first copy: durable before they are told, and no hindrance to what comes behind them."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from precache_proxy.blocks.nbd import NbdClient
from precache_proxy.errors import HypervisorError
from precache_proxy.store.records import Record, RecordType, json_record
from precache_proxy.store.service import Store
from precache_proxy.units import KIB, MIB
from unit.store.store_driver import VM, Change, Handlers, Source, pack

SIZE = 4 * MIB


@pytest.fixture
async def source(store: Store) -> Source:
    source = Source(Handlers(store))
    source.resize(vda=SIZE)
    await source.prepare()
    return source


class Disk:
    """What is asked of it is noted, and a flush waits until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flushing, self.go_on = asyncio.Event(), asyncio.Event()
        self.written: list[int] = []
        self.at_flush: list[int] = []
        self.failure: HypervisorError | None = None
        flush, write = NbdClient.flush, NbdClient.write

        async def held(client: NbdClient) -> None:
            self.at_flush.append(len(self.written))
            self.flushing.set()
            await self.go_on.wait()
            if self.failure is not None:
                raise self.failure
            await flush(client)

        async def noted(client: NbdClient, offset: int, data: Any) -> None:
            await write(client, offset, data)
            self.written.append(offset)

        monkeypatch.setattr(NbdClient, "flush", held)
        monkeypatch.setattr(NbdClient, "write", noted)

    async def has(self, count: int) -> None:
        """Wait for so many writes."""
        async with asyncio.timeout(20):
            while len(self.written) < count:  # noqa: ASYNC110 - it is no event of ours
                await asyncio.sleep(0.01)


def data(source: Source, number: int) -> bytes:
    """The message with a block."""
    [record] = source.records([Change("vda", number * 64 * KIB, os.urandom(64 * KIB))])
    return pack(record)


def mark(number: int) -> bytes:
    """The message that says that so many blocks were sent."""
    return pack(json_record(RecordType.MARK, {"vda": number * 64 * KIB}))


async def seeded(store: Store) -> int:
    """Up to where the record says that the disk is held."""
    status = await store.status(VM)
    return int(status["seeding"]["vda"]) // (64 * KIB)


async def test_a_slow_flush_keeps_nothing_that_comes_next_from_being_written(
    store: Store, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    stream, task = source.handlers.open("seed", {"vm": VM, "epoch": 1, "disks": source.sizes})
    await source.handlers.send(stream, task, [data(source, 0), data(source, 1), mark(2)])
    await asyncio.wait_for(disk.flushing.wait(), 20)
    assert disk.at_flush == [2], "what the mark is about was answered before the flush was asked for"
    await source.handlers.send(stream, task, [data(source, 2), data(source, 3), None])
    await disk.has(4)
    await asyncio.sleep(0.1)
    assert stream.answers.empty()
    assert await seeded(store) == 0, "nothing of it is durable yet"
    assert not task.done()
    disk.go_on.set()
    await asyncio.wait_for(task, 20)
    assert Record.unpack(stream.answers.get_nowait() or b"").json() == {"vda": 2 * 64 * KIB}
    assert await seeded(store) == 2


async def test_a_mark_waits_for_the_one_before_it(
    store: Store, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    stream, task = source.handlers.open("seed", {"vm": VM, "epoch": 1, "disks": source.sizes})
    messages = [data(source, 0), mark(1), data(source, 1), mark(2), None]
    await source.handlers.send(stream, task, messages)
    await disk.has(2)
    await asyncio.sleep(0.1)
    assert disk.at_flush == [1]
    disk.go_on.set()
    await asyncio.wait_for(task, 20)
    told = [Record.unpack(stream.answers.get_nowait() or b"").json()["vda"] for _ in range(2)]
    assert told == [64 * KIB, 2 * 64 * KIB]
    assert await seeded(store) == 2


@pytest.mark.parametrize("more", [False, True], ids=["nothing more", "more"])
async def test_a_flush_that_fails_is_told_and_nothing_is_marked(
    store: Store, source: Source, monkeypatch: pytest.MonkeyPatch, more: bool
) -> None:
    disk = Disk(monkeypatch)
    disk.failure = HypervisorError("no medium")
    stream, task = source.handlers.open("seed", {"vm": VM, "epoch": 1, "disks": source.sizes})
    await source.handlers.send(stream, task, [data(source, 0), mark(1)])
    await asyncio.wait_for(disk.flushing.wait(), 20)
    if more:
        await source.handlers.send(stream, task, [data(source, 1)])
        await disk.has(2)
    disk.go_on.set()
    # Told now, and not with the next block, which may be long in coming.
    with pytest.raises(HypervisorError, match="no medium"):
        await asyncio.wait_for(task, 20)
    assert stream.answers.empty()
    assert await seeded(store) == 0
