# SPDX-License-Identifier: GPL-3.0-or-later
"""A VM that runs from a sealed generation on the operator's word, and what its home does about it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest

from precache_proxy.crash_points import CRASH_POINTS
from precache_proxy.errors import (
    Conflict,
    Finding,
    HypervisorError,
    InvalidInput,
    NotFound,
    PeerUnreachable,
    StaleEpoch,
)
from precache_proxy.evacuation import fail_over as module
from precache_proxy.evacuation import giving_up
from precache_proxy.evacuation.arrival import RUNS_HERE, Arrival, ArrivalState
from precache_proxy.evacuation.arrival_records import ArrivalRecords
from precache_proxy.evacuation.arrival_tender import ArrivalTender
from precache_proxy.evacuation.departure import Departure
from precache_proxy.evacuation.departures import Departures
from precache_proxy.evacuation.fail_over import FailOver
from precache_proxy.evacuation.guard import LEAVING, TOMBSTONE, Forbidden, Guard
from precache_proxy.evacuation.job import EvacuationOptions, Job, Journal, Step, Verdict, new_job
from precache_proxy.evacuation.measure import Measure
from precache_proxy.evacuation.reconcile import ArrivalDecision, Presence
from precache_proxy.evacuation.surroundings import Surroundings
from precache_proxy.units import MIB

VM = "11111111-2222-4333-8444-555555555501"


# -- at the destination


class Store:
    sealed: ClassVar[dict[str, Any] | None] = {"generation": 12, "sealed_at": 1000.0}

    async def statuses(self) -> list[dict[str, Any]]:
        common = {"peer": "home1", "epoch": 2, "state": "sealed", "sealed": self.sealed}
        twins = [VM[:-2] + "11", VM[:-2] + "12"]
        return [{"vm": VM, "name": "web1", **common}, *({"vm": vm, "name": "twin", **common} for vm in twins)]


class Killed(BaseException):
    """SIGKILL: nothing catches it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, module: Any, point: str) -> None:
    def crash_point(name: str) -> None:
        assert name in CRASH_POINTS
        if name == point:
            raise Killed

    monkeypatch.setattr(module, "crash_point", crash_point)


class Link:
    """The home: what it refuses with, or None where it takes note. ``asked`` beforehand, nothing is told."""

    state = "up"

    def __init__(self, refuses: Exception | None = None) -> None:
        self.refuses = refuses
        self.asked = 0
        self.answer: dict[str, Any] = {}
        self.told: list[dict[str, Any]] = []

    async def call(
        self, method: str, parameters: dict[str, Any], *, timeout_seconds: float
    ) -> dict[str, Any]:
        assert (method, timeout_seconds > 0) == ("evacuation.supersede", True)
        if parameters.get("only_asked"):
            self.asked += 1
        else:
            self.told.append(parameters)
        if self.refuses is not None:
            raise self.refuses
        return self.answer


class Arrivals:
    """Notes in which order things are done."""

    def __init__(self, tmp_path: Path, link: Link) -> None:
        self.records = ArrivalRecords(tmp_path)
        self.link = link
        self.done: list[str] = []
        self.findings: list[Finding] = []
        self.tracking = SimpleNamespace(begin=self.track)

    async def track(self, _arrival: Arrival) -> None:
        """Meanwhile the home may come back."""

    async def prepare_from_generation(
        self,
        peer: str,
        job_id: str,
        vm: str,
        generation: int,
        epoch: int,
        sealed_at: float,
        protection: dict[str, Any],
    ) -> Arrival:
        self.done.append(f"prepared with the home told {len(self.link.told)} times")
        arrival = Arrival(
            job_id, vm, "web1", peer, epoch, generation, mode="restart", fails_over=True, sealed_at=sealed_at,
            protection=protection,
        )  # fmt: skip
        await self.records.save(arrival)
        self.records.add(arrival)
        return arrival

    async def look_at_generation(self, _peer: str, _vm: str, _generation: int) -> tuple[Any, list[Finding]]:
        return SimpleNamespace(memory_bytes=512 * MIB), self.findings

    async def clear(self, arrival: Arrival) -> None:
        self.done.append("cleared")
        arrival.state = ArrivalState.ABORTED
        await self.records.save(arrival)

    async def act(self, arrival: Arrival, decision: ArrivalDecision, *, on_whose_word: str) -> None:
        assert decision is ArrivalDecision.ACTIVATE
        self.done.append(f"run on the word of the {on_whose_word}, home told {len(self.link.told)} times")
        arrival.state = ArrivalState.ACTIVATED


