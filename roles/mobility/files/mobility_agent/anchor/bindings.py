# SPDX-License-Identifier: GPL-3.0-or-later
"""Who is where: the anchor's bindings, and who may change them.

Pure: no clock, no socket, no file. The order of claims is (epoch, timestamp). The rules, in the order in
which they are asked:

1. the gateway is known, and the care-of address is its own;
2. every home address lies in a prefix of this anchor and is no other VM's;
3. an older epoch is refused, whatever its timestamp: the VM's home has moved since;
4. within one epoch an update not newer than the last one is a replay;
5. the timestamp is near the anchor's clock (RFC 5213 section 5.5), so that no gateway can reserve the future;
6. a newer epoch takes the binding over; within one epoch only the claim of a VM newly *started* does
   (handoff indicator 1). A hand-off (3) without a newer epoch and a refresh (5) from a care-of address that
   is not bound are refused: so an old gateway's refresh never steals a binding back. What is bound nowhere
   may be refreshed by any but those that had it and may not know yet that they lost it.

A withdrawn or expired binding stays known without a route: its epoch still counts.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv6Address, IPv6Network
from typing import Any

from mobility_agent.messages.headers import Status
from mobility_agent.messages.options import HandoffIndicator, Timestamp
from mobility_agent.messages.registration import Registration

_FORGET_AFTER_SECONDS = 30 * 86400.0


@dataclass(frozen=True, slots=True)
class KnownGateway:
    """A gateway that may register: by name, and at which care-of address."""

    name: str
    care_of: IPv6Address


@dataclass(frozen=True, slots=True)
class Rules:
    """What this anchor accepts."""

    prefixes: Sequence[IPv6Network]
    gateways: Mapping[IPv6Address, KnownGateway]
    #: Which gateways stand on the home link of a prefix.
    home_gateways: Sequence[tuple[IPv6Network, frozenset[IPv6Address]]] = ()
    timestamp_window_seconds: float = 10.0
    max_lifetime_seconds: int = 600


@dataclass(frozen=True, slots=True)
class Binding:
    """A VM's home addresses are reached at ``care_of``; ``active`` False: nowhere, but its epoch is known.

    ``since_seconds``: wall clock of the last change of care-of address. ``expires_seconds``: monotonic clock.
    ``untold``: gateways that had it before and have not heard yet who has it now.
    """

    vm: str
    homes: tuple[IPv6Network, ...]
    care_of: IPv6Address
    gateway: IPv6Address
    epoch: int
    ticks: int
    lifetime_seconds: int
    sequence: int
    since_seconds: float
    expires_seconds: float
    active: bool = True
    untold: tuple[IPv6Address, ...] = ()

    def as_record(self) -> dict[str, Any]:
        """What is kept on disk. The expiry is not: a monotonic clock means nothing after a restart."""
        return {
            "homes": [str(home) for home in self.homes],
            "care_of": str(self.care_of),
            "gateway": str(self.gateway),
            "epoch": self.epoch,
            "ticks": self.ticks,
            "lifetime_seconds": self.lifetime_seconds,
            "sequence": self.sequence,
            "since_seconds": self.since_seconds,
            "active": self.active,
            **({"untold": [str(gateway) for gateway in self.untold]} if self.untold else {}),
        }

    @classmethod
    def from_record(cls, vm: str, record: Mapping[str, Any], now: float) -> Binding:
        """A binding read back at ``now`` (monotonic): it gets its whole lifetime again."""
        active = bool(record["active"])
        lifetime = int(record["lifetime_seconds"])
        return cls(
            vm=vm,
            homes=tuple(IPv6Network(home) for home in record["homes"]),
            care_of=IPv6Address(record["care_of"]),
            gateway=IPv6Address(record["gateway"]),
            epoch=int(record["epoch"]),
            ticks=int(record["ticks"]),
            lifetime_seconds=lifetime,
            sequence=int(record["sequence"]),
            since_seconds=float(record["since_seconds"]),
            expires_seconds=now + (lifetime if active else _FORGET_AFTER_SECONDS),
            active=active,
            untold=tuple(IPv6Address(gateway) for gateway in record.get("untold", ())),
        )

    def untold_after(self, gateway: IPv6Address) -> tuple[IPv6Address, ...]:
        """Who has not heard of it yet when ``gateway`` has it now."""
        former = dict.fromkeys((*self.untold, self.gateway))
        return tuple(one for one in former if one != gateway)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a registration: ``before`` and ``after`` are the binding; equal when nothing changed."""

    status: Status
    cause: str
    sentence: str
    before: Binding | None
    after: Binding | None
    ticks: int

    @property
    def accepted(self) -> bool:
        """Whether the binding is as was asked for."""
        return self.status < 128

    @property
    def displaced(self) -> Binding | None:
        """The binding that another gateway held until now and must be told of."""
        before, after = self.before, self.after
        if before is None or after is None or not before.active or before.care_of == after.care_of:
            return None
        return before


