# SPDX-License-Identifier: GPL-3.0-or-later
"""Instead of anchors: gateways put VMs' routes where FRR takes them, and routers follow the VM by BGP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from integration.mobility_agents import GATEWAYS, Agents, Conversation
from integration.mobility_net import HOME_PREFIX, Guest, Net, eventually, pings, small_internet
from integration.routing_daemons import Routing, frr_configuration, needs_frr

AUTONOMOUS_SYSTEMS = {"router": 65000, "gateway1": 65001, "gateway2": 65002}

pytestmark = [pytest.mark.timeout(300), needs_frr]


def role_configuration(name: str, neighbours: list[tuple[str, int]]) -> str:
    """What the role writes into frr.conf."""
    return frr_configuration(name, AUTONOMOUS_SYSTEMS[name], neighbours, [str(HOME_PREFIX)])


class Routed(Agents):
    """Two gateways without anchors."""

    def __init__(self, net: Net, directory: Path) -> None:
        super().__init__(net, directory)
        for name in (*self.of,):
            if name not in GATEWAYS:
                del self.of[name]
                continue
            settings = self.of[name].settings
            settings["announce"] = True
            settings["peers"] = [peer for peer in settings["peers"] if peer["name"] in GATEWAYS]


@contextmanager
def routed(directory: Path) -> Iterator[Routed]:
    with small_internet() as net:
        net["router"].ip(f"route del {HOME_PREFIX}")
        agents = Routed(net, directory)
        routing: list[Routing] = []
        try:
            links = {name: str(net.ADDRESSES[name] - 1) for name in GATEWAYS}
            hub = [(str(net.ADDRESSES[name]), AUTONOMOUS_SYSTEMS[name]) for name in GATEWAYS]
            routing.append(
                Routing(net["router"].command, directory / "frr-router", role_configuration("router", hub))
            )
            for name in GATEWAYS:
                text = role_configuration(name, [(links[name], AUTONOMOUS_SYSTEMS["router"])])
                routing.append(Routing(net[name].command, directory / f"frr-{name}", text))
            for agent in agents.of.values():
                agent.start()
            yield agents
        finally:
            agents.kill()
            for one in routing:
                one.end()


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
        agents["gateway2"].depart(guest, withdraw=True)
        eventually(lambda: way(net, guest) is None, 20)
