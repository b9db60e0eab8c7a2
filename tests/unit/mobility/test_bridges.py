# SPDX-License-Identifier: GPL-3.0-or-later
"""Which bridges a gateway may give the MAC that all gateways share."""

from __future__ import annotations

from typing import Any

import pytest

from mobility_agent.datapath.bridges import judge_host

REACHED = ["2001:db8:1::b", "192.0.2.7", "kvm1.example.org", ""]


def link(name: str, *addresses: str, master: str = "", kind: str = "") -> dict[str, Any]:
    """A device as ``ip -json -details address show`` prints it."""
    found: dict[str, Any] = {"ifname": name, "addr_info": [{"local": address} for address in addresses]}
    found |= {"master": master} if master else {}
    return found | ({"linkinfo": {"info_kind": kind}} if kind else {})


def judged(*links: dict[str, Any], uplinks: tuple[str, ...] = (), **bridge: Any) -> list[str]:
    """What is wrong with vmbr0 on a host with these links."""
    bridges = [{"name": "vmbr0", **bridge}]
    host = {"links": links, "bridges": bridges, "reached": REACHED, "uplinks": uplinks}
    return [finding.fact for finding in judge_host(host)]


def test_a_bridge_of_the_vms_alone_is_right() -> None:
    # With an address of the host that is for the VMs alone, as libvirt's networks have it.
    own = link("vmbr0", "fe80::1", "198.51.100.1", "2001:db8:7::1", kind="bridge")
    ports = [link("vnet0", "fe80::2", master="vmbr0", kind="tun"), link("veth1", master="vmbr0", kind="veth")]
    card = link("eno1", "2001:db8:1::b")
    assert judged(own, *ports, card) == []
    assert judged(card) == []


@pytest.mark.parametrize("kind", ["", "bond", "vlan", "vxlan"])
def test_one_that_leads_to_other_hosts_is_told(kind: str) -> None:
    links = link("vmbr0"), link("eno1", master="vmbr0", kind=kind)
    assert judged(*links) == ["leads to other hosts by eno1"]
    assert judged(*links, shared=True) == []


def test_everything_is_told_of_a_bridge_that_the_host_lives_on() -> None:
    links = (
        link("vmbr0", "192.0.2.7", "2001:db8:1::b", "fe80::7", kind="bridge"),
        link("eno1", master="vmbr0"),
        link("vnet0", master="vmbr0", kind="tun"),
    )
    assert judged(*links, uplinks=("eno2", "vmbr0")) == [
        "has the address that the host is reached by, 192.0.2.7, 2001:db8:1::b",
        "leads to other hosts by eno1",
        "is the host's uplink",
    ]