class BindingTable:
    """All bindings of one anchor."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._bindings: dict[str, Binding] = {}
        self._owners: dict[IPv6Network, str] = {}
        self._expiries: list[tuple[float, str]] = []
        self._active = 0

    def __len__(self) -> int:
        return self._active

    def get(self, vm: str) -> Binding | None:
        """The VM's binding, active or remembered."""
        return self._bindings.get(vm)

    def owner(self, address: IPv6Address) -> str | None:
        """The VM that has ``address`` bound, as an address of its own."""
        return self._owners.get(IPv6Network(address))

    def all(self) -> Iterable[Binding]:
        """Every binding, active or remembered."""
        return self._bindings.values()

    def restore(self, bindings: Iterable[Binding]) -> None:
        """Take over what was kept over a restart."""
        for binding in bindings:
            self._store(binding)

    def _store(self, binding: Binding) -> None:
        before = self._bindings.get(binding.vm)
        if before is not None and before.active:
            self._active -= 1
            for home in before.homes:
                self._owners.pop(home, None)
        self._bindings[binding.vm] = binding
        if binding.active:
            self._active += 1
            self._owners.update(dict.fromkeys(binding.homes, binding.vm))
        heapq.heappush(self._expiries, (binding.expires_seconds, binding.vm))

    def register(
        self, asked: Registration, gateway: IPv6Address, sequence: int, *, now: float, wall: float
    ) -> Verdict:
        """Judge a registration and, if it is right, do as it says.

        ``now``: monotonic seconds; ``wall``: seconds since 1970.
        """
        before = self._bindings.get(asked.vm)
        refused = self._refusal(asked, gateway, before, wall)
        if refused is not None:
            status, cause, sentence = refused
            ticks = asked.ticks
            if status is Status.TIMESTAMP_MISMATCH:
                ticks = Timestamp.of_seconds(wall).ticks
            elif status is Status.TIMESTAMP_TOO_LOW and before is not None:
                # More than the RFC asks: so the gateway knows what to come after.
                ticks = before.ticks
            return Verdict(status, cause, sentence, before, before, ticks)
        if asked.lifetime_seconds == 0:
            return self._withdraw(asked, gateway, before, sequence, now, wall)
        lifetime = min(asked.lifetime_seconds, self.rules.max_lifetime_seconds)
        moved = before is None or not before.active or before.care_of != asked.care_of
        after = Binding(
            vm=asked.vm,
            homes=asked.homes,
            care_of=asked.care_of,
            gateway=gateway,
            epoch=asked.epoch,
            ticks=asked.ticks,
            lifetime_seconds=lifetime,
            sequence=sequence,
            since_seconds=wall if before is None or moved else before.since_seconds,
            expires_seconds=now + lifetime,
            untold=() if before is None else before.untold_after(gateway),
        )
        self._store(after)
        name = self.rules.gateways[gateway].name
        sentence = f"VM {asked.vm}: bound to {name} ({asked.care_of}), epoch {asked.epoch}"
        return Verdict(
            Status.ACCEPTED, "bound" if moved else "refreshed", sentence, before, after, asked.ticks
        )

    def told(self, vm: str, gateway: IPv6Address) -> Binding | None:
        """``gateway`` knows now that the VM is another's: the binding, if that is news."""
        binding = self._bindings.get(vm)
        if binding is None or gateway not in binding.untold:
            return None
        rest = tuple(one for one in binding.untold if one != gateway)
        self._bindings[vm] = binding = replace(binding, untold=rest)
        return binding

    def to_tell(self, binding: Binding) -> tuple[IPv6Address, ...]:
        """The untold gateways, ours, at which packets could end; none that shares the VM's home link."""
        beside: set[IPv6Address] = set()
        for prefix, gateways in self.rules.home_gateways if binding.untold else ():
            if binding.gateway in gateways and all(home.subnet_of(prefix) for home in binding.homes):
                beside |= gateways
        return tuple(one for one in binding.untold if one in self.rules.gateways and one not in beside)

    def owed_to(self, gateway: IPv6Address) -> list[Binding]:
        """What is bound elsewhere and this gateway, at which packets could end, has not heard of."""
        return [
            binding
            for binding in self._bindings.values()
            if binding.active and gateway in binding.untold and gateway in self.to_tell(binding)
        ]

    def awaited(self, prefix: IPv6Network) -> int:
        """How many VMs of ``prefix`` are bound while a gateway that had them, one of ours, is untold."""
        return sum(
            binding.active
            and bool(self.to_tell(binding))
            and any(home.subnet_of(prefix) for home in binding.homes)
            for binding in self._bindings.values()
        )

    def _withdraw(
        self,
        asked: Registration,
        gateway: IPv6Address,
        before: Binding | None,
        sequence: int,
        now: float,
        wall: float,
    ) -> Verdict:
        elsewhere = before is not None and before.care_of != asked.care_of
        if before is None or (elsewhere and asked.epoch <= before.epoch):
            sentence = f"VM {asked.vm}: withdrawn by a gateway that does not hold it; nothing changed"
            return Verdict(Status.ACCEPTED, "not-held", sentence, before, before, asked.ticks)
        after = replace(
            before,
            care_of=asked.care_of,
            gateway=gateway,
            epoch=asked.epoch,
            ticks=asked.ticks,
            sequence=sequence,
            since_seconds=wall,
            expires_seconds=now + _FORGET_AFTER_SECONDS,
            active=False,
            untold=before.untold_after(gateway),
        )
        self._store(after)
        name = self.rules.gateways[gateway].name
        sentence = f"VM {asked.vm}: withdrawn by {name}, epoch {asked.epoch}"
        return Verdict(Status.ACCEPTED, "withdrawn", sentence, before, after, asked.ticks)

    def _refusal(
        self, asked: Registration, gateway: IPv6Address, before: Binding | None, wall: float
    ) -> tuple[Status, str, str] | None:
        subject = f"VM {asked.vm}"
        known = self.rules.gateways.get(gateway)
        if known is None:
            fact = f"{subject}: {gateway} is no gateway of this anchor; add it to the anchor's peers"
            return Status.GATEWAY_NOT_AUTHORIZED, "unknown-gateway", fact
        if asked.care_of != known.care_of:
            fact = (
                f"{subject}: {known.name} registers {asked.care_of}, but its tunnel ends at {known.care_of}"
            )
            return Status.ADMINISTRATIVELY_PROHIBITED, "foreign-care-of", fact
        if before is not None:
            stale = self._stale(asked, gateway, before, known.name)
            if stale is not None:
                return stale
        if asked.lifetime_seconds:
            foreign = self._foreign_home(asked)
            if foreign is not None:
                return Status.NOT_AUTHORIZED_FOR_PREFIX, *foreign
        offset = asked.ticks / Timestamp.TICKS_PER_SECOND - wall
        if abs(offset) > self.rules.timestamp_window_seconds:
            way = "ahead of" if offset > 0 else "behind"
            fact = f"{subject}: the clock of {known.name} is {abs(offset):.1f} s {way} this anchor's; use NTP"
            return Status.TIMESTAMP_MISMATCH, "clock", fact
        return None

    def _stale(
        self, asked: Registration, gateway: IPv6Address, before: Binding, name: str
    ) -> tuple[Status, str, str] | None:
        subject = f"VM {asked.vm}"
        if asked.epoch < before.epoch:
            fact = f"{subject}: {name} claims epoch {asked.epoch}, but epoch {before.epoch} is known"
            return Status.SEQUENCE_OUT_OF_WINDOW, "stale-epoch", fact
        if asked.epoch > before.epoch:
            return None
        if asked.ticks <= before.ticks:
            fact = (
                f"{subject}: an update of {name} that is not newer than the last one: replayed or overtaken"
            )
            return Status.TIMESTAMP_TOO_LOW, "replay", fact
        if asked.care_of == before.care_of or asked.lifetime_seconds == 0:
            return None
        # Withdrawn here in the holder's epoch by one that only asked: the holder must not be locked out.
        if asked.refresh and (before.active or gateway in before.untold):
            fact = f"{subject}: {name} refreshes a binding that it does not hold"
            return Status.ADMINISTRATIVELY_PROHIBITED, "not-bound", fact
        if before.active and asked.handoff is not HandoffIndicator.NEW_INTERFACE:
            fact = f"{subject}: {name} claims epoch {asked.epoch}, the holder's own; a newer one is needed"
            return Status.SEQUENCE_OUT_OF_WINDOW, "same-epoch", fact
        return None

    def _foreign_home(self, asked: Registration) -> tuple[str, str] | None:
        for home in asked.homes:
            if not any(home.subnet_of(prefix) for prefix in self.rules.prefixes):
                fact = f"VM {asked.vm}: {home} is in no home prefix here; correct its home addresses"
                return "outside-prefixes", fact
            owner = self._owners.get(home)
            if owner is not None and owner != asked.vm:
                fact = f"VM {asked.vm}: {home} is bound to VM {owner}; two VMs cannot have one address"
                return "duplicate-address", fact
        return None

    def expire(self, now: float) -> list[Verdict]:
        """End what was not refreshed in time; the verdicts say which routes go."""
        ended: list[Verdict] = []
        while self._expiries and self._expiries[0][0] <= now:
            _unused, vm = heapq.heappop(self._expiries)
            before = self._bindings.get(vm)
            if before is None or before.expires_seconds > now:
                continue
            if not before.active:
                del self._bindings[vm]
                continue
            after = replace(before, active=False, expires_seconds=now + _FORGET_AFTER_SECONDS)
            self._store(after)
            sentence = (
                f"VM {vm}: not refreshed by {before.gateway} for {before.lifetime_seconds} s; binding ended"
            )
            ended.append(Verdict(Status.ACCEPTED, "expired", sentence, before, after, before.ticks))
        return ended

    def next_expiry(self) -> float | None:
        """When :meth:`expire` may have something to do (monotonic seconds)."""
        return self._expiries[0][0] if self._expiries else None
