# SPDX-License-Identifier: GPL-3.0-or-later
"""Contact lost at each step of an evacuation, replies lost, daemons restarted, disks full: the VM runs once.

The proxy that reaches a named line stops there, the world is changed, and it goes on.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import pytest

from integration.evacuation_pair import (
    BACKUP,
    DIRECTORY,
    HOME,
    STATE,
    Answer,
    EvacuationPair,
    Refused,
    wait_for,
)
from lifeboat_lab.guests.guests import Guest
from lifeboat_lab.lab import Lab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

# Cut here, the VM goes on at home, without having been told anything by anybody.
STAYS = (
    "departure-before-freeze", "departure-frozen", "departure-residual-sealed", "departure-before-prepare",
    "departure-prepared", "departure-migrating",
)  # fmt: skip
# Cut here, it is off at home and paused there: nobody may run it until contact is back.
IN_DOUBT = ("departure-migrated", "departure-before-tombstone", "departure-tombstoned", "departure-released")
# Cut here, everything has been said.
DONE = ("departure-activated", "departure-before-undefine", "departure-undefined", "departure-adopted")
ARRIVAL_STAYS = ("arrival-recorded", "arrival-guarded", "arrival-prepared")
# Cut here, the destination has been released and does not need the source any more.
ARRIVAL_GOES_ON = ("arrival-released", "arrival-resumed", "arrival-activated")
SAMPLE = {"departure-residual-sealed", "departure-released", "arrival-released"}


def cases(*points: str) -> list[object]:
    return [pytest.param(point, marks=[] if point in SAMPLE else [pytest.mark.soak]) for point in points]


@pytest.fixture(scope="module")
def installed(lab: Lab) -> Iterator[EvacuationPair]:
    """Both proxies on their hosts, not started."""
    pair = EvacuationPair(lab)
    pair.install()
    yield pair
    pair.close()


@pytest.fixture
def pair(installed: EvacuationPair) -> Iterator[EvacuationPair]:
    """Both proxies running and hearing each other."""
    for host in (HOME, BACKUP):
        if not installed.lab.host(host).running:
            installed.lab.start_host(host)
        installed.configure(host)
        installed.start(host)
    installed.wait_links()
    yield installed
    installed.lab.wan.heal()
    installed.remove_guests()


def begin_until(pair: EvacuationPair, guest: Guest, host: str, point: str) -> str:
    """Begin an evacuation whose proxy on that host stops at the point; the job's number, once it stands
    there."""
    pair.restart(host, stop_at=point)
    pair.wait_links()
    job_id = str(pair.begin(HOME, guest)["id"])
    pair.wait_stopped(host)
    return job_id


def cut_at(pair: EvacuationPair, guest: Guest, host: str, point: str) -> str:
    """The same, with the link cut before the next line is run."""
    job_id = begin_until(pair, guest, host, point)
    pair.cut()
    pair.go_on(host)
    return job_id


def wait_step(pair: EvacuationPair, job_id: str, *steps: str) -> Answer:
    """Until the source's job is at one of the steps."""
    told: Answer = wait_for(
        lambda: pair.job(HOME, job_id), lambda told: told["step"] in steps, timeout_seconds=240
    )
    return told


def check_settled(pair: EvacuationPair, guest: Guest, job_id: str, canary: str, where: str) -> Answer:
    """With contact again: one guest, whole, with its memory, nothing left over, and protected."""
    job = pair.wait_job(HOME, job_id)
    assert job["verdict"] == ("evacuated" if where == BACKUP else "stayed"), job
    assert job["memory_lost"] is False
    assert guest.running_on() == [where]
    if where == BACKUP:
        pair.wait_landed(BACKUP, guest)
        assert HOME not in guest.states()
        assert pair.guarded(HOME, guest)
    else:
        wait_for(lambda: not pair.guarded(BACKUP, guest))
        assert BACKUP not in guest.states()
    assert not pair.guarded(where, guest)
    verdict = guest.verify(where, canary=canary)
    assert verdict.intact, verdict.findings
    wait_for(lambda: pair.leftovers(HOME) + pair.leftovers(BACKUP), lambda found: found == [])
    pair.wait_links()
    pair.wait_protected(guest, where)
    return job


# -- the link is cut


