# SPDX-License-Identifier: GPL-3.0-or-later
"""What goes wrong around a protection: full file systems, cut links, strangers at the port, rot, people."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from integration.source_pair import BACKUP, DIRECTORY, HOME, LOG, PORT, RUN, STATE, CallFailed, SourcePair, Vm
from lifeboat_lab.lab import Lab
from precache_proxy.crash_points import CRASH_POINTS

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

BLOCK = 65536
MIB = 1 << 20
NOISE = "/var/tmp/noise"


@pytest.fixture
def pair(lab: Lab) -> Iterator[SourcePair]:
    """Two proxies, installed; the test starts them."""
    pair = SourcePair(lab)
    pair.install()
    yield pair
    try:
        for vm in pair.vms:
            vm.remove()
    finally:
        pair.shell(HOME, f"rm -f {NOISE}")
        pair.close()


@contextlib.contextmanager
def small_file_system(pair: SourcePair, host: str, path: str, size: str) -> Iterator[Callable[[str], None]]:
    """A tmpfs at a directory of a host; what it yields changes its size."""
    pair.shell(
        host, f"mkdir -p {path} && chmod 711 {path} && mount -t tmpfs -o mode=711,size={size} none {path}"
    )
    try:
        yield lambda changed: print(pair.shell(host, f"mount -o remount,size={changed} {path}"))
    finally:
        pair.shell(host, f"umount -l {path}")


def make_noise(pair: SourcePair, mebibytes: int) -> None:
    """A file that does not compress, to be written into guests."""
    pair.shell(HOME, f"head -c {mebibytes}M /dev/urandom > {NOISE}; chmod 644 {NOISE}")


def wait_state(pair: SourcePair, vm: Vm, state: str, *, timeout_seconds: float = 60) -> dict[str, Any]:
    """Until the VM's protection is in this state."""
    told: dict[str, Any] = pair.wait(
        vm.status, lambda status: status["state"] == state, timeout_seconds=timeout_seconds
    )
    return told


def no_job(vm: Vm) -> bool:
    """Whether no backup job is open in QEMU."""
    job: str = vm.virsh("backup-dumpxml", vm.name, check=False)
    return not job.strip()


def remove(pair: SourcePair, *vms: Vm) -> None:
    """While the proxies still have what they stand on."""
    for vm in vms:
        vm.remove()
        pair.vms.remove(vm)


def test_a_full_destination_costs_one_vm_until_there_is_room(pair: SourcePair) -> None:
    with small_file_system(pair, BACKUP, f"{STATE}/store", "40m") as resize:
        pair.start(BACKUP)
        pair.start(HOME)
        hungry, frugal = pair.make_vm("hungry", {"vda": "64M"}), pair.make_vm("frugal", {"vda": "32M"})
        for vm in (hungry, frugal):
            vm.write("vda", 1, 0, "1M")
            pair.protect(vm, rpo_seconds=3)
        make_noise(pair, 48)
        hungry.qemu_io("vda", f"write -s {NOISE} 0 48M")
        told = wait_state(pair, hungry, "no-space")
        assert told["cause"] == "no-space"
        assert f"{STATE}/store" in told["sentence"]
        sealed = frugal.status()["generation"]
        frugal.write("vda", 2, "1M", BLOCK)
        pair.wait(frugal.status, lambda one: one["generation"] > sealed, timeout_seconds=60)
        frugal.require_equal()
        assert hungry.status()["generation"] == told["generation"]
        resize("200m")
        wait_state(pair, hungry, "protected", timeout_seconds=90)
        hungry.run_pass()
        hungry.require_equal()
        assert len(hungry.checkpoints()) == 1
        remove(pair, hungry, frugal)
        pair.signal(BACKUP, "TERM")


def test_a_full_scratch_opens_no_pass_and_costs_the_guest_nothing(pair: SourcePair) -> None:
    with small_file_system(pair, HOME, f"{STATE}/scratch", "6m") as resize:
        pair.start(BACKUP)
        pair.start(HOME, scratch_limit_bytes=64 * MIB)
        vm = pair.make_vm("cramped", {"vda": "64M"})
        pair.call(HOME, "protect", vm=vm.name, peer=BACKUP, rpo_seconds=3)
        told = wait_state(pair, vm, "no-space")
        assert "scratch" in told["sentence"]
        assert f"free on {STATE}/scratch" in told["sentence"]
        assert no_job(vm)
        vm.write("vda", 2, "1M", "8M")
        assert "No errors found" in vm.virsh("domblkerror", vm.name)
        resize("100m")
        vm.wait_protected(timeout_seconds=90)
        vm.run_pass()
        vm.require_equal()
        remove(pair, vm)
        pair.signal(HOME, "TERM")


