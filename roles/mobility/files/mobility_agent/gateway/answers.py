# SPDX-License-Identifier: GPL-3.0-or-later
"""What anchors say of a gateway's VMs, and what becomes of them by it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from ipaddress import IPv6Address

from mobility_agent.config import Config, Peer
from mobility_agent.crash_points import crash_point
from mobility_agent.errors import MobilityError
from mobility_agent.gateway.attachments import AWAY, HERE, Attachment, Attachments
from mobility_agent.gateway.doubts import Doubts
from mobility_agent.gateway.registrar import Outcome, Registrar
from mobility_agent.gateway.whereabouts import Whereabouts
from mobility_agent.homes import within
from mobility_agent.messages.headers import BindingAcknowledgement, Message, Revocation
from mobility_agent.messages.options import HandoffIndicator
from mobility_agent.messages.registration import (
    Loss,
    acknowledge_loss,
    read_acknowledgement,
    read_loss,
)

logger = logging.getLogger(__name__)


class Answers:
    """Acknowledgements and revocations; ``wake`` is set when one gives the gateway something to do."""

    def __init__(
        self,
        config: Config,
        anchors: Collection[str],
        attachments: Attachments,
        whereabouts: Whereabouts,
        registrar: Registrar,
        doubts: Doubts,
        send: Callable[[Peer, Message], None],
        wake: asyncio.Event,
    ) -> None:
        self._config = config
        self._anchors = anchors
        self._attachments = attachments
        self._whereabouts = whereabouts
        self._registrar = registrar
        self._doubts = doubts
        self._send = send
        self._wake = wake
        #: By VM: whoever waits for an anchor's answer for it.
        self._answered: dict[str, list[asyncio.Event]] = {}

    def take_acknowledgement(self, peer: Peer, message: BindingAcknowledgement) -> None:
        """Act on an authenticated one."""
        answer = read_acknowledgement(message)
        if answer is not None:
            outcome = self._registrar.acknowledge(peer.name, answer, time.monotonic())
            self._follow(outcome)
            for waiting in self._answered.get(answer.vm, ()):
                waiting.set()
            self._wake.set()

    async def acknowledged(self, vm: str, until: float) -> None:
        """Return when every anchor has acknowledged ``vm``, or it is ``until`` (monotonic)."""
        answered = asyncio.Event()
        self._answered.setdefault(vm, []).append(answered)
        try:
            while (left := until - time.monotonic()) > 0:
                if self._everywhere(vm) or self._attachments.get(vm) is None:
                    return
                answered.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await answered.wait()
        finally:
            self._answered[vm].remove(answered)
            if not self._answered[vm]:
                del self._answered[vm]

    def _everywhere(self, vm: str) -> bool:
        return len(self._registrar.acknowledged(vm)) == len(self._anchors)

    def _follow(self, outcome: Outcome) -> None:
        attachment = self._attachments.get(outcome.vm)
        if outcome.kind == "lost":
            self._doubts.refused(outcome.vm, attachment, time.monotonic())
        match outcome.kind:
            case "registered" if attachment is not None and self._doubts.contested(outcome.vm):
                self._take_up(attachment, outcome.anchor)
            case "registered" if (
                attachment is not None and attachment.handoff is not HandoffIndicator.UNCHANGED
            ):
                logger.info("%s", outcome.sentence)
                crash_point("arrival-acknowledged")
                # An anchor that has not answered may have it nowhere: that it began here outlives a restart.
                starting = self._registrar.starting(outcome.vm)
                self._whereabouts.keep(
                    replace(attachment, handoff=HandoffIndicator.UNCHANGED, evident=False, started=starting)
                )
            case "registered" if (
                attachment is not None and attachment.started and not self._registrar.starting(outcome.vm)
            ):
                self._whereabouts.keep(replace(attachment, started=False))
            case "raised" if attachment is not None and outcome.epoch is not None:
                logger.info("%s", outcome.sentence)
                crash_point("arrival-raised")
                self._whereabouts.keep(
                    replace(attachment, epoch=outcome.epoch, handoff=HandoffIndicator.BETWEEN_GATEWAYS)
                )
            case "adopted" if attachment is not None and outcome.epoch is not None:
                logger.info("%s", outcome.sentence)
                crash_point("arrival-adopted")
                # One that an anchor has here already is confirmed only, also after a restart.
                handoff = attachment.handoff if outcome.holder is None else HandoffIndicator.UNCHANGED
                self._whereabouts.keep(replace(attachment, epoch=outcome.epoch, handoff=handoff))
            case "nowhere" if attachment is not None and attachment.state == AWAY:
                # Where it only is off for now its place stays known, as long as an anchor knows of it.
                if attachment.to is None or outcome.epoch is None:
                    crash_point("withdrawal-confirmed")
                    self._whereabouts.forget(attachment)
                    logger.info("VM %s: forgotten, no anchor has it anywhere", attachment.vm)
            case "lost" if attachment is None or (attachment.state, attachment.to) != (AWAY, outcome.holder):
                logger.warning("%s", outcome.sentence)
                self._left(outcome.vm, outcome.holder, outcome.epoch or 0)
            case "corrected" | "refused":
                logger.warning("%s", outcome.sentence)
            case _:
                logger.debug("%s", outcome.sentence)

    def _take_up(self, attachment: Attachment, anchor: str) -> None:
        """It runs here, was bound elsewhere, and is not any more."""
        if self._everywhere(attachment.vm):
            self._doubts.settled(attachment.vm)
        if attachment.state == HERE:
            return
        here = replace(attachment, state=HERE, to=None, since_seconds=time.time())
        try:
            self._whereabouts.taken_up(here, attachment)
        except MobilityError as error:
            self._registrar.forget(attachment.vm)
            logger.error("VM %s: runs here, and is not led here: %s; tried again", attachment.vm, error)
            return
        logger.info("VM %s: runs here, and %s has it nowhere else any more: taken up", here.vm, anchor)

    def take_loss(self, peer: Peer, message: Revocation) -> None:
        """Act on an authenticated one."""
        loss = read_loss(message)
        if loss is None:
            logger.warning("anchor %s: a revocation that does not say of what; ignored", peer.name)
            return
        # Confirmed in any case: what is old news here need not be told again.
        self._send(peer, acknowledge_loss(message))
        crash_point("departure-revoked")
        attachment = self._attachments.get(loss.vm)
        if attachment is None:
            self._take_word(loss)
        elif attachment.state == AWAY:
            newer = loss.epoch >= attachment.epoch and loss.holder not in {None, attachment.to}
            if newer:
                self._left(loss.vm, loss.holder, loss.epoch)
        elif self._registrar.lost(peer.name, loss.vm, loss.epoch, loss.ticks):
            logger.warning(
                "VM %s: %s has it at %s in epoch %d: withdrawn here",
                loss.vm,
                peer.name,
                loss.holder or "no gateway",
                loss.epoch,
            )
            self._left(loss.vm, loss.holder, loss.epoch)

    def _take_word(self, loss: Loss) -> None:
        """It was forgotten here as it ran nowhere, and runs elsewhere now: its packets still come here."""
        networks, own = self._config.networks, self._config.tunnel_address
        homes = tuple(home for home in loss.homes if any(within(home, network) for network in networks))
        taken = any(self._attachments.owner(home) is not None for home in homes)
        if homes and not taken and loss.holder is not None and loss.holder != own:
            gone = Attachment(loss.vm, homes, "", "", loss.epoch, time.time(), state=AWAY, to=loss.holder)
            self._whereabouts.elsewhere(gone)
            self._wake.set()
            logger.info("VM %s: was here, and is at %s now", loss.vm, loss.holder, extra={"VM": loss.vm})

    def _left(self, vm: str, to: IPv6Address | None, epoch: int) -> None:
        self._whereabouts.left(vm, to, epoch)
        self._wake.set()
