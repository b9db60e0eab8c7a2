# SPDX-License-Identifier: GPL-3.0-or-later
"""What goes wrong around a protection: full file systems, cut links, strangers at the port, rot, people."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from integration.source_pair import (
    BACKUP,
    DIRECTORY,
    HOME,
    LOG,
    NOISE,
    PORT,
    STATE,
    SourcePair,
    Vm,
    installed_source_pair,
)
from lifeboat_lab.lab import Lab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

BLOCK = 65536
MIB = 1 << 20


@pytest.fixture
def pair(lab: Lab) -> Iterator[SourcePair]:
    """Two proxies, installed; the test starts them."""
    with installed_source_pair(lab) as pair:
        yield pair


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


def wait_state(pair: SourcePair, vm: Vm, state: str, *, timeout_seconds: float = 60) -> dict[str, Any]:
    """Until the VM's protection is in this state."""
    told: dict[str, Any] = pair.wait(
        vm.status, lambda status: status["state"] == state, timeout_seconds=timeout_seconds
    )
    return told


def test_a_full_destination_costs_one_vm_until_there_is_room(pair: SourcePair) -> None:
    with small_file_system(pair, BACKUP, f"{STATE}/store", "40m") as resize:
        pair.start(BACKUP)
        pair.start(HOME)
        hungry, frugal = pair.make_vm("hungry", {"vda": "64M"}), pair.make_vm("frugal", {"vda": "32M"})
        for vm in (hungry, frugal):
            vm.write("vda", 1, 0, "1M")
            pair.protect(vm, rpo_seconds=3)
        pair.make_noise(48)
        hungry.qemu_io("vda", f"write -s {NOISE} 0 48M")
        told = wait_state(pair, hungry, "no-space")
        assert told["cause"] == "no-space"
        assert f"{STATE}/store" in told["sentence"]
        sealed = frugal.status()["generation"]
        frugal.write("vda", 2, "1M", BLOCK)
        pair.wait(frugal.status, lambda one: one["generation"] > sealed, timeout_seconds=60)
        assert hungry.status()["generation"] == told["generation"]
        resize("200m")
        frugal.require_equal()
        wait_state(pair, hungry, "protected", timeout_seconds=90)
        hungry.run_pass()
        hungry.require_equal()
        assert len(hungry.checkpoints()) == 1
        # while the proxies still have what they stand on
        hungry.remove()
        frugal.remove()
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
        assert vm.backup_job() == ""
        vm.write("vda", 2, "1M", "8M")
        assert "No errors found" in vm.virsh("domblkerror", vm.name)
        resize("100m")
        vm.wait_protected(timeout_seconds=90)
        vm.run_pass()
        vm.require_equal()
        vm.remove()
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
        assert vm.backup_job() == ""
        resize("4m")
        wait_state(pair, vm, "protected", timeout_seconds=90)
        vm.run_pass()
        status = vm.wait_protected()
        assert vm.checkpoints() == [status["checkpoint"]]
        assert status["last_pass"]["compared_bytes"] == 0
        vm.require_equal()
        vm.remove()
        pair.signal(HOME, "TERM")


def test_a_link_cut_in_a_pass_and_healed(pair: SourcePair, lab: Lab) -> None:
    pair.start(BACKUP)
    pair.start(HOME, pass_limit_seconds=3.0)
    vm = pair.make_vm("severed", {"vda": "64M"})
    vm.write("vda", 1, 0, "1M")
    pair.protect(vm, rpo_seconds=5)
    # more than is read ahead of the link
    pair.make_noise(48)
    lab.wan.set("rate=16mbit,rtt=20ms")
    try:
        vm.qemu_io("vda", f"write -s {NOISE} 8M 48M")
        pair.wait(vm.status, lambda one: one["pass_open"], timeout_seconds=20)
        lab.wan.cut("home", "backup")
        wait_state(pair, vm, "unreachable")
        # nothing is copied aside for long for a peer that cannot be reached
        pair.wait(vm.backup_job, lambda job: job == "", timeout_seconds=30)
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
    assert "not defined on this host" in told["sentence"]
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
    lines = [line for line in lines if "know the session" not in line]
    away = [line for line in lines if "was turned away" in line]
    assert len(away) == strangers, lines
    assert len(lines) <= strangers + 3 * inside
    assert not any("Traceback" in line for line in lines), lines
    vm.write("vda", 2, "1M", BLOCK)
    assert vm.run_pass()["data_bytes"] == BLOCK
    vm.require_equal()
