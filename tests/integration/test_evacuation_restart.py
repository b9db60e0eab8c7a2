# SPDX-License-Identifier: GPL-3.0-or-later
"""VMs that leave by restart: shut down here, booted there, with every synced write, variables and TPM state.

No memory goes along, so there is no canary to compare: what counts is what the guest was told to be durable.
"""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from integration.evacuation_pair import EvacuationPair, sampled
from integration.proxy_pair import BACKUP, HOME, Answer, Refused, other_host, wait_for
from lifeboat_lab.guests.guests import Guest
from precache_proxy.crash_points import CRASH_POINTS

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

# The tiny guest has nobody who listens to the power button: it is powered off when this is over.
SHUTDOWN_SECONDS = 2.0
RESTART = {"mode": "restart", "shutdown_seconds": SHUTDOWN_SECONDS}


@contextmanager
def guest_that_obeys(
    pair: EvacuationPair, guest: Guest, source: str = HOME, command: str = "poweroff"
) -> Iterator[None]:
    """Presses the power button where the lab's guest cannot hear it: it ends by itself once it is to."""
    end = threading.Event()

    def wait_and_power_off() -> None:
        while not end.wait(0.2):
            jobs = pair.ask(source, "GET", "/v1/evacuations")["evacuations"]
            if any(job["vm"] == guest.plan.uuid and job["step"] == "stop" for job in jobs):
                guest.ask(command, source)
                return

    thread = threading.Thread(target=wait_and_power_off, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(60)


def check_settled(pair: EvacuationPair, guest: Guest, job_id: str, where: str, source: str = HOME) -> Answer:
    """One guest, run in one place, whole as it was told to be durable, and nothing left over. The job."""
    destination = other_host(source)
    job = pair.wait_job(source, job_id)
    verdict = "evacuated" if where == destination else "stayed"
    assert (job["verdict"], job["rung"]) == (verdict, "restart"), (job, pair.log(source))
    wait_for(guest.running_on, lambda hosts: hosts == [where])
    guest.wait_ready(host=where)
    if where == destination:
        pair.wait_landed(destination, guest)
        assert source not in guest.states(), "undefined at its old home"
        assert pair.guarded(source, guest)
    else:
        wait_for(lambda: not pair.guarded(destination, guest))
        assert destination not in guest.states()
    assert not pair.guarded(where, guest)
    found = guest.verify(where)
    assert found.intact, found.findings
    assert pair.leftovers(HOME) == pair.leftovers(BACKUP) == []
    pair.wait_protected(guest, where)
    return job


def test_a_guest_shuts_down_boots_there_and_comes_back(pair: EvacuationPair) -> None:
    guest = pair.make_guest("restarted", disks=2)
    for source in (HOME, BACKUP):
        destination = other_host(source)
        with pair.never_twice(guest), guest_that_obeys(pair, guest, source):
            job_id = pair.begin(source, guest, mode="restart", shutdown_seconds=60)["id"]
            job = check_settled(pair, guest, job_id, destination, source)
        assert "was shut down here, and booted there" in job["sentence"]
        assert (job["powered_off"], job["memory_lost"]) == (False, False)
        assert 0 < job["downtime_seconds"] <= job["eviction_seconds"]
        assert [step["step"] for step in job["steps"]] == [
            "preflight", "catch-up", "stop", "residual", "prepare", "confirm", "released", "finish",
        ]  # fmt: skip
        print({key: job[key] for key in ("downtime_seconds", "eviction_seconds", "bytes", "steps")})
        pair.wait_protected(guest, destination)


def machine_state(pair: EvacuationPair, host: str, guest: Guest) -> dict[str, str]:
    """SHA-256 of the UEFI variables and of what the TPM keeps for ever."""
    xml = pair.virsh(host, "dumpxml", guest.plan.uuid)
    nvram = xml.split("<nvram")[1].split(">", 1)[1].split("<")[0]
    tpm = f"/var/lib/libvirt/swtpm/{guest.plan.uuid}/tpm2/tpm2-00.permall"
    found = pair.shell(host, f"sha256sum {shlex.quote(nvram)} {tpm}").splitlines()
    return {"nvram": found[0].split()[0], "tpm": found[1].split()[0]}


def test_variables_tpm_state_and_synced_writes_arrive_as_they_were_left(pair: EvacuationPair) -> None:
    """A guest that does not hear the power button is powered off; what stands there is what stood here."""
    guest = pair.make_guest("firmware", firmware="uefi", tpm=True, cdrom=True, ram_mib=256)
    fresh = machine_state(pair, HOME, guest)
    with pair.never_twice(guest):
        pair.restart(BACKUP, stop_at="arrival-prepared")
        pair.wait_links()
        job_id = pair.begin(HOME, guest, **RESTART)["id"]
        pair.wait_stopped(BACKUP)
        assert guest.states() == {HOME: "shut off", BACKUP: "paused"}
        left = machine_state(pair, HOME, guest)
        assert machine_state(pair, BACKUP, guest) == left
        assert left.keys() == fresh.keys()
        assert "was shut down here to be started at" in pair.start_is_refused(HOME, guest)
        pair.go_on(BACKUP)
        job = check_settled(pair, guest, job_id, BACKUP)
    assert job["powered_off"] is True
    assert "did not shut down here within 2 s and was powered off" in job["sentence"]


def test_a_guest_that_may_not_be_powered_off_stays_and_runs_though_it_obeys_late(
    pair: EvacuationPair,
) -> None:
    guest = pair.make_guest("stubborn")
    canary, images = guest.canary(HOME), guest.images(HOME)
    job_id = pair.begin(HOME, guest, **RESTART, power_off=False)["id"]
    job = check_settled(pair, guest, job_id, HOME)
    assert "did not shut down within 2 s and is not to be powered off" in job["sentence"]
    assert guest.canary(HOME) == canary, "it ran all the time"
    assert guest.images(HOME) == images
    # Now it obeys, while the proxy is dead; by what is on disk the next one knows on whose account.
    assert job["shutdown_request"]["outcome"] == ""
    boots = guest.told().boots
    with pair.never_twice(guest):
        pair.kill(HOME)
        guest.ask("poweroff", HOME)
        wait_for(guest.states, lambda states: states == {HOME: "shut off"})
        # Before it boots: a record that it had not synced may be torn, and is not the last one after that.
        found = guest.verify(HOME)
        assert found.intact, found.findings
        pair.start(HOME)
        wait_for(
            lambda: pair.job(HOME, job_id)["shutdown_request"]["outcome"],
            lambda outcome: outcome == "started-again",
        )
        assert guest.running_on() == [HOME]
        wait_for(lambda: guest.told().boots, lambda now: now > boots)
    # Shut down once more it is on its user's own account.
    guest.ask("poweroff", HOME)
    wait_for(guest.states, lambda states: states == {HOME: "shut off"})
    time.sleep(12)
    assert guest.states() == {HOME: "shut off"}


def test_a_guest_shut_off_moves_without_being_booted(pair: EvacuationPair) -> None:
    guest = pair.make_guest("asleep")
    guest.ask("poweroff", HOME)
    wait_for(guest.states, lambda states: states == {HOME: "shut off"})
    with pytest.raises(Refused) as refused:
        pair.ask(HOME, "POST", "/v1/evacuations/check", {"vm": guest.plan.uuid, "mode": "sideways"})
    assert "write one of live, restart" in refused.value.message
    found = pair.ask(HOME, "POST", "/v1/evacuations/check", {"vm": guest.plan.uuid})["findings"]
    assert [finding["fact"] for finding in found] == ["it does not run"]
    asked = {"vm": guest.plan.uuid, "mode": "restart"}
    assert pair.ask(HOME, "POST", "/v1/evacuations/check", asked)["findings"] == []
    beats = len(guest.told().beats)
    job = pair.wait_job(HOME, pair.begin(HOME, guest, **RESTART)["id"])
    assert (job["verdict"], job["downtime_seconds"]) == ("evacuated", None), (job, pair.log(HOME))
    assert "shut off as it was here" in job["sentence"]
    wait_for(guest.states, lambda states: states == {BACKUP: "shut off"})
    assert len(guest.told().beats) == beats, "not an instruction was run"
    assert guest.verify(BACKUP).intact
    pair.wait_protected(guest, BACKUP)
    # Back the same way, and started only then.
    job = pair.wait_job(BACKUP, pair.begin(BACKUP, guest, **RESTART)["id"])
    assert job["verdict"] == "evacuated", (job, pair.log(BACKUP))
    wait_for(guest.states, lambda states: states == {HOME: "shut off"})
    guest.start(HOME)
    guest.wait_ready(host=HOME)
    pair.wait_landed(HOME, guest)
    assert guest.verify(HOME).intact
    # What it never landed on is the chain of the replica that stayed there.
    assert pair.leftovers(HOME) == []


@pytest.mark.soak
def test_cancelled_while_it_shuts_down_it_runs_on_here(pair: EvacuationPair) -> None:
    """Asked to end it may end a moment later: then it is started again."""
    guest = pair.make_guest("reprieved")
    with pair.never_twice(guest):
        job_id = pair.begin(HOME, guest, mode="restart", shutdown_seconds=15)["id"]
        pair.wait_step(HOME, job_id, "stop")
        pair.ask(HOME, "POST", f"/v1/evacuations/{job_id}/cancel", {})
        guest.ask("poweroff", HOME)
        job = check_settled(pair, guest, job_id, HOME)
    assert "It was started again here" in job["sentence"]


# -- proxies killed at every line

GOES_BACK = (
    "departure-admitted", "restart-before-stop", "restart-stopped", "departure-residual-sealed",
    "departure-before-prepare",
)  # fmt: skip
GOES_ON = (
    "departure-prepared", "departure-before-tombstone", "departure-tombstoned", "departure-released",
    "departure-activated", "departure-before-undefine", "departure-undefined", "departure-adopted",
)  # fmt: skip
ARRIVAL_GOES_BACK = (
    "arrival-recorded", "arrival-guarded", "restart-state-placed", "restart-defined", "arrival-prepared",
)  # fmt: skip
ARRIVAL_GOES_ON = (
    "arrival-tracked", "arrival-released", "arrival-resumed", "arrival-activated", "return-sealed",
    "landing-begun", "landing-merged", "landing-collapsed",
)  # fmt: skip
ROLLBACK = ("rollback-begun", "rollback-peer-cleaned", "rollback-merged", "arrival-aborting")
# Each test run takes these; the whole table is for `make soak`.
SAMPLE = {"restart-stopped", "arrival-released"}


def test_every_point_of_a_restart_is_in_a_table_here() -> None:
    named = {*GOES_BACK, *GOES_ON, *ARRIVAL_GOES_BACK, *ARRIVAL_GOES_ON, *ROLLBACK}
    assert {point for point in CRASH_POINTS if point.startswith("restart-")} <= named
    of_a_migration = {
        "departure-before-freeze", "departure-frozen", "departure-migrating", "departure-migrated",
        "departure-before-standstill", "departure-stands-still", "departure-halted",
        "arrival-tops-named", "arrival-changed-over",
    }  # fmt: skip
    prefixes = ("departure-", "arrival-", "landing-", "return-", "rollback-")
    assert {point for point in CRASH_POINTS if point.startswith(prefixes)} == of_a_migration | {
        point for point in named if not point.startswith("restart-")
    }


@pytest.mark.parametrize("point", sampled(SAMPLE, *GOES_BACK, *GOES_ON))
def test_source_proxy_killed(pair: EvacuationPair, point: str) -> None:
    guest = pair.make_guest("victim")
    images = guest.images(HOME)
    with pair.never_twice(guest):
        job_id = pair.crash(guest, HOME, point, **RESTART)
        check_settled(pair, guest, job_id, BACKUP if point in GOES_ON else HOME)
    if point in GOES_BACK:
        assert guest.images(HOME) == images


@pytest.mark.parametrize("point", sampled(SAMPLE, *ARRIVAL_GOES_BACK, *ARRIVAL_GOES_ON))
def test_destination_proxy_killed(pair: EvacuationPair, point: str) -> None:
    guest = pair.make_guest("victim")
    with pair.never_twice(guest):
        job_id = pair.crash(guest, BACKUP, point, **RESTART)
        check_settled(pair, guest, job_id, BACKUP if point in ARRIVAL_GOES_ON else HOME)


@pytest.mark.parametrize("point", sampled(SAMPLE, *ROLLBACK))
def test_a_proxy_killed_in_a_rollback(pair: EvacuationPair, point: str) -> None:
    """The destination has it standing there when the source is told to take it back."""
    guest = pair.make_guest("victim")
    host = BACKUP if point == "arrival-aborting" else HOME
    with pair.never_twice(guest):
        pair.restart(BACKUP, stop_at="arrival-prepared", crash_at=point if host is BACKUP else "")
        if host is HOME:
            pair.restart(HOME, crash_at=point)
        pair.wait_links()
        job_id = pair.begin(HOME, guest, **RESTART)["id"]
        pair.wait_stopped(BACKUP)
        pair.ask(HOME, "POST", f"/v1/evacuations/{job_id}/cancel", {})
        pair.go_on(BACKUP)
        wait_for(lambda: not pair.alive(host), timeout_seconds=120)
        pair.start(host)
        check_settled(pair, guest, job_id, HOME)


@pytest.mark.parametrize(
    "point",
    sampled(set(), "restart-stopped", "departure-prepared", "departure-tombstoned", "departure-released"),
)
def test_home_loses_power_and_nothing_runs_there_that_was_released(pair: EvacuationPair, point: str) -> None:
    guest = pair.make_guest("survivor")
    pair.virsh(HOME, "autostart", guest.plan.uuid)
    with pair.never_twice(guest):
        pair.restart(HOME, crash_at=point)
        pair.wait_links()
        job_id = str(pair.begin(HOME, guest, **RESTART)["id"])
        wait_for(lambda: not pair.alive(HOME), timeout_seconds=120)
        pair.lab.kill_host(HOME)
        pair.lab.start_host(HOME)
        # libvirt is up, our proxy is not: the hook alone holds the line, before the release, too
        pair.virsh(HOME, "list")
        refused = pair.start_is_refused(HOME, guest)
        released = point in {"departure-tombstoned", "departure-released"}
        assert ("runs there" if released else "was shut down here to be started at") in refused
        pair.start(HOME)
        check_settled(pair, guest, job_id, HOME if point == "restart-stopped" else BACKUP)


@pytest.mark.soak
def test_a_destination_that_loses_power_gives_the_guest_back(pair: EvacuationPair) -> None:
    guest = pair.make_guest("returned")
    with pair.never_twice(guest):
        pair.restart(HOME, crash_at="departure-tombstoned")
        pair.wait_links()
        job_id = str(pair.begin(HOME, guest, **RESTART)["id"])
        wait_for(lambda: not pair.alive(HOME), timeout_seconds=120)
        pair.lab.kill_host(BACKUP)
        pair.lab.start_host(BACKUP)
        assert "not released" in pair.start_is_refused(BACKUP, guest)
        pair.start(BACKUP)
        pair.start(HOME)
        check_settled(pair, guest, job_id, HOME)


@pytest.mark.soak
def test_without_contact_before_the_release_it_runs_here_again_at_once(pair: EvacuationPair) -> None:
    """Its memory is nowhere, so there is nothing to wait for; the destination runs nothing unreleased."""
    guest = pair.make_guest("alone")
    with pair.never_twice(guest):
        pair.restart(HOME, stop_at="departure-before-prepare")
        pair.wait_links()
        job_id = str(pair.begin(HOME, guest, **RESTART)["id"])
        pair.wait_stopped(HOME)
        pair.cut()
        pair.go_on(HOME)
        wait_for(guest.running_on, lambda hosts: hosts == [HOME], timeout_seconds=120)
        assert pair.job(HOME, job_id)["verdict"] in {None, "stayed"}, "while the link is still cut"
        pair.lab.wan.heal()
        check_settled(pair, guest, job_id, HOME)


@pytest.mark.soak
def test_without_contact_once_released_it_waits_and_goes_on(pair: EvacuationPair) -> None:
    guest = pair.make_guest("given up")
    with pair.never_twice(guest):
        pair.restart(HOME, stop_at="departure-tombstoned")
        pair.wait_links()
        job_id = str(pair.begin(HOME, guest, **RESTART)["id"])
        pair.wait_stopped(HOME)
        pair.cut()
        pair.go_on(HOME)
        wait_for(
            lambda: pair.job(HOME, job_id)["step"], lambda step: step == "undecided", timeout_seconds=120
        )
        assert guest.states() == {HOME: "shut off", BACKUP: "paused"}
        pair.lab.wan.heal()
        check_settled(pair, guest, job_id, BACKUP)


@pytest.mark.soak
def test_a_debian_guest_shuts_down_in_order_and_keeps_its_rows(pair: EvacuationPair) -> None:
    guest = pair.make_guest(
        "debian", system="debian", workload="fsync-log,database", ram_mib=320, disk_mib=1024
    )
    wait_for(lambda: guest.told().highest_committed, lambda rows: rows > 20)
    with pair.never_twice(guest), guest_that_obeys(pair, guest, HOME, "run systemctl poweroff"):
        job_id = pair.begin(HOME, guest, mode="restart", shutdown_seconds=120)["id"]
        job = check_settled(pair, guest, job_id, BACKUP)
    assert job["powered_off"] is False, job
    print({key: job[key] for key in ("downtime_seconds", "eviction_seconds")})
    rows = guest.told().highest_committed
    wait_for(lambda: guest.told().highest_committed, lambda now: now > rows)
