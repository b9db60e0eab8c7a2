# SPDX-License-Identifier: GPL-3.0-or-later
"""Where each VM is, the same in every place that says so: memory, the journal, the routes, the links."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import IPv6Address

from mobility_agent.config import Config
from mobility_agent.crash_points import crash_point
from mobility_agent.datapath.path import DataPath
from mobility_agent.durable import Journal
from mobility_agent.errors import MobilityError
from mobility_agent.gateway.attachments import AWAY, HERE, Attachment, Attachments
from mobility_agent.gateway.doubts import Doubts
from mobility_agent.gateway.holds import UNTOLD_SECONDS, Holds
from mobility_agent.gateway.neighbourhood import Neighbourhood
from mobility_agent.homes import Home
from mobility_agent.messages.options import HandoffIndicator

logger = logging.getLogger(__name__)


class Whereabouts:
    """Of the VMs that are, or were, at this gateway. What anchors have to be told is not its matter."""

    def __init__(
        self,
        config: Config,
        path: DataPath,
        journal: Journal,
        attachments: Attachments,
        neighbourhood: Neighbourhood,
        holds: Holds,
        doubts: Doubts,
    ) -> None:
        self._config = config
        self._path = path
        self._journal = journal
        self._attachments = attachments
        self._neighbourhood = neighbourhood
        self._holds = holds
        self._doubts = doubts
        #: By VM: until when (monotonic seconds) its packets are led on to where it went.
        self._forwards: dict[str, float] = {}
        self._commits: set[asyncio.Task[None]] = set()

    def restore(self, *, booted: bool) -> None:
        """See :meth:`GatewayDuty.restore`."""
        for vm, record in self._journal.open().items():
            try:
                attachment = Attachment.from_record(vm, record)
            except (KeyError, ValueError) as error:
                logger.warning("VM %s: its record is damaged (%s) and was left out", vm, error)
                continue
            if booted and self._config.announce and attachment.state == HERE:
                logger.info("VM %s: was here before this host started; routing is told when it runs here", vm)
                attachment = replace(attachment, state=AWAY, to=None)
                self._journal.put(vm, attachment.as_record())
            self._attachments.put(attachment)
            self._lead(attachment)

    def close(self) -> None:
        """Routes and records stay."""
        self._journal.close()

    # --- routes ---

    def _lead(self, attachment: Attachment) -> None:
        """Want its routes as it says that it is. Raises KernelRefused."""
        if attachment.state == HERE:
            self._lead_here(attachment)
        elif attachment.to is None and not self._config.announce:
            self._path.set_lost(attachment.homes)
        elif attachment.to is None:
            # No anchor will say where it is; what routing says is the best there is.
            self._path.set_away(attachment.homes, None)
        else:
            self._path.set_away(attachment.homes, attachment.to)
            self._forwards[attachment.vm] = time.monotonic() + self._config.forward_seconds

    def _lead_here(self, attachment: Attachment) -> None:
        for (bridge, mac), homes in attachment.places().items():
            self._path.set_local(homes, bridge, mac)

    def _place(self, attachment: Attachment, before: Attachment | None) -> None:
        """Lead its packets to its bridge; what the kernel refuses is not wanted any more, either."""
        try:
            self._lead_here(attachment)
        except MobilityError:
            owners = self._owners(attachment.homes)
            if before is not None:
                owners[before.vm] = before
            with contextlib.suppress(MobilityError):
                self._path.clear(attachment.homes)
            for owner in owners.values():
                with contextlib.suppress(MobilityError):
                    self._lead(owner)
            raise

    def _owners(self, homes: Iterable[Home]) -> dict[str, Attachment]:
        return {owner.vm: owner for home in homes if (owner := self._attachments.owner(home)) is not None}

    def times(self) -> list[float]:
        """When :meth:`end_forwards` has something to do (monotonic seconds)."""
        return [*self._forwards.values()]

    def end_forwards(self, now: float) -> None:
        """Lead no packets on any more to where VMs went long enough ago: the anchors know."""
        for vm in [vm for vm, until in self._forwards.items() if until <= now]:
            del self._forwards[vm]
            attachment = self._attachments.get(vm)
            if attachment is not None and attachment.state == AWAY:
                self._path.set_away(attachment.homes, None)
                crash_point("forwarding-ended")

    # --- records ---

    def keep(self, attachment: Attachment) -> None:
        """Write it down, soon."""
        self._attachments.put(attachment)
        self._journal.put(attachment.vm, attachment.as_record())
        self.commit_soon()

    async def record(self, attachment: Attachment) -> None:
        """Write it down; durable when this returns."""
        self._journal.put(attachment.vm, attachment.as_record())
        await self.commit()

    async def commit(self) -> None:
        """Make what was written durable; a disk that refuses is told of by the journal."""
        with contextlib.suppress(OSError):
            await self._journal.commit()

    def commit_soon(self) -> None:
        """See that it happens. Who must know that it has awaits :meth:`commit`."""
        commit = asyncio.get_running_loop().create_task(self.commit())
        self._commits.add(commit)
        commit.add_done_callback(self._commits.discard)

    # --- VMs come and go ---

    def arrived(self, attachment: Attachment, before: Attachment | None) -> None:
        """It is here. Its routes stand and nobody else's touch them; not written down yet.

        ``before``: what was known of it. Raises KernelRefused; then nothing was changed.
        """
        self._place(attachment, before)
        crash_point("arrival-routed")
        if before is not None:
            self._path.clear(set(before.homes) - set(attachment.homes))
        self._forget_former_owners(attachment)
        self._forwards.pop(attachment.vm, None)
        self._holds.end(attachment.vm)
        self._doubts.settled(attachment.vm)
        self._attachments.put(attachment)

    def taken_up(self, here: Attachment, before: Attachment) -> None:
        """It runs here, and was believed elsewhere. Raises KernelRefused; then nothing was changed."""
        self._place(here, before)
        self._forwards.pop(here.vm, None)
        self._holds.end(here.vm)
        self.keep(here)
        self._neighbourhood.announce(here)

    def left(self, vm: str, to: IPv6Address | None, epoch: int) -> None:
        """It went: its packets follow it, and who is on the link sends them to us from now on.

        ``to`` None: where it went is not known.
        """
        attachment = self._attachments.get(vm)
        if attachment is None:
            return
        if to == self._config.tunnel_address:
            to = None
        gone = replace(
            self._gone(attachment, to), epoch=max(epoch, attachment.epoch), since_seconds=time.time()
        )
        self._lead(gone)
        crash_point("departure-led-on")
        if to is not None:
            self._holds.end(vm)
        elif self._config.announce:
            self._holds.end_within(vm, UNTOLD_SECONDS)
        self.keep(gone)
        self._neighbourhood.announce(gone)
        logger.info("VM %s: gone to %s", vm, to or "a place not known yet", extra={"VM": vm})

    def off(self, attachment: Attachment) -> Attachment:
        """It was here and runs nowhere, or so it seems; returns what is known of it then."""
        gone = self._gone(attachment, None)
        self.elsewhere(gone)
        return gone

    @staticmethod
    def _gone(attachment: Attachment, to: IPv6Address | None) -> Attachment:
        unchanged = HandoffIndicator.UNCHANGED
        return replace(attachment, state=AWAY, to=to, handoff=unchanged, evident=False, started=False)

    def elsewhere(self, gone: Attachment) -> None:
        """It is not here: lead its packets on, and write that down."""
        self._lead(gone)
        self.keep(gone)

    def forget(self, attachment: Attachment) -> None:
        """Nothing of it is known here any more."""
        self._drop(attachment, attachment.homes)
        self.commit_soon()

    def _drop(self, attachment: Attachment, homes: Iterable[Home]) -> None:
        self._holds.discard(attachment.vm)
        self._forwards.pop(attachment.vm, None)
        self._doubts.settled(attachment.vm)
        self._path.clear(homes)
        self._attachments.remove(attachment.vm)
        self._journal.remove(attachment.vm)

    def _forget_former_owners(self, arrived: Attachment) -> None:
        """An address that somebody had who has left: what is still due for that one must not touch it."""
        for former in self._owners(arrived.homes).values():
            if former.vm != arrived.vm:
                self._drop(former, set(former.homes) - set(arrived.homes))
                logger.info("VM %s: forgotten, VM %s has an address of its", former.vm, arrived.vm)