class There:
    presence_is = Presence.ABSENT

    async def presence(self, _vm: str) -> Presence:
        return self.presence_is


def destination(tmp_path: Path, link: Link) -> tuple[FailOver, Arrivals, There]:
    arrivals, domains = Arrivals(tmp_path, link), There()
    made = FailOver(cast(Any, arrivals), cast(Any, domains), cast(Any, Store()), {"home1": link})
    return made, arrivals, domains


async def test_without_the_operators_word_it_is_only_told_what_would_run(tmp_path: Path) -> None:
    fail_over, arrivals, _domains = destination(tmp_path, Link())
    with pytest.raises(
        InvalidInput, match=r"generation 12, sealed .* ago, and what home1 wrote since would be"
    ):
        await fail_over.begin("web1", source_is_dead=False)
    with pytest.raises(NotFound, match="no replica of that VM here"):
        await fail_over.begin("other", source_is_dead=True)
    with pytest.raises(Conflict, match=f"replicas of 2 VMs of that name are here; say {VM[:-2]}11 or"):
        await fail_over.begin("twin", source_is_dead=True)
    assert arrivals.done == []


async def test_a_look_tells_what_would_run_and_all_that_is_in_the_way(tmp_path: Path) -> None:
    link = Link()
    link.state = "down"
    fail_over, arrivals, there = destination(tmp_path, link)
    told = await fail_over.look("web1")
    assert (told["vm"], told["peer"], told["generation"], told["is_here"]) == (VM, "home1", 12, False)
    assert (told["memory_bytes"], told["home_answers"], told["findings"]) == (640 * MIB, False, [])
    assert told["age_seconds"] > 1e9
    arrivals.findings = [Finding("VM web1", "no room", "make some", "no-space")]
    assert (await fail_over.look(VM))["findings"] == arrivals.findings
    link.state = "up"
    link.refuses = Conflict("VM web1: its home is not dead, it is running there; evacuate it from there")
    told = await fail_over.look("web1")
    assert (told["home_answers"], link.told) == (True, [])
    finding, room = told["findings"]
    assert (finding.subject, finding.fact) == ("VM web1", "its home is not dead, it is running there")
    assert room.fact == "no room", "all of them at once"
    assert (await fail_over.look("twin"))["findings"][0].cause == "conflict"
    with pytest.raises(NotFound, match="no replica"):
        await fail_over.look("other")
    whole = Arrival("j1", VM, "web1", "home1", 3, 12)
    await arrivals.records.save(whole)
    arrivals.records.add(whole)
    there.presence_is = Presence.PAUSED
    told = await fail_over.look("web1")
    assert "its arrival j1 is prepared here" in told["findings"][0].fact
    assert arrivals.done == []


