# SPDX-License-Identifier: GPL-3.0-or-later
"""Peers read from an inventory: what is wrong, and whom a proxy talks to."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st


def _load() -> ModuleType:
    path = Path(__file__).parents[2] / "plugins" / "module_utils" / "_inventory.py"
    specification = importlib.util.spec_from_file_location("lifeboat_inventory", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


inventory = _load()


def sites(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Two hypervisors at home and one behind them both, changed as asked for; None takes a variable away."""
    hosts: dict[str, dict[str, Any]] = {
        "home1": {"lifeboat_site": "home", "lifeboat_peer": "backup1", "lifeboat_address": "2001:db8:1::b"},
        "home2": {"lifeboat_site": "home", "lifeboat_peer": "backup1", "ansible_host": "192.0.2.2"},
        "backup1": {"lifeboat_site": "backup", "lifeboat_peer": "home1"},
    }
    for name, variables in changes.items():
        hosts.setdefault(name, {}).update(variables)
    return {
        name: {key: value for key, value in variables.items() if value is not None}
        for name, variables in hosts.items()
    }


def test_good_inventory_has_no_findings() -> None:
    assert inventory.findings(sites()) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"home2": {"lifeboat_peer": None}}, "home2: has no peer; set lifeboat_peer"),
        ({"home2": {"lifeboat_peer": "home2"}}, "home2: is its own peer"),
        ({"home2": {"lifeboat_peer": "backup7"}}, "home2: its peer backup7 is not among the hypervisors"),
        ({"home2": {"lifeboat_peer": "home1"}}, "home2: its peer home1 stands at the same site, home"),
        ({"home2": {"lifeboat_site": None}}, "home2: has no site; set lifeboat_site"),
        (
            {"home2": {"lifeboat_address": "2001:db8:1::b"}},
            "home2: has the address 2001:db8:1::b port 4747 of home1",
        ),
    ],
    ids=["no-peer", "peer-is-self", "unknown-peer", "same-site", "no-site", "same-address"],
)
def test_finding_names_the_host_the_fact_and_the_way_out(changes: dict[str, Any], told: str) -> None:
    found = inventory.findings(sites(**changes))
    assert len(found) == 1
    assert found[0].startswith(told)
    assert "lifeboat_" in found[0]


def test_several_peers_are_each_judged_and_each_talked_to() -> None:
    several = {"lifeboat_peer": None, "lifeboat_peers": ["backup1", "backup2"]}
    hosts = sites(home2=several, backup2={"lifeboat_site": "backup", "lifeboat_peer": "home1",
                                          "lifeboat_address": "2001:db8:2::c"})  # fmt: skip
    assert inventory.findings(hosts) == []
    assert [peer["name"] for peer in inventory.proxy_peers(hosts, "home2")] == ["backup1", "backup2"]
    # Who is one of several expects whoever named it.
    assert "home2" in [peer["name"] for peer in inventory.proxy_peers(hosts, "backup2")]
    hosts["home2"]["lifeboat_peers"] = ["home1", "nowhere"]
    assert [told.partition(";")[0] for told in inventory.findings(hosts)] == [
        "home2: its peer home1 stands at the same site, home",
        "home2: its peer nowhere is not among the hypervisors",
    ]
    hosts["home2"]["lifeboat_peers"] = "backup1"
    assert "lifeboat_peers 'backup1' is no list; write [backup1]" in inventory.findings(hosts)[0]


def test_all_findings_are_told_at_once() -> None:
    found = inventory.findings(sites(home1={"lifeboat_peer": None}, home2={"lifeboat_peer": "home2"}))
    assert [sentence.split(":")[0] for sentence in found] == ["home1", "home2"]


def test_empty_inventory_is_a_finding() -> None:
    assert "matches none" in inventory.findings({})[0]


def test_two_proxies_behind_one_address_differ_by_port() -> None:
    changes = {"home2": {"lifeboat_address": "2001:db8:1::b", "lifeboat_port": 4748}}
    assert inventory.findings(sites(**changes)) == []


def test_a_proxy_talks_to_its_peer_and_to_those_it_is_the_peer_of() -> None:
    hosts = sites(backup1={"lifeboat_rate": "50Mbit/s", "lifeboat_connections": 8})
    assert inventory.proxy_peers(hosts, "backup1") == [
        {
            "name": "home1",
            "address": "2001:db8:1::b",
            "port": 4747,
            "connections": 8,
            "rate": "50Mbit/s",
            "windows": [],
        },
        {
            "name": "home2",
            "address": "192.0.2.2",
            "port": 4747,
            "connections": 8,
            "rate": "50Mbit/s",
            "windows": [],
        },
    ]
    assert [peer["name"] for peer in inventory.proxy_peers(hosts, "home2")] == ["backup1"]


@given(st.lists(st.integers(0, 9), min_size=10, max_size=10))
def test_peering_is_symmetric_and_never_with_oneself(peers: list[int]) -> None:
    """Whoever sends is expected: a proxy refuses names that its configuration lacks."""
    hosts = {
        f"h{n}": {"lifeboat_site": str(n % 2), "lifeboat_peer": f"h{peer}"} for n, peer in enumerate(peers)
    }
    known = {name: {peer["name"] for peer in inventory.proxy_peers(hosts, name)} for name in hosts}
    for name, others in known.items():
        assert name not in others
        for other in others:
            assert name in known[other]
