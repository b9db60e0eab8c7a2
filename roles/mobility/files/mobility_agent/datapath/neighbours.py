# SPDX-License-Identifier: GPL-3.0-or-later
"""Permanent neighbours (the VM's MAC is in its definition: nobody need be asked) and proxied ones."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from mobility_agent.datapath.netlink import CREATE, REPLACE, Request, RouteSocket, attribute, attributes
from mobility_agent.homes import Address

_NEW, _DELETE, _GET = 28, 29, 30
_MESSAGE = struct.Struct("=BxxxIHBB")
_ADDRESS, _MAC, _PROTOCOL = 1, 2, 12
_PERMANENT = 0x80
# Reachable, stale, delay, probe: it has answered, or spoken.
_ANSWERING = 0x02 | 0x04 | 0x08 | 0x10
_PROXY = 0x08
# As of routes: says in a dump that an entry is ours.
PROTOCOL = 76


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Who has ``address`` on ``device``: the VM with ``mac``; without one, we answer for it (proxy)."""

    address: Address
    device: str
    mac: str | None = None

    def __str__(self) -> str:
        what = f"lladdr {self.mac}" if self.mac else "proxied"
        return f"neighbour {self.address} {what} dev {self.device}"


def _body(neighbour: Neighbour) -> bytes:
    index = socket.if_nametoindex(neighbour.device)
    state, flags = (_PERMANENT, 0) if neighbour.mac else (0, _PROXY)
    family = socket.AF_INET if isinstance(neighbour.address, IPv4Address) else socket.AF_INET6
    body = _MESSAGE.pack(family, index, state, flags, 0)
    body += attribute(_ADDRESS, neighbour.address.packed)
    if neighbour.mac:
        body += attribute(_MAC, bytes.fromhex(neighbour.mac.replace(":", "")))
    return body + attribute(_PROTOCOL, bytes([PROTOCOL]))


def put(neighbour: Neighbour) -> Request:
    """Make the entry be. Raises OSError when there is no such device."""
    return Request(_NEW, CREATE | REPLACE, _body(neighbour), str(neighbour))


def drop(neighbour: Neighbour) -> Request:
    """Remove the entry. Raises OSError when there is no such device."""
    return Request(_DELETE, 0, _body(neighbour), str(neighbour), removal=True)


def _each(kernel: RouteSocket, family: int, flags: int) -> Iterator[Neighbour | None]:
    for content in kernel.dump(_GET, _MESSAGE.pack(family, 0, 0, flags, 0)):
        _unused, index, _unused, entry_flags, _unused = _MESSAGE.unpack_from(content)
        told = attributes(content[_MESSAGE.size :])
        if told.get(_PROTOCOL, b"\0")[0] != PROTOCOL or _ADDRESS not in told:
            yield None
            continue
        proxied = bool(entry_flags & _PROXY)
        mac = None if proxied else told.get(_MAC, b"").hex(":")
        yield Neighbour(ip_address(told[_ADDRESS]), socket.if_indextoname(index), mac)


def seen(kernel: RouteSocket, device: str) -> list[Neighbour]:
    """Whom the kernel itself has found on ``device`` (IPv6); none of ours, none that does not answer.

    Raises OSError when there is no such device.
    """
    wanted = socket.if_nametoindex(device)
    found: list[Neighbour] = []
    for content in kernel.dump(_GET, _MESSAGE.pack(socket.AF_INET6, wanted, 0, 0, 0)):
        _unused, index, state, flags, _unused = _MESSAGE.unpack_from(content)
        told = attributes(content[_MESSAGE.size :])
        ours = told.get(_PROTOCOL, b"\0")[0] == PROTOCOL
        if index == wanted and not ours and not flags & _PROXY and state & _ANSWERING and _ADDRESS in told:
            found.append(Neighbour(IPv6Address(told[_ADDRESS]), device, told.get(_MAC, b"").hex(":") or None))
    return found


def each(kernel: RouteSocket) -> Iterator[Neighbour | None]:
    """Our own neighbours, permanent and proxied, as the kernel tells them; None for each that is not ours."""
    for family, flags in ((socket.AF_INET6, 0), (socket.AF_INET6, _PROXY), (socket.AF_INET, 0)):
        yield from _each(kernel, family, flags)


def read(kernel: RouteSocket) -> list[Neighbour]:
    """Our own neighbours."""
    return [entry for entry in each(kernel) if entry is not None]
