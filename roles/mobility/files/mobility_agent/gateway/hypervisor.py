# SPDX-License-Identifier: GPL-3.0-or-later
"""What libvirt says of VMs that somebody moves, starts or stops by hand.

Our own hand-offs are told by the precache proxy before the VM runs; a paused arrival raises no event. Home
addresses travel in the VM's metadata, MAC and bridge are in its definition: nothing need be configured twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import xml.etree.ElementTree as ET
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, ClassVar

from mobility_agent.background import Background
from mobility_agent.errors import Unsupported
from mobility_agent.gateway.attachments import HERE, Attachment
from mobility_agent.gateway.definition import METADATA_URI, VmNetwork, read_definition
from mobility_agent.gateway.duty import GatewayDuty
from mobility_agent.messages.options import HandoffIndicator

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 5.0
_KEEPALIVE_SECONDS, _KEEPALIVE_COUNT = 5, 3


class Hypervisor:
    """A read-only connection to libvirt, kept up; ``tell(vm, event, detail)`` is called in the loop.

    ``connected`` gets the active VMs, and of each whether it runs.
    """

    _events_started: ClassVar[bool] = False

    def __init__(
        self,
        uri: str,
        tell: Callable[[str, int, int], None],
        connected: Callable[[dict[str, bool]], Awaitable[None]],
    ) -> None:
        try:
            import libvirt  # noqa: PLC0415 anchors have none
        except ImportError as error:
            raise Unsupported(
                'hypervisor: python3-libvirt is not installed; install it, or set hypervisor = "none"'
            ) from error
        self._libvirt: Any = libvirt
        self._uri = uri
        self._tell = tell
        self._connected = connected
        self._connection: Any = None
        self._background = Background()

    @property
    def library(self) -> Any:
        """The libvirt module."""
        return self._libvirt

    @property
    def up(self) -> bool:
        """Whether libvirt answers."""
        return self._connection is not None

    def failure(self) -> BaseException | None:
        """What ended the work of keeping it up, if anything did."""
        return self._background.failure()

    def start(self) -> None:
        """Connect, now or when libvirt is there."""
        if not Hypervisor._events_started:
            self._libvirt.registerErrorHandler(lambda *_unused: None, None)
            self._libvirt.virEventRegisterDefaultImpl()
            threading.Thread(target=self._run_events, name="libvirt-events", daemon=True).start()
            Hypervisor._events_started = True
        self._background.start(self._keep())

    async def stop(self) -> None:
        """Connect no more."""
        await self._background.stop()

    def _run_events(self) -> None:
        while True:
            self._libvirt.virEventRunDefaultImpl()

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            lost = asyncio.Event()
            try:
                active = await asyncio.to_thread(self._connect, loop, lost)
            except self._libvirt.libvirtError as error:
                logger.warning("libvirt at %s: no answer (%s); trying again", self._uri, error)
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            logger.info("libvirt at %s: connected, %d VMs are active", self._uri, len(active))
            await self._connected(active)
            await lost.wait()
            self._connection = None
            logger.warning("libvirt at %s: connection lost; connecting again", self._uri)

    def _connect(self, loop: asyncio.AbstractEventLoop, lost: asyncio.Event) -> dict[str, bool]:
        libvirt = self._libvirt
        connection = libvirt.openReadOnly(self._uri)

        def on_lifecycle(_unused: Any, domain: Any, event: int, detail: int, _opaque: Any) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._tell, domain.UUIDString(), event, detail)

        def on_metadata(_unused: Any, domain: Any, _kind: int, uri: str | None, _opaque: Any) -> None:
            if uri == METADATA_URI:
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(self._tell, domain.UUIDString(), Event.METADATA, 0)

        def on_device(_unused: Any, domain: Any, _alias: str, _opaque: Any) -> None:
            # What it is called says nothing: an operator may name a card as he likes.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._tell, domain.UUIDString(), Event.CARDS, 0)

        def on_close(*_unused: Any) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(lost.set)

        # The test driver has no transport to keep alive.
        with contextlib.suppress(libvirt.libvirtError):
            connection.setKeepAlive(_KEEPALIVE_SECONDS, _KEEPALIVE_COUNT)
        with contextlib.suppress(libvirt.libvirtError):
            connection.registerCloseCallback(on_close, None)
        connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, on_lifecycle, None)
        with contextlib.suppress(libvirt.libvirtError):
            connection.domainEventRegisterAny(
                None, libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE, on_metadata, None
            )
        for kind in (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED):
            with contextlib.suppress(libvirt.libvirtError):
                connection.domainEventRegisterAny(None, kind, on_device, None)
        active = connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
        self._connection = connection
        return {domain.UUIDString(): self._runs(domain) for domain in active}

    def _runs(self, domain: Any) -> bool:
        """Whether its vCPUs run: one that is arriving stands paused, and is not ours to claim yet."""
        libvirt = self._libvirt
        try:
            return domain.state()[0] in {libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED}
        except libvirt.libvirtError:
            return False

    async def read(self, vm: str) -> VmNetwork | None:
        """What the VM's definition says; None when there is no such VM, or nobody to ask."""
        connection = self._connection
        if connection is None:
            return None

        def look() -> VmNetwork | None:
            try:
                return read_definition(connection.lookupByUUIDString(vm).XMLDesc(0))
            except (self._libvirt.libvirtError, ET.ParseError) as error:
                logger.debug("VM %s: not read: %s", vm, error)
                return None

        return await asyncio.to_thread(look)


