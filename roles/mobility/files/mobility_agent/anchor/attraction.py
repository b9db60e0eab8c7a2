# SPDX-License-Identifier: GPL-3.0-or-later
"""How the packets for the home prefixes come to an anchor.

What stands in the main table while the anchor attracts is an *unreachable* route for each prefix: a routing
daemon announces it (FRR: ``redistribute kernel``), the bindings are more specific, and what is bound nowhere
ends here instead of going round and round. It stands over a restart of the agent and, by what is kept on
disk, of the host: a home that was silent before is believed silent until its router is heard.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import struct
import time
from collections.abc import Callable, Sequence
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path

from mobility_agent.background import Background
from mobility_agent.config import Attraction, Prefix
from mobility_agent.crash_points import crash_point
from mobility_agent.durable import write_whole
from mobility_agent.errors import MobilityError

logger = logging.getLogger(__name__)

_ECHO_REQUEST, _ECHO_REPLY = 128, 129
_FILTER = 1


def _only_echo_replies() -> bytes:
    # A bit for each type, set: blocked (RFC 3542 section 3.2).
    mask = [0xFFFFFFFF] * 8
    mask[_ECHO_REPLY >> 5] &= ~(1 << (_ECHO_REPLY & 31)) & 0xFFFFFFFF
    return struct.pack("=8I", *mask)


class Watch:
    """Asks a home router for a sign of life, a few times while its silence would be noticed.

    ``judge(router, silence)`` is called each time: seconds since its last answer, and no more than it was
    asked for in vain, for our own standing still is nobody's silence; infinite for one that was silent when
    this began (``silent``) and has not been heard since.
    """

    def __init__(
        self,
        router: IPv6Address,
        silent_seconds: float,
        judge: Callable[[IPv6Address, float], None],
        *,
        silent: bool,
    ) -> None:
        self._router = router
        self._silent_seconds = silent_seconds
        self._judge = judge
        self._silent = silent
        self.background = Background()

    def start(self) -> None:
        """Begin to ask."""
        self.background.start(self._run())

    async def stop(self) -> None:
        """Ask no more."""
        await self.background.stop()

    async def _run(self) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        own = socket.socket(socket.AF_INET6, kind, socket.IPPROTO_ICMPV6)
        own.setsockopt(socket.IPPROTO_ICMPV6, _FILTER, _only_echo_replies())
        identifier = id(self) & 0xFFFF
        pause = self._silent_seconds / 4
        heard_at, in_vain = float("-inf") if self._silent else time.monotonic(), 0
        loop = asyncio.get_running_loop()

        def hear() -> None:
            nonlocal heard_at, in_vain
            with contextlib.suppress(OSError):
                while True:
                    data, origin = own.recvfrom(256)
                    ours = len(data) >= 8 and data[4:6] == identifier.to_bytes(2, "big")
                    if ours and IPv6Address(origin[0].partition("%")[0]) == self._router:
                        heard_at, in_vain = time.monotonic(), 0

        with own:
            loop.add_reader(own, hear)
            try:
                for sequence in range(1 << 62):
                    request = struct.pack(">BBHHH", _ECHO_REQUEST, 0, 0, identifier, sequence & 0xFFFF)
                    with contextlib.suppress(OSError):
                        # An unreachable network is silence too.
                        own.sendto(request, (str(self._router), 0))
                    in_vain += 1
                    await asyncio.sleep(pause)
                    # What came while we stood still is in the socket yet.
                    hear()
                    silence = time.monotonic() - heard_at
                    asked_for = silence if silence == float("inf") else in_vain * pause
                    self._judge(self._router, min(silence, asked_for))
            finally:
                loop.remove_reader(own)


class Attractor:
    """Keeps the attracting routes as the configuration wants them.

    ``memory``: where it is kept on disk which prefixes were attracted because their home was silent.
    ``awaited(prefix)``: how many VMs packets could not find any more were the prefix handed back now: the
    gateway at home that had them has not been told yet where they went.
    """

    def __init__(
        self,
        settings: Attraction,
        prefixes: Sequence[Prefix],
        install: Callable[[Sequence[IPv6Network]], None],
        memory: Path,
        awaited: Callable[[IPv6Network], int],
    ) -> None:
        self._settings = settings
        self._install = install
        self._memory = memory
        self._awaited = awaited
        self._networks = tuple(prefix.network for prefix in prefixes)
        # Each home site falls silent for itself.
        self._of_router: dict[IPv6Address, set[IPv6Network]] = {}
        for prefix in prefixes if settings.mode == "when-silent" else ():
            router = prefix.watch or settings.watch
            if router is not None:
                self._of_router.setdefault(router, set()).add(prefix.network)
        self._attracted: set[IPv6Network] = set()
        self._waiting: set[IPv6Network] = set()
        self._watches: list[Watch] = []

    def restore(self) -> None:
        """Want what stood before. Call before the data path starts."""
        if self._settings.mode == "always":
            self._attracted = set(self._networks)
        elif self._settings.mode == "when-silent":
            self._attracted = self._recall()
        self._install(self._in_order(self._attracted))

    def _recall(self) -> set[IPv6Network]:
        try:
            told = {IPv6Network(text) for text in json.loads(self._memory.read_text())}
        except FileNotFoundError:
            return set()
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s: is damaged (%s) and was left out", self._memory, error)
            return set()
        watched: set[IPv6Network] = set().union(*self._of_router.values())
        return told & watched

    def _in_order(self, networks: set[IPv6Network]) -> tuple[IPv6Network, ...]:
        return tuple(network for network in self._networks if network in networks)

    def start(self) -> None:
        """Watch whether to attract, where that is to be seen."""
        for router, networks in self._of_router.items():
            silent = bool(networks & self._attracted)
            self._watches.append(Watch(router, self._settings.silent_seconds, self.judge, silent=silent))
        for watch in self._watches:
            watch.start()

    async def stop(self) -> None:
        """Watch no more; the routes stay as they are."""
        for watch in self._watches:
            await watch.stop()

    def failure(self) -> BaseException | None:
        """What ended a watch that should go on, if anything did."""
        found = (watch.background.failure() for watch in self._watches)
        return next((failure for failure in found if failure is not None), None)

    def judge(self, router: IPv6Address, silence_seconds: float) -> None:
        """``router`` has not answered for so long: attract its prefixes, or hand them back."""
        networks = self._of_router[router]
        if silence_seconds >= self._settings.silent_seconds:
            # Those it has not got back yet are waited for anew when it answers again.
            self._waiting -= networks
            self._set(self._attracted | networks, f"home router {router}: silent; this anchor takes over")
            return
        handed_back: set[IPv6Network] = set()
        for network in networks & self._attracted:
            awaited = self._awaited(network)
            if not awaited:
                handed_back.add(network)
            elif network not in self._waiting:
                self._waiting.add(network)
                logger.info(
                    "home router %s: answers again; it gets %s back when the gateways there know where "
                    "%d VMs went",
                    router,
                    network,
                    awaited,
                )
        self._waiting -= handed_back
        self._set(self._attracted - handed_back, f"home router {router}: answers again; it has back")

    def _set(self, attracted: set[IPv6Network], why: str) -> None:
        changed = self._in_order(attracted ^ self._attracted)
        if not changed:
            return
        try:
            self._install(self._in_order(attracted))
        except MobilityError as error:
            logger.error("home prefixes: %s; tried again", error)
            return
        logger.warning("%s %s", why, ", ".join(str(network) for network in changed))
        self._attracted = attracted
        crash_point("attraction-routed")
        try:
            write_whole(self._memory, json.dumps([str(one) for one in self._in_order(attracted)]).encode())
        except OSError as error:
            logger.error("%s: not written: %s", self._memory, error)

    def status(self) -> dict[str, object]:
        """For the control interface."""
        return {
            "mode": self._settings.mode,
            "attracting": bool(self._attracted),
            "prefixes": [str(network) for network in self._in_order(self._attracted)],
            "waiting": [str(network) for network in self._in_order(self._waiting)],
            "watch": None if self._settings.watch is None else str(self._settings.watch),
        }