@pytest.mark.parametrize("point", cases(*STAYS))
def test_link_cut_before_the_hand_off(pair: EvacuationPair, point: str) -> None:
    guest = pair.make_guest("cut off")
    canary, images = guest.canary(HOME), guest.images(HOME)
    with pair.never_twice(guest):
        job_id = cut_at(pair, guest, HOME, point)
        wait_step(pair, job_id, "stayed")
        assert guest.running_on() == [HOME], "without contact, too"
        assert guest.images(HOME) == images, "its overlays are merged back"
        pair.lab.wan.heal()
        check_settled(pair, guest, job_id, canary, HOME)


@pytest.mark.parametrize("point", cases(*ARRIVAL_STAYS))
def test_link_cut_while_the_destination_prepares(pair: EvacuationPair, point: str) -> None:
    guest = pair.make_guest("cut off")
    canary, images = guest.canary(HOME), guest.images(HOME)
    with pair.never_twice(guest):
        job_id = cut_at(pair, guest, BACKUP, point)
        assert wait_step(pair, job_id, "stayed")["owes_abort"]
        assert guest.running_on() == [HOME]
        assert guest.images(HOME) == images
        pair.lab.wan.heal()
        check_settled(pair, guest, job_id, canary, HOME)


@pytest.mark.parametrize("point", cases(*IN_DOUBT))
def test_link_cut_between_the_vms_end_here_and_its_run_there(pair: EvacuationPair, point: str) -> None:
    """The one window in which nobody may run it: undecided, until contact is back."""
    guest = pair.make_guest("in doubt")
    canary = guest.canary(HOME)
    with pair.never_twice(guest):
        job_id = cut_at(pair, guest, HOME, point)
        told = wait_step(pair, job_id, "undecided", "stayed", "done")
        assert (told["step"], told["verdict"], told["cause"]) == ("undecided", "undecided", "no-contact"), (
            told
        )
        assert "keep-at-source" in told["sentence"]
        assert guest.running_on() == []
        assert guest.states().get(BACKUP) == "paused"
        if point in {"departure-tombstoned", "departure-released"}:
            assert "runs there" in pair.start_is_refused(HOME, guest)
        pair.lab.wan.heal()
        check_settled(pair, guest, job_id, canary, BACKUP)


@pytest.mark.parametrize("point", cases(*DONE))
def test_link_cut_once_it_runs_there(pair: EvacuationPair, point: str) -> None:
    guest = pair.make_guest("away")
    canary = guest.canary(HOME)
    with pair.never_twice(guest):
        job_id = cut_at(pair, guest, HOME, point)
        assert wait_step(pair, job_id, "done")["verdict"] == "evacuated"
        assert guest.running_on() == [BACKUP]
        pair.lab.wan.heal()
        check_settled(pair, guest, job_id, canary, BACKUP)


@pytest.mark.parametrize("point", cases(*ARRIVAL_GOES_ON))
def test_link_cut_once_the_destination_was_released(pair: EvacuationPair, point: str) -> None:
    """It runs there, and the source does not know: it stays off here."""
    guest = pair.make_guest("ahead")
    canary = guest.canary(HOME)
    with pair.never_twice(guest):
        job_id = cut_at(pair, guest, BACKUP, point)
        wait_for(guest.running_on, lambda hosts: hosts == [BACKUP])
        assert wait_step(pair, job_id, "undecided", "stayed", "done")["step"] == "undecided"
        assert guest.running_on() == [BACKUP]
        assert "runs there" in pair.start_is_refused(HOME, guest)
        pair.lab.wan.heal()
        check_settled(pair, guest, job_id, canary, BACKUP)


def test_an_operator_keeps_an_undecided_vm_here(pair: EvacuationPair) -> None:
    guest = pair.make_guest("kept")
    with pair.never_twice(guest):
        job_id = cut_at(pair, guest, HOME, "departure-released")
        wait_step(pair, job_id, "undecided")
        with pytest.raises(Refused) as refused:
            pair.ask(HOME, "POST", f"/v1/evacuations/{job_id}/settle", {"decision": "perhaps"})
        assert refused.value.cause == "invalid"
        pair.ask(HOME, "POST", f"/v1/evacuations/{job_id}/settle", {"decision": "keep-at-source"})
        told = wait_step(pair, job_id, "stayed")
        assert (told["verdict"], told["memory_lost"], told["owes_abort"]) == ("stayed", True, True)
        assert guest.running_on() == [HOME]
        assert guest.states().get(BACKUP) == "paused", "the destination has not heard of it"
        pair.lab.wan.heal()
        pair.wait_job(HOME, job_id)
        wait_for(lambda: pair.arrival(BACKUP, guest)["state"], lambda state: state == "aborted")
        assert guest.running_on() == [HOME]
    assert BACKUP not in guest.states()
    guest.wait_ready()
    assert guest.verify(HOME).intact
    assert pair.leftovers(HOME) == pair.leftovers(BACKUP) == []


