# SPDX-License-Identifier: GPL-3.0-or-later
"""What of this host stands in the way of its data path; nothing is changed by asking."""

from __future__ import annotations

import contextlib

from mobility_agent.datapath import bridges
from mobility_agent.datapath.ground import Ground, OuterSource
from mobility_agent.datapath.settings import SEG6, PathSettings
from mobility_agent.errors import Finding, MobilityError


def findings(settings: PathSettings, ground: Ground) -> list[Finding]:
    """Everything at once; empty when all is well."""
    found: list[Finding] = []
    address, tunnel = settings.address, settings.tunnel_address
    if not ground.has_address(address):
        way_out = "set address to one that `ip -6 address` shows"
        found.append(Finding(f"address {address}", "is not on this host", way_out, "configuration"))
    if settings.encapsulation == SEG6 and ground.has_address(tunnel):
        way_out = "remove it from the device: what is assigned is delivered, not decapsulated"
        found.append(Finding(f"tunnel_address {tunnel}", "is assigned to a device", way_out, "conflict"))
    if _sysctl("net/ipv6/conf/all/forwarding") != "1":
        way_out = "set net.ipv6.conf.all.forwarding=1"
        found.append(Finding("this host", "does not forward IPv6", way_out, "configuration"))
    if settings.ipv4_routers and _sysctl("net/ipv4/ip_forward") != "1":
        way_out = "set net.ipv4.ip_forward=1"
        found.append(Finding("this host", "does not forward IPv4", way_out, "configuration"))
    for bridge in settings.bridges:
        found += of_bridge(settings, ground, bridge)
    uplink = ground.on_link_device(tunnel)
    if uplink is not None and _sysctl(f"net/ipv6/conf/{uplink}/proxy_ndp") != "1":
        way_out = f"set net.ipv6.conf.{uplink}.proxy_ndp=1, or route {tunnel} to this host"
        fact = f"lies on the link of {uplink}, where nobody would answer for it"
        found.append(Finding(f"tunnel_address {tunnel}", fact, way_out, "configuration"))
    elif uplink is not None and _sysctl(f"net/ipv6/neigh/{uplink}/proxy_delay") not in {"0", ""}:
        # The kernel waits at random before it answers as a proxy (RFC 4861 section 7.2.8): at a hand-over
        # the VM's first packets wait with it.
        fact = f"is answered for on the link of {uplink} after up to 0.8 s"
        way_out = f"set net.ipv6.neigh.{uplink}.proxy_delay=0"
        found.append(Finding(f"tunnel_address {tunnel}", fact, way_out, "configuration"))
    if settings.encapsulation != SEG6:
        return found
    try:
        OuterSource().close()
    except MobilityError as error:
        fact, _unused, way_out = error.message.partition("; ")
        found.append(Finding("this kernel", fact, way_out, "unsupported"))
    return found


def of_bridge(settings: PathSettings, ground: Ground, bridge: str) -> list[Finding]:
    """What of a bridge speaks against this gateway being the first hop there."""
    facts = None if bridge in settings.shared_bridges else ground.bridge_facts(bridge)
    if facts is None:
        return []
    uplinks = {ground.on_link_device(settings.tunnel_address) or "", *_default_devices()}
    return bridges.findings(bridge, facts, reached={settings.address}, uplinks=uplinks)


def _default_devices() -> set[str]:
    """The devices by which this host's default routes lead."""
    found: set[str] = set()
    # Of the namespace that this thread is in; as text, which of thousands of routes is quick to read.
    with contextlib.suppress(OSError), open("/proc/thread-self/net/route", encoding="ascii") as file:
        lines = [line.split() for line in file][1:]
        found |= {words[0] for words in lines if words[1] == words[7] == "0" * 8}
    with contextlib.suppress(OSError), open("/proc/thread-self/net/ipv6_route", encoding="ascii") as file:
        lines = [line.split() for line in file]
        found |= {words[9] for words in lines if words[0] == "0" * 32 and words[1] == "00"}
    return found


def _sysctl(name: str) -> str:
    try:
        with open(f"/proc/sys/{name}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
