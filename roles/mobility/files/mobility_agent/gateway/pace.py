# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast routine messages go out, so that host and anchors have time for a hand-over at any moment."""

from __future__ import annotations

# To all anchors together: about half of what one core of this host can do, and less of an anchor's.
_PER_SECOND = 4000
# So many at once, and somewhat more after a turn that took long: they are what a claim finds in its way.
_AT_ONCE, _CAUGHT_UP_SECONDS = 8, 0.01
# What is routine waits for a claim's answer for so long; never longer than the second in a row. Where one
# hand-over follows the other for minutes, as many get through after it as must, for no binding to run out.
_HELD_SECONDS, _LONGEST_SECONDS = 0.05, 0.1


class Pace:
    """Pure: the clock (monotonic seconds) comes with each call."""

    def __init__(self) -> None:
        self._next_at = 0.0
        self._held_until = 0.0
        self._held_since = 0.0
        # Sent since then, though held.
        self._let_through = 0

    @property
    def next_at(self) -> float:
        """When :meth:`allowed` says more than 0."""
        return max(self._next_at, min(self._held_until, self._held_since + _LONGEST_SECONDS))

    def allowed(self, now: float) -> int:
        """How many may be sent now."""
        return _AT_ONCE if now >= self.next_at else 0

    def sent(self, count: int, now: float, needed_per_second: float) -> None:
        """So many were sent. ``needed_per_second``: fewer must not get through in the long run."""
        if count:
            self._next_at = max(self._next_at, now - _CAUGHT_UP_SECONDS) + count / _PER_SECOND
            self._let_through += count
            if self._let_through >= needed_per_second * _LONGEST_SECONDS:
                self._held_since, self._let_through = now, 0

    def hold(self, now: float) -> None:
        """Send none for a moment, unless :meth:`go_on` comes first."""
        if now >= self._held_until:
            self._held_since, self._let_through = now, 0
        self._held_until = now + _HELD_SECONDS

    def go_on(self) -> None:
        """Nobody has to be waited for any more."""
        self._held_until = 0.0
