# SPDX-License-Identifier: GPL-3.0-or-later
"""Every kind of VM goes out (workloads, disks of all shapes, firmware, TPM, CD-ROM), or is refused with why.

A guest is of several kinds at once where they do not get into each other's way: a boot takes seconds.
"""

from __future__ import annotations

import json
import shlex

import pytest

from integration.evacuation_pair import EvacuationPair
from integration.proxy_pair import BACKUP, HOME, LOG, STATE, Answer, Refused, wait_for
from lifeboat_lab.guests.guests import Guest
from lifeboat_lab.guests.plan import GuestPlan

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

IMAGES = "/var/lib/libvirt/images"
# Beyond the last whole block of 64 KiB, and a whole number of 4096, which cache=none asks for.
ODD_BYTES = 9 * 4096


def define(pair: EvacuationPair, plan: GuestPlan) -> Guest:
    """A guest at home, not started; it goes with the test."""
    for left in pair.lab.guests.all():
        if left.name == plan.name:  # of a test run that was killed
            left.remove()
    guest = pair.lab.guests.define(HOME, plan)
    pair.guests.append(guest)
    return guest


def start(pair: EvacuationPair, guest: Guest) -> None:
    """Started and protected."""
    guest.start()
    guest.wait_ready()
    pair.protect(guest)


def run_pass(pair: EvacuationPair, host: str, guest: Guest) -> Answer:
    return pair.ask(host, "POST", f"/v1/vms/{guest.plan.uuid}/pass", {})


def content(pair: EvacuationPair, host: str, path: str, image_format: str = "qcow2") -> str:
    """SHA-256 of what a guest would read from an image, whoever has it open."""
    script = (
        f"set -e; t=$(mktemp /var/tmp/content.XXXXXX); "
        f"qemu-img convert --force-share -f {image_format} -O raw {shlex.quote(path)} $t; "
        f"sha256sum < $t; rm -f $t"
    )
    return pair.shell(host, script).split()[0]


def replica_tops(pair: EvacuationPair, host: str, guest: Guest) -> dict[str, str]:
    """Disk -> path of the topmost layer of its sealed chain, as the store's record has it."""
    directory = f"{STATE}/store/{guest.plan.uuid}"
    record = json.loads((pair.root(host) / directory.lstrip("/") / "replica.json").read_text())
    return {key: f"{directory}/{layers[-1]['file']}" for key, layers in record["layers"].items()}


def require_equal_replica(pair: EvacuationPair, guest: Guest, source: str, destination: str) -> None:
    """Held still for a moment, every disk is what its replica holds, by SHA-256."""
    pair.virsh(source, "suspend", guest.plan.uuid)
    try:
        run_pass(pair, source, guest)
        tops = replica_tops(pair, destination, guest)
        images = guest.images(source)
        assert tops.keys() == images.keys()
        for target, (path, image_format) in images.items():
            at_source = content(pair, source, path, image_format)
            assert content(pair, destination, tops[target]) == at_source, f"disk {target}"
    finally:
        pair.virsh(source, "resume", guest.plan.uuid)


def evacuate_looking(pair: EvacuationPair, guest: Guest) -> Answer:
    """An evacuation from home, looked at when the guest has ended there and was not released: each replica is
    what was frozen, and each disk that is to run is what the guest left, by SHA-256. The job."""
    canary = guest.canary(HOME)
    with pair.never_twice(guest):
        job_id = pair.begin_until(guest, HOME, "departure-tombstoned")
        # Once the way back is tracked the disks stand still there, flushed.
        arrival = wait_for(lambda: pair.arrival(BACKUP, guest), lambda told: told["checkpoint"])
        assert guest.states().get(BACKUP) == "paused"
        record = pair.root(HOME) / STATE.lstrip("/") / "jobs" / f"{job_id}.json"
        left = json.loads(record.read_text())["disks"]
        assert left.keys() == arrival["disks"].keys() == guest.images(BACKUP).keys()
        for target, disk in arrival["disks"].items():
            frozen, ended = (content(pair, HOME, left[target][layer]) for layer in ("image", "overlay"))
            assert frozen != ended, "the guest went on writing"
            assert content(pair, BACKUP, disk["replica"]) == frozen, f"{target}: not the frozen instant"
            assert content(pair, BACKUP, disk["top"]) == ended, f"{target}: not what the guest left"
        pair.go_on(HOME)
        job = pair.check_settled(guest, job_id, canary, BACKUP)
    assert pair.leftovers(HOME) == pair.leftovers(BACKUP) == []
    return job


