# SPDX-License-Identifier: GPL-3.0-or-later
"""However a generation is cut into slices, whatever is written meanwhile: it is one instant."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precache_proxy.blocks.extents import Extents
from precache_proxy.channel.link import Link
from precache_proxy.channel.stream import StreamReset
from precache_proxy.errors import Conflict, HypervisorError, NoSpace
from precache_proxy.source.compare import block_digest
from precache_proxy.source.passes import Generation, GenerationPlan
from precache_proxy.source.reader import BLOCK_BYTES, DiskReader, Piece
from precache_proxy.source.tracker import checkpoint_name
from precache_proxy.source.views import View
from precache_proxy.store.records import GenerationDigest, Record, RecordType, json_record

BLOCKS = 12


class Guest:
    """Two disks, the bitmaps of checkpoints, and a guest that writes between any two steps."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.disks = {disk: bytearray(BLOCKS * BLOCK_BYTES) for disk in ("vda", "vdb")}
        self.bitmaps: dict[str, dict[str, Extents]] = {}
        self.instant: dict[str, bytes] = {}
        self.views = 0

    def checkpoint(self, name: str) -> None:
        self.bitmaps[name] = {disk: Extents() for disk in self.disks}

    def write(self, count: int) -> None:
        for _ in range(count):
            disk = self.random.choice(["vda", "vdb"])
            block = self.random.randrange(BLOCKS)
            start = block * BLOCK_BYTES
            value = self.random.choice([0, self.random.randrange(1, 256)])
            self.disks[disk][start : start + BLOCK_BYTES] = bytes([value]) * BLOCK_BYTES
            for bitmap in self.bitmaps.values():
                bitmap[disk].add(start, start + BLOCK_BYTES)


class FakeReader:
    """A disk at one instant."""

    def __init__(self, content: bytes, changed: Extents | None, tick: Callable[[], None]) -> None:
        self._content = content
        self._changed = changed
        self._tick = tick
        self.size_bytes = len(content)

    async def changed(self) -> Extents:
        return Extents([(0, self.size_bytes)]) if self._changed is None else self._changed.copy()

    async def pieces(
        self, extents: Extents, over: Callable[[], bool] = lambda: False, *, whole_blocks: bool = False
    ) -> AsyncIterator[Piece]:
        for offset, length in extents.pieces(BLOCK_BYTES):
            self._tick()
            data = self._content[offset : offset + length]
            yield Piece(offset, length, memoryview(data) if any(data) else None)
            if over():
                return


class Source:
    """Views that end after a number of pieces, some of them with an error as after an aborted job."""

    sliced = True

    def __init__(self, guest: Guest, budgets: list[int], writes: int) -> None:
        self.guest = guest
        self.budgets = budgets
        self.writes = writes
        self.aborts = False

    @contextlib.asynccontextmanager
    async def open(self, since: Mapping[str, str], checkpoint: str | None) -> AsyncIterator[View]:
        guest = self.guest
        left = self.budgets.pop(0) if self.budgets else 10**6
        guest.instant = {disk: bytes(content) for disk, content in guest.disks.items()}
        changed = {disk: guest.bitmaps[name][disk].copy() for disk, name in since.items()}
        if checkpoint is not None:
            guest.checkpoint(checkpoint)

        def tick() -> None:
            nonlocal left
            left -= 1
            if self.aborts and left < -1:
                raise HypervisorError("the NBD server closed the connection")
            guest.write(self.writes if self.guest.random.random() < 0.3 else 0)

        readers = {
            disk: cast(DiskReader, FakeReader(content, changed.get(disk), tick))
            for disk, content in guest.instant.items()
        }
        yield View(readers, lambda: left <= 0, lambda: self.aborts and left <= 0)
        guest.write(self.writes)


class Peer:
    """A link and the store behind it: applies records and seals."""

    def __init__(self, disks: dict[str, bytes]) -> None:
        self.disks = {disk: bytearray(content) for disk, content in disks.items()}
        self.refuse: Exception | None = None
        self.header: dict[str, Any] = {}
        self.records: list[Record] = []
        self.resets: list[Exception] = []

    async def open_stream(
        self, kind: str, _traffic_class: object, header: dict[str, Any], *, label: str = ""
    ) -> FakeStream:
        if kind == "generation":
            self.header = header
        return FakeStream(self, kind, header)


class FakeStream:
    """One stream to the peer."""

    def __init__(self, peer: Peer, kind: str, header: dict[str, Any]) -> None:
        self.peer = peer
        self.digest = GenerationDigest()
        self.answers: asyncio.Queue[bytes | None] = asyncio.Queue()
        if kind == "digests":
            content = peer.disks[header["disk"]][header["offset"] : header["offset"] + header["length"]]
            blocks = [content[at : at + BLOCK_BYTES] for at in range(0, len(content), BLOCK_BYTES)]
            self.answers.put_nowait(b"".join(block_digest(block) for block in blocks))
            self.answers.put_nowait(None)

    async def send(self, *parts: bytes | bytearray | memoryview) -> None:
        if self.peer.refuse is not None:
            raise self.peer.refuse
        record = Record.unpack(b"".join(bytes(part) for part in parts))
        self.peer.records.append(record)
        self.digest.update(record)
        if record.type in {RecordType.DATA, RecordType.ZERO}:
            disk = list(self.peer.header["disks"])[record.disk]
            content = bytes(record.payload) or bytes(record.length)
            self.peer.disks[disk][record.offset : record.offset + record.length] = content
        elif record.type == RecordType.SEAL:
            self.digest.compare(record.json()["digest"], "test")
            sealed = json_record(RecordType.SEALED, {"sealed_at": 1.0, "digest": self.digest.hexdigest()})
            self.answers.put_nowait(b"".join(bytes(part) for part in sealed.pack()))

    async def receive(self) -> bytes | None:
        return await self.answers.get()

    async def close(self) -> None:
        return

    def reset(self, error: Exception) -> None:
        self.peer.resets.append(error)


