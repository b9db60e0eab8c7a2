# SPDX-License-Identifier: GPL-3.0-or-later
"""Requests to the kernel's rtnetlink, many in one write, each acknowledged.

Routes and neighbours change with every hand-over, thousands of them when an anchor starts: they go this way,
at some 20 microseconds each. What changes at start only (links, addresses, rules) goes through pyroute2.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mobility_agent.errors import KernelRefused, Unsupported

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_ERROR = 2
_DONE = 3
_REQUEST, _ACKNOWLEDGE, _DUMP = 0x1, 0x4, 0x300
REPLACE, CREATE = 0x100, 0x400
# A group of requests: small enough for the socket's buffers, acknowledgements included.
_GROUP = 64
_SOL_NETLINK, _EXTENDED_ACK = 270, 11
# What a delete may find done already, whoever did it.
_GONE = frozenset({errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EADDRNOTAVAIL})


def attribute(kind: int, body: bytes) -> bytes:
    """One attribute, padded to four octets."""
    length = _ATTRIBUTE.size + len(body)
    return _ATTRIBUTE.pack(length, kind) + body + bytes(-length % 4)


def number(kind: int, value: int) -> bytes:
    """An attribute of 32 bits."""
    return attribute(kind, struct.pack("=I", value))


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes in ``data``; of one kind the last counts."""
    found: dict[int, bytes] = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind & 0x3FFF] = data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return found


@dataclass(frozen=True, slots=True)
class Request:
    """One change. ``subject`` is how an error names it; ``removal``: nothing to remove is no error."""

    kind: int
    flags: int
    body: bytes
    subject: str
    removal: bool = False


class RouteSocket:
    """A connection to rtnetlink in the network namespace of the thread that makes it."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._socket.bind((0, 0))
        # The kernel's own words for why it refused.
        self._socket.setsockopt(_SOL_NETLINK, _EXTENDED_ACK, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._socket.settimeout(10)
        self._sequence = 0

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()

    def _messages(self) -> Iterator[tuple[int, int, int, bytes]]:
        data = self._socket.recv(1 << 18)
        at = 0
        while at + _HEADER.size <= len(data):
            length, kind, flags, sequence, _unused = _HEADER.unpack_from(data, at)
            yield kind, flags, sequence, data[at + _HEADER.size : at + length]
            at += (length + 3) & ~3

    def apply(self, requests: Sequence[Request]) -> None:
        """Do every request, in order; one that fails does not keep the others.

        Raises KernelRefused (or Unsupported) with the first failure, after all were tried.
        """
        failures: list[KernelRefused | Unsupported] = []
        for start in range(0, len(requests), _GROUP):
            group = requests[start : start + _GROUP]
            first = self._sequence + 1
            self._sequence += len(group)
            self._socket.send(
                b"".join(
                    _HEADER.pack(
                        _HEADER.size + len(request.body),
                        request.kind,
                        _REQUEST | _ACKNOWLEDGE | request.flags,
                        first + index,
                        0,
                    )
                    + request.body
                    for index, request in enumerate(group)
                )
            )
            failures += self._collect(group, first)
        if failures:
            raise failures[0]

    def _collect(self, group: Sequence[Request], first: int) -> list[KernelRefused | Unsupported]:
        failures: list[KernelRefused | Unsupported] = []
        waiting = len(group)
        while waiting:
            for kind, flags, sequence, body in self._messages():
                if kind != _ERROR or not first <= sequence < first + len(group):
                    continue
                waiting -= 1
                code = -struct.unpack_from("=i", body)[0]
                request = group[sequence - first]
                if code and not (request.removal and code in _GONE):
                    failures.append(_refusal(request, code, _words(flags, body)))
        return failures

    def dump(self, kind: int, body: bytes) -> Iterator[bytes]:
        """The bodies of all objects of a kind."""
        self._sequence += 1
        wanted = self._sequence
        head = _HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | _DUMP, wanted, 0)
        self._socket.send(head + body)
        while True:
            for reply, _unused, sequence, content in self._messages():
                if sequence != wanted:
                    continue
                if reply == _DONE:
                    return
                if reply == _ERROR:
                    code = -struct.unpack_from("=i", content)[0]
                    raise KernelRefused(f"reading from the kernel: {os.strerror(code)}; run as root")
                yield content


def _words(flags: int, body: bytes) -> str:
    """The sentence of an extended acknowledgement, where the kernel gave one."""
    capped, has_attributes = 0x100, 0x200
    if not flags & has_attributes:
        return ""
    (length,) = struct.unpack_from("=I", body, 4)
    at = 4 + (_HEADER.size if flags & capped else length)
    return attributes(body[at:]).get(1, b"").rstrip(b"\0").decode(errors="replace")


def _refusal(request: Request, code: int, words: str) -> KernelRefused | Unsupported:
    reason = f"{os.strerror(code)}{f' ({words})' if words else ''}"
    if code in {errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT}:
        return Unsupported(
            f"{request.subject}: this kernel does not know it: {reason}; "
            "a kernel with CONFIG_IPV6_SEG6_LWTUNNEL is needed"
        )
    if code in {errno.EPERM, errno.EACCES}:
        return KernelRefused(f"{request.subject}: not allowed: {reason}; the agent needs CAP_NET_ADMIN")
    return KernelRefused(f"{request.subject}: the kernel refused: {reason}")
