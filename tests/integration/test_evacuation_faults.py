# SPDX-License-Identifier: GPL-3.0-or-later
"""What goes wrong around an evacuation: replies lost, daemons restarted, disks full, others who come first or
too late."""

from __future__ import annotations

import json
import threading

import pytest

from integration.evacuation_pair import EvacuationPair
from integration.proxy_pair import BACKUP, DIRECTORY, HOME, STATE, Answer, wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


# -- what libvirt does not hear


def test_the_last_reply_of_a_migration_is_lost(pair: EvacuationPair) -> None:
    """Libvirt lets the source's VM run again although it stands whole at the destination: we decide."""
    guest = pair.make_guest("unheard")
    canary, images = guest.canary(HOME), guest.images(HOME)
    with pair.never_twice(guest):
        pair.hide_processes(HOME)
        pair.restart(BACKUP, drop_at="relay-finish-reply")
        pair.wait_links()
        job_id = str(pair.begin(HOME, guest)["id"])
        job = pair.check_healed(guest, job_id, canary, HOME)
    assert "lost its last reply" in pair.log(BACKUP) + pair.log(HOME), job
    assert guest.images(HOME) == images


def test_the_last_reply_of_a_migration_is_lost_after_the_release(pair: EvacuationPair) -> None:
    """Libvirt would let the source's VM run again while it runs at the destination: its QEMU is halted."""
    guest = pair.make_guest("not waited for")
    canary = guest.canary(HOME)
    try:
        with pair.never_twice(guest):
            pair.restart(BACKUP, drop_at="relay-finish-reply")
            pair.wait_links()
            # Far enough that the release is under way before word of the loss is back.
            pair.lab.wan.set("rate=400mbit,rtt=1500ms")
            job_id = str(pair.begin(HOME, guest)["id"])
            job = pair.check_healed(guest, job_id, canary, BACKUP)
    finally:
        pair.lab.wan.set("none")
    assert "lost its last reply" in pair.log(BACKUP) + pair.log(HOME), job


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
        pair.check_healed(guest, job["id"], canary, HOME)
        assert guest.images(HOME) == images
        job = pair.begin(HOME, guest)
        pair.check_healed(guest, job["id"], canary, BACKUP)


# -- memory or disks are lost


def test_a_released_vm_whose_host_lost_power_is_started_anew_there(pair: EvacuationPair) -> None:
    guest = pair.make_guest("anew")
    with pair.never_twice(guest):
        job_id = pair.begin_until_killed(guest, BACKUP, "arrival-released")
        pair.lab.kill_host(BACKUP)
        pair.lab.start_host(BACKUP)
        assert "not released" in pair.start_is_refused(BACKUP, guest), "the source is asked first"
        pair.start(BACKUP)
        job = pair.wait_job(HOME, job_id)
        assert (job["verdict"], job["cause"], job["memory_lost"]) == ("evacuated", "warning", True), job
        assert "its memory was lost" in job["sentence"]
        wait_for(guest.running_on, lambda hosts: hosts == [BACKUP])
    guest.wait_ready(host=BACKUP)
    pair.wait_landed(BACKUP, guest)
    assert guest.verify(BACKUP).intact, "every acknowledged write is there"
    assert pair.leftovers(HOME) == pair.leftovers(BACKUP) == []


@pytest.mark.soak
@pytest.mark.parametrize("point", ["arrival-tops-named", "arrival-changed-over"])
def test_power_that_goes_while_an_arrived_vm_changes_layers_takes_no_write(
    pair: EvacuationPair, point: str
) -> None:
    """It is started from what it wrote, though no record knows of the change; and its way back is whole."""
    guest = pair.make_guest("between", workload="fsync-log")
    with pair.never_twice(guest):
        job_id = pair.begin_until_killed(guest, BACKUP, point)
        assert pair.wait_job(HOME, job_id)["verdict"] == "evacuated"
        pair.lab.kill_host(BACKUP)
        pair.lab.start_host(BACKUP)
        guest.start(BACKUP)
        guest.wait_ready(host=BACKUP)
        pair.start(BACKUP)
        pair.wait_links()
        pair.wait_landed(BACKUP, guest)
    assert guest.verify(BACKUP).intact, "every acknowledged write is there"
    pair.wait_protected(guest, BACKUP)
    pair.evacuate(guest, BACKUP)


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
            pair.wait_step(HOME, job["id"], "stayed")
            assert guest.running_on() == [HOME]
            pair.shell(BACKUP, f"rm {STATE}/full")
            pair.check_healed(guest, job["id"], canary, HOME)
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
            job_id = pair.begin_until(guest, HOME, "departure-before-freeze")
            fill(pair, HOME, directory)
            pair.go_on(HOME)
            told = pair.wait_step(HOME, job_id, "stayed")
            assert told["verdict"] == "stayed", told
            assert guest.running_on() == [HOME]
            pair.shell(HOME, f"rm {directory}/full")
            pair.check_healed(guest, job_id, canary, HOME)
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
        job = pair.check_healed(guest, str(answers[0]["id"]), canary, BACKUP)
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
    pair.check_healed(guest, job["id"], canary, BACKUP)
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
