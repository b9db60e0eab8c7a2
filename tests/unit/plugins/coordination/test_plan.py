# SPDX-License-Identifier: GPL-3.0-or-later
"""Order, forecast and sacrifice, as pure logic."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
from ansible_collections.lifeboat.evacuation.plugins.module_utils._forecast import (
    choose,
    forecast,
    shutdown_seconds_within,
    turn_seconds,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._order import cycles, order, unit_of
from ansible_collections.lifeboat.evacuation.plugins.module_utils._plan import QUICKER_FOR_OTHERS, make_plan
from ansible_collections.lifeboat.evacuation.plugins.module_utils._plan_findings import (
    leaving_findings,
    placement_findings,
    site_findings,
    strategy_findings,
    usual_wish,
    wish_findings,
    wished,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._schedule import NO_MEMORY, TOO_LATE
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Rung, VmSummary
from hypothesis import given
from hypothesis import strategies as st

from unit.plugins.coordination.sites import MB, MBIT, site, vm


def names(planned: object) -> list[str]:
    return [item.vm.name for item in planned]  # type: ignore[attr-defined]


def test_the_small_and_the_important_go_first() -> None:
    vms = [vm("big", memory=400 * MB), vm("small", memory=50 * MB), vm("dear", memory=400 * MB, priority=90)]
    plan = make_plan(site(*vms), None)
    assert names(plan.vms) == ["dear", "small", "big"]
    assert [item.reason for item in plan.vms] == ["converges"] * 3


def test_a_pair_that_is_full_keeps_its_others_for_later() -> None:
    """On a wide line: whoever stands behind a full pair has its turn when that has a place again."""
    vms = [vm(f"v{number}", host=1 + (number > 4), memory=(100 + number) * MB) for number in range(8)]
    for rate in (None, 10_000 * MBIT):
        whole = replace(site(*vms, rate=rate), processors={"home1": 1, "home2": 1})
        plan = make_plan(whole, None)
        assert len(plan.leaving) == len(vms)
        starts = sorted(item.start_seconds or 0.0 for item in plan.vms if item.vm.source == "home1")
        assert len(set(starts)) == 5, "one after the other"


def test_forecast_of_a_quiet_vm_is_its_bytes_over_the_rate() -> None:
    told = forecast(vm("a", memory=100 * MB, lag_bytes=20 * MB), Rung.LIVE, 10 * MB, 0.1)
    assert told.wire_bytes == pytest.approx(120 * MB)
    assert told.seconds == pytest.approx(12 + 14 * 0.1 + 1.1, rel=0.01), "bytes, round trips, a second"


def test_dirtying_costs_a_geometric_series() -> None:
    told = forecast(vm("a", memory=100 * MB, dirty_bytes_per_second=5 * MB), Rung.LIVE, 10 * MB, 0.0)
    assert told.wire_bytes == pytest.approx(200 * MB, rel=0.05)
    assert told.reason == "converges"
    assert told.stop_seconds <= 0.31


@pytest.mark.parametrize(
    ("megabytes", "rate", "round_trip", "seconds"),
    [
        # The mean of eight, one after the other, with openings made ahead.
        (22.6, 50 * MBIT, 0.18, 7.1),
    ],
    ids=["eight"],
)
def test_single_moves_are_forecast_as_they_were_measured(
    megabytes: float, rate: float, round_trip: float, seconds: float
) -> None:
    """Single moves on the lab: what crossed was counted, so only what is not bytes is judged."""
    told = forecast(vm("a", memory=megabytes * MB), Rung.LIVE, rate, round_trip)
    assert told.seconds == pytest.approx(seconds, rel=0.15)
    plan = make_plan(site(vm("a", memory=megabytes * MB), rate=rate, round_trip=round_trip), None)
    assert plan.makespan_seconds == pytest.approx(told.seconds)


def test_vms_that_take_turns_lose_a_moment_each() -> None:
    vms = [vm(name, memory=25 * MB) for name in "abc"]
    one = make_plan(site(vms[0], round_trip=0.18), None).makespan_seconds
    three = make_plan(site(*vms, round_trip=0.18), None).makespan_seconds
    assert three == pytest.approx(one + 2 * (25 * MB / (50 * MBIT) + turn_seconds(0.18)))


def test_the_ladder_is_gone_down_where_memory_is_dirtied_faster_than_sent() -> None:
    busy = vm("web7", memory=800 * MB, dirty_bytes_per_second=45 * MB)
    slow = 50 * MBIT
    assert forecast(busy, Rung.LIVE, slow, 0.18).reason == "does-not-converge"
    assert choose(busy, slow, 0.18).rung is Rung.PAUSED
    live_only = replace(busy, rungs=(Rung.LIVE,))
    told = choose(live_only, slow, 0.18)
    assert (told.rung, told.reason) == (Rung.STAY, "does-not-converge")
    assert choose(replace(busy, rungs=(Rung.RESTART,)), slow, 0.18).rung is Rung.RESTART


def test_what_does_not_fit_stays_and_the_rest_is_as_many_as_possible() -> None:
    vms = [vm(f"small{number}", memory=60 * MB) for number in range(5)] + [vm("big", memory=600 * MB)]
    plan = make_plan(site(*vms), 60.0)
    stay = [item for item in plan.vms if item.end_seconds is None]
    assert names(stay) == ["big"]
    assert stay[0].reason == TOO_LATE
    assert plan.makespan_seconds <= 60.0


def test_a_quicker_rung_makes_room_for_others() -> None:
    busy = [vm(f"busy{number}", memory=60 * MB, dirty_bytes_per_second=4 * MB) for number in range(4)]
    both = site(*busy)
    without = make_plan(site(*(replace(item, rungs=(Rung.LIVE,)) for item in busy)), 55.0)
    plan = make_plan(both, 55.0)
    assert len(plan.leaving) == 4 > len(without.leaving)
    assert QUICKER_FOR_OTHERS in {item.reason for item in plan.vms}


def test_groups_go_together_and_the_awaited_first() -> None:
    vms = [
        vm("a1", memory=100 * MB, group="shop"),
        vm("a2", memory=300 * MB, group="shop", after=("a1",)),
        vm("mid", memory=150 * MB),
        vm("web", memory=10 * MB, after=("database",)),
        vm("database", memory=120 * MB),
    ]
    told = names(make_plan(site(*vms), None).vms)
    assert told.index("a2") == told.index("a1") + 1
    assert told.index("web") > told.index("database")
    assert told[0] == "database", "65 MB each with what waits for it: better than 150 MB"


def test_a_waiting_vm_starts_after_the_one_it_waits_for_is_out() -> None:
    plan = make_plan(site(vm("web", after=("db",)), vm("db"), rate=500 * MBIT, stream=30 * MB), None)
    by_name = {item.vm.name: item for item in plan.vms}
    assert by_name["web"].start_seconds >= by_name["db"].end_seconds  # type: ignore[operator]


def test_a_full_destination_takes_no_more() -> None:
    plan = make_plan(site(vm("a"), vm("b", memory=120 * MB), free={"backup1": 150 * MB}), None)
    assert [(item.vm.name, item.end_seconds is None) for item in plan.vms] == [("a", False), ("b", True)]
    assert plan.vms[1].reason == NO_MEMORY


def test_the_expected_share_counts_every_moment() -> None:
    plan = make_plan(site(vm("a", memory=62.5 * MB), vm("b", memory=62.5 * MB)), None)
    ends = [item.end_seconds or 0.0 for item in plan.vms]
    assert plan.expected_share(40.0) == pytest.approx(sum(40.0 - end for end in ends) / 80.0)


def test_findings_are_told_all_at_once() -> None:
    bad = site(
        vm("a", after=("b",)), vm("b", after=("c",)), vm("c", after=("a",)),
        vm("in", destination="home1"), vm("g1", group="shop", memory=3e9), vm("g2", group="shop", memory=3e9),
        vm("twice"), vm("twice", host=2), free={"backup1": 4e9},
    )  # fmt: skip
    told = [str(finding) for finding in site_findings(bad)]
    assert len(told) == 4, told
    assert "a after b after c after a" in told[2]
    assert "destination home1: stands at home" in told[0]
    assert "group shop: needs 5.6 GiB" in told[1]
    assert "several hosts: home1, home2" in told[3]
    assert all(finding.way_out for finding in site_findings(bad))


def test_a_destination_is_inside_though_its_host_protects_nothing() -> None:
    """The site named is a group of both sites."""
    both = dataclasses.replace(site(vm("a")), hosts=("home1", "backup1"))
    (told,) = site_findings(both)
    assert "destination backup1: stands at home, the site to be emptied" in str(told)


def test_a_ring_through_groups_is_a_ring() -> None:
    vms = [
        vm("a1", group="x", after=("b1",)), vm("a2", group="x"),
        vm("b1", group="y"), vm("b2", group="y", after=("a2",)),
    ]  # fmt: skip
    assert cycles(vms) == [["group x", "group y"]]
    assert cycles([vm("a", group="x", after=("b",)), vm("b", group="x")]) == []


@pytest.mark.parametrize("strategy", ["", "static:0", "static:x", "Feedback", None, "static:-1"])
def test_unknown_strategies(strategy: object) -> None:
    assert len(strategy_findings(strategy)) == 1


@pytest.mark.parametrize("strategy", ["feedback", "sequential", "parallel", "static:3"])
def test_known_strategies(strategy: str) -> None:
    assert strategy_findings(strategy) == []


def test_wishes() -> None:
    bad = {"priority": "high", "group": 3, "after": "db", "fallback": ["live", "teleport"]}
    assert len(wish_findings("web", bad)) == 4
    assert len(wish_findings("web", {"priority": True})) == 1, "yes is no number"
    assert len(wish_findings("web", {"priority": 101})) == 1
    good = {"priority": "70", "group": "shop", "after": ["db"], "fallback": ["restart", "live"]}
    assert wish_findings("web", good) == []
    changed = replace(vm("web"), **wished(vm("web"), good))
    assert (changed.priority, changed.rungs) == (70, (Rung.LIVE, Rung.RESTART, Rung.STAY))


def test_a_destination_that_is_too_small_for_all_is_told() -> None:
    assert len(placement_findings(site(vm("a"), vm("b"), free={"backup1": 150 * MB}))) == 1


def test_after_a_name_that_two_have_is_a_finding_and_after_a_uuid_is_none() -> None:
    one, two = vm("web"), replace(vm("web", host=2), uuid="uuid-other")
    (finding,) = site_findings(site(one, two, vm("b", after=("web",))))
    assert (finding.subject, finding.way_out) == ("VM b of home1", "write its UUID under `after`")
    assert site_findings(site(one, two, vm("b", after=("uuid-other",)))) == []


def test_changes_that_the_destination_has_no_room_for_keep_a_vm_and_rehearsal_says_so() -> None:
    lagging = site(vm("a", lag_bytes=80 * MB), vm("b", lag_bytes=80 * MB))
    narrow = replace(lagging, destinations=(replace(lagging.destinations[0], store_free_bytes=100 * MB),))
    plan = make_plan(narrow, None)
    assert [(item.vm.name, item.reason) for item in plan.vms if item.end_seconds is None] == [
        ("b", "no-space-at-destination")
    ]
    (finding,) = placement_findings(narrow)
    assert "95 MiB of store left" in finding.fact
    assert placement_findings(lagging) == []


@st.composite
def _random_vms(draw: st.DrawFn) -> list[VmSummary]:
    count = draw(st.integers(1, 14))
    vms = []
    for number in range(count):
        before = draw(st.lists(st.integers(0, max(number - 1, 0)), max_size=2, unique=True)) if number else []
        vms.append(
            vm(
                f"v{number}",
                host=draw(st.integers(1, 3)),
                memory=draw(st.floats(1 * MB, 900 * MB)),
                dirty_bytes_per_second=draw(st.floats(0, 30 * MB)),
                priority=draw(st.integers(0, 100)),
                group=draw(st.sampled_from(["", "", "x", "y"])),
                after=tuple(f"v{item}" for item in before),
            )
        )
    return vms


@given(_random_vms(), st.floats(5, 600))
def test_nobody_is_forgotten_and_no_promise_is_later_than_the_deadline(
    vms: list[VmSummary], deadline: float
) -> None:
    free = {f"backup{host}": 2000 * MB for host in (1, 2, 3)}
    whole = site(*vms, free=free)
    plan = make_plan(whole, deadline)
    assert sorted(names(plan.vms)) == sorted(item.name for item in vms)
    for destination, room in free.items():
        held = sum(item.vm.memory_bytes for item in plan.leaving if item.vm.destination == destination)
        assert held <= room
    for item in plan.leaving:
        assert (item.end_seconds or 0.0) <= deadline + 1e-6
        assert item.rung in item.vm.rungs
    assert all(item.reason for item in plan.vms)


@given(_random_vms())
def test_order_keeps_dependencies_and_groups_where_both_can_be_kept(vms: list[VmSummary]) -> None:
    ordered = order(vms, {item.uuid: 1.0 for item in vms})
    assert sorted(item.name for item in ordered) == sorted(item.name for item in vms)
    if cycles(vms):
        return
    at = {item.name: number for number, item in enumerate(ordered)}
    for item in vms:
        assert all(at[before] < at[item.name] for before in item.after)
    units = [unit_of(item) for item in ordered]
    assert len(set(units)) == sum(1 for a, b in zip(["", *units], units, strict=False) if a != b)


def test_a_guest_has_the_time_to_shut_down_that_the_deadline_leaves() -> None:
    """The forecast counts twenty seconds; a proxy that is told nothing waits for sixty, then powers off."""
    boots = vm("a", lag_bytes=0.0, rungs=(Rung.RESTART, Rung.STAY))
    rest = forecast(boots, Rung.RESTART, 10 * MB, 0.0).seconds - 20.0
    assert shutdown_seconds_within(boots, None, 10 * MB, 0.0) == 60.0
    assert shutdown_seconds_within(boots, 1000.0, 10 * MB, 0.0) == 60.0
    assert shutdown_seconds_within(boots, rest + 35.0, 10 * MB, 0.0) == pytest.approx(35.0)
    assert shutdown_seconds_within(boots, 5.0, 10 * MB, 0.0) == 20.0
    quick = replace(boots, shutdown_seconds=8.0)
    assert shutdown_seconds_within(quick, 1000.0, 10 * MB, 0.0) == 8.0
    told = forecast(quick, Rung.RESTART, 10 * MB, 0.0).seconds
    assert told == pytest.approx(rest + 8.0), "and is forecast so"


def test_what_nobody_reads_of_a_vm_is_a_finding() -> None:
    (slip,) = leaving_findings("web", {"name": "web", "peer": "backup1", "prioriy": 90})
    assert (
        str(slip) == "VM web: prioriy: is nothing that lifeboat_vms knows; write priority if that was meant"
    )
    bad = {"shutdown_seconds": "long", "power_off": "perhaps", "colour": "red"}
    assert [
        len(leaving_findings("web", bad)),
        "known are addresses" in str(leaving_findings("web", bad)),
    ] == [3, True]
    assert leaving_findings("web", {"name": "web", "shutdown_seconds": 90, "power_off": False}) == []


def test_a_host_its_group_or_site_may_say_what_its_vms_do_not() -> None:
    told, findings = usual_wish(
        "home1", {"evacuate_fallback": "live, restart", "evacuate_power_off": "false"}
    )
    assert (told, findings) == ({"fallback": ["live", "restart"], "power_off": "false"}, [])
    assert wished(vm("a"), told) == {"rungs": (Rung.LIVE, Rung.RESTART, Rung.STAY), "power_off": False}
    _told, findings = usual_wish(
        "home1", {"evacuate_fallback": ["teleport"], "evacuate_shutdown_seconds": -1}
    )
    assert [item.subject for item in findings] == [
        "home1: evacuate_fallback teleport",
        "home1: evacuate_shutdown_seconds -1",
    ]
