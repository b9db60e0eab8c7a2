# SPDX-License-Identifier: GPL-3.0-or-later
"""Which anchors answer a gateway, and by which one what its VMs send leaves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from mobility_agent.config import Peer
from mobility_agent.datapath.path import DataPath
from mobility_agent.errors import MobilityError
from mobility_agent.gateway.registrar import Registrar
from mobility_agent.messages.headers import Heartbeat, Message
from mobility_agent.signalling.heartbeat import Pulse

logger = logging.getLogger(__name__)

_CLOCK_ALARM_SECONDS = 1.0


class AnchorWatch:
    """Heartbeats with every anchor; ``wake`` is set when one gives the registrar something to send."""

    def __init__(
        self,
        anchors: Mapping[str, Peer],
        heartbeat_seconds: float,
        path: DataPath,
        registrar: Registrar,
        send: Callable[[Peer, Message], None],
        wake: asyncio.Event,
    ) -> None:
        self._anchors = anchors
        self._heartbeat_seconds = heartbeat_seconds
        self._path = path
        self._registrar = registrar
        self._send = send
        self._wake = wake
        self._pulses = {name: Pulse(heartbeat_seconds, time.monotonic()) for name in anchors}
        self.in_use: str | None = None

    def begin(self) -> None:
        """Until heartbeats tell better: the first one, so that nothing waits for them."""
        self._use(next(iter(self._anchors), None))

    def times(self) -> list[float]:
        """When :meth:`beat` has something to do (monotonic seconds)."""
        return [pulse.next_at for pulse in self._pulses.values()]

    def beat(self, now: float) -> None:
        """Ask who is due for it, and notice who has fallen silent."""
        for name, pulse in self._pulses.items():
            request = pulse.due(now, time.time())
            if request is not None:
                self._send(self._anchors[name], request)
            if pulse.fell_silent(now):
                logger.warning(
                    "anchor %s: no answer for %.1f s: it is down, unreachable, or has another key",
                    name,
                    3 * self._heartbeat_seconds,
                )
        self._choose()

    def _choose(self) -> None:
        answering = next((name for name, pulse in self._pulses.items() if pulse.up), None)
        # With none answering the last one stays: it may be only its answers that do not come.
        self._use(answering or self.in_use)

    def _use(self, name: str | None) -> None:
        if name == self.in_use or name is None:
            return
        try:
            self._path.set_anchor(self._anchors[name].tunnel_address)
        except MobilityError as error:
            # The next beat tries it again: heartbeats and registrations go on meanwhile.
            logger.error("what VMs here send does not go by anchor %s yet: %s", name, error)
            return
        if self.in_use is not None:
            logger.info("what VMs here send goes by anchor %s now, no more by %s", name, self.in_use)
        self.in_use = name

    def take(self, peer: Peer, message: Heartbeat) -> None:
        """An anchor's answer, already authenticated."""
        now = time.monotonic()
        beat = self._pulses[peer.name].answered(message, now)
        if beat is None:
            return
        self._registrar.anchor_answers(peer.name, beat.round_trip_seconds, beat.clock_offset_seconds)
        if beat.returned:
            logger.info("anchor %s: answers, %.0f ms away", peer.name, beat.round_trip_seconds * 1000)
            if abs(beat.clock_offset_seconds) > _CLOCK_ALARM_SECONDS:
                logger.warning(
                    "clock of this host is %.1f s off that of anchor %s; its time is used for registrations; "
                    "set both by NTP",
                    beat.clock_offset_seconds,
                    peer.name,
                )
            self._registrar.anchor_returned(peer.name, now)
            self._choose()
            self._wake.set()
        if beat.restarted:
            count = self._registrar.anchor_restarted(peer.name, now)
            logger.info("anchor %s: restarted; %d registrations sent again", peer.name, count)
            self._wake.set()

    def status(self) -> dict[str, dict[str, Any]]:
        """For each anchor how it answers, for the control interface."""
        return {
            name: {
                "state": "up" if pulse.up else "silent",
                "round_trip_seconds": pulse.round_trip_seconds,
                "clock_offset_seconds": pulse.clock_offset_seconds,
            }
            for name, pulse in self._pulses.items()
        }
