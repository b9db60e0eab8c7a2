# SPDX-License-Identifier: GPL-3.0-or-later
"""Old records go; none that anything still asks for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from precache_proxy.evacuation.arrival import Arrival, ArrivalState
from precache_proxy.evacuation.arrival_records import ArrivalRecords
from precache_proxy.evacuation.departures import Departures
from precache_proxy.evacuation.guard import TOMBSTONE, Forbidden, Guard
from precache_proxy.evacuation.job import EvacuationOptions, Journal, Step, new_job
from precache_proxy.evacuation.pruning import (
    DAY_SECONDS,
    KEEP_PER_VM,
    KEEP_SECONDS,
    KEEP_SURELY_SECONDS,
    Entry,
    superseded,
)
from precache_proxy.evacuation.surroundings import Surroundings

VM = "11111111-2222-4333-8444-555555555501"
NOW = 1e9


def entry(number: int, age_seconds: float, *, vm: str = VM, matters: bool = False) -> Entry:
    return Entry(f"j{number}", vm, 1, NOW - age_seconds, matters)


def test_a_month_of_history_and_the_newest_of_each_vm_stay() -> None:
    entries = [entry(1, 3 * KEEP_SECONDS), entry(2, 2 * KEEP_SECONDS), entry(3, KEEP_SECONDS - 1)]
    entries.append(entry(4, 5 * KEEP_SECONDS, vm="another"))
    assert superseded(entries, NOW) == ["j2", "j1"]


def test_of_many_attempts_the_newest_stay_and_all_of_a_day() -> None:
    entries = [entry(number, 2 * DAY_SECONDS + number) for number in range(KEEP_PER_VM + 5)]
    assert superseded(entries, NOW) == [f"j{number}" for number in range(KEEP_PER_VM, KEEP_PER_VM + 5)]
    assert superseded([entry(number, number) for number in range(100)], NOW) == []


@given(
    st.lists(
        st.builds(
            Entry, st.uuids().map(str), st.sampled_from(["a", "b"]), st.integers(0, 5),
            st.floats(0, NOW), st.booleans(),
        ),
        max_size=60, unique_by=lambda one: one.id,
    ),
    st.sets(st.integers(0, 59)),
)  # fmt: skip
def test_nothing_that_matters_goes(entries: list[Entry], kept: set[int]) -> None:
    must_stay = {entries[number].id for number in kept if number < len(entries)}
    gone = set(superseded(entries, NOW, must_stay))
    for vm in ("a", "b"):
        of_it = [one for one in entries if one.vm == vm]
        if of_it:
            assert max(of_it, key=lambda one: (one.epoch, one.since)).id not in gone
    for one in entries:
        if one.matters or one.id in must_stay or NOW - one.since < KEEP_SURELY_SECONDS:
            assert one.id not in gone


async def test_jobs_that_owe_that_guard_or_that_are_open_stay(tmp_path: Path) -> None:
    guard, journal = Guard(tmp_path, tmp_path / "run"), Journal(tmp_path / "jobs")
    guard.prepare_directories()
    old = time.time() - 4 * KEEP_SECONDS
    jobs = []
    for number, (step, owes) in enumerate(
        [(Step.STAYED, False), (Step.STAYED, True), (Step.UNDECIDED, False), (Step.DONE, False),
         (Step.DONE, False), (Step.STAYED, False)]
    ):  # fmt: skip
        job = new_job(VM, "web1", "backup1", 1, EvacuationOptions(), old + number)
        job.step, job.owes_abort = step, owes
        journal.save(job)
        jobs.append(job)
    guard.forbid(Forbidden(VM, TOMBSTONE, "it has left", jobs[3].id, 1))
    around = Surroundings(
        tmp_path, tmp_path / "run", cast(Any, None), guard, journal, {}, *cast(Any, [None] * 4), 10.0
    )
    departures = Departures(around, cast(Any, None))
    departures.load()
    assert set(await departures.prune()) == {jobs[0].id, jobs[4].id}
    assert {job.id for job in journal.load()} == {job.id for job in departures.jobs()}
    assert len(departures.jobs()) == 4


async def test_the_arrival_that_an_old_copy_is_refused_by_stays(tmp_path: Path) -> None:
    records = ArrivalRecords(tmp_path / "arrivals")
    old = time.time() - 4 * KEEP_SECONDS
    for number, (epoch, state) in enumerate(
        [(1, ArrivalState.LANDED), (3, ArrivalState.LANDED), (5, ArrivalState.ABORTED),
         (5, ArrivalState.PREPARED), (5, ArrivalState.ABORTED)]
    ):  # fmt: skip
        arrival = Arrival(f"j{number}", VM, "web1", "home1", epoch, 7, state, since=old + number)
        await records.save(arrival)
    records.load()
    assert set(await records.prune()) == {"j0", "j2"}
    records.load()
    assert {arrival.id for arrival in records.all()} == {"j1", "j3", "j4"}
