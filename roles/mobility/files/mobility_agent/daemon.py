# SPDX-License-Identifier: GPL-3.0-or-later
"""Puts the parts together, in the order in which nothing gets lost, and takes them apart again."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import logging
import math
import os
import signal
import time
from collections.abc import Coroutine, Iterator
from ipaddress import IPv6Address

from mobility_agent.anchor.duty import AnchorDuty
from mobility_agent.config import Bridge, Config, Peer
from mobility_agent.control.api import ControlServer
from mobility_agent.control.parts import Parts
from mobility_agent.control.service_manager import ServiceManager
from mobility_agent.crash_points import crash_point
from mobility_agent.datapath.discovery import Responder
from mobility_agent.datapath.first_hop import FormerBridges
from mobility_agent.datapath.hold_device import HoldDevice
from mobility_agent.datapath.path import DataPath
from mobility_agent.datapath.path_mtu import PathMtuListener
from mobility_agent.durable import Journal, raise_counter
from mobility_agent.errors import Conflict, MobilityError
from mobility_agent.gateway.claims import AnchorClaims
from mobility_agent.gateway.duty import GatewayDuty
from mobility_agent.gateway.hypervisor import Moves
from mobility_agent.gateway.learning import Heard, Learner
from mobility_agent.gateway.learning_host import LibvirtHost
from mobility_agent.homes import Address
from mobility_agent.messages.headers import Message
from mobility_agent.signalling.transport import Transport

logger = logging.getLogger(__name__)

_LOCK = "mobility.lock"
_LINKS_SECONDS = 2.0
# Judging a bridge reads all links of the host.
_JUDGED_AGAIN_SECONDS = 60.0
_REPAIR_SECONDS = 300.0
# RFC 8201 section 4: ask the path anew after ten minutes.
_MTU_FORGOTTEN_SECONDS = 600.0


class Daemon:
    """One agent."""

    def __init__(self, config: Config, service_manager: ServiceManager) -> None:
        self._config = config
        self._manager = service_manager
        path = DataPath(config.path_settings())
        transport = Transport(config.address, config.own_key, config.own_keys, config.partners, self._receive)
        self.parts = Parts(config, path, transport)
        self._mtu_listener = PathMtuListener(config.address, self._learn_mtu)
        self._mtu_learnt: dict[IPv6Address, float] = {}
        self._server = ControlServer(self.parts)
        self._stopping = asyncio.Event()
        self._booted = False
        self._home_links: dict[str, Responder] = {}
        self._bridges: set[str] = set()
        # When it was judged last that this gateway must not be the first hop there (monotonic seconds).
        self._kept_off: dict[str, float] = {}
        self._former = FormerBridges(config.state / "former_bridges.json")
        self._learning: LibvirtHost | None = None

    def stop(self) -> None:
        """Ask :meth:`run` to end."""
        self._stopping.set()

    async def run(self) -> None:
        """Serve until told to stop. Raises MobilityError when it cannot begin."""
        config, parts = self._config, self.parts
        for directory in (config.state, config.run):
            directory.mkdir(parents=True, exist_ok=True)
        # What lies there is gone when the host starts anew.
        self._booted = not (config.run / _LOCK).exists()
        with _lock(config):
            findings = parts.path.findings()
            for finding in findings:
                logger.warning("%s", finding)
            try:
                self._build()
                self._begin()
                await self._server.start()
                parts.state = "running"
                self._manager.notify(READY=1, STATUS=self._sentence())
                await self._serve()
            finally:
                parts.state = "stopping"
                self._manager.notify(STOPPING=1)
                await self._end()

    def _build(self) -> None:
        config, parts = self._config, self.parts
        if config.anchor:
            restarts = raise_counter(config.state / "anchor_restarts")
            for prefix in config.prefixes:
                if prefix.link is not None and prefix.link not in self._home_links:
                    self._home_links[prefix.link] = self._home_link(prefix.link)
            journal = Journal(config.state / "bindings.journal")
            parts.anchor = AnchorDuty(
                config, parts.path, journal, restarts, parts.transport.send, self._home_links
            )
        if config.gateway:
            heard = Heard(prefix.network for prefix in config.prefixes)
            for bridge in config.bridges:
                parts.responders[bridge.name] = Responder(
                    bridge.name,
                    bridge.mac,
                    bridge.link_local,
                    self._elsewhere,
                    heard.note if config.learn_addresses else None,
                )
            journal = Journal(config.state / "attachments.journal")
            parts.gateway = GatewayDuty(
                config,
                parts.path,
                journal,
                parts.transport.send,
                parts.responders,
                self._kept_off.keys(),
                HoldDevice(),
            )
            if config.hypervisor != "none":
                names = frozenset(bridge.name for bridge in config.bridges)
                parts.moves = Moves(parts.gateway, config.hypervisor, names)
                if config.learn_addresses:
                    library = parts.moves.hypervisor.library
                    self._learning = LibvirtHost(library, config.hypervisor, names, heard)
                    parts.learner = Learner(
                        self._learning,
                        AnchorClaims(parts.gateway.registrar, parts.gateway.attachments, parts.gateway.nudge),
                        tuple(prefix.network for prefix in config.prefixes),
                    )

    def _home_link(self, device: str) -> Responder:
        mac, link_local = self.parts.path.link_identity(device)
        return Responder(device, mac, link_local, functools.partial(self._away_from, device))

    def _begin(self) -> None:
        """What was kept is wanted first, so that the kernel is reconciled with all of it in one go."""
        parts = self.parts
        if parts.anchor is not None:
            parts.anchor.restore()
        if parts.gateway is not None:
            self._keep_links()
            parts.gateway.restore(booted=self._booted)
        parts.path.start()
        self._mtu_listener.start()
        parts.transport.start()
        for device, responder in self._home_links.items():
            try:
                responder.start()
            except OSError as error:
                logger.warning("home link %s: neighbour discovery is not answered there: %s", device, error)
        if parts.anchor is not None:
            parts.anchor.start()
        if parts.gateway is not None:
            parts.gateway.start()
        if parts.moves is not None:
            parts.moves.start()
        if parts.learner is not None:
            parts.learner.start()

    def _elsewhere(self, address: IPv6Address, duplicate_detection: bool) -> bool:
        gateway = self.parts.gateway
        return gateway is not None and gateway.neighbourhood.elsewhere(address, duplicate_detection)

    def _away_from(self, device: str, address: IPv6Address, _duplicate_detection: bool) -> bool:
        # Who asks whether the address of a VM that is away is free is told that it is not.
        anchor = self.parts.anchor
        return anchor is not None and anchor.away_from(device, address)

    def _receive(self, peer: Peer, message: Message) -> None:
        parts = self.parts
        if parts.anchor is not None and parts.anchor.take(peer, message):
            return
        if parts.gateway is not None and parts.gateway.take(peer, message):
            return
        logger.warning("from %s: %s is nothing for this agent's duty", peer.name, type(message).__name__)

    def _learn_mtu(self, tunnel: IPv6Address, octets: int) -> None:
        if all(peer.tunnel_address != tunnel for peer in self._config.peers):
            return
        self._mtu_learnt[tunnel] = time.monotonic()
        try:
            if self.parts.path.learn_mtu(tunnel, octets):
                logger.info("path to %s: carries %d octets; senders are told so", tunnel, octets)
        except MobilityError as error:
            logger.error("path to %s: carries %d octets: %s; tried again", tunnel, octets, error)

    def _forget_mtu(self, now: float) -> None:
        for tunnel, at in list(self._mtu_learnt.items()):
            if now - at > _MTU_FORGOTTEN_SECONDS:
                del self._mtu_learnt[tunnel]
                self.parts.path.learn_mtu(tunnel, None)

    def _keep_links(self) -> None:
        """Bridges come and go with libvirt's networks: be the first hop on each that is there."""
        parts = self.parts
        for bridge in self._config.bridges:
            responder = parts.responders[bridge.name]
            if bridge.name not in self._bridges and self._keeps_off(bridge):
                continue
            if bridge.name not in self._bridges:
                changes = parts.path.to_change(bridge.name, bridge.mac, [bridge.link_local])
                self._former.note(bridge.name, changes)
                configured: set[Address] = {bridge.link_local, *parts.path.settings.ipv4_routers}
                outdated = self._former.outdated(bridge.name, configured)
                if outdated.addresses:
                    parts.path.leave_first_hop(bridge.name, outdated)
                    self._former.forget(bridge.name, outdated)
            there = parts.path.make_first_hop(bridge.name, bridge.mac, [bridge.link_local])
            if there and not responder.listening:
                try:
                    responder.start()
                except OSError as error:
                    logger.warning("bridge %s: %s", bridge.name, error)
                    continue
                logger.info("bridge %s: this gateway is its first hop", bridge.name)
                self._bridges.add(bridge.name)
                if parts.state == "running" and parts.gateway is not None:
                    parts.path.bridge_came(bridge.name)
                    parts.gateway.neighbourhood.bridge_came(bridge.name)
            elif not there and bridge.name in self._bridges:
                logger.warning("bridge %s: is gone", bridge.name)
                self._bridges.discard(bridge.name)
                responder.stop()

    def _keeps_off(self, bridge: Bridge) -> bool:
        """Whether the bridge is the host's own, or other hosts' too: its MAC must stay then."""
        now = time.monotonic()
        if now - self._kept_off.get(bridge.name, -math.inf) < _JUDGED_AGAIN_SECONDS:
            return True
        obstacles = self.parts.path.obstacles(bridge.name, bridge.mac)
        for obstacle in obstacles if bridge.name not in self._kept_off else ():
            logger.error("%s; this gateway is not its first hop until then", obstacle)
        if not obstacles:
            self._kept_off.pop(bridge.name, None)
            return False
        self._kept_off[bridge.name] = now
        return True

    async def _serve(self) -> None:
        """Until the end: links, repair, signs of life."""
        repaired = time.monotonic()
        half_watchdog = self._manager.watchdog_seconds / 2 or _LINKS_SECONDS
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(_LINKS_SECONDS, half_watchdog)):
                    await self._stopping.wait()
            self._judge_work()
            now = time.monotonic()
            try:
                self._forget_mtu(now)
                if self._config.gateway:
                    self._keep_links()
                if self.parts.path.mend():
                    logger.info("data path: has now what the kernel refused before")
                if now - repaired > _REPAIR_SECONDS:
                    repaired = now
                    # Somebody may have flushed our tables.
                    await self.parts.path.repair()
                self.parts.path.keep_tunnel_end()
            except (MobilityError, OSError) as error:
                logger.error("data path: %s", error)
            self._manager.notify(WATCHDOG=1, STATUS=self._sentence())

    def _judge_work(self) -> None:
        """Nobody would notice that work in the background has ended. Raises MobilityError."""
        parts = self.parts
        for subject, part in (("anchor", parts.anchor), ("gateway", parts.gateway), ("libvirt", parts.moves)):
            failure = part.failure() if part is not None else None
            if failure is not None:
                logger.error("%s: its work has ended", subject, exc_info=failure)
                raise MobilityError(f"{subject}: its work has ended ({failure!r}); the agent starts anew")

    def _sentence(self) -> str:
        parts, words = self.parts, []
        if parts.anchor is not None:
            words.append(f"anchor of {len(parts.anchor.table)} bindings")
        if parts.gateway is not None:
            words.append(f"gateway of {parts.gateway.attachments.here} VMs")
        return ", ".join(words)

    async def _end(self) -> None:
        parts = self.parts
        await self._server.stop()
        if parts.learner is not None:
            await _stopped(parts.learner.stop())
        if self._learning is not None:
            self._learning.close()
        if parts.moves is not None:
            await _stopped(parts.moves.stop())
        for duty in (parts.gateway, parts.anchor):
            if duty is not None:
                await _stopped(duty.stop())
        parts.transport.stop()
        self._mtu_listener.stop()
        for responder in (*parts.responders.values(), *self._home_links.values()):
            responder.stop()
        if self._config.withdraw_on_stop:
            self._withdraw()
        parts.path.close()

    def _withdraw(self) -> None:
        path = self.parts.path
        for bridge in self._config.bridges if self._config.gateway else ():
            try:
                # Neighbours would go on sending to a first hop that does not know the way.
                path.leave_first_hop(bridge.name, self._former.of(bridge.name))
                self._former.forget(bridge.name)
            except (MobilityError, OSError, ValueError) as error:
                logger.error("bridge %s: not all of it is as it was: %s", bridge.name, error)
        crash_point("stop-first-hop-left")
        try:
            path.withdraw()
            logger.info("data path: withdrawn")
        except (MobilityError, OSError) as error:
            logger.error("data path: not all of it was withdrawn: %s", error)


async def _stopped(stop: Coroutine[None, None, None]) -> None:
    """What one part says of its end keeps no other from ending well."""
    try:
        await stop
    except Exception:
        logger.exception("while stopping")


@contextlib.contextmanager
def _lock(config: Config) -> Iterator[None]:
    """Serve alone."""
    descriptor = os.open(config.run / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"{config.run / _LOCK}: another agent runs here; stop it with `systemctl stop mobility-agent`"
            ) from None
        yield
    finally:
        os.close(descriptor)


async def serve(config: Config) -> None:
    """Run the agent until SIGTERM or SIGINT. Raises MobilityError."""
    daemon = Daemon(config, ServiceManager())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, daemon.stop)
    await daemon.run()
