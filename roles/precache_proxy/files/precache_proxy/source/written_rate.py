# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast a guest changes its disks, as far as that has to cross: blocks that changed between passes."""

from __future__ import annotations

# What an earlier interval counts beside the one after it.
_FADES = 0.5
# Of less than this nothing can be said.
_LEAST_SECONDS = 1.0


class WrittenRate:
    """Bytes changed over the intervals between passes, the latest counting most; a block once in each."""

    def __init__(self) -> None:
        self._bytes = 0.0
        self._seconds = 0.0

    def passed(self, changed_bytes: int, seconds: float) -> None:
        """An interval is over, at its pass: so much had changed in it."""
        self._bytes = self._bytes * _FADES + changed_bytes
        self._seconds = self._seconds * _FADES + max(0.0, seconds)

    def bytes_per_second(self, changed_bytes: int, seconds: float | None) -> float | None:
        """With what changed in the interval that has not ended yet (None: nobody knows since when)."""
        if seconds is None:
            changed_bytes, seconds = 0, 0.0
        whole = self._seconds + seconds
        return (self._bytes + changed_bytes) / whole if whole >= _LEAST_SECONDS else None
