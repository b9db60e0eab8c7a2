# SPDX-License-Identifier: GPL-3.0-or-later
"""Both sites of the lab with mobility agents: gateways on one pair of hosts, anchors on the other."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from lifeboat_lab import mobility
from lifeboat_lab.lab import Lab
from lifeboat_lab.settings import HOSTS

GATEWAYS = ("home1", "backup1")
# The second is at the site that is evacuated: told as a warning, and good enough to be the one that dies.
ANCHORS = ("backup2", "home2")
PREFIX = HOSTS["home1"].guest_prefix
PLAY: list[dict[str, object]] = [
    {
        "name": "Let VMs keep their addresses",
        "hosts": "mobility",
        "gather_facts": False,
        "become": True,
        "roles": ["lifeboat.evacuation.mobility"],
    }
]


def inventory() -> dict[str, Any]:
    """The group mobility of these tests."""
    return mobility.inventory(GATEWAYS, ANCHORS, [PREFIX])


def found_by_agent(lab: Lab, host: str) -> list[dict[str, str]]:
    """What a host's agent finds wrong; the command's end says only whether there is anything."""
    told = lab.exec(host, "mobility-agent", "--json", "check", check=False).stdout
    return list(json.loads(told)["findings"])


def wait(condition: Callable[[], Any], seconds: float = 90) -> Any:
    """The first truth that ``condition`` gives."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.3)
    return value
