# SPDX-License-Identifier: GPL-3.0-or-later
"""Each gateway with a key of its own: all understand each other, and none can speak for another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.mobility_agents import ANCHORS, GATEWAYS, Agents
from integration.mobility_forgery import registration, send_raw
from integration.mobility_net import eventually, small_internet
from integration.test_mobility_both_duties import BOTH, Lone
from mobility_agent.messages.codec import Key

pytestmark = pytest.mark.timeout(180)
OWN = {"gateway1": [301], "gateway2": [302]}


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Agents]:
    with small_internet() as net:
        agents = Agents(net, tmp_path)
        agents.give_own_keys(OWN)
        try:
            agents.start()
            yield agents
        finally:
            agents.kill()


def test_gateways_with_keys_of_their_own_hand_over_and_cannot_speak_for_each_other(agents: Agents) -> None:
    agents.together()
    assert [*agents["gateway1"].keys] == [301]
    guest = agents.settle()
    agents.move(guest, "gateway2", 2, tell=False)
    eventually(lambda: [agents[name].holder(guest) for name in ANCHORS] == ["gateway2"] * 2)
    # The anchors' word of it, by gateway1's own key.
    eventually(lambda: agents["gateway1"].vm(guest)["to"] == str(agents.net.tunnel("gateway2")))
    # gateway1's key at gateway2's address, as somebody who took gateway1 could send it.
    dropped = agents["anchor1"].counter("not_authentic")
    key = Key(301, bytes.fromhex(f"{301:032x}"))
    send_raw(agents, "gateway2", "anchor1", registration(agents, guest, "gateway2", epoch=7, key=key))
    eventually(lambda: agents["anchor1"].counter("not_authentic") > dropped)
    assert "key 301 is not one that is known of it" in agents["anchor1"].log
    binding = agents["anchor1"].binding(guest)
    assert binding is not None
    assert binding["epoch"] == 2


def test_a_key_is_changed_and_nobody_falls_silent(agents: Agents) -> None:
    agents.together()
    guest = agents.settle()
    # As the role does it: the new key beside the old one, then the new one used; anchors come first.
    for indexes in ([301, 401], [401, 301], [401]):
        agents.give_own_keys({"gateway1": indexes, "gateway2": [302]})
        for name in (*ANCHORS, *GATEWAYS):
            agents[name].kill()
            agents[name].turn_page()
            agents[name].start()
            agents.together()
        refused = [name for name in agents.of if agents[name].counter("not_authentic")]
        assert refused == []
    assert [*agents["gateway1"].keys] == [401]
    eventually(lambda: agents["gateway1"].vm(guest)["acknowledged"] == [*ANCHORS])


def test_hosts_that_are_gateway_and_anchor_at_once_use_the_key_of_whoever_asks(tmp_path: Path) -> None:
    with small_internet() as net:
        lone = Lone(net, tmp_path)
        lone.give_own_keys(OWN)
        # Each an anchor of the other.
        first = lone["gateway1"]
        first.settings["anchor"] = lone[BOTH].settings["peers"][0]["anchor"] = True
        lone.give_own_keys(OWN)
        try:
            lone.start()
            lone.together()
            guest = net.guest("guest1", "gateway1")
            answer = first.arrive(guest, 1, wait_seconds=30)
            assert sorted(answer["acknowledged"]) == [*GATEWAYS]
            lone.move(guest, BOTH, 2, tell=False)
            eventually(lambda: sorted(lone[BOTH].vm(guest)["acknowledged"]) == [*GATEWAYS])
            eventually(lambda: first.vm(guest)["to"] == str(net.tunnel(BOTH)))
        finally:
            lone.kill()
