# SPDX-License-Identifier: GPL-3.0-or-later
"""Debian 12 hosts (libvirt 9.0, QEMU 7.2, Python 3.11): set up, protect, evacuate, nothing lost."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from integration.playbook_runner import ROOT, PlaybookResult, run_playbook
from integration.run_watch import none_twice
from lifeboat_lab.guests.plan import GuestPlan
from lifeboat_lab.lab import Lab
from lifeboat_lab.proxy import Proxy
from lifeboat_lab.settings import Settings

pytestmark = [pytest.mark.lab, pytest.mark.soak, pytest.mark.timeout(1800)]

VM = "old iron"


@pytest.fixture(scope="module")
def old_lab() -> Iterator[Lab]:
    """A lab of its own with two bookworm hosts."""
    common = Settings.from_environment()
    name = f"{common.name[:13]}-old"
    lab = Lab(replace(common, name=name, suite="bookworm", hosts=("home1", "backup1")), say=print)
    lab.up(owner=os.getpid())
    yield lab
    lab.down()


def play(lab: Lab, work: Path, name: str, **variables: object) -> PlaybookResult:
    """A playbook of the installed collection on that lab."""
    return run_playbook(
        f"lifeboat.evacuation.{name}",
        ROOT / "inventories" / "lab",
        work,
        variables={"pki_ca_directory": str(work / "pki"), **variables},
        wrap=lambda command: lab.command("controller", command),
        environment={"LIFEBOAT_LAB": lab.settings.name},
    )


def test_set_up_protect_evacuate(old_lab: Lab, tmp_path: Path) -> None:
    assert "libvirt 9" in old_lab.exec("home1", "virsh", "version").stdout
    play(old_lab, tmp_path, "site_setup").require_success()
    assert play(old_lab, tmp_path, "site_setup").require_success().changed_tasks == []

    guest = old_lab.guests.define("home1", GuestPlan(VM, workload="fsync-log", ram_mib=96, disks=2))
    guest.start()
    guest.wait_ready()
    canary = guest.canary("home1")
    vms = "{{ [{'name': 'old iron'}] if inventory_hostname == 'home1' else [] }}"
    play(old_lab, tmp_path, "protect", lifeboat_vms=vms, lifeboat_vms_wait=True).require_success()
    play(old_lab, tmp_path, "validate", evacuate_site="home").require_success()
    report = str(tmp_path / "report.json")
    with none_twice(old_lab, [guest.plan.uuid]):
        play(old_lab, tmp_path, "evacuate", evacuate_site="home", evacuate_report=report).require_success()

    assert guest.running_on() == ["backup1"]
    deadline = time.monotonic() + 120
    while [one["state"] for one in Proxy(old_lab.host("backup1")).get("/arrivals")["arrivals"]] != ["landed"]:
        assert time.monotonic() < deadline, "not landed"
        time.sleep(1)
    verdict = guest.verify("backup1", canary=canary)
    assert verdict.intact, verdict.findings
    guest.remove()