def plan_for(guest: Guest, **changes: Any) -> GenerationPlan:
    values: dict[str, Any] = {
        "vm_uuid": "u", "vm_name": "test", "definition_xml": "<x/>",
        "epoch": 0, "generation": 5, "leads_from": 4,
        "disks": {disk: len(content) for disk, content in guest.disks.items()},
        "since": dict.fromkeys(guest.disks, checkpoint_name(0, 4)),
    }  # fmt: skip
    return GenerationPlan(**{**values, **changes})


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    budgets=st.lists(st.integers(1, 15), max_size=4),
    writes=st.integers(0, 4),
    aborts=st.booleans(),
)
def test_what_is_sealed_is_the_instant_of_the_last_slice(
    seed: int, budgets: list[int], writes: int, aborts: bool
) -> None:
    async def run() -> None:
        guest = Guest(seed)
        guest.write(10)
        replica = {disk: bytes(content) for disk, content in guest.disks.items()}
        guest.checkpoint(checkpoint_name(0, 4))
        guest.write(8)
        peer = Peer(replica)
        source = Source(guest, list(budgets), writes)
        source.aborts = aborts
        generation = Generation(cast(Link, peer), plan_for(guest))
        answer = await generation.run(source)
        assert peer.disks == guest.instant
        assert answer["digest"] == generation.result.digest
        slices = range(1, generation.result.slices + 1)
        assert generation.made == [checkpoint_name(0, 5, number) for number in slices]
        # the sealing slice's checkpoint counts everything since: the next generation is complete, too
        since = guest.bitmaps[generation.made[-1]]
        for disk, content in guest.disks.items():
            for at in range(0, len(content), BLOCK_BYTES):
                same = content[at : at + BLOCK_BYTES] == peer.disks[disk][at : at + BLOCK_BYTES]
                assert same or at in since[disk]

    asyncio.run(run())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), budgets=st.lists(st.integers(1, 15), max_size=3), writes=st.integers(0, 3))
def test_a_resync_needs_no_bitmap(seed: int, budgets: list[int], writes: int) -> None:
    async def run() -> None:
        guest = Guest(seed)
        guest.write(30)
        replica = {disk: bytes(content) for disk, content in guest.disks.items()}
        guest.write(5)
        different = sum(
            guest.disks[disk][at : at + BLOCK_BYTES] != replica[disk][at : at + BLOCK_BYTES]
            for disk in replica
            for at in range(0, BLOCKS * BLOCK_BYTES, BLOCK_BYTES)
        )
        whole = {disk: Extents([(0, len(content))]) for disk, content in guest.disks.items()}
        peer = Peer(replica)
        generation = Generation(cast(Link, peer), plan_for(guest, since={}, compare=whole))
        await generation.run(Source(guest, list(budgets), writes))
        assert peer.disks == guest.instant
        if not writes:
            assert generation.result.different_bytes == different * BLOCK_BYTES
            assert generation.result.compared_bytes == 2 * BLOCKS * BLOCK_BYTES

    asyncio.run(run())


async def test_whoever_holds_the_vm_paces_all_that_is_sent() -> None:
    class Pace:
        asked_bytes = 0

        async def wait(self, count: int) -> None:
            self.asked_bytes += count

    guest = Guest(1)
    guest.write(10)
    replica = {disk: bytes(content) for disk, content in guest.disks.items()}
    guest.checkpoint(checkpoint_name(0, 4))
    guest.write(8)
    peer, pace = Peer(replica), Pace()
    generation = Generation(cast(Link, peer), plan_for(guest), pace)
    await generation.run(Source(guest, [], 0))
    assert peer.disks == guest.instant
    assert pace.asked_bytes == generation.result.wire_bytes > 0


async def test_a_refusal_ends_the_pass_at_once_and_names_the_checkpoints_to_take_back() -> None:
    guest = Guest(1)
    guest.checkpoint(checkpoint_name(0, 4))
    guest.write(8)
    peer = Peer({disk: bytes(content) for disk, content in guest.disks.items()})
    peer.refuse = StreamReset(NoSpace("replica of test/vda: no space"))
    generation = Generation(cast(Link, peer), plan_for(guest))
    with pytest.raises(StreamReset, match="no space") as caught:
        await generation.run(Source(guest, [], 0))
    assert caught.value.cause == "no-space"
    assert generation.made == [checkpoint_name(0, 5)]
    assert not generation.seal_sent
    assert peer.resets


async def test_a_disk_that_changes_its_size_meanwhile_is_left_to_the_next_pass() -> None:
    guest = Guest(1)
    guest.checkpoint(checkpoint_name(0, 4))
    peer = Peer({disk: bytes(content) for disk, content in guest.disks.items()})
    generation = Generation(cast(Link, peer), plan_for(guest, disks={"vda": 5, "vdb": BLOCKS * BLOCK_BYTES}))
    with pytest.raises(Conflict, match="VM test disk vda: its size changed from 5 to"):
        await generation.run(Source(guest, [], 0))
