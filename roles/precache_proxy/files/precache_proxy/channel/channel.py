# SPDX-License-Identifier: GPL-3.0-or-later
"""The channel of a proxy: the port that peers dial, a link to every peer, handlers for what peers ask."""

from __future__ import annotations

import asyncio
import logging
import ssl
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from precache_proxy.channel import rpc
from precache_proxy.channel.identity import make_context
from precache_proxy.channel.link import Link
from precache_proxy.channel.listener import Listener
from precache_proxy.channel.rate import check_windows
from precache_proxy.channel.reset import StreamReset
from precache_proxy.channel.settings import ChannelConfig
from precache_proxy.channel.stream import Stream
from precache_proxy.errors import ConfigurationError, Finding, LifeboatError, NotFound

log = logging.getLogger(__name__)

StreamHandler = Callable[[Stream], Awaitable[None]]


class Channel:
    """Make it, register handlers, ``await start()``."""

    def __init__(self, config: ChannelConfig) -> None:
        self.config = config
        self.instance = str(uuid.uuid4())  # a new one tells peers that this process is a new one
        self.links: dict[str, Link] = {}
        self._calls: dict[str, rpc.CallHandler] = {}
        self._handlers: dict[str, StreamHandler] = {rpc.KIND: self._serve_call}
        self._tasks: set[asyncio.Task[None]] = set()
        self._client_context: ssl.SSLContext | None = None
        self._listener: Listener | None = None
        check_peers(config)

    @property
    def port(self) -> int:
        """The port that is listened on (asked for: 0 = any)."""
        return self._listener.port if self._listener else self.config.listen_port

    def handle_call(
        self, method: str, handler: Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]
    ) -> None:
        """``handler(peer, parameters)`` answers calls of ``method``; a LifeboatError in it reaches
        the caller.
        """
        self._calls[method] = handler

    def handle_stream(self, kind: str, handler: StreamHandler) -> None:
        """``handler(stream)`` serves streams of ``kind``.

        An exception in it resets the stream with its cause; when it returns, the sending half is
        closed and input that nobody has read is dropped.
        """
        self._handlers[kind] = handler

    async def start(self) -> None:
        """Listen and dial. Raises ConfigurationError: certificates, address in use."""
        self._client_context = make_context(self.config, server=False)
        self._listener = Listener(
            self.config, self.instance, self.links, make_context(self.config, server=True)
        )
        self.links.update(
            {
                name: Link(
                    name,
                    address,
                    self.config,
                    instance=self.instance,
                    client_context=self._context,
                    on_stream=self._stream_opened,
                )
                for name, address in self.config.peers.items()
            }
        )
        self._listener.start()
        for link in self.links.values():
            link.start()

    async def stop(self) -> None:
        """Say goodbye, close everything. Streams end with ``link-lost`` here, ``peer-restarted``
        at the peers.
        """
        if self._listener is not None:
            await self._listener.stop()
        for link in self.links.values():
            await link.stop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def reload_certificates(self) -> None:
        """New connections use the files as they are now; on ConfigurationError the old ones stay in use."""
        client, server = make_context(self.config, server=False), make_context(self.config, server=True)
        self._client_context = client
        if self._listener is not None:
            self._listener.context = server

    def _context(self) -> ssl.SSLContext:
        assert self._client_context is not None
        return self._client_context

    def _stream_opened(self, link: Link, stream: Stream) -> None:
        task = asyncio.create_task(self._serve(stream), name=f"stream {stream.kind} of {link.peer}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, stream: Stream) -> None:
        handler = self._handlers.get(stream.kind)
        try:
            if handler is None:
                raise NotFound(
                    f"stream {stream.kind!r}: not known to this proxy; install the same release on both hosts"
                )
            await handler(stream)
            await stream.close()
            stream.discard()
        except StreamReset:
            pass  # both sides know; the handler had nothing to add
        except LifeboatError as error:
            log.info("stream %s of %s ended: %s", stream.kind, stream.peer, error)
            stream.reset(error)
        except asyncio.CancelledError:
            stream.reset(LifeboatError(f"stream {stream.kind!r}: its handler was cancelled"))
            raise
        except Exception as error:
            log.exception("stream %s of %s failed", stream.kind, stream.peer)
            stream.reset(
                LifeboatError(
                    f"stream {stream.kind!r}: internal error ({type(error).__name__}: {error}); "
                    f"see the log there"
                )
            )

    async def _serve_call(self, stream: Stream) -> None:
        await rpc.serve(stream, self._calls)


def check_peers(config: ChannelConfig) -> None:
    """Raise ConfigurationError with every finding about names, addresses and rates."""
    findings = []
    for name, address in config.peers.items():
        subject = f"peer {name}"
        if name.lower() == config.name.lower():
            findings.append(
                Finding(subject, "is this host itself", "name another host as peer", "configuration")
            )
        if not address.host or not 1 <= address.port <= 65535:
            findings.append(
                Finding(
                    subject,
                    f"has no usable address ({address.host}:{address.port})",
                    "set host and port",
                    "configuration",
                )
            )
        if address.rate_bytes_per_second is not None and address.rate_bytes_per_second <= 0:
            findings.append(
                Finding(
                    subject,
                    "has a rate of 0",
                    "give a rate above 0 or leave it out for no limit",
                    "configuration",
                )
            )
        try:
            check_windows(address.windows)
        except ConfigurationError as error:
            findings.append(Finding(subject, error.message, "correct the window", "configuration"))
    if findings:
        raise ConfigurationError("; ".join(map(str, findings)), findings)
