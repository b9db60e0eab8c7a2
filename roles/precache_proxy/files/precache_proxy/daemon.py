# SPDX-License-Identifier: GPL-3.0-or-later
"""The running proxy: puts the parts together, starts them bottom up, stops them top down."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

from precache_proxy import __version__
from precache_proxy import config as configuration
from precache_proxy.channel.channel import Channel
from precache_proxy.channel.settings import ChannelConfig, PeerAddress, RateWindow
from precache_proxy.config import Config, PeerConfig
from precache_proxy.control import journal, link_measurement
from precache_proxy.control.answers import vms_answer
from precache_proxy.control.api import ControlServer
from precache_proxy.control.checks import CLOCK_METHOD
from precache_proxy.control.coordinator_lease import CoordinatorLease
from precache_proxy.control.parts import Parts
from precache_proxy.control.service_manager import ServiceManager
from precache_proxy.errors import Conflict, LifeboatError
from precache_proxy.evacuation.arrival_network import ArrivalNetwork, MobilityAgent, NothingToDo
from precache_proxy.evacuation.rooms import SourceRoom
from precache_proxy.evacuation.service import Evacuation
from precache_proxy.hypervisor.connection import Hypervisor
from precache_proxy.hypervisor.turns import TURNS
from precache_proxy.source.service import Source
from precache_proxy.source.settings import SourceSettings
from precache_proxy.store.media import MediaIndex
from precache_proxy.store.service import Store
from precache_proxy.store.settings import StoreSettings

logger = logging.getLogger(__name__)

_STATUS_SECONDS = 15.0
_STOP_SECONDS = 30.0


class ProxyLock:
    """The flock that says: this host's proxy is running. It goes with the process, however that ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def take(self) -> None:
        """Take it. Raises Conflict when another proxy holds it."""
        try:
            self._path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise Conflict(
                f"{self._path}: held by a running precache proxy; see systemctl status precache-proxy"
            ) from None
        except OSError as error:
            raise Conflict(f"{self._path}: cannot be taken ({error.strerror}); run as root") from error

    def release(self) -> None:
        """Give it back; the file stays, so that nobody locks a name that is being removed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def channel_config(config: Config) -> ChannelConfig:
    """What the channel needs of the configuration."""
    return ChannelConfig(
        name=config.name,
        ca_path=config.tls.ca,
        certificate_path=config.tls.certificate,
        key_path=config.tls.key,
        peers={peer.name: peer_address(peer) for peer in config.peers},
        listen_address=config.listen.address,
        listen_port=config.listen.port,
    )


def peer_address(peer: PeerConfig) -> PeerAddress:
    """Where a peer is and how it may be sent to."""
    return PeerAddress(
        host=peer.address,
        port=peer.port,
        connections=peer.connections,
        rate_bytes_per_second=peer.rate_bytes_per_second,
        windows=tuple(
            RateWindow(
                window.start.strftime("%H:%M"),
                window.end.strftime("%H:%M"),
                window.rate_bytes_per_second,
                tuple(sorted(window.days)),
            )
            for window in peer.windows
        ),
    )


def source_settings(config: Config) -> SourceSettings:
    """What the source needs of the configuration."""
    return SourceSettings(
        name=config.name,
        peers=tuple(peer.name for peer in config.peers),
        rpo_seconds=config.source.rpo_seconds,
        scratch_directory=config.source.scratch_directory,
        scratch_limit_bytes=config.source.scratch_limit_bytes,
        pass_limit_seconds=config.source.pass_limit_seconds,
        slice_bytes=config.source.slice_bytes,
        qemu_user=config.hypervisor.qemu_user,
    )


def arrival_network(config: Config) -> ArrivalNetwork:
    """Who makes addresses follow their VMs."""
    mobility = config.mobility
    return NothingToDo() if mobility.socket is None else MobilityAgent(mobility.socket, mobility.wait_seconds)


async def build(config: Config) -> Parts:
    """All parts, connected to each other and none started."""
    hypervisor = Hypervisor(config.hypervisor.uri, config.paths.run / TURNS)
    channel = Channel(channel_config(config))
    # What one side learnt of this host's files serves the other: what comes back finds its medium.
    media_index = MediaIndex(config.paths.state / "media-index")
    store = Store(
        config.store.directory,
        config.paths.run,
        StoreSettings(config.store.keep_generations, config.store.minimum_free_bytes),
        media_index=media_index,
    )
    source = Source(
        config.paths.state / "source",
        config.paths.run,
        hypervisor,
        channel,
        source_settings(config),
        media_index=media_index,
    )
    evacuation = Evacuation(
        config.paths.state,
        config.paths.run,
        hypervisor,
        channel,
        # An evacuation hands keywords through to adopt_for_return; no protocol can say that.
        cast(SourceRoom, source),
        store,
        config.evacuation,
        network=arrival_network(config),
        qemu_user=config.hypervisor.qemu_user,
    )
    lease = CoordinatorLease(record=config.paths.state / "coordinator.json")
    return Parts(config, hypervisor, channel, store, source, evacuation, lease=lease)


async def _clock(_peer: str, _parameters: dict[str, Any]) -> dict[str, Any]:
    """Our time, for the peer's check of the clocks."""
    return {"time_seconds": time.time()}