async def test_a_look_finds_what_is_here_already(tmp_path: Path) -> None:
    fail_over, _arrivals, there = destination(tmp_path, Link())
    there.presence_is = Presence.ABSENT
    arrival = await fail_over.begin("web1", source_is_dead=True)
    there.presence_is = Presence.SHUT_OFF
    told = await fail_over.look("web1")
    assert (told["is_here"], told["job"], told["generation"]) == (True, arrival.id, 12)
    assert told["findings"] == []
    assert told["is_running"] is False
    arrival.boots = False
    assert (await fail_over.look("web1"))["is_running"] is None, "an evacuation brought it so"
    for presence in (Presence.RUNNING, Presence.PAUSED, Presence.ARRIVED):
        there.presence_is = presence
        assert (await fail_over.look("web1"))["is_running"] is True
    there.presence_is = Presence.UNKNOWN
    with pytest.raises(HypervisorError, match="libvirt here does not say"):
        await fail_over.look("web1")
    there.presence_is = Presence.ABSENT
    assert (await fail_over.look("web1"))["is_here"] is False


async def test_a_replica_without_a_generation_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "sealed", None)
    fail_over, _arrivals, _there = destination(tmp_path, Link())
    told = await fail_over.look("web1")
    assert (told["generation"], told["age_seconds"]) == (None, None)
    assert "no sealed generation" in told["findings"][0].fact


async def test_a_dead_home_is_told_when_it_answers_again(tmp_path: Path) -> None:
    link = Link()
    link.state = "down"
    fail_over, arrivals, _domains = destination(tmp_path, link)
    arrival = await fail_over.begin(VM, source_is_dead=True)
    assert arrivals.done == [
        "prepared with the home told 0 times", "run on the word of the operator, home told 0 times",
    ]  # fmt: skip
    assert (arrival.epoch, arrival.generation, arrival.home_told) == (3, 12, False)
    assert "It runs here from generation 12" in arrival.sentence
    await fail_over.tend(arrival)
    assert not arrival.home_told
    link.state = "up"
    await fail_over.tend(arrival)
    await fail_over.tend(arrival)
    assert arrival.home_told
    [told] = link.told
    assert (told["epoch"], told["generation"], told["only_if_off"]) == (3, 12, False)
    assert fail_over.home(VM, "another job", 3) == {"runs_here": True}
    assert fail_over.home(VM, "another job", 4) == {"runs_here": False}
    assert fail_over.home(VM, arrival.id, 3) == {"runs_here": False}


async def test_a_home_that_answers_forbids_the_start_before_it_runs_here(tmp_path: Path) -> None:
    link = Link()
    fail_over, arrivals, _domains = destination(tmp_path, link)
    arrival = await fail_over.begin("web1", source_is_dead=True)
    assert arrivals.done[-1] == "run on the word of the operator, home told 1 times"
    assert (link.told[0]["only_if_off"], arrival.home_told) == (True, True)


async def test_a_second_operator_or_a_lost_answer_finds_it_running(tmp_path: Path) -> None:
    fail_over, arrivals, domains = destination(tmp_path, Link())
    first = await fail_over.begin("web1", source_is_dead=True)
    domains.presence_is = Presence.RUNNING
    done = list(arrivals.done)
    assert await fail_over.begin("web1", source_is_dead=True) is first
    assert arrivals.done == done
    # It has left since, and its replica is here again.
    domains.presence_is, first.state = Presence.ABSENT, ArrivalState.LANDED
    assert await fail_over.begin(VM, source_is_dead=True) is not first


async def test_a_generation_without_a_date_is_of_unknown_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "sealed", {"generation": 5, "sealed_at": 0.0})
    fail_over, _arrivals, _domains = destination(tmp_path, Link())
    arrival = await fail_over.begin("web1", source_is_dead=True)
    assert "generation 5, of unknown age" in arrival.sentence


async def test_a_home_that_is_back_before_the_release_is_asked_again(tmp_path: Path) -> None:
    link = Link()
    link.state = "down"
    fail_over, arrivals, _domains = destination(tmp_path, link)

    async def meanwhile(arrival: Arrival) -> None:
        link.state, link.refuses = "up", Conflict("VM web1: its home is not dead")
        # Its rollback asks us, too: until one of the two has an answer nobody runs it.
        assert fail_over.home(VM, "another job", 3) == {"runs_here": True}

    arrivals.tracking.begin = meanwhile
    with pytest.raises(Conflict, match="its home is not dead"):
        await fail_over.begin("web1", source_is_dead=True)
    assert arrivals.done[-1] == "cleared"
    assert fail_over.home(VM, "another job", 3) == {"runs_here": False}


