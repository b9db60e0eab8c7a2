# SPDX-License-Identifier: GPL-3.0-or-later
"""How the packets for the home prefixes come to an anchor.

What stands in the main table while the anchor attracts is an *unreachable* route for each prefix: a routing
daemon announces it (FRR: ``redistribute kernel``), the bindings are more specific, and what is bound nowhere
ends here instead of going round and round.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import time
from collections.abc import Callable, Sequence
from ipaddress import IPv6Address, IPv6Network

from mobility_agent.background import Background
from mobility_agent.config import Attraction

logger = logging.getLogger(__name__)

_ECHO_REQUEST, _ECHO_REPLY = 128, 129
_FILTER = 1


def _only_echo_replies() -> bytes:
    # A bit for each type, set: blocked (RFC 3542 section 3.2).
    mask = [0xFFFFFFFF] * 8
    mask[_ECHO_REPLY >> 5] &= ~(1 << (_ECHO_REPLY & 31)) & 0xFFFFFFFF
    return struct.pack("=8I", *mask)


class Watch:
    """Asks the home router for a sign of life, a few times while its silence would be noticed."""

    def __init__(self, settings: Attraction, changed: Callable[[bool], None]) -> None:
        self._settings = settings
        self._changed = changed
        self.silent = False
        self._background = Background()

    def start(self) -> None:
        """Begin to ask."""
        self._background.start(self._run())

    async def stop(self) -> None:
        """Ask no more."""
        await self._background.stop()

    async def _run(self) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        own = socket.socket(socket.AF_INET6, kind, socket.IPPROTO_ICMPV6)
        own.setsockopt(socket.IPPROTO_ICMPV6, _FILTER, _only_echo_replies())
        identifier = id(self) & 0xFFFF
        heard_at = time.monotonic()
        loop = asyncio.get_running_loop()
        with own:
            for sequence in range(1 << 62):
                request = struct.pack(">BBHHH", _ECHO_REQUEST, 0, 0, identifier, sequence & 0xFFFF)
                with contextlib.suppress(OSError):
                    # An unreachable network is silence too.
                    own.sendto(request, (str(self._settings.watch), 0))
                until = loop.time() + self._settings.silent_seconds / 4
                while (left := until - loop.time()) > 0:
                    with contextlib.suppress(TimeoutError, OSError):
                        data, origin = await asyncio.wait_for(loop.sock_recvfrom(own, 256), left)
                        ours = len(data) >= 8 and data[4:6] == identifier.to_bytes(2, "big")
                        if ours and IPv6Address(origin[0].partition("%")[0]) == self._settings.watch:
                            heard_at = time.monotonic()
                self._judge(time.monotonic() - heard_at)

    def _judge(self, silence_seconds: float) -> None:
        silent = silence_seconds >= self._settings.silent_seconds
        if silent == self.silent:
            return
        self.silent = silent
        if silent:
            logger.warning(
                "home router %s: silent for %.1f s; this anchor takes the home prefixes over",
                self._settings.watch,
                silence_seconds,
            )
        else:
            logger.info("home router %s: answers again; it has the home prefixes back", self._settings.watch)
        self._changed(silent)


class Attractor:
    """Keeps the attracting routes as the configuration wants them."""

    def __init__(
        self,
        settings: Attraction,
        prefixes: Sequence[IPv6Network],
        install: Callable[[Sequence[IPv6Network]], None],
    ) -> None:
        self._settings = settings
        self._prefixes = tuple(prefixes)
        self._install = install
        self.attracting = False
        self._watch: Watch | None = None

    def start(self) -> None:
        """Attract, or watch whether to."""
        if self._settings.mode == "when-silent":
            self._watch = Watch(self._settings, self._set)
            self._watch.start()
        self._set(self._settings.mode == "always")

    async def stop(self) -> None:
        """Watch no more; the routes stay as they are."""
        if self._watch is not None:
            await self._watch.stop()

    def _set(self, attracting: bool) -> None:
        self.attracting = attracting
        self._install(self._prefixes if attracting else ())

    def status(self) -> dict[str, object]:
        """For the control interface."""
        return {
            "mode": self._settings.mode,
            "attracting": self.attracting,
            "watch": None if self._settings.watch is None else str(self._settings.watch),
        }
