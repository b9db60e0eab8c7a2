# SPDX-License-Identifier: GPL-3.0-or-later
"""Frames of the channel, byte by byte (docs/wire-protocol.md): pure, no sockets, no clock.

A length is checked against what its type allows before any memory is taken for it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any

from precache_proxy.errors import ProtocolError
from precache_proxy.units import KIB, MIB

MAGIC = b"LBCH"
VERSION = 1
MAX_MESSAGE_BYTES = MIB + 4096
MAX_HELLO_BYTES = 4 * KIB
MAX_JSON_BYTES = 192 * KIB  # below the first credit: OPEN must not have to wait for more
# Every sequenced frame costs this beside its payload, so that credit bounds memory for tiny messages too.
FRAME_CHARGE_BYTES = 64

HEADER = struct.Struct(">BBBxIIQ")
_HELLO = struct.Struct(">4sHH")
_U64 = struct.Struct(">Q")
# Small reads go here first, so that many small frames cost one read of the socket.
_STAGING_BYTES = 32 * KIB


class FrameType(IntEnum):
    """What a frame is. OPEN, DATA and CLOSE are numbered in their stream, acknowledged and resent."""

    OPEN = 1
    DATA = 2
    CLOSE = 3
    ACKNOWLEDGE = 4
    RESET = 5
    RESET_DONE = 6
    PING = 7
    PONG = 8
    SYNC = 9
    GOODBYE = 10


SEQUENCED = frozenset({FrameType.OPEN, FrameType.DATA, FrameType.CLOSE})


class FrameFlag(IntFlag):
    """Flags of a frame."""

    NONE = 0
    END_OF_MESSAGE = 1  # DATA: the message ends with this frame
    GONE = 2  # ACKNOWLEDGE: the stream is over here, everything of it counts as received


# (least, most) payload bytes of each type.
_LENGTHS: dict[int, tuple[int, int]] = {
    FrameType.OPEN: (2, MAX_JSON_BYTES),
    FrameType.DATA: (0, MAX_MESSAGE_BYTES),
    FrameType.CLOSE: (0, 0),
    FrameType.ACKNOWLEDGE: (8, 8),
    FrameType.RESET: (2, MAX_JSON_BYTES),
    FrameType.RESET_DONE: (0, 0),
    FrameType.PING: (8, 8),
    FrameType.PONG: (8, 8),
    FrameType.SYNC: (0, 0),
    FrameType.GOODBYE: (2, MAX_JSON_BYTES),
}
_TYPES = {int(member): member for member in FrameType}
_ALL_FLAGS = int(FrameFlag.END_OF_MESSAGE | FrameFlag.GONE)
_CLASSES = 4


@dataclass(slots=True)
class Frame:
    """One frame as it arrived. ``sequence`` of an ACKNOWLEDGE is the next frame number expected."""

    type: FrameType
    flags: int
    traffic_class: int
    stream: int
    sequence: int
    payload: bytearray | bytes

    @property
    def wire_bytes(self) -> int:
        """Length on the wire, before TLS."""
        return HEADER.size + len(self.payload)


def pack_header(
    kind: FrameType,
    length: int,
    *,
    flags: int = 0,
    traffic_class: int = 0,
    stream: int = 0,
    sequence: int = 0,
) -> bytes:
    """The 20 bytes before a payload of ``length`` bytes."""
    return HEADER.pack(kind, flags, traffic_class, length, stream, sequence)


def pack(
    kind: FrameType,
    payload: bytes = b"",
    *,
    flags: int = 0,
    traffic_class: int = 0,
    stream: int = 0,
    sequence: int = 0,
) -> bytes:
    """A whole frame."""
    return (
        pack_header(
            kind, len(payload), flags=flags, traffic_class=traffic_class, stream=stream, sequence=sequence
        )
        + payload
    )


def pack_acknowledge(stream: int, next_sequence: int, limit_bytes: int, *, gone: bool = False) -> bytes:
    """Everything before ``next_sequence`` is here; in all ``limit_bytes`` (charged bytes) may be sent."""
    flags = FrameFlag.GONE if gone else FrameFlag.NONE
    return pack(
        FrameType.ACKNOWLEDGE, _U64.pack(limit_bytes), flags=flags, stream=stream, sequence=next_sequence
    )


def pack_u64(number: int) -> bytes:
    """Payload of a ping."""
    return _U64.pack(number)


def unpack_u64(payload: bytes | bytearray) -> int:
    """The number in an 8-byte payload."""
    number: int = _U64.unpack(payload)[0]
    return number


def pack_json(value: Any) -> bytes:
    """JSON as it stands in frames: UTF-8, compact."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def unpack_json(payload: bytes | bytearray, what: str) -> dict[str, Any]:
    """The JSON object in a payload. Raises ProtocolError."""
    try:
        value = json.loads(bytes(payload))
    except (ValueError, RecursionError) as error:
        raise ProtocolError(
            f"{what}: not JSON ({error}); the other side is broken or speaks another protocol"
        ) from error
    if not isinstance(value, dict):
        raise ProtocolError(f"{what}: a JSON object is expected, not {type(value).__name__}")
    return value


