# SPDX-License-Identifier: GPL-3.0-or-later
"""BBR is begun anew in time, and nothing else is."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest

from precache_proxy.channel.connection import Connection, tune
from precache_proxy.channel.link_rate import LinkRate
from precache_proxy.channel.settings import PeerAddress

_TCP_CC_INFO = 26
# struct tcp_bbr_info, linux/inet_diag.h: bandwidth (low, high), least round trip, gains in 256ths.
_BBR_INFO = struct.Struct("=5I")
_STARTUP_GAIN = 739  # 2/ln 2


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a TCP connection on loopback, the first one tuned."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _address = server.accept()
    with near, far:
        if tune(near, dead_seconds=10) != "bbr":
            pytest.skip("this kernel has no BBR, or does not allow it here")
        yield near, far


def carry(near: socket.socket, far: socket.socket, count: int) -> None:
    """Send so many bytes and read them."""

    def read() -> None:
        left = count
        while left:
            left -= len(far.recv(min(left, 1 << 20)))

    reader = threading.Thread(target=read)
    reader.start()
    near.sendall(bytes(count))
    reader.join(30)
    assert not reader.is_alive()


def gain(near: socket.socket) -> int:
    """BBR's pacing gain."""
    return int(_BBR_INFO.unpack(near.getsockopt(socket.IPPROTO_TCP, _TCP_CC_INFO, _BBR_INFO.size))[3])


def control(near: socket.socket) -> bytes:
    """The congestion control in force."""
    return near.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).split(b"\0")[0]


async def test_bbr_begins_anew_and_carries_on(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    carry(near, far, 64 << 20)
    assert gain(near) != _STARTUP_GAIN, "it has found out what the path carries"
    Connection(cast(Any, near), 0, "bbr", cast(Any, None)).renew_congestion_control()
    assert control(near) == b"bbr"
    carry(near, far, 1000)
    assert gain(near) == _STARTUP_GAIN
    carry(near, far, 1 << 20)


async def test_another_congestion_control_is_left_alone(ends: tuple[socket.socket, socket.socket]) -> None:
    near, _far = ends
    near.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    Connection(cast(Any, near), 0, "reno", cast(Any, None)).renew_congestion_control()
    assert control(near) == b"reno"


class Connected:
    """A connection as far as a link's rate looks at it: busy over a path of 40 ms."""

    def __init__(self, trip: float, least: float) -> None:
        self.renewed, self.recovers = 0, False
        self._trip, self._least, self._acknowledged = trip, least, 0

    def tcp_state(self) -> Any:
        """50 MB a second in beats of 25 ms."""
        self._acknowledged += 1_250_000
        state = type("State", (), {})()
        state.serial, state.unacknowledged, state.acknowledged_bytes = 1, 1, self._acknowledged
        state.recovers = self.recovers
        state.round_trip_seconds, state.least_round_trip_seconds = self._trip, self._least
        return state

    def renew_congestion_control(self) -> None:
        """Counted."""
        self.renewed += 1


def session_of(connection: Connected, trip: float, *, backlog: bool) -> Any:
    """A session of that connection alone, whose pings tell of that round trip."""
    session = type("Session", (), {})()
    session.connections, session.has_backlog = {0: connection}, backlog
    session.round_trip = type("Trip", (), {"latest_seconds": trip})()
    return session


@pytest.mark.parametrize(
    ("trip", "least", "backlog", "renewed"),
    [(0.04, 0.04, True, 4), (0.04, 0.04, False, 0), (0.0005, 0.0005, True, 0), (0.04, 0.0005, True, 0)],
)
async def test_it_is_renewed_where_a_busy_path_is_paced(
    trip: float, least: float, backlog: bool, renewed: int
) -> None:
    """BBR looks every 10 s: sooner than that. On a local path, which nobody paces, it is left to itself, and
    where the kernel remembers another path's round trip, with which it would begin."""
    rate = LinkRate("peer", PeerAddress("::1", 1), cast(Any, None), lambda: None)
    connection = Connected(trip, least)
    # Pings have told of the path as it is.
    session = session_of(connection, trip, backlog=False)
    for beat in range(400):
        rate.govern(beat * 0.025, [session])
    session.has_backlog = backlog
    for beat in range(400, 400 + int(31 / 0.025)):
        rate.govern(beat * 0.025, [session])
    rate.stop()
    assert connection.renewed == renewed


async def test_one_that_recovers_is_renewed_when_it_has(ends: tuple[socket.socket, socket.socket]) -> None:
    """Anew it would begin with the few segments that it has under way, and forget what it had before."""
    rate = LinkRate("peer", PeerAddress("::1", 1), cast(Any, None), lambda: None)
    connection = Connected(0.04, 0.04)
    session = session_of(connection, 0.04, backlog=True)
    connection.recovers = True
    for beat in range(800):
        rate.govern(beat * 0.025, [session])
    assert connection.renewed == 0
    connection.recovers = False
    rate.govern(800 * 0.025, [session])
    rate.stop()
    assert connection.renewed == 1
    near, far = ends
    carry(near, far, 1 << 20)
    assert not Connection(cast(Any, near), 0, "bbr", cast(Any, None)).tcp_state().recovers
