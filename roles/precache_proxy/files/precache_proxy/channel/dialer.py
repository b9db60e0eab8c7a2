# SPDX-License-Identifier: GPL-3.0-or-later
"""One dial: TCP, TLS, the peer's name, a hello each way."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

from precache_proxy.channel.connection import tune
from precache_proxy.channel.handshake import receive_hello, send_hello, start_tls
from precache_proxy.channel.identity import peer_names, refused
from precache_proxy.channel.reset import LinkLost
from precache_proxy.channel.settings import ChannelConfig, PeerAddress
from precache_proxy.errors import PeerRefused, PeerRestarted


async def dial(
    address: PeerAddress,
    where: str,
    hello: dict[str, Any],
    peer_instance: str,
    config: ChannelConfig,
    context: ssl.SSLContext,
) -> tuple[ssl.SSLSocket, str, str]:
    """(socket, congestion control, the peer's instance).

    ``peer_instance`` is the process that the session began with, empty for a new session. Raises OSError,
    PeerRefused, ProtocolError; PeerRestarted and LinkLost when the session cannot go on.
    """
    peer = str(hello["peer"])
    tls, congestion_control = await _connect(address, config, context)
    try:
        certificate = tls.getpeercert()
        if peer.lower() not in peer_names(certificate):
            raise refused(peer, where, certificate)
        await send_hello(tls, hello)
        answer = await receive_hello(tls)
        instance = str(answer.get("instance", ""))
        _check(answer, peer, where, restarted=bool(peer_instance) and instance != peer_instance)
    except BaseException:
        tls.close()
        raise
    return tls, congestion_control, instance


async def _connect(
    address: PeerAddress, config: ChannelConfig, context: ssl.SSLContext
) -> tuple[ssl.SSLSocket, str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    problem: OSError = ConnectionRefusedError("no address")
    for family, kind, protocol, _unused, place in found:
        raw = socket.socket(family, kind, protocol)
        try:
            raw.setblocking(False)
            congestion_control = tune(raw, dead_seconds=config.dead_peer_seconds)
            await loop.sock_connect(raw, place)
        except OSError as error:
            raw.close()
            problem = error
            continue
        except BaseException:
            raw.close()
            raise
        return await start_tls(raw, context, server=False), congestion_control
    raise problem


def _check(answer: dict[str, Any], peer: str, where: str, *, restarted: bool) -> None:
    if restarted:
        raise PeerRestarted(f"the proxy of {peer} was restarted")
    if answer.get("accepted"):
        return
    message = str(answer.get("message", "no reason given"))
    if answer.get("cause") == PeerRestarted.cause:
        raise LinkLost(f"{peer} has given the session up: {message}")
    raise PeerRefused(f"peer {peer} at {where} refuses us: {message}")
