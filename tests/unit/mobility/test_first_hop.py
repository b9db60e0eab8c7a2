# SPDX-License-Identifier: GPL-3.0-or-later
"""What is remembered of a bridge as it was."""

from __future__ import annotations

from ipaddress import IPv6Address
from pathlib import Path

from mobility_agent.config import ROUTER_MAC
from mobility_agent.datapath.first_hop import Former, FormerBridges

OWN, GIVEN, LATER = "52:54:00:00:00:01", "02:00:00:00:00:01", "02:00:00:00:00:02"


def test_the_bridges_own_mac_is_kept_whatever_macs_it_gets_from_the_gateway(tmp_path: Path) -> None:
    file = tmp_path / "former_bridges.json"
    FormerBridges(file).note("vmbr0", Former(OWN, ["fe80::1"], given=ROUTER_MAC))
    # Configured anew, twice; each time the agent starts again.
    FormerBridges(file).note("vmbr0", Former(ROUTER_MAC, given=GIVEN))
    FormerBridges(file).note("vmbr0", Former(GIVEN, given=LATER))
    assert FormerBridges(file).of("vmbr0").mac == OWN
    # Made anew, with another of its own.
    FormerBridges(file).note("vmbr0", Former("52:54:00:00:00:02", ["fe80::1"], given=LATER))
    assert FormerBridges(file).of("vmbr0") == Former("52:54:00:00:00:02", ["fe80::1"], given=LATER)


def test_an_address_that_is_configured_no_more_is_to_go_and_then_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "former_bridges.json"
    former = FormerBridges(file)
    former.note("vmbr0", Former(OWN, ["fe80::1"], given=ROUTER_MAC))
    former.note("vmbr0", Former(None, ["fe80::9"], given=ROUTER_MAC))
    outdated = former.outdated("vmbr0", [IPv6Address("fe80::9")])
    assert outdated == Former(addresses=["fe80::1"])
    former.forget("vmbr0", outdated)
    assert FormerBridges(file).of("vmbr0") == Former(OWN, ["fe80::9"], given=ROUTER_MAC)
    former.forget("vmbr0")
    assert FormerBridges(file).of("vmbr0") == Former()
