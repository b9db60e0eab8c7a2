# SPDX-License-Identifier: GPL-3.0-or-later
"""Live moves that are ended before their end, with mirrors that the guest's writes wait for: the VM keeps its
memory.

QEMU 10.0 frees a bitmap under writes that wait (block/mirror.c) and may crash; not at every cancel, so that
it takes many to see it.
"""

from __future__ import annotations

import random
import time

import pytest

from integration.evacuation_pair import EvacuationPair
from integration.proxy_pair import BACKUP, HOME, Answer, wait_for
from lifeboat_lab.guests.guests import Guest

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1500)]

LINE = "rate=10mbit,rtt=40ms"
ROUND_TRIP_SECONDS = 0.04


def under_way(pair: EvacuationPair, guest: Guest, *, synchronous: bool = True) -> str:
    """A live move whose memory has begun to cross; its number."""
    job_id = str(pair.begin(HOME, guest, synchronous_writes=synchronous)["id"])
    told = wait_for(
        lambda: pair.job(HOME, job_id),
        lambda told: bool(told["progress"].get("memory_total_bytes")) or told["step"] in {"done", "stayed"},
        timeout_seconds=120,
    )
    assert told["step"] == "migrate", told
    # Anywhere in the guest's writes.
    time.sleep(random.uniform(0.0, 1.0))
    return job_id


def called_off(pair: EvacuationPair, guest: Guest, *, synchronous: bool = True) -> Answer:
    """The job of a move that was begun and cancelled."""
    job_id = under_way(pair, guest, synchronous=synchronous)
    pair.ask(HOME, "POST", f"/v1/evacuations/{job_id}/cancel", {})
    return pair.wait_job(HOME, job_id)


def check_kept(pair: EvacuationPair, guest: Guest, job: Answer, boots: int) -> None:
    """The guest runs here, in the life that it had."""
    assert (job["verdict"], job["cause"], job["memory_lost"]) == ("stayed", "cancelled", False), (
        job, pair.log(HOME),
    )  # fmt: skip
    assert guest.running_on() == [HOME]
    assert guest.told().boots == boots


@pytest.mark.parametrize("times", [3, pytest.param(30, marks=pytest.mark.soak)])
@pytest.mark.parametrize("records_per_second", [2, 20])
def test_cancels_of_moves_that_the_guests_writes_wait_for(
    pair: EvacuationPair, times: int, records_per_second: int
) -> None:
    guest = pair.make_guest("kept", records_per_second=records_per_second)
    canary, boots = guest.canary(HOME), guest.told().boots
    pair.lab.wan.set(LINE)
    try:
        still, gaps = [], []
        with pair.never_twice(guest):
            for _ in range(times):
                with guest.watch() as watch:
                    job = called_off(pair, guest)
                    time.sleep(0.2)
                check_kept(pair, guest, job, boots)
                assert job["stood_still_seconds"] is not None, "it was stopped for it"
                still.append(job["stood_still_seconds"])
                gaps.append(watch.longest_gap_seconds())
        print(f"stood still {sorted(still)}, longest gaps of heartbeats {sorted(gaps)} s")
    finally:
        pair.lab.wan.set("none")
    found = guest.verify(HOME, canary=canary)
    assert found.intact, found.findings
    pair.evacuate(guest)


def test_a_guest_whose_mirrors_run_in_the_background_is_not_stopped(pair: EvacuationPair) -> None:
    guest = pair.make_guest("unstopped", workload="idle")
    canary, boots = guest.canary(HOME), guest.told().boots
    pair.lab.wan.set(LINE)
    try:
        job = called_off(pair, guest, synchronous=False)
    finally:
        pair.lab.wan.set("none")
    check_kept(pair, guest, job, boots)
    assert (job["stopped_here"], job["stood_still_seconds"]) == (False, None)
    assert guest.verify(HOME, canary=canary).intact


