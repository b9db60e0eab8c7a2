# SPDX-License-Identifier: GPL-3.0-or-later
"""What is seen of a path: all connections to a peer together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from precache_proxy.channel.connection import TcpState


@dataclass(frozen=True, slots=True)
class Sample:
    """All connections to a peer together: bytes acknowledged since ever, round trip now, and is
    there a backlog?
    """

    at: float
    acknowledged_bytes: int
    round_trip_seconds: float
    least_round_trip_seconds: float
    backlog: bool


class PathWatch:
    """Makes samples of what the kernel knows of single connections, which come and go."""

    def __init__(self) -> None:
        self._acknowledged: dict[int, int] = {}
        self._gone_bytes = 0

    def sample(self, now: float, states: Sequence[TcpState], *, backlog: bool) -> Sample | None:
        """None while there is no connection."""
        if not states:
            return None
        gone = self._acknowledged.keys() - {state.serial for state in states}
        # What they carried stays in the sum, which must not go down.
        self._gone_bytes += sum(self._acknowledged.pop(serial) for serial in gone)
        self._acknowledged.update({state.serial: state.acknowledged_bytes for state in states})
        busy = sorted(state.round_trip_seconds for state in states if state.unacknowledged)
        trips = busy or sorted(state.round_trip_seconds for state in states)
        return Sample(
            now,
            self._gone_bytes + sum(self._acknowledged.values()),
            # A bottleneck's queue delays them all; one that is late by itself says little about it.
            trips[len(trips) // 4],
            min(state.least_round_trip_seconds for state in states),
            backlog,
        )
