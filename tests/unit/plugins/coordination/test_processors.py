# SPDX-License-Identifier: GPL-3.0-or-later
"""Where processors are short and not the line: begun one after the other, for more at once take as long."""

from __future__ import annotations

import statistics
from copy import deepcopy
from typing import Any

import pytest
from ansible_collections.lifeboat.evacuation.plugins.module_utils._controller import Controller
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import Move, Phase
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fleet import Eyes, HostState
from ansible_collections.lifeboat.evacuation.plugins.module_utils._gate import Gate
from ansible_collections.lifeboat.evacuation.plugins.module_utils._interval import Observation, PairView
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import SiteSummary

from lifeboat_simulator.comparison import NOISE_SHARE, compare
from lifeboat_simulator.model import Links, Processors, TruePair
from lifeboat_simulator.run import Result, Simulation
from unit.plugins.coordination.sites import MB, MBIT, site, vm

_TRIP = 0.04
_CARRIED = 380 * MBIT
_FIXED = ("sequential", "static:1", "static:2", "parallel")


def whole(number: int = 8, memory: float = 50 * MB) -> SiteSummary:
    """Guests on two hosts, on a line that carries more than the hosts' processors can send."""
    return site(
        *(vm(f"v{index}", host=index % 2 + 1, memory=memory, packed_ratio=0.44) for index in range(number)),
        rate=None,
        round_trip=_TRIP,
    )


def emptied(strategy: str, processors: Processors, **more: Any) -> Result:
    told = whole(**more)
    pairs = {pair.key: TruePair(pair.key, "uplink", _CARRIED, _CARRIED, _TRIP) for pair in told.pairs}
    links = Links({"uplink": _CARRIED}, deepcopy(pairs), processors=processors)
    result = Simulation(told, links, strategy).run()
    assert result.faults == []
    assert len(result.out_at) == len(told.vms)
    return result


def test_the_model_is_like_the_lab_that_it_was_fitted_to() -> None:
    """Eight of 22 MB at 400 Mbit/s and 40 ms, two processors for all hosts: 23 and 19 s were seen."""
    alone, pairwise = (emptied(name, Processors()) for name in ("sequential", "static:1"))
    assert alone.makespan == pytest.approx(23.4, rel=0.1)
    assert alone.mean_individual == pytest.approx(2.6, rel=0.1)
    assert pairwise.makespan == pytest.approx(19.3, rel=0.25)
    assert emptied("parallel", Processors()).mean_individual >= 4 * alone.mean_individual


def beside_the_best(processors: Processors, **more: Any) -> tuple[float, float]:
    """Our expected share over the largest, and our makespan over the shortest, of the fixed settings."""
    fixed = [emptied(name, processors, **more) for name in _FIXED]
    ours = emptied("feedback", processors, **more)
    horizon = max(result.makespan for result in (*fixed, ours))
    share = ours.expected_share(horizon) / max(told.expected_share(horizon) for told in fixed)
    return share, ours.makespan / min(told.makespan for told in fixed)


@pytest.mark.parametrize("number", [8, 16, 40])
@pytest.mark.parametrize("others", [0.9, 1.2])
def test_the_share_that_is_out_is_about_the_best(number: int, others: float) -> None:
    share, makespan = beside_the_best(Processors(others=others), number=number)
    assert share >= 0.98
    assert makespan <= 1.1


@pytest.mark.parametrize("memory", [20 * MB, 150 * MB])
@pytest.mark.parametrize("others", [0.6, 0.9, 1.2, 1.5])
def test_so_it_is_for_smaller_and_larger_ones(memory: float, others: float) -> None:
    share, _makespan = beside_the_best(Processors(others=others), memory=memory)
    assert share >= 0.95


@pytest.mark.parametrize("memory", [30 * MB, 50 * MB, 100 * MB])
def test_each_vm_takes_little_longer_than_alone(memory: float) -> None:
    alone, ours = (emptied(name, Processors(), memory=memory) for name in ("sequential", "feedback"))
    assert ours.mean_individual <= 1.6 * alone.mean_individual
    assert ours.makespan <= 0.7 * alone.makespan


def test_nobody_who_has_time_is_held_back() -> None:
    """Of sixteen processors nobody waits for one: it goes as where nobody tells."""
    told = emptied("feedback", Processors(count=16))
    assert told.makespan <= 0.7 * emptied("sequential", Processors(count=16)).makespan


@pytest.mark.parametrize("processors", [Processors(), Processors(count=4, others=3.0), Processors(count=16)])
def test_on_random_sites_it_is_no_later_than_one_at_a_time_or_all_at_once(processors: Processors) -> None:
    told = [compare(seed, processors) for seed in range(500, 520)]
    assert [fault for each in told for fault in each.broken] == []
    assert [str(each) for each in told if each.worse_by(NOISE_SHARE)] == []
    assert statistics.median(each.ratio for each in told) >= 1.0


def pressed(waited: float | None, hosts: int = 2) -> dict[tuple[str, str], PairView]:
    return {
        (f"home{host}", f"backup{host}"): PairView(True, 0.0, _TRIP, processors_waited=waited)
        for host in range(1, hosts + 1)
    }


