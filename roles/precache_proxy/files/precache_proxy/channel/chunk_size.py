# SPDX-License-Identifier: GPL-3.0-or-later
"""How much is handed to a connection at once."""

from __future__ import annotations

from precache_proxy.units import KIB

_SMALLEST_BYTES = 16 * KIB
_FIRST_BYTES = 64 * KIB
_LARGEST_BYTES = 512 * KIB
# A chunk is what a message of a higher class may have to wait behind on one connection.
_CHUNK_SECONDS = 0.008


class ChunkSize:
    """Follows the rate at which a session sends. Pure: it is told the time."""

    def __init__(self, now: float) -> None:
        self.chunk_bytes = _FIRST_BYTES
        self._rate = 0.0
        self._mark = (now, 0)

    def follow(
        self, now: float, sent_wire_bytes: int, connections: int, limit_bytes_per_second: float | None
    ) -> int | None:
        """Measure anew, at most five times a second; how much unsent data the kernel may hold from now on.

        None: too early, or no connection. ``sent_wire_bytes``: since the session began.
        """
        at, sent = self._mark
        if now - at < 0.2:
            return None
        self._mark = (now, sent_wire_bytes)
        rate = (sent_wire_bytes - sent) / (now - at)
        self._rate = max(rate, self._rate + 0.5 * (rate - self._rate))
        if not connections:
            return None
        each = self._rate / connections
        if limit_bytes_per_second is not None:
            each = min(each, limit_bytes_per_second / connections)
        self.chunk_bytes = int(min(max(each * _CHUNK_SECONDS, _SMALLEST_BYTES), _LARGEST_BYTES))
        # The kernel must not run dry while the loop is busy elsewhere, nor hold much that cannot
        # be overtaken.
        return int(min(max(each * 2 * _CHUNK_SECONDS, _SMALLEST_BYTES), 2 * _LARGEST_BYTES))
