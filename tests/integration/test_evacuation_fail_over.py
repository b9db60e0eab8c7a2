# SPDX-License-Identifier: GPL-3.0-or-later
"""The home is dead: the VM runs at its peer from the last sealed generation, and nowhere else ever after."""

from __future__ import annotations

import pytest

from integration.evacuation_pair import EvacuationPair
from integration.proxy_pair import BACKUP, HOME, Refused, wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]


def test_a_vm_runs_from_its_last_generation_and_its_home_learns_of_it(pair: EvacuationPair) -> None:
    guest = pair.make_guest("bereft", disks=2)
    fail_over = f"/v1/replicas/{guest.plan.uuid}/fail-over"
    acknowledged = guest.told().highest_acknowledged
    sealed = pair.ask(HOME, "POST", f"/v1/vms/{guest.plan.uuid}/pass")["generation"]
    wait_for(lambda: guest.told().highest_acknowledged, lambda now: now > acknowledged + 20)
    with pair.never_twice(guest):
        with pytest.raises(Refused, match=f"generation {sealed}, sealed .* ago"):
            pair.ask(BACKUP, "POST", fail_over, {})
        with pytest.raises(Refused, match="its home is not dead, it is running there"):
            pair.ask(BACKUP, "POST", fail_over, {"source_is_dead": True})
        assert guest.states() == {HOME: "running"}
        assert not pair.guarded(HOME, guest)
        assert not pair.guarded(BACKUP, guest)

        pair.lab.kill_host(HOME)
        arrival = pair.ask(BACKUP, "POST", fail_over, {"source_is_dead": True})
        assert (arrival["state"], arrival["generation"], arrival["epoch"]) == ("activated", sealed, 1)
        assert (arrival["activated_by"], arrival["home_told"]) == ("operator", False)
        assert guest.running_on() == [BACKUP]
        guest.wait_ready(host=BACKUP)
        found = guest.verify(BACKUP, acknowledged=acknowledged)
        assert found.intact, found.findings
        pair.wait_landed(BACKUP, guest)

        pair.lab.start_host(HOME)
        pair.start(HOME)
        wait_for(lambda: pair.arrival(BACKUP, guest)["home_told"], timeout_seconds=60)
        assert pair.guarded(HOME, guest)
        assert guest.states() == {BACKUP: "running"}
        # What was written at home since stays there, and nobody takes it for a replica.
        assert guest.plan.uuid not in str(pair.ask(HOME, "GET", "/v1/vms"))
        # The way back begins with a first copy.
        pair.wait_protected(guest, BACKUP)
        job = pair.wait_job(BACKUP, pair.begin(BACKUP, guest)["id"])
        assert job["verdict"] == "evacuated", (job, pair.log(BACKUP))
    assert guest.running_on() == [HOME]
    found = guest.verify(HOME, acknowledged=acknowledged)
    assert found.intact, found.findings
