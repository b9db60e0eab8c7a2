# SPDX-License-Identifier: GPL-3.0-or-later
"""What this host's libvirtd asks when it opens a connection for a migration, learnt from what it asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from precache_proxy.evacuation import libvirt_frames

# As many as a peer lets be asked ahead (held_opening.py).
QUESTIONS_LIMIT: Final = 64


class KnownOpenings:
    """What it asked last, by the peer that it asked."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[bytes, ...]] = {}

    def of(self, peer: str) -> tuple[bytes, ...]:
        """What it asked last, or what the versions that we know ask."""
        return self._seen.get(peer, libvirt_frames.OPENING)

    def saw(self, peer: str, requests: Sequence[bytes]) -> None:
        """Remember a whole opening for the next time."""
        if requests:
            self._seen[peer] = tuple(libvirt_frames.with_serial(raw, 0) for raw in requests)


class OpeningHeard:
    """Listens to a connection of libvirt's until its opening is over, and then knows all of it.

    It is over with the first call that may not be asked ahead. One that ends before, or that is longer than
    any opening, teaches nothing.
    """

    def __init__(self, known: KnownOpenings, peer: str, asked: Sequence[bytes]) -> None:
        self._known = known
        self._peer = peer
        self._asked = list(asked)
        self._data = b""
        self._over = False

    def hear(self, piece: bytes) -> None:
        """Take what libvirt says next, however it is cut."""
        if self._over:
            return
        self._data += piece
        while (length := libvirt_frames.length_of(self._data)) is not None:
            if length <= libvirt_frames.LARGEST_OPENING_BYTES and len(self._data) < length:
                return
            packet, self._data = self._data[:length], self._data[length:]
            if libvirt_frames.is_keepalive(packet):
                continue
            if not libvirt_frames.is_opening_call(packet):
                self._known.saw(self._peer, self._asked)
            elif len(self._asked) < QUESTIONS_LIMIT:
                self._asked.append(packet)
                continue
            self._over, self._data = True, b""
            return
