# SPDX-License-Identifier: GPL-3.0-or-later
"""From a TCP socket to an authenticated one, on the event loop: TLS, then one hello in each direction."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from precache_proxy.channel.frames import (
    HELLO_HEADER_BYTES,
    VERSION,
    pack_hello,
    unpack_hello_header,
    unpack_json,
)
from precache_proxy.errors import PeerRefused

_Value = TypeVar("_Value")


async def _ready(descriptor: int, *, write: bool) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def done() -> None:
        if not future.done():
            future.set_result(None)

    add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    add(descriptor, done)
    try:
        await future
    finally:
        remove(descriptor)


async def _repeat(tls: ssl.SSLSocket, operation: Callable[[], _Value]) -> _Value:
    while True:
        try:
            return operation()
        except ssl.SSLWantReadError:
            await _ready(tls.fileno(), write=False)
        except ssl.SSLWantWriteError:
            await _ready(tls.fileno(), write=True)


async def start_tls(raw: socket.socket, context: ssl.SSLContext, *, server: bool) -> ssl.SSLSocket:
    """The TLS handshake. ``raw`` belongs to the result, and is closed on failure. Raises OSError,
    ssl.SSLError.
    """
    tls = context.wrap_socket(
        raw, server_side=server, do_handshake_on_connect=False, suppress_ragged_eofs=False
    )
    try:
        await _repeat(tls, tls.do_handshake)
    except BaseException:
        tls.close()
        raise
    return tls


async def send_hello(tls: ssl.SSLSocket, content: dict[str, Any]) -> None:
    """Send our hello."""
    data = pack_hello(content)
    await _repeat(tls, lambda: tls.send(data))


async def receive_hello(tls: ssl.SSLSocket) -> dict[str, Any]:
    """The other side's hello. Raises ProtocolError, PeerRefused on another version, OSError."""
    version, length = unpack_hello_header(await _exactly(tls, HELLO_HEADER_BYTES))
    body = await _exactly(tls, length)
    if version != VERSION:
        raise PeerRefused(
            f"the other side speaks version {version} of the channel, we speak {VERSION}; install "
            f"the same release on both"
        )
    return unpack_json(body, "hello")


async def _exactly(tls: ssl.SSLSocket, count: int) -> bytes:
    data = bytearray(count)
    view = memoryview(data)
    filled = 0
    while filled < count:
        rest = view[filled:]
        got = await _repeat(tls, partial(tls.recv_into, rest))
        if not got:
            raise ConnectionResetError("closed by the other side before its hello")
        filled += got
    return bytes(data)
