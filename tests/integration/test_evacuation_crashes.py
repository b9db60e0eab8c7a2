# SPDX-License-Identifier: GPL-3.0-or-later
"""Proxies killed at every named line of an evacuation, hosts that lose power: the VM runs once, and is not
lost."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest

from integration.evacuation_pair import EvacuationPair, sampled
from integration.proxy_pair import BACKUP, HOME, wait_for
from lifeboat_lab.guests.guests import Guest
from precache_proxy.crash_points import CRASH_POINTS

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

# Killed up to here the VM stays where it was, killed later it is evacuated: what is whole is not copied
# again.
GOES_BACK = (
    "departure-admitted", "departure-before-freeze", "departure-frozen", "departure-residual-sealed",
    "departure-before-prepare", "departure-prepared", "departure-migrating",
    # libvirt waits for its last word, by a relay that is dead then, and lets the guest go on: once it can
    "departure-migrated", "departure-before-tombstone", "departure-halted", "departure-tombstoned",
)  # fmt: skip
GOES_ON = (
    "departure-released",
    "departure-activated", "departure-before-undefine", "departure-undefined", "departure-adopted",
)  # fmt: skip
ARRIVAL_GOES_BACK = ("arrival-recorded", "arrival-guarded", "arrival-prepared")
ARRIVAL_GOES_ON = (
    "arrival-released", "arrival-resumed", "arrival-activated", "arrival-tops-named", "arrival-changed-over",
    "arrival-tracked", "return-sealed", "landing-begun", "landing-merged", "landing-collapsed",
)  # fmt: skip
ROLLBACK = ("rollback-begun", "rollback-peer-cleaned", "rollback-merged", "arrival-aborting")
CALLED_OFF = ("departure-before-standstill", "departure-stands-still")
# Each test run takes these; the whole table is for `make soak`.
SAMPLE = {
    "departure-frozen", "departure-migrating", "departure-halted", "departure-released",
    "departure-undefined", "arrival-prepared", "arrival-released", "arrival-resumed", "arrival-tops-named",
    "rollback-peer-cleaned", "departure-stands-still",
}  # fmt: skip


def check_settled(pair: EvacuationPair, guest: Guest, job_id: str, canary: str, where: str) -> None:
    """What must hold when all proxies are back, with nothing left over and the VM protected where it is."""
    pair.check_settled(guest, job_id, canary, where)
    assert pair.leftovers(HOME) == pair.leftovers(BACKUP) == []
    pair.wait_protected(guest, where)


def test_every_point_of_an_evacuation_is_in_a_table_here() -> None:
    named = {*GOES_BACK, *GOES_ON, *ARRIVAL_GOES_BACK, *ARRIVAL_GOES_ON, *ROLLBACK, *CALLED_OFF}
    prefixes = ("departure-", "arrival-", "landing-", "return-", "rollback-")
    assert named == {point for point in CRASH_POINTS if point.startswith(prefixes)}


def check_killed(pair: EvacuationPair, host: str, point: str, where: str) -> None:
    """A guest whose evacuation meets a proxy that is killed at the point is in the end where it is to be."""
    guest = pair.make_guest("victim")
    canary, images = guest.canary(HOME), guest.images(HOME)
    with pair.never_twice(guest):
        job_id = pair.crash(guest, host, point)
        check_settled(pair, guest, job_id, canary, where)
    if where == HOME:
        assert guest.images(HOME) == images, "its overlays are merged back"


@pytest.mark.parametrize("point", sampled(SAMPLE, *GOES_BACK))
def test_source_proxy_killed_before_the_hand_off(pair: EvacuationPair, point: str) -> None:
    check_killed(pair, HOME, point, HOME)


@pytest.mark.parametrize("point", sampled(SAMPLE, *GOES_ON))
def test_source_proxy_killed_after_the_hand_off(pair: EvacuationPair, point: str) -> None:
    check_killed(pair, HOME, point, BACKUP)


@pytest.mark.parametrize("point", sampled(SAMPLE, *ARRIVAL_GOES_BACK))
def test_destination_proxy_killed_while_it_prepares(pair: EvacuationPair, point: str) -> None:
    check_killed(pair, BACKUP, point, HOME)


@pytest.mark.parametrize("point", sampled(SAMPLE, *ARRIVAL_GOES_ON))
def test_destination_proxy_killed_once_the_guest_is_there(pair: EvacuationPair, point: str) -> None:
    check_killed(pair, BACKUP, point, BACKUP)


@pytest.mark.parametrize("point", sampled(SAMPLE, *ROLLBACK))
def test_a_proxy_killed_in_a_rollback(pair: EvacuationPair, point: str) -> None:
    guest = pair.make_guest("victim")
    canary, images = guest.canary(HOME), guest.images(HOME)
    host = BACKUP if point == "arrival-aborting" else HOME
    with pair.never_twice(guest):
        pair.restart(host, crash_at=point)
        pair.wait_links()
        job = pair.begin(HOME, guest, bandwidth_bytes_per_second=2_000_000)
        pair.wait_step(HOME, job["id"], "migrate")
        pair.ask(HOME, "POST", f"/v1/evacuations/{job['id']}/cancel", {})
        wait_for(lambda: not pair.alive(host), timeout_seconds=120)
        pair.start(host)
        check_settled(pair, guest, job["id"], canary, HOME)
    assert guest.images(HOME) == images


@pytest.mark.parametrize("point", sampled(SAMPLE, *CALLED_OFF))
def test_source_proxy_killed_while_the_guest_stands_still_to_be_called_off(
    pair: EvacuationPair, point: str
) -> None:
    guest = pair.make_guest("victim")
    canary, images, boots = guest.canary(HOME), guest.images(HOME), guest.told().boots
    with pair.never_twice(guest):
        pair.restart(HOME, crash_at=point)
        pair.wait_links()
        job = pair.begin(HOME, guest, bandwidth_bytes_per_second=2_000_000, synchronous_writes=True)
        wait_for(
            lambda: pair.job(HOME, job["id"]), lambda told: bool(told["progress"].get("memory_total_bytes"))
        )
        with suppress(OSError):
            pair.ask(HOME, "POST", f"/v1/evacuations/{job['id']}/cancel", {})
        wait_for(lambda: not pair.alive(HOME), timeout_seconds=120)
        pair.start(HOME)
        check_settled(pair, guest, job["id"], canary, HOME)
    assert guest.images(HOME) == images
    assert guest.told().boots == boots


CONFIRM = (
    "departure-released", "departure-activated", "departure-before-undefine", "departure-undefined",
    "departure-adopted",
)  # fmt: skip


@pytest.mark.parametrize("point", sampled(SAMPLE, *CONFIRM))
def test_home_loses_power_in_confirm_and_starts_nothing_when_it_is_back(
    pair: EvacuationPair, point: str
) -> None:
    guest = pair.make_guest("survivor")
    pair.virsh(HOME, "autostart", guest.plan.uuid)
    with pair.never_twice(guest):
        job_id = pair.begin_until_killed(guest, HOME, point)
        pair.lab.kill_host(HOME)
        pair.lab.start_host(HOME)
        # libvirt is up, our proxy is not: the hook alone holds the line
        pair.virsh(HOME, "list")
        time.sleep(2)
        assert HOME not in guest.running_on()
        if HOME in guest.states():
            assert "runs there" in pair.start_is_refused(HOME, guest)
        pair.start(HOME)
        job = pair.wait_job(HOME, job_id)
        assert job["verdict"] == "evacuated"
        wait_for(guest.running_on, lambda hosts: hosts == [BACKUP])
    assert HOME not in guest.states()
    pair.wait_landed(BACKUP, guest)
    assert guest.verify(BACKUP).intact


@pytest.mark.parametrize("point", ["departure-tombstoned", "departure-released"])
def test_a_destination_that_loses_power_before_the_release_gives_the_guest_back(
    pair: EvacuationPair, point: str
) -> None:
    """Its QEMU at home is halted until the destination has said what became of it: it keeps its memory."""
    guest = pair.make_guest("returned")
    canary, boots = guest.canary(HOME), guest.told().boots
    with pair.never_twice(guest):
        job_id = pair.begin_until_killed(guest, HOME, point)
        # Libvirt's last call there may still be under way.
        wait_for(lambda: guest.plan.uuid in pair.virsh(BACKUP, "list", "--all", "--persistent", "--uuid"))
        pair.lab.kill_host(BACKUP)
        pair.lab.start_host(BACKUP)
        # defined there, its memory gone, and not released: it must not start
        assert "not released" in pair.start_is_refused(BACKUP, guest)
        pair.start(BACKUP)
        pair.start(HOME)
        job = pair.wait_job(HOME, job_id)
        assert (job["verdict"], job["memory_lost"]) == ("stayed", False), job
        wait_for(guest.running_on, lambda hosts: hosts == [HOME])
    assert guest.verify(HOME, canary=canary).intact
    assert guest.told().boots == boots
    assert BACKUP not in guest.states()


def test_without_contact_it_stays_undecided_until_the_operator_settles_it(pair: EvacuationPair) -> None:
    guest = pair.make_guest("in doubt")
    with pair.never_twice(guest):
        job_id = pair.begin_until_killed(guest, HOME, "departure-tombstoned")
        pair.lab.kill_host(HOME)
        told = wait_for(
            lambda: pair.arrival(BACKUP, guest),
            lambda told: told["cause"] == "no-contact",
            timeout_seconds=120,
        )
        assert "source-dead" in told["sentence"]
        assert guest.states() == {BACKUP: "paused"}
        pair.ask(BACKUP, "POST", f"/v1/evacuations/{job_id}/settle", {"decision": "source-dead"})
        assert guest.running_on() == [BACKUP]
        # The home site comes back: it learns of the newer epoch and keeps still.
        pair.lab.start_host(HOME)
        assert "runs there" in pair.start_is_refused(HOME, guest)
        pair.start(HOME)
        job = pair.wait_job(HOME, job_id)
        assert job["verdict"] == "evacuated"
    assert guest.running_on() == [BACKUP]
    assert HOME not in guest.states()