# -- what libvirt does not hear


def test_the_last_reply_of_a_migration_is_lost(pair: EvacuationPair) -> None:
    """Libvirt lets the source's VM run again although it stands whole at the destination: we decide."""
    guest = pair.make_guest("unheard")
    canary, images = guest.canary(HOME), guest.images(HOME)
    with pair.never_twice(guest):
        pair.restart(BACKUP, drop_at="relay-finish-reply")
        pair.wait_links()
        job_id = str(pair.begin(HOME, guest)["id"])
        job = check_settled(pair, guest, job_id, canary, HOME)
    assert "lost its last reply" in pair.log(BACKUP) + pair.log(HOME), job
    assert guest.images(HOME) == images


@pytest.mark.parametrize("host", [HOME, pytest.param(BACKUP, marks=pytest.mark.soak)])
def test_libvirtd_restarted_while_migrating(pair: EvacuationPair, host: str) -> None:
    guest = pair.make_guest("steady")
    canary, images = guest.canary(HOME), guest.images(HOME)
    with pair.never_twice(guest):
        job = pair.begin(HOME, guest, bandwidth_bytes_per_second=1_000_000)
        wait_for(
            lambda: pair.job(HOME, job["id"]),
            lambda told: told["step"] == "migrate" and told["progress"].get("elapsed_milliseconds", 0) > 1500,
        )
        pair.shell(host, "systemctl restart libvirtd")
        check_settled(pair, guest, job["id"], canary, HOME)
        assert guest.images(HOME) == images
        job = pair.begin(HOME, guest)
        check_settled(pair, guest, job["id"], canary, BACKUP)


# -- memory or disks are lost


def test_a_released_vm_whose_host_lost_power_is_started_anew_there(pair: EvacuationPair) -> None:
    guest = pair.make_guest("anew")
    with pair.never_twice(guest):
        pair.restart(BACKUP, crash_at="arrival-released")
        pair.wait_links()
        job_id = str(pair.begin(HOME, guest)["id"])
        wait_for(lambda: not pair.alive(BACKUP), timeout_seconds=120)
        pair.lab.kill_host(BACKUP)
        pair.lab.start_host(BACKUP)
        assert "not released" in pair.start_is_refused(BACKUP, guest), "the source is asked first"
        pair.start(BACKUP)
        job = pair.wait_job(HOME, job_id)
        assert (job["verdict"], job["memory_lost"]) == ("evacuated", True), job
        wait_for(guest.running_on, lambda hosts: hosts == [BACKUP])
    guest.wait_ready(host=BACKUP)
    pair.wait_landed(BACKUP, guest)
    assert guest.verify(BACKUP).intact, "every acknowledged write is there"
    assert pair.leftovers(HOME) == pair.leftovers(BACKUP) == []


def fill(pair: EvacuationPair, host: str, directory: str) -> None:
    """Take every byte of a small file system."""
    pair.shell(host, f"dd if=/dev/zero of={directory}/full bs=64k 2>/dev/null; true")


def small_disk(pair: EvacuationPair, host: str, directory: str, mib: int) -> None:
    """A small file system of its own for a directory."""
    pair.shell(
        host,
        f"umount {directory} 2>/dev/null; mkdir -p {directory} && "
        f"mount -t tmpfs -o size={mib}m,mode=711 none {directory}",
    )


@pytest.mark.soak
def test_destination_disk_full_while_the_vm_arrives(pair: EvacuationPair) -> None:
    pair.kill(BACKUP, "TERM")
    small_disk(pair, BACKUP, STATE, 480)
    try:
        pair.start(BACKUP)
        pair.wait_links()
        guest = pair.make_guest("big", records_per_second=100)
        canary, images = guest.canary(HOME), guest.images(HOME)
        with pair.never_twice(guest):
            job = pair.begin(HOME, guest, bandwidth_bytes_per_second=1_000_000)
            pair.wait_step(HOME, job["id"], "migrate")
            fill(pair, BACKUP, STATE)
            told = wait_step(pair, job["id"], "stayed", "undecided", "done")
            assert told["step"] == "stayed", told
            assert guest.running_on() == [HOME]
            pair.shell(BACKUP, f"rm {STATE}/full")
            check_settled(pair, guest, job["id"], canary, HOME)
            assert guest.images(HOME) == images
    finally:
        pair.remove_guests()
        pair.shell(BACKUP, f"umount -l {STATE}", check=False)