def media(pair: EvacuationPair, host: str, guest: Guest) -> dict[str, str]:
    """Drive -> whether its medium is at the peer."""
    told = pair.ask(host, "GET", f"/v1/vms/{guest.plan.uuid}")["media"]
    return {target: medium["state"] for target, medium in told.items()}


def medium_path(pair: EvacuationPair, host: str, guest: Guest) -> str:
    """What is in the guest's only drive."""
    lines = pair.virsh(host, "domblklist", guest.plan.uuid).splitlines()
    return next(line.split(maxsplit=1)[1] for line in lines if line.split()[:1] == ["sdz"])


def machine_state(pair: EvacuationPair, host: str, guest: Guest) -> dict[str, str]:
    """SHA-256 of the UEFI variables and of what the TPM keeps for ever."""
    xml = pair.virsh(host, "dumpxml", guest.plan.uuid)
    nvram = xml.split("<nvram")[1].split(">", 1)[1].split("<")[0]
    tpm = f"/var/lib/libvirt/swtpm/{guest.plan.uuid}/tpm2/tpm2-00.permall"
    return {
        "nvram": pair.shell(host, f"sha256sum {shlex.quote(nvram)}").split()[0],
        "tpm": pair.shell(host, f"sha256sum {tpm}").split()[0],
    }


def test_a_guest_of_all_workloads_with_disks_of_odd_sizes(pair: EvacuationPair) -> None:
    plan = GuestPlan(
        "Größe & “Form” 1", workload="fsync-log,dirty-ram,page-cache,file-tree", disks=2, files_per_second=40
    )
    guest = define(pair, plan)
    for target in plan.targets:
        pair.shell(HOME, f"qemu-img resize -q {shlex.quote(plan.disk_path(target))} +{ODD_BYTES}")
    start(pair, guest)
    require_equal_replica(pair, guest, HOME, BACKUP)
    job = evacuate_looking(pair, guest)
    assert job["name"] == plan.name
    told = guest.told()
    assert told.highest_acknowledged > 0
    assert told.cached_bytes > 0
    assert told.dirty_bytes > 0
    assert told.trees > 0


def test_firmware_tpm_and_medium_go_out_and_come_back(pair: EvacuationPair) -> None:
    """Variables and TPM state arrive as they left; the medium goes once and is in its place at home."""
    guest = define(
        pair, GuestPlan("firmware", workload="idle", firmware="uefi", tpm=True, cdrom=True, ram_mib=256)
    )
    start(pair, guest)
    medium = guest.plan.cdrom_path
    digest = pair.shell(HOME, f"sha256sum {shlex.quote(medium)}").split()[0]
    wait_for(lambda: media(pair, HOME, guest), lambda told: told == {"sdz": "there"})
    before = machine_state(pair, HOME, guest)
    assert before["nvram"]
    assert before["tpm"]

    pair.evacuate(guest)
    assert machine_state(pair, BACKUP, guest) == before
    there = medium_path(pair, BACKUP, guest)
    assert pair.shell(BACKUP, f"sha256sum {shlex.quote(there)}").split()[0] == digest
    assert guest.ask("run sha256sum /dev/sr0").split()[0] == digest

    pair.wait_protected(guest, BACKUP)
    wait_for(lambda: media(pair, BACKUP, guest), lambda told: told == {"sdz": "there"})
    pair.evacuate(guest, BACKUP)
    assert machine_state(pair, HOME, guest) == before
    assert medium_path(pair, HOME, guest) == medium
    sent = [
        pair.shell(host, f"grep -c 'medium .* is at' {LOG}", check=False).strip() for host in (HOME, BACKUP)
    ]
    assert sent == ["1", "0"], "the medium goes along once"


