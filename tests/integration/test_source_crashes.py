# SPDX-License-Identifier: GPL-3.0-or-later
"""What kills leave behind: proxies killed in a pass, jobs left open, scratch space that fills up."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from integration.source_pair import (
    BACKUP,
    DIRECTORY,
    HOME,
    NOISE,
    RUN,
    STATE,
    CallFailed,
    SourcePair,
    Vm,
    installed_source_pair,
)
from lifeboat_lab.lab import Lab
from precache_proxy.crash_points import CRASH_POINTS

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

BLOCK = 65536
MIB = 1 << 20


@pytest.fixture
def pair(lab: Lab) -> Iterator[SourcePair]:
    """Two proxies, installed; the test starts them."""
    with installed_source_pair(lab) as pair:
        yield pair


def check_carried_on(pair: SourcePair, vm: Vm) -> None:
    """The proxies are back: passes are incremental, nothing was left open, and the replica is equal."""
    vm.wait_protected()
    vm.run_pass()
    status = vm.wait_protected()
    assert status["last_pass"]["compared_bytes"] == 0
    assert vm.backup_job() == ""
    assert vm.checkpoints() == [status["checkpoint"]]
    assert pair.shell(HOME, f"ls {RUN}/passes").strip() == ""
    vm.require_equal()


@pytest.mark.parametrize("point", ["pass-open", "pass-sent", "pass-sealed"])
def test_source_proxy_killed_in_a_pass(pair: SourcePair, point: str) -> None:
    pair.start(BACKUP)
    pair.start(HOME)
    vm = pair.make_vm("victim", {"vda": "64M", "vdb": "32M"})
    vm.write("vda", 1, 0, "4M")
    pair.protect(vm)
    pair.restart(HOME, crash_at=point)
    vm.write("vda", 2, "1M", BLOCK)
    vm.write("vdb", 2, "1M", BLOCK)
    ask_until_dead(pair, vm)
    vm.write("vda", 3, "2M", BLOCK)
    pair.start(HOME)
    check_carried_on(pair, vm)


@pytest.mark.parametrize("point", ["store-generation-open", "store-before-seal", "store-sealed"])
def test_destination_proxy_killed_in_a_pass(pair: SourcePair, point: str) -> None:
    pair.start(BACKUP)
    pair.start(HOME)
    vm = pair.make_vm("sender", {"vda": "64M"})
    vm.write("vda", 1, 0, "4M")
    pair.protect(vm, rpo_seconds=3)
    pair.restart(BACKUP, crash_at=f"{point}")
    vm.write("vda", 2, "1M", BLOCK)
    pair.wait_gone(BACKUP)
    vm.write("vda", 3, "2M", BLOCK)
    # Asked before it is back: all may be sealed before one looks again.
    wanted = vm.status()["generation"]
    pair.start(BACKUP)
    pair.wait(
        vm.status, lambda one: one["state"] == "protected" and one["generation"] > wanted, timeout_seconds=60
    )
    pair.call(HOME, "hold", vm=vm.uuid, holder="test")
    vm.run_pass()
    assert len(vm.checkpoints()) == 1
    vm.require_equal()
    pair.call(HOME, "release", vm=vm.uuid, holder="test")


def test_a_first_copy_goes_on_where_it_stood(pair: SourcePair, lab: Lab) -> None:
    pair.start(BACKUP)
    pair.start(HOME, slice_bytes=4 * MIB)
    vm = pair.make_vm("large", {"vda": "96M"})
    pair.shell(
        HOME,
        "head -c 64M /dev/urandom > /var/tmp/noise && truncate -s 96M /var/tmp/noise && "
        "virsh destroy large --graceful && "
        f"qemu-img convert -f raw -O qcow2 /var/tmp/noise {vm.disks['vda']} && "
        "rm /var/tmp/noise && virsh start large",
    )
    lab.wan.set("rate=40mbit,rtt=10ms")
    try:
        pair.call(HOME, "protect", vm=vm.name, peer=BACKUP, rpo_seconds=3600)
        held = pair.wait(
            lambda: marked_bytes(pair, vm),
            lambda offset: offset >= 16 * MIB,
            timeout_seconds=60,
        )
        assert vm.status()["state"] == "seeding"
        assert 0 < vm.status()["coverage"] < 1
        vm.write("vda", 7, "1M", BLOCK)  # behind the copy: counted by the checkpoint
        pair.signal(HOME, "KILL")
        vm.write("vda", 8, "50M", BLOCK)
        pair.start(HOME, slice_bytes=4 * MIB)
        vm.wait_protected(timeout_seconds=120)
    finally:
        lab.wan.set("none")
    counters = pair.call(HOME, "counters")[BACKUP]
    assert sent_bytes(counters, vm.uuid) < 64 * MIB - held + 12 * MIB
    vm.require_equal()


def test_a_first_copy_whose_checkpoint_is_lost_leaves_nothing_stale(pair: SourcePair, lab: Lab) -> None:
    """Marks of the old copy must not be taken for the new checkpoint's."""
    pair.start(BACKUP)
    pair.start(HOME, slice_bytes=4 * MIB)
    vm = pair.make_vm("unlucky", {"vda": "64M"})
    pair.make_noise(48)
    vm.qemu_io("vda", f"write -s {NOISE} 0 48M")
    vm.qemu_io("vda", "flush")
    lab.wan.set("rate=40mbit,rtt=10ms")
    try:
        pair.call(HOME, "protect", vm=vm.name, peer=BACKUP, rpo_seconds=3600)
        pair.wait(lambda: marked_bytes(pair, vm), lambda offset: offset >= 8 * MIB, timeout_seconds=60)
        pair.signal(HOME, "KILL")
        vm.write("vda", 7, "1M", BLOCK)  # counted by the old checkpoint only
        vm.lose_power()
        vm.virsh("start", vm.name)
        # Slow enough for a look at the first pieces of the copy that begins anew.
        lab.wan.set("rate=8mbit,rtt=10ms")
        pair.start(HOME, slice_bytes=4 * MIB)
        pair.wait(lambda: marked_bytes(pair, vm), lambda offset: offset < 8 * MIB, timeout_seconds=60)
        lab.wan.set("rate=40mbit,rtt=10ms")
        pair.signal(HOME, "KILL")
        pair.start(HOME, slice_bytes=4 * MIB)
        vm.wait_protected(timeout_seconds=120)
    finally:
        lab.wan.set("none")
    vm.require_equal()


