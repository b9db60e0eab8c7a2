# SPDX-License-Identifier: GPL-3.0-or-later
"""All between this proxy and one peer: the session that we dial and the one that the peer dials."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
import uuid
from collections.abc import Callable
from typing import Any

from precache_proxy.channel import rpc
from precache_proxy.channel.counters import LinkCounters
from precache_proxy.channel.identity import explain
from precache_proxy.channel.keeper import ConnectionKeeper
from precache_proxy.channel.link_rate import LinkRate
from precache_proxy.channel.reset import LinkLost
from precache_proxy.channel.session import Session
from precache_proxy.channel.settings import ChannelConfig, PeerAddress, TrafficClass
from precache_proxy.channel.stream import Stream
from precache_proxy.errors import (
    LifeboatError,
    PeerRefused,
    PeerRestarted,
    PeerUnreachable,
    ProtocolError,
)

log = logging.getLogger(__name__)

_TICK_SECONDS = 0.25
_BUSY_BYTES = 16 * 1024  # sent within a tick: worth looking closely


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
        self._config = config
        self._on_stream = on_stream
        self._counters = LinkCounters()
        self._rate = LinkRate(peer, address, self._counters, self._wake)
        self._session = self._new_session()
        self._accepted: Session | None = None
        self._changed = asyncio.Event()
        self._keeper = ConnectionKeeper(
            peer, address, config, instance=instance, client_context=client_context, owner=self
        )
        self._ticker: asyncio.Task[None] | None = None
        self._error: LifeboatError = PeerUnreachable(f"peer {peer}: not tried yet; wait a moment")
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
                f"{len(self._session.connections)} of {self._keeper.wanted} connections to {self.peer} are up"
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
    def address(self) -> PeerAddress:
        """Where the peer is, and what was configured for it; a reload may give other rates and windows."""
        return self._rate.address

    @address.setter
    def address(self, address: PeerAddress) -> None:
        self._rate.address = address

    @property
    def rate_bytes_per_second(self) -> float | None:
        """The limit that was set; None = none."""
        return self._rate.limit_bytes_per_second

    @property
    def expected_bytes_per_second(self) -> float | None:
        """What can be sent to the peer: the limit, or what the path carried when it was last pressed, if
        less; None while neither is known.
        """
        return self._rate.expected_bytes_per_second

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
            "connections_wanted": self._keeper.wanted,
            "connections_accepted": len(self._accepted.connections) if self._accepted else 0,
            "congestion_control": self._session.congestion_control,
            **self._rate.status(),
            "streams": len(self._session.streams) + (len(self._accepted.streams) if self._accepted else 0),
        }

    def counters(self) -> dict[str, Any]:
        """Bytes per class and label, both directions, and the goodput (acknowledged raw bytes per second)."""
        return {**self._counters.as_dict(), "goodput_bytes_per_second": self._rate.goodput_bytes_per_second}

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
        self._rate.choose(bytes_per_second)

    def follow_configuration(self) -> None:
        """Forget :meth:`set_rate`: the configured rate and its windows hold again."""
        self._rate.follow_configuration()

    def set_connections(self, connections: int) -> None:
        """How many TCP connections we keep. Raises InvalidInput."""
        self._keeper.set_wanted(connections)
        self._notify()

    # -- life, called by the channel

    def start(self) -> None:
        """Dial, and keep dialling."""
        self._ticker = asyncio.create_task(self._tick(), name=f"link {self.peer} ticker")
        self._keeper.start()

    async def stop(self) -> None:
        """Say goodbye and close everything."""
        self._stopping = True
        error = LinkLost(f"the proxy {self._config.name} was stopped; it resumes when it is started again")
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
        await self._keeper.stop()
        for session in self._sessions():
            session.goodbye(error)
        for session in self._sessions():
            session.fail(error)
        self._rate.stop()
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
            pacer=self._rate.pacer,
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
                self.not_reached(
                    explain(self.peer, self._keeper.where, error or ConnectionResetError("connection closed"))
                )
            self._notify()

    def connection_synced(self, session: Session) -> None:
        """A connection carries streams now."""
        if session is self._session:
            if self._error.cause != "up" and sum(each.synced for each in session.connections.values()) == 1:
                log.info("link to %s is up", self.peer)
            self._keeper.succeeded()
            self._notify()

    def session_broken(self, session: Session, error: LifeboatError) -> None:
        """The peer's process ends in order, or one side did not understand the other."""
        if isinstance(error, LinkLost):
            error = PeerRestarted(error.message)
        if session is self._session:
            self.not_reached(error)
            self._replace_session(error)
        else:
            session.fail(error)
            if session is self._accepted:
                self._accepted = None

    # -- what the keeper of connections asks and tells

    @property
    def session(self) -> Session:
        """The session that we dial."""
        return self._session

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next change of connections or session; from then on it is another event."""
        return self._changed

    def session_unknown(self, error: LifeboatError) -> None:
        """The peer cannot go on with our session."""
        self._replace_session(error)

    def not_reached(self, error: LifeboatError) -> None:
        """The peer could not be dialled."""
        if str(error) != str(self._error):
            log.warning(
                "link to %s is %s: %s",
                self.peer,
                "refused" if isinstance(error, PeerRefused) else "down",
                error,
            )
        self._error = error

    # -- inside

    def _sessions(self) -> list[Session]:
        return [self._session] if self._accepted is None else [self._session, self._accepted]

    def _new_session(self) -> Session:
        return Session(
            str(uuid.uuid4()),
            self.peer,
            dialed=True,
            owner=self,
            counters=self._counters,
            pacer=self._rate.pacer,
            floor_share=self._config.floor_share,
        )

    def _replace_session(self, error: LifeboatError) -> None:
        before, self._session = self._session, self._new_session()
        before.fail(error)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _wake(self) -> None:
        for session in sorted(self._sessions(), key=lambda each: each.highest_waiting):
            session.wake()

    async def _tick(self) -> None:
        beat = sent = 0
        while True:
            sent, before = sum(session.sent_wire_bytes for session in self._sessions()), sent
            sending = sent > before + _BUSY_BYTES or any(session.has_backlog for session in self._sessions())
            closely = sending or self._rate.pulse_is_on
            await asyncio.sleep(self._rate.beat_seconds if closely else _TICK_SECONDS)
            now = time.monotonic()
            self._rate.govern(now, self._sessions())
            beat += 1
            if sending and beat % 10:
                continue
            for session in self._sessions():
                session.tick(now, self._config.dead_peer_seconds)
                if not session.connections and now - session.empty_since > self._config.session_grace_seconds:
                    self._give_up(session)
            self._rate.tick(now)

    def _give_up(self, session: Session) -> None:
        error = LinkLost(
            f"no connection to {self.peer} for {self._config.session_grace_seconds:.0f} s: what "
            f"was under way is given up"
        )
        if session is not self._session:
            session.fail(error)
            self._accepted = None
        elif self._session.established:
            self._replace_session(error)
