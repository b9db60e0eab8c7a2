# SPDX-License-Identifier: GPL-3.0-or-later
"""What the inventory says of a group of VMs, and what cannot be meant by it."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.lifeboat.evacuation.plugins.module_utils._vm_groups import read_groups, with_group


def findings(*hosts: Any, members: tuple[str, ...] = ("shop", "data")) -> list[str]:
    told = {f"home{number + 1}": {"lifeboat_vm_groups": value} for number, value in enumerate(hosts)}
    return [str(finding) for finding in read_groups(told, lambda: members)[1]]


def test_a_vm_says_more_than_its_group() -> None:
    said = {"shop": {"fallback": ["live", "restart"], "shutdown_seconds": 90}}
    groups, wrong = read_groups({"home1": {"lifeboat_vm_groups": said}, "home2": {}}, lambda: {"shop"})
    assert (groups, wrong) == (said, [])
    assert with_group({"name": "a", "group": "shop"}, groups) == {
        "name": "a",
        "group": "shop",
        **said["shop"],
    }
    own = with_group({"name": "a", "group": "shop", "fallback": ["live"], "shutdown_seconds": None}, groups)
    assert (own["fallback"], own["shutdown_seconds"]) == (["live"], 90), "null says nothing"
    for alone in ({"name": "b"}, {"name": "b", "group": None}, {"name": "b", "group": "other"}):
        assert "fallback" not in with_group(alone, groups)


def test_a_variable_of_the_site_is_read_once() -> None:
    same = {"shop": {"fallback": ["teleport"]}}
    assert findings(same, same) == [
        "lifeboat_vm_groups: shop: fallback teleport: is not known; use live, paused, restart, stay"
    ]
    (told,) = findings({"shop": {"power_off": True}}, {"shop": {"power_off": False}})
    assert told == "lifeboat_vm_groups: shop: is another on home1 than on home2; say it once, for the site"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (["shop"], "lifeboat_vm_groups ['shop']: is no mapping; write group names"),
        ({"shop": ["live"]}, "lifeboat_vm_groups: shop ['live']: is no mapping; write fallback, power_off"),
        ({7: {}}, "lifeboat_vm_groups: 7: is no name of a group"),
        ({"shop": {"fallback": "live"}}, "shop: fallback 'live': is no list; choose of live"),
        ({"shop": {"fallback": []}}, "shop: fallback: is empty"),
        ({"shop": {"shutdown_seconds": "long"}}, "shop: shutdown_seconds 'long': is no number"),
        ({"shop": {"power_off": "perhaps"}}, "shop: power_off 'perhaps': is neither"),
        ({"shop": {"priority": 5}}, "shop: priority: is nothing that a group can say; known are fallback"),
        ({"shpo": {}}, "lifeboat_vm_groups: shpo: is the group of no VM in lifeboat_vms; write shop if"),
    ],
)
def test_what_cannot_be_meant_is_a_finding(said: Any, told: str) -> None:
    (finding,) = findings(said)
    assert told in finding


def test_all_findings_come_at_once() -> None:
    said = {"shop": {"fallback": ["teleport"], "power_off": "perhaps", "colour": 1}, "none": {}}
    assert len(findings(said)) == 4
    assert findings(None) == findings() == []
