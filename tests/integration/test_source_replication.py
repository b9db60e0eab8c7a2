# SPDX-License-Identifier: GPL-3.0-or-later
"""Protection of VMs between two lab hosts: first copy, passes, what people do to VMs, lost tracking."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from integration.source_pair import (
    BACKUP,
    HOME,
    STATE,
    CallFailed,
    SourcePair,
    Vm,
    disk_element,
    installed_source_pair,
)
from lifeboat_lab.lab import Lab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

BLOCK = 65536
# neither a multiple of 64 KiB nor of 4 KiB
ODD_SIZE = str(48 * 1024 * 1024 + 3 * 512)


@pytest.fixture(scope="module")
def pair(lab: Lab) -> Iterator[SourcePair]:
    """Two proxies, running."""
    with installed_source_pair(lab) as pair:
        pair.start(BACKUP)
        pair.start(HOME)
        yield pair


@pytest.fixture
def make_vm(pair: SourcePair) -> Iterator[Callable[..., Vm]]:
    """Makes guests that are removed after the test."""
    made: list[Vm] = []

    def make(name: str, sizes: dict[str, str] | None = None, **options: Any) -> Vm:
        vm = pair.make_vm(name, sizes or {"vda": "64M"}, **options)
        made.append(vm)
        return vm

    yield make
    for vm in made:
        vm.remove()
    left = pair.shell(HOME, f"ls -A {STATE}/scratch {STATE}/source 2>/dev/null | grep -v : || true").split()
    assert left == []


def test_first_copy_and_passes_over_odd_disks(pair: SourcePair, make_vm: Callable[..., Vm]) -> None:
    vm = make_vm("Büro und Lager 1", {"vda": "64M", "vdb": ODD_SIZE})
    vm.write("vda", 1, "1M", "5M")
    vm.write("vdb", 2, "48M", 3 * 512)
    status = pair.protect(vm)
    assert (status["generation"], status["coverage"], status["name"]) == (1, 1.0, "Büro und Lager 1")
    assert vm.checkpoints() == ["lifeboat-e0-g1"]
    vm.require_equal()
    vm.write("vda", 3, "20M", "64k")
    vm.write("vdb", 4, 0, "4k")
    vm.qemu_io("vda", "write -z 2M 1M")
    result = vm.run_pass()
    assert not result["skipped"]
    assert result["data_bytes"] == 2 * BLOCK
    assert result["zero_bytes"] == 16 * BLOCK
    vm.require_equal()
    assert vm.checkpoints() == ["lifeboat-e0-g2"]


def test_an_idle_vm_costs_no_backup_job_and_nothing_on_the_wire(
    pair: SourcePair, make_vm: Callable[..., Vm]
) -> None:
    vm = make_vm("idle")
    pair.protect(vm)
    before = pair.call(HOME, "counters")[BACKUP]
    result = vm.run_pass()
    assert result["skipped"]
    assert vm.status()["generation"] == 1
    assert vm.status()["lag_seconds"] == 0.0
    after = pair.call(HOME, "counters")[BACKUP]
    label = before.get("labels", {}).get(vm.uuid), after.get("labels", {}).get(vm.uuid)
    assert label[0] == label[1]


def test_passes_come_by_themselves_within_the_rpo(pair: SourcePair, make_vm: Callable[..., Vm]) -> None:
    vm = make_vm("paced")
    pair.protect(vm, rpo_seconds=4)
    vm.write("vda", 7, 0, "1M")
    sealed = pair.wait(vm.status, lambda status: status["generation"] >= 2, timeout_seconds=30)
    assert sealed["last_pass"]["reason"] == "periodic"
    vm.require_equal()


def test_lag_is_what_qemu_counts(pair: SourcePair, make_vm: Callable[..., Vm]) -> None:
    vm = make_vm("lagging")
    pair.protect(vm)
    vm.write("vda", 7, 0, 3 * BLOCK)
    pair.call(HOME, "measure_lags")
    status = vm.status()
    assert status["lag_bytes"] == 3 * BLOCK
    assert status["lag_seconds"] > 0
    vm.run_pass()
    pair.call(HOME, "measure_lags")
    assert vm.status()["lag_bytes"] == 0


def test_a_killed_qemu_leads_to_a_resync_that_ships_only_what_differs(
    pair: SourcePair, make_vm: Callable[..., Vm]
) -> None:
    vm = make_vm("crashed")
    vm.write("vda", 5, 0, "32M")
    pair.protect(vm)
    vm.write("vda", 6, "8M", 2 * BLOCK)
    vm.lose_power()
    vm.virsh("start", vm.name)
    status = pair.wait(
        vm.status, lambda one: one["state"] == "protected" and one["generation"] == 2, timeout_seconds=60
    )
    assert status["last_pass"]["reason"] == "resync"
    assert status["last_pass"]["different_bytes"] == 2 * BLOCK
    assert status["last_pass"]["data_bytes"] == 2 * BLOCK
    vm.require_equal()
    vm.write("vda", 8, "40M", BLOCK)
    vm.run_pass()
    # A pass of its own may have got there before ours.
    assert vm.status()["last_pass"]["data_bytes"] == BLOCK


def test_a_bitmap_deleted_behind_our_back_is_never_silently_stale(
    pair: SourcePair, make_vm: Callable[..., Vm]
) -> None:
    vm = make_vm("meddled")
    pair.protect(vm)
    vm.write("vda", 6, "8M", BLOCK)
    vm.virsh("checkpoint-delete", vm.name, "lifeboat-e0-g1")
    with pytest.raises(CallFailed) as caught:
        vm.run_pass()
    assert caught.value.cause == "tracking-lost"
    pair.wait(vm.status, lambda one: one["state"] == "protected", timeout_seconds=60)
    vm.require_equal()


def test_a_shut_off_vm_is_passed_too_and_goes_on_incrementally(
    pair: SourcePair, make_vm: Callable[..., Vm]
) -> None:
    vm = make_vm("off and on")
    vm.write("vda", 5, 0, "16M")
    pair.protect(vm)
    vm.write("vda", 6, "8M", BLOCK)
    vm.virsh("destroy", vm.name, "--graceful")
    status = pair.wait(vm.status, lambda one: one["generation"] == 2, timeout_seconds=30)
    assert status["last_pass"]["data_bytes"] == BLOCK
    assert status["checkpoint"] == "lifeboat-e0-g1"
    vm.require_equal()
    assert vm.run_pass()["skipped"]
    vm.virsh("start", vm.name)
    vm.write("vda", 7, "12M", BLOCK)
    vm.run_pass()
    last = vm.status()["last_pass"]
    assert last["compared_bytes"] == 0
    assert last["data_bytes"] in {BLOCK, 2 * BLOCK}
    vm.require_equal()


def test_a_vm_protected_while_shut_off_needs_no_resync_when_it_starts(
    pair: SourcePair, make_vm: Callable[..., Vm]
) -> None:
    vm = make_vm("born off", start=False)
    pair.run(HOME, "qemu-io", "-f", "qcow2", "-c", "write -P 9 1M 3M", vm.disks["vda"])
    pair.protect(vm)
    vm.require_equal()
    vm.virsh("start", vm.name)
    vm.write("vda", 7, "12M", BLOCK)
    vm.run_pass()  # or the one that the start brought about has sent it
    last = vm.status()["last_pass"]
    assert (last["compared_bytes"], last["data_bytes"]) == (0, BLOCK)
    vm.require_equal()


def test_a_shut_off_vm_can_start_while_its_image_is_read(
    pair: SourcePair, make_vm: Callable[..., Vm]
) -> None:
    """The libvirt hook ends the readers; what they leave is found in run/readers."""
    vm = make_vm("impatient", {"vda": "512M"}, start=False)
    image = shlex.quote(vm.disks["vda"])
    pair.shell(
        HOME,
        "head -c 300M /dev/urandom > /var/tmp/noise && "
        f"qemu-img convert -f raw -O qcow2 /var/tmp/noise {image} && rm /var/tmp/noise",
    )
    pair.call(HOME, "protect", vm=vm.name, peer=BACKUP, rpo_seconds=3600)
    readers = pair.root(HOME) / "run/lifeboat-source-test/readers" / f"{vm.uuid}.json"
    pair.wait(readers.exists, bool, timeout_seconds=30)
    pids = json.loads(readers.read_text())["pids"]
    pair.run(HOME, "kill", *(str(pid) for pid in pids))
    vm.virsh("start", vm.name)
    vm.wait_protected()
    vm.require_equal()


def test_disks_grown_added_and_removed(pair: SourcePair, make_vm: Callable[..., Vm]) -> None:
    vm = make_vm("changing")
    vm.write("vda", 5, 0, "1M")
    pair.protect(vm)
    vm.virsh("blockresize", vm.name, "vda", "80M")
    vm.write("vda", 6, "70M", BLOCK)
    vm.run_pass()
    vm.require_equal()

    image = "/var/lib/libvirt/images/changing-vdb.qcow2"
    pair.run(HOME, "qemu-img", "create", "-q", "-f", "qcow2", image, "32M")
    pair.run(HOME, "qemu-io", "-f", "qcow2", "-c", "write -P 3 4M 1M", image)
    (pair.root(HOME) / "var/tmp/vdb.xml").write_text(disk_element(image, "vdb"))
    vm.virsh("attach-device", vm.name, "/var/tmp/vdb.xml", "--live", "--config")
    vm.disks["vdb"] = image
    vm.write("vda", 7, "2M", BLOCK)
    vm.run_pass()
    vm.require_equal()
    vm.write("vdb", 8, "6M", BLOCK)
    result = vm.run_pass()
    assert result["data_bytes"] == BLOCK
    vm.require_equal()

    vm.virsh("detach-disk", vm.name, "vdb", "--live", "--config", check=False)
    # a guest without an operating system does not let go of a device: it does at its next start
    vm.virsh("destroy", vm.name, "--graceful")
    if "vdb" in vm.virsh("dumpxml", "--inactive", vm.name):
        vm.virsh("detach-disk", vm.name, "vdb", "--config")
    vm.virsh("start", vm.name)
    del vm.disks["vdb"]
    vm.write("vda", 9, "3M", BLOCK)
    vm.run_pass()
    assert list(vm.status()["disk_paths"]) == ["vda"]
    vm.require_equal("vda")
    pair.shell(HOME, f"rm -f {image}")


def test_a_renamed_vm_is_the_same_vm(pair: SourcePair, make_vm: Callable[..., Vm]) -> None:
    vm = make_vm("before")
    vm.write("vda", 5, 0, "1M")
    pair.protect(vm)
    vm.virsh("destroy", vm.name, "--graceful")
    xml = vm.virsh("dumpxml", "--inactive", vm.name).replace("<name>before</name>", "<name>after</name>")
    vm.virsh("undefine", vm.name, "--checkpoints-metadata")
    (pair.root(HOME) / "var/tmp/after.xml").write_text(xml)
    vm.virsh("define", "/var/tmp/after.xml")
    vm.name = "after"
    vm.virsh("start", vm.name)
    vm.write("vda", 6, "2M", BLOCK)
    pair.wait(
        vm.status, lambda one: one["name"] == "after" and one["state"] == "protected", timeout_seconds=90
    )
    vm.run_pass()
    status = vm.status()
    assert status["last_pass"]["compared_bytes"] == 0
    assert pair.call(BACKUP, "replica", vm=vm.uuid)["name"] == "after"
    vm.require_equal()


def test_somebody_elses_snapshot_and_commit_keep_the_tracking(
    pair: SourcePair, make_vm: Callable[..., Vm]
) -> None:
    vm = make_vm("snapped")
    vm.write("vda", 5, 0, "8M")
    pair.protect(vm)
    vm.write("vda", 6, "1M", BLOCK)
    vm.virsh("snapshot-create-as", vm.name, "--disk-only", "--no-metadata", "--name", "theirs")
    vm.write("vda", 7, "3M", BLOCK)
    base = vm.disks["vda"]
    result = vm.run_pass()
    assert (result["data_bytes"], result["compared_bytes"]) == (2 * BLOCK, 0)
    vm.write("vda", 8, "5M", BLOCK)
    vm.virsh("blockcommit", vm.name, "vda", "--active", "--pivot", "--wait")
    vm.write("vda", 9, "7M", BLOCK)
    result = vm.run_pass()
    assert (result["data_bytes"], result["compared_bytes"]) == (2 * BLOCK, 0)
    assert vm.status()["disk_paths"]["vda"] == base
    vm.require_equal()


def test_verify_finds_and_repairs_what_rots_at_the_peer(pair: SourcePair, make_vm: Callable[..., Vm]) -> None:
    vm = make_vm("rotten")
    vm.write("vda", 5, 0, "8M")
    pair.protect(vm)
    verdict = pair.call(HOME, "verify", vm=vm.uuid)
    assert verdict["equal"]
    assert verdict["compared_bytes"] == 64 * 1024 * 1024
    generation = vm.status()["generation"]
    top = pair.call(BACKUP, "replica_tops", vm=vm.uuid, generation=generation, epoch=0)["vda"]
    pair.run(BACKUP, "qemu-io", "-f", "qcow2", "-c", "write -P 66 3M 4k", top)
    verdict = pair.call(HOME, "verify", vm=vm.uuid)
    assert not verdict["equal"]
    assert verdict["different_bytes"] == BLOCK
    assert vm.status()["scrub"]["different_blocks"] == 1
    assert vm.status()["scrub"]["recent_different_blocks"] == 1
    assert pair.call(HOME, "verify", vm=vm.uuid)["equal"]
    assert vm.status()["scrub"]["recent_different_blocks"] == 0
    vm.require_equal()


def test_raw_disks_need_the_operators_word(pair: SourcePair, make_vm: Callable[..., Vm]) -> None:
    vm = make_vm("raw one", formats="raw")
    with pytest.raises(CallFailed, match=r"it is raw.*raw_overlay_consent") as caught:
        pair.call(HOME, "protect", vm=vm.name, peer=BACKUP)
    assert caught.value.cause == "unsupported"
    assert vm.checkpoints() == []
    vm.write("vda", 5, 0, "8M")
    pair.protect(vm, raw_overlay_consent=True)
    vm.disks["vda"] = vm.status()["disk_paths"]["vda"]
    assert vm.disks["vda"].endswith(".lifeboat.qcow2")
    vm.write("vda", 6, "1M", BLOCK)
    assert vm.run_pass()["data_bytes"] == BLOCK
    vm.require_equal()


def test_everything_that_stands_in_the_way_is_told_at_once(
    pair: SourcePair, make_vm: Callable[..., Vm]
) -> None:
    share = "<filesystem type='mount'><source dir='/srv'/><target dir='share'/></filesystem>"
    vm = make_vm("hopeless", formats="raw", start=False, extra=share)
    with pytest.raises(CallFailed) as caught:
        pair.call(HOME, "protect", vm=vm.name, peer=HOME, rpo_seconds=0)
    subjects = [finding["subject"] for finding in caught.value.findings]
    assert subjects == [f"peer {HOME}", "RPO 0 s", "VM hopeless disk vda", "VM hopeless"]
    assert "nothing was changed" in caught.value.message
    with pytest.raises(
        CallFailed, match=r"peer nowhere: it is not configured here.*VM nobody: it is not defined"
    ):
        pair.call(HOME, "protect", vm="nobody", peer="nowhere")
    assert pair.call(HOME, "statuses") == []


def test_autostart_is_kept_in_mind_while_protected(pair: SourcePair, make_vm: Callable[..., Vm]) -> None:
    vm = make_vm("early bird")
    vm.virsh("autostart", vm.name)
    assert pair.protect(vm)["autostart"]
    assert "disable" in vm.virsh("dominfo", vm.name).split("Autostart:")[1]
    vm.virsh("autostart", vm.name)
    vm.run_pass()
    assert "disable" in vm.virsh("dominfo", vm.name).split("Autostart:")[1], "set later it is taken over, too"
    pair.call(HOME, "unprotect", vm=vm.uuid, keep_replica=False)
    assert "enable" in vm.virsh("dominfo", vm.name).split("Autostart:")[1]
    assert vm.checkpoints() == []
    with pytest.raises(CallFailed, match="no replica of it is here"):
        pair.call(BACKUP, "replica", vm=vm.uuid)


def test_a_kept_replica_is_compared_not_copied_again(pair: SourcePair, make_vm: Callable[..., Vm]) -> None:
    vm = make_vm("again")
    vm.write("vda", 5, 0, "16M")
    pair.protect(vm)
    pair.call(HOME, "unprotect", vm=vm.uuid, keep_replica=True)
    vm.write("vda", 6, "1M", BLOCK)
    status = pair.protect(vm)
    status = pair.wait(vm.status, lambda one: one["generation"] == 2, timeout_seconds=60)
    assert status["last_pass"]["data_bytes"] == BLOCK
    vm.require_equal()


def test_residual_of_frozen_images_and_after_a_rollback_the_next_pass_is_incremental(
    pair: SourcePair, make_vm: Callable[..., Vm]
) -> None:
    vm = make_vm("frozen", {"vda": "64M", "vdb": "32M"})
    vm.write("vda", 5, 0, "16M")
    pair.protect(vm)
    pair.call(HOME, "hold", vm=vm.uuid, holder="job")
    vm.write("vda", 6, "1M", BLOCK)
    vm.write("vdb", 6, "1M", BLOCK)
    vm.virsh(
        "snapshot-create-as", vm.name, "--disk-only", "--atomic", "--no-metadata", "--name", "freeze",
        "--diskspec", "vda,file=/var/lib/libvirt/images/frozen-a.ov",
        "--diskspec", "vdb,file=/var/lib/libvirt/images/frozen-b.ov",
    )  # fmt: skip
    frozen = {"vda": [vm.disks["vda"], "qcow2", 64 << 20], "vdb": [vm.disks["vdb"], "qcow2", 32 << 20]}
    vm.write("vda", 7, "5M", BLOCK)
    xml = vm.virsh("dumpxml", "--inactive", vm.name)
    result = pair.call(
        HOME, "send_residual", vm=vm.uuid, frozen=frozen, bitmap=vm.status()["checkpoint"], definition=xml
    )
    assert (result["generation"], result["data_bytes"]) == (2, 2 * BLOCK)
    vm.require_equal()
    for disk in ("vda", "vdb"):
        vm.virsh("blockcommit", vm.name, disk, "--active", "--pivot", "--wait")
    pair.call(HOME, "after_rollback", vm=vm.uuid)
    pair.call(HOME, "release", vm=vm.uuid, holder="job")
    vm.run_pass()
    status = vm.wait_protected()
    assert status["last_pass"]["compared_bytes"] == 0
    assert status["last_pass"]["data_bytes"] <= 3 * BLOCK
    vm.require_equal()
    pair.shell(HOME, "rm -f /var/lib/libvirt/images/frozen-?.ov")


def test_link_cut_and_healed(pair: SourcePair, make_vm: Callable[..., Vm], lab: Lab) -> None:
    vm = make_vm("cut off")
    vm.write("vda", 5, 0, "8M")
    pair.protect(vm, rpo_seconds=3)
    lab.wan.cut("home", "backup")
    try:
        vm.write("vda", 6, "1M", BLOCK)
        time.sleep(6)
        vm.write("vda", 6, "2M", BLOCK)
        generation = vm.status()["generation"]
    finally:
        lab.wan.heal()
    pair.wait(vm.status, lambda one: one["generation"] > generation, timeout_seconds=90)
    vm.wait_protected()
    vm.run_pass()
    vm.require_equal()
    assert len(vm.checkpoints()) == 1
