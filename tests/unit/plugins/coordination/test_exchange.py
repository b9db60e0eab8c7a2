# SPDX-License-Identifier: GPL-3.0-or-later
"""Whom to save where not all can be: as much weight as there could be."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain, combinations

from ansible_collections.lifeboat.evacuation.plugins.module_utils._exchange import Unit, weightiest
from ansible_collections.lifeboat.evacuation.plugins.module_utils._order import unit_of
from ansible_collections.lifeboat.evacuation.plugins.module_utils._plan import Plan, make_plan
from ansible_collections.lifeboat.evacuation.plugins.module_utils._schedule import TOO_LATE
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Rung, VmSummary
from hypothesis import given, settings
from hypothesis import strategies as st

from unit.plugins.coordination.sites import MB, MBIT, site, vm


def saved(plan: Plan) -> float:
    return sum(planned.vm.weight for planned in plan.leaving)


def test_one_that_weighs_more_comes_instead_of_many_small_ones() -> None:
    """All eight small ones fit, and the line would be idle for half of the time."""
    small = [vm(f"small{number}") for number in range(8)]
    plan = make_plan(site(*small, vm("db", memory=1500 * MB, priority=80), rate=50 * MBIT), 300.0)
    assert "db" in {planned.vm.name for planned in plan.leaving}
    assert saved(plan) == 11.0
    assert {planned.reason for planned in plan.vms if planned.end_seconds is None} == {TOO_LATE}


def test_a_group_is_given_up_as_one() -> None:
    shop = [vm(f"shop{number}", memory=300 * MB, group="shop") for number in range(3)]
    plan = make_plan(site(*shop, vm("db", memory=1000 * MB, priority=80), rate=50 * MBIT), 180.0)
    assert {planned.vm.name for planned in plan.leaving} == {"db"}
    dear = [vm(f"shop{number}", memory=300 * MB, group="shop", priority=75) for number in range(3)]
    plan = make_plan(site(*dear, vm("db", memory=1000 * MB, priority=80), rate=50 * MBIT), 180.0)
    assert {planned.vm.group for planned in plan.leaving} == {"shop"}
    assert len(plan.leaving) == 3


_VM = st.tuples(st.integers(5, 400), st.integers(20, 90), st.sampled_from(["", "", "", "x", "y"]))


def best_by_trying_all(vms: Sequence[VmSummary], deadline: float) -> float:
    """The most weight that any choice of groups and VMs by themselves gets out together."""
    units: dict[str, list[VmSummary]] = {}
    for item in vms:
        units.setdefault(unit_of(item), []).append(item)
    most = 0.0
    for count in range(len(units) + 1):
        for names in combinations(units, count):
            chosen = list(chain.from_iterable(units[name] for name in names))
            weight = sum(item.weight for item in chosen)
            if weight > most and len(make_plan(site(*chosen), deadline).leaving) == len(chosen):
                most = weight
    return most


@given(st.lists(_VM, min_size=1, max_size=7), st.integers(10, 200))
@settings(max_examples=60, deadline=None)
def test_no_other_choice_saves_more(told: list[tuple[int, int, str]], deadline: int) -> None:
    vms = [
        vm(f"v{number}", memory=memory * MB, priority=priority, group=group, rungs=(Rung.LIVE, Rung.STAY))
        for number, (memory, priority, group) in enumerate(told)
    ]
    assert (
        saved(make_plan(site(*vms), deadline, spares=((0.0, 0.0),)))
        >= best_by_trying_all(vms, deadline) * 0.999999
    )


@given(
    st.lists(st.tuples(st.floats(0.1, 50), st.floats(0.1, 30)), min_size=1, max_size=60), st.floats(1, 400)
)
@settings(max_examples=60, deadline=None)
def test_what_is_chosen_fits_and_weighs_no_less_than_the_first_that_fit(
    told: list[tuple[float, float]], seconds: float
) -> None:
    units = [Unit(str(number), *figures) for number, figures in enumerate(told)]
    units.sort(key=lambda unit: -unit.weight / unit.seconds)
    names = weightiest(units, seconds)
    chosen = [unit for unit in units if unit.name in names]
    assert sum(unit.seconds for unit in chosen) <= seconds + 1e-6
    used = first = 0.0
    for unit in units:
        if used + unit.seconds <= seconds:
            used, first = used + unit.seconds, first + unit.weight
    # Of sixty some partial choices are left out: little is lost by it.
    assert sum(unit.weight for unit in chosen) >= 0.98 * first


def test_ten_thousand_are_chosen_from_quickly() -> None:
    vms = [
        vm(f"v{number}", host=number % 500, memory=(10 + number * 7919 % 790) * MB,
           priority=30 + number * 31 % 50) for number in range(10_000)
    ]  # fmt: skip
    whole = site(*vms, rate=10_000 * MBIT, round_trip=0.02)
    began = time.process_time()
    plan = make_plan(whole, 600.0)
    assert time.process_time() - began < 0.5
    assert len(plan.leaving) < len(vms)
