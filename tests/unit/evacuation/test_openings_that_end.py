# SPDX-License-Identifier: GPL-3.0-or-later
"""Held connections that end unheard, and clients that say nothing: nobody waits, and no move ends for it."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precache_proxy.channel.reset import StreamReset
from precache_proxy.errors import LifeboatError, NotUsed, ProtocolError
from precache_proxy.evacuation import libvirt_frames, nbd_frames
from precache_proxy.evacuation.known_openings import QUESTIONS_LIMIT, KnownOpenings, OpeningHeard
from precache_proxy.evacuation.packing import Packer, Unpacker
from precache_proxy.evacuation.relay import DISK, LIBVIRT, RelayStream
from precache_proxy.evacuation.replaceable_stream import KEPT_BYTES, ReplaceableStream
from unit.evacuation.openings_ground import (
    JOB,
    OPENING,
    PING,
    REST,
    Ground,
    answer_to,
    converse,
    ground,
    procedures,
    soon,
    with_serials,
)
from unit.evacuation.test_mirrors_ahead import prepare_passes, replies_of_server, serve_two_exports

EXPORT = "drive-virtio-disk0"
REQUEST = struct.Struct(">IHHQQQ")
# To a flush with cookie 1: done.
ANSWERED = REQUEST.pack(0x6E8A278C, 1, 0, 1, 0, 0)


@asynccontextmanager
async def held(made: Ground) -> AsyncIterator[None]:
    made.ahead.begin_libvirt()
    await soon(lambda: made.libvirtd.procedures and len(made.libvirtd.procedures[0]) == len(OPENING))
    await asyncio.sleep(0.05)
    yield


@pytest.mark.parametrize("told", [True, False])
async def test_an_end_that_is_heard_only_after_the_first_call_costs_nothing(told: bool) -> None:
    """``told``: libvirt here had its opening when the connection there ended."""
    async with ground() as made:
        made.ends_are_late_seconds = 0.3
        async with held(made):
            calls = with_serials([*OPENING, REST])
            reader, writer = await asyncio.open_unix_connection(made.sockets.path(LIBVIRT))
            answers = b"".join(answer_to(raw) for raw in calls[:-1])
            if told:
                writer.write(b"".join(calls[:-1]))
                assert await reader.readexactly(len(answers)) == answers
            made.libvirtd.writers[0].close()
            await soon(lambda: made.libvirtd.open == 0)
            if told:
                writer.write(calls[-1])
                expected = answer_to(calls[-1])
            else:
                writer.write(b"".join(calls))
                expected = answers + answer_to(calls[-1])
            assert await asyncio.wait_for(reader.readexactly(len(expected)), 5) == expected
            assert made.plain == [LIBVIRT]
            assert made.libvirtd.procedures[0] == procedures(OPENING), "it never saw what came too late"
            assert made.libvirtd.procedures[-1] == procedures(calls)
            assert made.failures == []
            # And it goes on, in both directions.
            more = libvirt_frames.with_serial(REST, 99)
            made.libvirtd.answer = lambda raw: PING + answer_to(raw)
            writer.write(more)
            expected = PING + answer_to(more)
            assert await asyncio.wait_for(reader.readexactly(len(expected)), 5) == expected
            writer.close()
            await soon(lambda: made.libvirtd.open == 0)


async def test_a_mirrors_first_requests_are_sent_again_too() -> None:
    async with ground() as made:
        made.ends_are_late_seconds = 0.3
        path = made.far_directory / JOB / "disk.sock"
        writers: list[asyncio.StreamWriter] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            await serve_two_exports(reader, writer)

        server = await asyncio.start_unix_server(serve, path)
        made.ahead.begin_libvirt()
        requests = nbd_frames.opening(EXPORT, 10_000_000)
        made.ahead.begin(DISK, requests)
        await prepare_passes(made)
        await soon(lambda: writers)
        await asyncio.sleep(0.05)
        writers[0].close()
        await asyncio.sleep(0.05)
        reader, writer = await asyncio.open_unix_connection(made.sockets.path(DISK))
        writer.write(b"".join(requests) + bytes(40))
        expected = nbd_frames.GREETING + b"\0\3" + b"".join(replies_of_server(raw) for raw in requests[2:])
        expected += b"0" * 40
        assert await asyncio.wait_for(reader.readexactly(len(expected)), 5) == expected
        assert made.plain == [DISK]
        writer.close()
        server.close()


@pytest.mark.parametrize("second", ["ahead", "plain"])
async def test_a_second_connection_of_an_export_ends_what_is_answered_here(second: str) -> None:
    """A flush of the first has to bring to the disk what the second has written."""
    flush = REQUEST.pack(0x21E41C71, 0, 3, 1, 0, 0)
    async with ground() as made:
        path = made.far_directory / JOB / "disk.sock"
        server = await asyncio.start_unix_server(serve_two_exports, path)
        made.ahead.begin_libvirt()
        requests = nbd_frames.opening(EXPORT, 10_000_000)
        for _one in range(2 if second == "ahead" else 1):
            made.ahead.begin(DISK, requests)
        await prepare_passes(made)
        handshake = nbd_frames.GREETING + b"\0\3" + b"".join(replies_of_server(raw) for raw in requests[2:])
        readers, writers = [], []
        for _one in range(2):
            reader, writer = await asyncio.open_unix_connection(made.sockets.path(DISK))
            # The first one's first flush has nothing to flush, and is answered here.
            writer.write(b"".join(requests) + flush)
            assert await asyncio.wait_for(reader.readexactly(len(handshake)), 5) == handshake
            if not readers:
                assert await asyncio.wait_for(reader.readexactly(32), 5) == ANSWERED
            readers.append(reader)
            writers.append(writer)
        assert made.plain == ([] if second == "ahead" else [DISK])
        # This one says back what comes to it, as many bytes.
        assert await asyncio.wait_for(readers[1].readexactly(32), 5) == b"0" * 32
        writers[0].write(flush)
        assert await asyncio.wait_for(readers[0].readexactly(32), 5) == b"0" * 32
        for writer in writers:
            writer.close()
        server.close()


async def test_a_connection_that_ends_after_it_was_used_is_not_replaced() -> None:
    async with ground() as made, held(made):
        calls = with_serials([*OPENING, REST])
        reader, writer = await asyncio.open_unix_connection(made.sockets.path(LIBVIRT))
        for raw in calls:
            writer.write(raw)
            await reader.readexactly(len(answer_to(raw)))
        made.libvirtd.writers[0].close()
        assert await asyncio.wait_for(reader.read(), 5) == b""
        assert made.plain == []
        writer.close()


class Far:
    """A stream that is fed, and keeps what it is sent."""

    def __init__(self, *heard: bytes | LifeboatError) -> None:
        self.heard = list(heard)
        self.sent: list[bytes] = []
        self.closed = False
        self.over: LifeboatError | None = None
        self.idle_seconds = 0.0

    async def send(self, *parts: bytes | bytearray | memoryview) -> None:
        if self.heard and isinstance(self.heard[0], LifeboatError):
            raise self.heard[0]
        self.sent.append(b"".join(bytes(part) for part in parts))

    async def receive(self) -> bytes | None:
        if not self.heard:
            return None
        if isinstance(self.heard[0], LifeboatError):
            raise self.heard[0]
        first = self.heard.pop(0)
        assert isinstance(first, bytes)
        return first

    async def close(self) -> None:
        self.closed = True

    async def drained(self) -> None:
        if self.heard and isinstance(self.heard[0], LifeboatError):
            raise self.heard[0]

    def reset(self, error: LifeboatError) -> None:
        self.over = error


def lost() -> LifeboatError:
    """As it comes out of the channel."""
    return StreamReset(NotUsed("the connection that was held has ended"))


@settings(max_examples=50)
@given(
    st.lists(st.binary(min_size=1, max_size=200), max_size=8),
    st.integers(0, 8),
    st.lists(st.binary(min_size=1, max_size=200), max_size=5),
    st.binary(max_size=50),
    st.booleans(),
)
def test_all_that_was_sent_comes_on_the_other_once_and_in_order(
    pieces: list[bytes], early: int, answers: list[bytes], rest: bytes, closes: bool
) -> None:
    """``early``: how many are sent before the old stream is heard to have ended."""

    async def run() -> None:
        packer, unpacker = Packer(), Unpacker()
        old = Far()
        new = Far(*(b"".join(packer.pack(one)) for one in answers))

        async def another() -> tuple[RelayStream, Unpacker, bytes]:
            return new, unpacker, rest

        stream = ReplaceableStream(old, another)
        for piece in pieces[:early]:
            await stream.send(piece[:1], piece[1:])
        old.heard.append(lost())
        for piece in pieces[early:]:
            await stream.send(piece)
        await stream.drained()
        if closes:
            await stream.close()
        heard, reader = b"", Unpacker()
        while (message := await stream.receive()) is not None:
            heard += reader.unpack(message)
        assert heard == rest + b"".join(answers)
        assert new.sent == pieces
        assert new.closed == closes

    asyncio.run(run())


@pytest.mark.parametrize(
    "error", [ProtocolError("it spoke"), StreamReset(LifeboatError("link lost"))], ids=["spoke", "link"]
)
async def test_any_other_end_is_an_end(error: LifeboatError) -> None:
    async def another() -> Any:
        raise AssertionError("nothing says that what was sent has not arrived")

    stream = ReplaceableStream(Far(error), another)
    for call in (stream.receive(), stream.send(b"x"), stream.drained()):
        with pytest.raises(type(error)):
            await call


async def test_once_and_no_more_and_of_little_only() -> None:
    asked = 0

    async def another() -> tuple[RelayStream, Unpacker, bytes]:
        nonlocal asked
        asked += 1
        return Far(lost()), Unpacker(), b""

    stream = ReplaceableStream(Far(lost()), another)
    with pytest.raises(LifeboatError):
        await stream.receive()
    assert asked == 1

    old = Far()
    stream = ReplaceableStream(old, another)
    await stream.send(bytes(KEPT_BYTES))
    await stream.send(b"x")
    old.heard.append(lost())
    with pytest.raises(LifeboatError):
        await stream.receive()

    stream = ReplaceableStream(Far(b"\0answer", lost()), another)
    await stream.send(b"x")
    assert await stream.receive() == b"\0answer"
    with pytest.raises(LifeboatError):
        await stream.receive()
    assert asked == 1, "what was answered has arrived"


async def test_a_relay_that_ends_meanwhile_leaves_no_new_stream_behind() -> None:
    new, made = Far(), asyncio.Event()

    async def another() -> tuple[RelayStream, Unpacker, bytes]:
        await made.wait()
        return new, Unpacker(), b""

    stream = ReplaceableStream(Far(lost()), another)
    receiving = asyncio.create_task(stream.receive())
    await asyncio.sleep(0)
    stream.reset(ProtocolError("called off"))
    made.set()
    with pytest.raises(ProtocolError, match="called off"):
        await receiving
    assert new.over is not None


async def test_who_asks_nothing_is_carried_as_ever_after_a_while() -> None:
    async with ground() as made, held(made):
        made.ahead._stall_seconds = 0.3
        calls = with_serials([*OPENING, REST])
        reader, writer = await asyncio.open_unix_connection(made.sockets.path(LIBVIRT))
        writer.write(calls[0] + calls[1][:10])
        assert await reader.readexactly(len(answer_to(calls[0]))) == answer_to(calls[0])
        await soon(lambda: made.plain == [LIBVIRT])
        await soon(lambda: made.libvirtd.open == 1)
        writer.write(calls[1][10:] + b"".join(calls[2:]))
        expected = b"".join(answer_to(raw) for raw in calls[1:])
        assert await asyncio.wait_for(reader.readexactly(len(expected)), 5) == expected
        writer.close()


async def test_who_takes_his_time_after_the_opening_goes_on_with_what_was_held() -> None:
    async with ground() as made, held(made):
        made.ahead._stall_seconds = 0.2
        calls = with_serials([*OPENING, REST])
        reader, writer = await asyncio.open_unix_connection(made.sockets.path(LIBVIRT))
        writer.write(b"".join(calls[:-1]))
        expected = b"".join(answer_to(raw) for raw in calls)
        told = await reader.readexactly(len(expected) - len(answer_to(REST)))
        await asyncio.sleep(0.5)
        writer.write(calls[-1])
        told += await asyncio.wait_for(reader.readexactly(len(answer_to(REST))), 5)
        assert told == expected
        assert made.plain == []
        writer.close()


async def test_nobody_waits_for_longer_than_an_opening_over_the_wan_takes() -> None:
    async with ground() as made:
        made.ahead._ready_seconds = 30.0
        made.ahead._round_trip = lambda: 0.04
        made.ahead.begin(DISK, nbd_frames.opening(EXPORT, 10_000_000))

        async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"hello")

        server = await asyncio.start_unix_server(serve, made.far_directory / JOB / "disk.sock")
        began = time.monotonic()
        reader, writer = await asyncio.open_unix_connection(made.sockets.path(DISK))
        assert await asyncio.wait_for(reader.readexactly(5), 5) == b"hello"
        assert 0.2 < time.monotonic() - began < 1.0, "four round trips are what could be saved"
        assert made.plain == [DISK]
        writer.close()
        server.close()


def heard(pieces: Sequence[bytes]) -> tuple[bytes, ...]:
    known = KnownOpenings()
    opening = OpeningHeard(known, "backup1", [])
    for piece in pieces:
        opening.hear(piece)
    return known.of("backup1")


def test_an_opening_is_learnt_whole_or_not_at_all() -> None:
    new = libvirt_frames.supports_feature(99)
    calls = with_serials([new, *OPENING])
    assert heard([*calls, REST]) == (new, *OPENING)
    assert heard([*calls, PING, libvirt_frames.PONG, REST, new]) == (new, *OPENING)
    assert heard(calls) == OPENING, "it broke off"
    assert heard([new] * (QUESTIONS_LIMIT + 1) + [REST]) == OPENING
    assert heard([bytes(28)]) == OPENING, "nothing was asked"


@given(st.lists(st.integers(1, 60), max_size=60))
def test_an_opening_is_learnt_however_it_is_cut(cuts: list[int]) -> None:
    new = libvirt_frames.supports_feature(99)
    content = b"".join([*with_serials([*OPENING[:3], new]), PING, *OPENING[3:], REST])
    pieces = []
    for cut in cuts:
        pieces.append(content[:cut])
        content = content[cut:]
    assert heard([*pieces, content]) == (*OPENING[:3], new, *OPENING[3:])


async def test_what_was_held_and_died_teaches_no_half_of_an_opening() -> None:
    async with ground() as made, held(made):
        reader, writer = await asyncio.open_unix_connection(made.sockets.path(LIBVIRT))
        calls = with_serials([*OPENING, REST])
        writer.write(calls[0])
        await reader.readexactly(len(answer_to(calls[0])))
        made.libvirtd.writers[0].close()
        await soon(lambda: made.libvirtd.open == 0)
        await asyncio.sleep(0.05)
        writer.write(b"".join(calls[1:]))
        await reader.readexactly(sum(len(answer_to(raw)) for raw in calls[1:]))
        assert made.known.of("backup1") == OPENING
        writer.close()


async def test_the_next_opening_is_what_was_learnt() -> None:
    async with ground() as made, held(made):
        calls = with_serials([libvirt_frames.supports_feature(99), REST])
        assert await converse(made, calls) == [answer_to(raw) for raw in calls]
        await soon(lambda: made.libvirtd.open == 0)
        made.ahead.begin_libvirt()
        assert await converse(made, calls) == [answer_to(raw) for raw in calls]
        assert made.plain == [LIBVIRT]