class Event:
    """virDomainEventType, and of the details those that matter here; METADATA and CARDS are our own."""

    STARTED, SUSPENDED, RESUMED, STOPPED = 2, 3, 4, 5
    METADATA, CARDS = 1000, 1001
    STARTED_MIGRATED, RESUMED_MIGRATED, STOPPED_MIGRATED = 1, 1, 3
    #: At the end of a migration from here, and not somebody's pause: libvirt tells the one from the other.
    SUSPENDED_MIGRATED, SUSPENDED_POSTCOPY = 1, 7


class Moves:
    """Turns libvirt's events into arrivals and departures of VMs that have home addresses."""

    def __init__(self, duty: GatewayDuty, uri: str, bridges: frozenset[str]) -> None:
        self._duty = duty
        self._bridges = bridges
        self.hypervisor = Hypervisor(uri, self._on_event, self._on_connected)
        self._queue: asyncio.Queue[tuple[str, int, int]] = asyncio.Queue()
        self._incoming: set[str] = set()
        self._background = Background()

    def start(self) -> None:
        """Listen."""
        self.hypervisor.start()
        self._background.start(self._run())

    def failure(self) -> BaseException | None:
        """What ended work that should go on, if anything did."""
        return self._background.failure() or self.hypervisor.failure()

    async def stop(self) -> None:
        """Listen no more."""
        await self.hypervisor.stop()
        await self._background.stop()

    def _on_event(self, vm: str, event: int, detail: int) -> None:
        # Not in their turn: behind what others wait for, each packet until then would be lost.
        if event == Event.SUSPENDED and detail in {Event.SUSPENDED_MIGRATED, Event.SUSPENDED_POSTCOPY}:
            self._duty.hold(vm)
        elif event == Event.RESUMED:
            self._duty.runs_again(vm)
        self._queue.put_nowait((vm, event, detail))

    async def _run(self) -> None:
        # One after the other: what happened first counts first.
        while True:
            vm, event, detail = await self._queue.get()
            try:
                await self._act(vm, event, detail)
            except Exception:
                logger.exception("VM %s: libvirt's event %d/%d was not followed", vm, event, detail)

    async def _act(self, vm: str, event: int, detail: int) -> None:
        known = self._duty.attachments.get(vm)
        here = known is not None and known.state == HERE
        match (event, detail):
            case (Event.RESUMED, _):
                # One that came surely is here, whatever epoch the anchors hold. One that we were told of
                # before it ran has its epoch; one paused and resumed by hand is here already, too.
                came = detail == Event.RESUMED_MIGRATED or vm in self._incoming
                self._incoming.discard(vm)
                if not here:
                    how = HandoffIndicator.BETWEEN_GATEWAYS if came else HandoffIndicator.NEW_INTERFACE
                    await self._arrive(vm, how, evident=came)
            case (Event.STARTED, Event.STARTED_MIGRATED):
                # Incoming, and not running yet.
                self._incoming.add(vm)
            case (Event.STARTED, _):
                await self._arrive(vm, HandoffIndicator.NEW_INTERFACE, evident=False)
            case (Event.STOPPED, Event.STOPPED_MIGRATED) if here:
                await self._duty.depart(vm, None)
            case (Event.STOPPED, _):
                self._incoming.discard(vm)
                self._duty.ended(vm)
                if here:
                    await self._duty.depart(vm, None, withdraw=True)
            case (Event.METADATA, _):
                await self._follow_metadata(vm)
            case (Event.CARDS, _) if known is not None and here:
                await self._follow_cards(known)
            case _:
                pass

    async def _follow_metadata(self, vm: str) -> None:
        """Somebody gave a VM home addresses, or took them from it."""
        known = self._duty.attachments.get(vm)
        told = await self._read(vm)
        # One that is off is claimed when it starts: until then its addresses are nobody's.
        if told is None or not told.active or vm in self._incoming:
            return
        if told.homes and (known is None or known.state == HERE):
            await self._arrive(vm, HandoffIndicator.NEW_INTERFACE, evident=False)
        elif known is not None and known.state == HERE and not told.homes:
            await self._duty.depart(vm, None, withdraw=True)

    async def _follow_cards(self, known: Attachment) -> None:
        """A card was plugged in, or out, while the VM runs: its addresses may be of another one now."""
        told = await self._read(known.vm)
        place = told.place(self._bridges) if told is not None and told.active else None
        if place is None:
            return
        others = {home: (bridge, mac) for home, bridge, mac in known.cards}
        if (place.bridge, place.mac, dict(place.cards)) != (known.bridge, known.mac, others):
            # Only led otherwise: what is being claimed is claimed as it was, and what is bound confirmed.
            await self._arrive(known.vm, known.handoff, evident=known.evident)

    async def _read(self, vm: str) -> VmNetwork | None:
        """What its definition says, of its addresses those that can follow it."""
        told = await self.hypervisor.read(vm)
        return None if told is None else replace(told, homes=self._duty.follows(vm, told.homes))

    async def _arrive(self, vm: str, handoff: HandoffIndicator, *, evident: bool) -> None:
        told = await self._read(vm)
        known = self._duty.attachments.get(vm)
        homes = told.homes if told is not None and told.homes else known.homes if known is not None else ()
        place = told.place(self._bridges) if told else None
        if not homes or place is None:
            logger.debug("VM %s: has no home address, or is on no bridge of ours", vm)
            return
        epoch = known.epoch if known is not None else 0
        for complaint in place.complaints(vm):
            logger.warning("%s", complaint)
        await self._duty.arrive(
            vm, homes, place.mac, place.bridge, epoch, handoff=handoff, evident=evident, cards=place.cards
        )

    async def _on_connected(self, active: dict[str, bool]) -> None:
        await self._duty.reconcile(set(active))
        for vm, runs in active.items():
            if runs:
                self._duty.runs_again(vm)
            known = self._duty.attachments.get(vm)
            if not runs or (known is not None and known.state == HERE):
                continue
            try:
                told = await self._read(vm)
                known = self._duty.attachments.get(vm)
                if known is not None and known.state == HERE:
                    continue  # its arrival was told of meanwhile
                if told is not None and told.active and told.homes:
                    # Found running, not seen coming: it claims, but does not make an epoch up.
                    await self._arrive(vm, HandoffIndicator.NEW_INTERFACE, evident=False)
            except Exception:
                # One that cannot be followed keeps no other from it, nor libvirt's events from being heard.
                logger.exception("VM %s: runs here, but was not followed", vm)
