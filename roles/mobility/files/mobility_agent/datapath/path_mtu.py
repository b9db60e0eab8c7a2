# SPDX-License-Identifier: GPL-3.0-or-later
"""What routers on the way say about our tunnels: packet-too-big about an outer packet of ours (RFC 2473 7.2).

The kernel knows of no tunnel there (seg6 has none), so nobody else would tell the sender.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Callable
from ipaddress import IPv6Address

logger = logging.getLogger(__name__)

_PACKET_TOO_BIG = 2
_FILTER = 1
_IPV6 = 41
_MINIMUM_MTU = 1280


def parse(message: bytes, own: IPv6Address) -> tuple[IPv6Address, int] | None:
    """(tunnel end, octets) out of a packet-too-big about a tunnelled packet that ``own`` sent; else None."""
    if len(message) < 48 or message[0] != _PACKET_TOO_BIG or message[14] != _IPV6:
        return None
    (octets,) = struct.unpack_from(">I", message, 4)
    if IPv6Address(message[16:32]) != own or octets < _MINIMUM_MTU or octets > 65535:
        return None
    return IPv6Address(message[32:48]), int(octets)


class PathMtuListener:
    """Hears packet-too-big messages to this host; ``learn(tunnel end, octets)`` gets what they say."""

    def __init__(self, own: IPv6Address, learn: Callable[[IPv6Address, int], None]) -> None:
        self._own = own
        self._learn = learn
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Listen. Raises OSError without CAP_NET_RAW."""
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        own = socket.socket(socket.AF_INET6, kind, socket.IPPROTO_ICMPV6)
        # A bit for each type; set: blocked (RFC 3542 section 3.2).
        mask = [0xFFFFFFFF] * 8
        mask[0] &= ~(1 << _PACKET_TOO_BIG) & 0xFFFFFFFF
        own.setsockopt(socket.IPPROTO_ICMPV6, _FILTER, struct.pack("=8I", *mask))
        self._socket = own
        asyncio.get_running_loop().add_reader(own.fileno(), self._read)

    def stop(self) -> None:
        """Listen no more."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def _read(self) -> None:
        for _unused in range(32):
            if self._socket is None:
                return
            try:
                message = self._socket.recv(2048)
            except BlockingIOError:
                return
            except OSError as error:
                logger.debug("packet-too-big: %s", error)
                return
            told = parse(message, self._own)
            if told is not None:
                self._learn(*told)
