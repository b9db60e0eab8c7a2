# SPDX-License-Identifier: GPL-3.0-or-later
"""Who coordinates the evacuation of this host: one at a time, for some seconds, unless he says so again.

Jobs are the proxy's and need no coordinator. The lease keeps two of them from sharing out a line, and its
epoch is a fencing token: each grant has a higher one than all before, orders name the one that they were
decided under, and an order of an older one is refused, however long it was on its way (a controller that was
stopped, a connection that hung). Who has it, and the epoch, are on disk before a grant is answered: a proxy
that was restarted knows whom it obeys.

Source: M. Kleppmann, "How to do distributed locking" (2016), on fencing tokens; C. Gray and D. Cheriton,
"Leases" (SOSP 1989), on their times.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from precache_proxy import durable
from precache_proxy.errors import IntegrityError, TakenOver

logger = logging.getLogger(__name__)


@dataclass
class _Held:
    coordinator: str
    who: str
    epoch: int
    since: float
    # The same by the host's clock, for people.
    since_at: float
    heard: float
    heard_at: float
    for_seconds: float
    # On an operator's word: whoever had it before is to end.
    taken_over: bool
    renewals: int = 0
    # Who was at work here before, as it is told.
    before: dict[str, Any] | None = None

    @property
    def until(self) -> float:
        """When it is over unless it is renewed."""
        return self.heard + self.for_seconds

    def as_before(self) -> dict[str, Any] | None:
        """For whoever comes next: itself where it was at work, else who was; who only tried left no trace."""
        if not self.renewals and not self.taken_over:
            return self.before
        return {
            "id": self.coordinator,
            "who": self.who,
            "epoch": self.epoch,
            "taken_over": self.taken_over,
        }


class CoordinatorLease:
    """``clock`` is monotonic, ``wall`` the host's clock, both in seconds. ``record``: where it is kept; None:
    in memory only, as after a write that failed: who coordinates is not to be stopped by a full disk."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        record: Path | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._wall = wall
        self._record = record
        self._writing = asyncio.Lock()
        self._held: _Held | None = None
        # The last one that gave it back, for those that come after it.
        self._before: dict[str, Any] | None = None
        self._epoch = 0
        self._kept: dict[str, Any] | None = None
        if record is not None:
            self._read(record)

    def ask(self, coordinator: str, who: str, for_seconds: float, *, take_over: bool = False) -> bool:
        """Whether it is this coordinator's for so long from now on; 0 seconds: it gives it back.

        ``who`` is for people. ``take_over``: also where another has it, on the operator's explicit word.
        Nothing may be answered before :meth:`keep`.
        """
        now = self._clock()
        last, held = self._held, self._holder(now)
        if held is not None and held.coordinator == coordinator:
            if for_seconds <= 0:
                # It gives no more orders, and what it sent before is not obeyed any more.
                self._before, self._held = held.as_before(), None
                return True
            held.heard, held.heard_at, held.for_seconds = now, self._wall(), for_seconds
            held.renewals += 1
            return True
        if for_seconds <= 0:
            if last is not None and last.coordinator == coordinator:
                # It had run out; what was sent before is not to be obeyed either.
                self._before, self._held = last.as_before(), None
            return False
        if held is not None and not take_over:
            return False
        if held is not None:
            logger.warning("%s coordinates from now on, taken over from %s", who, held.who)
        else:
            logger.info("%s coordinates from now on", who)
        before = last.as_before() if last is not None else self._before
        if last is not None and last.coordinator == coordinator:
            # It ran out and nobody has come since: what it ordered meanwhile is as good as ever, and whom it
            # took over from is to hear of that as before.
            before, take_over = last.before, take_over or last.taken_over
        else:
            # Microseconds since 1970: higher than what a record that was lost may have said, too.
            self._epoch = max(self._epoch + 1, int(self._wall() * 1e6))
        at = self._wall()
        self._held = _Held(
            coordinator, who, self._epoch, now, at, now, at, for_seconds, take_over, before=before
        )
        return True

    def check(self, epoch: int | None, host: str) -> None:
        """Raise TakenOver for an order that was decided under another grant than the last one.

        None: it names no grant, being an operator's own. One whose lease ran out is obeyed for as long as
        nobody else has come.
        """
        held = self._held
        if epoch is None or (held is not None and held.epoch == epoch):
            return
        way_out = "nothing was changed; ask for the lease before another order"
        if held is None:
            raise TakenOver(f"{host}: nobody coordinates it under epoch {epoch} any more; {way_out}")
        since = time.strftime("%H:%M:%S", time.localtime(held.since_at))
        raise TakenOver(
            f"{host}: taken over by {held.who} since {since} (epoch {held.epoch}); an order of epoch {epoch} "
            f"is not obeyed; {way_out}"
        )

    async def keep(self) -> None:
        """Have on disk who coordinates, where that is another than before. To be called before anything that
        :meth:`ask` said is answered; a kill before it is one before the grant, which nobody has heard of."""
        if self._record is None:
            return
        async with self._writing:
            told, record, held = self._as_record(), self._record, self._held
            try:
                if told != self._kept:
                    await asyncio.to_thread(durable.write_json, record, told)
                    self._kept = told
                if held is not None:
                    # When it was heard of: that is all a renewal changes, and no loss if it is lost.
                    os.utime(record, (held.heard_at, held.heard_at))
            except OSError as error:
                self._kept = None
                logger.warning("%s: who coordinates is not on disk: %s", record, error)

    def told(self) -> dict[str, Any] | None:
        """Who has it, since when, when he was heard of last and for how long it still holds; None: nobody."""
        now = self._clock()
        held = self._holder(now)
        if held is None:
            return None
        return {
            "id": held.coordinator,
            "who": held.who,
            "epoch": held.epoch,
            "held_seconds": now - held.since,
            "heard_seconds": now - held.heard,
            "renewals": held.renewals,
            "taken_over": held.taken_over,
            "seconds_left": held.until - now,
            "before": held.before,
        }

    def _holder(self, now: float) -> _Held | None:
        return self._held if self._held is not None and self._held.until > now else None

    def _as_record(self) -> dict[str, Any]:
        held = self._held
        told: dict[str, Any] = {"epoch": self._epoch, "holder": None, "before": self._before}
        if held is not None:
            told["before"] = held.before
            told["holder"] = {
                "id": held.coordinator,
                "who": held.who,
                "since_at": held.since_at,
                "for_seconds": held.for_seconds,
                "taken_over": held.taken_over,
                "at_work": held.renewals > 0,
            }
        return told

    def _read(self, record: Path) -> None:
        """Go on with what the proxy before this one had promised: for the rest of that time."""
        try:
            told = durable.read_json(record)
            if told is None:
                return
            self._epoch, self._before, holder = int(told["epoch"]), told["before"], told["holder"]
            if holder is not None:
                now, wall = self._clock(), self._wall()
                # A clock that was set back makes it no longer than it was.
                heard_seconds = max(0.0, wall - record.stat().st_mtime)
                self._held = _Held(
                    str(holder["id"]),
                    str(holder["who"]),
                    self._epoch,
                    now - max(heard_seconds, wall - float(holder["since_at"])),
                    float(holder["since_at"]),
                    now - heard_seconds,
                    wall - heard_seconds,
                    float(holder["for_seconds"]),
                    bool(holder["taken_over"]),
                    int(bool(holder["at_work"])),
                    self._before,
                )
            self._kept = told
        except (OSError, IntegrityError, KeyError, TypeError, ValueError) as error:
            # Nobody is obeyed by an old grant then either: the next one is higher by the clock.
            logger.warning("%s: does not say who coordinated: %s", record, error)
            self._held, self._before = None, None
