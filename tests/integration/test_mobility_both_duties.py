# SPDX-License-Identifier: GPL-3.0-or-later
"""A host that is gateway and anchor at once, and the only anchor: the smallest set-up of two hypervisors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.mobility_agents import ANCHORS, GATEWAYS, Agents, Conversation
from integration.mobility_net import Net, eventually, pings, small_internet

BOTH = "gateway2"


class Lone(Agents):
    """Two gateways, the second of which is the anchor of both."""

    def __init__(self, net: Net, directory: Path) -> None:
        # Sends on itself for a moment only: after it, what the anchor knows must carry the packets.
        super().__init__(net, directory, forward_seconds=1)
        for name in ANCHORS:
            del self.of[name]
        for name in GATEWAYS:
            settings = self.of[name].settings
            settings["anchor"] = name == BOTH
            settings["peers"] = [peer for peer in settings["peers"] if peer["name"] in GATEWAYS]
            other = next(one for one in GATEWAYS if one != name)
            if not settings["peers"]:
                settings["peers"] = [
                    {
                        "name": other,
                        "address": str(net.ADDRESSES[other]),
                        "tunnel_address": str(net.tunnel(other)),
                        "gateway": True,
                    }
                ]
            settings["peers"][0]["anchor"] = other == BOTH


@pytest.fixture
def lone(tmp_path: Path) -> Iterator[Lone]:
    with small_internet() as net:
        agents = Lone(net, tmp_path)
        try:
            net.attract(BOTH)
            agents.start()
            agents.together()
            yield agents
        finally:
            agents.kill()


def test_a_conversation_follows_a_vm_to_the_anchors_own_bridge_and_away_again(lone: Lone) -> None:
    net = lone.net
    guest = net.guest("guest1", "gateway1")
    assert lone["gateway1"].arrive(guest, 1, wait_seconds=30)["acknowledged"] == [BOTH]
    talk = Conversation(net["client"], guest)
    lone.move(guest, BOTH, 2)
    talk.goes_on()
    eventually(lambda: lone[BOTH].holder(guest) == BOTH)
    eventually(lambda: lone[BOTH].vm(guest)["acknowledged"] == [BOTH])
    assert guest.pings(net.ADDRESSES["client"])
    # It leaves, and nobody tells its old gateway where to: the anchor beside it knows.
    lone.move(guest, "gateway1", 3, tell=False)
    lone[BOTH].depart(guest)
    talk.goes_on()
    eventually(lambda: lone[BOTH].holder(guest) == "gateway1")
    time.sleep(2)
    talk.goes_on()
    talk.end()


def test_neighbours_at_the_anchor_and_elsewhere_reach_each_other(lone: Lone) -> None:
    net = lone.net
    here, there = net.guest("here", BOTH), net.guest("there", "gateway1")
    assert lone[BOTH].arrive(here, 1, wait_seconds=30)["acknowledged"] == [BOTH]
    assert lone["gateway1"].arrive(there, 1, wait_seconds=30)["acknowledged"] == [BOTH]
    assert here.pings(there.home)
    assert there.pings(here.home)
    assert pings(net["client"], here.home)
    status = lone[BOTH].ask("GET", "/v1/status")
    assert status["anchor"]["bindings"] == 2
    assert status["gateway"]["anchor_in_use"] == BOTH


def test_restarted_it_has_its_own_vms_bound_again(lone: Lone) -> None:
    net = lone.net
    guest = net.guest("guest1", BOTH)
    lone[BOTH].arrive(guest, 1, wait_seconds=30)
    lone[BOTH].kill()
    lone[BOTH].start()
    eventually(lambda: lone[BOTH].vm(guest)["acknowledged"] == [BOTH])
    assert lone[BOTH].holder(guest) == BOTH
    assert pings(net["client"], guest.home)
