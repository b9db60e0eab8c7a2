# SPDX-License-Identifier: GPL-3.0-or-later
"""The handshake of NBD as QEMU's client begins it for the mirror of a disk.

Source: NetworkBlockDevice/nbd, doc/proto.md (newstyle negotiation, NBD_OPT_*); QEMU, nbd/client.c
(nbd_receive_negotiate), block/nbd.c.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

GREETING_BYTES: Final = 18
GREETING: Final = b"NBDMAGICIHAVEOPT"
OPTION_MAGIC: Final = b"IHAVEOPT"
REPLY_MAGIC: Final = 0x3E889045565A9
OPTION: Final = struct.Struct(">8sII")
OPTION_REPLY: Final = struct.Struct(">QIII")
CLIENT_FLAGS_BYTES: Final = 4
LARGEST_OPTION_BYTES: Final = 4096

GO: Final = 7
STRUCTURED_REPLY: Final = 8
SET_META_CONTEXT: Final = 10
EXTENDED_HEADERS: Final = 11
ACKNOWLEDGED: Final = 1
IS_ERROR: Final = 1 << 31
_INFO_BLOCK_SIZE: Final = 3
_FIXED_NEWSTYLE_NO_ZEROES: Final = bytes.fromhex("00000003")
# QEMU asks for extended headers since 8.2 and for structured replies before.
EXTENDED_HEADERS_SINCE: Final = 8_002_000


def option(number: int, data: bytes = b"") -> bytes:
    """An option of the client."""
    return OPTION.pack(OPTION_MAGIC, number, len(data)) + data


def opening(export: str, emulator_version: int) -> tuple[bytes, ...]:
    """All that QEMU's client says until it may read and write; its version as 1000000 * major + 1000 * minor.

    The first, empty one stands for the server's greeting, which comes unasked.
    """
    name = export.encode()
    counted = len(name).to_bytes(4) + name
    context = b"base:allocation"
    extended = emulator_version >= EXTENDED_HEADERS_SINCE
    return (
        b"",
        _FIXED_NEWSTYLE_NO_ZEROES,
        option(EXTENDED_HEADERS if extended else STRUCTURED_REPLY),
        option(SET_META_CONTEXT, counted + (1).to_bytes(4) + len(context).to_bytes(4) + context),
        option(GO, counted + (1).to_bytes(2) + _INFO_BLOCK_SIZE.to_bytes(2)),
    )


def has_extended_headers(requests: Sequence[bytes]) -> bool:
    """Whether a handshake whose options were all acknowledged asked for them."""
    return option(EXTENDED_HEADERS) in requests


def export_of(requests: Sequence[bytes]) -> str | None:
    """The export that a handshake asks for; None while it has not named one."""
    for raw in requests:
        if len(raw) < OPTION.size + 4 or not raw.startswith(OPTION_MAGIC):
            continue
        if OPTION.unpack_from(raw)[1] in {GO, SET_META_CONTEXT}:
            # Both begin with the name, counted.
            start = OPTION.size + 4
            length = int.from_bytes(raw[OPTION.size : start])
            return raw[start : start + length].decode(errors="surrogateescape")
    return None


def is_option(raw: bytes) -> bool:
    """Whether it is a whole option that may be asked ahead."""
    if not OPTION.size <= len(raw) <= LARGEST_OPTION_BYTES:
        return False
    magic, number, length = OPTION.unpack_from(raw)
    return (
        magic == OPTION_MAGIC
        and OPTION.size + length == len(raw)
        and number in {GO, STRUCTURED_REPLY, SET_META_CONTEXT, EXTENDED_HEADERS}
    )


def is_opening(requests: tuple[bytes, ...]) -> bool:
    """Whether it is an opening and nothing more: one that ends with its first GO."""
    return (
        len(requests) >= 3
        and requests[0] == b""
        and len(requests[1]) == CLIENT_FLAGS_BYTES
        and all(is_option(raw) for raw in requests[2:])
        and [OPTION.unpack_from(raw)[1] == GO for raw in requests[2:]]
        == [False] * (len(requests) - 3) + [True]
    )
