# SPDX-License-Identifier: GPL-3.0-or-later
"""The control law in the simulator: nobody starved, nothing exceeded, nobody forgotten, whatever fails."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace

import pytest
from ansible_collections.lifeboat.evacuation.plugins.module_utils._controller import Controller
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import (
    Move,
    Phase,
    judge,
    live_seconds,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._gate import Gate, Served
from ansible_collections.lifeboat.evacuation.plugins.module_utils._interval import (
    Observation,
    PairView,
    interval_seconds,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._rounds import Rounds
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import (
    DEFAULT_PACKED_RATIO,
    Rung,
    SiteSummary,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._under_way import least_bytes
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


def started_of(whole: SiteSummary, views: Mapping[str, PairView] | None = None) -> dict[str, int]:
    """How many of each host are under way after 40 s on a wide line, when no move ends."""
    controller = Controller(whole)
    started: dict[str, int] = {}
    moves: dict[str, Move] = {}
    for step in range(20):
        seen = {
            (f"home{host}", f"backup{host}"): replace(
                (views or {}).get(f"home{host}", PairView()),
                goodput_bytes_per_second=5 * MB * started.get(f"home{host}", 0),
            )
            for host in (1, 2)
        }
        for uuid, _rung in controller.step(Observation(2.0 * step, dict(moves), seen)).starts:
            source = controller.source_of(uuid)
            started[source] = started.get(source, 0) + 1
            moves[uuid] = Move(uuid, Phase.BULK, remaining_bytes=1e9, bytes_per_second=5 * MB)
    return started


def two_hosts(*, free: dict[str, float] | None = None, **second: object) -> SiteSummary:
    """Two hosts of nine VMs on a line that carries them all; ``second`` is what those of home2 have."""
    vms = [vm(f"a{number}") for number in range(9)]
    vms += [vm(f"b{number}", host=2, **second) for number in range(9)]  # type: ignore[arg-type]
    return site(*vms, rate=10_000 * MBIT, stream=5 * MB, free=free)


def test_a_source_moves_no_more_at_a_time_than_it_has_processors_and_one_that_gets_ready() -> None:
    started = started_of(replace(two_hosts(), processors={"home1": 2}))
    assert started["home1"] == 3
    assert started["home2"] > 3, "who does not say is not limited"


def test_a_source_of_few_processors_does_not_keep_another_from_its_own() -> None:
    started = started_of(replace(two_hosts(), processors={"home1": 1, "home2": 16}))
    assert started == {"home1": 2, "home2": 9}


_CANNOT_START = {
    "its host says nothing": (two_hosts(), PairView(heard=False)),
    "its link is down": (two_hosts(), PairView(up=False)),
    "its destination has no memory": (two_hosts(free={"backup2": 0.0}), PairView()),
    "it waits for another": (two_hosts(after=("a0",)), PairView()),
}


@pytest.mark.parametrize("why", _CANNOT_START)
def test_a_pair_that_cannot_start_anything_throttles_no_other(why: str) -> None:
    whole, view = _CANNOT_START[why]
    assert started_of(whole, {"home2": view}) == {"home1": 9}


def test_a_pair_that_waits_for_its_retry_throttles_no_other() -> None:
    controller = Controller(site(vm("b", host=2), vm("a0"), vm("a1"), rate=10_000 * MBIT, stream=5 * MB))
    begun = {uuid for uuid, _rung in controller.step(Observation(0.0)).starts}
    assert begun == {"uuid-b", "uuid-a0"}
    move = Move("uuid-a0", Phase.BULK, remaining_bytes=1e9, bytes_per_second=5e6)
    orders = controller.step(Observation(2.0, {"uuid-a0": move}, failed={"uuid-b": True}))
    assert [uuid for uuid, _rung in orders.starts] == ["uuid-a1"]


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


@pytest.mark.parametrize(("seen", "counted"), [(DEFAULT_PACKED_RATIO, 0.25), (0.4, 0.4), (0.2, 0.2)])
def test_what_nobody_has_seen_packed_is_thought_to_be_little(seen: float, counted: float) -> None:
    """Whether the line runs dry is asked of it: who is thought larger than he is lets it."""
    summary = replace(vm("v1", memory=100 * MB), packed_ratio=seen, lag_bytes=0.0)
    assert least_bytes(summary) == pytest.approx(counted * summary.memory_used_bytes)


def test_a_first_try_that_hurts_is_taken_back_whole() -> None:
    """Half of it would be missing to the one that fills the uplink, for a minute and more."""
    gate = Gate(None)
    while gate.spare == 0:
        gate.observe(6e6, {"a": Served(6e6, True)}, more_wait=True)
    tried = gate.spare
    gate.observe(6e6, {"a": Served(6e6 - tried, True), "b": Served(tried, False, tried)}, more_wait=True)
    assert (gate.spare, gate.window, gate.reason) == (0.0, 1, "no-more-carried")


def test_one_small_first_move_opens_no_flood() -> None:
    """Seen in the simulator: a trickle at the end of it was taken for what one carries, and 81 were begun."""
    gate = Gate(50e6)
    gate.observe(12.3e6, {}, 12.3e6, more_wait=True)
    gate.observe(12.8e6, {}, 0.6e6, more_wait=True)
    assert gate.stream == 12.3e6
    assert 2 <= gate.open <= 4
    wide = Gate(5e9)
    opened = []
    for _unused in range(8):
        moves = {f"m{number}": Served(5e6, True) for number in range(min(wide.open, 1000))}
        wide.observe(5e6 * len(moves), moves, more_wait=True)
        opened.append(wide.open)
    assert opened[0] <= 6, "known to be wide, but what one carries was seen once"
    assert opened[-1] >= 200


def test_one_whose_link_is_down_says_nothing_of_the_uplink() -> None:
    """Others carry something: a stream of nothing was the end of the controller."""
    gate = Gate(None)
    gate.observe(6e6, {"a": Served(6e6, True)}, more_wait=True)
    for _unused in range(3):
        gate.observe(1e5, {"a": Served(0.0, True)}, 1e5, more_wait=True)
    assert gate.stream == 6e6
    assert gate.window >= 1
    first = Gate(None)
    first.observe(1e5, {"a": Served(0.0, True)}, more_wait=True)
    assert first.window >= 1


def test_one_that_takes_anothers_place_before_that_is_over_makes_no_link_slower() -> None:
    gate = Gate(None)
    gate.observe(6e6, {"a": Served(6e6, True)}, more_wait=False)
    gate.observe_crowded(6e6, {})
    assert gate.reason != "link-slower"
    assert gate.stream == 6e6
    assert gate.capacity == 6e6


def test_where_one_is_thought_to_fill_the_uplink_the_second_is_not_begun_with_it() -> None:
    begun = Controller(site(vm("a"), vm("b", host=2), rate=50 * MBIT)).step(Observation(0.0)).starts
    assert len(begun) == 1
    begun = Controller(site(vm("a"), vm("b", host=2), rate=None)).step(Observation(0.0)).starts
    assert len(begun) == 2, "nobody knows: one is served, one is there to try more with"


def served_fully(controller: Controller, moves: dict[str, Move], seconds: float = 2.0) -> set[str]:
    shares = controller.step(Observation(seconds, moves)).shares
    return {uuid for uuid, share in shares.items() if share is None}


def test_a_guest_that_dirties_as_fast_as_is_sent_goes_after_a_larger_one_that_does_not() -> None:
    """Its memory crosses several times, and the other would wait for all of them."""
    controller = Controller(site(vm("busy", dirty_bytes_per_second=9 * MB), vm("large", memory=300 * MB)))
    busy = Move("uuid-busy", Phase.BULK, remaining_bytes=100e6, dirty_bytes_per_second=9e6)
    large = Move("uuid-large", Phase.BULK, remaining_bytes=300e6)
    assert served_fully(controller, {"uuid-busy": busy, "uuid-large": large}) == {"uuid-large"}


def test_what_one_stream_carries_is_not_taken_for_what_the_line_does() -> None:
    """Seen at 1 Gbit/s, before anything was: against that it dirties little, against its stream much."""
    busy = vm("busy", memory=100 * MB, dirty_bytes_per_second=37 * MB)
    controller = Controller(site(busy, vm("calm", memory=150 * MB), rate=1000 * MBIT))
    shares = controller.step(Observation(0.0)).shares
    assert [uuid for uuid, share in shares.items() if share is None] == ["uuid-calm"]


def test_a_far_smaller_one_takes_the_place_of_one_that_is_served_and_a_little_smaller_one_does_not() -> None:
    controller = Controller(site(vm("long", memory=900 * MB), vm("short"), vm("half", memory=450 * MB)))
    long = Move("uuid-long", Phase.BULK, remaining_bytes=900e6, bytes_per_second=6e6)
    assert served_fully(controller, {"uuid-long": long}) == {"uuid-long"}
    half = Move("uuid-half", Phase.BULK, remaining_bytes=450e6)
    assert served_fully(controller, {"uuid-long": long, "uuid-half": half}, 4.0) == {"uuid-long"}
    short = Move("uuid-short", Phase.BULK, remaining_bytes=100e6)
    assert served_fully(controller, {"uuid-long": long, "uuid-short": short}, 6.0) == {"uuid-short"}


def test_what_is_dirtied_in_a_round_is_counted_until_the_next_begins() -> None:
    rounds, vms = Rounds(), {"uuid-a": vm("a", memory=100 * MB)}

    def dirtied(now: float, left: float) -> float:
        move = Move("uuid-a", Phase.BULK, remaining_bytes=left, dirty_bytes_per_second=4e6)
        return rounds.told({"uuid-a": move}, vms, now)["uuid-a"].dirtied_bytes

    assert [dirtied(0, 90e6), dirtied(2, 80e6), dirtied(10, 50e6)] == [0, 8e6, 40e6]
    assert dirtied(60, 10e6) == 100e6, "no more than it has"
    assert dirtied(62, 95e6) == 0, "a new round"
    move = Move("uuid-a", Phase.BULK, remaining_bytes=10e6, dirty_bytes_per_second=4e6, dirtied_bytes=30e6)
    assert live_seconds(move, 8e6) == pytest.approx(10.0), (
        "what is left, what was dirtied, and so on by halves"
    )


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
    assert judge(busy, bulk, rate, 0.18, 4.0, certain=False) is None, "the rate is hardly known"
    restart = judge(replace(busy, rungs=(Rung.LIVE, Rung.RESTART)), replace(bulk, remaining_bytes=600e6),
                    rate, 0.18, 60.0)  # fmt: skip
    assert restart is not None
    assert restart.rung is Rung.RESTART
    assert judge(busy, replace(bulk, phase=Phase.LAST), rate, 0.18, 4.0) is None
    hopeless = judge(busy, replace(bulk, hopeless=True), rate, 0.18, None)
    assert hopeless is not None
    assert hopeless.reason == "does-not-converge"


@pytest.mark.parametrize("left", [0.0, -1.0, -500.0])
def test_nothing_under_way_is_cancelled_for_a_deadline_that_has_passed(left: float) -> None:
    busy = vm("a", memory=300 * MB, dirty_bytes_per_second=5 * MB, rungs=(Rung.LIVE, Rung.RESTART, Rung.STAY))
    bulk = Move("uuid-a", Phase.BULK, remaining_bytes=3e6, bytes_per_second=6e6, dirty_bytes_per_second=1e6)
    assert judge(busy, bulk, 6e6, 0.18, left) is None
    outruns = replace(bulk, hopeless=True, dirty_bytes_per_second=9e6)
    assert judge(busy, outruns, 6e6, 0.18, left) is None, "a restart could not be begun any more"
    for seconds, rung in ((20.0, None), (60.0, Rung.RESTART)):
        fall = judge(busy, outruns, 6e6, 0.18, seconds)
        assert (fall and fall.rung) == rung, "not cancelled for a restart for which there is no time"
    stopped = judge(replace(busy, rungs=(Rung.LIVE, Rung.PAUSED)), outruns, 6e6, 0.18, left)
    assert stopped is not None
    assert stopped.rung is Rung.PAUSED, "else it would go on for ever"


def late_pair(rate: float | None, deadline: float) -> tuple[Controller, dict[str, Move]]:
    """One under way that cannot be out in time, seen long enough to be sure, and one that waits."""
    controller = Controller(site(vm("late", memory=400 * MB), vm("waits", memory=600 * MB), rate=rate))
    moves = {"uuid-late": Move("uuid-late", Phase.BULK, remaining_bytes=390e6, bytes_per_second=6e6)}
    for second in range(0, 12, 2):
        told = controller.step(Observation(float(second), moves if second else {}, deadline_at=deadline))
        assert not told.falls
    return controller, moves


def test_nobody_gives_way_to_those_that_cannot_start_any_more() -> None:
    controller, moves = late_pair(50 * MBIT, 300.0)
    assert controller.waiting == ("uuid-waits",)
    told = controller.step(Observation(260.0, moves, deadline_at=300.0))
    assert not told.falls, "who waits would be too late, too: its being cancelled helps nobody"


def test_of_two_that_are_late_one_goes_on() -> None:
    controller = Controller(site(vm("a", memory=400 * MB), vm("b", host=2, memory=400 * MB), rate=None))
    for second in range(0, 40, 2):
        moves = {f"uuid-{name}": Move(f"uuid-{name}", Phase.BULK, remaining_bytes=390e6, bytes_per_second=6e6)
                 for name in "ab"} if second else {}  # fmt: skip
        told = controller.step(Observation(float(second), moves, deadline_at=45.0))
        if told.falls:
            break
    assert [fall.rung for fall in told.falls.values()] == [Rung.STAY]


def test_who_gave_way_is_begun_again_when_the_deadline_moves_later() -> None:
    """The UPS is on line again, or a later time was given."""
    whole = site(vm("late", memory=400 * MB), vm("other", host=2, memory=400 * MB), rate=None)
    controller = Controller(whole)
    rate = {"bytes_per_second": 6e6, "remaining_bytes": 390e6}
    moves = {uuid: Move(uuid, Phase.BULK, **rate) for uuid in ("uuid-late", "uuid-other")}
    falls: dict[str, object] = {}
    for second in range(0, 40, 2):
        falls = dict(
            controller.step(Observation(float(second), moves if second else {}, deadline_at=45.0)).falls
        )
        if falls:
            break
    (gone,) = falls
    (stays,) = set(moves) - {gone}
    on = {stays: moves[stays]}
    ended = {"failed": {gone: False}}
    assert not controller.step(Observation(42.0, on, **ended, deadline_at=45.0)).starts
    assert controller.waits_because(gone) == "too-late"
    starts = [
        uuid
        for second in range(44, 60, 2)
        for uuid, _rung in controller.step(Observation(float(second), on, **ended, deadline_at=900.0)).starts
    ]
    assert starts == [gone]


def test_one_that_was_held_back_is_not_given_up_for_what_it_got_meanwhile() -> None:
    """Alone on its pair: nothing but its trickle was ever seen there."""
    controller = Controller(site(vm("a"), vm("b", host=2, memory=200 * MB), rate=None))
    controller.step(Observation(0.0, deadline_at=90.0))
    for second in range(2, 12, 2):
        moves = {
            "uuid-a": Move("uuid-a", Phase.BULK, remaining_bytes=90e6 - 6e6 * second, bytes_per_second=6e6),
            "uuid-b": Move("uuid-b", Phase.BULK, remaining_bytes=199e6, bytes_per_second=65e3),
        }
        seen = {
            ("home1", "backup1"): PairView(goodput_bytes_per_second=6e6),
            ("home2", "backup2"): PairView(),
        }
        assert not controller.step(Observation(float(second), moves, seen, deadline_at=90.0)).falls
    assert {pair.stream_bytes_per_second for pair in controller.current_site().pairs} == {6e6, 60e6}


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


def one_at_a_time(whole: SiteSummary, strategy: str = "feedback") -> Controller:
    """A controller that has found out that more at a time bring nothing."""
    controller = Controller(whole, strategy)
    for gate in controller.gates.values():
        gate._starting = False
    return controller


def test_who_waits_behind_a_long_move_is_precached_until_its_turn_is_near() -> None:
    """If the power fails meanwhile its replica would be as old as that move."""
    controller = one_at_a_time(site(vm("a", memory=64_000 * MB), vm("b", memory=64_000 * MB)))
    controller.step(Observation(0.0))
    assert controller.waiting == ("uuid-b",)
    for second in range(2, 120, 2):
        long = Move("uuid-a", Phase.BULK, remaining_bytes=2e9, bytes_per_second=6e6)
        assert not controller.step(Observation(float(second), {"uuid-a": long})).held
    ending = replace(long, remaining_bytes=120e6)
    assert controller.step(Observation(120.0, {"uuid-a": ending})).held == {"uuid-b"}


@pytest.mark.parametrize("strategy", ["parallel", "feedback"])
def test_one_waits_for_another_that_was_asked_for_and_is_not_seen_yet(strategy: str) -> None:
    controller = Controller(site(vm("first"), vm("then", host=2, after=("first",))), strategy)
    assert [uuid for uuid, _rung in controller.step(Observation(0.0)).starts] == ["uuid-first"]
    assert not controller.step(Observation(2.0)).starts, "its host has not said yet that it moves"
    moving = {"uuid-first": Move("uuid-first", Phase.BULK, remaining_bytes=1e6, bytes_per_second=6e6)}
    assert not controller.step(Observation(4.0, moving)).starts
    over = controller.step(Observation(6.0, out={"uuid-first"}))
    assert [uuid for uuid, _rung in over.starts] == ["uuid-then"]


@pytest.mark.parametrize("strategy", ["sequential", "feedback"])
def test_a_start_that_its_host_never_answers_holds_its_place_for_a_moment_only(strategy: str) -> None:
    controller = one_at_a_time(site(vm("hangs"), vm("next", host=2, memory=200 * MB)), strategy)
    first = controller.step(Observation(0.0, pairs={("home2", "backup2"): PairView(heard=False)}))
    assert [uuid for uuid, _rung in first.starts] == ["uuid-hangs"]
    pairs = {("home1", "backup1"): PairView(heard=False), ("home2", "backup2"): PairView()}
    for second in range(2, 12, 2):
        assert not controller.step(Observation(float(second), pairs=pairs)).starts, "it may answer yet"
    later = controller.step(Observation(12.0, pairs=pairs))
    assert [uuid for uuid, _rung in later.starts] == ["uuid-next"]


def test_a_move_of_a_host_that_says_nothing_holds_no_place_whatever_the_strategy() -> None:
    controller = Controller(site(vm("gone"), vm("next", host=2)), "sequential")
    controller.step(Observation(0.0))
    move = Move("uuid-gone", Phase.BULK, remaining_bytes=90e6)
    assert not controller.step(Observation(2.0, {"uuid-gone": move})).starts
    silent = controller.step(Observation(12.0, {"uuid-gone": replace(move, silent=True)}))
    assert [uuid for uuid, _rung in silent.starts] == ["uuid-next"]


def full_destination() -> Controller:
    """Two are to go where only one of them has room, and the first has begun."""
    controller = Controller(site(vm("a", memory=600 * MB, priority=90), vm("b", memory=400 * MB),
                                 free={"backup1": 800 * MB}))  # fmt: skip
    assert [uuid for uuid, _rung in controller.step(Observation(0.0)).starts] == ["uuid-a"]
    going = Move("uuid-a", Phase.BULK, remaining_bytes=1e6, bytes_per_second=6e6)
    assert not controller.step(Observation(2.0, {"uuid-a": going})).starts
    assert controller.waits_because("uuid-b") == "no-memory-at-destination"
    return controller


def free_now(controller: Controller) -> float | None:
    """What the next plan takes for free there."""
    return controller.current_site().destinations[0].memory_free_bytes


def test_the_memory_of_one_that_failed_is_the_next_ones() -> None:
    orders = full_destination().step(Observation(4.0, failed={"uuid-a": False}))
    assert [uuid for uuid, _rung in orders.starts] == ["uuid-b"]


def test_one_that_waits_for_its_retry_is_counted_once() -> None:
    controller = Controller(site(vm("a", memory=600 * MB), free={"backup1": 800 * MB}))
    for attempt in range(3):
        assert controller.step(Observation(10.0 * attempt, failed={"uuid-a": True} if attempt else {})).starts
        assert free_now(controller) == 200 * MB
        assert not controller.step(Observation(10.0 * attempt + 2, failed={"uuid-a": True})).starts
        assert free_now(controller) == 800 * MB
    assert not controller.step(Observation(60.0, failed={"uuid-a": True})).starts
    assert free_now(controller) == 800 * MB, "given back once, however often it is told"


def test_a_start_that_did_not_reach_its_proxy_takes_no_memory_until_it_is_found_under_way() -> None:
    controller = full_destination()
    controller.not_started("uuid-a", 2.0)
    assert free_now(controller) == 800 * MB
    lead_in = Move("uuid-a", Phase.LEAD_IN)
    controller.step(Observation(4.0, {"uuid-a": lead_in}))
    assert free_now(controller) == 200 * MB
    controller.step(Observation(6.0, out={"uuid-a"}))
    assert free_now(controller) == 200 * MB


def test_one_that_failed_for_good_is_not_begun_again_where_all_were_under_way_at_first() -> None:
    """Begun anew, a controller finds them moving and has nobody to plan for."""
    controller = Controller(site(vm("a")))
    controller.step(Observation(0.0, {"uuid-a": Move("uuid-a", Phase.BULK, remaining_bytes=1e6)}))
    assert not controller.step(Observation(2.0, failed={"uuid-a": False})).starts
    assert not controller.waiting


@pytest.mark.parametrize("phase", [Phase.BULK, Phase.CLOSING])
def test_one_that_may_have_arrived_keeps_its_memory(phase: Phase) -> None:
    """Its host is given up while it goes on by itself, or its handing over is undecided."""
    controller = full_destination()
    heard = phase is Phase.CLOSING
    pairs = {("home1", "backup1"): PairView(heard=heard)}
    controller.step(Observation(4.0, {"uuid-a": Move("uuid-a", phase, silent=not heard)}, pairs))
    assert not controller.step(Observation(6.0, {}, pairs, failed={"uuid-a": False})).starts
    assert free_now(controller) == 200 * MB
