# SPDX-License-Identifier: GPL-3.0-or-later
"""A shut-off VM starts whenever its operator likes, whatever its proxy is doing with its images."""

from __future__ import annotations

import threading
import time

import pytest

from integration.evacuation_pair import EvacuationPair
from integration.proxy_pair import HOME, LOG, Refused
from lifeboat_lab.guests.plan import GuestPlan

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

# How long after its proxy was told to compare everything the VM is started: around that the readers begin.
DELAYS_SECONDS = [0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5]


def test_a_vm_starts_at_every_moment_of_its_proxys_reading(pair: EvacuationPair) -> None:
    for left in pair.lab.guests.all():
        if left.name == "impatient":
            left.remove()
    guest = pair.lab.guests.define(HOME, GuestPlan("impatient", workload="idle", disks=2))
    pair.guests.append(guest)
    uuid = guest.plan.uuid
    pair.protect(guest)
    told: list[str] = []

    def compare() -> None:
        try:
            told.append("equal" if pair.ask(HOME, "POST", f"/v1/vms/{uuid}/verify", {})["equal"] else "not")
        except Refused as refused:
            told.append(refused.cause)
            print(refused.message)

    refused: list[str] = []
    for number, delay_seconds in enumerate(DELAYS_SECONDS * 3):
        if number >= len(DELAYS_SECONDS) and "state-changed" in told:
            break
        pair.wait_protected(guest, HOME)
        comparing = threading.Thread(target=compare)
        comparing.start()
        time.sleep(delay_seconds)
        began = time.monotonic()
        # paused: what matters is that QEMU gets its images, not what the guest does with them
        said = pair.virsh(HOME, "start", "--paused", uuid, check=False)
        print(f"{delay_seconds:.2f} s: {said.strip()} ({time.monotonic() - began:.2f} s)")
        if "started" not in said:
            refused.append(f"{delay_seconds:.2f} s: {said.strip()}")
        comparing.join()
        print(f"the comparison: {told[-1]}")
        pair.virsh(HOME, "destroy", "--graceful", uuid, check=False)
    assert refused == []
    assert "state-changed" in told, "no start met a reader"
    # and it is read again once nobody starts it
    pair.wait_protected(guest, HOME)
    compare()
    assert told[-1] == "equal", pair.shell(HOME, f"tail -5 {LOG}")
