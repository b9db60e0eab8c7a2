# SPDX-License-Identifier: GPL-3.0-or-later
"""Openings that are made ahead: libvirt hears the same as over the WAN, and does not notice when it fails."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precache_proxy.errors import Conflict, InvalidInput, ProtocolError
from precache_proxy.evacuation import held_opening, libvirt_frames, nbd_frames
from precache_proxy.evacuation.relay import DISK, LIBVIRT, connect_locally
from unit.evacuation.openings_ground import (
    EVENT,
    JOB,
    OPENING,
    PING,
    PREPARE,
    REST,
    Ground,
    answer_to,
    converse,
    ground,
    procedures,
    soon,
    with_serials,
)


def test_the_opening_is_what_libvirt_was_seen_to_send() -> None:
    """Logged on the relay of the lab, libvirt 11.3."""
    assert OPENING[2].hex() == (
        "000000382000808600000001000000010000000000000000000000000000000"
        "10000000e71656d753a2f2f2f73797374656d000000000000"
    )
    assert all(libvirt_frames.is_opening_call(raw) for raw in OPENING)
    assert nbd_frames.opening("drive-virtio-disk0", 10_000_007)[2:] == (
        bytes.fromhex("49484156454f50540000000b00000000"),
        bytes.fromhex(
            "49484156454f50540000000a0000002d0000001264726976652d76697274696f2d6469736b30000000010000000f62"
            "6173653a616c6c6f636174696f6e"
        ),
        bytes.fromhex("49484156454f5054000000070000001a0000001264726976652d76697274696f2d6469736b3000010003"),
    )


async def test_libvirt_hears_the_destinations_answers_before_any_stream_is_opened() -> None:
    async with ground() as made:
        made.ahead.begin_libvirt()
        await soon(lambda: made.libvirtd.procedures and len(made.libvirtd.procedures[0]) == len(OPENING))
        calls = with_serials([*OPENING, REST])
        assert await converse(made, calls) == [answer_to(raw) for raw in calls]
        assert made.plain == [], "no connection but the one that was opened ahead"
        assert made.libvirtd.procedures == [procedures(calls)]
        await soon(lambda: made.libvirtd.open == 0)


@settings(max_examples=25)
@given(st.lists(st.integers(1, 400), max_size=30), st.integers(0, 12))
def test_however_the_packets_are_cut_each_is_answered_once(cuts: list[int], early: int) -> None:
    """``early``: how many packets are sent without waiting for answers."""

    async def run() -> None:
        async with ground() as made:
            made.ahead.begin_libvirt()
            calls = with_serials([*OPENING, REST])
            content, pieces = b"".join(calls), []
            for cut in cuts:
                pieces.append(content[:cut])
                content = content[cut:]
            pieces.append(content)
            reader, writer = await asyncio.open_unix_connection(made.sockets.path(LIBVIRT))
            for number, piece in enumerate(pieces):
                writer.write(piece)
                if number >= early:
                    await asyncio.sleep(0)
            expected = b"".join(answer_to(raw) for raw in calls)
            assert await asyncio.wait_for(reader.readexactly(len(expected)), 5) == expected
            writer.close()
            assert made.plain == []
            assert made.libvirtd.procedures == [procedures(calls)]

    asyncio.run(run())


@pytest.mark.parametrize("asked", range(len(OPENING)))
async def test_another_question_is_asked_over_the_wan_and_known_the_next_time(asked: int) -> None:
    async with ground() as made:
        made.ahead.begin_libvirt()
        new = libvirt_frames.supports_feature(99)
        calls = with_serials([*OPENING[:asked], new, *OPENING[asked:], REST])
        assert await converse(made, calls) == [answer_to(raw) for raw in calls]
        assert made.plain == [LIBVIRT]
        assert made.libvirtd.procedures[-1] == procedures(calls)
        await soon(lambda: made.libvirtd.open == 0)
        # All of it, and not only what came before the question that nobody had foreseen.
        assert made.known.of("backup1") == (*OPENING[:asked], new, *OPENING[asked:])
        before = len(made.libvirtd.procedures)
        made.ahead.begin_libvirt()
        await soon(lambda: len(made.libvirtd.procedures) > before)
        assert await converse(made, calls) == [answer_to(raw) for raw in calls]
        assert made.plain == [LIBVIRT], "the next one is not opened over the WAN"


async def test_what_comes_on_the_heels_of_the_opening_is_cut_to_the_peers_measure() -> None:
    """Half a question, then more than a message may carry."""
    async with ground() as made:
        made.ahead.begin_libvirt()
        calls = with_serials([*OPENING, REST])
        content = b"".join(calls) + libvirt_frames.packet(
            libvirt_frames.REMOTE_PROGRAM, 400, 0, bytes(140_000)
        )
        reader, writer = await asyncio.open_unix_connection(made.sockets.path(LIBVIRT))
        writer.write(content[:20])
        await asyncio.sleep(0.1)
        writer.write(content[20:])
        expected = b"".join(answer_to(raw) for raw in calls)
        assert await asyncio.wait_for(reader.readexactly(len(expected) + 28), 5)
        assert made.plain == []
        writer.close()


async def test_a_question_more_than_was_known_goes_the_way_of_all_that_follows() -> None:
    async with ground() as made:
        made.ahead.begin_libvirt()
        new = libvirt_frames.supports_feature(99)
        calls = with_serials([*OPENING, new, REST])
        assert await converse(made, calls) == [answer_to(raw) for raw in calls]
        assert made.plain == []
        assert made.known.of("backup1") == (*OPENING, new)


async def test_a_peer_of_an_older_version_is_asked_as_ever() -> None:
    async with ground() as made:
        made.knows_ahead = False
        made.ahead.begin_libvirt()
        calls = with_serials([*OPENING, REST])
        assert await converse(made, calls) == [answer_to(raw) for raw in calls]
        assert made.plain == [LIBVIRT]


async def test_a_destination_that_does_not_answer_in_time_is_asked_as_ever() -> None:
    async with ground() as made:
        made.libvirtd.answer = lambda _raw: b""
        made.ahead.begin_libvirt()
        await soon(lambda: made.libvirtd.procedures)
        made.libvirtd.answer = answer_to
        calls = with_serials([*OPENING, REST])
        assert await converse(made, calls) == [answer_to(raw) for raw in calls]
        assert made.plain == [LIBVIRT]
        await soon(lambda: made.libvirtd.open == 0)


@pytest.mark.parametrize("heard", [0, 1, 5, len(OPENING)])
async def test_a_connection_that_dies_while_it_is_held_is_replaced(heard: int) -> None:
    async with ground() as made:
        made.ahead.begin_libvirt()
        await soon(lambda: made.libvirtd.procedures and len(made.libvirtd.procedures[0]) == len(OPENING))
        await asyncio.sleep(0.05)
        calls = with_serials([*OPENING, REST])
        reader, writer = await asyncio.open_unix_connection(made.sockets.path(LIBVIRT))
        for raw in calls[:heard]:
            writer.write(raw)
            assert await reader.readexactly(len(answer_to(raw))) == answer_to(raw)
        made.libvirtd.writers[0].close()
        await soon(lambda: made.libvirtd.open == 0)
        await asyncio.sleep(0.05)
        for raw in calls[heard:]:
            writer.write(raw)
            expected = answer_to(raw)
            assert await asyncio.wait_for(reader.readexactly(len(expected)), 5) == expected
        assert made.plain == [LIBVIRT]
        assert made.libvirtd.procedures[-1] == procedures(calls)
        writer.close()


@pytest.mark.parametrize("refused", range(len(OPENING)))
async def test_an_opening_that_is_refused_in_part_is_left_to_libvirt(refused: int) -> None:
    def answer(raw: bytes) -> bytes:
        reply = bytearray(answer_to(raw))
        if libvirt_frames.with_serial(raw, 0) == OPENING[refused]:
            reply[24:28] = (1).to_bytes(4)
        return bytes(reply)

    async with ground() as made:
        made.libvirtd.answer = answer
        made.ahead.begin_libvirt()
        calls = with_serials([*OPENING, REST])
        assert await converse(made, calls) == [answer(raw) for raw in calls]
        assert made.plain == [LIBVIRT]


async def test_keepalive_is_answered_while_held_and_an_event_ends_it() -> None:
    async with ground() as made:
        made.ahead.begin_libvirt()
        await soon(lambda: made.libvirtd.procedures and len(made.libvirtd.procedures[0]) == len(OPENING))
        await asyncio.sleep(0.05)
        for piece in (PING[:9], PING[9:] + PING):
            made.libvirtd.writers[0].write(piece)
            await asyncio.sleep(0.02)
        await soon(lambda: made.libvirtd.pongs == 2)
        assert made.relays.carried(JOB) == [LIBVIRT]
        made.libvirtd.writers[0].write(EVENT)
        await soon(lambda: made.relays.carried(JOB) == [])
        calls = with_serials([*OPENING, REST])
        assert await converse(made, calls) == [answer_to(raw) for raw in calls]
        assert made.plain == [LIBVIRT]


async def test_what_came_in_half_while_held_reaches_libvirt_whole() -> None:
    async with ground() as made:
        made.ahead.begin_libvirt()
        await soon(lambda: made.libvirtd.procedures and len(made.libvirtd.procedures[0]) == len(OPENING))
        await asyncio.sleep(0.05)
        made.libvirtd.writers[0].write(PING[:20])
        await asyncio.sleep(0.05)
        reader, writer = await asyncio.open_unix_connection(made.sockets.path(LIBVIRT))
        for raw in with_serials(OPENING):
            writer.write(raw)
            await reader.readexactly(len(answer_to(raw)))
        made.libvirtd.answer = lambda raw: PING[20:] + answer_to(raw)
        writer.write(REST)
        expected = PING + answer_to(REST)
        assert await asyncio.wait_for(reader.readexactly(len(expected)), 5) == expected
        writer.close()


@pytest.mark.parametrize("word", ["source", "proxy", "link"])
async def test_nothing_is_held_for_a_job_that_is_over(word: str) -> None:
    async with ground() as made:
        made.ahead.begin_libvirt()
        await soon(lambda: made.libvirtd.procedures and len(made.libvirtd.procedures[0]) == len(OPENING))
        await soon(lambda: made.relays.carried(JOB) == [LIBVIRT])
        if word == "source":
            await made.ahead.close()
        elif word == "link":
            made.links["home1"].state = "down"
        else:
            await made.relays.stop()
        await soon(lambda: made.libvirtd.open == 0)
        assert made.relays.carried(JOB) == []


async def _in_phase(made: Ground, phase: str, patch: pytest.MonkeyPatch) -> None:
    """Bring libvirt's connection to a phase and call the job off in it."""
    loop = asyncio.get_running_loop()
    if phase == "connecting":

        async def connect(*words: Any) -> Any:
            loop.call_soon(made.relays.close, JOB)
            await asyncio.sleep(0)
            return await connect_locally(*words)

        patch.setattr("precache_proxy.evacuation.arrival_relays.connect_locally", connect)
        await made.open_plain(LIBVIRT)
        return
    if phase == "awaited":
        made.is_admitted = False
    elif phase == "opening":
        made.libvirtd.answer = lambda _raw: b""
    elif phase == "just spoken":
        hold = held_opening.hold

        async def hold_and_close(*words: Any, **further: Any) -> Any:
            begun = await hold(*words, **further)
            # before whoever waits for this hears of it
            loop.call_soon(made.relays.close, JOB)
            return begun

        patch.setattr(held_opening, "hold", hold_and_close)
    made.ahead.begin_libvirt()
    if phase == "awaited":
        await asyncio.sleep(0.05)
        made.is_admitted = True
        made.relays.admitted(JOB)
    elif phase == "opening":
        await soon(lambda: made.libvirtd.procedures)
    else:
        await soon(lambda: made.libvirtd.procedures and len(made.libvirtd.procedures[0]) == len(OPENING))
        await asyncio.sleep(0.05)
    if phase in {"just spoken", "relayed"}:
        _reader, writer = await asyncio.open_unix_connection(made.sockets.path(LIBVIRT))
        writer.write(b"".join(with_serials([*OPENING, REST])))
        if phase == "just spoken":
            await soon(lambda: made.libvirtd.open == 0)
            return
        await soon(lambda: procedures([REST])[0] in made.libvirtd.procedures[0])
    made.relays.close(JOB)