async def test_a_home_that_cannot_end_all_of_it_has_given_it_up(tmp_path: Path) -> None:
    link = Link()
    link.answer = {"owes": "libvirt here does not answer"}
    fail_over, arrivals, _domains = destination(tmp_path, link)
    arrival = await fail_over.begin("web1", source_is_dead=True)
    assert arrivals.done[-1].startswith("run on the word")
    await fail_over.tend(arrival)
    assert not arrival.home_told
    link.answer = {}
    await fail_over.tend(arrival)
    assert arrival.home_told


async def test_an_answer_that_is_neither_yes_nor_no_is_asked_for_again(tmp_path: Path) -> None:
    link = Link()
    fail_over, arrivals, _domains = destination(tmp_path, link)
    answers = iter([{}, HypervisorError("libvirt here does not say"), {}])

    async def call(_method: str, _parameters: object, *, timeout_seconds: float) -> dict[str, Any]:
        assert timeout_seconds > 0
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return cast(dict[str, Any], answer)

    link.call = call  # type: ignore[method-assign]
    with pytest.raises(HypervisorError):
        await fail_over.begin("web1", source_is_dead=True)
    [arrival] = arrivals.records.all()
    assert "cleared" not in arrivals.done
    await fail_over.tend(arrival)
    assert arrival.state in RUNS_HERE


@pytest.mark.parametrize("point", ["fail-over-prepared", "fail-over-home-told"])
@pytest.mark.parametrize("home_is", ["off", "alive", "not reached"])
async def test_one_that_was_killed_before_the_release_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, home_is: str
) -> None:
    link = Link()
    link.state = "down" if home_is == "not reached" else "up"
    fail_over, _before, _domains = destination(tmp_path, link)
    with monkeypatch.context() as patch:
        kill_at(patch, module, point)
        with pytest.raises(Killed):
            await fail_over.begin("web1", source_is_dead=True)
    fail_over, arrivals, domains = destination(tmp_path, link)
    arrivals.records.load()
    [arrival] = arrivals.records.all()
    told = arrival.home_told
    assert (arrival.state, arrival.activated_by) == (ArrivalState.PREPARED, "operator")
    assert told == (point == "fail-over-home-told" and home_is != "not reached")
    domains.presence_is = Presence.ARRIVED
    if home_is == "alive":
        link.refuses = Conflict("VM web1: its home is not dead")
    # It is not presumed, nor judged by the home's jobs, of which this is none.
    asked_of_jobs = SimpleNamespace(records=arrivals.records)
    tender = ArrivalTender(cast(Any, asked_of_jobs), cast(Any, None), {}, lambda _arrival: None)
    await tender.tend(arrival)
    assert arrival.state is ArrivalState.PREPARED
    for _thrice in range(3):
        await fail_over.tend(arrival)
    if told or home_is == "off":
        assert arrival.state in RUNS_HERE
    elif home_is == "alive":
        assert arrivals.done == ["cleared"]
    else:
        assert (arrival.state, arrivals.done) == (ArrivalState.PREPARED, [])
        assert "repeat `precache-proxy fail-over web1 --source-is-dead`" in arrival.sentence
        assert await fail_over.begin("web1", source_is_dead=True) is arrival
        assert arrivals.done == ["run on the word of the operator, home told 0 times"]


