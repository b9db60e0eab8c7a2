# SPDX-License-Identifier: GPL-3.0-or-later
"""Between two looks: who is through makes room at once, and nothing is learnt from half an interval."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.lifeboat.evacuation.plugins.module_utils._controller import Controller
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import Move, Phase
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fleet import (
    Eyes,
    HostState,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._glance import over_first
from ansible_collections.lifeboat.evacuation.plugins.module_utils._interval import Observation, PairView

from unit.plugins.coordination.sites import MB, site, vm
from unit.plugins.coordination.world import World

_PAIR = ("home1", "backup1")


def sending(step: str, sent: float, *, verdict: str | None = None) -> dict[str, Any]:
    """What a host says of one job and of its link."""
    job = {
        "id": "j1", "vm": "uuid-a", "name": "a", "peer": "backup1", "step": step,
        "ended": verdict is not None, "verdict": verdict,
        "progress": {"memory_total_bytes": 100 * MB, "memory_remaining_bytes": 9 * MB},
    }  # fmt: skip
    counters = {"sent_wire_bytes": sent, "labels": {"uuid-a": {"sent_wire_bytes": sent}}}
    return {"evacuations": [job], "links": [{"peer": "backup1", "state": "up", "counters": counters}]}


def test_rates_are_those_of_the_last_look() -> None:
    host = HostState("home1", sending("migrate", 0.0))
    hosts = {"home1": host}
    eyes = Eyes()
    eyes.look(hosts, 100.0, {"j1"}, None)
    host.status = sending("migrate", 10 * MB)
    eyes.look(hosts, 102.0, {"j1"}, None)
    # Only jobs were asked for: the counters are as old as before.
    host.status = {**host.status, "evacuations": sending("confirm", 0.0)["evacuations"]}
    between = eyes.look(hosts, 102.4, {"j1"}, None, between=True)
    assert between.moves["uuid-a"].phase is Phase.CLOSING
    assert between.moves["uuid-a"].bytes_per_second == pytest.approx(5 * MB)
    assert between.pairs[_PAIR].goodput_bytes_per_second == pytest.approx(5 * MB)
    host.status = {**host.status, "evacuations": sending("done", 0.0, verdict="evacuated")["evacuations"]}
    assert eyes.look(hosts, 102.8, {"j1"}, None, between=True).out == {"uuid-a"}
    # And the next look counts over all of the time since the one before it.
    host.status = sending("done", 14 * MB, verdict="evacuated")
    after = eyes.look(hosts, 104.0, {"j1"}, None)
    assert after.pairs[_PAIR].goodput_bytes_per_second == pytest.approx(2 * MB)


def test_one_that_was_begun_since_the_last_look_is_in_its_lead_in() -> None:
    hosts = {"home1": HostState("home1", sending("catch-up", 0.0))}
    move = Eyes().look(hosts, 100.0, {"j1"}, None, between=True).moves["uuid-a"]
    assert (move.phase, move.bytes_per_second) == (Phase.LEAD_IN, 0.0)


def test_those_are_asked_after_who_may_be_over_the_surest_first() -> None:
    bulk = Move("a", Phase.BULK, remaining_bytes=9 * MB, bytes_per_second=5 * MB)
    moves = {
        "lead-in": Move("a", Phase.LEAD_IN),
        "nearly": bulk,
        "long": replace(bulk, remaining_bytes=90 * MB),
        "silent": replace(bulk, phase=Phase.CLOSING, silent=True),
        "closing": replace(bulk, phase=Phase.CLOSING),
        "not-yet": replace(bulk, bytes_per_second=0.0),
    }
    assert over_first(moves, str, 2.0) == ["closing", "nearly", "lead-in", "not-yet"]
    many = {f"z{number:02}": moves["closing"] for number in range(40)}
    few = over_first({**moves, **many}, str, 2.0)
    assert few == ["closing", "nearly", *sorted(many)][:16]
    assert over_first(moves, lambda _uuid: "home1", 2.0) == ["home1"]


def test_one_that_was_held_back_until_now_may_be_over_sooner_than_its_rate_says() -> None:
    """A small one that had a trickle and has the line now was thought to need minutes, and its place stayed
    empty for up to an interval."""
    trickled = {"a": Move("a", Phase.BULK, remaining_bytes=9 * MB, bytes_per_second=0.1 * MB)}
    assert over_first(trickled, str, 2.0) == []
    assert over_first(trickled, str, 2.0, {"a"}) == ["a"]
    # Of a host that says nothing nothing is heard either way.
    assert over_first({"a": replace(trickled["a"], silent=True)}, str, 2.0, {"a"}) == []


def test_who_was_opened_since_the_last_whole_interval_is_told() -> None:
    controller = Controller(site(vm("a"), vm("b"), rate=6 * MB))
    controller.step(sees(0.0, {}))
    bulk = Move("uuid-a", Phase.BULK, remaining_bytes=300 * MB, bytes_per_second=6 * MB)
    moves = {"uuid-a": bulk, "uuid-b": replace(bulk, vm="uuid-b", bytes_per_second=0.1 * MB)}
    for now in (2.0, 4.0, 6.0):
        controller.step(sees(now, moves))
    assert controller._shares.opened == set()
    controller.step(sees(6.5, {"uuid-b": moves["uuid-b"]}, ("uuid-a",)), between=True)
    assert controller._shares.opened == {"uuid-b"}
    assert controller.opened == set(), "where processors have time rates tell enough"
    for now in (8.0, 10.0):
        controller.step(sees(now, {"uuid-b": replace(moves["uuid-b"], bytes_per_second=6 * MB)}, ("uuid-a",)))
    assert controller._shares.opened == set()


def test_what_of_a_host_is_through_is_told_by_its_newest_jobs() -> None:
    host = HostState("home1", sending("prepare", 0.0))
    eyes = Eyes()
    assert eyes.through(host) == set()
    host.status = sending("migrate", 0.0)
    assert eyes.through(host) == set()
    eyes.processors_short = True
    assert eyes.through(host) == {("j1", "sends")}
    host.status = sending("released", 0.0)
    assert eyes.through(host) == {("j1", "closing")}
    host.status = sending("done", 0.0, verdict="evacuated")
    assert eyes.through(host) == {("j1", "ended")}


def test_one_in_its_last_round_makes_room_before_its_proxy_hands_it_over() -> None:
    """What follows its last bytes are round trips: for more than a second the line idled between two."""
    hosts = {"home1": HostState("home1", sending("migrate", 0.0))}
    eyes = Eyes()
    eyes.look(hosts, 100.0, {"j1"}, None)
    hosts["home1"].status = sending("migrate", 10 * MB)
    eyes.look(hosts, 102.0, {"j1"}, None)
    assert eyes.through(hosts["home1"]) == set()
    progress = hosts["home1"].status["evacuations"][0]["progress"]
    # Of 5 MB a second 0.3 s are let stop; a first round that has so little left is followed by others.
    progress |= {"memory_remaining_bytes": 3 * MB, "memory_iteration": 1}
    assert eyes.through(hosts["home1"]) == set()
    progress["memory_iteration"] = 2
    assert eyes.through(hosts["home1"]) == {("j1", "last")}
    assert eyes.look(hosts, 102.4, {"j1"}, None, between=True).moves["uuid-a"].phase is Phase.LAST


def test_when_a_memory_begins_to_cross_is_seen_between_two_looks() -> None:
    hosts = {"home1": HostState("home1", sending("prepare", 0.0))}
    eyes = Eyes()
    assert eyes.look(hosts, 100.0, {"j1"}, None).moves["uuid-a"].sends_since is None
    hosts["home1"].status = sending("migrate", 0.0)
    eyes.glance(hosts.values(), 100.6)
    eyes.glance(hosts.values(), 100.9)
    assert eyes.look(hosts, 102.0, {"j1"}, None).moves["uuid-a"].sends_since == 100.6


@pytest.mark.parametrize("seen_before", [True, False])
def test_one_whose_memory_begins_to_cross_between_two_looks_is_in_its_lead_in_no_more(
    seen_before: bool,
) -> None:
    """Where processors are short its hosts have time for the next one's, before the next look."""
    hosts = {"home1": HostState("home1", sending("prepare", 0.0))}
    eyes = Eyes()
    eyes.processors_short = True
    if seen_before:
        assert eyes.look(hosts, 100.0, {"j1"}, None).moves["uuid-a"].phase is Phase.LEAD_IN
    hosts["home1"].status = sending("migrate", 0.0)
    eyes.glance(hosts.values(), 100.6)
    move = eyes.look(hosts, 100.7, {"j1"}, None, between=True).moves["uuid-a"]
    assert (move.phase, move.bytes_per_second, move.sends_since) == (Phase.BULK, 0.0, 100.6)
    assert 0 < move.remaining_bytes < 9 * MB, "on the wire"
    # The next look counts from the last one on, not from there.
    hosts["home1"].status = sending("migrate", 10 * MB)
    after = eyes.look(hosts, 102.0, {"j1"}, None).moves["uuid-a"]
    assert after.bytes_per_second == pytest.approx(5 * MB if seen_before else 0.0)
    assert after.sends_since == 100.6


