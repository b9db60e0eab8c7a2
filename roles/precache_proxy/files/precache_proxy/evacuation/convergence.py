# SPDX-License-Identifier: GPL-3.0-or-later
"""A guest that dirties its memory as fast as the channel carries it: how long it may stop.

QEMU goes round by round: each sends what the guest dirtied during the round before. Where the rounds do
not get smaller, no later one will, and a site that is about to lose its power cannot wait for them: the
guest is allowed to stop for as long as what is left takes, within what the operator allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

# The first rounds are bulk; from then on each should be clearly smaller than the one before.
_BULK_ROUNDS: Final = 2
_CONVERGES_BELOW: Final = 0.7
_ROUNDS_WITHOUT_PROGRESS: Final = 2
# What is left is measured while the guest goes on dirtying.
_MARGIN: Final = 1.25


@dataclass(slots=True)
class Convergence:
    """Watches one migration. Limits in seconds; ``limit`` is the downtime that QEMU is allowed now."""

    limit: float
    most: float
    needed: float | None = None
    _round: int = 0
    _largest: int = 0
    _before: int | None = None
    _without_progress: int = 0
    _rates: list[float] = field(default_factory=list)

    def observe(self, progress: Mapping[str, Any]) -> float | None:
        """Take in libvirt's figures; the new limit where it must be raised, else None.

        Needs ``memory_iteration``, ``memory_remaining_bytes`` and ``memory_bytes_per_second``; without them
        (no round yet) nothing is decided.
        """
        number = int(progress.get("memory_iteration") or 0)
        remaining = int(progress.get("memory_remaining_bytes") or 0)
        rate = float(progress.get("memory_bytes_per_second") or 0.0)
        if rate > 0:
            self._rates = [*self._rates[-9:], rate]
        if number == self._round:
            self._largest = max(self._largest, remaining)
            return None
        # A round has ended: what it began with, against what the one before it began with.
        ended, self._round, self._largest = self._largest, number, remaining
        if number <= _BULK_ROUNDS + 1:
            self._before = ended
            return None
        shrank = self._before is not None and ended < self._before * _CONVERGES_BELOW
        self._before = ended
        self._without_progress = 0 if shrank else self._without_progress + 1
        if self._without_progress < _ROUNDS_WITHOUT_PROGRESS or not self._rates:
            return None
        self.needed = ended / (sum(self._rates) / len(self._rates)) * _MARGIN
        if self.needed <= self.limit:
            return None
        raised = min(self.needed, self.most)
        if raised <= self.limit:
            return None
        self.limit = raised
        return raised

    @property
    def hopeless(self) -> bool:
        """Whether even the longest stop that is allowed would not do, as things are."""
        return self.needed is not None and self.needed > self.most