def marked_bytes(pair: SourcePair, vm: Vm) -> int:
    """Up to where the peer holds the first copy, for sure."""
    try:
        replica = pair.call(BACKUP, "replica", vm=vm.uuid)
    except CallFailed as error:
        if error.cause != "not-found":
            raise
        return 0
    return int((replica.get("seeding") or {}).get("vda", 0))


def sent_bytes(counters: dict[str, Any], label: str) -> int:
    """Payload that this proxy sent for a VM."""
    return int(counters["labels"][label]["sent_raw_bytes"])


def test_the_watchdog_ends_what_a_killed_proxy_left_open(pair: SourcePair) -> None:
    pair.start(BACKUP)
    pair.start(HOME)
    vm = pair.make_vm("orphan", {"vda": "64M"})
    pair.protect(vm)
    pair.restart(HOME, crash_at="pass-open")
    vm.write("vda", 2, "1M", BLOCK)
    ask_until_dead(pair, vm)
    assert "orphan" not in vm.backup_job()
    assert RUN in vm.backup_job()
    look = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; "
        "from precache_proxy.source.watchdog import Watchdog; "
        "print(Watchdog(Path(sys.argv[2]), 'qemu:///system').look())"
    )
    told = pair.run(HOME, "python3", "-c", look, DIRECTORY, RUN)
    assert vm.uuid in told
    pair.wait(vm.backup_job, lambda job: job == "", timeout_seconds=30)
    assert "running" in vm.virsh("domstate", vm.name)
    assert pair.run(HOME, "python3", "-c", look, DIRECTORY, RUN).strip() == "[]"
    # a job that is not ours is left alone, whatever a record says
    record = pair.root(HOME) / RUN.lstrip("/") / "passes" / f"{vm.uuid}.json"
    record.write_text(json.dumps({
        "domain": vm.uuid, "socket": "/run/ours.sock", "scratch": [], "scratch_limit_bytes": 1,
        "deadline_boottime_seconds": 0, "proxy_pid": 1,
    }))  # fmt: skip
    (pair.root(HOME) / "var/tmp/theirs.xml").write_text(
        "<domainbackup mode='pull'><server transport='unix' socket='/var/tmp/theirs.sock'/></domainbackup>"
    )
    pair.shell(HOME, "chmod 1777 /var/tmp")
    vm.virsh("backup-begin", vm.name, "/var/tmp/theirs.xml")
    assert pair.run(HOME, "python3", "-c", look, DIRECTORY, RUN).strip() == "[]"
    assert "theirs.sock" in vm.backup_job()
    vm.virsh("domjobabort", vm.name)
    pair.start(HOME)
    vm.wait_protected()
    vm.run_pass()
    vm.require_equal()