def lead_in_seen(begun_beside: bool, now: float, sends_since: float | None) -> float:
    """What a gate has learnt when one that was asked to begin at 4 s is seen to send."""
    controller = Controller(site(vm("a"), vm("b"), rate=6 * MB, round_trip=0.18))
    gate = controller.gates["uplink"]
    guest = controller.site.vms[1]
    first = Move("uuid-a", Phase.BULK, remaining_bytes=50 * MB, bytes_per_second=6 * MB)
    moves = {"uuid-a": first} if begun_beside else {}
    controller.step(sees(2.0, moves))
    controller._uplinks.begins(guest, 4.0)
    controller.step(sees(4.0, moves))
    sending = Move("uuid-b", Phase.BULK, remaining_bytes=50 * MB, sends_since=sends_since)
    controller.step(sees(now, {**moves, "uuid-b": sending}))
    return gate.lead_in_seconds if begun_beside else gate.idle_lead_in_seconds


def test_a_lead_in_is_timed_from_the_order_to_the_first_byte() -> None:
    assert lead_in_seen(True, 8.0, 6.7) == pytest.approx(2.7)
    assert lead_in_seen(False, 6.0, 5.5) == pytest.approx(1.5)
    assert lead_in_seen(True, 8.0, None) == pytest.approx(3.0), "some time within the interval"


