# SPDX-License-Identifier: GPL-3.0-or-later
"""An anchor on the home link: it answers there for VMs that are away, and no more for one that is back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.mobility_agents import Agents, agents_running
from integration.mobility_net import BRIDGE, HOME_PREFIX, Guest, Namespace, eventually, pings

pytestmark = pytest.mark.timeout(180)
HOME_ROUTER, HOME_ROUTER_MAC = "fe80::a", "02:00:00:00:0a:01"


class HomeLink:
    """A switch with the anchor's port, and one for each host that is plugged in."""

    DEVICE = "lan0"

    def __init__(self, agents: Agents, anchor: str) -> None:
        self._net = agents.net
        self._switch = self._net.space("lan")
        self._switch.ip("link add lan type bridge", "link set lan up")
        self._net.wire(self._net[anchor], self.DEVICE, self._switch, "anchor")
        self._switch.ip("link set anchor master lan")
        # As on any router of that link.
        self._net[anchor].ip(f"route add {HOME_PREFIX} dev {self.DEVICE}")
        (link,) = self._net[anchor].show("link", "show", "dev", self.DEVICE)
        self.anchor_mac = str(link["address"])

    def plug_gateway(self, gateway: str) -> None:
        """The gateway's bridge is this link from now on: its VMs are at home here."""
        self._net.wire(self._net[gateway], self.DEVICE, self._switch, gateway)
        self._switch.ip(f"link set {gateway} master lan")
        self._net[gateway].ip(f"link set {self.DEVICE} master {BRIDGE}")

    def router(self) -> Namespace:
        """A physical router of the link, to which the internet leads the home prefix."""
        space, router = self._net.space("homerouter"), self._net["router"]
        self._net.wire(space, self.DEVICE, self._switch, "homerouter")
        self._switch.ip("link set homerouter master lan")
        self._net.wire(space, "up0", router, "home")
        space.sysctl(all__forwarding=1)
        space.ip(
            f"link set {self.DEVICE} address {HOME_ROUTER_MAC}",
            f"address add {HOME_ROUTER}/64 dev {self.DEVICE} nodad",
            f"route add {HOME_PREFIX} dev {self.DEVICE}",
            "address add 2001:db8:40::2/64 dev up0 nodad",
            "route add default via 2001:db8:40::1",
        )
        router.ip("address add 2001:db8:40::1/64 dev home nodad")
        self.lead_home()
        return space

    def lead_home(self) -> None:
        """The internet leads the home prefix to the home router."""
        self._net["router"].ip(f"route replace {HOME_PREFIX} via 2001:db8:40::2")

    def host(self, name: str, address: object) -> Namespace:
        """A host with an address of the home prefix, on-link like all its neighbours."""
        space = self._net.space(name)
        self._net.wire(space, "eth0", self._switch, name)
        self._switch.ip(f"link set {name} master lan")
        space.ip(f"address add {address}/{HOME_PREFIX.prefixlen} dev eth0 nodad")
        return space


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Agents]:
    with agents_running(tmp_path) as agents:
        yield agents


def whom(space: Namespace, guest: Guest) -> str | None:
    """The MAC that a neighbour has for the guest's address."""
    found = space.show("neighbour", "show", "to", str(guest.home), "dev", "eth0")
    return str(found[0]["lladdr"]) if found and "lladdr" in found[0] else None


def home_link(agents: Agents, *gateways: str, attraction: str = "never") -> HomeLink:
    """The home link at anchor1, on which the VMs of these gateways are at home."""
    link = HomeLink(agents, "anchor1")
    for gateway in gateways:
        link.plug_gateway(gateway)
    anchor = agents["anchor1"]
    anchor.stop()
    anchor.settings["prefixes"][0] |= {"link": link.DEVICE, "link_gateways": [*gateways]}
    anchor.settings["attraction"] = {"mode": attraction}
    # Its link-local address is checked for a moment before it can be used.
    eventually(lambda: not _tentative(agents.net["anchor1"], link.DEVICE), 20)
    anchor.start()
    agents.together()
    return link


def test_a_vm_at_home_keeps_its_address_and_neighbours_follow_it_away_and_back(agents: Agents) -> None:
    link = home_link(agents, "gateway1", attraction="always")
    net, anchor = agents.net, agents["anchor1"]
    neighbour = link.host("neighbour", HOME_PREFIX.network_address + 0x99)
    guest = agents.settle()
    assert pings(neighbour, guest.home)
    assert whom(neighbour, guest) == guest.mac
    assert not _tunnelled(net["anchor1"], guest)
    # It boots again, and asks whether its address is free.
    guest.space.ip(f"address del {guest.home}/64 dev eth0", f"address add {guest.home}/64 dev eth0")
    eventually(lambda: not _tentative(guest.space, "eth0"))
    assert not _failed(guest.space, guest)
    assert pings(neighbour, guest.home)

    # It leaves, and there is nobody at home but the anchor to say so.
    agents["gateway1"].kill()
    agents.move(guest, "gateway2", 2, tell=False)
    eventually(lambda: whom(neighbour, guest) == link.anchor_mac, 5)
    assert pings(neighbour, guest.home)
    assert pings(net["client"], guest.home)
    assert _tunnelled(net["anchor1"], guest)

    # It comes back: the home gateway has it, and nobody withdrew it.
    agents["gateway1"].start()
    agents.together()
    agents.move(guest, "gateway1", 3)
    eventually(lambda: anchor.holder(guest) == "gateway1")
    eventually(lambda: not _tunnelled(net["anchor1"], guest))
    neighbour.ip("neighbour flush dev eth0")
    assert pings(neighbour, guest.home)
    assert whom(neighbour, guest) == guest.mac
    assert pings(net["client"], guest.home)
    # So it is after a restart.
    anchor.kill()
    anchor.start()
    assert anchor.holder(guest) == "gateway1"
    assert not _tunnelled(net["anchor1"], guest)
    assert pings(net["client"], guest.home)


