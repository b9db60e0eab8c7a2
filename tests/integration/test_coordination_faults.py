# SPDX-License-Identifier: GPL-3.0-or-later
"""What goes wrong while a site of eight VMs is emptied: all others go on, and the verdicts are true.

`test_coordination.py` kills the controller of four VMs each time; these take minutes each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from integration.playbook_runner import PlaybookResult
from integration.run_watch import none_twice
from integration.site_crowd import PEERS, Crowd, Member, RunPlaybook, crowd_at_home, wait_until
from lifeboat_lab.errors import LabError
from lifeboat_lab.guests.plan import GuestPlan
from lifeboat_lab.lab import Lab

pytestmark = [pytest.mark.lab, pytest.mark.soak, pytest.mark.timeout(900)]

VMS = 8
OUT = {"evacuated", "already-there"}


def _members() -> list[Member]:
    return [
        Member(
            GuestPlan(
                f"vm{number}", ram_mib=96, disk_mib=32, content_mib=8, heartbeat_milliseconds=100,
                workload="fsync-log" if number % 4 < 2 else "idle", records_per_second=2,
            ),
            sorted(PEERS)[number % 2],
        )
        for number in range(VMS)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def crowd(
    lab: Lab, lab_playbook: RunPlaybook, site_setup: PlaybookResult, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Crowd]:
    """Both sites set up, eight VMs running at home, protected, a slow and long way between the sites."""
    assert site_setup.return_code == 0
    work = tmp_path_factory.mktemp("faults")
    with crowd_at_home(lab, lab_playbook, _members(), work, wan="trans-pacific") as crowd:
        yield crowd


@pytest.fixture(autouse=True)
def at_home(crowd: Crowd) -> Iterator[None]:
    """All at home when a test begins; whatever it does, all hosts are asked all the time who runs them."""
    crowd.lab.wan.set("none")
    crowd.ready_at_home()
    crowd.lab.wan.set("trans-pacific")
    with none_twice(crowd.lab, {guest.plan.uuid for guest in crowd.guests.values()}):
        yield


def of_host(crowd: Crowd, host: str) -> set[str]:
    """Names of the VMs whose home it is."""
    return {name for name, home in crowd.homes.items() if home == host}


def begun_since(crowd: Crowd) -> Callable[..., list[dict[str, Any]]]:
    """Asks for the jobs of some homes that were begun after this call."""
    before = {job["id"] for job in crowd.jobs(*PEERS)}
    return lambda *hosts: [job for job in crowd.jobs(*hosts) if job["id"] not in before]


def seen(crowd: Crowd, what: str) -> None:
    """One line of figures for docs/soak.md."""
    report = crowd.report()
    outs = sorted(vm["out_seconds"] for vm in crowd.ours(report) if vm.get("out_seconds") is not None)
    print(f"{what}: out after {', '.join(f'{one:.0f}' for one in outs)} s; {crowd.verdicts(report)}")


def test_the_link_halves_on_the_way(crowd: Crowd) -> None:
    begun = begun_since(crowd)
    run = crowd.begin("home", evacuate_deadline="20m")
    wait_until(lambda: any(job["step"] == "migrate" for job in begun(*PEERS)), "one is on its way")
    crowd.lab.wan.set("rate=25mbit,rtt=180ms")
    assert run.end() == 0, run.text[-6000:]
    seen(crowd, "the link halves")
    assert crowd.verdicts(crowd.report()) == dict.fromkeys(crowd.guests, "evacuated")
    crowd.intact_at("backup")


def test_the_controller_is_killed_and_started_again(crowd: Crowd) -> None:
    begun = begun_since(crowd)
    run = crowd.begin("home", evacuate_deadline="20m")
    wait_until(lambda: any(job["verdict"] == "evacuated" for job in begun(*PEERS)), "one is out")
    run.kill()
    at_kill = {job["vm"] for job in begun(*PEERS)}
    assert len(at_kill) < VMS, "killed before all had been begun, or this would show nothing"
    time.sleep(5)
    assert {job["vm"] for job in begun(*PEERS)} == at_kill, "it starts nothing more"

    report = crowd.empty("home", evacuate_deadline="20m")
    seen(crowd, f"the controller is killed with {len(at_kill)} begun")
    assert set(crowd.verdicts(report)) == set(crowd.guests)
    assert set(crowd.verdicts(report).values()) <= OUT
    crowd.intact_at("backup")
    # One that stayed may have been begun again; moved was each of them once.
    moved = sorted(job["vm"] for job in begun(*PEERS) if job["verdict"] == "evacuated")
    assert moved == sorted(guest.plan.uuid for guest in crowd.guests.values())


def test_a_controller_that_stood_still_gives_no_orders_when_it_goes_on(crowd: Crowd) -> None:
    """Stopped for longer than its lease, another began meanwhile; also by hand nothing is had in its name."""
    begun = begun_since(crowd)
    first = crowd.begin("home", evacuate_deadline="20m")
    wait_until(lambda: any(job["step"] == "migrate" for job in begun(*PEERS)), "one is on its way")
    held = {host: crowd.proxy(host).get("/status")["coordinator"] for host in PEERS}
    first.stand_still()
    try:
        second = crowd.begin("home", evacuate_deadline="20m")

        def taken_over() -> bool:
            now = {host: crowd.proxy(host).get("/status")["coordinator"] for host in PEERS}
            return all(
                now[host] and now[host]["id"] != held[host]["id"] and now[host]["renewals"] for host in PEERS
            )

        wait_until(taken_over, "the second one coordinates both hosts")
        wait_until(lambda: any(not job["ended"] for job in begun(*PEERS)), "one is on its way again")
        for host in PEERS:
            with pytest.raises(LabError, match="taken over by"):
                crowd.proxy(host).request(
                    "POST", "/evacuations", {"vm": "nobody", "epoch": held[host]["epoch"]}
                )
            for job in begun(host):
                with pytest.raises(LabError, match="nothing was changed"):
                    crowd.proxy(host).request(
                        "POST", f"/evacuations/{job['id']}/cancel", {"epoch": held[host]["epoch"]}
                    )
    finally:
        first.go_on()
    assert first.end() != 0, first.text[-6000:]
    told = first.text.replace("\n", " ")
    assert "has taken over; this one gives no more orders" in told, first.text[-6000:]
    assert second.end() == 0, second.text[-6000:]
    seen(crowd, "the controller stands still and another takes over")
    assert set(crowd.verdicts(crowd.report())) == set(crowd.guests)
    assert set(crowd.verdicts(crowd.report()).values()) <= OUT
    crowd.intact_at("backup")
    moved = sorted(job["vm"] for job in begun(*PEERS) if job["verdict"] == "evacuated")
    assert moved == sorted(guest.plan.uuid for guest in crowd.guests.values())


def test_a_source_proxy_is_killed_and_the_others_go_on(crowd: Crowd) -> None:
    begun = begun_since(crowd)
    run = crowd.begin("home", evacuate_deadline="20m")
    wait_until(lambda: any(job["step"] == "migrate" for job in begun("home1")), "one of home1 is on its way")
    crowd.lab.exec("home1", "systemctl", "kill", "--signal=SIGKILL", "--kill-whom=main", "precache-proxy")
    run.end()
    seen(crowd, "the proxy of home1 is killed")
    told = crowd.verdicts(crowd.report())
    assert {told[name] for name in of_host(crowd, "home2")} == {"evacuated"}
    crowd.verdicts_hold(told)
    # What the kill cost is had by the same command again.
    again = crowd.verdicts(crowd.empty("home"))
    assert set(again) == set(crowd.guests)
    assert set(again.values()) <= OUT
    crowd.intact_at("backup")


def test_a_destination_host_dies_and_the_others_go_on(crowd: Crowd) -> None:
    begun = begun_since(crowd)
    run = crowd.begin("home", evacuate_deadline="20m")
    wait_until(lambda: any(job["step"] == "migrate" for job in begun("home2")), "one of home2 is on its way")
    crowd.lab.kill_host("backup2")
    theirs = of_host(crowd, "home2")
    try:
        assert run.end() != 0, "four VMs have nowhere to go"
        seen(crowd, "backup2 dies")
        told = crowd.verdicts(crowd.report())
        assert {told[name] for name in of_host(crowd, "home1")} == {"evacuated"}
        assert not OUT & {told[name] for name in theirs}
        crowd.verdicts_hold(told)
    finally:
        crowd.lab.start_host("backup2")
    wait_until(lambda: crowd.links_up("home2"), "backup2 is back")
    wait_until(lambda: crowd.protected("home2", "backup1"), "replicas are whole again", timeout_seconds=300)
    again = crowd.verdicts(crowd.empty("home"))
    assert set(again) == set(crowd.guests)
    assert set(again.values()) <= OUT
    crowd.intact_at("backup")