async def test_one_that_was_killed_before_it_stood_there_is_cleared(tmp_path: Path) -> None:
    fail_over, arrivals, _domains = destination(tmp_path, Link())
    arrival = Arrival("f0", VM, "web1", "home1", 3, 12, mode="restart", fails_over=True)
    arrivals.records.add(arrival)
    async with arrivals.records.lock(VM):
        await fail_over.tend(arrival)
        assert arrivals.done == [], "somebody works on it"
    await fail_over.tend(arrival)
    assert arrivals.done == ["cleared"]


@pytest.mark.parametrize(
    ("activated_by", "reachable", "decision"),
    [
        ("operator", True, ArrivalDecision.ACTIVATE_COLD),
        ("operator", False, ArrivalDecision.ACTIVATE_COLD),
        ("", False, ArrivalDecision.WAIT),
    ],
)
async def test_the_operators_word_holds_when_this_host_goes_down_before_it_runs(
    tmp_path: Path, activated_by: str, reachable: bool, decision: ArrivalDecision
) -> None:
    acted: list[ArrivalDecision] = []

    class Released(Arrivals):
        contact = SimpleNamespace(heard=lambda _job: None, presumed_dead=lambda _job: False)

        async def act(self, arrival: Arrival, decision: ArrivalDecision, *, on_whose_word: str) -> None:
            acted.append(decision)

    async def call(_method: str, _parameters: object, *, timeout_seconds: float) -> dict[str, Any]:
        if not reachable:
            raise PeerUnreachable("peer home1: no contact")
        return {"known": False, "step": None, "timeout": timeout_seconds}

    there, links = There(), {"home1": SimpleNamespace(call=call)}
    there.presence_is = Presence.SHUT_OFF
    tender = ArrivalTender(
        cast(Any, Released(tmp_path, Link())), cast(Any, there), links, lambda _arrival: None
    )
    arrival = Arrival("f0", VM, "web1", "home1", 3, 12, ArrivalState.RELEASED, activated_by=activated_by)
    await tender.tend(arrival)
    assert acted == [decision]


async def test_a_home_that_runs_it_is_not_dead(tmp_path: Path) -> None:
    link = Link(Conflict("VM web1: its home is not dead"))
    fail_over, arrivals, _domains = destination(tmp_path, link)
    with pytest.raises(Conflict, match="its home is not dead"):
        await fail_over.begin("web1", source_is_dead=True)
    assert (arrivals.done, link.told, link.asked) == ([], [], 1)


async def test_a_healthy_evacuation_is_not_ended_for_a_fail_over_that_is_refused(tmp_path: Path) -> None:
    fail_over, arrivals, _domains = destination(tmp_path, Link(Conflict("evacuation j0 is at step migrate")))
    arrivals.records.add(Arrival("j0", VM, "web1", "home1", 3, 12))
    with pytest.raises(Conflict, match="at step migrate"):
        await fail_over.begin("web1", source_is_dead=True)
    assert arrivals.done == []


@pytest.mark.parametrize(
    ("state", "presence", "makes_room"),
    [
        (ArrivalState.PREPARED, Presence.ABSENT, True),
        (ArrivalState.PREPARED, Presence.ARRIVED, False),
        (ArrivalState.PREPARED, Presence.UNKNOWN, False),
        (ArrivalState.RELEASED, Presence.SHUT_OFF, False),
        (ArrivalState.ABORTING, Presence.SHUT_OFF, True),
    ],
)
async def test_what_stands_there_whole_is_worth_more_than_a_replica(
    tmp_path: Path, state: ArrivalState, presence: Presence, makes_room: bool
) -> None:
    fail_over, arrivals, domains = destination(tmp_path, Link())
    domains.presence_is = presence
    arrivals.records.add(Arrival("j0", VM, "web1", "home1", 3, 12, state))
    if makes_room:
        await fail_over.begin("web1", source_is_dead=True)
        assert arrivals.done[0] == "cleared"
    else:
        with pytest.raises(Conflict, match="settle j0 source-dead"):
            await fail_over.begin("web1", source_is_dead=True)
        assert arrivals.done == []


# -- at the home


