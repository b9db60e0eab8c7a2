# SPDX-License-Identifier: GPL-3.0-or-later
"""libvirt's Finish is recognised however it is cut, and its reply waits until it may be heard."""

from __future__ import annotations

import asyncio
import itertools
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precache_proxy.evacuation.finish_call import FinishCall
from precache_proxy.evacuation.libvirt_frames import (
    CALL,
    CONNECT_SUPPORTS_FEATURE,
    DOMAIN_MIGRATE_FINISH3_PARAMS,
    PONG,
    REMOTE_PROGRAM,
    REPLY,
    call,
    packet,
)

COOKIE = bytes(range(256)) * 40
GOOD, BAD = bytes(4), (1).to_bytes(4)


def finish(last: bytes) -> bytes:
    # Flags, which stand before the last word, are never nothing here.
    return call(DOMAIN_MIGRATE_FINISH3_PARAMS, COOKIE + (0x443).to_bytes(4) + last)


def reply() -> bytes:
    return packet(REMOTE_PROGRAM, DOMAIN_MIGRATE_FINISH3_PARAMS, REPLY, b"the domain", serial=10)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    edges = [0, *sorted({edge % len(data) for edge in at}), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(edges)]


@given(st.lists(st.integers(0, 20_000), max_size=12), st.sampled_from([GOOD, BAD]))
def test_it_is_known_however_it_is_cut(at: list[int], last: bytes) -> None:
    before = call(CONNECT_SUPPORTS_FEATURE, GOOD) + PONG + packet(REMOTE_PROGRAM, 305, CALL, bytes(40))
    call_of_it = finish(last)
    seen = FinishCall()
    pieces = cut(before + call_of_it, at)
    for number, piece in enumerate(pieces):
        assert not seen.asked.is_set() or number == len(pieces)
        seen.outward(piece)
    assert seen.asked.is_set() is (last == GOOD), "Finish after a bad Perform only has it cleared away there"


def test_another_packet_that_ends_so_is_none() -> None:
    seen = FinishCall()
    seen.outward(packet(REMOTE_PROGRAM, DOMAIN_MIGRATE_FINISH3_PARAMS, REPLY, bytes(40)))
    seen.outward(packet(0x20008087, DOMAIN_MIGRATE_FINISH3_PARAMS, CALL, bytes(40)))
    assert not seen.asked.is_set()


async def test_its_reply_waits_until_it_may_be_heard() -> None:
    ours, libvirts = socket.socketpair()
    with ours, libvirts:
        seen = FinishCall()
        seen.carried_by(ours)
        seen.outward(finish(GOOD))
        assert seen.unanswered
        await asyncio.wait_for(seen.inward(PONG), 1)
        held = asyncio.create_task(seen.inward(PONG + reply()))
        await asyncio.sleep(0.05)
        assert not held.done()
        assert seen.unanswered, "libvirt has not heard it"
        seen.let_through()
        await asyncio.wait_for(held, 1)
        assert not seen.unanswered


async def test_a_reply_that_nobody_waits_for_passes() -> None:
    seen = FinishCall()
    seen.outward(finish(BAD))
    await asyncio.wait_for(seen.inward(reply()), 1)


@pytest.mark.parametrize("whole", [True, False])
def test_a_connection_that_libvirt_has_closed_waits_for_nothing(whole: bool) -> None:
    ours, libvirts = socket.socketpair()
    with ours:
        seen = FinishCall()
        assert not seen.unanswered, "there is no connection"
        seen.carried_by(ours)
        seen.outward(finish(GOOD))
        assert seen.unanswered
        if whole:
            libvirts.close()
        else:
            libvirts.shutdown(socket.SHUT_WR)
        assert not seen.unanswered, "said by the kernel: nobody has read from it"
    libvirts.close()
