# SPDX-License-Identifier: GPL-3.0-or-later
"""Between two looks: who is through makes room at once, and nothing is learnt from half an interval."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
from ansible_collections.lifeboat.evacuation.plugins.module_utils._controller import Controller
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import Move, Phase
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fleet import (
    Eyes,
    HostState,
    nearly_over,
    through,
)
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


@pytest.mark.parametrize(
    ("move", "told"),
    [
        (Move("a", Phase.LEAD_IN), False),
        (Move("a", Phase.CLOSING), True),
        (Move("a", Phase.LAST), True),
        (Move("a", Phase.CLOSING, silent=True), False),
        (Move("a", Phase.BULK, remaining_bytes=9 * MB), False),
        (Move("a", Phase.BULK, remaining_bytes=9 * MB, bytes_per_second=5 * MB), True),
        (Move("a", Phase.BULK, remaining_bytes=90 * MB, bytes_per_second=5 * MB), False),
    ],
)
def test_who_is_nearly_over(move: Move, *, told: bool) -> None:
    assert nearly_over(move, 2.0) is told


def test_what_of_a_host_is_through_is_told_by_its_newest_jobs() -> None:
    host = HostState("home1", sending("migrate", 0.0))
    assert through(host) == set()
    host.status = sending("released", 0.0)
    assert through(host) == {("j1", "closing")}
    host.status = sending("done", 0.0, verdict="evacuated")
    assert through(host) == {("j1", "ended")}


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
    begun = [entry for entry in asked if entry[2:] == ("POST", "/v1/evacuations")]
    assert [name for _at, name, _method, _path in begun] == ["home1", "home2"]
    before = [
        path for at, name, method, path in asked if at < begun[1][0] and name == "home1" and method == "GET"
    ]
    # A look comes every 2 s, and sees its last step; after that it is asked after before the next one.
    assert any(first == second == "/v1/evacuations" for first, second in pairwise(before))
