# SPDX-License-Identifier: GPL-3.0-or-later
"""SIGKILL at every named point; afterwards the replica is at a sealed generation and goes on from it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from precache_proxy.blocks import images
from precache_proxy.crash_points import CRASH_POINTS
from precache_proxy.store.service import Store
from unit.store.crash_child import GENERATIONS, SETTINGS, changes, contents
from unit.store.store_driver import VM, Handlers, Source, files, merged, read_chain

CHILD = Path(__file__).parent / "crash_child.py"
POINTS = [
    "store-mark", "store-marked", "store-mark:2", "store-generation-open", "store-generation-open:3",
    "store-before-seal", "store-before-seal:3", "store-flushed", "store-flushed:4", "store-synced",
    "store-synced:3", "store-sealed", "store-sealed:5", "store-committing", "store-committing:4",
    "store-committed", "store-committed:3", "store-rebased", "store-rebased:3", "store-commit-recorded",
    "store-recovering", "store-recovering:3",
]  # fmt: skip


def run_child(directory: Path, point: str | None, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    if point is not None:
        environment["LIFEBOAT_CRASH_AT"] = point
    done = subprocess.run(
        [sys.executable, str(CHILD), str(directory), *arguments],
        check=False, capture_output=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode in {0, -signal.SIGKILL}, done.stderr.decode()
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


async def unlocked(directory: Path) -> None:
    """Wait until the kernel has ended the killed store's qemu-nbd."""
    for _ in range(100):
        if not any(images.locked(path) for path in directory.rglob("*.qcow2")):
            return
        await asyncio.sleep(0.05)
    pytest.fail("a qemu-nbd of a killed store is still there")


async def check_and_go_on(directory: Path, events: list[dict[str, Any]]) -> None:
    """What the record promises is there, nothing acknowledged is lost, and the story can be ended."""
    await unlocked(directory)
    store = Store(directory / "store", directory / "run", SETTINGS)
    await store.start()
    model = contents()
    status = await store.status(VM)
    sealed = status["sealed"]["generation"] if status["sealed"] else 0
    acknowledged = max((event.get("sealed", 0) for event in events), default=0)
    assert acknowledged <= sealed <= acknowledged + 1
    if sealed:
        for disk, content in model[sealed].items():
            assert read_chain(store, VM, disk) == content, f"{disk} is not what generation {sealed} was"
        chain = await store.freeze_for_arrival(VM, sealed, 2)
        assert chain.attachments["nvram"].read_bytes() == b"n%d" % sealed
        await store.thaw(VM)
    else:
        marked = max((event.get("marked", 0) for event in events), default=0)
        assert (status["seeding"] or {}).get("vda", 0) >= marked
    record = json.loads((store.directory / VM / "replica.json").read_text())
    layers = {layer["file"] for chain_ in record["layers"].values() for layer in chain_}
    assert {name for name in files(store) if name.endswith(".qcow2")} - layers <= {
        "vda/base.qcow2",
        "vdb/base.qcow2",
    }
    source = Source(Handlers(store), sizes=dict.fromkeys(["vda", "vdb"], 0), generation=sealed)
    source.resize(**{disk: len(content) for disk, content in model[0].items()})
    if not sealed:
        await source.seed(changes(0))
    while source.generation < GENERATIONS:
        await source.send(changes(source.generation + 1), {"nvram": b"x"})
    await merged(store)
    for disk, content in model[GENERATIONS].items():
        assert read_chain(store, VM, disk) == content
        assert (await images.check(store.directory / VM / disk / "base.qcow2")).get("corruptions", 0) == 0
    await store.stop()


@pytest.mark.parametrize("point", POINTS)
async def test_killed_at(tmp_path: Path, point: str) -> None:
    earlier: list[dict[str, Any]] = []
    if "recovering" in point:
        # recovery deletes something only after a crash that left something
        first = "store-commit-recorded:3" if point.endswith(":3") else "store-synced:3"
        code, earlier = await asyncio.to_thread(run_child, tmp_path, first)
        assert code == -signal.SIGKILL
        await unlocked(tmp_path)
        point = "store-recovering"
    code, events = await asyncio.to_thread(run_child, tmp_path, point)
    assert code == -signal.SIGKILL, f"the story never came to {point}"
    await check_and_go_on(tmp_path, earlier + events)


def test_every_point_of_the_store_is_in_the_table() -> None:
    tested = {point.partition(":")[0] for point in POINTS} | {"store-removing"}
    assert tested == {point for point in CRASH_POINTS if point.startswith("store-")}


async def test_killed_while_removing(tmp_path: Path) -> None:
    code, _ = await asyncio.to_thread(run_child, tmp_path, None)
    assert code == 0
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    code, _ = await asyncio.to_thread(run_child, tmp_path, "store-removing", "remove")
    assert code == -signal.SIGKILL
    store = Store(tmp_path / "store", tmp_path / "run", SETTINGS)
    await store.start()
    assert await store.statuses() == []
    assert list(store.directory.iterdir()) == []


