# SPDX-License-Identifier: GPL-3.0-or-later
"""What one evacuation may put on the wire while others go first: a share, lent for a time.

Whoever steers many evacuations may die; a share that nobody renews is lifted by itself. And he looks every
few seconds: a guest that stands still is kept from its clients by a share, and has none for as long.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from precache_proxy.errors import InvalidInput

LEAST_BYTES_PER_SECOND = 16 * 1024.0
LONGEST_LEASE_SECONDS = 300.0
# Never asleep for longer: a share that is raised, or a lease that ends, is noticed within this.
_NAP_SECONDS = 0.1


def refuse_too_little(what: str, bytes_per_second: float | None) -> None:
    """Raise InvalidInput for a rate at which nothing gets on."""
    if bytes_per_second is not None and bytes_per_second < LEAST_BYTES_PER_SECOND:
        raise InvalidInput(
            f"{what} {bytes_per_second:.0f} bytes per second: the relay would be taken for dead; "
            f"give {LEAST_BYTES_PER_SECOND:.0f} or more, or none for no limit"
        )


class Pace:
    """A token bucket whose rate is a share with an end. Rates in bytes per second, on the wire."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._share: float | None = None
        self._until = 0.0
        self._stands_still = False
        self._owed = 0.0
        self._at = clock()

    @property
    def share_bytes_per_second(self) -> float | None:
        """The share that holds now, None: no limit."""
        holds = self._clock() < self._until and not self._stands_still
        return self._share if holds else None

    def changed_here(self, what: str) -> None:
        """The VM's life here, in the words of libvirt's events."""
        if what in {"suspended", "resumed"}:
            self._settle()
            self._stands_still = what == "suspended"

    def lend(self, bytes_per_second: float | None, seconds: float) -> None:
        """From now on, for so long; None lifts the limit. Raises InvalidInput."""
        refuse_too_little("share", bytes_per_second)
        if not 0 < seconds <= LONGEST_LEASE_SECONDS:
            raise InvalidInput(
                f"for_seconds {seconds}: give more than 0, at most {LONGEST_LEASE_SECONDS:.0f}, and renew it"
            )
        self._settle()
        self._share, self._until = bytes_per_second, self._clock() + seconds
        if bytes_per_second is None:
            self._owed = 0.0

    def keep_to(self, bytes_per_second: float | None) -> None:
        """From now on, until it is said otherwise; None lifts the limit. Raises InvalidInput."""
        refuse_too_little("bandwidth", bytes_per_second)
        self._settle()
        self._share, self._until = bytes_per_second, float("inf")

    async def wait(self, count: int) -> None:
        """Return when ``count`` bytes may be sent."""
        self._settle()
        self._owed += count
        while self.share_bytes_per_second is not None and self._owed > count:
            await asyncio.sleep(_NAP_SECONDS)
            self._settle()

    def _settle(self) -> None:
        now = self._clock()
        share = self.share_bytes_per_second
        paid = float("inf") if share is None else (now - self._at) * share
        self._owed = max(0.0, self._owed - paid)
        self._at = now