class Machines:
    def __init__(self, presence: Presence) -> None:
        self.is_there = presence
        self.done: list[str] = []

    async def presence_at_source(self, _vm: str) -> Presence:
        return self.is_there

    async def definition(self, _vm: str) -> Any:
        disk = SimpleNamespace(target="vda", path="/images/web1.qcow2", is_writable_disk=True)
        return SimpleNamespace(disks=[disk], disk=lambda _key: disk)

    async def destroy(self, _vm: str) -> None:
        self.done.append("destroy")
        self.is_there = Presence.ENDED

    async def undefine(self, _vm: str) -> None:
        self.done.append("undefine")
        self.is_there = Presence.ABSENT


class Source:
    def __init__(self) -> None:
        self.status_of: dict[str, Any] | None = {"peer": "backup1", "epoch": 2}

    def status(self, _vm: str) -> dict[str, Any]:
        if self.status_of is None:
            raise NotFound(VM)
        return self.status_of

    async def handed_over(self, _vm: str) -> None:
        self.status_of = None


class Network:
    def __init__(self) -> None:
        self.left_to: list[tuple[str, str]] = []

    async def left(self, job: Job) -> None:
        self.left_to.append((job.vm, job.peer))


def home(tmp_path: Path, presence: Presence) -> tuple[Departures, Machines, Guard]:
    guard = Guard(tmp_path / "state", tmp_path / "run")
    guard.prepare_directories()
    machines = Machines(presence)
    link = SimpleNamespace(counters=dict, state="up")
    surroundings = Surroundings(
        tmp_path / "state", tmp_path / "run", cast(Any, machines), guard,
        Journal(tmp_path / "state" / "jobs"),
        {"backup1": link}, cast(Any, Source()), cast(Any, None), cast(Any, Network()), cast(Any, None), 0.5,
    )  # fmt: skip
    return Departures(surroundings, cast(Any, None)), machines, guard


TOLD = {"vm": VM, "name": "web1", "epoch": 3, "job": "f0", "generation": 12, "only_if_off": False}


@pytest.mark.parametrize(
    "step", [Step.CATCH_UP, Step.STOP, Step.FREEZE, Step.PREPARE, Step.UNDECIDED, Step.ROLLBACK]
)
async def test_a_home_that_comes_back_starts_it_no_more(tmp_path: Path, step: Step) -> None:
    proxy, machines, guard = home(tmp_path, Presence.SHUT_OFF)
    job = new_job(VM, "web1", "backup1", 3, EvacuationOptions(), 0.0)
    job.step, job.owes_abort = step, True
    proxy._departures[job.id] = proxy._departure(job)
    guard.forbid(Forbidden(VM, LEAVING, "sentence", job.id, 3))
    for _twice in range(2):
        assert await proxy.supersede("backup1", TOLD) == {}
        forbidden = guard.forbidden(VM)
        assert forbidden is not None
        assert (forbidden.cause, forbidden.job) == (TOMBSTONE, "f0")
        # By name: the inventory lists names, and the domain is gone.
        assert [(gone.name, gone.peer) for gone in guard.tombstones()] == [("web1", "backup1")]
        assert "What was written here since is in /images/web1.qcow2" in forbidden.sentence
    assert "destroy" not in machines.done
    assert cast(Any, proxy._around.network).left_to[0] == (VM, "backup1")
    assert machines.is_there is Presence.ABSENT
    assert (job.step, job.verdict, job.owes_abort) == (Step.DONE, Verdict.RESTARTED_FROM_REPLICA, False)
    again = Journal(tmp_path / "state" / "jobs").load()[0]
    assert (again.ended, again.verdict) == (True, Verdict.RESTARTED_FROM_REPLICA)


