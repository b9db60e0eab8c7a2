# SPDX-License-Identifier: GPL-3.0-or-later
"""A first copy's beginning and end: no round trip that nothing depends on, no mark taken for granted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from precache_proxy.blocks.extents import Extents
from precache_proxy.channel.link import Link
from precache_proxy.errors import ProtocolError
from precache_proxy.source.reader import Piece
from precache_proxy.source.seeding import Seeding
from precache_proxy.store.records import Record, RecordType, json_record
from precache_proxy.units import MIB

SIZE = 4 * MIB


class Peer:
    """The peer's end of a stream ``seed``: what it got, and its answers once ``work`` has told them."""

    def __init__(self, *, marks: bool = True) -> None:
        self.opened = 0
        self.records: list[Record] = []
        self.closed = asyncio.Event()
        self.reset_by: object = None
        self._marks = marks
        self._answers: list[bytes] = []

    async def open_stream(self, kind: str, *_unused: object, **_more: object) -> Peer:
        assert kind == "seed"
        self.opened += 1
        return self

    async def send(self, *parts: Any) -> None:
        assert not self.closed.is_set()
        self.records.append(Record.unpack(b"".join(bytes(part) for part in parts)))

    async def close(self) -> None:
        self.closed.set()

    def reset(self, error: object) -> None:
        self.reset_by = error

    async def receive(self) -> bytes | None:
        # As slow as a peer can be: nothing is answered before the last word of the other side has come.
        await self.closed.wait()
        if self._marks and not self._answers:
            marks = [record for record in self.records if record.type is RecordType.MARK]
            for mark in marks:
                self._answers.append(b"".join(map(bytes, json_record(RecordType.MARKED, mark.json()).pack())))
            self._marks = False
        return self._answers.pop(0) if self._answers else None


class View:
    """A disk of one kind of byte."""

    def __init__(self) -> None:
        self.readers = {"vda": self}
        self.size_bytes = SIZE

    def over(self) -> bool:
        return False

    def cut(self) -> bool:
        return False

    def reason(self) -> str:
        return ""

    async def allocated_bytes(self, start: int, end: int) -> int:
        return end - start

    async def pieces(self, extents: Extents, _over: object) -> AsyncIterator[Piece]:
        for start, end in extents:
            for at in range(start, end, MIB):
                yield Piece(at, MIB, memoryview(b"x" * MIB))

    @asynccontextmanager
    async def open(self, *_unused: object) -> AsyncIterator[View]:
        yield self


def a_seeding(peer: Peer, **more: Any) -> Seeding:
    return Seeding(
        cast(Link, peer), vm_uuid="vm", vm_name="web1", epoch=0, disks={"vda": SIZE},
        offsets=more.get("offsets", {}), mark_bytes=2 * MIB,
    )  # fmt: skip


async def test_the_end_is_told_with_the_last_mark_and_waits_for_every_answer() -> None:
    peer = Peer()
    seeding = a_seeding(peer)
    await asyncio.wait_for(seeding.run(cast(Any, View())), 10)
    marks = [record.json() for record in peer.records if record.type is RecordType.MARK]
    assert marks == [{"vda": 2 * MIB}, {"vda": SIZE}, {"vda": SIZE}]
    assert seeding.finished
    assert seeding.offsets == {"vda": SIZE}
    assert (peer.opened, peer.reset_by) == (1, None)


async def test_a_peer_that_ends_without_its_last_mark_holds_nothing_for_sure() -> None:
    peer = Peer(marks=False)
    seeding = a_seeding(peer)
    with pytest.raises(ProtocolError, match="without its last mark"):
        await asyncio.wait_for(seeding.run(cast(Any, View())), 10)
    assert not seeding.finished
    assert seeding.offsets == {"vda": 0}
    assert isinstance(peer.reset_by, ProtocolError)


@pytest.mark.parametrize("has_marks", [True, False], ids=["older-replica", "made-just-now"])
async def test_marks_are_taken_back_where_there_may_be_some(has_marks: bool) -> None:
    peer = Peer()
    seeding = a_seeding(peer, offsets={"vda": 2 * MIB})
    await seeding.begin_anew(has_marks=has_marks)
    assert seeding.offsets == {"vda": 0}
    assert [record.json() for record in peer.records] == ([{"vda": 0}] if has_marks else [])
    assert peer.opened == int(has_marks)
