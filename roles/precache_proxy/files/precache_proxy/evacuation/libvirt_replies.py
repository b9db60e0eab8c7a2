# SPDX-License-Identifier: GPL-3.0-or-later
"""Looks for one reply in a stream of libvirt's RPC, so that a test can lose just that one.

Source: libvirt, src/rpc/virnetprotocol.x (a packet: length, then program, version, procedure, type, serial
and status, each 32 bits, big-endian) and src/remote/remote_protocol.x (the procedures).
"""

from __future__ import annotations

import struct
from typing import Final

DOMAIN_MIGRATE_FINISH3_PARAMS: Final = 306
_REMOTE_PROGRAM: Final = 0x20008086
_REPLY: Final = 1
_HEADER = struct.Struct(">IIIIIII")


class Replies:
    """Follows the packets of one direction of a connection, however they are cut into pieces."""

    def __init__(self, procedure: int) -> None:
        self._procedure = procedure
        self._rest = b""
        self._skip = 0

    def contain(self, piece: bytes) -> bool:
        """Whether the reply to the procedure begins in what has come so far and in this piece."""
        data = self._rest + piece
        while True:
            if self._skip >= len(data):
                self._skip -= len(data)
                self._rest = b""
                return False
            data = data[self._skip :]
            self._skip = 0
            if len(data) < _HEADER.size:
                self._rest = data
                return False
            length, program, _version, procedure, kind, _serial, _status = _HEADER.unpack_from(data)
            if (program, procedure, kind) == (_REMOTE_PROGRAM, self._procedure, _REPLY):
                return True
            self._skip = max(length, _HEADER.size)
