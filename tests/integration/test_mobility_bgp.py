# SPDX-License-Identifier: GPL-3.0-or-later
"""Instead of anchors: gateways put VMs' routes where FRR takes them, and routers follow the VM by BGP."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from integration.mobility_agents import GATEWAYS, Agents, Conversation, Refused
from integration.mobility_net import (
    HOME_PREFIX,
    ROUTER_MAC,
    Guest,
    Namespace,
    Net,
    eventually,
    pings,
    small_internet,
)
from integration.routing_daemons import Routing, frr_configuration, needs_frr

IPV4_PREFIX, IPV4_ROUTER = IPv4Network("198.51.100.0/24"), IPv4Address("198.51.100.1")
AUTONOMOUS_SYSTEMS = {"router": 65000, "gateway1": 65001, "gateway2": 65002}

pytestmark = [pytest.mark.timeout(300), needs_frr]


class Routed(Agents):
    """Two gateways without anchors."""

    def __init__(self, net: Net, directory: Path, ipv4: bool) -> None:
        super().__init__(net, directory)
        for name in (*self.of,):
            if name not in GATEWAYS:
                del self.of[name]
                continue
            settings = self.of[name].settings
            settings["announce"] = True
            settings["peers"] = [peer for peer in settings["peers"] if peer["name"] in GATEWAYS]
            if ipv4:
                settings["ipv4_prefixes"] = [{"prefix": str(IPV4_PREFIX), "router": str(IPV4_ROUTER)}]


@contextmanager
def routed(directory: Path, *, ipv4: bool = False) -> Iterator[Routed]:
    """Agents and FRR, as the role configures it, on both gateways and the router."""
    prefixes = [str(HOME_PREFIX), *([str(IPV4_PREFIX)] if ipv4 else [])]
    with small_internet() as net:
        net["router"].ip(f"route del {HOME_PREFIX}")
        if ipv4:
            _add_ipv4(net)
        agents = Routed(net, directory, ipv4)
        routing: list[Routing] = []

        def route(name: str, neighbours: list[tuple[str, int]]) -> None:
            text = frr_configuration(name, AUTONOMOUS_SYSTEMS[name], neighbours, prefixes)
            routing.append(Routing(net[name].command, directory / f"frr-{name}", text))

        try:
            route("router", [(str(net.ADDRESSES[name]), AUTONOMOUS_SYSTEMS[name]) for name in GATEWAYS])
            for name in GATEWAYS:
                route(name, [(str(net.ADDRESSES[name] - 1), AUTONOMOUS_SYSTEMS["router"])])
            for agent in agents.of.values():
                agent.start()
            yield agents
        finally:
            agents.kill()
            for one in routing:
                one.end()


def _ip4(space: Namespace, *lines: str) -> None:
    for line in lines:
        space.run("ip", "-4", *line.split())


def _add_ipv4(net: Net) -> None:
    """The client's link has IPv4; between router and gateways it goes by way of IPv6 (RFC 8950)."""
    _ip4(net["router"], "address add 203.0.113.1/24 dev client")
    _ip4(net["client"], "address add 203.0.113.2/24 dev up0", "route add default via 203.0.113.1")
    for name in GATEWAYS:
        _ip4(net[name], f"route add default via inet6 {net.ADDRESSES[name] - 1} dev up0")
    for name in ("router", *GATEWAYS):
        net[name].inside(Path("/proc/sys/net/ipv4/ip_forward").write_text, "1")


def _give_ipv4(guest: Guest) -> str:
    """An address of the IPv4 home prefix, configured in the guest as ever."""
    address = str(IPV4_PREFIX.network_address + 0x10 + guest.number)
    _ip4(guest.space, f"address add {address}/24 dev eth0", f"route add default via {IPV4_ROUTER}")
    guest.more_homes = [address]
    return address


def _pings_ipv4(space: Namespace, target: str) -> bool:
    def answered() -> bool:
        return space.run("ping", "-4", "-c", "1", "-W", "1", target, check=False).returncode == 0

    return eventually(answered, 60)


def _resolved(guest: Guest, address: str) -> str | None:
    """The MAC at which this guest believes the address to be."""
    words = ("ip", "-4", "-json", "neighbour", "show", "to", address, "dev", "eth0")
    found = json.loads(guest.space.run(*words).stdout or "[]")
    return str(found[0].get("lladdr")) if found else None


def way4(net: Net, address: str) -> str | None:
    """The gateway to which the router sends packets for an IPv4 address."""
    found = json.loads(net["router"].run("ip", "-4", "-json", "route", "show", address).stdout or "[]")
    return str(found[0]["dev"]) if found else None


