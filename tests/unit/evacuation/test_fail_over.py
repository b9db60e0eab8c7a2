# SPDX-License-Identifier: GPL-3.0-or-later
"""A VM that runs from a sealed generation on the operator's word, and what its home does about it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest

from precache_proxy.errors import (
    Conflict,
    HypervisorError,
    InvalidInput,
    NotFound,
    PeerUnreachable,
    StaleEpoch,
)
from precache_proxy.evacuation import giving_up
from precache_proxy.evacuation.arrival import Arrival, ArrivalState
from precache_proxy.evacuation.arrival_records import ArrivalRecords
from precache_proxy.evacuation.departure import Departure
from precache_proxy.evacuation.departures import Departures
from precache_proxy.evacuation.fail_over import FailOver
from precache_proxy.evacuation.guard import LEAVING, TOMBSTONE, Forbidden, Guard
from precache_proxy.evacuation.job import EvacuationOptions, Journal, Step, Verdict, new_job
from precache_proxy.evacuation.measure import Measure
from precache_proxy.evacuation.reconcile import ArrivalDecision, Presence
from precache_proxy.evacuation.surroundings import Surroundings

VM = "11111111-2222-4333-8444-555555555501"


# -- at the destination


class Store:
    sealed: ClassVar[dict[str, Any] | None] = {"generation": 12, "sealed_at": 1000.0}

    async def statuses(self) -> list[dict[str, Any]]:
        return [
            {"vm": VM, "name": "web1", "peer": "home1", "epoch": 2, "state": "sealed", "sealed": self.sealed}
        ]


class Link:
    """The home: what it refuses with, or None where it takes note."""

    state = "up"

    def __init__(self, refuses: Exception | None = None) -> None:
        self.refuses = refuses
        self.told: list[dict[str, Any]] = []

    async def call(
        self, method: str, parameters: dict[str, Any], *, timeout_seconds: float
    ) -> dict[str, Any]:
        assert (method, timeout_seconds > 0) == ("evacuation.supersede", True)
        self.told.append(parameters)
        if self.refuses is not None:
            raise self.refuses
        return {}


class Arrivals:
    """Notes in which order things are done."""

    def __init__(self, tmp_path: Path, link: Link) -> None:
        self.records = ArrivalRecords(tmp_path)
        self.link = link
        self.done: list[str] = []

    async def prepare_from_generation(
        self, peer: str, job_id: str, vm: str, generation: int, epoch: int, sealed_at: float
    ) -> Arrival:
        self.done.append(f"prepared with the home told {len(self.link.told)} times")
        arrival = Arrival(
            job_id, vm, "web1", peer, epoch, generation, mode="restart", fails_over=True, sealed_at=sealed_at
        )
        await self.records.save(arrival)
        self.records.add(arrival)
        return arrival

    async def clear(self, arrival: Arrival) -> None:
        self.done.append("cleared")
        arrival.state = ArrivalState.ABORTED

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
    assert arrivals.done == []


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


async def test_a_home_that_runs_it_is_not_dead(tmp_path: Path) -> None:
    link = Link(Conflict("VM web1: its home is not dead"))
    fail_over, arrivals, _domains = destination(tmp_path, link)
    with pytest.raises(Conflict, match="its home is not dead"):
        await fail_over.begin("web1", source_is_dead=True)
    assert arrivals.done == ["prepared with the home told 0 times", "cleared"]


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


def home(tmp_path: Path, presence: Presence) -> tuple[Departures, Machines, Guard]:
    guard = Guard(tmp_path / "state", tmp_path / "run")
    guard.prepare_directories()
    machines = Machines(presence)
    link = SimpleNamespace(counters=dict, state="up")
    surroundings = Surroundings(
        tmp_path / "state", tmp_path / "run", cast(Any, machines), guard,
        Journal(tmp_path / "state" / "jobs"),
        {"backup1": link}, cast(Any, Source()), cast(Any, None), cast(Any, None), cast(Any, None), 0.5,
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
        assert "What was written here since is in /images/web1.qcow2" in forbidden.sentence
    assert "destroy" not in machines.done
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
