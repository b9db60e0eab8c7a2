# SPDX-License-Identifier: GPL-3.0-or-later
"""The clock of a host is set back between two attempts: the later one counts, whatever its date says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from precache_proxy.evacuation.arrival import Arrival, ArrivalState
from precache_proxy.evacuation.arrival_records import ArrivalRecords
from precache_proxy.evacuation.departures import Departures
from precache_proxy.evacuation.fail_over import FailOver
from precache_proxy.evacuation.guard import Guard
from precache_proxy.evacuation.job import EvacuationOptions, Job, Journal, Step, Verdict, new_job
from precache_proxy.evacuation.surroundings import Surroundings

VM = "11111111-2222-4333-8444-555555555501"
NOON, MORNING = 50_000.0, 10_000.0


async def records_of(tmp_path: Path, *arrivals: Arrival) -> ArrivalRecords:
    """As they are after a restart of the proxy."""
    records = ArrivalRecords(tmp_path / "arrivals")
    for arrival in arrivals:
        await records.save(arrival)
    records.load()
    return records


def arrival(
    number: str, epoch: int, state: ArrivalState, since: float, *, fails_over: bool = False
) -> Arrival:
    return Arrival(number, VM, "web1", "home1", epoch, 7, state, since, fails_over=fails_over)


@pytest.mark.parametrize("state", [ArrivalState.PREPARED, ArrivalState.RELEASED, ArrivalState.ACTIVATED])
async def test_a_home_does_not_start_what_runs_at_its_peer(tmp_path: Path, state: ArrivalState) -> None:
    """An evacuation was rolled back at noon, and the VM failed over later, in the morning by that clock."""
    records = await records_of(
        tmp_path,
        arrival("left", 0, ArrivalState.LANDED, NOON + 1),
        arrival("first", 1, ArrivalState.ABORTED, NOON),
        arrival("second", 1, state, MORNING, fails_over=True),
    )
    latest = records.latest_of(VM)
    assert latest is not None
    assert latest.id == "second"
    arrivals = SimpleNamespace(records=records)
    fail_over = FailOver(cast(Any, arrivals), cast(Any, None), cast(Any, None), {})
    assert fail_over.home(VM, "first", 1) == {"runs_here": True}


async def test_of_attempts_that_were_all_rolled_back_the_later_counts(tmp_path: Path) -> None:
    records = await records_of(
        tmp_path,
        arrival("first", 1, ArrivalState.ABORTED, MORNING),
        arrival("second", 1, ArrivalState.ABORTED, NOON),
    )
    latest = records.latest_of(VM)
    assert latest is not None
    assert latest.id == "second"


def departures(tmp_path: Path, *jobs: Job) -> Departures:
    """As they are after a restart of the proxy."""
    journal = Journal(tmp_path / "jobs")
    for job in jobs:
        journal.save(job)
    surroundings = Surroundings(
        tmp_path, tmp_path / "run", cast(Any, None), Guard(tmp_path, tmp_path / "run"), journal,
        {"backup1": SimpleNamespace(counters=dict)}, cast(Any, None), cast(Any, None), cast(Any, None),
        cast(Any, None), 0.5,
    )  # fmt: skip
    made = Departures(surroundings, cast(Any, None))
    made.load()
    return made


def job(number: str, epoch: int, step: Step, commanded_at: float, vm: str = VM) -> Job:
    made = new_job(vm, "web1", "backup1", epoch, EvacuationOptions(), commanded_at)
    made.id, made.step = number, step
    made.verdict = {Step.DONE: Verdict.EVACUATED, Step.STAYED: Verdict.STAYED}.get(step)
    return made


@pytest.mark.parametrize("step", [Step.PREFLIGHT, Step.MIGRATE, Step.UNDECIDED, Step.FINISH, Step.DONE])
async def test_a_vm_on_its_way_is_not_sent_a_second_time(tmp_path: Path, step: Step) -> None:
    made = departures(
        tmp_path,
        job("before", 1, Step.DONE, NOON + 2),
        job("stayed", 2, Step.STAYED, NOON),
        job("goes", 2, step, MORNING),
    )
    for named in (VM, "web1"):
        latest = made.latest(named)
        assert latest is not None
        assert latest.id == "goes"


async def test_another_vm_that_has_the_name_now_is_not_taken_for_the_former(tmp_path: Path) -> None:
    former = VM[:-1] + "2"
    made = departures(
        tmp_path, job("former", 3, Step.DONE, MORNING, former), job("now", 1, Step.STAYED, NOON)
    )
    latest = made.latest("web1")
    assert latest is not None
    assert latest.id == "now"