def sees(now: float, moves: Mapping[str, Move], out: tuple[str, ...] = ()) -> Observation:
    carried = sum(move.bytes_per_second for move in moves.values())
    return Observation(now, moves, {_PAIR: PairView(goodput_bytes_per_second=carried)}, out)


@pytest.mark.parametrize("strategy", ["sequential", "feedback"])
def test_who_comes_next_begins_as_soon_as_one_is_through(strategy: str) -> None:
    controller = Controller(site(vm("a"), vm("b"), rate=6 * MB), strategy)
    assert [uuid for uuid, _rung in controller.step(sees(0.0, {})).starts] == ["uuid-a"]
    moves = {"uuid-a": Move("uuid-a", Phase.BULK, remaining_bytes=900 * MB, bytes_per_second=6 * MB)}
    for now in (2.0, 4.0, 6.0):
        assert not controller.step(sees(now, moves)).starts
    assert not controller.step(sees(6.5, moves), between=True).starts
    orders = controller.step(sees(7.0, {}, ("uuid-a",)), between=True)
    assert [uuid for uuid, _rung in orders.starts] == ["uuid-b"]


def test_between_two_looks_nothing_is_learnt_of_the_line() -> None:
    guests = [vm(name, memory=800 * MB) for name in "ab"]
    controller = Controller(site(*guests, rate=None))
    controller.step(sees(0.0, {}))
    moves = {
        f"uuid-{name}": Move(f"uuid-{name}", Phase.BULK, remaining_bytes=500 * MB, bytes_per_second=3 * MB)
        for name in "ab"
    }
    for now in (2.0, 4.0, 6.0):
        controller.step(sees(now, moves))
    gate = controller.gates["uplink"]
    known = (gate.spare, gate.stream, gate.capacity, gate.goodput)
    slower = {uuid: Move(uuid, Phase.BULK, remaining_bytes=500 * MB, bytes_per_second=1.0) for uuid in moves}
    orders = controller.step(sees(6.3, slower), between=True)
    assert (gate.spare, gate.stream, gate.capacity, gate.goodput) == known
    assert set(orders.shares) == set(moves)
    assert not orders.falls


