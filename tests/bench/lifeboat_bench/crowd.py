# SPDX-License-Identifier: GPL-3.0-or-later
"""Eight VMs on two hosts, and the playbook that moves them: what tables of a whole site are measured with."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lifeboat_bench.ground import PEERS, Ground
from lifeboat_lab.controller import Finished
from lifeboat_lab.errors import LabError
from lifeboat_lab.guests.guests import Guest
from lifeboat_lab.guests.plan import GuestPlan
from lifeboat_lab.proxy import Proxy

VMS = 8
BOOT_SECONDS, READY_SECONDS = 240, 600


class Playing:
    """`evacuate.yml` under way."""

    def __init__(self, crowd: Crowd, variables: Mapping[str, Any]) -> None:
        self.began_at: float | None = None  # by time.time(), when it had seen the site and began
        self._finished: Finished | None = None
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._play, args=(crowd, variables))
        self._thread.start()

    def _play(self, crowd: Crowd, variables: Mapping[str, Any]) -> None:
        try:
            self._finished = crowd.ground.controller.playbook(
                "evacuate", variables, say=self._heard, timeout_seconds=1800
            )
        except LabError as error:
            self._failed = error

    def _heard(self, line: str) -> None:
        if self.began_at is None and "VMs to leave" in line:
            self.began_at = time.time()

    def end(self) -> Finished:
        """Wait for its end. Raises LabError where it could not be run."""
        self._thread.join()
        if self._failed is not None:
            raise self._failed
        assert self._finished is not None
        return self._finished


class Crowd:
    """The VMs at one of two sites, and the way to the other."""

    def __init__(self, ground: Ground, plans: Sequence[GuestPlan]) -> None:
        self.ground, self.at_home = ground, True
        self.plans = {plan.name: plan for plan in plans}
        self.guests: dict[str, Guest] = {}
        self.homes = {plan.name: sorted(PEERS)[number % 2] for number, plan in enumerate(plans)}
        self.canaries: dict[str, str] = {}
        self._report = ground.controller.work / "crowd.json"
        self._forecast = ground.controller.work / "crowd-forecast.json"

    def build(self) -> None:
        """Boot and protect all of them, over a line without limits: first copies are not measured here."""
        for name, home in self.homes.items():
            self.guests[name] = self.ground.lab.guests.define(home, self.plans[name])
            self.guests[name].start()
        for guest in self.guests.values():
            guest.wait_ready(BOOT_SECONDS)
        self.ground.say(f"{len(self.guests)} VMs are up")
        self.canaries = {name: guest.canary() for name, guest in self.guests.items()}
        self.wish({})
        self.ground.controller.playbook("protect", {"lifeboat_vms_wait": True}).require_success()
        self.ground.say("all of them are protected")

    def wish(self, after: Mapping[str, str]) -> None:
        """What the inventory says of the VMs; ``after``: who is not to go before whom."""
        self.ground.controller.set_host_variables(
            {
                host: {
                    "lifeboat_vms": [
                        {"name": name, "rpo": "30s"} | ({"after": [after[name]]} if name in after else {})
                        for name, home in self.homes.items()
                        if home == host
                    ]
                }
                for host in PEERS
            }
        )

    def begin(self, variables: Mapping[str, Any]) -> Playing:
        """Empty the site where they are, by the playbook that an operator uses."""
        self._report.unlink(missing_ok=True)
        site = "home" if self.at_home else "backup"
        return Playing(self, {"evacuate_site": site, "evacuate_report": str(self._report), **variables})

    def rehearse(self, variables: Mapping[str, Any]) -> Path:
        """What `rehearse.yml` forecasts for the site where they are, as it keeps it. Raises LabError."""
        self._forecast.unlink(missing_ok=True)
        site = "home" if self.at_home else "backup"
        asked = {"evacuate_site": site, "rehearse_forecast": str(self._forecast), **variables}
        self.ground.controller.playbook("rehearse", asked).require_success()
        return self._forecast

    def reported(self) -> dict[str, dict[str, Any]]:
        """What the playbook's report says of each VM. Raises LabError where there is none."""
        if not self._report.is_file():
            raise LabError(f"{self._report}: the playbook has left no report")
        names = {guest.plan.uuid: name for name, guest in self.guests.items()}
        vms = json.loads(self._report.read_text())["vms"]
        return {names[vm["vm"]]: vm for vm in vms if vm["vm"] in names}

    def proxy(self, host: str) -> Proxy:
        """The precache proxy of a host."""
        return Proxy(self.ground.lab.host(host))

    def wait_protected(self) -> None:
        """Until each VM has a whole replica at the other site."""
        wait_until(self._protected, "all VMs are protected where they run")

    def _protected(self) -> bool:
        try:
            return {guest.plan.uuid for guest in self.guests.values()} <= self.protected()
        except LabError:
            return False

    def protected(self) -> set[str]:
        """UUIDs of those that have a whole replica at the other site. Raises LabError."""
        hosts = tuple(PEERS) if self.at_home else tuple(PEERS.values())
        told = [vm for host in hosts for vm in self.proxy(host).get("/vms")["vms"]]
        return {vm["uuid"] for vm in told if vm["generation"] and vm["state"] == "protected"}

    def check(self) -> None:
        """Each runs once, where it is to, with the memory that it had. Raises LabError."""
        for name, guest in self.guests.items():
            home = self.homes[name]
            where = home if self.at_home else PEERS[home]
            if guest.running_on() != [where]:
                raise LabError(f"{name}: runs on {guest.running_on()}, not on {where}")
            if guest.canary() != self.canaries[name]:
                raise LabError(f"{name}: its memory changed")


def wait_until(true: Callable[[], bool], what: str, timeout_seconds: float = READY_SECONDS) -> None:
    """Look once a second. Raises LabError with ``what`` after the timeout."""
    deadline = time.monotonic() + timeout_seconds
    while not true():
        if time.monotonic() > deadline:
            raise LabError(f"not within {timeout_seconds:g} s: {what}")
        time.sleep(1.0)
