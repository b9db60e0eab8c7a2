# SPDX-License-Identifier: GPL-3.0-or-later
"""A source whose destination may presume it dead stops its VM in time, whatever else it is doing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from precache_proxy.errors import Conflict, NotFound, PeerUnreachable
from precache_proxy.evacuation import departures, giving_up, rollback
from precache_proxy.evacuation.departure import Departure
from precache_proxy.evacuation.departures import Departures
from precache_proxy.evacuation.fence import FENCE_SHARE, Fence, this_boot
from precache_proxy.evacuation.guard import FENCED, TOMBSTONE, Forbidden, Guard
from precache_proxy.evacuation.job import EvacuationOptions, Journal, Step, Verdict, new_job
from precache_proxy.evacuation.reconcile import Presence
from precache_proxy.evacuation.source_contact import SourceContact
from precache_proxy.evacuation.surroundings import Surroundings

VM = "11111111-2222-4333-8444-555555555501"
LIMIT_SECONDS = 300.0


class Clock:
    """A boot clock that is moved by hand."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


class Machines:
    """A libvirt with one VM."""

    def __init__(self) -> None:
        self.is_there = Presence.RUNNING
        self.resumed = 0

    async def presence_at_source(self, _vm: str) -> Presence:
        return self.is_there

    async def suspend(self, _vm: str, **_unused: bool) -> None:
        if self.is_there is Presence.RUNNING:
            self.is_there = Presence.PAUSED

    async def resume(self, _vm: str) -> None:
        self.is_there = Presence.RUNNING
        self.resumed += 1

    async def wait_not_migrating(self, _vm: str, *_unused: object) -> None:
        return

    async def paused_by_user(self, _vm: str) -> bool:
        return False

    async def definition(self, _vm: str) -> Any:
        return SimpleNamespace(disk=lambda _key: None)


class Link:
    """``answer``: what the destination says; an exception is raised, None never comes."""

    state = "up"
    least_round_trip_seconds = rate_bytes_per_second = None

    def __init__(self) -> None:
        self.answer: Any = PeerUnreachable("peer backup1: down")
        self.asked: list[str] = []

    def counters(self) -> dict[str, Any]:
        return {}

    async def call(self, method: str, _parameters: object, *, timeout_seconds: float) -> Any:
        self.asked.append(method)
        if self.answer is None:
            await asyncio.sleep(timeout_seconds)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Source:
    async def after_rollback(self, _vm: str) -> None: ...
    async def release(self, _vm: str, _holder: str) -> None: ...
    async def hold(self, _vm: str, _holder: str) -> None: ...


class Host:
    """A source with a job that owes its destination an abort."""

    def __init__(self, tmp_path: Path, step: Step = Step.STAYED) -> None:
        state, run = tmp_path / "state", tmp_path / "run"
        state.mkdir(exist_ok=True)
        self.clock, self.machines, self.link = Clock(), Machines(), Link()
        self.guard = Guard(state, run)
        self.guard.prepare_directories()
        self.journal = Journal(state / "jobs")
        self.around = Surroundings(
            state, run, cast(Any, self.machines), self.guard, self.journal, {"backup1": self.link},
            cast(Any, Source()), cast(Any, None), cast(Any, None), cast(Any, None), 1.0,
        )  # fmt: skip
        self.fence = Fence(self.clock, "boot-1")
        job = new_job(VM, "web1", "backup1", 1, EvacuationOptions(), 0.0)
        job.step, job.owes_abort, job.presumed_dead_after_seconds = step, True, LIMIT_SECONDS
        job.verdict = Verdict.STAYED
        self.departure = Departure(job, self.around, cast(Any, None), self.fence)
        self.fence.heard(self.departure, self.clock())
        self.journal.save(job)

    @property
    def cause(self) -> str:
        found = self.guard.forbidden(VM)
        return "" if found is None else found.cause


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr("precache_proxy.evacuation.fence.LOOK_SECONDS", 0.01)
    return Host(tmp_path)


