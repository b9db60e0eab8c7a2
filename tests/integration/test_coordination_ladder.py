# SPDX-License-Identifier: GPL-3.0-or-later
"""The line gets slow while a site is emptied before a deadline: each VM falls as far as it may, and must.

One story of three VMs, each allowed other rungs; what else goes wrong is told by test_coordination_faults.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from integration.playbook_runner import PlaybookResult
from integration.run_watch import none_twice
from integration.site_crowd import PEERS, Crowd, Member, RunPlaybook, crowd_at_home, wait_until
from lifeboat_lab.guests.plan import GuestPlan
from lifeboat_lab.lab import Lab

# Who stands where when the line gets slow depends on what else the machine does: alone on it, then.
pytestmark = [pytest.mark.lab, pytest.mark.soak, pytest.mark.timeout(900)]

BEFORE, AFTER = "rate=50mbit,rtt=40ms", "rate=10mbit,rtt=40ms"
DEADLINE_SECONDS = 80
# 6.3 MB/s of pages that pack to nothing less: all that the line carries before, five times what after. Where
# other work has the processors the guest comes to less than half of it.
DIRTIES = {"workload": "dirty-ram,fsync-log", "dirty_mib": 16, "dirty_mib_per_second": 6}


def _members() -> list[Member]:
    """A canary does not pack, either: it is what makes a memory large on the line."""

    def plan(name: str, canary_mib: int, **how: Any) -> GuestPlan:
        return GuestPlan(
            name, ram_mib=96 + canary_mib, canary_mib=canary_mib, disk_mib=32, content_mib=8,
            heartbeat_milliseconds=100, records_per_second=2, **how,
        )  # fmt: skip

    return [
        Member(plan("hasty", 8, **DIRTIES), "home1", {"priority": 60, "fallback": ["live", "paused"]}),
        Member(plan("heavy", 72), "home2", {"fallback": ["live", "restart"], "shutdown_seconds": 20}),
        # Its turn comes when the first is out, and then it is too late for what it has.
        Member(plan("bound", 80), "home1", {"fallback": ["live"], "after": ["hasty"]}),
    ]


@pytest.fixture(scope="module")
def crowd(
    lab: Lab, lab_playbook: RunPlaybook, site_setup: PlaybookResult, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Crowd]:
    """Both sites set up, three VMs running at home, protected, a line of 50 Mbit/s."""
    assert site_setup.return_code == 0
    work = tmp_path_factory.mktemp("ladder")
    with crowd_at_home(lab, lab_playbook, _members(), work, wan=BEFORE) as crowd:
        yield crowd


@contextmanager
def obeys(crowd: Crowd, name: str) -> Iterator[None]:
    """Presses the power button where the lab's guest cannot hear it: it ends by itself once it is to."""
    over = threading.Event()
    guest, home = crowd.guests[name], crowd.homes[name]

    def wait_and_power_off() -> None:
        while not over.wait(0.2):
            if any(job["vm"] == guest.plan.uuid and job["step"] == "stop" for job in crowd.jobs(home)):
                guest.ask("poweroff", home)
                return

    thread = threading.Thread(target=wait_and_power_off, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(60)


def test_where_the_line_gets_slow_each_falls_as_far_as_it_may(crowd: Crowd) -> None:
    for host in ("home1", "home2"):
        wait_until(lambda host=host: crowd.knows_its_line(host, 0.03), f"{host} knows the line")
    uuids = {guest.plan.uuid: name for name, guest in crowd.guests.items()}
    boots = crowd.guests["heavy"].told().boots
    with none_twice(crowd.lab, set(uuids)), obeys(crowd, "heavy"):
        run = crowd.begin("home", evacuate_deadline=str(DEADLINE_SECONDS))
        begun_at = time.monotonic()

        def sent(name: str) -> bool:
            """Its memory crosses."""
            jobs = [job for job in crowd.jobs(*PEERS) if uuids[job["vm"]] == name]
            return any(job["step"] == "migrate" for job in jobs)

        wait_until(lambda: sent("hasty") and sent("heavy"), "the memory of both crosses", timeout_seconds=60)
        crowd.lab.wan.set(AFTER)
        print(f"the line is slow {time.monotonic() - begun_at:.1f} s after the command")
        assert run.end() != 0, "one has to stay"
    print(run.text)
    report = crowd.report()
    told = {vm["name"]: vm for vm in crowd.ours(report)}
    coordination = report["coordination"]
    falls = {
        one["vm"]: (one["what"], one["reason"])
        for one in coordination["decisions"]
        if one["what"].startswith("falls-to-")
    }
    print(falls)
    print({name: (vm["rung"], vm["out_seconds"], vm.get("downtime_seconds")) for name, vm in told.items()})

    # Stopped on its way, for rounds would have gone on for ever; with all of its memory, and in time. Only a
    # guest that other work leaves no processor to dirty with converges, and then it need not be stopped.
    hasty = told["hasty"]
    assert (hasty["verdict"], hasty["rung"]) in {("evacuated", "paused"), ("evacuated", "live")}, hasty
    if hasty["rung"] == "paused":
        assert falls["hasty"][0] == "falls-to-paused"
        assert falls["hasty"][1] in {"deadline", "does-not-converge"}
    else:
        assert "hasty" not in falls
    assert 0 < hasty["out_seconds"] <= coordination["horizon_seconds"] <= DEADLINE_SECONDS
    assert crowd.guests["hasty"].running_on() == ["backup1"]
    found = crowd.guests["hasty"].verify("backup1", canary=crowd.canaries["hasty"])
    assert found.intact, found.findings

    # Its move was given up on its way; its guest ended here and booted there, with all that was durable.
    heavy = told["heavy"]
    assert (heavy["verdict"], heavy["rung"]) == ("evacuated", "restart"), heavy
    assert falls["heavy"][0] == "falls-to-restart"
    assert 0 < heavy["out_seconds"] <= coordination["horizon_seconds"]
    live, restart = [job for job in crowd.jobs("home2") if uuids[job["vm"]] == "heavy"]
    assert (live["rung"], live["verdict"]) == ("live", "stayed"), live
    assert (restart["rung"], restart["verdict"]) == ("restart", "evacuated"), restart
    assert (restart["powered_off"], restart["memory_lost"]) == (False, False)
    guest = crowd.guests["heavy"]
    assert guest.running_on() == ["backup2"]
    guest.wait_ready(host="backup2")
    # The cancelled live move cost it nothing: the only boot is the one that its restart is.
    assert "memory was lost" not in live["sentence"], live
    assert guest.told().boots == boots + 1
    found = guest.verify("backup2")
    assert found.intact, found.findings
    assert "home2" not in guest.states(), "nothing is left that could be started"
    assert crowd.guarded("home2", "heavy"), "and if it were, it is forbidden"
    assert not crowd.guarded("backup2", "heavy")

    # What may not do anything else runs on where it was, and what its replica lacks is told.
    bound = told["bound"]
    assert (bound["verdict"], bound["rung"]) == ("stayed", None), bound
    assert bound["lag_bytes"] > 0
    assert bound["lag_seconds"] > 0
    assert crowd.guests["bound"].running_on() == ["home1"]
    assert crowd.guests["bound"].canary() == crowd.canaries["bound"]
    assert not crowd.guarded("home1", "bound")
