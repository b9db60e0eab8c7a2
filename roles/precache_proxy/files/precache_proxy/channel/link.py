# SPDX-License-Identifier: GPL-3.0-or-later
"""All between this proxy and one peer: the session that we dial and the one that the peer dials."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import ssl
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from typing import Any

from precache_proxy import __version__
from precache_proxy.channel import rpc
from precache_proxy.channel.connection import Connection
from precache_proxy.channel.counters import LinkCounters
from precache_proxy.channel.dialer import dial
from precache_proxy.channel.governor import Governor, PathWatch
from precache_proxy.channel.identity import explain
from precache_proxy.channel.pacer import Pacer
from precache_proxy.channel.rate import rate_at
from precache_proxy.channel.reset import LinkLost
from precache_proxy.channel.session import Session
from precache_proxy.channel.settings import MAXIMUM_CONNECTIONS, ChannelConfig, PeerAddress, TrafficClass
from precache_proxy.channel.stream import Stream
from precache_proxy.errors import (
    InvalidInput,
    LifeboatError,
    PeerRefused,
    PeerRestarted,
    PeerUnreachable,
    ProtocolError,
)

log = logging.getLogger(__name__)

_TICK_SECONDS = 0.25
_GOVERN_SECONDS = 0.025
_BUSY_BYTES = 16 * 1024  # sent within a tick: worth looking closely
_REFUSED_FACTOR = 3  # a refusal does not heal by itself: ask less often
_GOODPUT_SECONDS = 2.0


class Link:
    """The way to one peer. Made by the Channel."""

    def __init__(
        self,
        peer: str,
        address: PeerAddress,
        config: ChannelConfig,
        *,
        instance: str,
        client_context: Callable[[], ssl.SSLContext],
        on_stream: Callable[[Link, Stream], None],
    ) -> None:
        self.peer = peer
        self.address = address
        self._config = config
        self._instance = instance
        self._client_context = client_context
        self._on_stream = on_stream
        self._counters = LinkCounters()
        self._connections = self._checked_connections(address.connections)
        self._chosen_rate: float | None = None
        self._rate_chosen = False
        self._governor = Governor()
        self._pacer = Pacer(self._rate_by_clock(), self._wake)
        self._session = self._new_session()
        self._accepted: Session | None = None
        self._established = False  # the current session was accepted by the peer at least once
        self._changed = asyncio.Event()
        self._slots: dict[int, asyncio.Task[None]] = {}
        self._ticker: asyncio.Task[None] | None = None
        self._failures = 0
        self._error: LifeboatError = PeerUnreachable(f"peer {peer}: not tried yet; wait a moment")
        self._watch = PathWatch()
        self._goodput = 0.0
        self._goodput_mark = (time.monotonic(), 0)
        self._stopping = False

    # -- state

    @property
    def is_up(self) -> bool:
        """Streams can be opened and carried."""
        return any(connection.synced for connection in self._session.connections.values())

    @property
    def state(self) -> str:
        """``up``, ``down`` or ``refused``."""
        if self.is_up:
            return "up"
        return "refused" if isinstance(self._error, PeerRefused) else "down"

    @property
    def cause(self) -> str:
        """A word for why the link is not up; ``up`` when it is."""
        return "up" if self.is_up else self._error.cause

    @property
    def sentence(self) -> str:
        """The same for people."""
        if self.is_up:
            return (
                f"{len(self._session.connections)} of {self._connections} connections to {self.peer} are up"
            )
        return self._error.message

    @property
    def round_trip_seconds(self) -> float | None:
        """Smoothed round trip by ping, with queues; None before the first."""
        return self._session.round_trip.smoothed_seconds

    @property
    def least_round_trip_seconds(self) -> float | None:
        """The least of the last half minute: the path without queues."""
        if self._session.round_trip.smoothed_seconds is None:
            return None
        return self._session.round_trip.least_seconds

    @property
    def rate_bytes_per_second(self) -> float | None:
        """The limit that was set; None = none."""
        return self._pacer.limit_bytes_per_second

    @property
    def expected_bytes_per_second(self) -> float | None:
        """What can be sent to the peer: the limit, or what the path carried when it was last pressed, if
        less; None while neither is known.
        """
        known = (self._pacer.limit_bytes_per_second, self._governor.capacity_bytes_per_second)
        return min((rate for rate in known if rate is not None), default=None)

    def status(self) -> dict[str, Any]:
        """JSON form of the link's state."""
        connections = self._session.connections.values()
        return {
            "peer": self.peer,
            "address": f"{self.address.host}:{self.address.port}",
            "state": self.state,
            "cause": self.cause,
            "sentence": self.sentence,
            "round_trip_seconds": self.round_trip_seconds,
            "least_round_trip_seconds": self.least_round_trip_seconds,
            "connections": len(connections),
            "connections_wanted": self._connections,
            "connections_accepted": len(self._accepted.connections) if self._accepted else 0,
            "congestion_control": self._session.congestion_control,
            "rate_bytes_per_second": self.rate_bytes_per_second,
            "paced_bytes_per_second": self._pacer.rate_bytes_per_second,
            "expected_bytes_per_second": self.expected_bytes_per_second,
            "queue_seconds": self._governor.queue_seconds,
            "rate_by": "operator" if self._rate_chosen else "configuration",
            "goodput_bytes_per_second": self._goodput,
            "streams": len(self._session.streams) + (len(self._accepted.streams) if self._accepted else 0),
        }

    def counters(self) -> dict[str, Any]:
        """Bytes per class and label, both directions, and the goodput (acknowledged raw bytes per second)."""
        return {**self._counters.as_dict(), "goodput_bytes_per_second": self._goodput}

    # -- use

    async def open_stream(
        self,
        kind: str,
        traffic_class: TrafficClass,
        header: dict[str, Any],
        *,
        label: str = "",
        window_bytes: int | None = None,
    ) -> Stream:
        """Open a stream; the peer's handler for ``kind`` gets it. Raises PeerUnreachable when the
        link is not up.

        ``label`` (a VM's UUID) is what its bytes are counted under; ``window_bytes`` bounds the
        window of both sides.
        """
        if not self.is_up:
            raise (
                type(self._error)(self._error.message)
                if isinstance(self._error, PeerRefused)
                else PeerUnreachable(self._error.message)
            )
        return self._session.open_stream(kind, traffic_class, header, label, window_bytes)

    async def call(
        self, method: str, parameters: dict[str, Any], *, timeout_seconds: float = 30
    ) -> dict[str, Any]:
        """Ask the peer; its answer, or its error as the same class. Raises PeerUnreachable, Stalled."""
        stream = await self.open_stream(rpc.KIND, TrafficClass.CONTROL, {"method": method})
        return await rpc.ask(stream, method, parameters, timeout_seconds)

    async def wait_up(self, timeout_seconds: float | None) -> None:
        """Until streams can be opened. Raises PeerUnreachable with the reason when it takes longer."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while not self.is_up:
                    await self._changed.wait()
        except TimeoutError:
            raise PeerUnreachable(f"{self._error.message} (waited {timeout_seconds:g} s)") from None

    def set_rate(self, bytes_per_second: float | None) -> None:
        """Limit what is sent to this peer, from now until :meth:`follow_configuration`; None = no limit."""
        self._pacer.set_limit(bytes_per_second)
        self._rate_chosen = True
        self._chosen_rate = bytes_per_second

    def follow_configuration(self) -> None:
        """Forget :meth:`set_rate`: the configured rate and its windows hold again."""
        self._rate_chosen = False
        self._pacer.set_limit(self._rate_by_clock())

    def set_connections(self, connections: int) -> None:
        """How many TCP connections we keep. Raises InvalidInput."""
        self._connections = self._checked_connections(connections)
        for slot, connection in list(self._session.connections.items()):
            if slot >= connections:
                connection.close(ConnectionResetError("one connection less is wanted"))
        self._keep_slots()
        self._notify()

    # -- life, called by the channel

    def start(self) -> None:
        """Dial, and keep dialling."""
        self._ticker = asyncio.create_task(self._tick(), name=f"link {self.peer} ticker")
        self._keep_slots()

    async def stop(self) -> None:
        """Say goodbye and close everything."""
        self._stopping = True
        error = LinkLost(f"the proxy {self._config.name} was stopped; it resumes when it is started again")
        tasks = [*self._slots.values(), *([self._ticker] if self._ticker else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for session in self._sessions():
            session.goodbye(error)
        for session in self._sessions():
            session.fail(error)
        self._pacer.stop()
        self._error = error
        self._notify()

    def admit(self, hello: dict[str, Any]) -> Session:
        """The peer dials: the session that its connection belongs to. Raises PeerRestarted when it
        is not known here.
        """
        identifier, instance = str(hello.get("session", "")), str(hello.get("instance", ""))
        if not identifier or not instance:
            raise ProtocolError(f"hello of {self.peer} without session or instance")
        known = self._accepted
        if known is not None and known.identifier == identifier and not known.closed:
            return known
        if hello.get("resume"):
            raise PeerRestarted(
                f"{self._config.name} does not know the session any more; a new one has to begin"
            )
        if known is not None and not known.closed:
            known.fail(
                LinkLost(f"{self.peer} has begun a new session")
                if known.peer_instance == instance
                else PeerRestarted(f"the proxy of {self.peer} was restarted")
            )
        self._accepted = Session(
            identifier,
            self.peer,
            dialed=False,
            owner=self,
            counters=self._counters,
            pacer=self._pacer,
            floor_share=self._config.floor_share,
        )
        self._accepted.peer_instance = instance
        return self._accepted

    # -- what sessions tell

    def stream_opened(self, stream: Stream) -> None:
        """The peer has opened a stream."""
        self._on_stream(self, stream)

    def connection_lost(self, session: Session, error: BaseException | None) -> None:
        """A connection is gone."""
        if session is self._session and not self._stopping:
            if not session.connections:
                self._down(
                    explain(self.peer, self._where, error or ConnectionResetError("connection closed"))
                )
            self._notify()

    def connection_synced(self, session: Session) -> None:
        """A connection carries streams now."""
        if session is self._session:
            if self._error.cause != "up" and sum(each.synced for each in session.connections.values()) == 1:
                log.info("link to %s is up", self.peer)
            self._failures = 0
            self._notify()

    def session_broken(self, session: Session, error: LifeboatError) -> None:
        """The peer's process ends in order, or one side did not understand the other."""
        if isinstance(error, LinkLost):
            error = PeerRestarted(error.message)
        if session is self._session:
            self._down(error)
            self._replace_session(error)
        else:
            session.fail(error)
            if session is self._accepted:
                self._accepted = None

    # -- inside

    @property
    def _where(self) -> str:
        host = f"[{self.address.host}]" if ":" in self.address.host else self.address.host
        return f"{host}:{self.address.port}"

    @staticmethod
    def _checked_connections(connections: int) -> int:
        if not 1 <= connections <= MAXIMUM_CONNECTIONS:
            raise InvalidInput(f"{connections} connections: give a number from 1 to {MAXIMUM_CONNECTIONS}")
        return connections

    def _sessions(self) -> list[Session]:
        return [self._session] if self._accepted is None else [self._session, self._accepted]

    def _new_session(self) -> Session:
        return Session(
            str(uuid.uuid4()),
            self.peer,
            dialed=True,
            owner=self,
            counters=self._counters,
            pacer=self._pacer,
            floor_share=self._config.floor_share,
        )

    def _replace_session(self, error: LifeboatError) -> None:
        before, self._session = self._session, self._new_session()
        self._established = False
        before.fail(error)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _wake(self) -> None:
        for session in sorted(self._sessions(), key=lambda each: each.highest_waiting):
            session.wake()

    def _down(self, error: LifeboatError) -> None:
        if str(error) != str(self._error):
            log.warning(
                "link to %s is %s: %s",
                self.peer,
                "refused" if isinstance(error, PeerRefused) else "down",
                error,
            )
        self._error = error

    def _keep_slots(self) -> None:
        for slot in range(self._connections):
            task = self._slots.get(slot)
            if task is None or task.done():
                self._slots[slot] = asyncio.create_task(
                    self._keep(slot), name=f"link {self.peer} slot {slot}"
                )

    async def _keep(self, slot: int) -> None:
        dialled_at = -math.inf
        while slot < self._connections:
            changed = self._changed
            # One connection finds out whether the peer is there; the others follow it.
            if slot in self._session.connections or (slot != 0 and not self.is_up):
                await changed.wait()
                continue
            # A connection that breaks as soon as it stands must not make us dial without a pause.
            await asyncio.sleep(dialled_at + self._config.reconnect_minimum_seconds - time.monotonic())
            dialled_at = time.monotonic()
            error = await self._attempt(slot)
            if error is None:
                continue
            if isinstance(error, PeerRestarted | LinkLost):
                self._replace_session(error)
                continue
            if not self._session.connections:
                self._down(error)
            await asyncio.sleep(self._backoff_seconds(error))

    def _backoff_seconds(self, error: LifeboatError) -> float:
        least, most = self._config.reconnect_minimum_seconds, self._config.reconnect_maximum_seconds
        self._failures = min(self._failures + 1, 20)
        pause = min(least * 2 ** (self._failures - 1), most)
        if isinstance(error, PeerRefused):
            pause = min(pause * _REFUSED_FACTOR, 3 * most)
        return float(pause * (0.5 + random.random() / 2))

    async def _attempt(self, slot: int) -> LifeboatError | None:
        """Dial one connection; why it could not be had, or None when it stands."""
        try:
            async with asyncio.timeout(self._config.handshake_seconds):
                await self._dial(slot)
        except (OSError, LifeboatError) as problem:
            return explain(self.peer, self._where, problem)
        return None

    async def _dial(self, slot: int) -> None:
        session = self._session
        hello = {
            "name": self._config.name,
            "peer": self.peer,
            "instance": self._instance,
            "session": session.identifier,
            "slot": slot,
            "resume": self._established,
            "release": __version__,
        }
        tls, congestion_control, instance = await dial(
            self.address, self._where, hello, session.peer_instance, self._config, self._client_context()
        )
        if session is not self._session or slot >= self._connections or self._stopping:
            tls.close()
            return
        self._established = True
        session.peer_instance = instance
        session.attach(Connection(tls, slot, congestion_control, session))

    def _rate_by_clock(self) -> float | None:
        return rate_at(self.address.rate_bytes_per_second, self.address.windows, datetime.now().astimezone())

    async def _tick(self) -> None:
        beat = sent = 0
        while True:
            sent, before = sum(session.sent_wire_bytes for session in self._sessions()), sent
            sending = sent > before + _BUSY_BYTES or any(session.has_backlog for session in self._sessions())
            await asyncio.sleep(_GOVERN_SECONDS if sending else _TICK_SECONDS)
            now = time.monotonic()
            self._govern(now)
            beat += 1
            if sending and beat % 10:
                continue
            for session in self._sessions():
                session.tick(now, self._config.dead_peer_seconds)
                if not session.connections and now - session.empty_since > self._config.session_grace_seconds:
                    self._give_up(session)
            at, acknowledged = self._goodput_mark
            if now - at >= _GOODPUT_SECONDS:
                self._goodput = (self._counters.acknowledged_raw_bytes - acknowledged) / (now - at)
                self._goodput_mark = (now, self._counters.acknowledged_raw_bytes)
            if not self._rate_chosen and self.address.windows:
                rate = self._rate_by_clock()
                if rate != self._pacer.limit_bytes_per_second:
                    log.info("rate to %s is now %s bytes per second", self.peer, rate)
                    self._pacer.set_limit(rate)

    def _govern(self, now: float) -> None:
        sessions = self._sessions()
        states = [each.tcp_state() for session in sessions for each in session.connections.values()]
        sample = self._watch.sample(now, states, backlog=any(session.has_backlog for session in sessions))
        if sample is not None:
            self._pacer.govern(self._governor.sample(sample))

    def _give_up(self, session: Session) -> None:
        error = LinkLost(
            f"no connection to {self.peer} for {self._config.session_grace_seconds:.0f} s: what "
            f"was under way is given up"
        )
        if session is not self._session:
            session.fail(error)
            self._accepted = None
        elif self._established:
            self._replace_session(error)