async def soon(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_it_stops_in_time_while_a_question_hangs(host: Host) -> None:
    host.link.answer = None
    host.fence.watch(host.departure)
    host.clock.seconds += LIMIT_SECONDS * FENCE_SHARE - 1
    await asyncio.sleep(0.1)
    assert host.machines.is_there is Presence.RUNNING
    host.clock.seconds += 1
    await soon(lambda: host.machines.is_there is Presence.PAUSED)
    assert host.cause == FENCED
    assert "keep-at-source" in host.departure.job.sentence
    await host.fence.stop()


async def test_the_time_counts_from_when_the_answered_question_was_asked(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("precache_proxy.evacuation.departure.boottime_seconds", host.clock)
    asked_at = host.clock.seconds = 2000.0

    async def call(_method: str, _parameters: object, *, timeout_seconds: float) -> dict[str, Any]:
        assert timeout_seconds
        host.clock.seconds += 40  # the answer took its time: the destination counts from earlier
        return {}

    monkeypatch.setattr(host.link, "call", call)
    await host.departure.call("status", {}, 30)
    assert host.departure.job.heard_boottime_seconds == asked_at
    assert host.fence.seconds_left(host.departure) == LIMIT_SECONDS * FENCE_SHARE - 40


async def test_a_destination_that_answers_keeps_it_running(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("precache_proxy.evacuation.departure.boottime_seconds", host.clock)
    host.link.answer = {"state": "prepared"}
    host.fence.watch(host.departure)
    for _ in range(30):
        host.clock.seconds += LIMIT_SECONDS / 10
        await asyncio.sleep(0.05)
    assert host.machines.is_there is Presence.RUNNING
    assert host.cause == ""
    assert host.journal.load()[0].heard_boottime_seconds == pytest.approx(host.clock.seconds, abs=60), (
        "durable"
    )
    await host.fence.stop()


@pytest.mark.parametrize(("boot", "away_seconds"), [("boot-1", 200.0), ("boot-2", 0.0)])
async def test_a_restart_finds_that_its_time_is_over_before_anything_else(
    host: Host, boot: str, away_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy was down, or the host: a clock of another boot says nothing."""
    host.clock.seconds += away_seconds
    monkeypatch.setattr(departures, "Fence", lambda: Fence(host.clock, boot))
    again = Departures(host.around, cast(Any, None))
    again.load()
    await again.fence_all()
    assert host.machines.is_there is Presence.PAUSED
    assert host.cause == FENCED
    await again.stop()


async def test_without_such_a_time_at_the_destination_it_runs_on(host: Host) -> None:
    host.departure.job.presumed_dead_after_seconds = None
    host.clock.seconds += 1e6
    host.fence.watch(host.departure)
    await host.fence.stand_still(host.departure)
    assert host.machines.is_there is Presence.RUNNING
    assert host.cause == ""


async def test_a_rollback_that_comes_too_late_does_not_let_it_run(tmp_path: Path) -> None:
    host = Host(tmp_path, Step.ROLLBACK)
    host.machines.is_there = Presence.PAUSED
    host.clock.seconds += LIMIT_SECONDS
    with pytest.raises(PeerUnreachable, match="stands still here"):
        await rollback.roll_back(host.departure, host.fence, cold=False)
    assert host.machines.is_there is Presence.PAUSED
    assert host.machines.resumed == 0, "not for a moment"
    assert (host.cause, host.departure.job.step) == (FENCED, Step.ROLLBACK)
    host.link.answer = {"state": "aborted"}
    await rollback.roll_back(host.departure, host.fence, cold=False)
    assert host.machines.is_there is Presence.RUNNING
    assert (host.cause, host.departure.job.step) == ("", Step.STAYED)


async def test_a_tombstone_is_not_replaced(host: Host) -> None:
    host.guard.forbid(Forbidden(VM, TOMBSTONE, "it was evacuated", host.departure.job.id, 1))
    host.clock.seconds += LIMIT_SECONDS
    await host.fence.stand_still(host.departure)
    assert host.cause == TOMBSTONE
    assert host.machines.is_there is Presence.PAUSED


async def test_a_tombstone_of_another_is_not_replaced_either(host: Host) -> None:
    host.guard.forbid(Forbidden(VM, TOMBSTONE, "it was started at backup1 from a generation", "f0", 1))
    host.clock.seconds += LIMIT_SECONDS
    await host.fence.stand_still(host.departure)
    found = host.guard.forbidden(VM)
    assert found is not None
    assert (found.cause, found.job) == (TOMBSTONE, "f0")
    assert host.machines.is_there is Presence.PAUSED


async def test_a_paused_vm_that_runs_from_a_generation_by_now_is_not_resumed(tmp_path: Path) -> None:
    host = Host(tmp_path, Step.ROLLBACK)
    host.machines.is_there = Presence.PAUSED
    host.link.answer = {"state": "aborted", "runs_here": True}
    with pytest.raises(Conflict, match="it runs at backup1 by now"):
        await rollback.roll_back(host.departure, host.fence, cold=False)
    assert (host.machines.is_there, host.machines.resumed) == (Presence.PAUSED, 0)
    assert host.link.asked == ["evacuation.abort", "evacuation.home"]
    # One that was paused here, and never taken for dead, goes on with contact or without.
    host.link.answer = PeerUnreachable("peer backup1: down")
    host.departure.job.boot = this_boot()
    await rollback.roll_back(host.departure, host.fence, cold=False)
    assert host.machines.is_there is Presence.RUNNING


async def test_a_fenced_vm_that_runs_from_a_generation_by_now_stays_fenced(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(departures, "Fence", lambda: Fence(host.clock, "boot-1"))
    host.clock.seconds += LIMIT_SECONDS
    again = Departures(host.around, cast(Any, None))
    again.load()
    item = again.get(host.departure.job.id)
    await again._fence.stand_still(item)
    host.link.answer = {"state": "aborted", "runs_here": True}
    await again._settle_debt(item)
    assert (host.cause, host.machines.is_there) == (FENCED, Presence.PAUSED)
    assert host.journal.load()[0].owes_abort, "asked again"
    host.link.answer = {"state": "aborted", "runs_here": False}
    await again._settle_debt(item)
    assert (host.cause, host.machines.is_there) == ("", Presence.RUNNING)
    assert not host.journal.load()[0].owes_abort


async def test_a_peer_that_knows_no_fail_over_has_taken_nothing(host: Host) -> None:
    host.departure.job.boot = "an earlier one"
    host.link.answer = NotFound("call 'evacuation.home': not known to this proxy")
    await giving_up.refuse_when_moved(host.departure)


async def test_the_operator_lets_a_fenced_vm_go_on(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departures, "Fence", lambda: Fence(host.clock, "boot-1"))
    again = Departures(host.around, cast(Any, None))
    again.load()
    with pytest.raises(Conflict, match="nothing to settle"):
        await again.keep_at_source(host.departure.job.id)
    host.clock.seconds += LIMIT_SECONDS
    await again.fence_all()
    await again.keep_at_source(host.departure.job.id)
    assert host.machines.is_there is Presence.RUNNING
    assert host.cause == ""
    assert host.journal.load()[0].settled == "keep-at-source"
    await asyncio.sleep(0.1)
    assert host.machines.is_there is Presence.RUNNING, "and it stays so"
    await again.stop()


def test_the_destination_presumes_only_after_all_of_the_time() -> None:
    clock = Clock()
    contact = SourceContact(LIMIT_SECONDS, clock)
    assert not contact.presumed_dead("j1")
    clock.seconds += LIMIT_SECONDS - 1
    assert not contact.presumed_dead("j1")
    contact.heard("j1")
    clock.seconds += LIMIT_SECONDS - 1
    assert not contact.presumed_dead("j1")
    clock.seconds += 1
    assert contact.presumed_dead("j1")
    never = SourceContact(None, clock)
    clock.seconds += 1e9
    assert not never.presumed_dead("j1")
