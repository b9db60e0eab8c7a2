# SPDX-License-Identifier: GPL-3.0-or-later
"""The job's record: which step may follow which, and that it is durable before it is begun."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precache_proxy import durable
from precache_proxy.errors import Conflict, IntegrityError
from precache_proxy.evacuation.arrival import Arrival, ArrivalJournal, ArrivalState
from precache_proxy.evacuation.job import (
    ENDS,
    FOLLOWING,
    EvacuationOptions,
    FrozenDisk,
    Job,
    Journal,
    Step,
    Verdict,
    job_from_dict,
    new_job,
)

VM = "11111111-2222-4333-8444-555555555501"


def a_job() -> Job:
    return new_job(VM, "web ä1", "backup1", 3, EvacuationOptions(), 1000.0)


def reachable(start: Step) -> set[Step]:
    found, todo = {start}, [start]
    while todo:
        for following in FOLLOWING[todo.pop()]:
            if following not in found:
                found.add(following)
                todo.append(following)
    return found


@pytest.mark.parametrize("step", [step for step in Step if step not in ENDS])
def test_every_step_leads_to_an_end(step: Step) -> None:
    assert reachable(step) & ENDS


def test_no_step_follows_an_end() -> None:
    assert all(not FOLLOWING[end] for end in ENDS)


def test_nothing_after_finish_leads_back_to_the_source() -> None:
    assert reachable(Step.FINISH) == {Step.FINISH, Step.DONE}


def test_only_confirm_and_undecided_lead_to_released() -> None:
    assert {step for step in Step if Step.RELEASED in FOLLOWING[step]} == {Step.CONFIRM, Step.UNDECIDED}


@given(st.lists(st.sampled_from(Step), max_size=30))
def test_advance_takes_what_may_follow_and_changes_nothing_otherwise(steps: list[Step]) -> None:
    job = a_job()
    now = 1000.0
    for step in steps:
        now += 1
        before = job.as_dict()
        if step in FOLLOWING[job.step]:
            came_from = job.step
            job.advance(step, now)
            assert job.step is step
            assert (job.ended_at == now) == (step in ENDS)
            if step is Step.UNDECIDED:
                assert job.effective_step is came_from
        else:
            with pytest.raises(Conflict, match=step.value):
                job.advance(step, now)
            assert job.as_dict() == before
        assert sum(item.ended_at is None for item in job.steps) == (0 if job.ended else 1)
        assert job_from_dict(json.loads(json.dumps(job.record()))) == job


def test_a_record_survives_the_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "jobs", clock=lambda: 2000.0)
    job = a_job()
    job.disks["vda"] = FrozenDisk("/images/web.qcow2", "qcow2", "/images/web.qcow2.lifeboat-1", 4096)
    job.verdict = Verdict.UNDECIDED
    journal.enter(job, Step.CATCH_UP)
    assert journal.load() == [job]
    assert journal.load()[0].step is Step.CATCH_UP


def test_a_refused_step_leaves_the_durable_record_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    job = a_job()
    journal.save(job)
    with pytest.raises(Conflict):
        journal.enter(job, Step.RELEASED)
    assert journal.load()[0].step is Step.PREFLIGHT


def test_a_step_that_cannot_be_made_durable_is_not_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, arrivals = Journal(tmp_path / "jobs"), ArrivalJournal(tmp_path / "arrivals")
    job, arrival = a_job(), Arrival("job1", VM, "web ä1", "home1", 3, 7)
    journal.enter(job, Step.CATCH_UP)
    arrivals.save(arrival)
    before = job.record()

    def full(*_arguments: object, **_keywords: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(durable, "write_json", full)
        with pytest.raises(OSError, match="No space"):
            journal.enter(job, Step.FREEZE)
        with pytest.raises(OSError, match="No space"):
            arrivals.enter(arrival, ArrivalState.RELEASED)
    assert job.record() == before
    assert arrival.state is ArrivalState.PREPARED
    journal.enter(job, Step.FREEZE)
    assert journal.load() == [job]


def test_what_a_kill_leaves_beside_the_record_is_no_job(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    job = a_job()
    journal.save(job)
    (tmp_path / f".{job.id}.json.new").write_text('{"half')
    assert [item.id for item in journal.load()] == [job.id]


def test_a_record_of_a_newer_version_keeps_what_is_known() -> None:
    data = a_job().record() | {"a_later_idea": 1}
    assert job_from_dict(data).vm == VM


def test_a_record_that_makes_no_sense_is_named() -> None:
    with pytest.raises(IntegrityError, match="evacuation record x1"):
        job_from_dict({"id": "x1", "step": "flying"})