@pytest.mark.soak
def test_source_disk_full_at_the_freeze(pair: EvacuationPair) -> None:
    directory = "/var/lib/libvirt/lab-small"
    small_disk(pair, HOME, directory, 480)
    try:
        guest = pair.make_guest("cramped", workload="idle", disk_directory=directory)
        canary, images = guest.canary(HOME), guest.images(HOME)
        with pair.never_twice(guest):
            job_id = begin_until(pair, guest, HOME, "departure-before-freeze")
            fill(pair, HOME, directory)
            pair.go_on(HOME)
            told = wait_step(pair, job_id, "stayed", "undecided", "done")
            assert (told["step"], told["verdict"]) == ("stayed", "stayed"), told
            assert guest.running_on() == [HOME]
            pair.shell(HOME, f"rm {directory}/full")
            check_settled(pair, guest, job_id, canary, HOME)
            assert guest.images(HOME) == images
    finally:
        pair.remove_guests()
        pair.shell(HOME, f"umount -l {directory}", check=False)


# -- who comes first, and who comes too late


def test_two_controllers_at_once_start_one_evacuation(pair: EvacuationPair) -> None:
    guest = pair.make_guest("wanted twice")
    canary = guest.canary(HOME)
    together = threading.Barrier(6)
    answers: list[Answer] = []

    def controller(named: str) -> None:
        together.wait(30)
        answers.append(pair.ask(HOME, "POST", "/v1/evacuations", {"vm": named}))

    threads = [
        threading.Thread(target=controller, args=(named,))
        for named in (guest.plan.uuid, guest.name)
        for _ in range(3)
    ]
    with pair.never_twice(guest):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(answers) == 6
        assert len({answer["id"] for answer in answers}) == 1
        job = check_settled(pair, guest, str(answers[0]["id"]), canary, BACKUP)
    assert pair.begin(HOME, guest)["id"] == job["id"], "and once it is out it is that one, too"
    assert len(pair.ask(HOME, "GET", "/v1/evacuations")["evacuations"]) == 1
    assert len(pair.ask(BACKUP, "GET", "/v1/arrivals")["arrivals"]) == 1


OFFER = """
import asyncio, json, sys
from pathlib import Path
from precache_proxy.channel.channel import Channel
from precache_proxy.channel.settings import TrafficClass
from precache_proxy.config import load
from precache_proxy.daemon import channel_config
from precache_proxy.errors import LifeboatError

async def main(vm, disks, epoch, generation):
    channel = Channel(channel_config(load(Path(sys.argv[1]))))
    await channel.start()
    link = channel.links[sys.argv[2]]
    await link.wait_up(30)
    told = []
    header = {"vm": vm, "epoch": epoch, "generation": generation, "leads_from": generation - 1,
              "checkpoint": "", "disks": disks, "definition": "<domain/>", "residual": False}
    try:
        stream = await link.open_stream("generation", TrafficClass.PRECACHE, header)
        told.append(str(await stream.receive()))
    except LifeboatError as error:
        told.append(getattr(error, "error", error).cause)
    parameters = {"vm": vm, "name": "old", "epoch": epoch, "disks": disks, "definition": "<domain/>"}
    job = {"job": "old-copy", "vm": vm, "name": "old", "epoch": epoch, "generation": generation,
           "disks": disks, "definition": "<domain/>"}
    for method, body in (("store.prepare", parameters), ("evacuation.prepare", job)):
        try:
            told.append(str(await link.call(method, body)))
        except LifeboatError as error:
            told.append(error.cause)
    await channel.stop()
    print(json.dumps(told))

asyncio.run(main(*json.loads(sys.argv[3])))
"""


