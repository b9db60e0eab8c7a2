# SPDX-License-Identifier: GPL-3.0-or-later
"""What a gateway notices on a bridge of the addresses that guests use."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from ipaddress import IPv6Address
from pathlib import Path

import pytest

from integration.mobility_agents import Agents
from integration.mobility_net import BRIDGE, FIRST_HOP, ROUTER_MAC, Net, eventually, pings, small_internet
from mobility_agent.datapath import neighbours
from mobility_agent.datapath.discovery import Responder
from mobility_agent.datapath.ground import Ground
from mobility_agent.datapath.netlink import RouteSocket

ADDRESS = IPv6Address("2001:db8:100::77")


@pytest.fixture
def net() -> Iterator[Net]:
    with small_internet() as net:
        yield net


def test_a_guest_that_asks_whether_an_address_is_free_is_heard_with_its_card(net: Net) -> None:
    guest = net.guest("guest1", "gateway1")
    heard: list[tuple[IPv6Address, str]] = []

    async def listen() -> None:
        responder = Responder(
            BRIDGE,
            ROUTER_MAC,
            FIRST_HOP,
            lambda _address, _detection: False,
            lambda address, mac: heard.append((address, mac.hex(":"))),
        )
        responder.start()
        try:
            # Duplicate detection is all that it says of this one.
            await asyncio.to_thread(guest.space.ip, f"address add {ADDRESS}/128 dev eth0")
            for _unused in range(60):
                if (ADDRESS, guest.mac) in heard:
                    return
                await asyncio.sleep(0.05)
        finally:
            responder.stop()

    net["gateway1"].inside(asyncio.run, listen())
    assert (ADDRESS, guest.mac) in heard


def test_whom_the_kernel_has_found_is_read_and_what_is_ours_is_not(net: Net) -> None:
    guest = net.guest("guest1", "gateway1")
    space = net["gateway1"]
    ground = space.inside(Ground)
    space.inside(ground.make_first_hop, BRIDGE, ROUTER_MAC, [FIRST_HOP])
    space.ip(f"route add {guest.home}/128 dev {BRIDGE}")
    assert pings(space, guest.home)
    kernel = space.inside(RouteSocket)
    ours = neighbours.Neighbour(ADDRESS, BRIDGE, "52:54:00:00:00:99")
    space.inside(kernel.apply, [space.inside(neighbours.put, ours)])

    def found() -> set[tuple[IPv6Address, str | None]]:
        return {(entry.address, entry.mac) for entry in space.inside(neighbours.seen, kernel, BRIDGE)}

    eventually(lambda: (guest.home, guest.mac) in found())
    assert ADDRESS not in {address for address, _ in found()}
    with pytest.raises(OSError, match="no interface"):
        space.inside(neighbours.seen, kernel, "nowhere")
    kernel.close()
    ground.close()


def test_an_address_that_is_free_is_learnt_and_one_that_another_vm_has_is_refused_and_told(
    tmp_path: Path,
) -> None:
    pytest.importorskip("libvirt")
    with small_internet() as net:
        agents = Agents(net, tmp_path)
        owner, other = net.guest("owner", "gateway1"), net.guest("other", "gateway2")
        definition = tmp_path / "host.xml"
        definition.write_text(
            f"<node><domain type='test'><name>other</name><uuid>{other.vm}</uuid><memory>8192</memory>"
            "<os><type>hvm</type></os><devices><interface type='bridge'>"
            f"<mac address='{other.mac}'/><source bridge='{BRIDGE}'/></interface></devices></domain></node>"
        )
        agents["gateway2"].settings |= {"hypervisor": f"test://{definition}", "learn_addresses": True}
        try:
            agents.start()
            agents.together()
            agents["gateway1"].arrive(owner, 1, wait_seconds=5)
            # Only what it asks neighbours about tells of it: nothing is routed to it yet.
            other.space.ip(f"address add {owner.home}/128 dev eth0")
            check = lambda: agents["gateway2"].ask("GET", "/v1/check")["findings"]  # noqa: E731
            found = eventually(
                lambda: [finding for finding in check() if finding["subject"] == "VM other"], 45, 0.5
            )
            assert len(found) == 1
            assert f"uses {owner.home}" in found[0]["fact"]
            assert "not learnt: anchor" in found[0]["fact"]
            for anchor in ("anchor1", "anchor2"):
                assert agents[anchor].holder(owner) == "gateway1"
                assert agents[anchor].holder(other) is None
        finally:
            agents.kill()