def pack_hello(content: dict[str, Any]) -> bytes:
    """The first bytes of a connection, in both directions."""
    body = pack_json(content)
    if len(body) > MAX_HELLO_BYTES:
        raise ProtocolError(
            f"hello of {len(body)} bytes: at most {MAX_HELLO_BYTES} are allowed; shorten the names"
        )
    return _HELLO.pack(MAGIC, VERSION, len(body)) + body


HELLO_HEADER_BYTES = _HELLO.size


def unpack_hello_header(header: bytes | bytearray) -> tuple[int, int]:
    """(version, length of the body). Raises ProtocolError on another protocol or an impossible length."""
    magic, version, length = _HELLO.unpack(bytes(header))
    if magic != MAGIC:
        raise ProtocolError(
            f"hello begins with {magic!r}, not {MAGIC!r}: something else than a precache proxy speaks"
        )
    if not 2 <= length <= MAX_HELLO_BYTES:
        raise ProtocolError(f"hello of {length} bytes: 2 to {MAX_HELLO_BYTES} are allowed")
    return version, length


class FrameParser:
    """Cuts what a socket delivers into frames; payloads of large frames are read straight into their place.

    Use: ``n = socket.recv_into(parser.buffer())``, then ``for frame in parser.received(n)``.
    After a ProtocolError the parser must not be used again.
    """

    def __init__(self) -> None:
        self._staging = memoryview(bytearray(_STAGING_BYTES))
        self._start = 0
        self._end = 0
        self._head: tuple[FrameType, int, int, int, int] | None = None
        self._payload = bytearray()
        self._view = memoryview(self._payload)
        self._filled = 0
        self._direct = False

    def buffer(self) -> memoryview:
        """Where the next bytes belong; never empty."""
        if self._head is not None and len(self._payload) - self._filled > _STAGING_BYTES // 2:
            self._direct = True
            return self._view[self._filled :]
        self._direct = False
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end > _STAGING_BYTES // 2:
            # Less than a header is left over: everything longer was moved into a payload.
            rest = bytes(self._staging[self._start : self._end])
            self._staging[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        return self._staging[self._end :]

    def received(self, count: int) -> Iterator[Frame]:
        """The frames that are whole now that ``count`` more bytes are in :meth:`buffer`."""
        if self._direct:
            self._filled += count
            if self._filled == len(self._payload):
                yield self._finish()
            return
        self._end += count
        while True:
            if self._head is None:
                if self._end - self._start < HEADER.size:
                    return
                self._begin()
            wanted = min(len(self._payload) - self._filled, self._end - self._start)
            if wanted:
                self._view[self._filled : self._filled + wanted] = self._staging[
                    self._start : self._start + wanted
                ]
                self._filled += wanted
                self._start += wanted
            if self._filled < len(self._payload):
                return
            yield self._finish()

    def _begin(self) -> None:
        kind, flags, traffic_class, length, stream, sequence = HEADER.unpack_from(self._staging, self._start)
        self._start += HEADER.size
        known = _TYPES.get(kind)
        if known is None:
            raise ProtocolError(
                f"frame of unknown type {kind}; the other side is broken or newer than version {VERSION}"
            )
        least, most = _LENGTHS[known]
        if not least <= length <= most:
            raise ProtocolError(f"{known.name} frame of {length} bytes: {least} to {most} are allowed")
        if flags & ~_ALL_FLAGS or traffic_class >= _CLASSES:
            raise ProtocolError(
                f"{known.name} frame with flags {flags:#x}, class {traffic_class}: not known here"
            )
        self._head = (known, flags, traffic_class, stream, sequence)
        self._payload = bytearray(length)
        self._view = memoryview(self._payload)
        self._filled = 0

    def _finish(self) -> Frame:
        assert self._head is not None
        kind, flags, traffic_class, stream, sequence = self._head
        frame = Frame(kind, flags, traffic_class, stream, sequence, self._payload)
        self._head = None
        self._payload = bytearray()
        self._view = memoryview(self._payload)
        self._filled = 0
        return frame
