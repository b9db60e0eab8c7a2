# SPDX-License-Identifier: GPL-3.0-or-later
"""Home addresses of VMs whose definition says none, learnt from what libvirt and the link tell.

Off unless told so. What a guest uses is what a guest *says*: it is taken only within the home prefixes, for
the MAC of the VM's own card, when no other VM on this host has it, and when no anchor refuses it. Then it is
written into the VM's definition, where it travels with the VM like one from the inventory. What the inventory
says, and be it "none", is never touched.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv6Address, IPv6Network
from typing import Protocol

from mobility_agent.background import Background
from mobility_agent.errors import Finding, MobilityError

logger = logging.getLogger(__name__)

_ROUND_SECONDS = 10.0
# Seen the same in so many rounds: a guest that boots makes its addresses one after the other.
_SETTLED_ROUNDS = 2
_ANSWER_SECONDS = 5.0
# An address that somebody else has is not asked for in every round.
_REFUSED_SECONDS = 300.0
#: More than a guest with temporary addresses (RFC 8981) uses at a time; no more is learnt of one VM.
MOST_ADDRESSES = 8
_HEARD_MACS, _HEARD_SECONDS = 4096, 600.0


@dataclass(frozen=True, slots=True)
class Sighting:
    """Somebody says that the card with ``mac`` has ``address``."""

    mac: str
    address: IPv6Address


@dataclass(frozen=True, slots=True)
class Unnamed:
    """A running VM on a bridge of ours whose definition says nothing of addresses."""

    vm: str
    name: str
    bridge: str
    mac: str


class Host(Protocol):
    """What is asked of libvirt and of the kernel; each may block a while. Raises OSError, MobilityError."""

    async def unnamed(self) -> list[Unnamed]:
        """The VMs to learn of."""

    async def claimed(self) -> Mapping[IPv6Network, str]:
        """What the definitions of all VMs here say: address -> the VM's UUID."""

    async def sightings(self, vm: Unnamed) -> list[Sighting]:
        """What guest agent, leases and neighbour tables say of this VM."""

    async def write(self, vm: str, homes: Iterable[IPv6Address]) -> None:
        """Put the addresses into the VM's definition, marked as learnt."""


class Claims(Protocol):
    """The anchors, asked whether a VM may have addresses; nothing is routed for it here."""

    async def ask(self, vm: str, homes: tuple[IPv6Network, ...], seconds: float) -> str | None:
        """None: the VM may have them, and is claimed; else a sentence why not, and nothing is claimed."""

    def drop(self, vm: str) -> None:
        """Take back what was asked for."""

    def owner(self, home: IPv6Network) -> str | None:
        """The VM (UUID) that this gateway knows to have it, here or gone from here."""


class Heard:
    """What neighbour discovery on the bridges told (RFC 4861, duplicate detection included), for a while."""

    def __init__(self, prefixes: Iterable[IPv6Network], clock: Callable[[], float] = time.monotonic) -> None:
        self._prefixes = tuple(prefixes)
        self._clock = clock
        self._at: dict[str, dict[IPv6Address, float]] = {}

    def note(self, address: IPv6Address, mac: bytes) -> None:
        """A solicitation came from ``mac`` that uses ``address``, or asks whether it is free."""
        if not any(address in prefix for prefix in self._prefixes):
            return
        card = mac.hex(":")
        if card not in self._at and len(self._at) >= _HEARD_MACS:
            # Whoever floods us with made-up cards only makes us forget.
            self._at.clear()
        addresses = self._at.setdefault(card, {})
        if address in addresses or len(addresses) <= MOST_ADDRESSES:
            addresses[address] = self._clock()

    def of(self, mac: str) -> list[Sighting]:
        """What this card used lately."""
        since = self._clock() - _HEARD_SECONDS
        return [Sighting(mac, address) for address, at in self._at.get(mac, {}).items() if at >= since]


