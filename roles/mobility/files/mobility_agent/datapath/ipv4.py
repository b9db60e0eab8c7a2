# SPDX-License-Identifier: GPL-3.0-or-later
"""The first hop of IPv4 home prefixes: its address on the VMs' bridges, and ARP for who is elsewhere.

As with IPv6, VMs of one prefix at two sites believe each other on-link. Here the kernel answers for those
that it has a route to by another device (proxy ARP); only who has moved is told by us.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from ipaddress import IPv4Address
from pathlib import Path

from mobility_agent.datapath.netlink import (
    CREATE,
    REPLACE,
    Request,
    RouteSocket,
    attribute,
    attributes,
    number,
)

_SET_LINK, _NEW_ADDRESS, _DELETE_ADDRESS, _GET_ADDRESS, _SET_NEIGHBOUR_TABLE = 19, 20, 21, 22, 67
_LINK_MESSAGE, _ADDRESS_MESSAGE, _TABLE_MESSAGE = (
    struct.Struct("=BxHiII"),
    struct.Struct("=BBBBI"),
    struct.Struct("=BxH"),
)
_ADDRESS, _LOCAL = 1, 2
# IFLA_AF_SPEC, in it AF_INET, in it IFLA_INET_CONF, in it IPV4_DEVCONF_PROXY_ARP.
_FAMILIES, _SETTINGS, _PROXY_ARP = 26, 1, 3
_TABLE_NAME, _TABLE_PARAMETERS, _OF_DEVICE, _PROXY_DELAY = 1, 6, 1, 13
_ETHERTYPE_ARP = 0x0806
_BROADCAST = b"\xff" * 6


def announcement(router_mac: str, address: IPv4Address, mac: str) -> bytes:
    """An Ethernet frame from ``router_mac`` saying that ``address`` is at ``mac`` (RFC 5227 section 3)."""
    sender, owner = (bytes.fromhex(text.replace(":", "")) for text in (router_mac, mac))
    # Ethernet, IPv4, a request: it asks for what it says.
    body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + owner + address.packed + bytes(6) + address.packed
    return _BROADCAST + sender + struct.pack(">H", _ETHERTYPE_ARP) + body


class Ipv4FirstHop:
    """Makes bridges the first hop; what is right already is left alone."""

    def __init__(self, kernel: RouteSocket) -> None:
        self._kernel = kernel

    def make(self, device: str, routers: Sequence[IPv4Address]) -> None:
        """Give the bridge the routers' addresses and let it answer ARP. Raises OSError, KernelRefused."""
        index = socket.if_nametoindex(device)
        present = self._addresses(index)
        changes = [_put_address(device, index, router) for router in routers if router not in present]
        if not answers_for_others(device):
            changes.append(_answer_for_others(device, index))
        if _reads(f"neigh/{device}/proxy_delay") != "0":
            changes.append(_answer_at_once(device, index))
        if changes:
            self._kernel.apply(changes)

    def leave(self, device: str, routers: Sequence[IPv4Address], *, proxy_arp: bool) -> None:
        """Take the routers' addresses away; ``proxy_arp``: answer ARP for nobody else any more."""
        index = socket.if_nametoindex(device)
        changes = [_drop_address(device, index, router) for router in routers]
        self._kernel.apply(changes + ([_answer_for_others(device, index, answer=0)] if proxy_arp else []))

    def _addresses(self, index: int) -> set[IPv4Address]:
        found: set[IPv4Address] = set()
        for content in self._kernel.dump(_GET_ADDRESS, _ADDRESS_MESSAGE.pack(socket.AF_INET, 0, 0, 0, 0)):
            told = attributes(content[_ADDRESS_MESSAGE.size :])
            if _ADDRESS_MESSAGE.unpack_from(content)[4] == index and _LOCAL in told:
                found.add(IPv4Address(told[_LOCAL]))
        return found


def _put_address(device: str, index: int, address: IPv4Address) -> Request:
    # Of itself alone: a longer one would make a route of the whole prefix to this bridge.
    body = _ADDRESS_MESSAGE.pack(socket.AF_INET, 32, 0, 0, index)
    body += attribute(_LOCAL, address.packed) + attribute(_ADDRESS, address.packed)
    return Request(_NEW_ADDRESS, CREATE | REPLACE, body, f"address {address} dev {device}")


def _drop_address(device: str, index: int, address: IPv4Address) -> Request:
    body = _ADDRESS_MESSAGE.pack(socket.AF_INET, 32, 0, 0, index) + attribute(_LOCAL, address.packed)
    return Request(_DELETE_ADDRESS, 0, body, f"address {address} dev {device}", removal=True)


def answers_for_others(device: str) -> bool:
    """Whether the device answers ARP for hosts elsewhere."""
    return _reads(f"conf/{device}/proxy_arp") == "1"


def _answer_for_others(device: str, index: int, *, answer: int = 1) -> Request:
    settings = attribute(_SETTINGS, number(_PROXY_ARP, answer))
    body = _LINK_MESSAGE.pack(socket.AF_UNSPEC, 0, index, 0, 0)
    body += attribute(_FAMILIES, attribute(socket.AF_INET, settings))
    return Request(_SET_LINK, 0, body, f"proxy ARP of {device}")


def _answer_at_once(device: str, index: int) -> Request:
    # By default it waits up to 0.8 s, and the first packets of a VM that arrived wait with it.
    parameters = number(_OF_DEVICE, index) + attribute(_PROXY_DELAY, struct.pack("=Q", 0))
    body = _TABLE_MESSAGE.pack(socket.AF_INET, 0) + attribute(_TABLE_NAME, b"arp_cache\0")
    body += attribute(_TABLE_PARAMETERS, parameters)
    return Request(_SET_NEIGHBOUR_TABLE, 0, body, f"proxy ARP's delay of {device}")


def _reads(name: str) -> str:
    try:
        return Path("/proc/sys/net/ipv4", name).read_text().strip()
    except OSError:
        return ""
