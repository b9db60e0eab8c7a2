# SPDX-License-Identifier: GPL-3.0-or-later
"""From blocks to records: digest, compression that is given up at once, holes, and back pressure."""

from __future__ import annotations

import asyncio
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precache_proxy.errors import PeerUnreachable
from precache_proxy.source.feeder import QUEUE_BYTES, Compressor, Feeder
from precache_proxy.store.records import (
    HEADER,
    GenerationDigest,
    Record,
    RecordType,
    attachment_records,
    json_record,
)
from precache_proxy.units import KIB, MIB


class Wire:
    """Keeps what was sent; may be slow, or break."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None

    async def send(self, *parts: bytes | bytearray | memoryview) -> None:
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.messages.append(b"".join(bytes(part) for part in parts))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["vda", "vdb"]),
            st.integers(0, 2**40),
            st.integers(1, 200),
            st.sampled_from("zrt"),
        ),
        max_size=40,
    )
)
def test_what_the_store_decodes_is_what_went_in_with_the_same_digest(
    pieces: list[tuple[str, int, int, str]],
) -> None:
    async def run() -> None:
        wire = Wire()
        feeder = Feeder(wire, ["vda", "vdb"])
        expected: list[tuple[int, int, bytes]] = []
        for disk, offset, kib, kind in pieces:
            content = {
                "z": bytes(kib * KIB),
                "r": os.urandom(kib * KIB),
                "t": b"text and more " * (kib * KIB // 14 + 1),
            }[kind][: kib * KIB]
            expected.append((["vda", "vdb"].index(disk), offset, content))
            await feeder.data(disk, offset, memoryview(content))
        for record in attachment_records("nvram", b"variables"):
            await feeder.record(record)
        await feeder.record(json_record(RecordType.SEAL, {"a": 1}))
        await feeder.flush()
        digest = GenerationDigest()
        records = [Record.unpack(message) for message in wire.messages]
        for record in records:
            digest.update(record)
        assert digest.hexdigest() == feeder.digest
        blocks = [record for record in records if record.type in {RecordType.DATA, RecordType.ZERO}]
        assert [(one.disk, one.offset, bytes(one.payload) or bytes(one.length)) for one in blocks] == expected
        assert feeder.counts.data_bytes + feeder.counts.zero_bytes == sum(len(one[2]) for one in expected)
        await feeder.close()

    asyncio.run(run())


async def test_blocks_of_zeroes_go_as_holes() -> None:
    wire = Wire()
    feeder = Feeder(wire, ["vda"])
    await feeder.data("vda", 0, memoryview(bytes(MIB)))
    await feeder.zero("vda", MIB, 5 * 2**40)
    await feeder.flush()
    assert [len(message) for message in wire.messages] == [HEADER.size, HEADER.size]
    assert (feeder.counts.data_bytes, feeder.counts.zero_bytes) == (0, MIB + 5 * 2**40)
    await feeder.close()


def test_compression_is_given_up_at_once_where_it_does_not_pay_and_tried_again() -> None:
    compressor = Compressor()
    noise, text = os.urandom(64 * KIB), b"all work and no play " * 3200
    assert compressor(0, 0, noise) is None
    assert compressor(0, 64 * KIB, text) is None  # the pause after a miss
    packed = compressor(0, 128 * KIB, text)
    assert packed is not None
    assert len(packed) < len(text) / 10
    # another region knows nothing of this one's noise
    assert compressor(0, 10**9, text) is not None
    for number in range(600):
        compressor(1, number, noise)
    assert compressor(1, 0, text) is None


def test_the_memory_of_pauses_is_bounded() -> None:
    compressor = Compressor()
    noise = os.urandom(16 * KIB + 1)
    for region in range(6000):
        compressor(0, region * 16 * MIB, noise)
    assert len(compressor._pauses) <= 4097


async def test_a_link_that_stands_still_holds_the_reader_back() -> None:
    wire = Wire()
    wire.gate.clear()
    feeder = Feeder(wire, ["vda"])
    noise = os.urandom(MIB)
    sent = 0

    async def produce() -> None:
        nonlocal sent
        for number in range(100):
            await feeder.data("vda", number * MIB, noise)
            sent += 1

    producer = asyncio.create_task(produce())
    await asyncio.sleep(0.3)
    assert QUEUE_BYTES // MIB <= sent <= QUEUE_BYTES // MIB + 2
    wire.gate.set()
    await producer
    await feeder.flush()
    assert feeder.counts.data_bytes == 100 * MIB
    await feeder.close()


async def test_a_link_that_breaks_ends_the_reader_with_its_error() -> None:
    wire = Wire()
    feeder = Feeder(wire, ["vda"])
    wire.failure = PeerUnreachable("peer b: gone")
    with pytest.raises(PeerUnreachable, match="peer b: gone"):  # noqa: PT012
        for number in range(100):
            await feeder.data("vda", number * MIB, os.urandom(MIB))
        await feeder.flush()
    await feeder.close()
