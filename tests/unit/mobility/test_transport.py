# SPDX-License-Identifier: GPL-3.0-or-later
"""In which order what has come is dealt with."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv6Address
from itertools import pairwise

import pytest

from mobility_agent.config import Peer, parse
from mobility_agent.messages.codec import Key, encode, only_confirms
from mobility_agent.messages.headers import BindingUpdate, Message
from mobility_agent.messages.options import HandoffIndicator
from mobility_agent.messages.registration import Acknowledgement, Registration, home_address
from mobility_agent.signalling.transport import Transport
from unit.mobility.lone_anchor import CONFIG, HOME, KEYS

REFRESH, HANDOFF = HandoffIndicator.UNCHANGED, HandoffIndicator.BETWEEN_GATEWAYS
ANCHOR = parse(CONFIG.format(state="/nonexistent"), KEYS)
GATEWAY = replace(ANCHOR.partners[0], address=IPv6Address("::1"))


class Anchor(Transport):
    """An anchor's transport, on a datagram socket that needs no rights."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.seen: list[int] = []
        self.fails_at = fails_at
        self.came = asyncio.Event()
        super().__init__(ANCHOR.address, ANCHOR.own_key, ANCHOR.own_keys, [GATEWAY], self._see)
        self.datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.datagrams.bind(("::1", 0))
        self._socket = self.datagrams

    def start(self) -> None:
        asyncio.get_running_loop().add_reader(self.datagrams.fileno(), self._read)

    def _see(self, _peer: Peer, message: Message) -> None:
        assert isinstance(message, BindingUpdate)
        self.seen.append(message.sequence)
        self.came.set()
        if message.sequence == self.fails_at:
            raise RuntimeError("a defect of ours")


def _update(
    sequence: int, handoff: HandoffIndicator, key: Key = GATEWAY.key, *, lifetime_seconds: int = 120
) -> bytes:
    vm = f"{sequence:08x}-2222-3333-4444-555555555555"
    asked = Registration(vm, (HOME,), GATEWAY.tunnel_address, 1, sequence, lifetime_seconds, handoff)
    update = asked.update(sequence)
    home = home_address(update)
    return encode(update, GATEWAY.address, ANCHOR.address, key, care_of=GATEWAY.address, home=home)


@pytest.fixture
def gateway() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as own:
        own.bind(("::1", 0))
        yield own


async def _until_seen(anchor: Anchor, count: int) -> None:
    async with asyncio.timeout(10):
        while len(anchor.seen) < count:
            anchor.came.clear()
            await anchor.came.wait()


async def test_a_hand_over_does_not_wait_behind_refreshes(gateway: socket.socket) -> None:
    anchor = Anchor()
    for sequence in range(100):
        gateway.sendto(_update(sequence, REFRESH), anchor.datagrams.getsockname())
    gateway.sendto(_update(1000, HANDOFF), anchor.datagrams.getsockname())
    anchor.start()
    await _until_seen(anchor, 101)
    # Nothing is lost, and what only confirms keeps its order.
    assert anchor.seen == [1000, *range(100)]
    anchor.stop()


async def test_refreshes_get_through_a_flood_that_nobody_signed(gateway: socket.socket) -> None:
    anchor, before = Anchor(), []
    take = anchor._take

    def counted(data: bytes, peer: Peer) -> None:
        take(data, peer)
        before.append(len(anchor.seen))

    anchor._take = counted  # type: ignore[method-assign]
    forged = _update(1, HANDOFF, replace(GATEWAY.key, secret=bytes(32)))
    for sequence in range(4):
        gateway.sendto(_update(sequence, REFRESH), anchor.datagrams.getsockname())
    for _ in range(200):
        gateway.sendto(forged, anchor.datagrams.getsockname())
    anchor.start()
    await _until_seen(anchor, 4)
    assert [before.index(count) for count in (1, 2, 3)] == [7, 15, 23]
    assert anchor.seen == [0, 1, 2, 3]
    assert anchor.counters["received"] == 4
    anchor.stop()


async def test_others_get_their_turn_in_a_flood(gateway: socket.socket) -> None:
    anchor, turns = Anchor(), []

    def turn() -> None:
        turns.append(len(anchor.seen))
        if len(anchor.seen) < 100:
            asyncio.get_running_loop().call_soon(turn)

    for sequence in range(100):
        gateway.sendto(_update(sequence, HANDOFF), anchor.datagrams.getsockname())
    anchor.start()
    turn()
    await _until_seen(anchor, 100)
    assert all(later - earlier <= 16 for earlier, later in pairwise(turns))
    anchor.stop()


async def test_a_message_that_breaks_something_does_not_keep_the_next_ones(gateway: socket.socket) -> None:
    told: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context["message"]))
    anchor = Anchor(fails_at=3)
    for sequence in range(50):
        gateway.sendto(_update(sequence, HANDOFF), anchor.datagrams.getsockname())
    anchor.start()
    await _until_seen(anchor, 50)
    assert len(told) == 1
    anchor.stop()


def test_what_only_confirms_is_known_by_its_handoff_indicator() -> None:
    assert only_confirms(_update(1, REFRESH))
    assert not only_confirms(_update(1, HANDOFF))
    # A withdrawal: another VM's claim to its address may come right behind it.
    assert not only_confirms(_update(1, REFRESH, lifetime_seconds=0))
    answer = Acknowledgement("vm", 0, 1, 120, 1, (HOME,)).message()
    assert not only_confirms(encode(answer, ANCHOR.address, GATEWAY.address, GATEWAY.key))


def test_what_is_cut_off_is_put_in_order_all_the_same() -> None:
    whole = _update(1, REFRESH)
    assert not any(only_confirms(whole[:length]) for length in range(12))
    for length in range(12, len(whole)):
        only_confirms(whole[:length])
    assert not only_confirms(whole[:12] + bytes(40))
