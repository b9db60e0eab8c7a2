# SPDX-License-Identifier: GPL-3.0-or-later
"""What a VM's definition says of its place in the network.

Home addresses travel in the VM's metadata, MAC and bridge are in its definition: nothing need be configured
twice.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Collection
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


def read_definition(text: str) -> VmNetwork:
    """From a domain's live definition. Raises ET.ParseError."""
    root = ET.fromstring(text)
    interfaces = []
    for interface in root.iterfind("devices/interface"):
        source, mac = interface.find("source"), interface.find("mac")
        bridge = None if source is None else source.get("bridge")
        if bridge and mac is not None:
            interfaces.append((bridge, str(mac.get("address")).lower()))
    texts = [(item.text or "").strip() for item in root.iterfind(f"metadata//{{{METADATA_URI}}}address")]
    parsed = [parse_home(item) for item in texts]
    homes = tuple(dict.fromkeys(home for home in parsed if home is not None))
    declared = root.find(f"metadata//{{{METADATA_URI}}}addresses") is not None
    uuid, name = root.findtext("uuid") or "", root.findtext("name") or ""
    active = root.get("id") is not None
    return VmNetwork(uuid, name, tuple(interfaces), homes, declared, active)


def bridge_elsewhere(text: str, ours: Collection[str]) -> str | None:
    """On which bridge a domain with this definition would be at another host, whose bridges are ``ours``.

    None: not known, since a libvirt network may have another bridge there. Raises ET.ParseError.
    """
    interfaces = list(ET.fromstring(text).iterfind("devices/interface"))
    sources = [interface.find("source") for interface in interfaces if interface.get("type") == "bridge"]
    named = [str(source.get("bridge")) for source in sources if source is not None]
    found = next((bridge for bridge in named if bridge in ours), None)
    may_be_another = any(interface.get("type") == "network" for interface in interfaces)
    return found or (named[0] if named and not may_be_another else None)