async def test_one_that_ran_it_all_the_time_ends_the_old_copy(tmp_path: Path) -> None:
    proxy, machines, guard = home(tmp_path, Presence.RUNNING)
    with pytest.raises(Conflict, match="its home is not dead, it is running there"):
        await proxy.supersede("backup1", {**TOLD, "only_if_off": True})
    assert guard.forbidden(VM) is None
    await proxy.supersede("backup1", TOLD)
    assert machines.done == ["destroy", "undefine"]


async def test_a_home_where_an_evacuation_of_it_is_under_way_is_not_dead(tmp_path: Path) -> None:
    proxy, machines, guard = home(tmp_path, Presence.SHUT_OFF)
    job = new_job(VM, "web1", "backup1", 3, EvacuationOptions(), 0.0)
    job.step = Step.RESIDUAL
    proxy._departures[job.id] = proxy._departure(job)
    with pytest.raises(Conflict, match=f"evacuation {job.id} is at step residual there"):
        await proxy.supersede("backup1", {**TOLD, "only_if_off": True})
    assert (machines.done, guard.forbidden(VM), job.step) == ([], None, Step.RESIDUAL)


async def test_a_home_that_is_only_asked_changes_nothing(tmp_path: Path) -> None:
    proxy, machines, guard = home(tmp_path, Presence.SHUT_OFF)
    assert await proxy.supersede("backup1", {**TOLD, "only_if_off": True, "only_asked": True}) == {}
    assert (machines.done, guard.forbidden(VM)) == ([], None)


async def test_one_that_is_started_while_it_is_given_up_stays(tmp_path: Path) -> None:
    proxy, machines, guard = home(tmp_path, Presence.SHUT_OFF)
    presences = iter([Presence.SHUT_OFF, Presence.RUNNING])

    async def presence_at_source(_vm: str) -> Presence:
        return next(presences)

    machines.presence_at_source = presence_at_source  # type: ignore[method-assign]
    with pytest.raises(Conflict, match="it is running there since just now"):
        await proxy.supersede("backup1", {**TOLD, "only_if_off": True})
    assert (machines.done, guard.forbidden(VM)) == ([], None)


async def test_what_fails_after_the_tombstone_is_no_refusal(tmp_path: Path) -> None:
    proxy, machines, guard = home(tmp_path, Presence.SHUT_OFF)
    undefine = machines.undefine

    async def fails(_vm: str) -> None:
        raise HypervisorError("libvirt here does not answer")

    machines.undefine = fails  # type: ignore[method-assign]
    told = {**TOLD, "only_if_off": True}
    assert await proxy.supersede("backup1", told) == {"owes": "libvirt here does not answer"}
    forbidden = guard.forbidden(VM)
    assert forbidden is not None
    assert forbidden.job == "f0"
    machines.undefine = undefine  # type: ignore[method-assign]
    assert await proxy.supersede("backup1", told) == {}
    assert machines.done == ["undefine"]


@pytest.mark.parametrize("point", ["home-forbidden", "home-jobs-ended"])
@pytest.mark.parametrize("step", [Step.STOP, Step.RELEASED, Step.UNDECIDED, Step.ROLLBACK])
async def test_a_home_that_is_killed_while_it_gives_it_up_keeps_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: Step, point: str
) -> None:
    proxy, _machines, _guard = home(tmp_path, Presence.SHUT_OFF)
    job = new_job(VM, "web1", "backup1", 3, EvacuationOptions(), 0.0)
    job.step = step
    proxy._departures[job.id] = proxy._departure(job)
    proxy._around.journal.save(job)
    saved: list[Step] = []
    save = Journal.save

    def note(journal: Journal, job: Job) -> None:
        saved.append(job.step)
        save(journal, job)

    monkeypatch.setattr(Journal, "save", note)
    with monkeypatch.context() as patch:
        kill_at(patch, giving_up, point)
        with pytest.raises(Killed):
            await proxy.supersede("backup1", TOLD)
    # Never at FINISH, from where it would be finished as an evacuation, and its overlays removed.
    assert saved == ([Step.DONE] if point == "home-jobs-ended" else [])
    proxy, machines, guard = home(tmp_path, Presence.SHUT_OFF)
    proxy.load()
    # It is told again, by one who asks first as well: its own tombstone is no reason to refuse.
    assert await proxy.supersede("backup1", {**TOLD, "only_if_off": True}) == {}
    forbidden = guard.forbidden(VM)
    assert forbidden is not None
    assert (forbidden.job, machines.done) == ("f0", ["undefine"])
    assert [(item.ended, item.verdict) for item in proxy.jobs()] == [(True, Verdict.RESTARTED_FROM_REPLICA)]


