# SPDX-License-Identifier: GPL-3.0-or-later
"""Neighbour discovery on the VMs' links (RFC 4861): answering for who is elsewhere, telling who has come.

Two VMs of one home prefix at two sites believe each other on-link. The gateway at either site answers for the
one that is not there, with the router's MAC, so that their packets come to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import socket
import struct
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address

from mobility_agent.datapath import ipv4
from mobility_agent.homes import Address

logger = logging.getLogger(__name__)

_ETHERTYPE = 0x86DD
_ICMP = 58
_SOLICITATION, _ADVERTISEMENT = 135, 136
_TARGET_LINK_LAYER = 2
_ROUTER, _SOLICITED, _OVERRIDE = 0x80000000, 0x40000000, 0x20000000
ALL_NODES = IPv6Address("ff02::1")
_ALL_NODES_MAC = bytes.fromhex("333300000001")
_UNSPECIFIED = IPv6Address(0)
_ATTACH_FILTER, _PACKET, _ADD_MEMBERSHIP, _ALL_MULTICAST = 26, 263, 1, 2

# Neighbour solicitations only: next header ICMPv6, type 135. All else stays in the kernel.
_FILTER = [
    (0x30, 0, 0, 20),
    (0x15, 0, 3, _ICMP),
    (0x30, 0, 0, 54),
    (0x15, 0, 1, _SOLICITATION),
    (0x06, 0, 0, 0x40000),
    (0x06, 0, 0, 0),
]


def _octets(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def checksum(source: IPv6Address, destination: IPv6Address, message: bytes) -> int:
    """RFC 4443 section 2.3, over ``message`` with its checksum field as it is."""
    pseudo = source.packed + destination.packed + struct.pack(">II", len(message), _ICMP)
    return (0xFFFF - int.from_bytes(pseudo + message, "big") % 0xFFFF) % 0xFFFF


def advertisement(
    router_mac: str,
    source: IPv6Address,
    target: IPv6Address,
    target_mac: str,
    *,
    to: tuple[IPv6Address, bytes] = (ALL_NODES, _ALL_NODES_MAC),
    solicited: bool = False,
    router: bool = False,
) -> bytes:
    """An Ethernet frame saying that ``target`` is at ``target_mac``; sent from ``router_mac``."""
    destination, destination_mac = to
    # Overriding only when unsolicited: what is proxied yields to one who has the address (RFC 4861 7.2.8).
    flags = (_SOLICITED if solicited else _OVERRIDE) | (_ROUTER if router else 0)
    body = struct.pack(">BBHI", _ADVERTISEMENT, 0, 0, flags) + target.packed
    body += bytes([_TARGET_LINK_LAYER, 1]) + _octets(target_mac)
    sum_field = checksum(source, destination, body).to_bytes(2, "big")
    body = body[:2] + sum_field + body[4:]
    head = struct.pack(">IHBB", 6 << 28, len(body), _ICMP, 255) + source.packed + destination.packed
    return destination_mac + _octets(router_mac) + struct.pack(">H", _ETHERTYPE) + head + body


class Solicitation:
    """A neighbour solicitation as it came in."""

    __slots__ = ("mac", "source", "target")

    def __init__(self, mac: bytes, source: IPv6Address, target: IPv6Address) -> None:
        self.mac = mac
        self.source = source
        self.target = target

    @property
    def duplicate_detection(self) -> bool:
        """Whether it only asks if the address is free (RFC 4862 section 5.4)."""
        return self.source == _UNSPECIFIED


def parse_solicitation(frame: bytes) -> Solicitation | None:
    """The solicitation in an Ethernet frame; None for anything else or anything wrong (RFC 4861 7.1.1)."""
    if len(frame) < 78 or frame[12:14] != b"\x86\xdd" or frame[20] != _ICMP or frame[54] != _SOLICITATION:
        return None
    length = int.from_bytes(frame[18:20], "big")
    # A hop limit of 255: it was sent on this link.
    if frame[21] != 255 or len(frame) < 54 + length or length < 24 or frame[55] != 0:
        return None
    source, destination = IPv6Address(frame[22:38]), IPv6Address(frame[38:54])
    if checksum(source, destination, frame[54 : 54 + length]) != 0:
        return None
    target = IPv6Address(frame[62:78])
    return None if target.is_multicast else Solicitation(frame[6:12], source, target)


class Responder:
    """Listens on one bridge; ``elsewhere(target, duplicate_detection)`` says whether to answer for it.

    ``heard(address, mac)`` is told of every address that a solicitation shows to be in use, or about to be.
    """

    def __init__(
        self,
        device: str,
        mac: str,
        link_local: IPv6Address,
        elsewhere: Callable[[IPv6Address, bool], bool],
        heard: Callable[[IPv6Address, bytes], None] | None = None,
    ) -> None:
        self.device = device
        self._mac = mac
        self._link_local = link_local
        self._elsewhere = elsewhere
        self._heard = heard
        self._socket: socket.socket | None = None
        self._index = 0
        self.answered = 0

    @property
    def listening(self) -> bool:
        """Whether it hears anything: the device may be another of the same name by now."""
        if self._socket is None:
            return False
        try:
            return socket.if_nametoindex(self.device) == self._index
        except OSError:
            return False

    def start(self) -> None:
        """Listen. Raises OSError when the device is not there."""
        self.stop()
        # No protocol yet: nothing may come in before the filter stands.
        own = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
        try:
            program = b"".join(struct.pack("=HBBI", *line) for line in _FILTER)
            held = ctypes.create_string_buffer(program)
            filter_program = struct.pack("@HP", len(_FILTER), ctypes.addressof(held))
            own.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, filter_program)
            own.bind((self.device, _ETHERTYPE))
            self._index = socket.if_nametoindex(self.device)
            # The solicited-node groups of VMs that are not here: nobody has joined them.
            own.setsockopt(
                _PACKET, _ADD_MEMBERSHIP, struct.pack("=IHH8s", self._index, _ALL_MULTICAST, 0, b"")
            )
        except OSError:
            own.close()
            raise
        self._socket = own
        asyncio.get_running_loop().add_reader(own.fileno(), self._read)

    def stop(self) -> None:
        """Listen no more."""
        if self._socket is not None:
            with contextlib.suppress(ValueError, RuntimeError):
                asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def _read(self) -> None:
        # Bounded: a storm of solicitations must not keep the loop from its other work.
        for _unused in range(64):
            if self._socket is None:
                return
            try:
                frame, told = self._socket.recvfrom(2048)
            except BlockingIOError:
                return
            except OSError as error:
                # The device is down or gone; whoever started us sees to that.
                logger.debug("bridge %s: neighbour discovery ended: %s", self.device, error)
                self.stop()
                return
            if told[2] == socket.PACKET_OUTGOING:
                continue
            asked = parse_solicitation(frame)
            if asked is not None and self._heard is not None:
                self._heard(asked.target if asked.duplicate_detection else asked.source, asked.mac)
            if asked is not None and self._elsewhere(asked.target, asked.duplicate_detection):
                self._answer(asked)

    def _answer(self, asked: Solicitation) -> None:
        to = (ALL_NODES, _ALL_NODES_MAC) if asked.duplicate_detection else (asked.source, asked.mac)
        self._send(
            advertisement(
                self._mac,
                self._link_local,
                asked.target,
                self._mac,
                to=to,
                solicited=not asked.duplicate_detection,
            )
        )
        self.answered += 1

    def announce(self, target: Address, mac: str | None = None) -> None:
        """Tell everybody on the link that ``target`` is at ``mac``; without one, that we answer for it."""
        if isinstance(target, IPv4Address):
            self._send(ipv4.announcement(self._mac, target, mac or self._mac))
        else:
            self._send(advertisement(self._mac, self._link_local, target, mac or self._mac))

    def _send(self, frame: bytes) -> None:
        if self._socket is None:
            return
        try:
            self._socket.send(frame)
        except OSError as error:
            # Neighbours that missed it ask again.
            logger.debug("bridge %s: advertisement not sent: %s", self.device, error)
