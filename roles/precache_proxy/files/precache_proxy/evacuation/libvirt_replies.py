# SPDX-License-Identifier: GPL-3.0-or-later
"""Looks for one reply in a stream of libvirt's RPC (libvirt_frames.py), without keeping what passes."""

from __future__ import annotations

from precache_proxy.evacuation.libvirt_frames import HEADER, REMOTE_PROGRAM, REPLY


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
            if len(data) < HEADER.size:
                self._rest = data
                return False
            length, program, _version, procedure, kind, _serial, _status = HEADER.unpack_from(data)
            if (program, procedure, kind) == (REMOTE_PROGRAM, self._procedure, REPLY):
                return True
            self._skip = max(length, HEADER.size)