async def test_nobody_goes_on_with_a_job_that_is_being_ended(tmp_path: Path) -> None:
    proxy, machines, _guard = home(tmp_path, Presence.SHUT_OFF)
    job = new_job(VM, "web1", "backup1", 3, EvacuationOptions(), 0.0)
    job.step = Step.ROLLBACK
    proxy._departures[job.id] = proxy._departure(job)
    undefine = machines.undefine

    async def meanwhile(vm: str) -> None:
        await proxy.tend_all()
        with pytest.raises(Conflict, match="it is being given up to backup1"):
            await proxy.keep_at_source(job.id)
        await undefine(vm)

    machines.undefine = meanwhile  # type: ignore[method-assign]
    job.owes_abort = True
    assert await proxy.supersede("backup1", TOLD) == {}
    assert proxy._tasks == {}
    assert machines.done == ["undefine"]


async def test_who_may_not_have_it_is_refused(tmp_path: Path) -> None:
    proxy, machines, guard = home(tmp_path, Presence.RUNNING)
    with pytest.raises(Conflict, match="it is protected at backup1, not at stranger"):
        await proxy.supersede("stranger", TOLD)
    with pytest.raises(StaleEpoch, match="it is here with epoch 2"):
        await proxy.supersede("backup1", {**TOLD, "epoch": 2})
    machines.is_there = Presence.UNKNOWN
    with pytest.raises(HypervisorError, match="ask again"):
        await proxy.supersede("backup1", TOLD)
    machines.is_there = Presence.SHUT_OFF
    cast(Any, proxy._source).status_of = None
    with pytest.raises(Conflict, match="an old copy"):
        await proxy.supersede("backup1", TOLD)
    assert (machines.done, guard.forbidden(VM)) == ([], None)


@pytest.mark.parametrize(
    ("state", "boot", "runs_there", "raised"),
    [
        ("up", "an earlier one", False, None),
        ("up", "an earlier one", True, Conflict),
        ("up", giving_up.this_boot(), True, Conflict),
        # Nobody can be asked: only a host that was down itself has to fear that it was taken for dead.
        ("down", giving_up.this_boot(), True, None),
        ("down", "an earlier one", False, PeerUnreachable),
    ],
)
async def test_before_it_is_started_again_the_peer_is_asked(
    tmp_path: Path, state: str, boot: str, runs_there: bool, raised: type[Exception] | None
) -> None:
    proxy, _machines, _guard = home(tmp_path, Presence.SHUT_OFF)
    job = new_job(VM, "web1", "backup1", 3, EvacuationOptions(), 0.0)
    job.boot = boot

    async def call(_method: str, _parameters: object, *, timeout_seconds: float) -> dict[str, Any]:
        assert timeout_seconds > 0
        return {"runs_here": runs_there}

    link = SimpleNamespace(counters=dict, state=state, call=call)
    proxy._around.links["backup1"] = link
    item = Departure(job, proxy._around, Measure(job, cast(Any, link), 0), proxy._fence)
    if raised is None:
        await giving_up.refuse_when_moved(item)
    else:
        with pytest.raises(raised):
            await giving_up.refuse_when_moved(item)
    job.settled = "keep-at-source"
    await giving_up.refuse_when_moved(item)
