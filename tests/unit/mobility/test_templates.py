# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role's templates make of an inventory, read by the agent's own parser."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

from mobility_agent.config import Config, parse
from mobility_agent.messages.codec import Key

ROLE = Path(__file__).parents[3] / "roles/mobility"
PREFIX = {"prefix": "2001:db8:100::/64"}
SECRET = "00112233445566778899aabbccddeeff"


def host(number: int, **variables: Any) -> dict[str, Any]:
    """What the inventory says of one host."""
    addresses = {
        "mobility_address": f"2001:db8:{number}::b",
        "mobility_tunnel_address": f"2001:db8:{number}::d",
    }
    return {
        "mobility_prefixes": [PREFIX],
        "mobility_keys": [{"index": 256, "secret": SECRET}],
        **addresses,
        **variables,
    }


def site(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Two gateways, to the first of which the prefix is native, and two anchors."""
    found = {
        "home1": host(1, mobility_gateway=True, mobility_prefixes=[PREFIX | {"native": True}]),
        "backup1": host(2, mobility_gateway=True),
        "anchor1": host(3, mobility_anchor=True),
        "anchor2": host(4, mobility_anchor=True),
    }
    return {name: variables | changes.get(name, {}) for name, variables in found.items()}


def _trusted(value: Any) -> Any:
    if isinstance(value, str):
        return trust_as_template(value)
    if isinstance(value, dict):
        return {key: _trusted(item) for key, item in value.items()}
    return [_trusted(item) for item in value] if isinstance(value, list) else value


def rendered(hosts: dict[str, dict[str, Any]], name: str) -> tuple[str, str]:
    """The configuration and the keys that the role writes on the host."""
    variables: dict[str, Any] = {}
    for file in ("defaults/main.yml", "vars/main.yml"):
        variables |= _trusted(yaml.safe_load((ROLE / file).read_text()))
    told = {other: its | {"inventory_hostname": other} for other, its in hosts.items()}
    variables |= told[name] | {
        "hostvars": told,
        "groups": {"mobility": [*hosts]},
        "ansible_managed": "by hand",
    }
    templar = Templar(loader=DataLoader(), variables=variables)

    def render(template: str) -> str:
        text = (ROLE / "templates" / template).read_text()
        return str(templar.template(trust_as_template(text)))

    return render("mobility_agent.toml.j2"), render("mobility_keys.toml.j2")


def config(hosts: dict[str, dict[str, Any]], name: str) -> Config:
    """What the agent of the host reads in it."""
    return parse(*rendered(hosts, name))


def test_every_host_of_a_plain_inventory_can_read_what_it_gets() -> None:
    hosts = site()
    for name in hosts:
        assert config(hosts, name).name == name
    assert [peer.name for peer in config(hosts, "backup1").peers] == ["home1", "anchor1", "anchor2"]
    assert [peer.name for peer in config(hosts, "anchor1").peers] == ["home1", "backup1"]


def test_gateways_to_which_a_prefix_is_native_stand_on_its_home_link() -> None:
    linked = PREFIX | {"link": "lan0"}
    hosts = site(anchor1={"mobility_prefixes": [linked]})
    assert config(hosts, "anchor1").prefixes[0].link_gateways == {"home1"}
    assert config(hosts, "anchor2").prefixes[0].link is None
    hosts = site(anchor1={"mobility_prefixes": [linked | {"link_gateways": ["backup1"]}]})
    assert config(hosts, "anchor1").prefixes[0].link_gateways == {"backup1"}


def _key(index: int) -> dict[str, Any]:
    return {"index": index, "secret": f"{index:032x}"}


def test_a_gateways_own_key_is_on_it_and_on_the_anchors_and_nowhere_else() -> None:
    hosts = site(
        home1={"mobility_keys": [_key(301)]},
        backup1={"mobility_keys": [_key(302)]},
        anchor1={"mobility_keys": []},
        anchor2={"mobility_keys": [_key(256)]},
    )
    for name, indexes in (("home1", [301]), ("backup1", [302]), ("anchor1", [301, 302])):
        keys = tomllib.loads(rendered(hosts, name)[1])["keys"]
        assert [key["index"] for key in keys] == indexes
        config(hosts, name)
    peers = {peer.name: peer for peer in config(hosts, "anchor2").peers}
    assert {name: _indexes(peer.accepted_keys) for name, peer in peers.items()} == {
        "home1": [301],
        "backup1": [302],
    }
    assert _indexes(config(hosts, "home1").own_keys) == [301]


def test_a_key_is_changed_in_three_runs_each_of_which_knows_the_one_before() -> None:
    anchor = {"mobility_keys": []}
    for keys, named in (([301, 401], 301), ([301, 401], 401), ([401], 401)):
        home = {"mobility_keys": [_key(index) for index in keys], "mobility_key": named}
        hosts = site(home1=home, backup1={"mobility_keys": [_key(302)]}, anchor1=anchor, anchor2=anchor)
        (peer,) = [peer for peer in config(hosts, "anchor1").peers if peer.name == "home1"]
        assert peer.key.security_parameter_index == named
        assert _indexes(peer.accepted_keys) == keys
        own = config(hosts, "home1")
        assert own.own_key.security_parameter_index == named
        assert _indexes(own.own_keys) == keys


def _indexes(keys: Iterable[Key]) -> list[int]:
    return [key.security_parameter_index for key in keys]