def test_a_writing_guest_never_sees_an_error_however_small_the_scratch(pair: SourcePair, lab: Lab) -> None:
    """Copy-before-write fills the scratch while a slow link is fed: the pass is cut into slices."""
    pair.start(BACKUP)
    pair.start(HOME, scratch_limit_bytes=64 * MIB, open_pass_limit=4)
    vm = pair.make_vm("writer", {"vda": "128M"})
    vm.write("vda", 1, 0, "128M")
    pair.protect(vm)
    pair.make_noise(60)
    vm.qemu_io("vda", f"write -s {NOISE} 0 60M")
    lab.wan.set("rate=20mbit,rtt=10ms")
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set() and number < 60:
            vm.write("vda", 2 + number % 200, f"{62 + number % 64}M", "1M")
            number += 1
            time.sleep(0.2)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        result = vm.run_pass()
    finally:
        stop.set()
        writer.join()
        lab.wan.set("none")
    # more than what is read ahead of the link
    assert result["slices"] > 1
    assert "running" in vm.virsh("domstate", vm.name)
    assert "No errors found" in vm.virsh("domblkerror", vm.name)
    assert len(vm.checkpoints()) == 1
    vm.run_pass()
    vm.require_equal()


def test_libvirtd_restarted_while_protected(pair: SourcePair) -> None:
    pair.start(BACKUP)
    pair.start(HOME)
    vm = pair.make_vm("steady", {"vda": "64M"})
    pair.protect(vm)
    pair.shell(HOME, "systemctl restart libvirtd")
    vm.write("vda", 2, "1M", BLOCK)
    pair.wait(lambda: _passed(vm), bool, timeout_seconds=40)
    vm.require_equal()
    assert len(vm.checkpoints()) == 1


def _passed(vm: Vm) -> bool:
    try:
        vm.run_pass()  # or the one that the new connection brought about has sent it
    except CallFailed as error:
        if error.cause != "hypervisor":
            raise
        return False
    return True


# -- every point, for long runs

SOURCE_POINTS = ("pass-begun", "pass-open", "pass-sent", "pass-sealed", "pass-recorded")
STORE_POINTS = (
    "store-generation-open", "store-before-seal", "store-flushed", "store-synced", "store-sealed",
    "store-committing", "store-committed", "store-rebased", "store-commit-recorded",
)  # fmt: skip


FIRST_COPY_POINTS = ("seed-checkpointed", "seed-copied")


def test_the_tables_name_every_point_of_a_pass() -> None:
    tested = {*SOURCE_POINTS, *STORE_POINTS, "store-mark", "store-marked"}
    tested |= {*FIRST_COPY_POINTS, "resync-sealed", "raw-overlay-on"}
    # what a start or a removal does is not part of a pass; tests/unit/store has it
    elsewhere = {"store-recovering", "store-removing"}
    prefixes = ("pass-", "store-", "seed-", "resync-", "raw-")
    assert tested | elsewhere == {point for point in CRASH_POINTS if point.startswith(prefixes)}


@pytest.mark.parametrize("point", FIRST_COPY_POINTS)
def test_the_source_killed_around_a_first_copy(pair: SourcePair, point: str) -> None:
    pair.start(BACKUP)
    pair.start(HOME, crash_at=point)
    vm = pair.make_vm("first", {"vda": "64M", "vdb": "32M"})
    vm.write("vda", 1, 0, "4M")
    with contextlib.suppress(OSError):  # it may be dead before it has answered
        pair.call(HOME, "protect", vm=vm.name, peer=BACKUP, rpo_seconds=3600)
    pair.wait_gone(HOME)
    vm.write("vda", 2, "1M", BLOCK)  # behind the copy, where there is one
    vm.write("vdb", 3, "1M", BLOCK)
    pair.start(HOME)
    check_carried_on(pair, vm)


def test_the_source_killed_after_a_resync_was_sealed(pair: SourcePair) -> None:
    pair.start(BACKUP)
    pair.start(HOME)
    vm = pair.make_vm("again", {"vda": "64M"})
    vm.write("vda", 1, 0, "4M")
    pair.protect(vm)
    pair.restart(HOME, crash_at="resync-sealed")
    vm.wait_protected()
    with contextlib.suppress(OSError):
        pair.call(HOME, "resync", vm=vm.uuid)
    pair.wait_gone(HOME)
    vm.write("vda", 2, "1M", BLOCK)
    pair.start(HOME)
    pair.wait(vm.status, lambda one: one["state"] == "protected" and one["cause"] == "ok", timeout_seconds=60)
    vm.write("vda", 3, "2M", BLOCK)  # the next pass has to carry this, and no more
    check_carried_on(pair, vm)


