# SPDX-License-Identifier: GPL-3.0-or-later
"""One rate for all that goes to a peer, whichever session carries it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from precache_proxy.channel.pulses import Pulse
from precache_proxy.channel.rate import TokenBucket
from precache_proxy.errors import InvalidInput

_LEAST_WAIT_SECONDS = 0.001


class Pacer:
    """A token bucket that calls ``wake`` when something may be sent again."""

    def __init__(self, rate_bytes_per_second: float | None, wake: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit = rate_bytes_per_second
        self._governed: float | None = None
        self._pulse: Pulse | None = None
        self._bucket = TokenBucket(rate_bytes_per_second, self._loop.time())
        self._wake = wake
        self._timer: asyncio.TimerHandle | None = None

    @property
    def limit_bytes_per_second(self) -> float | None:
        """The limit that an operator or the configuration set; None = none."""
        return self._limit

    @property
    def rate_bytes_per_second(self) -> float | None:
        """The rate in force: the limit, or what the path carries where that is less."""
        return self._bucket.rate_bytes_per_second

    def set_limit(self, rate_bytes_per_second: float | None) -> None:
        """Change the limit now. Raises InvalidInput on 0 or less."""
        if rate_bytes_per_second is not None and rate_bytes_per_second <= 0:
            raise InvalidInput(
                f"rate of {rate_bytes_per_second} bytes per second: nothing could be sent; "
                "give a rate above 0 or none for no limit"
            )
        self._end_pulse(self._loop.time())
        self._limit = rate_bytes_per_second
        self._apply(self._loop.time())

    def govern(self, rate_bytes_per_second: float | None, pulse: Pulse | None = None) -> None:
        """What the path carries, as the governor sees it; None = unknown. For a moment more: ``pulse``."""
        if (rate_bytes_per_second, pulse) != (self._governed, self._pulse):
            self._end_pulse(self._loop.time())
            self._governed, self._pulse = rate_bytes_per_second, pulse
            self._apply(self._loop.time())

    def _end_pulse(self, now: float) -> None:
        """A look that comes late must not make a pulse longer: what it adds would stand in the queue."""
        if self._pulse is not None and now >= self._pulse.until:
            ended, self._pulse = self._pulse, None
            self._apply(ended.until)

    def _apply(self, at: float) -> None:
        governed = self._governed if self._pulse is None else self._pulse.bytes_per_second
        rates = [rate for rate in (self._limit, governed) if rate is not None]
        self._bucket.set_rate(min(rates, default=None), at)
        self.stop()
        self._wake()

    def may_send(self) -> bool:
        """False: not now; ``wake`` will be called."""
        now = self._loop.time()
        self._end_pulse(now)
        wait = self._bucket.wait_seconds(now)
        if wait <= 0:
            return True
        if self._timer is None:
            self._timer = self._loop.call_later(max(wait, _LEAST_WAIT_SECONDS), self._due)
        return False

    def take(self, count_bytes: int) -> None:
        """So much was sent; what may not wait for the rate is paid for by what comes after it."""
        self._bucket.take(count_bytes)

    def stop(self) -> None:
        """No more calls."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self) -> None:
        self._timer = None
        self._wake()
