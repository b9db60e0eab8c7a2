# SPDX-License-Identifier: GPL-3.0-or-later
"""Keeping the wanted number of connections to a peer: dialled, and dialled again, for as long as it takes."""

from __future__ import annotations

import asyncio
import math
import random
import ssl
import time
from collections.abc import Callable
from typing import Protocol

from precache_proxy import __version__
from precache_proxy.channel.connection import Connection
from precache_proxy.channel.dialer import dial
from precache_proxy.channel.identity import explain
from precache_proxy.channel.reset import LinkLost
from precache_proxy.channel.session import Session
from precache_proxy.channel.settings import MAXIMUM_CONNECTIONS, ChannelConfig, PeerAddress
from precache_proxy.errors import InvalidInput, LifeboatError, PeerRefused, PeerRestarted

_REFUSED_FACTOR = 3  # a refusal does not heal by itself: ask less often


class KeeperOwner(Protocol):
    """What a keeper needs of its link."""

    @property
    def session(self) -> Session:
        """The session that connections are dialled for."""

    @property
    def is_up(self) -> bool:
        """A connection carries streams."""

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next change of connections or session; from then on it is another event."""

    def session_unknown(self, error: LifeboatError) -> None:
        """The peer cannot go on with the session: a new one is needed."""

    def not_reached(self, error: LifeboatError) -> None:
        """No connection could be had."""


class ConnectionKeeper:
    """A task for each slot of a connection."""

    def __init__(
        self,
        peer: str,
        address: PeerAddress,
        config: ChannelConfig,
        *,
        instance: str,
        client_context: Callable[[], ssl.SSLContext],
        owner: KeeperOwner,
    ) -> None:
        self._peer = peer
        self._address = address
        self._config = config
        self._instance = instance
        self._client_context = client_context
        self._owner = owner
        self._wanted = self._checked(address.connections)
        self._slots: dict[int, asyncio.Task[None]] = {}
        self._failures = 0
        self._stopping = False

    @property
    def wanted(self) -> int:
        """How many connections are kept."""
        return self._wanted

    @property
    def where(self) -> str:
        """The peer's address and port, for people."""
        host = f"[{self._address.host}]" if ":" in self._address.host else self._address.host
        return f"{host}:{self._address.port}"

    @staticmethod
    def _checked(connections: int) -> int:
        if not 1 <= connections <= MAXIMUM_CONNECTIONS:
            raise InvalidInput(f"{connections} connections: give a number from 1 to {MAXIMUM_CONNECTIONS}")
        return connections

    def set_wanted(self, connections: int) -> None:
        """Keep so many from now on. Raises InvalidInput."""
        self._wanted = self._checked(connections)
        for slot, connection in list(self._owner.session.connections.items()):
            if slot >= connections:
                connection.close(ConnectionResetError("one connection less is wanted"))
        self.start()

    def start(self) -> None:
        """Dial in every slot, and keep dialling."""
        for slot in range(self._wanted):
            task = self._slots.get(slot)
            if task is None or task.done():
                self._slots[slot] = asyncio.create_task(
                    self._keep(slot), name=f"link {self._peer} slot {slot}"
                )

    async def stop(self) -> None:
        """Dial no more."""
        self._stopping = True
        for task in self._slots.values():
            task.cancel()
        await asyncio.gather(*self._slots.values(), return_exceptions=True)

    def succeeded(self) -> None:
        """A connection carries streams: the next failure is the first again."""
        self._failures = 0

    async def _keep(self, slot: int) -> None:
        dialled_at = -math.inf
        while slot < self._wanted:
            changed = self._owner.changed
            # One connection finds out whether the peer is there; the others follow it.
            if slot in self._owner.session.connections or (slot != 0 and not self._owner.is_up):
                await changed.wait()
                continue
            # A connection that breaks as soon as it stands must not make us dial without a pause.
            await asyncio.sleep(dialled_at + self._config.reconnect_minimum_seconds - time.monotonic())
            dialled_at = time.monotonic()
            error = await self._attempt(slot)
            if error is None:
                continue
            if isinstance(error, PeerRestarted | LinkLost):
                self._owner.session_unknown(error)
                continue
            if not self._owner.session.connections:
                self._owner.not_reached(error)
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
            return explain(self._peer, self.where, problem)
        return None

    async def _dial(self, slot: int) -> None:
        session = self._owner.session
        hello = {
            "name": self._config.name,
            "peer": self._peer,
            "instance": self._instance,
            "session": session.identifier,
            "slot": slot,
            "resume": session.established,
            "release": __version__,
        }
        tls, congestion_control, instance = await dial(
            self._address, self.where, hello, session.peer_instance, self._config, self._client_context()
        )
        if session is not self._owner.session or slot >= self._wanted or self._stopping:
            tls.close()
            return
        session.established = True
        session.peer_instance = instance
        session.attach(Connection(tls, slot, congestion_control, session))
