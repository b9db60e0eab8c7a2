# SPDX-License-Identifier: GPL-3.0-or-later
"""Guests that make their own addresses: the role's radvd.conf, a real radvd, a guest's kernel."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv6Address
from pathlib import Path

import pytest

from integration.mobility_agents import Agents, agents_running
from integration.mobility_net import BRIDGE, FIRST_HOP, HOME_PREFIX, Guest, eventually, pings
from integration.routing_daemons import RADVD, from_template, needs_radvd

pytestmark = [pytest.mark.timeout(120), needs_radvd]


@contextmanager
def advertising(agents: Agents, gateway: str, directory: Path) -> Iterator[None]:
    """The gateway's radvd, as the role configures it."""
    variables = {
        "mobility_bridges": [{"name": BRIDGE}],
        "mobility_prefixes": [{"prefix": str(HOME_PREFIX), "advertise": True}],
    }
    text = from_template("radvd.conf.j2", variables)
    path = directory / f"{gateway}-radvd.conf"
    path.write_text(text)
    words = [str(RADVD), "--nodaemon", "--logmethod=stderr", f"--config={path}"]
    process = subprocess.Popen(
        agents.net[gateway].command(*words, f"--pidfile={directory / gateway}.pid"), stderr=subprocess.PIPE
    )
    try:
        yield
    finally:
        process.terminate()
        process.communicate(timeout=20)


def autoconfigure(guest: Guest) -> IPv6Address:
    """Let the guest make its address and find its router as an ordinary kernel does; the address."""
    guest.space.ip("address flush dev eth0 scope global", "route flush default")
    guest.space.sysctl(eth0__accept_ra=2, eth0__autoconf=1, eth0__addr_gen_mode=0)
    guest.space.ip("link set eth0 down", "link set eth0 up")

    def made() -> IPv6Address | None:
        for link in guest.space.show("address", "show", "dev", "eth0", "scope", "global"):
            for told in link.get("addr_info", ()):
                # What does not fit the filter is there, and empty.
                address = IPv6Address(told["local"]) if "local" in told else None
                if address is not None and address in HOME_PREFIX and not told.get("tentative"):
                    return address
        return None

    address = eventually(made, 30)
    assert address is not None
    return address


def test_a_guest_makes_its_address_and_keeps_router_and_address_at_the_other_site(tmp_path: Path) -> None:
    with (
        agents_running(tmp_path / "agents") as agents,
        advertising(agents, "gateway1", tmp_path),
        advertising(agents, "gateway2", tmp_path),
    ):
        guest = agents.net.guest("alone", at="gateway1")
        address = autoconfigure(guest)
        (route,) = guest.space.show("route", "show", "default")
        assert route["gateway"] == str(FIRST_HOP)
        agents["gateway1"].arrive(guest, 1, addresses=[str(address)], wait_seconds=5)
        assert pings(agents.net["client"], address)
        guest.plug(None)
        agents["gateway2"].arrive(guest, 2, addresses=[str(address)], wait_seconds=5)
        guest.plug("gateway2")
        assert pings(agents.net["client"], address)
        (route,) = guest.space.show("route", "show", "default")
        assert route["gateway"] == str(FIRST_HOP)
