# SPDX-License-Identifier: GPL-3.0-or-later
"""What agents refuse: messages late, played again, garbled or signed with another key, and bad input."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path

import pytest

from integration.mobility_agents import Agents, Refused, agents_running
from integration.mobility_forgery import registration, send_raw
from integration.mobility_net import eventually
from mobility_agent.messages.codec import decode
from mobility_agent.messages.headers import BindingAcknowledgement, Status
from mobility_agent.messages.options import HandoffIndicator, Timestamp


def test_a_stale_update_played_again_changes_nothing(agents: Agents) -> None:
    guest = agents.settle()
    old = registration(agents, guest, "gateway1", epoch=2, handoff=HandoffIndicator.NEW_INTERFACE)
    send_raw(agents, "gateway1", "anchor1", old)
    eventually(lambda: agents["anchor1"].binding(guest)["epoch"] == 2)  # type: ignore[index]
    agents.move(guest, "gateway2", 3)
    eventually(lambda: agents["anchor1"].holder(guest) == "gateway2")
    send_raw(agents, "gateway1", "anchor1", old)
    eventually(lambda: "refused (stale-epoch)" in agents["anchor1"].log)
    again = registration(agents, guest, "gateway2", epoch=3, lifetime_seconds=0, ticks=1)
    send_raw(agents, "gateway2", "anchor1", again)
    eventually(lambda: "refused (replay)" in agents["anchor1"].log)
    assert agents["anchor1"].holder(guest) == "gateway2"


def test_a_clock_off_by_minutes_is_answered_with_the_anchors_time(agents: Agents) -> None:
    net = agents.net
    guest = net.guest("guest1", "gateway1")
    data = registration(agents, guest, "gateway1", ticks=Timestamp.of_seconds(time.time() - 300).ticks)
    heard: list[BindingAcknowledgement] = []
    source = net.ADDRESSES["gateway1"]

    def ask() -> None:
        with socket.socket(socket.AF_INET6, socket.SOCK_RAW, 135) as raw:
            raw.bind((str(source), 0))
            raw.settimeout(5)
            raw.sendto(data, (str(net.ADDRESSES["anchor1"]), 0))
            while not heard:
                answer, origin = raw.recvfrom(2048)
                message = (
                    decode(answer, net.ADDRESSES["anchor1"], source).message
                    if (origin[0] == str(net.ADDRESSES["anchor1"]))
                    else None
                )
                if isinstance(message, BindingAcknowledgement):
                    heard.append(message)

    net["gateway1"].inside(ask)
    assert heard[0].status == Status.TIMESTAMP_MISMATCH
    assert agents["anchor1"].binding(guest) is None
    # What the message takes to get there counts, too.
    assert re.search(r"the clock of gateway1 is 30[0-9]\.\d s behind", agents["anchor1"].log)


def test_garbage_and_truncated_messages_are_counted_and_do_no_harm(agents: Agents) -> None:
    guest = agents.settle()
    whole = registration(agents, guest, "gateway2", epoch=9)
    malformed, strangers = (agents["anchor1"].counter(what) for what in ("malformed", "unknown_peer"))
    for cut in range(8, len(whole), 7):
        send_raw(agents, "gateway2", "anchor1", whole[:cut])
    for size in (8, 16, 64, 500, 1400):
        send_raw(agents, "gateway2", "anchor1", os.urandom(size))
    eventually(lambda: agents["anchor1"].counter("malformed") >= malformed + 20)
    assert "from gateway2" in agents["anchor1"].log
    assert agents["anchor1"].holder(guest) == "gateway1"
    # A stranger gets no answer and no log line for each of its packets.
    send_raw(agents, "client", "anchor1", b"x" * 64)
    eventually(lambda: agents["anchor1"].counter("unknown_peer") == strangers + 1)


def test_a_wrong_key_is_told_on_both_sides(tmp_path: Path) -> None:
    secrets = {"gateway1": "ff" * 16}
    with agents_running(tmp_path, secrets=secrets) as agents:
        guest = agents.net.guest("guest1", "gateway1")
        answer = agents["gateway1"].arrive(guest, 1, wait_seconds=1)
        assert answer["acknowledged"] == []
        assert agents["anchor1"].binding(guest) is None
        assert "from gateway1 (2001:db8:b1::2): wrong authenticator for key 256" in agents["anchor1"].log
        findings = agents["gateway1"].ask("GET", "/v1/check")["findings"]
        assert {"anchor anchor1", "anchor anchor2"} <= {finding["subject"] for finding in findings}
        assert any("another key" in finding["way_out"] for finding in findings)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"addresses": ["2001:db8:200::1"]}, "2001:db8:200::1/128 is in no home prefix"),
        (
            {"addresses": ["192.0.2.5"]},
            "192.0.2.5/32 is IPv4, which tunnels do not carry",
        ),
        ({"addresses": []}, "write a list of addresses"),
        ({"bridge": "nowhere"}, "no gateway on bridge nowhere; use one of vmbr0"),
        ({"mac": "52:54:00:zz:00:01"}, "write a MAC address like"),
        ({"epoch": -1}, "write a whole number"),
        ({"epok": 1}, "no such setting; did you mean epoch?"),
    ],
)
def test_bad_input_is_refused_in_one_sentence_and_changes_nothing(
    agents: Agents, body: dict[str, object], words: str
) -> None:
    guest = agents.net.guest("guest1", "gateway1")
    with pytest.raises(Refused) as told:
        agents["gateway1"].arrive(guest, 1, **body)
    assert told.value.status == 400
    assert words in str(told.value)
    # One of the test before may be on its way out of the list still.
    assert guest.vm not in {vm["vm"] for vm in agents["gateway1"].ask("GET", "/v1/vms")["vms"]}


def test_an_ipv4_address_in_a_definition_is_left_out_and_told(agents: Agents) -> None:
    guest = agents.net.guest("guest1", "gateway1")
    homes = "".join(f"<address>{home}</address>" for home in (guest.home, "198.51.100.5"))
    definition = (
        f"<domain><uuid>{guest.vm}</uuid><name>web1</name>"
        f'<metadata><addresses xmlns="urn:lifeboat:mobility:1">{homes}</addresses></metadata>'
        f"<devices><interface><source bridge='vmbr0'/><mac address='{guest.mac}'/></interface></devices>"
        "</domain>"
    )
    body = {"epoch": 1, "definition": definition, "wait_seconds": 30}
    answer = agents["gateway1"].ask("POST", f"/v1/vms/{guest.vm}/arrive", body)
    assert answer["addresses"] == [f"{guest.home}/128"]
    assert answer["acknowledged"] == ["anchor1", "anchor2"]
    told = "198.51.100.5/32 is IPv4, which tunnels do not carry, and is left out; give it IPv6 addresses"
    assert told in agents["gateway1"].log


def test_the_same_address_for_two_vms_is_refused(agents: Agents) -> None:
    one, other = agents.settle("guest1", "gateway1"), agents.net.guest("guest2", "gateway1")
    with pytest.raises(Refused, match=f"is the address of VM {one.vm}, which is here"):
        agents["gateway1"].arrive(other, 1, addresses=[str(one.home)])
    agents["gateway2"].arrive(other, 1, addresses=[str(one.home)])
    eventually(lambda: "refused (duplicate-address)" in agents["anchor1"].log)
    assert agents["anchor1"].holder(one) == "gateway1"


def test_an_epoch_older_than_the_gateway_itself_knows_is_refused(agents: Agents) -> None:
    guest = agents.settle(epoch=5)
    with pytest.raises(Refused) as told:
        agents["gateway1"].arrive(guest, 4)
    assert told.value.status == 409
