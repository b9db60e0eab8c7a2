# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""VMs' home addresses: as they stand in a VM's metadata, and what is wrong with those that somebody wants.

They travel with the VM's definition, so whoever has the VM knows them, on any host.
"""

from __future__ import annotations

import ipaddress
import typing as t
import xml.etree.ElementTree as ET

METADATA_URI = "urn:lifeboat:mobility:1"
METADATA_KEY = "mobility"

Network: t.TypeAlias = "ipaddress.IPv4Network | ipaddress.IPv6Network"
IS_IPV4 = "is IPv4, which only BGP leads to a VM; give IPv6 addresses, or add its prefix to mobility_prefixes"
# Who wants addresses: (whom to name, the addresses as they were written)
Wanted = t.Sequence[tuple[str, t.Sequence[str]]]


def parse(text: str) -> Network:
    """An address, or a prefix that is all one VM's. Raises ValueError with what is wrong with it."""
    try:
        network = ipaddress.ip_network(text.strip(), strict=True)
    except ValueError as error:
        raise ValueError(f"{text}: {error}; write it like 2001:db8:100::5") from error
    address = network.network_address
    if address.is_multicast or address.is_link_local or address.is_loopback or address.is_unspecified:
        raise ValueError(f"{text}: is no address that others could reach the VM by; give a global one")
    return network


def shown(network: Network) -> str:
    """An address without its length where that says nothing."""
    return str(network.network_address) if network.prefixlen == network.max_prefixlen else str(network)


def findings(wanted: Wanted, prefixes: t.Sequence[str], *, ipv4: bool = False) -> list[str]:
    """Everything that is wrong: addresses, and over all of them those in no prefix and those wanted twice.

    ``prefixes`` empty: they are not known here, and not asked about. IPv4 addresses may be where one of the
    prefixes is, or ``ipv4`` says so.
    """
    told: list[str] = []
    homes = [network for network in (_prefix(text, told) for text in prefixes) if network is not None]
    ipv4 = ipv4 or any(home.version == 4 for home in homes)
    taken: list[tuple[Network, str]] = []
    for who, texts in wanted:
        for text in texts:
            try:
                network = parse(text)
            except ValueError as error:
                told.append(f"{who}: {error}")
                continue
            if network.version == 4 and not ipv4:
                told.append(f"{who}: {shown(network)} {IS_IPV4}")
            elif homes and not any(_within(network, home) for home in homes):
                known = ", ".join(str(home) for home in homes)
                told.append(
                    f"{who}: {shown(network)} is in no home prefix ({known}); "
                    "correct it, or add its prefix to mobility_prefixes"
                )
            told += [
                f"{who}: {shown(network)} is {other}'s too; give each VM addresses of its own"
                for present, other in taken
                if present.overlaps(network)
            ]
            taken.append((network, who))
    return told


def _within(network: Network, home: Network) -> bool:
    if isinstance(network, ipaddress.IPv4Network) and isinstance(home, ipaddress.IPv4Network):
        return network.subnet_of(home)
    v6 = ipaddress.IPv6Network
    return isinstance(network, v6) and isinstance(home, v6) and network.subnet_of(home)


def _prefix(text: str, told: list[str]) -> Network | None:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        told.append(f"home prefix {text}: {error}; correct mobility_prefixes")
        return None


def read(definition: str) -> list[str]:
    """The home addresses in a domain's definition, as they stand there."""
    found = ET.fromstring(definition).iterfind(f"metadata//{{{METADATA_URI}}}address")
    return [(item.text or "").strip() for item in found]


def declared(definition: str) -> bool:
    """Whether somebody has said which addresses the VM has, and be it none; what was learnt is not that."""
    found = ET.fromstring(definition).find(f"metadata//{{{METADATA_URI}}}addresses")
    return found is not None and found.get("learnt") is None


def learnt(definition: str) -> bool:
    """Whether the VM's addresses were learnt by the mobility agent."""
    found = ET.fromstring(definition).find(f"metadata//{{{METADATA_URI}}}addresses")
    return found is not None and found.get("learnt") is not None


def cards(definition: str) -> dict[str, str]:
    """Which card (a MAC, a libvirt network or a bridge) an address is of, where that is said."""
    found = ET.fromstring(definition).iterfind(f"metadata//{{{METADATA_URI}}}address")
    return {(item.text or "").strip(): item.attrib["card"] for item in found if item.get("card")}


def card_findings(definition: str, addresses: t.Sequence[str], wanted: t.Mapping[str, str]) -> list[str]:
    """Addresses with a card that the VM does not have, and cards of addresses that it shall not have."""
    known: set[str] = set()
    for interface in ET.fromstring(definition).iterfind("devices/interface"):
        source, mac = interface.find("source"), interface.find("mac")
        for place, name in ((mac, "address"), (source, "network"), (source, "bridge")):
            if place is not None and place.get(name):
                known.add(str(place.get(name)).lower())
    told = [
        f"card of {one}: is none of its addresses; add it to them" for one in wanted if one not in addresses
    ]
    return told + [
        f"{one}: the VM has no card {card}; give one of {', '.join(sorted(known)) or 'none that it has'}"
        for one, card in wanted.items()
        if card.lower() not in known
    ]


def element(addresses: t.Sequence[str], of_cards: t.Mapping[str, str] | None = None) -> str:
    """The metadata element that holds them; ``of_cards``: those that are not the first card's."""
    root = ET.Element("addresses")
    for address in addresses:
        item = ET.SubElement(root, "address")
        item.text = address
        if of_cards and address in of_cards:
            item.set("card", of_cards[address])
    return ET.tostring(root, encoding="unicode")