@pytest.mark.parametrize("phase", ["connecting", "awaited", "opening", "held", "just spoken", "relayed"])
async def test_a_job_that_is_called_off_holds_nothing_though_its_record_still_admits_it(
    phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its relays are closed first; that it is over is on record only after the next write to a disk."""
    async with ground() as made:
        await _in_phase(made, phase, monkeypatch)
        await asyncio.sleep(0.1)
        await soon(lambda: made.libvirtd.open == 0)
        assert made.relays.carried(JOB) == []
        if phase == "awaited":
            assert made.libvirtd.procedures == []
        for stream in (await made.open_plain(LIBVIRT), await made.open_ahead(LIBVIRT, OPENING)):
            with pytest.raises(Conflict, match="closed here"):
                await asyncio.wait_for(stream.receive(), 2)


async def test_of_two_that_wait_for_their_job_one_may_give_up() -> None:
    async with ground() as made:
        made.is_admitted = False
        first, second = [await made.open_ahead(LIBVIRT, OPENING) for _ in range(2)]
        await asyncio.sleep(0.05)
        first.reset(ProtocolError("not wanted any more"))
        await asyncio.sleep(0.05)
        made.is_admitted = True
        made.relays.admitted(JOB)
        message = await asyncio.wait_for(second.receive(), 2)
        assert len(held_opening.unpack_replies(message or b"", OPENING)) == len(OPENING)


async def test_a_peers_openings_wait_in_bounded_number_and_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("precache_proxy.evacuation.arrival_relays.AHEAD_LIMIT", 2)
    async with ground() as made:
        made.is_admitted = False
        for _ in range(2):
            await made.open_ahead(LIBVIRT, [b"not a call of an opening"])
        await asyncio.sleep(0.05)
        third = await made.open_ahead(LIBVIRT, [b"not a call of an opening"])
        with pytest.raises(Conflict, match="wait for their jobs"):
            await asyncio.wait_for(third.receive(), 2)


async def test_it_is_opened_for_an_admitted_job_only_and_waits_for_that() -> None:
    async with ground() as made:
        made.is_admitted = False
        made.ahead.begin_libvirt()
        made.ahead.begin_libvirt()
        await asyncio.sleep(0.1)
        assert made.libvirtd.procedures == []
        made.relays.admitted(JOB)
        await asyncio.sleep(0.1)
        assert made.libvirtd.procedures == [], "somebody said so, the record does not"
        made.ahead.begin_libvirt()
        await asyncio.sleep(0.05)
        made.is_admitted = True
        made.relays.admitted(JOB)
        await soon(lambda: made.libvirtd.procedures and len(made.libvirtd.procedures[0]) == len(OPENING))


@pytest.mark.parametrize(
    ("socket", "requests"),
    [
        (LIBVIRT, [libvirt_frames.call(2)]),
        (LIBVIRT, [*OPENING, libvirt_frames.call(PREPARE)]),
        (LIBVIRT, [OPENING[0] + OPENING[1]]),
        (LIBVIRT, []),
        (DISK, [b"", b"\0\0\0\3", nbd_frames.option(2)]),
        (DISK, [*nbd_frames.opening("d", 7_002_000), nbd_frames.option(7)]),
        ("ram", [b"x"]),
    ],
)
async def test_nothing_but_an_opening_is_made_ahead(socket: str, requests: list[bytes]) -> None:
    async with ground() as made:
        stream = await made.open_ahead(socket, requests)
        with pytest.raises(InvalidInput):
            await stream.receive()
        assert made.libvirtd.procedures == []


async def test_answers_that_make_no_sense_are_not_taken() -> None:
    for message in (b"", b"[]", b'{"replies": ["AA==", "!"]}', b'{"replies": []}', bytes(100_000)):
        with pytest.raises(ProtocolError):
            held_opening.unpack_replies(message, [b"one", b"two"])
    with pytest.raises(ProtocolError):
        held_opening.unpack_replies(held_opening.pack_replies([b"1"]), [b"one", b"two"])
    assert held_opening.unpack_replies(held_opening.pack_replies([b"1", b""]), [b"", b"x"]) == [b"1", b""]


async def test_two_that_wait_in_vain_for_the_same_openings_are_both_carried() -> None:
    async with ground() as made:
        made.ahead.begin(DISK, nbd_frames.opening("drive-virtio-disk0", 10_000_000))
        opened = asyncio.Event()

        async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"hello")
            await opened.wait()
            writer.close()

        server = await asyncio.start_unix_server(serve, made.far_directory / JOB / "disk.sock")
        pairs = [await asyncio.open_unix_connection(made.sockets.path(DISK)) for _ in range(2)]
        for reader, _writer in pairs:
            assert await asyncio.wait_for(reader.readexactly(5), 5) == b"hello"
        assert made.plain == [DISK, DISK]
        opened.set()
        server.close()


async def test_an_error_of_ours_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ground() as made:

        async def meet(*_words: Any) -> Any:
            raise ValueError("not foreseen")

        monkeypatch.setattr(made.ahead, "meet", meet)
        reader, _writer = await asyncio.open_unix_connection(made.sockets.path(DISK))
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 2) == b""
        assert "not foreseen" in str(made.failures[0])


async def test_a_connection_that_is_cut_as_it_takes_over_ends_what_was_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with ground() as made:
        made.ahead.begin_libvirt()
        await soon(lambda: made.libvirtd.procedures and len(made.libvirtd.procedures[0]) == len(OPENING))
        await asyncio.sleep(0.05)
        (held,) = made.ahead._ahead
        stop = held._stop

        async def cut(*_words: Any) -> None:
            made.sockets.close_connections(LIBVIRT)
            await stop()

        monkeypatch.setattr(held, "_stop", cut)
        _reader, writer = await asyncio.open_unix_connection(made.sockets.path(LIBVIRT))
        writer.write(b"".join(with_serials([*OPENING, REST])))
        await soon(lambda: made.libvirtd.open == 0)
        assert made.relays.carried(JOB) == []
