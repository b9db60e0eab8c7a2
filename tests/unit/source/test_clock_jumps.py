# SPDX-License-Identifier: GPL-3.0-or-later
"""The clock of the host jumps: passes keep their pace, lags stay sane, nothing is taken for done."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from precache_proxy.source import scratch
from precache_proxy.source.gate import PriorityGate
from precache_proxy.source.passes import PassResult
from precache_proxy.source.protection import Protection
from precache_proxy.source.record import ProtectionRecord, Sealed
from precache_proxy.source.settings import SourceSettings

DAY_SECONDS = 86400.0
JUMPS = pytest.mark.parametrize("jump_seconds", [DAY_SECONDS, -DAY_SECONDS, -40 * 365 * DAY_SECONDS])


class Link:
    """A peer that is there."""

    state, cause, sentence = "up", "up", ""


async def may_begin(_vm: object) -> float:
    return 0.0


def protection(tmp_path: Path) -> Protection:
    environment = SimpleNamespace(
        directory=tmp_path, run_directory=tmp_path, passes=PriorityGate(1), long_work=PriorityGate(1),
        link=lambda _peer: Link(), settings=SourceSettings("home1", ("backup1",)),
        backups=SimpleNamespace(ease=lambda _uuid: None, wait_seconds=may_begin),
    )  # fmt: skip
    sealed = Sealed(7, "lifeboat-e0-g7", time.time(), time.time(), disks=["vda"])
    record = ProtectionRecord("vm", "web1", "backup1", rpo_seconds=0.4, sealed=sealed)
    made = Protection(record, cast(Any, environment))
    made.replication.standing.needs_reconcile = False
    return made


@JUMPS
async def test_passes_keep_their_pace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_seconds: float
) -> None:
    made = protection(tmp_path)
    begun: list[float] = []
    enough = asyncio.Event()
    real = time.time

    async def run_pass(**_unused: object) -> PassResult:
        begun.append(time.monotonic())
        if len(begun) == 2:
            monkeypatch.setattr(time, "time", lambda: real() + jump_seconds)
        if len(begun) == 6:
            enough.set()
        made.replication.clean_at = time.monotonic()
        return PassResult(7, skipped=True)

    monkeypatch.setattr(made.replication, "run_pass", run_pass)
    made.start()
    try:
        await asyncio.wait_for(enough.wait(), 10)
    finally:
        await made.stop()
    assert min(later - earlier for earlier, later in itertools.pairwise(begun)) > 0.02
    assert made.state == "protected"


@JUMPS
def test_a_lag_is_no_clock_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_seconds: float) -> None:
    made = protection(tmp_path)
    made.state = "protected"
    made.replication.clean_at, made.replication.dirty_bytes = time.monotonic() - 5, 65536
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_seconds)
    assert made.lag_seconds == pytest.approx(5, abs=1)
    # just after a start only the clock is there to go by: never a lag below zero
    made.replication.clean_at = None
    assert made.lag_seconds is not None
    assert made.lag_seconds >= 0


@JUMPS
def test_an_open_pass_ends_by_the_time_since_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_seconds: float
) -> None:
    real = time.time
    lease = scratch.Lease("vm", tmp_path, 1 << 20, limit_seconds=60.0)
    monkeypatch.setattr(time, "time", lambda: real() + jump_seconds)
    assert lease.look() == ""
    assert not lease.beyond_hard_limit()
    booted = scratch.boottime_seconds
    monkeypatch.setattr(scratch, "boottime_seconds", lambda: booted() + 60.0)
    assert lease.look() == "open for 60 s"
    assert not lease.beyond_hard_limit()
    monkeypatch.setattr(scratch, "boottime_seconds", lambda: booted() + 60.0 + scratch.GRACE_SECONDS)
    assert lease.beyond_hard_limit()
