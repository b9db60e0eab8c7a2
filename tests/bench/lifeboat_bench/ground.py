# SPDX-License-Identifier: GPL-3.0-or-later
"""What every table stands on: a lab of its own with one pair of hosts, set up by playbook."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from lifeboat_lab.controller import Controller
from lifeboat_lab.errors import LabError
from lifeboat_lab.hosts import wait_for
from lifeboat_lab.lab import Lab
from lifeboat_lab.proxy import Proxy
from lifeboat_lab.settings import Settings

SOURCE, DESTINATION = "home1", "backup1"
# The proxies of the second pair speak IPv4.
PEERS = {SOURCE: DESTINATION, "home2": "backup2"}
TWO_PAIRS = (*PEERS, *PEERS.values())
LINK_SECONDS = 60.0
LAB_NAME = "bench"


class Ground:
    """The lab, both proxies, and the WAN, which is checked each time it is set."""

    def __init__(self, say: Callable[[str], None], hosts: tuple[str, ...] = (SOURCE, DESTINATION)) -> None:
        self.say = say
        self.lab = Lab(Settings(name=LAB_NAME, hosts=hosts), say=say)
        self.controller = Controller(self.lab)
        self.wan_checks: list[dict[str, Any]] = []

    def build(self) -> None:
        """A fresh lab; one that an interrupted run left is removed first."""
        self.lab.down()
        self.lab.up(owner=os.getpid())
        self.controller.playbook("site_setup").require_success()
        self.source, self.destination = (Proxy(self.lab.host(name)) for name in (SOURCE, DESTINATION))

    def remove(self) -> None:
        """Take the lab down."""
        self.lab.down()

    def set_wan(self, profile: str, between: tuple[str, str] = (SOURCE, DESTINATION)) -> dict[str, Any]:
        """Shape the WAN and measure it: a run on a WAN that is not what it says has nothing to report.

        Proxies start anew: their connections' kernels would remember the round trip of the WAN before for
        five minutes, and a site's is the same for years. (What shapes the WAN otherwise, as the table
        `deadline` does between its runs, leaves them with what they know.)
        """
        self.lab.wan.set(profile)
        check = self.lab.wan.check(*between)
        told = {"profile": profile, "holds": check.holds, "text": str(check)}
        self.wan_checks.append(told)
        if not check.holds:
            raise LabError(f"WAN {profile}: is not what it should be: {check}")
        pairs = [pair for pair in PEERS.items() if set(pair) <= set(self.lab.hosts)]
        for host in (host for pair in pairs for host in pair):
            self.exec(host, "systemctl", "restart", "precache-proxy")
        for source, destination in pairs:
            self._wait_for_link(Proxy(self.lab.host(source)), destination)
        now: dict[str, Any] = self.lab.wan.status()["now"]
        return now

    def _wait_for_link(self, proxy: Proxy, peer: str) -> None:
        def link_is_up() -> bool:
            return bool(proxy.link(peer)["state"] == "up")

        wait_for(link_is_up, LINK_SECONDS, 0.2)

    def exec(self, host: str, *command: str, timeout_seconds: float = 1800) -> str:
        """Run a command on a host and return what it printed."""
        return self.lab.exec(host, *command, timeout_seconds=timeout_seconds).stdout
