# SPDX-License-Identifier: GPL-3.0-or-later
"""Routes that another version of the agent left."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from ipaddress import IPv6Network
from typing import Any, cast

import pytest

from mobility_agent.datapath import routes
from mobility_agent.datapath.netlink import Request, attributes
from mobility_agent.datapath.routes import Kind, Route

ATTRACTED = Route(IPv6Network("2001:db8:100::/64"), 254, kind=Kind.UNREACHABLE)
NEW, DELETE = 24, 25


def priority(request: Request) -> int | None:
    """What the request says of the priority."""
    found = attributes(request.body[12:]).get(6)
    return None if found is None else int(struct.unpack("=I", found)[0])


class Kernel:
    """Holds routes as messages, and notes what it is asked."""

    def __init__(self, *held: bytes) -> None:
        self.held = held
        self.asked: list[tuple[int, int | None]] = []

    def dump(self, _kind: int, asked: bytes) -> Iterator[bytes]:
        return iter(self.held if asked[0] == 10 else ())

    def apply(self, requests: Sequence[Request]) -> None:
        self.asked += [(request.kind, priority(request)) for request in requests]


@pytest.fixture
def former(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The same route as a former version put it."""
    with monkeypatch.context() as patch:
        patch.setattr(routes, "_ATTRACTED_PRIORITY", 1024)
        return routes.put(ATTRACTED).body


def reconciled(kernel: Kernel, *wanted: Route) -> list[tuple[int, int | None]]:
    routes.reconcile(cast(Any, kernel), wanted)
    return kernel.asked


def test_one_of_a_former_priority_is_replaced(former: bytes) -> None:
    assert reconciled(Kernel(former), ATTRACTED) == [(NEW, 2048), (DELETE, 1024)]
    own = routes.put(ATTRACTED).body
    assert reconciled(Kernel(own), ATTRACTED) == []
    # Both: the right one is left as it is.
    assert reconciled(Kernel(former, own), ATTRACTED) == [(DELETE, 1024)]


def test_one_of_a_former_priority_is_removed_when_nobody_wants_it(former: bytes) -> None:
    assert reconciled(Kernel(former)) == [(DELETE, 1024)]
    assert priority(routes.drop(ATTRACTED)) is None