def test_a_vm_keeps_its_physical_home_router_wherever_it_is(agents: Agents) -> None:
    net, client = agents.net, agents.net["client"]
    bridges = {
        # At home the router is another: a gateway there has a MAC and an address of its own.
        "gateway1": {"mac": "02:00:00:00:b1:01", "link_local": "fe80::b1", "shared": True},
        "gateway2": {"mac": HOME_ROUTER_MAC, "link_local": HOME_ROUTER},
    }
    for name, bridge in bridges.items():
        agents[name].stop()
        agents[name].settings["bridges"] = [{"name": BRIDGE, **bridge}]
    agents["gateway1"].settings["prefixes"][0]["native"] = True
    for name in bridges:
        agents[name].start()
    link = home_link(agents, "gateway1")
    router = link.router()
    guest = net.guest("guest1", "gateway1")
    guest.space.ip(f"route replace default via {HOME_ROUTER} dev eth0")
    agents["gateway1"].arrive(guest, 1, wait_seconds=5)
    assert pings(client, guest.home)
    assert _router_mac(guest) == HOME_ROUTER_MAC

    # Away, and home's router still leads its prefix: the anchor answers on the link and tunnels.
    agents.move(guest, "gateway2", 2)
    eventually(lambda: agents["anchor1"].holder(guest) == "gateway2")
    assert pings(client, guest.home)
    assert guest.pings(net.ADDRESSES["client"])
    assert _router_mac(guest) == HOME_ROUTER_MAC
    # Home falls.
    router.ip("link set up0 down", f"link set {link.DEVICE} down")
    net.attract("anchor1")
    assert pings(client, guest.home)
    assert guest.pings(net.ADDRESSES["client"])

    router.ip("link set up0 up", f"link set {link.DEVICE} up")
    router.ip("route replace default via 2001:db8:40::1", f"route replace {HOME_PREFIX} dev {link.DEVICE}")
    link.lead_home()
    agents.move(guest, "gateway1", 3)
    eventually(lambda: not _tunnelled(net["anchor1"], guest))
    assert pings(client, guest.home)
    assert guest.pings(net.ADDRESSES["client"])
    assert _router_mac(guest) == HOME_ROUTER_MAC


def test_a_neighbour_at_home_reaches_a_vm_that_is_away_and_one_that_is_withdrawn(agents: Agents) -> None:
    link = home_link(agents)
    anchor = agents["anchor1"]
    neighbour = link.host("neighbour", HOME_PREFIX.network_address + 0x99)
    guest = agents.net.guest("far", at="gateway2")
    agents["gateway2"].arrive(guest, 1, wait_seconds=5)
    assert pings(neighbour, guest.home)
    assert whom(neighbour, guest) == link.anchor_mac
    # Nobody may take the address of a VM that is away.
    thief = link.host("thief", HOME_PREFIX.network_address + 0x98)
    thief.ip(f"address add {guest.home}/128 dev eth0")
    eventually(lambda: _failed(thief, guest), 10)
    thief.ip(f"address del {guest.home}/128 dev eth0")

    # It runs nowhere: no tunnel, no answer for it; whoever has the address on the link has it.
    agents["gateway2"].depart(guest, withdraw=True)
    eventually(lambda: anchor.holder(guest) is None)
    guest.plug(None)
    returned = link.host("returned", guest.home)
    assert pings(neighbour, guest.home)
    neighbour.ip("neighbour flush dev eth0")
    assert pings(neighbour, guest.home)
    (own,) = returned.show("link", "show", "dev", "eth0")
    assert whom(neighbour, guest) == own["address"]


def _router_mac(guest: Guest) -> str:
    (found,) = guest.space.show("neighbour", "show", "to", HOME_ROUTER, "dev", "eth0")
    return str(found["lladdr"])


def _tunnelled(anchor: Namespace, guest: Guest) -> bool:
    return any(route["dst"] == str(guest.home) for route in anchor.show("route", "show", "table", "7601"))


def _tentative(space: Namespace, device: str) -> bool:
    told = [entry for link in space.show("address", "show", "dev", device) for entry in link["addr_info"]]
    return not told or any(entry.get("tentative") for entry in told)


def _failed(space: Namespace, guest: Guest) -> bool:
    told = [entry for link in space.show("address", "show", "dev", "eth0") for entry in link["addr_info"]]
    return any(entry.get("dadfailed") for entry in told if entry.get("local") == str(guest.home))