def test_a_full_disk_under_the_sources_records_stops_passes_and_loses_none(pair: SourcePair) -> None:
    with small_file_system(pair, HOME, f"{STATE}/source", "1m") as resize:
        pair.start(BACKUP)
        pair.start(HOME)
        vm = pair.make_vm("noted", {"vda": "64M"})
        pair.protect(vm, rpo_seconds=3)
        pair.shell(HOME, f"cat /dev/zero > {STATE}/source/filling 2>/dev/null || true")
        vm.write("vda", 2, "1M", BLOCK)
        told = wait_state(pair, vm, "no-space")
        assert f"{STATE}/source" in told["sentence"]
        vm.write("vda", 3, "2M", BLOCK)
        assert no_job(vm)
        resize("4m")
        wait_state(pair, vm, "protected", timeout_seconds=90)
        vm.run_pass()
        status = vm.wait_protected()
        assert vm.checkpoints() == [status["checkpoint"]]
        assert status["last_pass"]["compared_bytes"] == 0
        vm.require_equal()
        remove(pair, vm)
        pair.signal(HOME, "TERM")


def test_a_link_cut_in_a_pass_and_healed(pair: SourcePair, lab: Lab) -> None:
    pair.start(BACKUP)
    pair.start(HOME, pass_limit_seconds=3.0)
    vm = pair.make_vm("severed", {"vda": "64M"})
    vm.write("vda", 1, 0, "1M")
    pair.protect(vm, rpo_seconds=5)
    # more than is read ahead of the link
    make_noise(pair, 48)
    lab.wan.set("rate=16mbit,rtt=20ms")
    try:
        vm.qemu_io("vda", f"write -s {NOISE} 8M 48M")
        pair.wait(vm.status, lambda one: one["pass_open"], timeout_seconds=20)
        lab.wan.cut("home", "backup")
        wait_state(pair, vm, "unreachable")
        # nothing is copied aside for long for a peer that cannot be reached
        pair.wait(lambda: no_job(vm), bool, timeout_seconds=30)
        vm.write("vda", 9, "2M", BLOCK)
    finally:
        lab.wan.heal()
        lab.wan.set("none")
    pair.wait(
        vm.status, lambda one: one["generation"] > 1 and one["state"] == "protected", timeout_seconds=90
    )
    vm.run_pass()
    assert vm.status()["last_pass"]["compared_bytes"] == 0
    assert len(vm.checkpoints()) == 1
    vm.require_equal()


def test_a_vm_undefined_while_protected_is_told_and_goes_on_when_it_is_back(pair: SourcePair) -> None:
    pair.start(BACKUP)
    pair.start(HOME)
    vm, other = pair.make_vm("vanishing", {"vda": "32M"}), pair.make_vm("staying", {"vda": "32M"})
    for one in (vm, other):
        one.write("vda", 1, 0, "1M")
        pair.protect(one, rpo_seconds=3)
    xml = vm.virsh("dumpxml", "--inactive", vm.name)
    vm.virsh("destroy", vm.name, "--graceful")
    vm.virsh("undefine", vm.name, "--checkpoints-metadata")
    told = wait_state(pair, vm, "stopped")
    assert told["cause"] == "not-found"
    assert "not defined on this host any more" in told["sentence"]
    sealed = other.status()["generation"]
    other.write("vda", 2, "1M", BLOCK)
    pair.wait(other.status, lambda one: one["generation"] > sealed, timeout_seconds=30)
    (pair.root(HOME) / "var/tmp/vanishing.xml").write_text(xml)
    vm.virsh("define", "/var/tmp/vanishing.xml")
    vm.virsh("start", vm.name)
    vm.write("vda", 3, "2M", BLOCK)
    vm.wait_protected(timeout_seconds=90)
    vm.run_pass()
    assert vm.status()["last_pass"]["compared_bytes"] == 0
    vm.require_equal()


def test_scrub_finds_and_repairs_a_block_that_rotted_at_the_peer(pair: SourcePair) -> None:
    pair.start(BACKUP)
    pair.start(HOME, scrub_interval_seconds=1.0, scrub_slice_bytes=8 * MIB)
    vm = pair.make_vm("mouldy", {"vda": "32M"})
    vm.write("vda", 5, 0, "8M")
    pair.protect(vm, rpo_seconds=2)
    turns = vm.status()["scrub"]["turns"]
    pair.wait(vm.status, lambda one: one["scrub"]["turns"] > turns, timeout_seconds=60)
    assert vm.status()["scrub"]["different_blocks"] == 0
    pair.call(HOME, "hold", vm=vm.uuid, holder="test")
    generation = vm.status()["generation"]
    top = pair.call(BACKUP, "replica_tops", vm=vm.uuid, generation=generation, epoch=0)["vda"]
    pair.run(BACKUP, "qemu-io", "-f", "qcow2", "-c", "write -P 66 3M 512", top)
    pair.call(HOME, "release", vm=vm.uuid, holder="test")
    found = pair.wait(vm.status, lambda one: one["scrub"]["different_blocks"] > 0, timeout_seconds=60)
    assert found["scrub"]["different_blocks"] == 1
    assert "differed from the disk and were repaired" in pair.log(HOME)
    pair.call(HOME, "hold", vm=vm.uuid, holder="test")
    vm.require_equal()
    pair.call(HOME, "release", vm=vm.uuid, holder="test")


