# SPDX-License-Identifier: GPL-3.0-or-later
"""What an evacuation cost, from counters and clocks; nothing here is estimated."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from precache_proxy.evacuation.job import Job
from precache_proxy.evacuation.relay import DISK, LIBVIRT, RAM, RelayCounters


class Measure:
    """Collects the figures of one job while it runs; lost by a crash, and then said to be unknown."""

    def __init__(
        self, job: Job, link: Any, lag_bytes: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._job = job
        self._link = link
        self._clock = clock
        self._began = clock()
        self._counters_before = self._label()
        self._stopped_at: float | None = None
        self._first_pass_bytes = 0
        # False after a restart: durations would lack what passed before it
        self.whole = True
        job.bound = {
            "lag_bytes_at_command": lag_bytes,
            "round_trip_seconds": getattr(link, "least_round_trip_seconds", None),
            "rate_bytes_per_second": getattr(link, "rate_bytes_per_second", None),
        }

    @classmethod
    def resumed(cls, job: Job, link: Any) -> Measure:
        """For a job of an earlier process: its figures from before are lost, what is on record stays."""
        bound, lag = dict(job.bound), job.bound.get("lag_bytes_at_command")
        measure = cls(job, link, lag)
        measure.whole = False
        job.bound |= bound
        return measure

    def _label(self) -> dict[str, int]:
        counters = self._link.counters() if self._link is not None else {}
        return dict(counters.get("labels", {}).get(self._job.vm, {}))

    @property
    def channel_bytes_per_second(self) -> float | None:
        """What the channel can send; None unknown. What an idle link has just carried says nothing."""
        rate = getattr(self._link, "expected_bytes_per_second", None)
        return None if rate is None else float(rate)

    def migrating(self, progress: dict[str, Any]) -> None:
        """A look at the migration under way: pages sent in the first turn over RAM were sent once each."""
        if progress.get("memory_iteration", 0) <= 1:
            self._first_pass_bytes = max(self._first_pass_bytes, int(progress.get("memory_normal_bytes", 0)))

    def changed_here(self, what: str) -> None:
        """The VM's life here, in the words of libvirt's events."""
        if what == "resumed":
            self._stopped_at = None
        elif what == "suspended" and self._stopped_at is None:
            self._stopped_at = self._clock()

    def stopping(self) -> None:
        """Its guest is asked to end: from now on it does not serve."""
        self._stopped_at = self._clock()

    def migrated(self, counters: RelayCounters, statistics: dict[str, Any]) -> None:
        """The migration has ended (well or not)."""
        raw, packed = counters.raw_bytes, counters.packed_bytes
        self._job.bytes |= {
            "ram_stream_bytes": raw[RAM],
            "ram_sent_bytes": packed[RAM],
            "disk_stream_bytes": raw[DISK],
            "disk_sent_bytes": packed[DISK],
            "libvirt_sent_bytes": packed[LIBVIRT],
            "ram_normal_bytes": statistics.get("memory_normal_bytes"),
        }
        ratio = packed[RAM] / raw[RAM] if raw[RAM] else None
        self._job.bound |= {
            "ram_first_turn_bytes": self._first_pass_bytes or statistics.get("memory_normal_bytes"),
            "ram_packed_ratio": ratio,
        }
        milliseconds = statistics.get("downtime_milliseconds")
        if milliseconds is not None:
            self._job.qemu_downtime_seconds = milliseconds / 1000

    def activated(self, answer: dict[str, Any]) -> None:
        """The destination runs the VM: the source may lose power from now on, every block is durable
        there."""
        now = self._clock()
        if self.whole:
            self._job.eviction_seconds = now - self._began
        if self._stopped_at is not None:
            # All by this host's clock: from libvirt's word that it stopped here until the answer came, less
            # the answer's way and the time that it ran there by then. QEMU's own figure lacks what libvirt
            # does after the switch-over (at 180 ms of round trip 0.75 s).
            half_way = (getattr(self._link, "least_round_trip_seconds", None) or 0.0) / 2
            ran = float(answer.get("running_seconds", 0.0))
            self._job.downtime_seconds = max(0.0, now - half_way - ran - self._stopped_at)
        after = self._label()
        self._job.bytes |= {
            f"channel_{key}": value - self._counters_before.get(key, 0) for key, value in after.items()
        }
