# SPDX-License-Identifier: GPL-3.0-or-later
"""Messages that no agent sends: made by the test, and sent from an agent's address."""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from ipaddress import IPv6Network

from integration.mobility_agents import SECRET, Agents
from integration.mobility_net import Guest
from mobility_agent.messages.codec import Key, encode
from mobility_agent.messages.options import HandoffIndicator, Timestamp
from mobility_agent.messages.registration import Registration, home_address


def send_raw(agents: Agents, sender: str, target: str, data: bytes) -> None:
    """A packet of protocol 135 from the agent's own address."""
    net = agents.net
    source, destination = str(net.ADDRESSES[sender]), str(net.ADDRESSES[target])

    def send() -> None:
        with socket.socket(socket.AF_INET6, socket.SOCK_RAW, 135) as raw:
            raw.bind((source, 0))
            raw.sendto(data, (destination, 0))

    net[sender].inside(send)


def registration(agents: Agents, guest: Guest, gateway: str, **changes: object) -> bytes:
    """An update as the gateway would send it, with a key that the anchors know if ``key`` is not another."""
    net = agents.net
    key = changes.pop("key", Key(256, bytes.fromhex(SECRET)))
    made = Registration(
        vm=guest.vm,
        homes=(IPv6Network(guest.home),),
        care_of=net.tunnel(gateway),
        epoch=1,
        ticks=Timestamp.of_seconds(time.time()).ticks,
        lifetime_seconds=120,
        handoff=HandoffIndicator.BETWEEN_GATEWAYS,
    )
    update = replace(made, **changes).update(9)  # type: ignore[arg-type]
    source, destination = net.ADDRESSES[gateway], net.ADDRESSES["anchor1"]
    assert isinstance(key, Key)
    return encode(update, source, destination, key, care_of=source, home=home_address(update))
