# SPDX-License-Identifier: GPL-3.0-or-later
"""A running VM goes out and comes back: nothing is lost, nothing runs twice, nothing is left lying about."""

from __future__ import annotations

import time

import pytest

from integration.evacuation_pair import EvacuationPair
from integration.proxy_pair import BACKUP, HOME, STATE, Refused, wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


def test_a_guest_with_two_disks_goes_out_and_comes_back(pair: EvacuationPair) -> None:
    guest = pair.make_guest("out ünd back", disks=2)
    images = guest.images(HOME)
    job = pair.evacuate(guest)
    for figure in ("eviction_seconds", "downtime_seconds"):
        value = job[figure]
        assert isinstance(value, float)
        assert value > 0
    sent = job["bytes"]
    assert isinstance(sent, dict)
    assert 0 < sent["ram_sent_bytes"] < sent["ram_stream_bytes"]
    assert sent["disk_stream_bytes"] < 64 << 20, "only what was written since the freeze crosses then"

    # What stayed at home belongs to whom it belonged, and a copy that somebody defines again does not start.
    for path, _ in images.values():
        assert pair.shell(HOME, f"stat -c %U '{path}'").strip() == "root"
    stale = pair.virsh(BACKUP, "dumpxml", "--inactive", guest.plan.uuid)
    for target, (path, _) in guest.images(BACKUP).items():
        stale = stale.replace(path, images[target][0])
    (pair.root(HOME) / "var/tmp/stale.xml").write_text(stale)
    pair.virsh(HOME, "define", "/var/tmp/stale.xml")
    assert "runs there" in pair.start_is_refused(HOME, guest)
    pair.virsh(HOME, "undefine", guest.plan.uuid)

    pair.wait_protected(guest, BACKUP)
    pair.evacuate(guest, BACKUP)
    assert guest.images(HOME) == images, "its disks have their old names again"
    pair.virsh(HOME, "destroy", guest.plan.uuid)
    for path, _ in images.values():
        assert pair.shell(HOME, f"stat -c %U '{path}'").strip() == "root", "ownership is right after a stop"


@pytest.mark.soak
def test_ten_times_there_and_back(pair: EvacuationPair) -> None:
    guest = pair.make_guest("commuter")
    source, destination = HOME, BACKUP
    for turn in range(20):
        job = pair.evacuate(guest, source)
        assert job["epoch"] == turn + 1
        source, destination = destination, source
        pair.wait_protected(guest, source)
        told = pair.ask(source, "GET", f"/v1/vms/{guest.plan.uuid}")
        chain = pair.virsh(source, "dumpxml", guest.plan.uuid).count("<backingStore type=")
        assert chain == 0, "every landing collapses the chain"
        assert told["epoch"] == turn + 1


@pytest.mark.soak
@pytest.mark.parametrize("profile", ["metro", "rate=400mbit,rtt=180ms"])
def test_the_downtime_that_is_told_is_the_guests(pair: EvacuationPair, profile: str) -> None:
    """Judged by the guest's heartbeats, which need no network and are read on both hosts."""
    guest = pair.make_guest("pulse", workload="idle", ram_mib=96)
    pair.lab.wan.set(profile)
    try:
        with guest.watch() as watch:
            job = pair.wait_job(HOME, pair.begin(HOME, guest)["id"])
            time.sleep(1)
        assert job["verdict"] == "evacuated", f"{job['cause']}: {job['sentence']}"
        gap_seconds = watch.longest_gap_seconds()
        print(f"{profile}: told {job['downtime_seconds']:.3f} s, by its heartbeats {gap_seconds:.3f} s")
        print(f"QEMU's own: {job['qemu_downtime_seconds']} s")
        # A guest that runs again needs a moment for its first beat: emulated code is translated anew.
        assert -0.1 < gap_seconds - job["downtime_seconds"] < 0.6
    finally:
        pair.lab.wan.set("none")


def test_two_starts_at_once_are_one_job_and_a_third_after_the_end_is_too(pair: EvacuationPair) -> None:
    guest = pair.make_guest("wanted")
    with pair.never_twice(guest):
        first = pair.begin(HOME, guest)
        second = pair.begin(HOME, guest)
        assert first["id"] == second["id"]
        pair.wait_job(HOME, first["id"])
        assert pair.begin(HOME, guest)["id"] == first["id"]
    assert guest.running_on() == [BACKUP]


