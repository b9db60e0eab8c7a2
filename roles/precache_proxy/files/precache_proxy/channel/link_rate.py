# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast a link may send, by the operator, the configuration and the path, and what arrives of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from precache_proxy.channel.connection import Connection, TcpState
from precache_proxy.channel.counters import LinkCounters
from precache_proxy.channel.governor import Governor
from precache_proxy.channel.pacer import Pacer
from precache_proxy.channel.path_watch import PathWatch
from precache_proxy.channel.rate import rate_at
from precache_proxy.channel.session import Session
from precache_proxy.channel.settings import PeerAddress

log = logging.getLogger(__name__)

_GOODPUT_SECONDS = 2.0
# Sooner than BBR would look for a shorter round trip by keeping nearly nothing under way.
_RENEW_SECONDS = 8.0
# It begins anew with the least round trip that the kernel saw in five minutes: one that is so much shorter
# than the path's was another path's, and BBR would hold too little under way.
_SAME_PATH = 0.8


class LinkRate:
    """``pacer`` is what the sessions ask before they send."""

    def __init__(
        self, peer: str, address: PeerAddress, counters: LinkCounters, wake: Callable[[], None]
    ) -> None:
        self._peer = peer
        self.address = address
        self._counters = counters
        self._chosen = False
        self._governor = Governor()
        self._watch = PathWatch()
        self.pacer = Pacer(self._rate_by_clock(), wake)
        self.goodput_bytes_per_second = 0.0
        self._goodput_mark = (time.monotonic(), 0)
        self._renewed_at: dict[int, float] = {}

    @property
    def limit_bytes_per_second(self) -> float | None:
        """The limit that was set; None = none."""
        return self.pacer.limit_bytes_per_second

    @property
    def expected_bytes_per_second(self) -> float | None:
        """What can be sent to the peer: the limit, or what the path carried when it was last pressed, if
        less; None while neither is known.
        """
        known = (self.pacer.limit_bytes_per_second, self._governor.capacity_bytes_per_second)
        return min((rate for rate in known if rate is not None), default=None)

    @property
    def pulse_is_on(self) -> bool:
        """Whether more than the rate is let through for a moment, which the next look ends."""
        return self._governor.pulse_is_on

    @property
    def beat_seconds(self) -> float:
        """How soon to look at the path again while something is sent."""
        return self._governor.beat_seconds

    def status(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "rate_bytes_per_second": self.limit_bytes_per_second,
            "paced_bytes_per_second": self.pacer.rate_bytes_per_second,
            "expected_bytes_per_second": self.expected_bytes_per_second,
            "queue_seconds": self._governor.queue_seconds,
            "rate_by": "operator" if self._chosen else "configuration",
            "goodput_bytes_per_second": self.goodput_bytes_per_second,
        }

    def choose(self, bytes_per_second: float | None) -> None:
        """The operator's limit, until :meth:`follow_configuration`; None = no limit. Raises InvalidInput."""
        self.pacer.set_limit(bytes_per_second)
        self._chosen = True

    def follow_configuration(self) -> None:
        """The configured rate and its windows hold again."""
        self._chosen = False
        self.pacer.set_limit(self._rate_by_clock())

    def govern(self, now: float, sessions: Sequence[Session]) -> None:
        """Look at the path, every ``beat_seconds`` while something is sent."""
        connections = [each for session in sessions for each in session.connections.values()]
        states = [each.tcp_state() for each in connections]
        backlog = any(session.has_backlog for session in sessions)
        sample = self._watch.sample(now, states, backlog=backlog)
        if sample is None:
            return
        ping = sessions[0].round_trip.latest_seconds if sessions else None
        if not backlog and ping is not None:
            # The kernel's smoothed figure is fed by acknowledgements, of which an idle path has few: it would
            # take half a minute to follow a path that became longer.
            sample = replace(sample, round_trip_seconds=ping)
        self._governor.sample(sample)
        self.pacer.govern(self._governor.steady_bytes_per_second, self._governor.pulse)
        trip = self._governor.least_round_trip_seconds
        if backlog and trip is not None and self._governor.steady_bytes_per_second is not None:
            self._renew(now, connections, states, trip)

    def _renew(
        self, now: float, connections: Sequence[Connection], states: Sequence[TcpState], trip: float
    ) -> None:
        """Let BBR begin anew where it is due on a paced path of that least round trip, in seconds."""
        renewed, self._renewed_at = self._renewed_at, {}
        for connection, state in zip(connections, states, strict=True):
            at = renewed.get(state.serial, float("-inf"))
            due = now - at >= _RENEW_SECONDS and not state.recovers
            if due and state.least_round_trip_seconds >= _SAME_PATH * trip:
                connection.renew_congestion_control()
                at = now
            self._renewed_at[state.serial] = at

    def tick(self, now: float) -> None:
        """A few times a second: goodput, and the hours at which the configured rate changes."""
        at, acknowledged = self._goodput_mark
        if now - at >= _GOODPUT_SECONDS:
            arrived = self._counters.acknowledged_raw_bytes - acknowledged
            self.goodput_bytes_per_second = arrived / (now - at)
            self._goodput_mark = (now, self._counters.acknowledged_raw_bytes)
        if not self._chosen and self.address.windows:
            rate = self._rate_by_clock()
            if rate != self.pacer.limit_bytes_per_second:
                log.info("rate to %s is now %s bytes per second", self._peer, rate)
                self.pacer.set_limit(rate)

    def stop(self) -> None:
        """Wake nobody any more."""
        self.pacer.stop()

    def _rate_by_clock(self) -> float | None:
        return rate_at(self.address.rate_bytes_per_second, self.address.windows, datetime.now().astimezone())