def test_a_cancel_over_a_line_that_is_cut(pair: EvacuationPair) -> None:
    """The stop waits for writes that cannot cross, until the relays are closed; then all goes on."""
    guest = pair.make_guest("cut off", records_per_second=20)
    canary, boots = guest.canary(HOME), guest.told().boots
    pair.lab.wan.set(LINE)
    try:
        with pair.never_twice(guest):
            job_id = under_way(pair, guest)
            pair.cut()
            time.sleep(3 * ROUND_TRIP_SECONDS)
            pair.ask(HOME, "POST", f"/v1/evacuations/{job_id}/cancel", {})
            told = pair.wait_step(HOME, job_id, "stayed")
            assert guest.running_on() == [HOME]
            print(f"stood still {told['stood_still_seconds']} s")
            pair.lab.wan.heal()
            check_kept(pair, guest, pair.wait_job(HOME, job_id), boots)
    finally:
        pair.lab.wan.heal()
        pair.lab.wan.set("none")
    found = guest.verify(HOME, canary=canary)
    assert found.intact, found.findings


@pytest.mark.parametrize("stops", [HOME, BACKUP])
def test_a_proxy_that_is_stopped_ends_the_move_first(pair: EvacuationPair, stops: str) -> None:
    """Its relays would take the mirrors along, with the guest's writes in them."""
    guest = pair.make_guest(f"upgraded at {stops}", records_per_second=20)
    canary, boots = guest.canary(HOME), guest.told().boots
    pair.lab.wan.set(LINE)
    try:
        with pair.never_twice(guest):
            job_id = under_way(pair, guest)
            began = time.monotonic()
            pair.restart(stops)
            print(f"stopped and started again in {time.monotonic() - began:.1f} s")
            pair.wait_links()
            pair.wait_job(HOME, job_id)
            # Until then the proxy lets it run again whenever it finds it paused, as for its verification.
            job = wait_for(
                lambda: pair.job(HOME, job_id), lambda told: not told["pause_unanswered"], timeout_seconds=180
            )
    finally:
        pair.lab.wan.set("none")
    assert (job["verdict"], job["cause"], job["memory_lost"]) == ("stayed", "proxy-restarted", False), (
        job, pair.log(HOME), pair.log(stops),
    )  # fmt: skip
    assert job["stood_still_seconds"] is not None, "its guest was stopped before the relays were closed"
    assert guest.running_on() == [HOME]
    assert guest.told().boots == boots
    found = guest.verify(HOME, canary=canary)
    assert found.intact, found.findings


def test_a_guest_that_somebody_paused_on_the_way_stays_paused(pair: EvacuationPair) -> None:
    """Paused before libvirt has the move, and cancelled: it is not the proxy's to let it run."""
    guest = pair.make_guest("held by hand")
    canary = guest.canary(HOME)
    pair.lab.wan.set(LINE)
    try:
        job_id = pair.begin_until(guest, HOME, "departure-prepared")
        pair.virsh(HOME, "suspend", guest.plan.uuid)
        pair.go_on(HOME)
        pair.ask(HOME, "POST", f"/v1/evacuations/{job_id}/cancel", {})
        job = pair.wait_job(HOME, job_id)
    finally:
        pair.lab.wan.set("none")
    assert (job["verdict"], job["cause"], job["stopped_here"]) == ("stayed", "cancelled", False), job
    assert "It is paused here" in job["sentence"]
    assert pair.virsh(HOME, "domstate", "--reason", guest.plan.uuid).strip() == "paused (user)"
    pair.virsh(HOME, "resume", guest.plan.uuid)
    assert guest.verify(HOME, canary=canary).intact


@pytest.mark.parametrize("times", [1, pytest.param(15, marks=pytest.mark.soak)])
def test_lines_cut_under_moves_that_the_guests_writes_wait_for(pair: EvacuationPair, times: int) -> None:
    """Its stop is asked for before the relays are closed, and ends with them."""
    guest = pair.make_guest("cut off", records_per_second=20)
    canary, boots = guest.canary(HOME), guest.told().boots
    pair.lab.wan.set(LINE)
    lost, still = 0, []
    try:
        for _ in range(times):
            job_id = under_way(pair, guest)
            pair.cut()
            told = pair.wait_step(HOME, job_id, "stayed")
            lost += bool(told["memory_lost"])
            assert told["stood_still_seconds"] is not None, (told, pair.log(HOME))
            still.append(told["stood_still_seconds"])
            pair.lab.wan.heal()
            pair.wait_links()
            pair.wait_job(HOME, job_id)
        print(f"memory lost in {lost} of {times} cuts, stood still {sorted(still)} s")
    finally:
        pair.lab.wan.heal()
        pair.lab.wan.set("none")
    assert guest.told().boots == boots + lost
    found = guest.verify(HOME, canary=None if lost else canary)
    assert found.intact, found.findings
