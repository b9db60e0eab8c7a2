# SPDX-License-Identifier: GPL-3.0-or-later
"""Routes as values, written to and read from the kernel.

Only routes of our own routing protocol number are ever read back, and so only they are ever removed.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from ipaddress import IPv4Network, IPv6Address, IPv6Network

from mobility_agent.datapath.netlink import (
    CREATE,
    REPLACE,
    Request,
    RouteSocket,
    attribute,
    attributes,
    number,
)
from mobility_agent.homes import Home

DEFAULT = IPv6Network("::/0")
#: The agent's routing protocol number (RTPROT): what carries it is ours.
PROTOCOL = 76
_NEW, _DELETE, _GET = 24, 25, 26
_MESSAGE = struct.Struct("=BBBBBBBBI")
_DESTINATION, _DEVICE, _GATEWAY, _PRIORITY, _METRICS, _TABLE, _ENCAP_TYPE, _ENCAP = 1, 4, 5, 6, 8, 15, 21, 22
_LOCK, _MTU = 1, 2
_IP6, _SEG6, _SEG6_LOCAL = 4, 5, 7
_IP6_DESTINATION, _IP6_SOURCE, _IP6_HOP_LIMIT = 2, 3, 4
_HOP_LIMIT = 64
_ENCAP_REDUCED = 3
_LOCAL_ACTION, _LOCAL_NEXT_HOP, _END_DX6 = 1, 5, 5
_ONLINK = 4
_SCOPE_LINK, _SCOPE_NOWHERE = 253, 255
MAIN_TABLE = 254
_PRIORITY_VALUE = 1024
# Behind a route of the home link's own, which would be replaced otherwise.
_ATTRACTED_PRIORITY = 2048


class Kind(IntEnum):
    """What a route does with a packet."""

    FORWARD = 1
    BLACKHOLE = 6
    UNREACHABLE = 7
    THROW = 9


@dataclass(frozen=True, slots=True)
class Route:
    """Where packets to ``destination`` go, in ``table``.

    ``segment``: encapsulated to that address, RFC 2473 format: by seg6 (``encap.red`` with one segment) or,
    where ``outer_source`` is given, by the ip6tnl device that it leads to (``encap ip6``), from that source.
    ``decapsulate``: the inner packet is taken out and routed by its own destination (seg6local
    ``End.DX6 ::``, which, unlike ``End.DT6``, goes through the policy rules again). ``mtu``: larger packets
    are answered with packet-too-big, whatever the device could carry. ``former_priority``: of one that was
    read, where it is not the one that it would get now.
    """

    destination: Home
    table: int
    device: str | None = None
    via: IPv6Address | None = None
    segment: IPv6Address | None = None
    outer_source: IPv6Address | None = None
    decapsulate: bool = False
    mtu: int | None = None
    kind: Kind = Kind.FORWARD
    former_priority: int | None = None

    @property
    def priority(self) -> int:
        """What the kernel prefers it by; the lower comes first."""
        attracted = self.kind is Kind.UNREACHABLE and self.table == MAIN_TABLE
        return _ATTRACTED_PRIORITY if attracted else _PRIORITY_VALUE

    def __str__(self) -> str:
        words = [f"route {self.destination} table {self.table}"]
        words += [f"to {self.segment}"] if self.segment else []
        words += ["decapsulating"] if self.decapsulate else []
        words += [f"dev {self.device}"] if self.device else [self.kind.name.lower()]
        return " ".join(words)


def _encapsulation(route: Route) -> bytes:
    if route.segment is not None and route.outer_source is not None:
        body = attribute(_IP6_DESTINATION, route.segment.packed)
        body += attribute(_IP6_SOURCE, route.outer_source.packed)
        body += attribute(_IP6_HOP_LIMIT, bytes([_HOP_LIMIT]))
        kind = _IP6
    elif route.segment is not None:
        # mode; then a segment routing header (RFC 8754): next header, length, type 4, segments left, last
        # entry, flags, tag, the one segment.
        header = struct.pack("=IBBBBBBH", _ENCAP_REDUCED, 0, 2, 4, 0, 0, 0, 0) + route.segment.packed
        body, kind = attribute(1, header), _SEG6
    else:
        body = number(_LOCAL_ACTION, _END_DX6) + attribute(_LOCAL_NEXT_HOP, bytes(16))
        kind = _SEG6_LOCAL
    return attribute(_ENCAP_TYPE, struct.pack("=H", kind)) + attribute(_ENCAP, body)


def _body(route: Route, *, whole: bool) -> bytes:
    flags = _ONLINK if whole and route.via is not None else 0
    table = route.table if route.table < 256 else 0
    length = route.destination.prefixlen
    # A removal names no kind (0 fits any) and no protocol but ours.
    kind = route.kind if whole else 0
    family, scope = socket.AF_INET6, 0
    if isinstance(route.destination, IPv4Network):
        # As iproute2 has it: what needs no router is of the link's scope; a removal fits any.
        family, scope = socket.AF_INET, _SCOPE_LINK if whole else _SCOPE_NOWHERE
    body = _MESSAGE.pack(family, length, 0, 0, table, PROTOCOL, scope, kind, flags)
    body += attribute(_DESTINATION, route.destination.network_address.packed) if length else b""
    body += number(_TABLE, route.table)
    if not whole:
        # Ours is known by its protocol, whatever version of the agent chose its priority.
        return body + (number(_PRIORITY, route.former_priority) if route.former_priority else b"")
    body += number(_PRIORITY, route.priority)
    if route.device is not None:
        body += number(_DEVICE, socket.if_nametoindex(route.device))
    if route.via is not None:
        body += attribute(_GATEWAY, route.via.packed)
    if route.mtu is not None:
        body += attribute(_METRICS, number(_LOCK, 1 << _MTU) + number(_MTU, route.mtu))
    if route.segment is not None or route.decapsulate:
        body += _encapsulation(route)
    return body


def put(route: Route) -> Request:
    """Make the route be, in place of another of the same destination and table, in one step.

    Raises OSError when there is no such device.
    """
    return Request(_NEW, CREATE | REPLACE, _body(route, whole=True), str(route))


def drop(route: Route) -> Request:
    """Remove the route of this destination and table, if it is ours."""
    return Request(_DELETE, 0, _body(route, whole=False), str(route), removal=True)


def _parse(content: bytes, name: Callable[[int], str]) -> Route | None:
    route = _parse_all_but_priority(content, name)
    if route is None:
        return None
    found = attributes(content[_MESSAGE.size :])
    (priority,) = struct.unpack("=I", found.get(_PRIORITY, bytes(4)))
    return route if priority == route.priority else replace(route, former_priority=priority)


def _parse_all_but_priority(content: bytes, name: Callable[[int], str]) -> Route | None:
    family, length, _unused, _unused, table, protocol, _unused, kind, _unused = _MESSAGE.unpack_from(content)
    if protocol != PROTOCOL or kind not in set(Kind):
        return None
    found = attributes(content[_MESSAGE.size :])
    if _TABLE in found:
        (table,) = struct.unpack("=I", found[_TABLE])
    destination: Home
    if family == socket.AF_INET:
        destination = IPv4Network((found.get(_DESTINATION, bytes(4)), length))
    else:
        destination = IPv6Network((found.get(_DESTINATION, bytes(16)), length))
    if kind != Kind.FORWARD:
        return Route(destination, table, kind=Kind(kind))
    metrics = attributes(found.get(_METRICS, b""))
    mtu = struct.unpack("=I", metrics[_MTU])[0] if _MTU in metrics else None
    segment, outer_source, decapsulate = None, None, False
    if _ENCAP_TYPE in found:
        (encap_type,) = struct.unpack_from("=H", found[_ENCAP_TYPE])
        decapsulate = encap_type == _SEG6_LOCAL
        if encap_type == _SEG6:
            segment = IPv6Address(attributes(found[_ENCAP])[1][12:28])
        if encap_type == _IP6:
            told = attributes(found[_ENCAP])
            segment, outer_source = IPv6Address(told[_IP6_DESTINATION]), IPv6Address(told[_IP6_SOURCE])
    return Route(
        destination,
        table,
        device=name(struct.unpack("=I", found[_DEVICE])[0]) if _DEVICE in found else None,
        via=IPv6Address(found[_GATEWAY]) if _GATEWAY in found else None,
        segment=segment,
        outer_source=outer_source,
        decapsulate=decapsulate,
        mtu=mtu,
    )


def each(kernel: RouteSocket) -> Iterator[Route | None]:
    """Our own routes, of every table, as the kernel tells them; None for each that is not ours.

    So that whoever gives others a turn now and then can do it among somebody else's routes, too.
    """
    names: dict[int, str] = {}

    def name(index: int) -> str:
        if index not in names:
            try:
                names[index] = socket.if_indextoname(index)
            except OSError:
                names[index] = f"#{index}"
        return names[index]

    for family in (socket.AF_INET6, socket.AF_INET):
        asked = _MESSAGE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
        yield from (_parse(content, name) for content in kernel.dump(_GET, asked))


def read(kernel: RouteSocket) -> list[Route]:
    """Our own routes, of every table."""
    return [route for route in each(kernel) if route is not None]


def reconcile(kernel: RouteSocket, wanted: Iterable[Route]) -> tuple[int, int]:
    """Make our own routes be exactly ``wanted``: how many were put, how many removed.

    What is right already is not touched, so that no packet finds a gap.
    """
    wanted_set = set(wanted)
    present = set(read(kernel))
    places = {(route.destination, route.table) for route in wanted_set}
    # Another priority is a place of its own: what is put there does not replace it.
    stale = [
        route
        for route in present - wanted_set
        if (route.destination, route.table) not in places or route.former_priority is not None
    ]
    missing = wanted_set - present
    # Tunnels before what leads into them.
    ordered = sorted(missing, key=lambda route: route.segment is None and not route.decapsulate)
    changes: Sequence[Request] = [put(route) for route in ordered] + [drop(route) for route in stale]
    kernel.apply(changes)
    return len(missing), len(stale)
