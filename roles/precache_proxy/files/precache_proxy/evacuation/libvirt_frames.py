# SPDX-License-Identifier: GPL-3.0-or-later
"""Packets of libvirt's RPC, and the calls by which a libvirtd opens its connection for a migration.

Source: libvirt, src/rpc/virnetprotocol.x (a packet: length, then program, version, procedure, type, serial
and status, each 32 bits, big-endian; the length counts itself), src/remote/remote_protocol.x (the
procedures), src/remote/remote_driver.c (doRemoteOpen) and src/qemu/qemu_migration.c (the features that a
peer-to-peer migration asks for).
"""

from __future__ import annotations

import struct
from typing import Final

from precache_proxy.units import KIB

CONNECT_OPEN: Final = 1
CONNECT_SUPPORTS_FEATURE: Final = 60
AUTH_LIST: Final = 66
DOMAIN_MIGRATE_PREPARE3_PARAMS: Final = 303
DOMAIN_MIGRATE_FINISH3_PARAMS: Final = 306
CONNECT_REGISTER_CLOSE_CALLBACK: Final = 360
REMOTE_PROGRAM: Final = 0x20008086
KEEPALIVE_PROGRAM: Final = 0x6B656570
KEEPALIVE_PING: Final = 1
KEEPALIVE_PONG: Final = 2
CALL: Final = 0
REPLY: Final = 1
MESSAGE: Final = 2
OK: Final = 0
# No call of an opening, and no reply to one, is anywhere near this.
LARGEST_OPENING_BYTES: Final = 4 * KIB
# It changes nothing at the destination, but for the connection itself: nothing else may be asked ahead.
OPENING_CALLS: Final = frozenset(
    {CONNECT_OPEN, CONNECT_SUPPORTS_FEATURE, AUTH_LIST, CONNECT_REGISTER_CLOSE_CALLBACK}
)
HEADER: Final = struct.Struct(">IIIIIII")
_VERSION: Final = 1
_SERIAL: Final = slice(20, 24)


def packet(program: int, procedure: int, kind: int, payload: bytes = b"", *, serial: int = 0) -> bytes:
    """A packet with status OK."""
    length = HEADER.size + len(payload)
    return HEADER.pack(length, program, _VERSION, procedure, kind, serial, OK) + payload


def call(procedure: int, payload: bytes = b"") -> bytes:
    """A call of the remote program, with serial 0."""
    return packet(REMOTE_PROGRAM, procedure, CALL, payload)


def supports_feature(feature: int) -> bytes:
    """The question for one feature (libvirt, src/libvirt_internal.h, virDrvFeature)."""
    return call(CONNECT_SUPPORTS_FEATURE, feature.to_bytes(4))


# What libvirt 9.0 to 11.3 ask in this order: KEEPALIVE, then the connection to qemu:///system, then
# REMOTE_EVENT_CALLBACK, REMOTE_CLOSE_CALLBACK, and MIGRATION_P2P, _V3 and _PARAMS.
_SYSTEM: Final = b"qemu:///system"
OPENING: Final = (
    call(AUTH_LIST),
    supports_feature(10),
    call(CONNECT_OPEN, b"\0\0\0\1" + len(_SYSTEM).to_bytes(4) + _SYSTEM + b"\0\0" + bytes(4)),
    supports_feature(14),
    supports_feature(15),
    call(CONNECT_REGISTER_CLOSE_CALLBACK),
    supports_feature(4),
    supports_feature(6),
    supports_feature(13),
)
PONG: Final = packet(KEEPALIVE_PROGRAM, KEEPALIVE_PONG, MESSAGE)


def with_serial(raw: bytes, serial: int) -> bytes:
    """The packet with another serial."""
    return raw[: _SERIAL.start] + serial.to_bytes(4) + raw[_SERIAL.stop :]


def serial_of(raw: bytes) -> int:
    """The serial of a packet."""
    return int.from_bytes(raw[_SERIAL])


def is_opening_call(raw: bytes) -> bool:
    """Whether a packet is a call that may be made ahead."""
    if not HEADER.size <= len(raw) <= LARGEST_OPENING_BYTES:
        return False
    length, program, version, procedure, kind, _serial, status = HEADER.unpack_from(raw)
    return (
        length == len(raw)
        and (program, version, kind, status) == (REMOTE_PROGRAM, _VERSION, CALL, OK)
        and procedure in OPENING_CALLS
    )


def answers(raw: bytes, request: bytes) -> bool:
    """Whether a packet is the reply to a call, good or bad."""
    _length, program, _version, procedure, kind, serial, _status = HEADER.unpack_from(raw)
    asked = HEADER.unpack_from(request)
    return (program, procedure, kind, serial) == (asked[1], asked[3], REPLY, asked[5])


def is_good(raw: bytes) -> bool:
    """Whether a reply says that the call did what it was to do."""
    return int.from_bytes(raw[24:28]) == OK


def is_keepalive(raw: bytes) -> bool:
    """Whether it only says, or asks, that somebody is still there."""
    return bool(HEADER.unpack_from(raw)[1] == KEEPALIVE_PROGRAM)


def is_ping(raw: bytes) -> bool:
    """Whether it asks if we are still there."""
    _length, program, _version, procedure, kind, _serial, _status = HEADER.unpack_from(raw)
    return (program, procedure, kind) == (KEEPALIVE_PROGRAM, KEEPALIVE_PING, MESSAGE)


def length_of(data: bytes) -> int | None:
    """How long the packet at the beginning of ``data`` is; None while that is not known."""
    return max(int.from_bytes(data[:4]), HEADER.size) if len(data) >= HEADER.size else None
