# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast a peer may be sent to: a token bucket with a changeable rate, and windows of the day."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from precache_proxy.channel.settings import RateWindow
from precache_proxy.errors import ConfigurationError, InvalidInput
from precache_proxy.units import KIB

# A loop that wakes late must be able to make up for it, or the rate is never reached on a busy host.
_BURST_SECONDS = 0.05
_MINIMUM_BURST_BYTES = 16 * KIB


class TokenBucket:
    """Tokens are bytes. May go into debt by one chunk; nothing more is let through until it is paid."""

    def __init__(self, rate_bytes_per_second: float | None, now: float) -> None:
        self._rate: float | None = None
        self._tokens = 0.0
        self._at = now
        self.set_rate(rate_bytes_per_second, now)

    @property
    def rate_bytes_per_second(self) -> float | None:
        """The rate in force; None = no limit."""
        return self._rate

    def set_rate(self, rate_bytes_per_second: float | None, now: float) -> None:
        """Change the rate; a debt stays. Raises InvalidInput on 0 or less."""
        if rate_bytes_per_second is not None and rate_bytes_per_second <= 0:
            raise InvalidInput(
                f"rate of {rate_bytes_per_second} bytes per second: nothing could be sent; "
                "give a rate above 0 or none for no limit"
            )
        self.wait_seconds(now)
        if self._rate is None or rate_bytes_per_second is None:
            self._tokens = 0.0
        self._rate = rate_bytes_per_second
        self._at = now

    def wait_seconds(self, now: float) -> float:
        """How long until something may be sent; 0 = now."""
        if self._rate is None:
            return 0.0
        burst = max(self._rate * _BURST_SECONDS, _MINIMUM_BURST_BYTES)
        self._tokens = min(burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        # Less than a byte short is not short: waiting for it could round to no time at all.
        return 0.0 if self._tokens > -1 else -self._tokens / self._rate

    def take(self, count_bytes: int) -> None:
        """``count_bytes`` were sent."""
        if self._rate is not None:
            self._tokens -= count_bytes


def _minutes(text: str) -> int:
    try:
        hours, minutes = (int(part) for part in text.split(":"))
    except ValueError:
        hours, minutes = -1, -1
    # 24:00 is how people write the end of a day.
    if not (0 <= hours < 24 and 0 <= minutes < 60) and (hours, minutes) != (24, 0):
        raise ConfigurationError(f"time {text!r} of a rate window: not a time of day; write it like 08:00")
    return hours * 60 + minutes


def check_windows(windows: Iterable[RateWindow]) -> None:
    """Raise ConfigurationError for the first window that cannot be meant."""
    for window in windows:
        if _minutes(window.start) == _minutes(window.end):
            raise ConfigurationError(
                f"rate window {window.start}-{window.end}: empty; for a whole day write 00:00 and 24:00"
            )
        if window.rate_bytes_per_second is not None and window.rate_bytes_per_second <= 0:
            raise ConfigurationError(
                f"rate window {window.start}-{window.end}: a rate of 0 would stop precaching unnoticed; "
                "give a rate above 0, or pause protection"
            )
        if any(not 0 <= day <= 6 for day in window.days):
            raise ConfigurationError(
                f"rate window {window.start}-{window.end}: days are 0 (Monday) to 6 (Sunday)"
            )


def _within(window: RateWindow, at: datetime) -> bool:
    start, end = _minutes(window.start), _minutes(window.end)
    minute = at.hour * 60 + at.minute

    def starts(day: datetime) -> bool:
        return not window.days or day.weekday() in window.days

    if start < end:
        return starts(at) and start <= minute < end
    return (starts(at) and minute >= start) or (starts(at - timedelta(days=1)) and minute < end)


def rate_at(base: float | None, windows: Iterable[RateWindow], at: datetime) -> float | None:
    """The rate that holds at a (local) time: the first window that contains it, else ``base``."""
    for window in windows:
        if _within(window, at):
            return window.rate_bytes_per_second
    return base