def way(net: Net, guest: Guest) -> str | None:
    """The gateway to which the router sends the guest's packets."""
    found: list[dict[str, Any]] = net["router"].show("route", "show", str(guest.home))
    device = found[0].get("dev") if found else None
    return None if device is None else str(device)


def test_routers_follow_a_vm_by_bgp_and_its_connection_goes_on(tmp_path: Path) -> None:
    with routed(tmp_path) as agents:
        net = agents.net
        guest, other = net.guest("routed", "gateway1"), net.guest("neighbour", "gateway1")
        agents["gateway1"].arrive(guest, 1)
        agents["gateway1"].arrive(other, 1)
        eventually(lambda: way(net, guest) == "gateway1", 60)
        assert pings(net["client"], guest.home)
        talk = Conversation(net["client"], guest)
        for epoch, to in ((2, "gateway2"), (3, "gateway1"), (4, "gateway2")):
            agents.move(guest, to, epoch)
            eventually(lambda to=to: way(net, guest) == to, 20)
            talk.goes_on()
        talk.end()
        assert talk.failures == []
        # Neighbours at two sites reach each other, by what routing knows.
        assert guest.pings(other.home)
        # The site that it left dies: nothing of it is needed any more.
        net["router"].ip("link set gateway1 down")
        assert pings(net["client"], guest.home)
        # A host loses power: routing is told of the VM when it runs there again, and not from a journal.
        agents["gateway2"].kill()
        (agents["gateway2"].directory / "run" / "mobility.lock").unlink()
        net["gateway2"].run("ip", "-6", "route", "flush", "table", "main", "proto", "76")
        eventually(lambda: way(net, guest) is None, 20)
        agents["gateway2"].start()
        time.sleep(1)
        assert way(net, guest) is None
        agents["gateway2"].arrive(guest, 4)
        eventually(lambda: way(net, guest) == "gateway2", 20)
        agents["gateway2"].depart(guest, withdraw=True)
        eventually(lambda: way(net, guest) is None, 20)


def test_ipv4_addresses_follow_a_vm_by_bgp_beside_its_ipv6_ones(tmp_path: Path) -> None:
    with routed(tmp_path, ipv4=True) as agents:
        net = agents.net
        guest, other, third = (net.guest(name, "gateway1") for name in ("routed", "other", "third"))
        address, neighbour, alone = (_give_ipv4(one) for one in (guest, other, third))
        for one in (guest, other):
            agents["gateway1"].arrive(one, 1)
        agents["gateway1"].arrive(third, 1, addresses=[alone])
        eventually(lambda: way4(net, address) == "gateway1", 60)
        assert _pings_ipv4(net["client"], address)
        assert _pings_ipv4(third.space, address)
        assert _resolved(third, address) == guest.mac
        talk = Conversation(net["client"], guest, address)
        for epoch, to in ((2, "gateway2"), (3, "gateway1"), (4, "gateway2")):
            agents.move(guest, to, epoch)
            eventually(lambda to=to: way4(net, address) == to, 20)
            talk.goes_on()
            # Neighbours by ARP, whether they are on one link or at two sites; who knew its MAC is told.
            assert _pings_ipv4(guest.space, neighbour)
            assert _pings_ipv4(other.space, address)
            expected = guest.mac if to == "gateway1" else ROUTER_MAC
            eventually(lambda expected=expected: _resolved(third, address) == expected)
        talk.end()
        assert way(net, guest) == "gateway2"
        # What stands in the kernel stays while the agent is down, and is read back.
        agents["gateway2"].kill()
        assert _pings_ipv4(net["client"], address)
        agents["gateway2"].start()
        assert agents["gateway2"].vm(guest)["addresses"] == [f"{guest.home}/128", f"{address}/32"]
        assert _pings_ipv4(net["client"], address)
        agents["gateway2"].depart(guest, withdraw=True)
        eventually(lambda: way4(net, address) is None, 20)


def test_ipv4_addresses_are_refused_where_they_cannot_be_meant(tmp_path: Path) -> None:
    with routed(tmp_path, ipv4=True) as agents:
        guest = agents.net.guest("guest", "gateway1")
        for address, words in (
            ("192.0.2.5", "192.0.2.5/32 is in no home prefix"),
            (str(IPV4_ROUTER), f"{IPV4_ROUTER}/32 is the router's address"),
        ):
            with pytest.raises(Refused, match=words):
                agents["gateway1"].arrive(guest, 1, addresses=[address])
        assert agents["gateway1"].ask("GET", "/v1/vms")["vms"] == []
