# SPDX-License-Identifier: GPL-3.0-or-later
"""Contact lost at each step of a pass, and found again: nothing stays open, nothing is lost or compared anew.

The proxy that reaches a named line stops there, the link is cut, and it goes on.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest

from integration.evacuation_pair import sampled
from integration.source_pair import BACKUP, HOME, RUN, CallFailed, SourcePair, Vm, installed_source_pair
from integration.test_source_crashes import FIRST_COPY_POINTS, SOURCE_POINTS, STORE_POINTS, check_carried_on
from lifeboat_lab.lab import Lab
from precache_proxy.crash_points import CRASH_POINTS

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

BLOCK = 65536
MARK_POINTS = ("store-mark", "store-marked")
# Each test run takes these: a backup is open; the peer has sealed, and its acknowledgement is lost.
SAMPLE = {"pass-open", "store-sealed"}


@pytest.fixture
def pair(lab: Lab) -> Iterator[SourcePair]:
    """Two proxies, installed; the test starts them."""
    with installed_source_pair(lab) as pair:
        yield pair
        lab.wan.heal()


def test_every_point_of_a_pass_is_in_a_table_here() -> None:
    tested = {*SOURCE_POINTS, *STORE_POINTS, *FIRST_COPY_POINTS, *MARK_POINTS, "resync-sealed"}
    # what a start, a removal and libvirt do without the peer
    elsewhere = {"store-recovering", "store-removing", "raw-overlay-on"}
    prefixes = ("pass-", "store-", "seed-", "resync-", "raw-")
    assert tested | elsewhere == {point for point in CRASH_POINTS if point.startswith(prefixes)}


@contextlib.contextmanager
def cut_at_its_point(pair: SourcePair, host: str, work: Callable[[], object]) -> Iterator[None]:
    """``work`` again and again until that host's proxy stands at its point; then the link is cut, and it goes
    on. The link is healed in the end."""
    reached = threading.Event()

    def until_reached() -> None:
        while not reached.wait(0.2):
            # Where it stands still, or the link is cut, there is no result.
            with contextlib.suppress(CallFailed, OSError):
                work()

    worker = threading.Thread(target=until_reached)
    worker.start()
    try:
        pair.wait_stopped(host)
        reached.set()
        pair.cut()
        pair.go_on(host)
        yield
    finally:
        reached.set()
        pair.lab.wan.heal()
        worker.join(120)
    assert not worker.is_alive()


def check_cut(pair: SourcePair, vm: Vm) -> None:
    """Without contact: that is told, the guest is left alone, and it goes on writing."""
    pair.wait(vm.status, lambda one: one["state"] == "unreachable", timeout_seconds=60)
    # Nothing is copied aside for long for a peer that cannot be reached.
    pair.wait(vm.backup_job, lambda job: job == "", timeout_seconds=60)
    # The watchdog's record goes after it, and is not there before any backup.
    pair.wait(lambda: pair.shell(HOME, f"ls {RUN}/passes", check=False), lambda left: not left.strip())
    for disk in vm.disks:
        vm.write(disk, 8, "2M", BLOCK)
    assert "No errors found" in vm.virsh("domblkerror", vm.name)


def check_healed(pair: SourcePair, vm: Vm) -> None:
    """Contact is back: the next pass is incremental, the replica equal, and the VM nowhere but at home."""
    pair.wait(vm.status, lambda one: one["state"] == "protected" and one["cause"] == "ok", timeout_seconds=90)
    check_carried_on(pair, vm)
    assert vm.name not in pair.run(BACKUP, "virsh", "list", "--all", "--name").split()


@pytest.mark.parametrize("point", sampled(SAMPLE, *SOURCE_POINTS, *STORE_POINTS))
def test_link_cut_at_a_step_of_a_pass(pair: SourcePair, point: str) -> None:
    pair.start(BACKUP)
    pair.start(HOME)
    vm = pair.make_vm("severed", {"vda": "64M", "vdb": "32M"})
    vm.write("vda", 1, 0, "4M")
    pair.protect(vm)
    host = HOME if point in SOURCE_POINTS else BACKUP
    pair.restart(host, stop_at=point)

    def one_pass() -> None:
        for disk in vm.disks:
            vm.write(disk, 7, "4M", BLOCK)
        vm.run_pass()

    with cut_at_its_point(pair, host, one_pass):
        check_cut(pair, vm)
    check_healed(pair, vm)


@pytest.mark.soak
@pytest.mark.parametrize("point", [*FIRST_COPY_POINTS, *MARK_POINTS])
def test_link_cut_around_a_first_copy(pair: SourcePair, point: str) -> None:
    host = HOME if point in FIRST_COPY_POINTS else BACKUP
    pair.start(BACKUP, stop_at=point if host == BACKUP else "")
    pair.start(HOME, stop_at=point if host == HOME else "")
    vm = pair.make_vm("first", {"vda": "64M", "vdb": "32M"})
    vm.write("vda", 1, 0, "4M")

    def protect() -> None:
        pair.call(HOME, "protect", vm=vm.name, peer=BACKUP, rpo_seconds=3600)

    with cut_at_its_point(pair, host, protect):
        check_cut(pair, vm)
    check_healed(pair, vm)


@pytest.mark.soak
def test_link_cut_after_a_resync_was_sealed(pair: SourcePair) -> None:
    pair.start(BACKUP)
    pair.start(HOME)
    vm = pair.make_vm("again", {"vda": "64M"})
    vm.write("vda", 1, 0, "4M")
    pair.protect(vm)
    pair.restart(HOME, stop_at="resync-sealed")
    vm.wait_protected()
    asked = threading.Event()

    def ask_once() -> None:
        # A request that the stopped proxy takes when it goes on would be for another resync, and get it.
        if not asked.is_set():
            asked.set()
            pair.call(HOME, "resync", vm=vm.uuid)

    with cut_at_its_point(pair, HOME, ask_once):
        check_cut(pair, vm)
    check_healed(pair, vm)
