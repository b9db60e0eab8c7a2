# SPDX-License-Identifier: GPL-3.0-or-later
"""Scratch space: reserved before, watched during, given back after; and who ends what a dead proxy left."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from pathlib import Path

import pytest

from precache_proxy.errors import NoSpace
from precache_proxy.source.gate import PriorityGate
from precache_proxy.source.scratch import Lease, PassRecord, ScratchPool, allocated_bytes, boottime_seconds
from precache_proxy.source.settings import SourceSettings
from precache_proxy.source.watchdog import lock_holders, why_end
from precache_proxy.units import MIB


def record(directory: Path, *, seconds: float = 60.0, limit_bytes: int = 8 * MIB) -> PassRecord:
    return PassRecord(
        domain="6695eb01-f6a4-8304-79aa-97f2502e193f",
        socket="/run/x.sock",
        scratch=[str(directory / "scratch")],
        scratch_limit_bytes=limit_bytes,
        deadline_boottime_seconds=boottime_seconds() + seconds,
        proxy_pid=os.getpid(),
    )


async def test_the_space_is_taken_before_and_given_back_after(tmp_path: Path) -> None:
    pool = ScratchPool(tmp_path / "scratch", pass_limit_bytes=8 * MIB, open_pass_limit=1)
    async with pool.lease("vm", limit_seconds=60) as lease:
        assert allocated_bytes([tmp_path / "scratch" / ".ballast.vm"]) == 4 * MIB
        lease.path("vda").write_bytes(b"left by libvirt")
        assert pool.open_passes == 1
    assert list((tmp_path / "scratch").iterdir()) == []
    assert pool.open_passes == 0


@pytest.mark.parametrize("limit_bytes", [64 * MIB, 100 * MIB + 1])
async def test_as_many_as_may_be_open_keep_the_limit_together(tmp_path: Path, limit_bytes: int) -> None:
    settings = SourceSettings("home1", ("backup1",), scratch_limit_bytes=limit_bytes)
    pool = ScratchPool(
        tmp_path,
        pass_limit_bytes=settings.pass_scratch_limit_bytes,
        open_pass_limit=settings.open_backup_limit,
    )
    async with contextlib.AsyncExitStack() as stack:
        leases = [
            await stack.enter_async_context(pool.lease(f"vm{number}", limit_seconds=60))
            for number in range(settings.open_backup_limit)
        ]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stack.enter_async_context(pool.lease("more", limit_seconds=60)), 0.1)
        assert sum(lease.limit_bytes for lease in leases) <= limit_bytes
        assert min(lease.limit_bytes for lease in leases) >= 8 * MIB


async def test_ballast_shrinks_as_scratch_grows_and_the_pass_is_ended_in_time(tmp_path: Path) -> None:
    lease = Lease("vm", tmp_path, 8 * MIB, 60)
    lease.reserve()
    scratch = lease.path("vda")
    scratch.write_bytes(os.urandom(3 * MIB))
    assert lease.look() == ""
    assert (tmp_path / ".ballast.vm").stat().st_size <= MIB
    aborted = asyncio.Event()

    async def abort() -> None:
        aborted.set()

    watch = asyncio.create_task(lease.watch(abort))
    with scratch.open("ab") as file:
        file.write(os.urandom(2 * MIB))
        file.flush()
        await asyncio.wait_for(lease.over.wait(), 5)
        assert "scratch at 5" in lease.reason
        assert not aborted.is_set()
        file.write(os.urandom(2 * MIB))
        file.flush()
        await asyncio.wait_for(aborted.wait(), 5)
    assert lease.aborted
    await watch
    lease.release()
    assert list(tmp_path.iterdir()) == []


async def test_a_pass_ends_when_its_time_is_over(tmp_path: Path) -> None:
    lease = Lease("vm", tmp_path, 8 * MIB, 0.2)
    lease.reserve()
    watch = asyncio.create_task(lease.watch(lambda: asyncio.sleep(0)))
    await asyncio.wait_for(lease.over.wait(), 5)
    assert lease.reason.startswith("open for")
    assert not lease.beyond_hard_limit()
    watch.cancel()
    lease.release()


def test_too_little_space_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    lease = Lease("vm", tmp_path, 2**60, 60)
    with pytest.raises(
        NoSpace, match=r"scratch of VM vm: .* needed, .* free on .*lower source.scratch_limit"
    ):
        lease.reserve()
    assert list(tmp_path.iterdir()) == []


async def test_only_so_many_passes_are_open_at_once(tmp_path: Path) -> None:
    pool = ScratchPool(tmp_path, pass_limit_bytes=MIB, open_pass_limit=2)
    most = 0

    async def one(number: int) -> None:
        nonlocal most
        async with pool.lease(f"vm{number}", limit_seconds=60):
            most = max(most, pool.open_passes)
            await asyncio.sleep(0.02)

    await asyncio.gather(*(one(number) for number in range(6)))
    assert most == 2


async def test_an_evacuation_waits_for_no_slice_of_others_to_reach_its_time(tmp_path: Path) -> None:
    """Theirs are starved by memory that crosses before them, and would be open for their whole minute."""
    pool = ScratchPool(tmp_path, pass_limit_bytes=MIB, open_pass_limit=2)
    order: list[str] = []
    came = asyncio.Event()

    async def one(name: str) -> None:
        async with pool.lease(name, limit_seconds=60) as lease:
            order.append(name)
            came.set()
            await lease.over.wait()

    def begin(name: str) -> asyncio.Task[None]:
        return asyncio.create_task(one(name))

    async def come(*names: str) -> None:
        """Until all of them have had their turn: a space is taken by a thread."""
        async with asyncio.timeout(10):
            while len(order) < len(names):
                came.clear()
                await came.wait()
        assert order == list(names)

    tasks = [begin("a")]
    await come("a")
    tasks.append(begin("b"))
    await come("a", "b")
    tasks += [begin("c"), begin("leaving")]
    await asyncio.sleep(0.05)
    assert order == ["a", "b"]
    pool.hasten("leaving")
    await come("a", "b", "leaving")
    await asyncio.sleep(0.05)
    assert order == ["a", "b", "leaving"], "it was asked for nothing but one slice"
    # One that is urgent itself, or begins to wait as such, is not ended for another.
    pool.hasten("late")
    tasks.append(begin("late"))
    await come("a", "b", "leaving", "late")
    pool.hasten("third")
    tasks.append(begin("third"))
    await asyncio.sleep(0.05)
    assert len(order) == 4
    tasks[3].cancel()
    await come("a", "b", "leaving", "late", "third")
    pool.ease("late")
    pool.hasten("last")
    tasks.append(begin("last"))
    await come("a", "b", "leaving", "late", "third", "last")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    async with asyncio.timeout(1), pool.lease("x", limit_seconds=1), pool.lease("y", limit_seconds=1):
        pass


async def test_the_gate_lets_the_most_important_through_first() -> None:
    gate = PriorityGate(1)
    order: list[str] = []

    async def one(name: str, priority: int) -> None:
        async with gate.turn(priority):
            order.append(name)
            await asyncio.sleep(0.01)

    first = asyncio.create_task(one("first", 0))
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(one(f"p{priority}", priority)) for priority in (10, 90, 50)]
    given_up = asyncio.create_task(one("given up", 100))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.gather(first, *waiting, given_up, return_exceptions=True)
    assert order == ["first", "p90", "p50", "p10"]
    async with asyncio.timeout(1), gate.turn(0):
        pass


def test_records_survive_a_round_trip_and_half_ones_are_none(tmp_path: Path) -> None:
    path = tmp_path / "passes" / "vm.json"
    one = record(tmp_path)
    one.write(path)
    assert PassRecord.read(path) == one
    path.write_text('{"domain": "x"')
    assert PassRecord.read(path) is None
    assert PassRecord.read(tmp_path / "none.json") is None


def test_the_watchdog_sees_who_holds_the_lock_without_touching_it(tmp_path: Path) -> None:
    path = Path("/dev/shm") / f"lifeboat-test-{os.getpid()}.lock"
    try:
        with path.open("w") as held:
            assert lock_holders(path) == 0
            fcntl.flock(held, fcntl.LOCK_EX)
            assert lock_holders(path) == 1
        assert lock_holders(path) == 0
    finally:
        path.unlink()
    assert lock_holders(tmp_path / "none") == 0


def test_why_a_job_is_ended(tmp_path: Path) -> None:
    assert why_end(record(tmp_path), proxy_alive=True) == ""
    assert "is gone" in why_end(record(tmp_path), proxy_alive=False)
    assert "time is over" in why_end(record(tmp_path, seconds=-1), proxy_alive=True)
    (tmp_path / "scratch").write_bytes(os.urandom(8 * MIB))
    assert "of 8388608 bytes" in why_end(record(tmp_path), proxy_alive=True)
