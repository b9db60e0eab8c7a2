# SPDX-License-Identifier: GPL-3.0-or-later
"""The anchor at work: takes registrations, keeps routes and records in step with them, tells who lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from ipaddress import IPv6Address, IPv6Network
from typing import Any

from mobility_agent.anchor.attraction import Attractor
from mobility_agent.anchor.bindings import Binding, BindingTable, KnownGateway, Rules, Verdict
from mobility_agent.background import Background, again_and_again
from mobility_agent.config import Config, Peer
from mobility_agent.crash_points import crash_point
from mobility_agent.datapath.discovery import Responder
from mobility_agent.datapath.path import DataPath
from mobility_agent.durable import Journal
from mobility_agent.errors import MobilityError
from mobility_agent.messages.headers import (
    BindingAcknowledgement,
    BindingUpdate,
    Heartbeat,
    Message,
    RevocationAcknowledgement,
    Status,
)
from mobility_agent.messages.registration import (
    Acknowledgement,
    Incomplete,
    Loss,
    Registration,
    read_registration,
    refusal,
)
from mobility_agent.signalling import heartbeat

logger = logging.getLogger(__name__)

_TELLINGS = 6
_FIRST_TELLING_SECONDS = 0.25
_ROUTINE = frozenset({"refreshed", "not-held"})
# The answer to these says who has the VM.
_ENLIGHTENING = frozenset({"stale-epoch", "same-epoch", "not-bound", "not-held"})


@dataclass(slots=True)
class _Telling:
    """A loss that a gateway has not confirmed yet."""

    gateway: IPv6Address
    loss: Loss
    sequence: int
    due_at: float
    told: int = 0


@dataclass(slots=True, eq=False)
class _Owed:
    """A VM that is bound, but not on disk yet: ``before`` is what held until then.

    ``failed``: nor will it be, or its routes are not in the kernel, unless all of it is done again.
    """

    before: Binding | None
    failed: bool = False


class AnchorDuty:
    """One anchor. ``send`` hands a message to a peer."""

    def __init__(
        self,
        config: Config,
        path: DataPath,
        journal: Journal,
        restarts: int,
        send: Callable[[Peer, Message], None],
        home_links: dict[str, Responder],
    ) -> None:
        self._config = config
        self._path = path
        self._journal = journal
        self._restarts = restarts
        self._send = send
        self._home_links = home_links
        gateways = {
            peer.address: KnownGateway(peer.name, peer.tunnel_address)
            for peer in config.partners
            if peer.gateway
        }
        addresses = {peer.name: peer.address for peer in config.partners}
        self._home_gateways = [
            (prefix.network, frozenset(addresses[name] for name in prefix.link_gateways))
            for prefix in config.prefixes
        ]
        self._rules = Rules(
            prefixes=[prefix.network for prefix in config.prefixes],
            gateways=gateways,
            home_gateways=self._home_gateways,
            timestamp_window_seconds=config.timestamp_window_seconds,
        )
        self.table = BindingTable(self._rules)
        self.attractor = Attractor(
            config.attraction,
            config.prefixes,
            self._path.attract,
            config.state / "attracted.json",
            self.table.awaited,
        )
        self._peers = {peer.address: peer for peer in config.partners}
        self._tellings: dict[tuple[str, IPv6Address], _Telling] = {}
        self._telling_sequence = 0
        # When a gateway's heartbeat came last (monotonic seconds).
        self._heard_at: dict[IPv6Address, float] = {}
        self._background = Background()
        self._tasks: set[asyncio.Task[None]] = set()
        self._unsent: list[tuple[Peer, str, _Owed, BindingAcknowledgement]] = []
        self._owed: dict[str, _Owed] = {}
        self._wake = asyncio.Event()
        self.refusals: dict[str, int] = {}

    # --- start and stop ---

    def restore(self) -> None:
        """Read what was kept, and want its routes. Call before the data path starts."""
        now = time.monotonic()
        self.attractor.restore()
        for vm, record in self._journal.open().items():
            try:
                binding = Binding.from_record(vm, record, now)
            except (KeyError, ValueError) as error:
                logger.warning("binding of VM %s: its record is damaged (%s) and was left out", vm, error)
                continue
            self.table.restore([binding])
            if tunnelled := self._tunnelled(binding):
                self._path.set_remote(tunnelled, binding.care_of)
        logger.info("anchor: %d bindings restored, start %d", len(self.table), self._restarts)

    def start(self) -> None:
        """Serve."""
        self.attractor.start()
        self._background.start(again_and_again("anchor", self._round, self._wake, 0.01))

    def failure(self) -> BaseException | None:
        """What ended work that should go on, if anything did."""
        return self._background.failure() or self.attractor.failure()

    async def stop(self) -> None:
        """Serve no more; routes and records stay."""
        try:
            await self.attractor.stop()
            await self._background.stop()
            for task in list(self._tasks):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        finally:
            self._journal.close()

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _round(self) -> float:
        """Expiries and losses that were not confirmed; how long there is nothing to do then."""
        now = time.monotonic()
        for verdict in self.table.expire(now):
            logger.warning("%s", verdict.sentence)
            if verdict.after is not None:
                self._owed.pop(verdict.after.vm, None)
            try:
                self._carry_out(verdict)
            except MobilityError as error:
                # The data path tries it again.
                logger.error("%s; its route is still there: %s", verdict.sentence, error)
        self._tell_again(now)
        times = [telling.due_at for telling in self._tellings.values()]
        following = self.table.next_expiry()
        times += [] if following is None else [following]
        return min(times, default=now + 60) - time.monotonic()

    # --- messages ---

    def take(self, peer: Peer, message: Message) -> bool:
        """Act on an authenticated message; False when it is none for an anchor."""
        match message:
            case BindingUpdate():
                self._take_update(peer, message)
            case Heartbeat() if not message.response:
                self._send(peer, heartbeat.answer(message, self._restarts, time.time()))
                self._heard(peer)
            case RevocationAcknowledgement():
                for key, telling in list(self._tellings.items()):
                    if telling.gateway == peer.address and telling.sequence == message.sequence:
                        del self._tellings[key]
                        crash_point("loss-confirmed")
                        self._told(telling.loss.vm, peer.address)
            case _:
                return False
        return True

    def _heard(self, peer: Peer) -> None:
        """One that was silent, or was not heard since this anchor began, may not know what it lost."""
        now = time.monotonic()
        before, self._heard_at[peer.address] = self._heard_at.get(peer.address, float("-inf")), now
        if now - before > heartbeat.MISSED * self._config.heartbeat_seconds:
            for binding in self.table.owed_to(peer.address):
                self._tell_loss(peer.address, binding)

    def _take_update(self, peer: Peer, update: BindingUpdate) -> None:
        try:
            asked = read_registration(update, peer.address)
        except Incomplete as error:
            logger.warning("from %s: %s; refused with status %d", peer.name, error, error.status)
            self._count_refusal("incomplete")
            self._send(peer, refusal(update, error.status))
            return
        verdict = self.table.register(
            asked, peer.address, update.sequence, now=time.monotonic(), wall=time.time()
        )
        self._log(verdict)
        owed = self._owed.get(asked.vm)
        if verdict.accepted and owed is not None and owed.failed:
            # Asked again for what was not carried out, or was not kept: as if for the first time.
            del self._owed[asked.vm]
            cause = "bound" if verdict.cause == "refreshed" else verdict.cause
            verdict = replace(verdict, before=owed.before, cause=cause)
        nowhere = verdict.after is None or not verdict.after.active
        if verdict.cause in _ENLIGHTENING and not (verdict.cause == "not-bound" and nowhere):
            self._told(asked.vm, peer.address)
        try:
            self._carry_out(verdict)
        except MobilityError as error:
            logger.error("VM %s: bound, but without a route: %s", asked.vm, error)
            self._owed[asked.vm] = _Owed(verdict.before, failed=True)
            self._send(peer, refusal(update, Status.INSUFFICIENT_RESOURCES))
            return
        if not update.acknowledge:
            return
        answer = self._answer(asked, verdict, update.sequence)
        kept = verdict.before != verdict.after and verdict.cause != "refreshed"
        if kept or (verdict.accepted and asked.vm in self._owed):
            # Nobody is told that it is bound before it would be bound after a power cut, too.
            owed = self._owed.setdefault(asked.vm, _Owed(verdict.before))
            self._unsent.append((peer, asked.vm, owed, answer))
            if len(self._unsent) == 1:
                self._spawn(self._answer_when_kept())
        else:
            self._send(peer, answer)

    def _told(self, vm: str, gateway: IPv6Address) -> None:
        binding = self.table.told(vm, gateway)
        if binding is not None:
            self._journal.put(vm, binding.as_record())
            self._spawn(self._answer_when_kept())

    async def _answer_when_kept(self) -> None:
        # What comes in this turn of the loop shares one sync.
        await asyncio.sleep(0)
        answers, self._unsent = self._unsent, []
        try:
            await self._journal.commit()
        except OSError:
            # It was logged; the gateways ask again, and perhaps there is room then.
            for _unused, _vm, owed, _answer in answers:
                owed.failed = True
            return
        crash_point("binding-recorded")
        for peer, vm, owed, answer in answers:
            if self._owed.get(vm) is owed:
                del self._owed[vm]
            self._send(peer, answer)
            crash_point("binding-answered")

    @staticmethod
    def _answer(asked: Registration, verdict: Verdict, sequence: int) -> BindingAcknowledgement:
        after = verdict.after
        bound = verdict.accepted and after is not None and after.active and asked.lifetime_seconds > 0
        return Acknowledgement(
            vm=asked.vm,
            status=verdict.status,
            sequence=sequence,
            lifetime_seconds=after.lifetime_seconds if bound and after is not None else 0,
            ticks=verdict.ticks,
            homes=asked.homes,
            epoch=None if after is None else after.epoch,
            holder=after.care_of if after is not None and after.active else None,
        ).message()

    def _log(self, verdict: Verdict) -> None:
        if not verdict.accepted:
            self._count_refusal(verdict.cause)
            logger.warning("%s; refused (%s)", verdict.sentence, verdict.cause)
        elif verdict.cause not in _ROUTINE:
            logger.info("%s", verdict.sentence)

    def _count_refusal(self, cause: str) -> None:
        self.refusals[cause] = self.refusals.get(cause, 0) + 1

    def _carry_out(self, verdict: Verdict) -> None:
        """Routes first, then the record, then the word to whoever lost."""
        before, after = verdict.before, verdict.after
        if before == after or after is None:
            return
        tunnelled = self._tunnelled(after)
        if gone := tuple(set(self._tunnelled(before)) - set(tunnelled)):
            self._path.clear_remote(gone)
        if tunnelled:
            self._path.set_remote(tunnelled, after.care_of)
        if verdict.cause != "refreshed":
            crash_point("binding-routed")
            self._journal.put(after.vm, after.as_record())
            self._show_on_home_link(before, after)
        displaced = verdict.displaced
        losers = dict.fromkeys(self.table.to_tell(after) if after.active else ())
        if displaced is not None:
            losers[displaced.gateway] = None
        for gateway in losers:
            # One that was cut off when it lost the VM, or had given it up before it ran elsewhere, does not
            # ask: each refresh tells it once more.
            self._tell_loss(gateway, after, once=verdict.cause == "refreshed" and displaced is None)
        self._wake.set()

    # --- the home link ---

    def _at_home(self, binding: Binding, home: IPv6Network) -> bool:
        return any(
            binding.gateway in gateways and home.subnet_of(prefix) for prefix, gateways in self._home_gateways
        )

    def _away(self, binding: Binding | None) -> tuple[IPv6Network, ...]:
        """The addresses that are bound to a gateway which does not stand on their home link."""
        if binding is None or not binding.active:
            return ()
        return tuple(home for home in binding.homes if not self._at_home(binding, home))

    def _tunnelled(self, binding: Binding | None) -> tuple[IPv6Network, ...]:
        """Those that packets are tunnelled for; the others this host's own routing leads to the home link."""
        if binding is not None and binding.active and self._config.gateway:
            # What is not tunnelled to its place here would leave by the anchor in use, and come back.
            return binding.homes
        return self._away(binding)

    def _show_on_home_link(self, before: Binding | None, after: Binding) -> None:
        """On the home link neighbours turn to us for a VM that left it; one that is back tells them."""
        left = set(self._away(after)) - set(self._away(before))
        for prefix in self._config.prefixes:
            responder = self._home_links.get(prefix.link or "")
            for home in left if responder is not None else ():
                if home.prefixlen == 128 and home.subnet_of(prefix.network) and responder is not None:
                    responder.announce(home.network_address)

    def away_from(self, device: str, address: IPv6Address) -> bool:
        """Whether ``address`` is of the home link ``device`` and bound to a gateway elsewhere."""
        vm = self.table.owner(address)
        return (
            vm is not None
            and any(prefix.link == device and address in prefix.network for prefix in self._config.prefixes)
            and IPv6Network(address) in self._away(self.table.get(vm))
        )

    # --- who lost ---

    def _tell_loss(self, gateway: IPv6Address, after: Binding, *, once: bool = False) -> None:
        if once and (after.vm, gateway) in self._tellings:
            return
        self._telling_sequence = (self._telling_sequence + 1) & 0xFFFF
        holder = after.care_of if after.active else None
        loss = Loss(after.vm, after.homes, after.epoch, after.ticks, holder)
        told = _TELLINGS - 1 if once else 0
        telling = _Telling(gateway, loss, self._telling_sequence, time.monotonic(), told)
        self._tellings[after.vm, gateway] = telling
        # The new holder may lose it again before the old one has confirmed: then that word is void.
        self._tellings.pop((after.vm, after.gateway), None)
        self._tell_again(telling.due_at)

    def _tell_again(self, now: float) -> None:
        for key, telling in list(self._tellings.items()):
            if telling.due_at > now:
                continue
            peer = self._peers.get(telling.gateway)
            if peer is None or telling.told >= _TELLINGS:
                # It learns at its next refresh, or at the holder's, when it lives.
                del self._tellings[key]
                continue
            self._send(peer, telling.loss.message(telling.sequence))
            crash_point("loss-told")
            telling.due_at = now + _FIRST_TELLING_SECONDS * 2**telling.told
            telling.told += 1

    # --- what is asked about ---

    def gateway_name(self, binding: Binding) -> str:
        """By which name the holder is known."""
        known = self._rules.gateways.get(binding.gateway)
        return str(binding.gateway) if known is None else known.name

    def describe(self, binding: Binding) -> dict[str, Any]:
        """A binding for the control interface."""
        return {
            "vm": binding.vm,
            "addresses": [str(home) for home in binding.homes],
            "state": "bound" if binding.active else "withdrawn",
            "care_of": str(binding.care_of),
            "gateway": self.gateway_name(binding),
            "epoch": binding.epoch,
            "sequence": binding.sequence,
            "since_seconds": binding.since_seconds,
            "expires_in_seconds": max(binding.expires_seconds - time.monotonic(), 0.0)
            if binding.active
            else None,
        }

    def status(self) -> dict[str, Any]:
        """A summary for the control interface."""
        return {
            "bindings": len(self.table),
            "restarts": self._restarts,
            "refusals": dict(sorted(self.refusals.items())),
            "losses_unconfirmed": len(self._tellings),
            "attraction": self.attractor.status(),
        }
