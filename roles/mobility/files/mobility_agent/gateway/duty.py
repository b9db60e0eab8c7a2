# SPDX-License-Identifier: GPL-3.0-or-later
"""The gateway at work: VMs come and go, anchors are told, packets follow."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from ipaddress import IPv6Address
from typing import Any

from mobility_agent.background import Background, again_and_again
from mobility_agent.config import Config, Peer
from mobility_agent.crash_points import crash_point
from mobility_agent.datapath.discovery import Responder
from mobility_agent.datapath.path import DataPath
from mobility_agent.durable import Journal
from mobility_agent.errors import MobilityError, NotFound
from mobility_agent.gateway.anchors import AnchorWatch
from mobility_agent.gateway.answers import Answers
from mobility_agent.gateway.arrivals import INSTEAD_OF_IPV4, IS_IPV4, Arrivals
from mobility_agent.gateway.attachments import AWAY, HERE, Attachment, Attachments
from mobility_agent.gateway.doubts import Doubts
from mobility_agent.gateway.holds import Device, Holds
from mobility_agent.gateway.neighbourhood import Neighbourhood
from mobility_agent.gateway.registrar import Registrar
from mobility_agent.gateway.whereabouts import Whereabouts
from mobility_agent.homes import Home, only_ipv6
from mobility_agent.messages.headers import BindingAcknowledgement, Heartbeat, Message, Revocation
from mobility_agent.messages.options import HandoffIndicator

logger = logging.getLogger(__name__)

# How often it is asked whether VMs that left here still are where they went.
_INQUIRY_SECONDS = 86400.0


class GatewayDuty:
    """One gateway. ``send`` hands a message to a peer; ``responders``: neighbour discovery by bridge.

    ``kept_off``: bridges that this gateway must not be the first hop of, as it is now. ``hold_device``: in
    which packets wait for VMs that are being moved; None: they do not.
    """

    def __init__(
        self,
        config: Config,
        path: DataPath,
        journal: Journal,
        send: Callable[[Peer, Message], None],
        responders: dict[str, Responder],
        kept_off: Collection[str] = (),
        hold_device: Device | None = None,
    ) -> None:
        self._config = config
        self._send = send
        self._anchors = {peer.name: peer for peer in config.anchors}
        self.registrar = Registrar(self._anchors, config.tunnel_address, config.lifetime_seconds)
        self._link_locals = {bridge.name: bridge.link_local for bridge in config.bridges}
        self.attachments = Attachments()
        self.neighbourhood = Neighbourhood(config.prefixes, self.attachments, responders)
        self.arrivals = Arrivals(config, path, self.attachments, self._link_locals, kept_off)
        self.holds = Holds(path, hold_device, only_ipv6(config.networks))
        self._doubts = Doubts()
        self._whereabouts = Whereabouts(
            config, path, journal, self.attachments, self.neighbourhood, self.holds, self._doubts
        )
        self._inquire_at = 0.0
        self._wake = asyncio.Event()
        self._background = Background()
        self._watch = AnchorWatch(
            self._anchors, config.heartbeat_seconds, path, self.registrar, send, self._wake
        )
        self._answers = Answers(
            config,
            self._anchors,
            self.attachments,
            self._whereabouts,
            self.registrar,
            self._doubts,
            send,
            self._wake,
        )

    # --- start and stop ---

    def restore(self, *, booted: bool = False) -> None:
        """Read what was kept, and want its routes. Call before the data path starts.

        ``booted``: this host has started since then, so that no VM runs that nobody has told of since. Where
        anchors order claims they say what became of it; where routing is told, it must not be told of a VM
        that runs elsewhere by now.
        """
        self._whereabouts.restore(booted=booted)
        self._watch.begin()
        logger.info("gateway: %d VMs known", len(self.attachments))

    def start(self) -> None:
        """Register everything that is here, and serve."""
        self.holds.start()
        now = time.monotonic()
        for attachment in self.attachments.all():
            if attachment.state == HERE:
                self._claim(attachment, now)
        self._inquire_at = now
        self._whereabouts.commit_soon()
        self._background.start(again_and_again("gateway", self._round, self._wake, 0.001))

    def failure(self) -> BaseException | None:
        """What ended work that should go on, if anything did."""
        return self._background.failure()

    async def stop(self) -> None:
        """Serve no more; routes and records stay."""
        self.holds.stop()
        try:
            await self._background.stop()
        finally:
            self._whereabouts.close()

    def _claim(self, attachment: Attachment, now: float) -> None:
        self.registrar.attach(
            attachment.vm,
            only_ipv6(attachment.homes),
            attachment.epoch,
            attachment.handoff,
            now,
            link_local=self._link_locals.get(attachment.bridge),
            evident=attachment.evident,
            started=attachment.started,
        )

    def _round(self) -> float:
        """Heartbeats, registrations that are due, forwarding that ends; for how long nothing is due then."""
        now = time.monotonic()
        self._watch.beat(now)
        if now >= self._inquire_at:
            self._inquire_at = now + _INQUIRY_SECONDS
            for known in self.attachments.all():
                if known.state == AWAY:
                    self._inquire(known, now)
        self._ask_again(now)
        self._send_due()
        self._whereabouts.end_forwards(now)
        times = [
            *self._watch.times(),
            *self._whereabouts.times(),
            *self._doubts.times(),
            self._inquire_at,
        ]
        due = self.registrar.next_due()
        times += [] if due is None else [due]
        return min(times) - time.monotonic()

    def _inquire(self, attachment: Attachment, now: float) -> None:
        """It is not here: who has it, if anybody?"""
        homes = only_ipv6(attachment.homes)
        if homes and self._anchors:
            self.registrar.release(attachment.vm, homes, attachment.epoch, now)

    def _ask_again(self, now: float) -> None:
        """Of VMs that left nobody knows where to, and of those that run here and are bound elsewhere."""
        for vm in self._doubts.untold_due(now):
            attachment = self.attachments.get(vm)
            if attachment is not None and (attachment.state, attachment.to) == (AWAY, None):
                self._inquire(attachment, now)
        for vm in self._doubts.contested_due(now):
            attachment = self.attachments.get(vm)
            if attachment is not None and attachment.state == AWAY:
                self._claim(replace(attachment, handoff=HandoffIndicator.UNCHANGED, evident=False), now)

    def nudge(self) -> None:
        """Something is due: send it now."""
        self._wake.set()

    def give_way(self) -> None:
        """A VM is about to arrive: what only confirms waits a moment."""
        self.registrar.give_way(time.monotonic())

    def _send_due(self) -> None:
        for outgoing in self.registrar.due(time.monotonic(), time.time()):
            message = outgoing.registration.update(outgoing.sequence)
            try:
                self._send(self._anchors[outgoing.anchor], message)
            except ValueError as error:
                # One with too many addresses for a message must not keep the others from being sent.
                logger.error("VM %s: %s", outgoing.registration.vm, error)

    # --- messages ---

    def take(self, peer: Peer, message: Message) -> bool:
        """Act on an authenticated message; False when it is none for a gateway."""
        if peer.name not in self._anchors:
            return False
        match message:
            case BindingAcknowledgement():
                self._answers.take_acknowledgement(peer, message)
            case Heartbeat() if message.response:
                self._watch.take(peer, message)
            case Revocation():
                self._answers.take_loss(peer, message)
            case _:
                return False
        return True

    # --- VMs come and go ---

    def follows(self, vm: str, homes: tuple[Home, ...]) -> tuple[Home, ...]:
        """Of what a VM's definition says, the addresses that can follow it here."""
        if self._config.announce:
            return homes
        found = only_ipv6(homes)
        if len(found) < len(homes):
            left = ", ".join(str(home) for home in homes if home not in found)
            logger.warning("VM %s: %s %s, and is left out; %s", vm, left, IS_IPV4, INSTEAD_OF_IPV4)
        return found

    async def arrive(
        self,
        vm: str,
        homes: tuple[Home, ...],
        mac: str,
        bridge: str,
        epoch: int,
        *,
        handoff: HandoffIndicator = HandoffIndicator.BETWEEN_GATEWAYS,
        evident: bool = False,
        wait_seconds: float = 0.0,
        cards: Mapping[Home, tuple[str, str]] | None = None,
    ) -> dict[str, Any]:
        """The VM is about to run here. Returns when its routes stand and its registrations are sent.

        ``evident``: whoever says so knows that it runs nowhere else: an epoch that proves too old is raised.
        ``wait_seconds``: how long to wait for all anchors to acknowledge. ``cards``: bridge and MAC of those
        addresses that are another card's than the one with ``mac``. Raises InvalidInput, Conflict,
        KernelRefused; then nothing was changed.
        """
        began = time.monotonic()
        others = tuple((home, *cards[home]) for home in homes if cards and home in cards)
        bridges = [bridge, *(other for _home, other, _mac in others)]
        self.arrivals.judge(vm, homes, bridges, epoch, evident=evident)
        before = self.attachments.get(vm)
        if evident and before is not None:
            # Asked for at once what the anchors would make us ask for a round trip later.
            epoch = max(epoch, before.epoch + (before.state == AWAY))
        now = time.time()
        goes_on = before is not None and before.state == HERE and before.started
        started = handoff is HandoffIndicator.NEW_INTERFACE or goes_on
        attachment = Attachment(
            vm,
            homes,
            mac,
            bridge,
            epoch,
            now,
            handoff=handoff,
            evident=evident,
            started=started,
            cards=others,
        )
        self._whereabouts.arrived(attachment, before)
        self._claim(attachment, began)
        self._send_due()
        self.neighbourhood.announce(attachment)
        self._wake.set()
        crash_point("arrival-claimed")
        await self._whereabouts.record(attachment)
        crash_point("arrival-recorded")
        await self._answers.acknowledged(vm, began + wait_seconds)
        logger.info("VM %s: here on %s, epoch %d", vm, bridge, epoch, extra={"VM": vm})
        return self.describe(self.attachments.get(vm) or attachment)

    def hold(self, vm: str) -> bool:
        """The VM stands still here, to run elsewhere in a moment: what comes for it waits, if it can."""
        attachment = self.attachments.get(vm)
        # By routing alone IPv4 follows: there is no tunnel that what waited could be sent on by.
        return (
            attachment is not None
            and attachment.state == HERE
            and self.holds.begin(vm, only_ipv6(attachment.homes))
        )

    def hold_longer(self, vm: str) -> bool:
        """It still stands still here, in the middle of its move. Whether what comes for it waits on."""
        attachment = self.attachments.get(vm)
        return attachment is not None and attachment.state == HERE and self.holds.extend(vm)

    def runs_again(self, vm: str) -> None:
        """The VM goes on here: what has waited is its own."""
        self.holds.end(vm)

    async def depart(self, vm: str, to: IPv6Address | None, *, withdraw: bool = False) -> dict[str, Any]:
        """The VM runs here no more: it went to ``to`` (None: not known yet), or, ``withdraw``, nowhere.

        Raises NotFound.
        """
        attachment = self.attachments.get(vm)
        if attachment is None:
            raise NotFound(f"VM {vm}: not known to this gateway; see `mobility-agent status`")
        self._doubts.settled(vm)
        if withdraw:
            self._withdraw(attachment)
        elif attachment.state == HERE or to is not None:
            self.registrar.forget(vm)
            self._whereabouts.left(vm, to, attachment.epoch)
            if to is None:
                self._doubts.left(vm, time.monotonic())
        self._wake.set()
        await self._whereabouts.commit()
        crash_point("departure-recorded")
        known = self.attachments.get(vm)
        return {"vm": vm, "state": "withdrawn"} if withdraw or known is None else self.describe(known)

    def _withdraw(self, attachment: Attachment) -> None:
        """It runs nowhere, or so it seems: the anchors know whether it came to run elsewhere meanwhile.

        Until they have said so it is gone to a place not known yet: what comes for it must not leave by the
        home router, and neighbours at home must not find nobody.
        """
        if attachment.state == HERE and self._anchors and only_ipv6(attachment.homes):
            gone = self._whereabouts.off(attachment)
            self._inquire(gone, time.monotonic())
            self._send_due()
            crash_point("withdrawal-asked")
        else:
            self.registrar.forget(attachment.vm)
            self._whereabouts.forget(attachment)
        logger.info("VM %s: withdrawn", attachment.vm, extra={"VM": attachment.vm})

    def ended(self, vm: str) -> None:
        """It does not run here, whatever was believed of one that anchors have elsewhere."""
        self._doubts.settled(vm)

    async def reconcile(self, running: set[str]) -> None:
        """What the hypervisor says is running is right: withdraw what is not."""
        self._doubts.running(running)
        for attachment in list(self.attachments.all()):
            if attachment.state == HERE and attachment.vm not in running:
                logger.info("VM %s: does not run here any more", attachment.vm)
                try:
                    await self.depart(attachment.vm, None, withdraw=True)
                except MobilityError as error:
                    logger.error("VM %s: %s; tried again", attachment.vm, error)

    # --- what is asked about ---

    @property
    def bridges(self) -> Collection[str]:
        """Of which this gateway shall be the first hop."""
        return self._link_locals.keys()

    def describe(self, attachment: Attachment) -> dict[str, Any]:
        """A VM for the control interface."""
        return {
            "vm": attachment.vm,
            "addresses": [str(home) for home in attachment.homes],
            "mac": attachment.mac,
            "bridge": attachment.bridge,
            "cards": [
                {"address": str(home), "bridge": bridge, "mac": mac} for home, bridge, mac in attachment.cards
            ],
            "epoch": attachment.epoch,
            "state": attachment.state,
            "to": None if attachment.to is None else str(attachment.to),
            "since_seconds": attachment.since_seconds,
            "acknowledged": self.registrar.acknowledged(attachment.vm),
            "anchors": self.registrar.status(attachment.vm),
        }

    def status(self) -> dict[str, Any]:
        """A summary for the control interface."""
        return {
            "vms_here": self.attachments.here,
            "vms_away": len(self.attachments) - self.attachments.here,
            "registrations_pending": self.registrar.pending(),
            "holds": self.holds.status(),
            "anchor_in_use": self._watch.in_use,
            "anchors": self._watch.status(),
        }