def test_disks_grow_come_and_go_and_the_name_changes(pair: EvacuationPair) -> None:
    guest = define(pair, GuestPlan("shape shifter", workload="fsync-log", disks=2))
    start(pair, guest)
    uuid = guest.plan.uuid

    added = f"{IMAGES}/added.qcow2"
    pair.shell(HOME, f"qemu-img create -q -f qcow2 {added} 24M")
    pair.shell(HOME, f"qemu-io -f qcow2 -c 'write -q -P 0x5a 1M 3M' {added}")
    pair.virsh(HOME, "blockresize", uuid, "vda", f"{320 << 20}B")
    # The last: a pass begins by itself then, and QEMU grows no disk that is being backed up.
    pair.virsh(
        HOME, "attach-disk", uuid, added, "vdc", "--persistent", "--subdriver", "qcow2", "--cache", "none"
    )
    run_pass(pair, HOME, guest)
    assert set(replica_tops(pair, BACKUP, guest)) == {"vda", "vdb", "vdc"}
    require_equal_replica(pair, guest, HOME, BACKUP)

    pair.virsh(HOME, "detach-disk", uuid, "vdc", "--persistent")
    run_pass(pair, HOME, guest)

    # A name can only be changed while the VM is off; the replica is this VM's by its UUID.
    pair.virsh(HOME, "destroy", uuid)
    pair.virsh(HOME, "domrename", uuid, "umbenannt – renamed")
    guest.start()
    guest.wait_ready()
    pair.wait_protected(guest, HOME)
    # Answered once its ports are open: before, no pass is made.
    guest.ask("status", HOME)
    run_pass(pair, HOME, guest)
    assert pair.ask(HOME, "GET", f"/v1/vms/{uuid}")["name"] == "umbenannt – renamed"
    assert pair.ask(BACKUP, "GET", f"/v1/replicas/{uuid}")["name"] == "umbenannt – renamed"

    job = pair.evacuate(guest)
    assert job["name"] == "umbenannt – renamed"
    assert "umbenannt – renamed" in pair.virsh(BACKUP, "list", "--name")
    size = pair.virsh(BACKUP, "domblkinfo", uuid, "vda").split()[1]
    assert int(size) == 320 << 20
    pair.shell(HOME, f"rm -f {added}")


def test_a_raw_disk_is_refused_and_goes_out_on_the_operators_word(pair: EvacuationPair) -> None:
    guest = define(pair, GuestPlan("raw one", workload="fsync-log", disk_format="raw"))
    guest.start()
    guest.wait_ready()
    uuid = guest.plan.uuid
    images = guest.images(HOME)
    with pytest.raises(Refused) as refused:
        pair.protect(guest)
    assert refused.value.cause == "unsupported"
    assert "it is raw, and a raw image cannot hold the bitmaps" in refused.value.message
    assert "raw_overlay_consent" in refused.value.message
    assert guest.images(HOME) == images

    told = {"peer": BACKUP, "rpo_seconds": 600, "raw_overlay_consent": True}
    pair.ask(HOME, "PUT", f"/v1/vms/{uuid}", told)
    pair.wait_protected(guest, HOME)
    assert guest.images(HOME) == {"vda": (f"{images['vda'][0]}.lifeboat.qcow2", "qcow2")}
    require_equal_replica(pair, guest, HOME, BACKUP)
    pair.evacuate(guest)
    pair.shell(HOME, f"rm -f {shlex.quote(images['vda'][0])}.lifeboat.qcow2")


DEVICES = {
    "hostdev": (
        "<hostdev mode='subsystem' type='pci' managed='yes'><source>"
        "<address domain='0x0000' bus='0x03' slot='0x00' function='0x0'/></source></hostdev>"
    ),
    "folder": "<filesystem type='mount'><source dir='/srv'/><target dir='share'/></filesystem>",
}


def test_devices_of_the_host_are_refused_with_the_reason_all_at_once(pair: EvacuationPair) -> None:
    guest = define(pair, GuestPlan("bound", workload="idle"))
    xml = pair.virsh(HOME, "dumpxml", "--inactive", guest.plan.uuid)
    # qemu-img would be asked in vain of a device that is not there: libvirt only checks them at the start
    bound = xml.replace("</devices>", "".join(DEVICES.values()) + "</devices>")
    (pair.root(HOME) / "var/tmp/bound.xml").write_text(bound)
    pair.virsh(HOME, "define", "/var/tmp/bound.xml")
    with pytest.raises(Refused) as refused:
        pair.protect(guest)
    facts = " ".join(finding["fact"] for finding in refused.value.findings)
    assert "it uses a device of this host (pci" in facts
    assert "it uses a shared folder of this host (/srv as share)" in facts
    assert all(finding["way_out"] for finding in refused.value.findings)
    with pytest.raises(Refused) as unknown:
        pair.ask(HOME, "GET", f"/v1/vms/{guest.plan.uuid}")
    assert unknown.value.cause == "not-found"


@pytest.mark.soak
def test_a_debian_guest_with_systemd_and_a_database(pair: EvacuationPair) -> None:
    plan = GuestPlan(
        "debian", system="debian", workload="fsync-log,database", ram_mib=320, disk_mib=1024, disks=2
    )
    guest = define(pair, plan)
    start(pair, guest)
    wait_for(lambda: guest.told().highest_committed, lambda rows: rows > 20)
    pair.evacuate(guest)
    rows = guest.told().highest_committed
    wait_for(lambda: guest.told().highest_committed, lambda now: now > rows + 20)
    pair.wait_protected(guest, BACKUP)
    pair.evacuate(guest, BACKUP)