@dataclass(slots=True)
class _Watched:
    """One VM: what was seen of it last, in how many rounds, and until when it is left alone."""

    homes: frozenset[IPv6Address] = frozenset()
    rounds: int = 0
    quiet_until: float = 0.0
    finding: Finding | None = None


@dataclass(slots=True)
class Learner:
    """Looks every ten seconds; ``findings`` says what was seen and not learnt."""

    host: Host
    claims: Claims
    prefixes: tuple[IPv6Network, ...]
    clock: Callable[[], float] = time.monotonic
    _watched: dict[str, _Watched] = field(default_factory=dict)
    _background: Background = field(default_factory=Background)

    def start(self) -> None:
        """Begin."""
        self._background.start(self._run())

    async def stop(self) -> None:
        """Learn no more."""
        await self._background.stop()

    async def _run(self) -> None:
        while True:
            try:
                await self.round()
            except (OSError, MobilityError) as error:
                logger.warning("home addresses: nothing is learnt now: %s", error)
            except Exception:
                logger.exception("home addresses: nothing was learnt in this round")
            await asyncio.sleep(_ROUND_SECONDS)

    def findings(self) -> list[Finding]:
        """Addresses that guests use and that their VMs may not have."""
        return [watched.finding for watched in self._watched.values() if watched.finding is not None]

    async def round(self) -> None:
        """Look once at every VM that there is something to learn of. Raises OSError, MobilityError."""
        vms = await self.host.unnamed()
        self._watched = {vm.vm: self._watched.get(vm.vm, _Watched()) for vm in vms}
        claimed = await self.host.claimed() if vms else {}
        for vm in vms:
            await self._look(vm, claimed)

    async def _look(self, vm: Unnamed, claimed: Mapping[IPv6Network, str]) -> None:
        watched, now = self._watched[vm.vm], self.clock()
        if now < watched.quiet_until:
            return
        seen = frozenset(
            sighting.address
            for sighting in await self.host.sightings(vm)
            if sighting.mac.lower() == vm.mac and any(sighting.address in prefix for prefix in self.prefixes)
        )
        watched.rounds = watched.rounds + 1 if seen == watched.homes else 1
        watched.homes = seen
        if not seen:
            watched.finding = None
            return
        if watched.rounds < _SETTLED_ROUNDS:
            return
        homes = tuple(IPv6Network(address) for address in sorted(seen))
        refused = self._refusal(vm, homes, claimed)
        if refused is None:
            refused = await self.claims.ask(vm.vm, homes, _ANSWER_SECONDS)
        if refused is not None:
            self._leave_alone(vm, watched, homes, refused)
            return
        watched.finding = None
        try:
            await self.host.write(vm.vm, sorted(seen))
        except BaseException:
            self.claims.drop(vm.vm)
            raise
        words = ", ".join(map(str, sorted(seen)))
        logger.info("VM %s: home addresses learnt: %s", vm.name, words, extra={"VM": vm.vm})

    def _refusal(
        self, vm: Unnamed, homes: tuple[IPv6Network, ...], claimed: Mapping[IPv6Network, str]
    ) -> str | None:
        if len(homes) > MOST_ADDRESSES:
            return f"it uses {len(homes)} addresses, and {MOST_ADDRESSES} at most are learnt of one VM"
        for home in homes:
            owner = self.claims.owner(home)
            others = [owner] if owner is not None else []
            others += [other for network, other in claimed.items() if home.subnet_of(network)]
            for other in others:
                if other != vm.vm:
                    return f"{home.network_address} is the address of VM {other}"
        return None

    def _leave_alone(
        self, vm: Unnamed, watched: _Watched, homes: tuple[IPv6Network, ...], refused: str
    ) -> None:
        words = ", ".join(str(home.network_address) for home in homes)
        way_out = "give it addresses of its own in the inventory, or see what the guest is doing"
        watched.finding = Finding(
            f"VM {vm.name}", f"uses {words}, not learnt: {refused}", way_out, "duplicate-address"
        )
        watched.quiet_until = self.clock() + _REFUSED_SECONDS
        logger.warning("%s", watched.finding)
