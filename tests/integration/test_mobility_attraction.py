# SPDX-License-Identifier: GPL-3.0-or-later
"""Who announces the home prefix: the home router in peacetime, anchors while it is silent, all by FRR.

The anchors' configuration is the one in docs/mobility.md.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from integration.mobility_agents import ANCHORS, REFRESH_SECONDS, Agents, Conversation
from integration.mobility_net import BRIDGE, HOME_PREFIX, Namespace, Net, eventually, pings, small_internet
from integration.routing_daemons import ROOT, Routing, frr_configuration, needs_frr

pytestmark = [pytest.mark.timeout(300), needs_frr]

ROUTER_SYSTEM, HOME_SYSTEM = 65000, 65001
ANCHOR_SYSTEMS = {"anchor1": 65011, "anchor2": 65012}
# In the documentation: the anchor's own autonomous system and router's number, and the router beside it.
DOCUMENTED = ("65011", "192.0.2.11", "2001:db8:a1::1")


def documented(anchor: str) -> str:
    """An anchor's frr.conf as the documentation has it, with this anchor's numbers."""
    text = (ROOT / "docs/mobility.md").read_text()
    (block,) = re.findall(r"^```frr\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    system = ANCHOR_SYSTEMS[anchor]
    own = (str(system), f"192.0.2.{system - 65000}", str(Net.ADDRESSES[anchor] - 1))
    for before, after in zip(DOCUMENTED, own, strict=True):
        assert before in block
        block = block.replace(before, after)
    assert "! set as-path prepend" in block
    # As it says of the second one.
    return block.replace("! set as-path", "set as-path") if anchor == "anchor2" else block


@contextmanager
def routed(directory: Path) -> Iterator[Agents]:
    """Gateway1 is the home router, too; router, home and anchors speak BGP."""
    with small_internet() as net:
        net["router"].ip(f"route del {HOME_PREFIX}")
        # The home's own link, as its router announces it.
        net["gateway1"].ip(f"route add {HOME_PREFIX} dev {BRIDGE} proto static")
        watched = str(net.ADDRESSES["gateway1"])
        agents = Agents(net, directory)
        for name in ANCHORS:
            agents[name].settings["attraction"] = {
                "mode": "when-silent", "watch": watched, "silent_seconds": 1.0,
            }  # fmt: skip
        agents["gateway1"].settings["prefixes"][0]["native"] = True
        systems = {"gateway1": HOME_SYSTEM, **ANCHOR_SYSTEMS}
        neighbours = [(str(net.ADDRESSES[name]), system) for name, system in systems.items()]
        texts = {
            "router": frr_configuration("router", ROUTER_SYSTEM, neighbours, [str(HOME_PREFIX)]),
            "gateway1": home_router(str(net.ADDRESSES["gateway1"] - 1)),
            **{name: documented(name) for name in ANCHORS},
        }
        routing: list[Routing] = []
        try:
            for name, text in texts.items():
                routing.append(Routing(net[name].command, directory / f"frr-{name}", text))
            agents.start()
            agents.together()
            yield agents
        finally:
            agents.kill()
            for one in routing:
                one.end()


def home_router(neighbour: str) -> str:
    """What a home router announces, whoever configured it: its link, and no VM's address."""
    return f"""frr defaults datacenter
router bgp {HOME_SYSTEM}
 bgp router-id 192.0.2.1
 no bgp default ipv4-unicast
 neighbor {neighbour} remote-as {ROUTER_SYSTEM}
 address-family ipv6 unicast
  network {HOME_PREFIX}
  neighbor {neighbour} activate
 exit-address-family
"""


def way(net: Net) -> str | None:
    """The link on which the router between all sites sends the home prefix's packets."""
    found = net["router"].show("route", "show", str(HOME_PREFIX))
    return str(found[0].get("dev")) if found else None


def status(agents: Agents, anchor: str) -> dict[str, object]:
    """What this anchor attracts."""
    found: dict[str, object] = agents[anchor].ask("GET", "/v1/status")["anchor"]["attraction"]
    return found


def told_of(client: Namespace, address: str) -> str:
    """What a ping of an address is answered."""
    return client.run("ping", "-6", "-c", "1", "-W", "1", address, check=False).stdout.lower()


def power(net: Net, name: str, state: str) -> None:
    """The link of a router, an anchor or a site goes down, or comes back with its way out."""
    net[name].ip(f"link set up0 {state}")
    if state == "up":
        net[name].ip(f"route replace default via {net.ADDRESSES[name] - 1}")


def test_the_anchors_announce_the_prefix_while_the_home_router_is_silent(tmp_path: Path) -> None:
    with routed(tmp_path) as agents:
        net, client = agents.net, agents.net["client"]
        eventually(lambda: way(net) == "gateway1", 60)
        guest = net.guest("guest", "gateway1")
        agents["gateway1"].arrive(guest, 1, wait_seconds=5)
        assert pings(client, guest.home)
        talk = Conversation(client, guest)
        talk.goes_on()
        assert [status(agents, name)["attracting"] for name in ANCHORS] == [False, False]

        # The home site is gone, its VM runs elsewhere: nobody there is told.
        power(net, "gateway1", "down")
        agents["gateway2"].arrive(guest, 2)
        guest.plug("gateway2")
        began = time.monotonic()
        eventually(lambda: way(net) == "anchor1", 30)
        taken_over = time.monotonic() - began
        talk.goes_on(20)
        assert "silent; this anchor takes over" in agents["anchor1"].log
        assert pings(client, guest.home)
        # What is bound nowhere ends at the anchor, and does not go round; the kernel tells of that at a
        # limited rate, not for each packet.
        nowhere = str(guest.home + 0x100)
        eventually(lambda: "unreachable" in told_of(client, nowhere), 30)

        # The anchor in use dies: the other one has announced the prefix all along, only worse.
        power(net, "anchor1", "down")
        began = time.monotonic()
        eventually(lambda: way(net) == "anchor2", 30)
        by_the_other = time.monotonic() - began
        talk.goes_on(20)
        power(net, "anchor1", "up")
        eventually(lambda: way(net) == "anchor1", 60)
        talk.goes_on(20)

        # A restart of agents changes nothing of what is announced.
        for name in ANCHORS:
            agents[name].kill()
            assert way(net) == "anchor1"
            agents[name].start()
        time.sleep(2)
        assert way(net) == "anchor1"
        assert [status(agents, name)["attracting"] for name in ANCHORS] == [True, True]

        # Home again: it hears first that the VM is elsewhere, and gets the prefix back then.
        power(net, "gateway1", "up")
        eventually(lambda: way(net) == "gateway1", REFRESH_SECONDS + 30)
        assert agents["gateway1"].vm(guest)["to"] == str(net.tunnel("gateway2"))
        eventually(
            lambda: [status(agents, name)["attracting"] for name in ANCHORS] == [False, False],
            REFRESH_SECONDS + 30,
        )
        assert way(net) == "gateway1"
        for name in ANCHORS:
            assert "answers again; it has back" in agents[name].log
        talk.goes_on(20)
        talk.end()
        print({"taken_over_seconds": round(taken_over, 2), "other_anchor_seconds": round(by_the_other, 2)})