def test_cancelled_while_migrating_it_stays_and_the_next_pass_is_small(pair: EvacuationPair) -> None:
    guest = pair.make_guest("hesitant")
    canary = guest.canary(HOME)
    images = guest.images(HOME)
    with pair.never_twice(guest):
        job = pair.begin(HOME, guest, bandwidth_bytes_per_second=2_000_000)
        pair.wait_step(HOME, job["id"], "migrate")
        pair.ask(HOME, "POST", f"/v1/evacuations/{job['id']}/cancel", {})
        job = pair.wait_job(HOME, job["id"])
    assert (job["step"], job["verdict"], job["cause"]) == ("stayed", "stayed", "cancelled"), job
    assert guest.running_on() == [HOME]
    assert guest.images(HOME) == images
    assert guest.verify(HOME, canary=canary).intact
    assert pair.leftovers(HOME) == pair.leftovers(BACKUP) == []
    assert BACKUP not in guest.states()
    assert not pair.guarded(BACKUP, guest)
    passed = pair.ask(HOME, "POST", f"/v1/vms/{guest.plan.uuid}/pass", {})
    assert passed["compared_bytes"] == 0, "no comparison: the bitmap survived"
    assert passed["data_bytes"] < 32 << 20, "incremental"
    pair.evacuate(guest)


def test_a_link_cut_while_migrating_leaves_the_guest_running_here(pair: EvacuationPair) -> None:
    guest = pair.make_guest("cut off")
    with pair.never_twice(guest):
        job = pair.begin(HOME, guest, bandwidth_bytes_per_second=1_000_000)
        pair.wait_step(HOME, job["id"], "migrate")
        pair.lab.wan.cut("home", "backup")
        pair.lab.wan.cut("backup", "home")
        told = wait_for(
            lambda: pair.job(HOME, job["id"]),
            lambda told: told["step"] == "stayed",
            timeout_seconds=120,
        )
        assert told["owes_abort"], "the peer has not been told"
        assert guest.running_on() == [HOME]
        pair.lab.wan.heal()
        pair.wait_job(HOME, job["id"])
    wait_for(lambda: pair.arrival(BACKUP, guest)["state"], lambda state: state == "aborted")
    assert guest.verify(HOME).intact
    pair.wait_links()
    pair.evacuate(guest)


def test_everything_in_the_way_is_told_at_once_and_nothing_is_changed(pair: EvacuationPair) -> None:
    guest = pair.make_guest("blocked")
    xml = pair.virsh(HOME, "dumpxml", "--inactive", guest.plan.uuid)
    namesake = xml.replace(guest.plan.uuid, "99999999-2222-4333-8444-555555555501")
    (pair.root(BACKUP) / "var/tmp/namesake.xml").write_text(namesake)
    pair.virsh(BACKUP, "define", "/var/tmp/namesake.xml")
    kernel = xml.split("<kernel>")[1].split("</kernel>")[0]
    pair.shell(BACKUP, f"mv {kernel} {kernel}.away")
    try:
        before = guest.images(HOME)
        found = pair.ask(HOME, "POST", "/v1/evacuations/check", {"vm": guest.plan.uuid})["findings"]
        facts = " ".join(finding["fact"] for finding in found)
        assert "has its name at the destination" in facts
        assert f"{kernel} is not there" in facts
        job = pair.wait_job(HOME, pair.begin(HOME, guest)["id"])
        assert (job["step"], job["verdict"]) == ("stayed", "stayed")
        assert len(job["findings"]) == len(found)
        assert guest.images(HOME) == before
        assert pair.shell(BACKUP, f"ls {STATE}/arrivals 2>/dev/null", check=False) == ""
    finally:
        pair.shell(BACKUP, f"mv {kernel}.away {kernel}")
        pair.virsh(BACKUP, "undefine", "99999999-2222-4333-8444-555555555501")
    with pytest.raises(Refused) as unknown:
        pair.ask(HOME, "POST", "/v1/evacuations", {"vm": "no such VM"})
    assert unknown.value.cause == "not-found"
    assert "no such VM" in unknown.value.message