@pytest.mark.parametrize(("waited", "begun"), [(None, 4), (0.2, 4), (0.7, 2)])
def test_where_processors_are_short_two_are_begun_first(waited: float | None, begun: int) -> None:
    small = whole(memory=20 * MB)
    assert len(Controller(small).step(Observation(0.0, {}, pressed(waited))).starts) == begun


def test_where_processors_of_many_hosts_are_short_one_of_each_is_begun() -> None:
    guests = [vm(f"v{number:02}", host=number % 5 + 1, memory=4 * MB) for number in range(20)]
    told = Controller(site(*guests, rate=None, round_trip=_TRIP)).step(
        Observation(0.0, {}, pressed(0.7, hosts=5))
    )
    begun = [next(guest.source for guest in guests if guest.uuid == uuid) for uuid, _rung in told.starts]
    # Four at most while nothing is known of the line.
    assert len(begun) == len(set(begun)) == 4


def test_the_next_is_begun_when_one_is_handed_over_and_not_at_the_look() -> None:
    controller = Controller(whole())
    first = [uuid for uuid, _rung in controller.step(Observation(0.0, {}, pressed(0.9))).starts]
    assert len(first) == 2
    leading = {uuid: Move(uuid, Phase.LEAD_IN) for uuid in first}
    assert not controller.step(Observation(2.0, leading, pressed(0.9))).starts
    sending = {**leading, first[0]: Move(first[0], Phase.BULK, remaining_bytes=20 * MB)}
    told = controller.step(Observation(2.3, sending, pressed(0.9)), between=True)
    assert not told.starts, "two are under way"
    closing = {**sending, first[0]: Move(first[0], Phase.CLOSING)}
    told = controller.step(Observation(2.9, closing, pressed(0.9)), between=True)
    begun = [uuid for uuid, _rung in told.starts]
    assert len(begun) == 1
    # It leaves the host that has a processor for it.
    vms = {item.uuid: item for item in controller.site.vms}
    assert vms[begun[0]].pair == vms[first[0]].pair
    # It was asked to begin, and is not seen yet.
    assert not controller.step(Observation(3.2, closing, pressed(0.9)), between=True).starts


def test_one_source_that_has_time_is_enough() -> None:
    controller = Controller(whole())
    views = {("home1", "backup1"): 0.9, ("home2", "backup2"): 0.1}
    pairs = {key: PairView(True, 0.0, _TRIP, processors_waited=told) for key, told in views.items()}
    controller.step(Observation(0.0, {}, pairs))
    assert not controller.gates["uplink"].pressed


@pytest.mark.parametrize(("trip", "pressed"), [(0.04, True), (0.11, True), (0.12, False), (0.18, False)])
def test_a_lead_in_that_is_mostly_round_trips_is_begun_as_ever(trip: float, pressed: bool) -> None:
    """On the lab, 180 ms and 50 Mbit/s, processors busy with others: the line idled, 65 s instead of 46."""
    gate = Gate(None)
    gate.round_trip_seconds = trip
    gate.press(0.9)
    assert gate.pressed == pressed


def test_lead_ins_that_wait_for_processors_are_fewer_sooner() -> None:
    told = {}
    for waited in (0.2, 0.8):
        gate = Gate(None)
        gate.round_trip_seconds = _TRIP
        gate.press(waited)
        gate.saw_lead_in(1.0, at_once=1)
        gate.saw_lead_in(1.5, at_once=2)
        told[waited] = gate.lead_ins_at_once
    assert told == {0.2: 3, 0.8: 1}


def host(total: float | None, recent: float = 0.0) -> dict[str, HostState]:
    link = {"peer": "backup1", "state": "up", "counters": {"sent_wire_bytes": 0}}
    wait = None if total is None else {"total_seconds": total, "recent_share": recent}
    return {"home1": HostState("home1", {"links": [link], "processor_wait": wait})}


def test_a_look_tells_in_what_share_of_the_time_processors_were_waited_for() -> None:
    eyes = Eyes()

    def told(hosts: dict[str, HostState], now: float) -> float | None:
        return eyes.look(hosts, now, (), None).pairs["home1", "backup1"].processors_waited

    assert told(host(100.0, 0.3), 0.0) == pytest.approx(0.3), "at the first look the kernel's own mean"
    assert told(host(101.5, 0.3), 2.0) == pytest.approx(0.75)
    assert told(host(104.0), 4.0) == pytest.approx(1.0), "its clock and ours differ a little"
    assert told(host(3.0, 0.1), 6.0) == pytest.approx(0.1), "it was booted meanwhile"
    assert told(host(None), 8.0) is None
    assert told({"home1": HostState("home1", {"links": host(None)["home1"].status["links"]})}, 9.0) is None


def test_between_two_looks_what_was_seen_last_holds() -> None:
    eyes = Eyes()
    eyes.look(host(100.0, 0.8), 0.0, (), None)
    between = eyes.look(host(100.0), 0.5, (), None, between=True)
    assert between.pairs["home1", "backup1"].processors_waited == pytest.approx(0.8)