@pytest.mark.soak
def test_a_generation_of_an_old_epoch_is_refused_after_the_way_back(pair: EvacuationPair) -> None:
    """A home that was restored from a backup offers what it held before the VM went out and came back."""
    guest = pair.make_guest("returned")
    canary = guest.canary(HOME)
    job = pair.begin(HOME, guest)
    check_settled(pair, guest, job["id"], canary, BACKUP)
    job = pair.begin(BACKUP, guest)
    told = pair.wait_job(BACKUP, job["id"])
    assert (told["verdict"], told["epoch"]) == ("evacuated", 2)
    pair.wait_landed(HOME, guest)
    held = pair.wait_protected(guest, HOME)
    replica = pair.ask(BACKUP, "GET", f"/v1/replicas/{guest.plan.uuid}")
    disks = {key: disk["size_bytes"] for key, disk in replica["disks"].items()}
    pair.kill(HOME, "TERM")
    (pair.root(HOME) / "var/tmp/offer.py").write_text(OFFER)
    for epoch in (0, 1):
        words = json.dumps([guest.plan.uuid, disks, epoch, held["generation"] + 1])
        told_causes = json.loads(
            pair.shell(
                HOME,
                f"PYTHONPATH={DIRECTORY} python3 /var/tmp/offer.py {DIRECTORY}/proxy.toml {BACKUP} '{words}'",
            )
        )
        assert told_causes[:2] == ["stale-epoch", "stale-epoch"], epoch
        assert told_causes[2] in {"stale-epoch", "invalid"}, "and no copy of it may come to run there"
    assert pair.ask(BACKUP, "GET", f"/v1/replicas/{guest.plan.uuid}")["sealed"] == replica["sealed"]
    pair.start(HOME)
    pair.wait_links()
    passed = pair.ask(HOME, "POST", f"/v1/vms/{guest.plan.uuid}/pass", {})
    assert passed["compared_bytes"] == 0, "the true home goes on from where it stood"
    assert guest.running_on() == [HOME]


# -- a source that is presumed dead

PRESUMED = "[evacuation]\npresume_source_dead_after_seconds = 300\n"


@pytest.mark.soak
def test_a_source_without_contact_stops_before_it_is_presumed_dead(pair: EvacuationPair) -> None:
    """Libvirt's last reply and the link are lost together: it runs here, and stands whole there."""
    guest = pair.make_guest("fenced", workload="idle")
    with pair.never_twice(guest):
        pair.kill(BACKUP, "TERM")
        pair.configure(BACKUP, PRESUMED)
        pair.start(BACKUP, drop_at="relay-finish-reply")
        job_id = begin_until(pair, guest, HOME, "rollback-begun")
        pair.cut()
        cut_at_seconds = time.monotonic()
        pair.go_on(HOME)
        told = wait_step(pair, job_id, "stayed")
        assert told["owes_abort"]
        assert told["presumed_dead_after_seconds"] == 300
        assert guest.states() == {HOME: "running", BACKUP: "paused"}
        pair.restart(HOME)
        assert guest.running_on() == [HOME], "a restart alone stops nothing"
        wait_for(guest.running_on, lambda hosts: hosts == [], timeout_seconds=200)
        assert 120 < time.monotonic() - cut_at_seconds < 170, "at half of the time"
        assert pair.guarded(HOME, guest)
        wait_for(guest.running_on, lambda hosts: hosts == [BACKUP], timeout_seconds=240)
        assert time.monotonic() - cut_at_seconds >= 290
        assert pair.arrival(BACKUP, guest)["activated_by"] == "presumed"
        pair.lab.wan.heal()
        job = pair.wait_job(HOME, job_id)
        assert job["verdict"] == "evacuated", job
        wait_for(lambda: HOME not in guest.states())
        assert (
            "runs there"
            in (pair.root(HOME) / STATE.lstrip("/") / "guard" / f"{guest.plan.uuid}.json").read_text()
        )
    assert guest.running_on() == [BACKUP]


@pytest.mark.soak
def test_a_source_that_died_is_presumed_dead_and_starts_nothing_when_it_is_back(pair: EvacuationPair) -> None:
    guest = pair.make_guest("survivor")
    with pair.never_twice(guest):
        pair.kill(BACKUP, "TERM")
        pair.configure(BACKUP, PRESUMED)
        pair.start(BACKUP)
        job_id = begin_until(pair, guest, HOME, "departure-tombstoned")
        pair.lab.kill_host(HOME)
        wait_for(lambda: pair.arrival(BACKUP, guest)["cause"], lambda cause: cause == "no-contact")
        assert guest.running_on() == []
        wait_for(guest.running_on, lambda hosts: hosts == [BACKUP], timeout_seconds=360)
        assert pair.arrival(BACKUP, guest)["activated_by"] == "presumed"
        pair.lab.start_host(HOME)
        assert "runs there" in pair.start_is_refused(HOME, guest)
        pair.start(HOME)
        assert pair.wait_job(HOME, job_id)["verdict"] == "evacuated"
    assert guest.running_on() == [BACKUP]
    pair.wait_landed(BACKUP, guest)
    assert guest.verify(BACKUP).intact
