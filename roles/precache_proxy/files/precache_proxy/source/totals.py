# SPDX-License-Identifier: GPL-3.0-or-later
"""What the passes of one VM came to since the proxy took it up: figures that only grow."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class PassTotals:
    """Counters of one VM. ``clock``: seconds, monotonic.

    ``made``: passes whose generation was sealed; ``empty``: passes that found nothing to send; ``failed``:
    passes that came to neither; one that was called off counts as none of them.
    """

    clock: Callable[[], float] = time.monotonic
    made: int = 0
    empty: int = 0
    failed: int = 0
    data_bytes: int = 0
    zero_bytes: int = 0
    wire_bytes: int = 0
    _closed_seconds: float = 0.0
    _opened_at: float | None = None

    @property
    def open_seconds(self) -> float:
        """How long backup jobs were open in QEMU: of first copies too, and one that is open by now."""
        now_open = 0.0 if self._opened_at is None else self.clock() - self._opened_at
        return self._closed_seconds + now_open

    @contextlib.contextmanager
    def backup_open(self) -> Iterator[None]:
        """A backup job is open for as long as this lasts; a VM has one at a time."""
        self._opened_at = self.clock()
        try:
            yield
        finally:
            self._closed_seconds += self.clock() - self._opened_at
            self._opened_at = None

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count a pass as failed when an error ends it."""
        try:
            yield
        except Exception:
            self.failed += 1
            raise

    def add_sent(self, *, data_bytes: int, zero_bytes: int, wire_bytes: int) -> None:
        """What a pass sent, whatever became of it."""
        self.data_bytes += data_bytes
        self.zero_bytes += zero_bytes
        self.wire_bytes += wire_bytes

    def as_dict(self) -> dict[str, Any]:
        """For the status."""
        return {
            "made": self.made,
            "empty": self.empty,
            "failed": self.failed,
            "data_bytes": self.data_bytes,
            "zero_bytes": self.zero_bytes,
            "wire_bytes": self.wire_bytes,
            "open_seconds": self.open_seconds,
        }
