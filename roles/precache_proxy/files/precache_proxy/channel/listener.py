# SPDX-License-Identifier: GPL-3.0-or-later
"""The one port: accepts TCP connections of peers, finds out who speaks, hands them to the peer's link."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from typing import Any

from precache_proxy import __version__
from precache_proxy.channel.connection import Connection, tune
from precache_proxy.channel.handshake import receive_hello, send_hello, start_tls
from precache_proxy.channel.identity import describe_caller, peer_names
from precache_proxy.channel.link import Link
from precache_proxy.channel.settings import MAXIMUM_CONNECTIONS, ChannelConfig
from precache_proxy.errors import ConfigurationError, LifeboatError, PeerRefused, ProtocolError

log = logging.getLogger(__name__)

_MAXIMUM_HANDSHAKES = 64
_BACKLOG = 128


class Listener:
    """Listens on IPv6 and IPv4, or on the one address that is configured."""

    def __init__(
        self, config: ChannelConfig, instance: str, links: dict[str, Link], context: ssl.SSLContext
    ) -> None:
        self.context = context
        self.port = config.listen_port
        self._config = config
        self._instance = instance
        self._links = links
        self._sockets: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(_MAXIMUM_HANDSHAKES)

    def start(self) -> None:
        """Listen. Raises ConfigurationError when the address cannot be had."""
        host, port = self._config.listen_address, self._config.listen_port
        try:
            if host:
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                self._sockets.append(socket.create_server((host, port), family=family, backlog=_BACKLOG))
            elif socket.has_dualstack_ipv6():
                self._sockets.append(
                    socket.create_server(
                        ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG
                    )
                )
            else:
                self._sockets.append(socket.create_server(("", port), backlog=_BACKLOG))
        except OSError as error:
            raise ConfigurationError(
                f"port {port} on {host or 'every address'}: cannot listen ({error.strerror}); "
                "end what holds it, or set another address or port in [listen]"
            ) from error
        self.port = self._sockets[0].getsockname()[1]
        for listening in self._sockets:
            listening.setblocking(False)
            self._spawn(self._accept(listening))

    async def stop(self) -> None:
        """Accept no more, and drop who has not shown who it is."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for listening in self._sockets:
            listening.close()

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # Strangers cannot take more than this many places; further ones wait in the kernel's queue.
            await self._slots.acquire()
            try:
                raw, address = await loop.sock_accept(listening)
            except OSError as error:
                self._slots.release()
                log.warning("port %d: cannot accept (%s); trying again in a second", self.port, error)
                await asyncio.sleep(1)
                continue
            except BaseException:
                self._slots.release()
                raise
            self._spawn(self._greet(raw, f"[{address[0]}]:{address[1]}"))

    async def _greet(self, raw: socket.socket, where: str) -> None:
        try:
            async with asyncio.timeout(self._config.handshake_seconds):
                await self._introduce(raw)
        except (OSError, LifeboatError) as error:
            log.warning("caller %s was turned away: %s", where, describe_caller(error))
        finally:
            self._slots.release()

    async def _introduce(self, raw: socket.socket) -> None:
        raw.setblocking(False)
        try:
            congestion_control = tune(raw, dead_seconds=self._config.dead_peer_seconds)
        except OSError:
            raw.close()
            raise
        tls = await start_tls(raw, self.context, server=True)
        try:
            try:
                hello = await receive_hello(tls)
                link, slot = self._recognise(tls, hello)
                session = link.admit(hello)
            except LifeboatError as error:
                await send_hello(tls, self._answer() | {"accepted": False} | _short(error))
                raise
            await send_hello(tls, self._answer() | {"accepted": True})
        except BaseException:
            tls.close()
            raise
        if session.closed:
            tls.close()
            return
        session.attach(Connection(tls, slot, congestion_control, session))

    def _answer(self) -> dict[str, Any]:
        return {"name": self._config.name, "instance": self._instance, "release": __version__}

    def _recognise(self, tls: ssl.SSLSocket, hello: dict[str, Any]) -> tuple[Link, int]:
        names = peer_names(tls.getpeercert())
        holder = ", ".join(names) or "nobody"
        claimed = str(hello.get("name", ""))
        if claimed.lower() not in names:
            raise PeerRefused(
                f"the caller says that it is {claimed!r}, its certificate is for {holder}; "
                "correct its name, or its certificate (role pki)"
            )
        link = next((each for name, each in self._links.items() if name.lower() == claimed.lower()), None)
        us = self._config.name
        if link is None:
            raise PeerRefused(f"{claimed} is not among the peers of {us}; add it to [[peers]] there")
        if str(hello.get("peer", "")).lower() != us.lower():
            raise PeerRefused(f"{claimed} looks for {hello.get('peer')!r}, this is {us}; correct the address")
        slot = hello.get("slot")
        if not isinstance(slot, int) or not 0 <= slot < MAXIMUM_CONNECTIONS:
            raise ProtocolError(
                f"hello of {claimed} with slot {slot!r}: 0 to {MAXIMUM_CONNECTIONS - 1} are allowed"
            )
        return link, slot


def _short(error: LifeboatError) -> dict[str, Any]:
    return {"cause": error.cause, "message": error.message[:1024]}
