# SPDX-License-Identifier: GPL-3.0-or-later
"""A first copy's beginning and end: no round trip that nothing depends on, no mark taken for granted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from precache_proxy.blocks.extents import Extents
from precache_proxy.channel.link import Link
from precache_proxy.errors import ProtocolError
from precache_proxy.source.reader import Piece
from precache_proxy.source.record import ProtectionRecord
from precache_proxy.source.replication import Replication
from precache_proxy.source.seeding import Seeding
from precache_proxy.source.settings import SourceSettings
from precache_proxy.store.records import Record, RecordType, json_record
from precache_proxy.store.service import Store
from precache_proxy.store.settings import StoreSettings
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


VM = "11111111-2222-4333-8444-555555555578"


async def test_a_replica_that_was_made_anew_unheard_is_filled_from_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it is new is told once; who was cut just then has the marks of the replica before it."""
    store = Store(tmp_path / "store", tmp_path / "run", StoreSettings(2, 0))
    await store.start()
    made = asyncio.Event()

    class SlowPeer(Peer):
        async def call(self, method: str, parameters: dict[str, Any], **_unused: object) -> dict[str, Any]:
            assert method == "store.prepare"
            answer = await store.prepare("home1", parameters)
            if not made.is_set():
                made.set()
                await asyncio.Event().wait()  # the answer never comes
            return answer

    peer = SlowPeer()
    record = ProtectionRecord(
        VM, "web1", "backup1", 15.0, seeding_checkpoint="lifeboat-e0-g0", seeding_offsets={"vda": 2 * MIB}
    )
    environment = SimpleNamespace(
        directory=tmp_path, link=lambda _peer: peer, settings=SourceSettings("home1", ("backup1",))
    )
    replication = Replication(record, cast(Any, environment))

    async def look() -> tuple[Any, Any, bool]:
        return SimpleNamespace(xml="<domain/>"), SimpleNamespace(tracked=["vda"]), True

    async def sizes(*_unused: object, **_more: object) -> dict[str, int]:
        return {"vda": SIZE}

    async def first_copy_bytes(*_unused: object) -> int:
        return SIZE

    async def it_counts_still(*_unused: object, **_more: object) -> None: ...

    monkeypatch.setattr(replication.disks, "look", look)
    monkeypatch.setattr(replication.disks, "sizes", sizes)
    monkeypatch.setattr(replication.disks, "first_copy_bytes", first_copy_bytes)
    monkeypatch.setattr(replication.disks, "source", lambda *_unused, **_more: View())
    monkeypatch.setattr(replication, "_keep_seeding_checkpoint", it_counts_still)
    cut = asyncio.create_task(replication.seed())
    await asyncio.wait_for(made.wait(), 5)
    cut.cancel()
    await asyncio.gather(cut, return_exceptions=True)
    assert (await store.status(VM))["exists"]
    await asyncio.wait_for(replication.seed(), 10)
    data = [record.offset for record in peer.records if record.type is RecordType.DATA]
    assert data == [0, MIB, 2 * MIB, 3 * MIB]
    assert record.seeding_offsets == {"vda": SIZE}
    await store.stop()
