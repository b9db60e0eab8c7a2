# SPDX-License-Identifier: GPL-3.0-or-later
"""Nobody waits for the comparison, whoever's routes and neighbours the kernel holds."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from ipaddress import IPv6Address, IPv6Network
from itertools import pairwise
from typing import Any, cast

import pytest

from mobility_agent.datapath import comparison, neighbours, routes
from mobility_agent.datapath.neighbours import Neighbour
from mobility_agent.datapath.routes import Kind, Route

OURS = Route(IPv6Network("2001:db8:100::/64"), 7600, kind=Kind.UNREACHABLE)
OUR_NEIGHBOUR = Neighbour(IPv6Address("2001:db8:100::5"), "lo", "52:54:00:00:00:01")
ROUTES, NEIGHBOURS = 26, 30


class Kernel:
    """Ours, and thousands of somebody else's."""

    def __init__(self) -> None:
        self.told = 0

    def dump(self, kind: int, asked: bytes) -> Iterator[bytes]:
        own, at = (routes.put(OURS).body, 5) if kind == ROUTES else (neighbours.put(OUR_NEIGHBOUR).body, None)
        if asked[0] != 10 or (kind == NEIGHBOURS and asked[10]):
            return
        # The protocol: a byte of a route's header, the last attribute of a neighbour.
        foreign = own[:at] + bytes([16]) + own[at + 1 :] if at else own[:-4] + struct.pack("=Bxxx", 2)
        for content in [*[foreign] * 5000, own]:
            self.told += 1
            yield content

    def close(self) -> None:
        pass


class Wanted:
    """One home network's route and no VM."""

    def standing_routes(self) -> list[Route]:
        return [OURS]

    def homes(self) -> dict[Any, Any]:
        return {}


async def test_others_get_their_turn_among_what_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, turns, done = Kernel(), [0], asyncio.Event()
    monkeypatch.setattr(comparison, "RouteSocket", lambda: kernel)

    def turn() -> None:
        turns.append(kernel.told)
        if not done.is_set():
            asyncio.get_running_loop().call_soon(turn)

    turn()
    found = await comparison.compare(cast(Any, Wanted()), lambda: [OUR_NEIGHBOUR], lambda _device: True)
    done.set()
    await asyncio.sleep(0)
    assert kernel.told == 2 * 5001
    assert max(later - earlier for earlier, later in pairwise(turns)) <= 64
    # And what is ours is found among it.
    assert found == comparison.Differences()