def test_what_was_so_for_a_part_of_an_interval_spoils_all_of_it() -> None:
    """One that is nearly over beside the one that was opened for that: it is through before the next look."""
    controller = Controller(site(vm("a"), vm("b"), rate=6 * MB))
    uplinks, shares = controller._uplinks, controller._shares
    gate = controller.gates["uplink"]
    moves = {
        "uuid-a": Move("uuid-a", Phase.BULK, remaining_bytes=300 * MB, bytes_per_second=6 * MB),
        "uuid-b": Move("uuid-b", Phase.BULK, remaining_bytes=300 * MB),
    }
    members = [(uplinks_vm, moves[uplinks_vm.uuid]) for uplinks_vm in controller.site.vms]
    for _look in range(5):
        shares.share([(gate, members)], moves)
    assert (shares.intervals_open("uuid-a"), shares.crowded(gate)) == (5, False)
    ending = {**moves, "uuid-a": replace(moves["uuid-a"], remaining_bytes=MB)}
    members = [(guest, ending[guest.uuid]) for guest in controller.site.vms]
    shares.share([(gate, members)], ending)
    assert shares.crowded(gate)
    assert uplinks.gate_of(members[0][0]) is gate
    left = {"uuid-b": ending["uuid-b"]}
    shares.share([(gate, members[1:])], left, between=True)
    assert shares.crowded(gate), "until a whole interval has passed without"
    assert shares.intervals_open("uuid-a") == 0, "its next try begins anew"
    shares.share([(gate, members[1:])], left)
    assert not shares.crowded(gate)


class SleptLong:
    """A clock of a process that stood still in its first sleep for as long as it is told."""

    def __init__(self, seconds: float) -> None:
        self.added = 0.0
        self._seconds = seconds

    def now(self) -> float:
        return time.time() + self.added

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, 0.2))
        self.added += self._seconds
        self._seconds = 0.0


def test_who_stood_still_for_longer_than_its_lease_orders_nothing_by_a_glance(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.protect("home1", "web1")
    coordinator = world.coordinator()
    clock = SleptLong(600.0)
    monkeypatch.setattr(coordinator, "_clock", clock.now)
    monkeypatch.setattr(coordinator, "_sleep", clock.sleep)
    monkeypatch.setattr(coordinator, "_begun", {"u": "j1"})
    monkeypatch.setattr(coordinator, "_glance", lambda _hosts, _eyes: (True, set()))
    decided: list[str] = []

    def decide(*_given: Any) -> tuple[Observation, None]:
        decided.append("decided")
        return Observation(0.0), None

    monkeypatch.setattr(coordinator, "_decide", decide)
    seen = Observation(0.0, {"u": Move("u", Phase.CLOSING)})
    controller: Any = SimpleNamespace(source_of=lambda _uuid: "home1", opened=set(), processors_short=False)
    try:
        coordinator._rest(clock.now(), 2.0, seen, controller, Eyes(), Any)  # type: ignore[arg-type]
        assert decided == []
        # One that did not stand still decides.
        coordinator._rest(clock.now(), 2.0, seen, controller, Eyes(), Any)  # type: ignore[arg-type]
    finally:
        coordinator.close()
    assert decided == ["decided"]


def test_the_coordinator_asks_after_who_is_nearly_over_and_begins_the_next(world: World) -> None:
    """In a row: of the second one nobody waits for the look, at which links are asked after too."""
    world.protect("home1", "web1")
    world.protect("home2", "22222222-2222-4222-8222-222222222222")
    asked: list[tuple[float, str, str, str]] = []
    for name, proxy in world.proxies.items():
        evacuation: Any = world.parts[name].evacuation
        evacuation.steps, evacuation.step_seconds = ("preflight", "confirm", "done"), 2.3

        def note(
            method: str, path: str, *given: Any, name: str = name, request: Any = proxy.request, **how: Any
        ) -> Any:
            asked.append((time.monotonic(), name, method, path))
            return request(method, path, *given, **how)

        proxy.request = note  # type: ignore[method-assign]
    coordinator = world.coordinator(strategy="sequential")
    coordinator._sleep = time.sleep
    try:
        coordinator.run(coordinator.survey())
    finally:
        coordinator.close()
    begun = [number for number, entry in enumerate(asked) if entry[2:] == ("POST", "/v1/evacuations")]
    assert [asked[number][1] for number in begun] == ["home1", "home2"]
    before = [path for _at, name, method, path in asked[: begun[1]] if name == "home1" and method == "GET"]
    # A look asks after the links last.
    assert before[-1] == "/v1/evacuations", "it was begun by what was seen between two looks"
