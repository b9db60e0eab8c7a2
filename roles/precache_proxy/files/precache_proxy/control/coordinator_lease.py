# SPDX-License-Identifier: GPL-3.0-or-later
"""Who coordinates the evacuation of this host: one at a time, for some seconds, unless he says so again.

Jobs are the proxy's and need no coordinator. The lease only keeps two of them from sharing out a line, so it
lives in memory: it is over within seconds anyway, and of a proxy that was restarted the one that coordinates
asks for it anew at its next look. Should another be quicker, the first is told who and how he came by it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass
class _Held:
    coordinator: str
    who: str
    since: float
    heard: float
    until: float
    # On an operator's word: whoever had it before is to end.
    taken_over: bool
    renewals: int = 0


class CoordinatorLease:
    """``clock`` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._held: _Held | None = None

    def ask(self, coordinator: str, who: str, for_seconds: float, *, take_over: bool = False) -> bool:
        """Whether it is this coordinator's for so long from now on; 0 seconds: it gives it back.

        ``who`` is for people. ``take_over``: also where another has it, on the operator's explicit word.
        """
        now = self._clock()
        held = self._held if self._held is not None and self._held.until > now else None
        if held is not None and held.coordinator == coordinator:
            held.heard, held.until, held.renewals = now, now + for_seconds, held.renewals + 1
            return True
        if for_seconds <= 0:
            return False
        if held is not None and not take_over:
            return False
        if held is not None:
            logger.warning("%s coordinates from now on, taken over from %s", who, held.who)
        else:
            logger.info("%s coordinates from now on", who)
        self._held = _Held(coordinator, who, now, now, now + for_seconds, take_over)
        return True

    def told(self) -> dict[str, Any] | None:
        """Who has it, since when, when he was heard of last and for how long it still holds; None: nobody."""
        held, now = self._held, self._clock()
        if held is None or held.until <= now:
            return None
        return {
            "id": held.coordinator,
            "who": held.who,
            "held_seconds": now - held.since,
            "heard_seconds": now - held.heard,
            "renewals": held.renewals,
            "taken_over": held.taken_over,
            "seconds_left": held.until - now,
        }
