# SPDX-License-Identifier: GPL-3.0-or-later
"""The VMs that a gateway knows: here, or gone from here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_network
from typing import Any

from mobility_agent.homes import Home, is_single
from mobility_agent.messages.options import HandoffIndicator

HERE, AWAY = "here", "away"


@dataclass(frozen=True, slots=True)
class Attachment:
    """One VM at this gateway.

    ``state``: ``here``, or ``away``: it left, and what still comes goes on to ``to`` (None: nobody knows
    where yet). ``handoff``: why it was claimed, until the first anchor acknowledged it. ``evident``: it
    surely came, so the gateway may make up a newer epoch. ``started``: it was started here, and not every
    anchor has acknowledged that. ``cards``: (address, bridge, MAC) of addresses that are not the first
    card's.
    """

    vm: str
    homes: tuple[Home, ...]
    mac: str
    bridge: str
    epoch: int
    since_seconds: float
    state: str = HERE
    to: IPv6Address | None = None
    handoff: HandoffIndicator = HandoffIndicator.UNCHANGED
    evident: bool = False
    started: bool = False
    cards: tuple[tuple[Home, str, str], ...] = ()

    def places(self) -> dict[tuple[str, str], tuple[Home, ...]]:
        """Its addresses by the card (bridge, MAC) that they are led to."""
        others = {home: (bridge, mac) for home, bridge, mac in self.cards}
        found: dict[tuple[str, str], tuple[Home, ...]] = {}
        for home in self.homes:
            place = others.get(home, (self.bridge, self.mac))
            found[place] = (*found.get(place, ()), home)
        return found

    def as_record(self) -> dict[str, Any]:
        """What is kept on disk."""
        return {
            "homes": [str(home) for home in self.homes],
            "mac": self.mac,
            "bridge": self.bridge,
            "epoch": self.epoch,
            "since_seconds": self.since_seconds,
            "state": self.state,
            "to": None if self.to is None else str(self.to),
            "handoff": int(self.handoff),
            "evident": self.evident,
            **({"started": True} if self.started else {}),
            **(
                {"cards": [[str(home), bridge, mac] for home, bridge, mac in self.cards]}
                if self.cards
                else {}
            ),
        }

    @classmethod
    def from_record(cls, vm: str, record: Mapping[str, Any]) -> Attachment:
        """What was kept. Raises KeyError, ValueError when it is damaged."""
        return cls(
            vm=vm,
            homes=tuple(ip_network(home) for home in record["homes"]),
            mac=str(record["mac"]),
            bridge=str(record["bridge"]),
            epoch=int(record["epoch"]),
            since_seconds=float(record["since_seconds"]),
            state=str(record["state"]),
            to=None if record["to"] is None else IPv6Address(record["to"]),
            handoff=HandoffIndicator(record["handoff"]),
            evident=bool(record["evident"]),
            started=bool(record.get("started")),
            cards=tuple(
                (ip_network(home), str(bridge), str(mac)) for home, bridge, mac in record.get("cards", ())
            ),
        )


class Attachments:
    """All of them, and whose an address is."""

    def __init__(self) -> None:
        self._by_vm: dict[str, Attachment] = {}
        self._owners: dict[Home, str] = {}
        # Those of a VM that are more than one address.
        self._wide: set[Home] = set()
        #: How many of them are here.
        self.here = 0

    def __len__(self) -> int:
        return len(self._by_vm)

    def get(self, vm: str) -> Attachment | None:
        """The VM, here or gone."""
        return self._by_vm.get(vm)

    def all(self) -> Iterable[Attachment]:
        """Every VM, here or gone."""
        return self._by_vm.values()

    def put(self, attachment: Attachment) -> None:
        """Know ``attachment`` in place of what was known of its VM."""
        self.remove(attachment.vm)
        self._by_vm[attachment.vm] = attachment
        self.here += attachment.state == HERE
        self._owners.update(dict.fromkeys(attachment.homes, attachment.vm))
        self._wide.update(home for home in attachment.homes if not is_single(home))

    def remove(self, vm: str) -> None:
        """Know nothing of the VM any more."""
        known = self._by_vm.pop(vm, None)
        self.here -= known is not None and known.state == HERE
        for home in known.homes if known is not None else ():
            if self._owners.get(home) == vm:
                del self._owners[home]
                self._wide.discard(home)

    def owner(self, home: Home) -> Attachment | None:
        """The VM that has ``home``."""
        vm = self._owners.get(home)
        return None if vm is None else self._by_vm[vm]

    def around(self, address: IPv6Address) -> Iterable[Attachment]:
        """The VMs that have a whole prefix with ``address`` in it."""
        # Asked at every neighbour solicitation: not by looking at thousands of VMs.
        return [self._by_vm[self._owners[home]] for home in self._wide if address in home]
