# SPDX-License-Identifier: GPL-3.0-or-later
"""How it would go by the strategies that are there to compare with."""

from __future__ import annotations

import time
from copy import deepcopy

import pytest
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fixed_plan import at_once, fixed_plan
from ansible_collections.lifeboat.evacuation.plugins.module_utils._forecast import forecast
from ansible_collections.lifeboat.evacuation.plugins.module_utils._plan import Plan, make_plan
from ansible_collections.lifeboat.evacuation.plugins.module_utils._schedule import (
    NO_MEMORY,
    TOO_LATE,
    lines,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Rung, SiteSummary

from lifeboat_simulator.model import Links, TruePair
from lifeboat_simulator.run import Simulation
from unit.plugins.coordination.sites import MB, MBIT, site, vm


def plan_by(strategy: str, whole: SiteSummary, deadline: float | None = None) -> Plan:
    plan = make_plan(whole, deadline, overlap=strategy != "sequential")
    count = at_once(strategy, whole)
    return plan if count is None else fixed_plan(plan, whole, lines(whole), count)


def test_which_strategies_move_so_many_at_once() -> None:
    whole = site(vm("a"), vm("b"))
    assert [at_once(name, whole) for name in ("parallel", "static:3", "feedback", "sequential")] == [
        2, 3, None, None,
    ]  # fmt: skip


@pytest.mark.parametrize("strategy", ["sequential", "static:2", "parallel"])
def test_it_takes_about_as_long_as_in_the_simulator(strategy: str) -> None:
    """A fluid against a fluid in steps: the last is out when it is there, within a tenth and two looks."""
    whole = site(
        *(vm(f"v{number}", host=number % 2 + 1, memory=(80 + 30 * number) * MB) for number in range(8)),
        round_trip=0.04,
    )
    pairs = {pair.key: TruePair(pair.key, "uplink", 1e12, 60 * MB, 0.04) for pair in whole.pairs}
    result = Simulation(whole, Links({"uplink": 50 * MBIT}, deepcopy(pairs)), strategy).run()
    told = plan_by(strategy, whole)
    assert len(told.leaving) == 8
    assert told.makespan_seconds == pytest.approx(result.makespan, rel=0.1, abs=4.0)
    ends = sorted(item.end_seconds or 0.0 for item in told.leaving)
    assert ends[0] == pytest.approx(min(result.out_at.values()), rel=0.15, abs=4.0)


def test_strategies_are_forecast_differently() -> None:
    whole = site(*(vm(f"v{number}") for number in range(6)))
    told = {name: plan_by(name, whole) for name in ("feedback", "static:2", "parallel")}
    first = {name: min(item.end_seconds or 0.0 for item in plan.leaving) for name, plan in told.items()}
    assert first["feedback"] < first["static:2"] < first["parallel"]
    within = {name: len(plan_by(name, whole, 60.0).leaving) for name in told}
    assert within["feedback"] > within["static:2"] > within["parallel"] == 0


def test_a_guest_that_outruns_its_share_stays_until_the_others_are_out() -> None:
    busy = vm("busy", memory=50 * MB, dirty_bytes_per_second=3 * MB, longest_stop_seconds=1.0)
    whole = site(busy, vm("a"), vm("b"), vm("c"))
    told = {item.vm.name: item for item in plan_by("parallel", whole).vms}
    assert all(item.end_seconds for item in told.values())
    assert max(told.values(), key=lambda item: item.end_seconds or 0.0).vm.name == "busy"
    never = plan_by("parallel", site(vm("never", dirty_bytes_per_second=50 * MB, longest_stop_seconds=1.0)))
    assert [item.reason for item in never.vms] == ["does-not-converge"]


def test_its_mirrors_share_of_the_line_is_taken_off_once() -> None:
    """6 MB/s, 3 of them its mirror's: what its memory gets nowhere with by rounds a last stop ends."""
    busy = vm(
        "busy", dirty_bytes_per_second=2.4 * MB, written_bytes_per_second=3 * MB, longest_stop_seconds=60.0
    )
    assert forecast(busy, Rung.LIVE, 6 * MB, 0.0).feasible
    (told,) = plan_by("parallel", site(busy, rate=6 * MB)).vms
    assert told.end_seconds is not None


def test_who_waits_who_has_no_room_and_who_may_not_leave() -> None:
    whole = site(
        vm("first", memory=300 * MB), vm("then", after=("first",)), vm("large", memory=900 * MB),
        vm("kept", rungs=(Rung.STAY,)), free={"backup1": 500 * MB},
    )  # fmt: skip
    told = {item.vm.name: item for item in plan_by("parallel", whole).vms}
    assert (told["then"].start_seconds or 0.0) >= (told["first"].end_seconds or 1e9)
    assert (told["large"].reason, told["kept"].reason) == (NO_MEMORY, "no-rung-allowed")
    late = plan_by("static:1", site(vm("a"), vm("b")), 20.0)
    assert [(item.end_seconds is None, item.reason) for item in late.vms][1] == (True, TOO_LATE)


def test_thousands_are_forecast_within_seconds() -> None:
    vms = [vm(f"v{number}", host=number % 100, memory=(50 + number % 70) * MB) for number in range(3000)]
    whole = site(*vms, rate=10_000 * MBIT)
    began = time.process_time()
    assert len(plan_by("static:4", whole).leaving) == 3000
    assert time.process_time() - began < 10
