# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a bridge is the VMs' alone, judged from what netlink or ``ip`` shows of it; needs neither itself.

The gateway gives it a MAC and a link-local address that are the same on every hypervisor. On a link that
other hosts share, or that the host itself is reached by, that takes the host off the net. An address that
only the VMs know the host by (libvirt's networks have one, and DHCP by it) is no harm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from mobility_agent.errors import Finding
from mobility_agent.homes import Address

# Ports of VMs and containers; any other (a card, a bond, a VLAN, a VXLAN) leads to other hosts.
_GUESTS = frozenset({"tun", "veth", "dummy"})
_WAY_OUT = (
    "make a bridge for the VMs alone; or, where it is meant and this host gives it its own mac, set shared "
    "to true in mobility_bridges"
)


@dataclass(frozen=True, slots=True)
class BridgeFacts:
    """A bridge as it is: its addresses; its ports by name, with the kernel's word for their kind, if any."""

    addresses: tuple[Address, ...] = ()
    ports: tuple[tuple[str, str], ...] = ()


def findings(
    name: str, facts: BridgeFacts, *, reached: Collection[Address] = (), uplinks: Collection[str] = ()
) -> list[Finding]:
    """Why the bridge is not the VMs' alone; ``reached``: by which addresses others know this host."""
    told: list[str] = []
    own = [str(address) for address in facts.addresses if address in reached]
    if own:
        told.append(f"has the address that the host is reached by, {', '.join(own)}")
    leading = [port for port, kind in facts.ports if kind not in _GUESTS]
    if leading:
        told.append(f"leads to other hosts by {', '.join(leading)}")
    if name in uplinks:
        told.append("is the host's uplink")
    return [Finding(f"bridge {name}", fact, _WAY_OUT, "configuration") for fact in told]


def shown(links: Iterable[Mapping[str, Any]], name: str) -> BridgeFacts:
    """A bridge in what ``ip -json -details address show`` prints; without facts where it is not there."""
    addresses: list[Address] = []
    ports: list[tuple[str, str]] = []
    for link in links:
        if link.get("ifname") == name:
            addresses += [
                ip_address(entry["local"]) for entry in link.get("addr_info", ()) if "local" in entry
            ]
        elif link.get("master") == name:
            ports.append((str(link["ifname"]), str(link.get("linkinfo", {}).get("info_kind", ""))))
    return BridgeFacts(tuple(addresses), tuple(sorted(ports)))


def judge_host(host: Mapping[str, Any]) -> list[Finding]:
    """Of a host that is not set up yet: ``links`` as above, ``bridges``, ``reached``, ``uplinks``.

    Of ``reached`` names are left out: what they stand for only a resolver knows.
    """
    reached: set[Address] = set()
    for told in host["reached"]:
        with contextlib.suppress(ValueError):
            reached.add(ip_address(told))
    return [
        finding
        for bridge in host["bridges"]
        if not bridge.get("shared")
        for finding in findings(
            bridge["name"], shown(host["links"], bridge["name"]), reached=reached, uplinks=host["uplinks"]
        )
    ]