class Daemon:
    """Starts, serves until told to end, stops."""

    def __init__(self, config: Config, path: Path, manager: ServiceManager) -> None:
        self._config = config
        self._path = path
        self._manager = manager
        self._end = asyncio.Event()

    async def run(self) -> None:
        """Serve. Raises LifeboatError when it cannot start; what was started is stopped again."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end.set)
        parts = await build(self._config)
        control = ControlServer(parts)
        async with contextlib.AsyncExitStack() as stack:
            # The watchdog is fed from the beginning: recovery of many replicas takes its time, too.
            stack.push_async_callback(_cancel, asyncio.create_task(self._manager.keep_alive()))
            await self._start(parts, control, stack)
            parts.state = "running"
            loop.add_signal_handler(signal.SIGHUP, lambda: self._reload(parts))
            self._manager.ready(summary(parts))
            logger.info("precache proxy %s of %s serves", __version__, self._config.name)
            stack.push_async_callback(_cancel, asyncio.create_task(self._tell_status(parts)))
            await self._end.wait()
            parts.state = "stopping"
            logger.info("precache proxy of %s ends", self._config.name)
            self._manager.stopping("stopping")

    async def _start(self, parts: Parts, control: ControlServer, stack: contextlib.AsyncExitStack) -> None:
        """Bottom up; the stack stops in the opposite order, also when a start fails half way."""
        parts.store.register(parts.channel)
        parts.evacuation.register(parts.channel)
        link_measurement.register(parts.channel)
        parts.channel.handle_call(CLOCK_METHOD, _clock)
        steps: tuple[tuple[str, Callable[[], Awaitable[None]], Callable[[], Awaitable[None]]], ...] = (
            ("libvirt", parts.hypervisor.start, parts.hypervisor.stop),
            # Recovery is over before a peer may offer the next generation.
            ("store", parts.store.start, parts.store.stop),
            ("channel", parts.channel.start, parts.channel.stop),
            ("moves under way", parts.evacuation.hold_from_start, _nothing),
            ("source", parts.source.start, parts.source.stop),
            ("evacuation", parts.evacuation.start, parts.evacuation.stop),
            ("control", control.start, control.stop),
        )
        for name, start, stop in steps:
            self._manager.notify(STATUS=f"starting: {name}")
            stack.push_async_callback(_stop_part, name, stop)
            await start()

    def _reload(self, parts: Parts) -> None:
        """SIGHUP: new certificates, rates and connections; what else changed is named."""
        self._manager.reloading()
        try:
            fresh = configuration.load(self._path)
            parts.channel.reload_certificates()
            apply_reload(parts, fresh)
        except LifeboatError as error:
            logger.error("reload: %s; all goes on as before", error.message)
        else:
            logger.info("certificates and rates taken from %s", self._path)
        self._manager.ready(summary(parts))

    async def _tell_status(self, parts: Parts) -> None:
        while True:
            await asyncio.sleep(_STATUS_SECONDS)
            self._manager.notify(STATUS=summary(parts))


def apply_reload(parts: Parts, fresh: Config) -> None:
    """Take over what can change while we run; log what cannot."""
    peers = []
    for peer in parts.config.peers:
        wanted, link = fresh.peer(peer.name), parts.channel.links.get(peer.name)
        if wanted is None or link is None or (wanted.address, wanted.port) != (peer.address, peer.port):
            peers.append(peer)
            continue
        link.address = peer_address(wanted)
        link.follow_configuration()
        link.set_connections(wanted.connections)
        peers.append(wanted)
    parts.config = dataclasses.replace(parts.config, peers=tuple(peers))
    left = [
        field.name
        for field in dataclasses.fields(Config)
        if getattr(parts.config, field.name) != getattr(fresh, field.name)
    ]
    if left:
        logger.warning("reload: %s changed too; that takes a restart of the precache proxy", ", ".join(left))


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _nothing() -> None:
    """There is nothing to stop."""


async def _stop_part(name: str, stop: Callable[[], Awaitable[None]]) -> None:
    """Stop one part; one that hangs or fails must not keep the others from stopping well."""
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await stop()
    except TimeoutError:
        logger.warning("%s: did not stop within %s s", name, _STOP_SECONDS)
    except Exception:
        logger.exception("%s: failed to stop", name)


def summary(parts: Parts) -> str:
    """One line for systemctl status."""
    vms = vms_answer(parts)
    late = sum(1 for vm in vms if vm["rpo_kept"] is False)
    links = ", ".join(f"{name} {link.state}" for name, link in sorted(parts.channel.links.items()))
    jobs = sum(1 for job in parts.evacuation.jobs() if not job.ended)
    return (
        f"{len(vms)} VM(s) protected, {late} over their RPO; {jobs} evacuation(s) under way; "
        f"links: {links or 'none'}"
    )


def run(config: Config, path: Path, log_level: str) -> int:
    """Serve until SIGTERM. Raises LifeboatError when it cannot start."""
    journal.set_up(log_level)
    manager = ServiceManager()
    lock = ProxyLock(config.paths.lock)
    lock.take()
    try:
        asyncio.run(Daemon(config, path, manager).run())
    except LifeboatError as error:
        manager.stopping(error.message)
        raise
    finally:
        lock.release()
    return 0