async def test_a_half_generation_that_is_open_is_not_deleted(tmp_path: Path) -> None:
    code, _ = await asyncio.to_thread(run_child, tmp_path, "store-synced:3")
    assert code == -signal.SIGKILL
    await unlocked(tmp_path)
    half = tmp_path / "store" / VM / "vda" / "g1-3.qcow2"
    foreign = half.with_name("web1-arrival.qcow2")
    foreign.write_bytes(b"someone's overlay")
    with half.open("rb"):
        store = Store(tmp_path / "store", tmp_path / "run", SETTINGS)
        await store.start()
        assert half.exists()
        await store.stop()
    store = Store(tmp_path / "store", tmp_path / "run", SETTINGS)
    await store.start()
    assert not half.exists()
    assert foreign.exists(), "what the record does not prove to be ours is left alone"
    await store.stop()


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
async def test_what_is_acknowledged_was_synced_before(tmp_path: Path) -> None:
    """SIGKILL keeps the page cache: only the system calls tell what a power cut would leave."""
    trace = tmp_path / "trace"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [
        "strace", "-f", "-y", "-s", "200", "-e", "trace=fsync,fdatasync,rename,write,unlink",
        "-o", str(trace), sys.executable, str(CHILD), str(tmp_path),
    ]  # fmt: skip
    done = await asyncio.to_thread(
        subprocess.run, command, check=False, capture_output=True, env=environment, timeout=250
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    calls = finished_calls(trace.read_text(errors="replace"))
    told = {
        (key, value): number
        for number, call in enumerate(calls)
        for key, value in re.findall(r'write\(1[^,]*, "\{\\"(sealed|marked)\\": (\d+)', call)
    }
    assert len(told) == GENERATIONS + 2
    before = 0
    for generation in range(1, GENERATIONS + 1):
        end = told["sealed", str(generation)]
        span = calls[before:end]
        record = last(span, r"rename\(.*\.replica\.json\.new.*replica\.json")
        replica = f"store/{VM}"
        for disk in ("vda", "vdb"):
            overlay = first(span, rf"fsync\(\d+<[^>]*{disk}/g1-{generation}\.qcow2>")
            directory = last(span[:record], rf"fsync\(\d+<[^>]*{replica}/{disk}>\)")
            assert overlay < directory < record, "image, then its directory, then the record that names it"
            if generation == 1:
                assert first(span, rf"f(data)?sync\(\d+<[^>]*{disk}/base\.qcow2>") < record
            late = [call for call in span[overlay + 1 :] if f"{disk}/g1-{generation}.qcow2" in call]
            assert not [call for call in late if "write" in call], "written after it was synced"
        content = last(span[: record + 1], r"fsync\(\d+<[^>]*\.replica\.json\.new>")
        entry = first(span[record:], rf"fsync\(\d+<[^>]*{replica}>\)") + record
        assert content < record < entry
        before = end
    mark = told["marked", str(2 * 1024 * 1024)]
    span = calls[told["marked", str(1024 * 1024)] : mark]
    record = last(span, r"rename\(.*\.replica\.json\.new")
    assert first(span, r"fdatasync\(\d+<[^>]*vda/base\.qcow2>") < record
    # a superseded overlay is deleted only after the base, the overlay above and the record were synced
    gone = first(calls, r"unlink\(.*vda/g1-1\.qcow2\"\) += 0")
    record = last(calls[:gone], r"rename\(.*\.replica\.json\.new")
    above = last(calls[:record], r"fsync\(\d+<[^>]*vda/g1-2\.qcow2>")
    assert last(calls[:above], r"fsync\(\d+<[^>]*vda/base\.qcow2>") < above < record < gone


def finished_calls(text: str) -> list[str]:
    """Calls in the order in which they returned; begun and resumed halves are one."""
    begun: dict[str, str] = {}
    calls = []
    for line in text.splitlines():
        process, _, call = line.partition(" ")
        call = call.strip()
        if call.endswith("<unfinished ...>"):
            begun[process] = call.removesuffix("<unfinished ...>").rstrip()
            continue
        resumed = re.match(r"<\.\.\. \w+ resumed>(.*)", call)
        if resumed:
            call = begun.pop(process, "") + resumed.group(1)
        calls.append(call)
    return calls


def first(calls: list[str], pattern: str) -> int:
    found = [number for number, call in enumerate(calls) if re.search(pattern, call)]
    assert found, f"never called: {pattern}"
    return found[0]


def last(calls: list[str], pattern: str) -> int:
    found = [number for number, call in enumerate(calls) if re.search(pattern, call)]
    assert found, f"never called: {pattern}"
    return found[-1]
