# SPDX-License-Identifier: GPL-3.0-or-later
"""Mobility in the lab: gateways, anchors, where the internet leads a home prefix, who keeps its address."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lifeboat_lab.guests.guests import Guest
from lifeboat_lab.network import GUEST_GATEWAY_MAC
from lifeboat_lab.settings import HOSTS

if TYPE_CHECKING:
    from lifeboat_lab.lab import Lab

METADATA_URI = "urn:lifeboat:mobility:1"


def inventory(gateways: Iterable[str], anchors: Iterable[str], prefixes: Iterable[str]) -> dict[str, Any]:
    """The group `mobility`, as an operator has it beside the groups of sites; keys are new each time."""
    gateways, anchors = tuple(gateways), tuple(anchors)
    hosts = {
        name: {
            "mobility_address": HOSTS[name].address,
            "mobility_tunnel_address": _tunnel(name),
            "mobility_gateway": name in gateways,
            "mobility_anchor": name in anchors,
        }
        for name in (*anchors, *gateways)
    }
    common = {
        "mobility_keys": [{"index": 256, "secret": secrets.token_hex(32)}],
        "mobility_prefixes": [{"prefix": prefix} for prefix in prefixes],
        "mobility_bridges": [{"name": "vmbr0", "mac": GUEST_GATEWAY_MAC}],
        "mobility_uplink": "site0",
    }
    return {"mobility": {"hosts": hosts, "vars": common}}


def _tunnel(name: str) -> str:
    return f"{HOSTS[name].address.rpartition(':')[0]}:{0xD000 + HOSTS[name].number:x}"


def open_settings(lab: Lab, names: Iterable[str]) -> None:
    """Let kernel settings be changed, as on a host of one's own; a container has them read-only."""
    for name in names:
        lab.exec(name, "mount", "-o", "remount,bind,rw", "/proc/sys")
        # After a power cut: what udev does for each device, and these hosts have no udev.
        lab.exec(name, "sysctl", "--quiet", "--system", check=False)


def lead_prefix_to(lab: Lab, prefix: str, name: str) -> None:
    """The internet's routing: packets for the home prefix go to this host of the lab."""
    plan = HOSTS[name]
    lab.exec("router", "ip", "-6", "route", "replace", prefix, "via", plan.address, "dev", f"br-{plan.site}")


def keep_address(lab: Lab, guest: Guest, host: str) -> None:
    """Make the address of a guest that is off on that host its home address."""
    element = f"<addresses><address>{guest.address}</address></addresses>"
    words = ("--uri", METADATA_URI, "--key", "mobility", "--set", element, "--config")
    lab.exec(host, "virsh", "metadata", guest.plan.uuid, *words)


def ask(lab: Lab, host: str, *words: str) -> dict[str, Any]:
    """What a host's agent answers to `mobility-agent WORDS`."""
    told: dict[str, Any] = json.loads(lab.exec(host, "mobility-agent", "--json", *words).stdout)
    return told


def binding(lab: Lab, anchor: str, vm: str) -> dict[str, Any] | None:
    """Where this anchor has the VM (by UUID); None where it is bound nowhere."""
    for found in ask(lab, anchor, "bindings")["bindings"]:
        if found["vm"] == vm and found["state"] == "bound":
            return dict(found)
    return None


def holder(lab: Lab, anchor: str, vm: str) -> str | None:
    """The gateway to which this anchor sends the VM's packets."""
    found = binding(lab, anchor, vm)
    return None if found is None else str(found["gateway"])
