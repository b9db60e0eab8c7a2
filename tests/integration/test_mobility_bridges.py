# SPDX-License-Identifier: GPL-3.0-or-later
"""A bridge that is the host's own, or other hosts' too, keeps its MAC; one that was the VMs' gets it back."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.mobility_agents import Agent, Agents
from integration.mobility_net import BRIDGE, FIRST_HOP, ROUTER_MAC, Namespace, small_internet

pytestmark = pytest.mark.timeout(180)


def mac(space: Namespace) -> str:
    """The bridge's MAC."""
    (link,) = space.show("link", "show", "dev", BRIDGE)
    return str(link["address"])


def addresses(space: Namespace) -> set[str]:
    """The bridge's IPv6 addresses."""
    shown = space.show("address", "show", "dev", BRIDGE)
    return {entry["local"] for link in shown for entry in link.get("addr_info", ())}


def check(agent: Agent) -> list[str]:
    """What it says of its bridge."""
    findings = agent.ask("GET", "/v1/check")["findings"]
    return [finding["fact"] for finding in findings if finding["subject"] == f"bridge {BRIDGE}"]


def test_a_bridge_with_a_card_is_left_alone_unless_it_is_meant(tmp_path: Path) -> None:
    with small_internet() as net:
        agents = Agents(net, tmp_path)
        space, agent = net["gateway1"], agents["gateway1"]
        space.ip(f"address add 2001:db8:55::1/64 dev {BRIDGE} nodad")
        space.ip(
            "link add name eno1 type vxlan id 7 dstport 0 local 2001:db8:b1::2",
            f"link set eno1 master {BRIDGE}",
        )
        before = mac(space)
        try:
            agent.start()
            # An address that only VMs know the host by does not count.
            assert check(agent) == ["leads to other hosts by eno1"]
            assert mac(space) == before != ROUTER_MAC
            assert str(FIRST_HOP) not in addresses(space)
            assert "this gateway is not its first hop until then" in agent.log
            agent.stop()
            agent.settings["bridges"][0]["shared"] = True
            agent.start()
            assert check(agent) == []
            assert mac(space) == ROUTER_MAC
            assert str(FIRST_HOP) in addresses(space)
        finally:
            agents.kill()


def test_a_gateway_that_withdraws_at_its_stop_is_no_first_hop_any_more(tmp_path: Path) -> None:
    with small_internet() as net:
        agents = Agents(net, tmp_path, withdraw_on_stop=True)
        space, agent = net["gateway1"], agents["gateway1"]
        before = mac(space), addresses(space)
        agent.settings["announce"] = True
        agent.settings["peers"] = [peer for peer in agent.settings["peers"] if not peer["anchor"]]
        agent.settings["ipv4_prefixes"] = [{"prefix": "198.51.100.0/24", "router": "198.51.100.1"}]
        try:
            agent.start()
            assert mac(space) == ROUTER_MAC
            assert str(FIRST_HOP) in addresses(space)
            assert "198.51.100.1" in _ipv4(space)
            # It knows over a restart what it found.
            agent.kill()
            agent.start()
            agent.stop()
            assert (mac(space), addresses(space)) == before
            assert _ipv4(space) == ""
            assert "data path: withdrawn" in agent.log
        finally:
            agents.kill()


def _ipv4(space: Namespace) -> str:
    """The bridge's IPv4 addresses, and whether it answers ARP for others."""
    shown = space.run("ip", "-4", "-o", "address", "show", "dev", BRIDGE).stdout
    proxy = space.run("cat", f"/proc/sys/net/ipv4/conf/{BRIDGE}/proxy_arp").stdout.strip()
    return shown + ("proxy" if proxy == "1" else "")
