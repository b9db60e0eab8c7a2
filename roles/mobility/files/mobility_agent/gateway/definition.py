# SPDX-License-Identifier: GPL-3.0-or-later
"""What a VM's definition says of its place in the network.

Home addresses travel in the VM's metadata, MAC and bridge are in its definition: nothing need be configured
twice.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from mobility_agent.homes import Home
from mobility_agent.typed_reader import parse_home

#: The namespace of our element in a VM's metadata: <addresses xmlns=...><address>2001:db8::5</address>...
METADATA_URI = "urn:lifeboat:mobility:1"


@dataclass(frozen=True, slots=True)
class VmNetwork:
    """What a definition says of a VM's place in the network."""

    vm: str
    name: str
    interfaces: tuple[tuple[str, str], ...]  # (bridge, MAC)
    homes: tuple[Home, ...]
    # Somebody has said which, and be it none: nothing is to be learnt.
    declared: bool = False
    # A domain that is off has a definition, too.
    active: bool = True
    # Addresses that belong to a certain card: (address, (bridge, MAC)), None where it has no such card.
    placed: tuple[tuple[Home, tuple[str, str] | None], ...] = ()

    def place(self, ours: Collection[str]) -> Place | None:
        """Where it is on bridges of ``ours``; None: on none of them."""
        first = next((pair for pair in self.interfaces if pair[0] in ours), None)
        if first is None:
            return None
        cards = {home: pair for home, pair in self.placed if pair is not None and pair[0] in ours}
        astray = [home for home, _pair in self.placed if home not in cards]
        return Place(*first, {home: pair for home, pair in cards.items() if pair != first}, tuple(astray))


@dataclass(frozen=True, slots=True)
class Place:
    """A VM's first card on a bridge of ours, and the others of which addresses are.

    ``astray``: addresses of cards that are on none; they are led to the first.
    """

    bridge: str
    mac: str
    cards: Mapping[Home, tuple[str, str]]
    astray: tuple[Home, ...] = ()

    def complaints(self, vm: str) -> list[str]:
        """What is led elsewhere than its definition says, a sentence each."""
        to = f"it is led to {self.mac} on {self.bridge}"
        return [
            f"VM {vm}: {home} is of a card that is on no bridge of this gateway; {to}" for home in self.astray
        ]


def read_definition(text: str) -> VmNetwork:
    """From a domain's live definition. Raises ET.ParseError."""
    root = ET.fromstring(text)
    interfaces = []
    named: dict[str, tuple[str, str]] = {}
    for interface in root.iterfind("devices/interface"):
        source, mac = interface.find("source"), interface.find("mac")
        bridge = None if source is None else source.get("bridge")
        if source is not None and bridge and mac is not None:
            place = (bridge, str(mac.get("address")).lower())
            interfaces.append(place)
            for name in (place[1], source.get("network"), bridge):
                named.setdefault((name or "").lower(), place)
    cards = {home: card for home, card in _homes(root) if home is not None}
    homes = tuple(cards)
    placed = tuple((home, named.get(card)) for home, card in cards.items() if card)
    declared = root.find(f"metadata//{{{METADATA_URI}}}addresses") is not None
    uuid, name = root.findtext("uuid") or "", root.findtext("name") or ""
    active = root.get("id") is not None
    return VmNetwork(uuid, name, tuple(interfaces), homes, declared, active, placed)


def _homes(root: ET.Element) -> Iterable[tuple[Home | None, str]]:
    """Each address with the card that it names: a MAC, a libvirt network or a bridge, "" for the first."""
    for item in root.iterfind(f"metadata//{{{METADATA_URI}}}address"):
        yield parse_home((item.text or "").strip()), item.get("card", "").lower()


def bridges_elsewhere(text: str, ours: Collection[str]) -> list[str]:
    """On which bridges a domain with this definition would be at another host, whose bridges are ``ours``.

    Of a libvirt network that is not known, it may have another bridge there. Raises ET.ParseError.
    """
    root = ET.fromstring(text)
    interfaces = list(root.iterfind("devices/interface"))
    sources = [interface.find("source") for interface in interfaces if interface.get("type") == "bridge"]
    named = [str(source.get("bridge")) for source in sources if source is not None]
    found = next((bridge for bridge in named if bridge in ours), None)
    may_be_another = any(interface.get("type") == "network" for interface in interfaces)
    first = found or (named[0] if named and not may_be_another else None)
    wanted = {card for home, card in _homes(root) if home is not None}
    of_cards = [
        str(source.get("bridge"))
        for interface in interfaces
        if interface.get("type") == "bridge"
        and (source := interface.find("source")) is not None
        and (mac := interface.find("mac")) is not None
        and wanted & {str(mac.get("address")).lower(), str(source.get("bridge")).lower()}
    ]
    return list(dict.fromkeys([*([first] if first else []), *of_cards]))