STRANGER = """
import asyncio, json, os, random, socket, ssl, struct, sys
sys.path.insert(0, sys.argv[1])
from precache_proxy.channel import frames
keys, host, port = sys.argv[2], sys.argv[3], int(sys.argv[4])
chance = random.Random(20)

def connect():
    return socket.create_connection((host, port), timeout=15)

def tls(own=True):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(f"{keys}/ca.crt")
    if own:
        context.load_cert_chain(f"{keys}/host.crt", f"{keys}/host.key")
    return context.wrap_socket(connect(), server_hostname=host)

def ended(one):
    # a stranger is answered or cut off, never left hanging
    one.settimeout(30)
    try:
        while one.recv(65536):
            pass
    except (ConnectionError, ssl.SSLError):
        pass
    one.close()

def hello(slot=0):
    return frames.pack_hello({"name": sys.argv[5], "peer": host, "slot": slot, "session": os.urandom(8).hex(),
                              "instance": "stranger"})

count = 0
for sent in (b"GET / HTTP/1.1\\r\\n\\r\\n", chance.randbytes(4096), b"\\x16\\x03\\x01" + b"\\xff" * 70000):
    one = connect(); one.sendall(sent); ended(one); count += 1
one = tls(own=False)
try:
    one.sendall(hello()); ended(one)
except (ConnectionError, ssl.SSLError):
    pass
count += 1
whole = hello()
for sent in (chance.randbytes(64), struct.pack(">4sHH", frames.MAGIC, frames.VERSION, 65535) + b"{" * 65535,
             frames.pack_hello({"name": host, "peer": host, "slot": 0}), whole[:4] + b"\\0\\x63" + whole[6:],
             hello(slot=10**9), frames._HELLO.pack(frames.MAGIC, frames.VERSION, 4) + b"[[[["):
    one = tls()
    try:
        one.sendall(sent)
    except (ConnectionError, ssl.SSLError):
        pass
    ended(one); count += 1
inside = 0
for sent in [chance.randbytes(chance.randrange(1, 300)) for _ in range(12)] + [
    frames.HEADER.pack(int(frames.FrameType.DATA), 0, 3, 0xFFFFFFFF, 1, 0),
    frames.HEADER.pack(int(frames.FrameType.DATA), 0, 3, frames.MAX_MESSAGE_BYTES, 1, 0) + b"cut short",
    frames.HEADER.pack(int(frames.FrameType.OPEN), 0, 3, 1 << 16, 1, 0) + b"[" * (1 << 16),
]:
    one = tls()
    one.sendall(hello() + sent)
    try:
        one.unwrap()
    except (OSError, ssl.SSLError, ValueError):
        pass
    one.close(); inside += 1
print(count, inside)
"""


def test_strangers_at_the_port_harm_nobody_and_are_one_line_each(pair: SourcePair) -> None:
    pair.start(BACKUP)
    pair.start(HOME)
    vm = pair.make_vm("unmoved", {"vda": "32M"})
    pair.protect(vm)
    before = int(pair.shell(HOME, f"wc -l < {LOG}"))
    told = pair.run(
        BACKUP, "python3", "-c", STRANGER, DIRECTORY, f"{DIRECTORY}/keys", HOME, str(PORT), BACKUP
    )
    strangers, inside = (int(word) for word in told.split())
    lines = pair.shell(HOME, f"tail -n +{before + 1} {LOG}").splitlines()
    # the real peer's connections, too, find that its session is not known any more
    away = [line for line in lines if "was turned away" in line and "know the session" not in line]
    assert len(away) == strangers, lines
    assert len(lines) <= strangers + 3 * inside
    assert not any("Traceback" in line for line in lines), lines
    vm.write("vda", 2, "1M", BLOCK)
    assert vm.run_pass()["data_bytes"] == BLOCK
    vm.require_equal()


SOURCE_POINTS = ("pass-begun", "pass-open", "pass-sent", "pass-sealed", "pass-recorded")
STORE_POINTS = (
    "store-generation-open", "store-before-seal", "store-flushed", "store-synced", "store-sealed",
    "store-committing", "store-committed", "store-rebased", "store-commit-recorded",
)  # fmt: skip


def test_the_tables_name_every_point_of_a_pass() -> None:
    tested = {*SOURCE_POINTS, *STORE_POINTS, "store-mark", "store-marked"}
    # what a start or a removal does is not part of a pass; tests/unit/store has it
    elsewhere = {"store-recovering", "store-removing"}
    assert tested | elsewhere == {point for point in CRASH_POINTS if point.startswith(("pass-", "store-"))}


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
    make_noise(pair, 16)
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
    vm.wait_protected()
    vm.run_pass()
    status = vm.wait_protected()
    assert status["last_pass"]["compared_bytes"] == 0
    assert no_job(vm)
    assert vm.checkpoints() == [status["checkpoint"]]
    assert pair.shell(HOME, f"ls {RUN}/passes").strip() == ""
    assert "No errors found" in vm.virsh("domblkerror", vm.name)
    vm.require_equal()


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
    make_noise(pair, 32)
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
