# SPDX-License-Identifier: GPL-3.0-or-later
"""The control law in the simulator: nobody starved, nothing exceeded, nobody forgotten, whatever fails."""

from __future__ import annotations

import statistics
from copy import deepcopy
from dataclasses import replace

import pytest
from ansible_collections.lifeboat.evacuation.plugins.module_utils._controller import (
    Controller,
    Observation,
    PairView,
    interval_seconds,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import Move, Phase, judge
from ansible_collections.lifeboat.evacuation.plugins.module_utils._gate import Gate, Served
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Rung
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lifeboat_simulator.model import Links, TruePair
from lifeboat_simulator.run import Fault, Result, Simulation
from lifeboat_simulator.sites import random_scene
from unit.plugins.coordination.sites import MB, MBIT, site, vm

_QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def run(seed: int, strategy: str = "feedback", **how: object) -> Result:
    """One run; what the simulator found broken fails the test."""
    scene_how = {
        key: how.pop(key) for key in ("vms", "pairs", "full_destinations", "dependencies") if key in how
    }
    scene = random_scene(seed, **scene_how)  # type: ignore[arg-type]
    result = Simulation(scene.site, scene.fresh(), strategy, **how).run()  # type: ignore[arg-type]
    assert result.faults == []
    return result


def test_the_interval_is_two_seconds_or_ten_round_trips() -> None:
    assert interval_seconds([]) == interval_seconds([0.04]) == 2.0
    assert interval_seconds([0.04, 0.3]) == pytest.approx(3.0)


def test_a_source_moves_no_more_at_a_time_than_it_has_processors_and_one_that_gets_ready() -> None:
    vms = [vm(f"a{number}") for number in range(9)] + [vm(f"b{number}", host=2) for number in range(9)]
    wide = replace(site(*vms, rate=10_000 * MBIT, stream=5 * MB), processors={"home1": 2})
    controller = Controller(wide)
    started: dict[str, int] = {}
    moves: dict[str, Move] = {}
    for step in range(20):
        carried = {
            (f"home{host}", f"backup{host}"): PairView(
                goodput_bytes_per_second=5 * MB * started.get(f"home{host}", 0)
            )
            for host in (1, 2)
        }
        for uuid, _rung in controller.step(Observation(2.0 * step, dict(moves), carried)).starts:
            source = controller.source_of(uuid)
            started[source] = started.get(source, 0) + 1
            moves[uuid] = Move(uuid, Phase.BULK, remaining_bytes=1e9, bytes_per_second=5 * MB)
    assert started["home1"] == 3
    assert started["home2"] > 3, "who does not say is not limited"


@given(st.integers(0, 10**6), st.booleans(), st.booleans())
@_QUICK
def test_without_a_deadline_everyone_who_may_pause_gets_out(
    seed: int, full_destinations: bool, dependencies: bool
) -> None:
    result = run(seed, vms=10, full_destinations=full_destinations, dependencies=dependencies)
    if not full_destinations:
        assert len(result.out_at) == result.vms


@given(st.integers(0, 10**6), st.floats(20, 400))
@_QUICK
def test_with_a_deadline_nothing_is_exceeded_and_nobody_started_twice(seed: int, deadline: float) -> None:
    result = run(seed, vms=12, deadline_seconds=deadline, full_destinations=True, dependencies=True)
    assert all(out <= deadline + 1e-6 for out in result.out_at.values())


def test_one_at_a_time_and_all_at_once_are_not_better_by_much() -> None:
    ratios = []
    for seed in range(24):
        results = {name: run(seed, name, vms=8) for name in ("feedback", "sequential", "parallel")}
        horizon = max(result.makespan for result in results.values())
        shares = {name: result.expected_share(horizon) for name, result in results.items()}
        ratios.append(shares["feedback"] / max(shares["sequential"], shares["parallel"]))
    assert statistics.median(ratios) >= 0.99
    assert min(ratios) >= 0.7, ratios


_FAULTS = {
    "the link halves": [Fault(20, "rate", "uplink", 6e6)],
    "a source proxy is killed": [Fault(20, "proxy-killed", "home1")],
    "a destination dies": [Fault(20, "destination-dies", "backup1")],
    "the controller is killed": [Fault(20, "controller-restarts"), Fault(40, "controller-restarts")],
    "a pair is cut off for a while": [
        Fault(20, "pair-down", "home1 backup1"),
        Fault(60, "pair-up", "home1 backup1"),
    ],
}


@pytest.mark.parametrize("what", _FAULTS)
@pytest.mark.parametrize("seed", [3, 11])
def test_faults_stop_nobody_else(what: str, seed: int) -> None:
    result = run(seed, vms=12, pairs=3, faults=_FAULTS[what])
    scene = random_scene(seed, vms=12, pairs=3)
    dead = {item.name for item in scene.site.vms if item.destination == "backup1"}
    lost = dead if what == "a destination dies" else set()
    assert {item.name for item in scene.site.vms} - lost <= set(result.out_at)


def test_the_same_seed_runs_the_same() -> None:
    assert run(5).out_at == run(5).out_at


def test_a_narrow_uplink_ends_with_one_at_a_time() -> None:
    gate = Gate(None)
    for _unused in range(40):
        total = 6e6
        others = min(gate.spare, total / 2)
        gate.observe(total, {"a": Served(total - others, True), "b": Served(others, False, gate.spare)},
                     more_wait=True)  # fmt: skip
    assert gate.open == 1
    assert gate.spare < 0.3 * 6e6


def test_the_next_ones_lead_in_is_over_when_the_line_is_free() -> None:
    """A small VM over a long way takes longer to begin than to cross: one at a time leaves the line idle."""
    whole = site(
        *(vm(f"v{number}", host=number % 2 + 1, memory=25 * MB) for number in range(20)),
        rate=None,
        round_trip=0.18,
    )
    pairs = {pair.key: TruePair(pair.key, "uplink", 50 * MBIT, 60 * MB, 0.18) for pair in whole.pairs}
    took = {
        strategy: Simulation(whole, Links({"uplink": 50 * MBIT}, deepcopy(pairs)), strategy).run().makespan
        for strategy in ("parallel", "feedback")
    }
    assert took["feedback"] <= 1.1 * took["parallel"]


def test_a_wide_uplink_is_filled_by_many() -> None:
    gate = Gate(None)
    stream = 5e6
    for _unused in range(12):
        moves = {f"m{number}": Served(stream, True) for number in range(min(gate.open, 10))}
        gate.observe(stream * len(moves), moves, more_wait=True)
    assert gate.window >= 10


def test_a_step_down_is_noticed_and_a_step_up_found() -> None:
    gate = Gate(None)
    for total in [6e6] * 6 + [1.2e6] * 6:
        gate.observe(total, {"a": Served(total, True)}, more_wait=False)
    assert gate.capacity == pytest.approx(1.2e6, rel=0.05)
    gate.observe(6e6, {"a": Served(6e6, True)}, more_wait=False)
    assert gate.capacity == pytest.approx(6e6)


def test_strategies_start_as_many_as_they_say() -> None:
    whole = site(*(vm(f"v{number}", host=number % 2 + 1) for number in range(8)))
    for strategy, expected in (("sequential", 1), ("parallel", 8), ("static:3", 6)):
        orders = Controller(whole, strategy).step(Observation(0.0))
        assert len(orders.starts) == expected, strategy
        assert not orders.shares
        assert not orders.falls


@pytest.mark.parametrize("strategy", ["sequential", "parallel", "static:3"])
def test_a_fixed_strategy_keeps_to_the_deadline_and_to_what_is_allowed(strategy: str) -> None:
    whole = site(
        vm("live"), vm("kept", rungs=(Rung.STAY,)), vm("off", running=False),
        vm("boots", rungs=(Rung.RESTART, Rung.STAY)),
    )  # fmt: skip
    assert Controller(whole, strategy).step(Observation(100.0, deadline_at=99.0)).starts == []
    starts: dict[str, Rung] = {}
    controller = Controller(whole, strategy)
    for second in range(4):
        told = controller.step(Observation(float(second), out=set(starts))).starts
        starts |= dict(told)
    assert starts == {"uuid-live": Rung.LIVE, "uuid-off": Rung.RESTART, "uuid-boots": Rung.RESTART}


def test_a_host_that_says_nothing_holds_nobody_up() -> None:
    """Its power is gone: what was under way there is judged later, and the line is the others'."""
    controller = Controller(site(vm("gone"), vm("second", host=2), vm("third", host=2, memory=200 * MB)))
    controller.step(Observation(0.0))
    dead = Move("uuid-gone", Phase.BULK, remaining_bytes=90e6, silent=True)
    going = Move("uuid-second", Phase.BULK, remaining_bytes=90e6, bytes_per_second=5e6)
    for second in range(2, 20, 2):
        orders = controller.step(Observation(float(second), {"uuid-gone": dead, "uuid-second": going}))
        assert "uuid-gone" not in orders.shares, "nothing can be told to it"
    assert orders.shares["uuid-second"] is None, "it may take what it can get"


def test_the_last_pass_has_no_limit_and_the_first_is_served_first() -> None:
    controller = Controller(site(vm("a"), vm("b", memory=300 * MB), vm("c")))
    controller.step(Observation(0.0))
    moves = {
        "uuid-a": Move("uuid-a", Phase.LAST, remaining_bytes=1e6, bytes_per_second=3e6),
        "uuid-b": Move("uuid-b", Phase.BULK, remaining_bytes=200e6, bytes_per_second=1e6),
        "uuid-c": Move("uuid-c", Phase.BULK, remaining_bytes=50e6, bytes_per_second=1e6),
    }
    shares = controller.step(Observation(2.0, moves)).shares
    assert shares["uuid-a"] is None
    limited = [name for name, share in shares.items() if share is not None]
    assert len(limited) == 1
    assert all(share is None or share > 0 for share in shares.values())


def test_falls_come_in_time_and_only_where_they_help() -> None:
    busy = vm("web7", memory=300 * MB, dirty_bytes_per_second=5 * MB)
    rate = 50 * MBIT
    bulk = Move(
        "uuid-web7", Phase.BULK, remaining_bytes=60e6, bytes_per_second=rate, dirty_bytes_per_second=5e6
    )
    assert judge(busy, bulk, rate, 0.18, None, certain=False) is None, "no deadline: it may go on"
    assert judge(busy, bulk, rate, 0.18, 100.0) is None, "time enough to wait and see"
    fall = judge(busy, bulk, rate, 0.18, 14.0)
    assert fall is not None
    assert (fall.rung, fall.reason) == (Rung.PAUSED, "deadline")
    too_late = judge(busy, bulk, rate, 0.18, 4.0)
    assert too_late is not None
    assert too_late.rung is Rung.STAY
    restart = judge(replace(busy, rungs=(Rung.LIVE, Rung.RESTART)), replace(bulk, remaining_bytes=600e6),
                    rate, 0.18, 60.0)  # fmt: skip
    assert restart is not None
    assert restart.rung is Rung.RESTART
    assert judge(busy, replace(bulk, phase=Phase.LAST), rate, 0.18, 4.0) is None
    hopeless = judge(busy, replace(bulk, hopeless=True), rate, 0.18, None)
    assert hopeless is not None
    assert hopeless.reason == "does-not-converge"


def test_a_move_that_falls_to_restart_begins_anew_that_way() -> None:
    """Its cancelled job is one that failed, and would not be tried again for any other reason."""
    far = replace(vm("far", memory=900 * MB, dirty_bytes_per_second=20 * MB), rungs=(Rung.LIVE, Rung.RESTART))
    controller = Controller(site(far))
    controller.step(Observation(0.0, deadline_at=1000.0))
    rate = 6e6
    move = Move("uuid-far", Phase.BULK, remaining_bytes=800e6, bytes_per_second=rate, hopeless=True,
                dirty_bytes_per_second=20e6)  # fmt: skip
    orders = controller.step(Observation(2.0, {"uuid-far": move}, deadline_at=1000.0))
    assert orders.falls["uuid-far"].rung is Rung.RESTART
    again = controller.step(Observation(4.0, {"uuid-far": move}, deadline_at=1000.0))
    assert again.falls == {}, "told once"
    ended = controller.step(Observation(6.0, failed={"uuid-far": False}, deadline_at=1000.0))
    assert ended.starts == [("uuid-far", Rung.RESTART)]


def test_those_whose_turn_is_near_are_held_and_the_far_ones_not() -> None:
    whole = site(*(vm(f"v{number}", memory=120 * MB) for number in range(12)))
    controller = Controller(whole)
    controller.step(Observation(0.0))
    moves = {"uuid-v0": Move("uuid-v0", Phase.BULK, remaining_bytes=60e6, bytes_per_second=6e6)}
    held = controller.step(Observation(2.0, moves)).held
    assert held
    assert len(held) < 10
