# SPDX-License-Identifier: GPL-3.0-or-later
"""When the source of an arrival was last heard, and whether it may be presumed dead by now."""

from __future__ import annotations

import time
from collections.abc import Callable


class SourceContact:
    """Per job. ``limit_seconds``: the operator's `presume_source_dead_after_seconds`, None: never.

    A source that knows of the limit counts from when it *asked* a question that was answered (fence.py),
    hence from no later than we count from here. Suspended time is not counted: that errs towards
    waiting.
    """

    def __init__(self, limit_seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_seconds = limit_seconds
        self._clock = clock
        self._heard_at: dict[str, float] = {}

    def heard(self, job_id: str) -> None:
        """The source of that job has asked, or answered, something just now."""
        self._heard_at[job_id] = self._clock()

    def presumed_dead(self, job_id: str) -> bool:
        """Whether it was silent for that long; after a restart of ours the time begins anew."""
        since = self._heard_at.setdefault(job_id, self._clock())
        return self.limit_seconds is not None and self._clock() - since >= self.limit_seconds

    def forget(self, job_id: str) -> None:
        """The arrival is over."""
        self._heard_at.pop(job_id, None)