def test_the_source_killed_with_a_raw_disks_overlay_on(pair: SourcePair) -> None:
    pair.start(BACKUP)
    pair.start(HOME, crash_at="raw-overlay-on")
    vm = pair.make_vm("rawhide", {"vda": "64M"}, formats="raw")
    vm.write("vda", 1, 0, "4M")
    with pytest.raises(OSError):
        pair.call(HOME, "protect", vm=vm.name, peer=BACKUP, raw_overlay_consent=True)
    pair.wait_gone(HOME)
    vm.write("vda", 2, "1M", BLOCK)
    pair.start(HOME)
    # the same command again: the disk has what it needs, and nothing is put on it twice
    pair.protect(vm, raw_overlay_consent=True)
    vm.disks["vda"] = vm.status()["disk_paths"]["vda"]
    assert vm.disks["vda"].endswith(".lifeboat.qcow2")
    check_carried_on(pair, vm)


def ask_until_dead(pair: SourcePair, vm: Vm) -> None:
    """Ask for a pass until the proxy dies in one. One of its own may have got there before ours, and the link
    may not be up yet."""

    def ask() -> None:
        with contextlib.suppress(CallFailed):
            vm.run_pass()

    with pytest.raises(ConnectionError):
        pair.wait(ask, lambda _: False, timeout_seconds=60)
    pair.wait_gone(HOME)


def passes_until_dead(vm: Vm) -> None:
    """Pass after pass, with something to send in each."""
    for _ in range(4):
        with contextlib.suppress(CallFailed):
            vm.run_pass()
        vm.write("vda", 7, "4M", BLOCK)


@pytest.mark.soak
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("point", SOURCE_POINTS)
def test_every_kill_of_the_source_in_a_pass_of_two_slices(
    pair: SourcePair, lab: Lab, point: str, count: int
) -> None:
    """The second time a point is reached is in the second slice, or in the second pass."""
    pair.start(BACKUP)
    pair.start(HOME)
    vm = pair.make_vm("table", {"vda": "64M", "vdb": "32M"})
    vm.write("vda", 1, 0, "4M")
    pair.protect(vm)
    pair.make_noise(16)
    pair.restart(HOME, crash_at=f"{point}:{count}", pass_limit_seconds=2.0)
    lab.wan.set("rate=24mbit,rtt=10ms")
    try:
        vm.qemu_io("vda", f"write -s {NOISE} 8M 16M")
        with pytest.raises(OSError):
            passes_until_dead(vm)
        pair.wait_gone(HOME)
        vm.write("vdb", 8, "1M", BLOCK)
    finally:
        lab.wan.set("none")
    pair.start(HOME)
    check_carried_on(pair, vm)
    assert "No errors found" in vm.virsh("domblkerror", vm.name)


@pytest.mark.soak
@pytest.mark.parametrize("point", STORE_POINTS)
def test_every_kill_of_the_destination_around_a_seal(pair: SourcePair, point: str) -> None:
    pair.start(BACKUP)
    pair.start(HOME)
    vm = pair.make_vm("sink", {"vda": "64M"})
    vm.write("vda", 1, 0, "4M")
    pair.protect(vm, rpo_seconds=3)
    pair.restart(BACKUP, crash_at=point)
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.wait(1.0) and number < 60:
            vm.write("vda", 2 + number % 200, f"{number % 60}M", BLOCK)
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        pair.wait_gone(BACKUP)
    finally:
        stop.set()
        writer.join()
    pair.start(BACKUP)
    sealed = vm.status()["generation"]
    vm.write("vda", 255, "5M", BLOCK)
    pair.wait(
        vm.status, lambda one: one["state"] == "protected" and one["generation"] > sealed, timeout_seconds=90
    )
    pair.call(HOME, "hold", vm=vm.uuid, holder="test")
    vm.run_pass()
    assert len(vm.checkpoints()) == 1
    vm.require_equal()
    half = pair.shell(BACKUP, f"ls {STATE}/store/{vm.uuid}/vda").split()
    known = pair.shell(BACKUP, f"cat {STATE}/store/{vm.uuid}/replica.json")
    assert all(name in known for name in half), half
    pair.call(HOME, "release", vm=vm.uuid, holder="test")


@pytest.mark.soak
@pytest.mark.parametrize("point", ["store-mark", "store-marked", "store-mark:3", "store-marked:3"])
def test_every_kill_of_the_destination_in_a_first_copy(pair: SourcePair, lab: Lab, point: str) -> None:
    pair.start(BACKUP, crash_at=point)
    pair.start(HOME, slice_bytes=4 * MIB)
    vm = pair.make_vm("copied", {"vda": "64M"})
    pair.make_noise(32)
    vm.qemu_io("vda", f"write -s {NOISE} 0 32M")
    lab.wan.set("rate=100mbit,rtt=10ms")
    try:
        pair.call(HOME, "protect", vm=vm.name, peer=BACKUP, rpo_seconds=3600)
        pair.wait_gone(BACKUP)
        vm.write("vda", 9, "1M", BLOCK)
        pair.start(BACKUP)
        vm.wait_protected(timeout_seconds=120)
    finally:
        lab.wan.set("none")
    vm.require_equal()
