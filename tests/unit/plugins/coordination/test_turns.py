# SPDX-License-Identifier: GPL-3.0-or-later
"""One move after another on a line: the next stands ready in time, for what is left of the first is known."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from ansible_collections.lifeboat.evacuation.plugins.module_utils._controller import Controller
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import Move, Phase, judge
from ansible_collections.lifeboat.evacuation.plugins.module_utils._interval import Observation, PairView
from ansible_collections.lifeboat.evacuation.plugins.module_utils._packing import Packing
from ansible_collections.lifeboat.evacuation.plugins.module_utils._rounds import Rounds
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import (
    DEFAULT_PACKED_RATIO,
    Rung,
    SiteSummary,
)

from lifeboat_simulator.model import Links, TruePair
from lifeboat_simulator.run import Simulation
from unit.plugins.coordination.sites import MB, MBIT, site, vm

_TRIP = 0.18
_CARRIED = 47 * MBIT

# An idle guest of 96 MiB as its proxy told of it every 2 s, 50 Mbit/s and 180 ms; it came to 22.4 MB.
_TOLD = (
    (3.1 * MB, 92_270_592, 2_613_248, 1_604, 1, 2_052_138),
    (15.1 * MB, 60_960_768, 31_363_072, 2_229, 1, 3_586_540),
    (22.2 * MB, 14_409_728, 61_669_376, 6_435, 2, 52_018_397),
)


def progress(left: int, pages: int, empty: int, number: int, rate: int) -> dict[str, Any]:
    return {
        "memory_total_bytes": 101_457_920, "memory_remaining_bytes": left, "memory_normal_bytes": pages,
        "memory_constant": empty, "memory_iteration": number, "memory_bytes_per_second": rate,
        "memory_page_size": 4096,
    }  # fmt: skip


def test_what_is_left_of_a_memory_is_counted_by_pages_not_by_qemus_rate() -> None:
    """By its rate, which jumps by ten times from look to look, 50 MB were left where 7 were."""
    packing = Packing()
    packing.look(0.0, {})
    assert packing.ratio == DEFAULT_PACKED_RATIO
    left = []
    for sent, *counters in _TOLD:
        packing.look(sent, progress(*counters))
        left.append(packing.left_bytes / MB)
    assert left[0] > left[1] > left[2]
    assert left[1] < 26
    assert packing.ratio == pytest.approx(22.2 / 61.7, rel=0.01)
    assert packing.sent_bytes == pytest.approx(22.2 * MB, rel=0.01)


def test_a_controller_that_begins_in_the_middle_counts_from_there() -> None:
    sent, *counters = _TOLD[1]
    packing = Packing()
    packing.look(sent, progress(*counters))
    sent, *counters = _TOLD[2]
    packing.look(sent, progress(*counters))
    assert packing.ratio == pytest.approx(7.1 / 30.3, rel=0.01)
    assert packing.sent_bytes == pytest.approx(61.7 * MB * packing.ratio, rel=0.01)


def test_of_pages_that_are_empty_a_sample_of_the_memory_knows() -> None:
    vms = {"uuid-a": vm("a", memory=100 * MB, packed_ratio=0.22)}
    first = Move("uuid-a", Phase.BULK, remaining_bytes=23 * MB, sent_bytes=15 * MB, round_number=1)

    def left(move: Move) -> float:
        return Rounds().told({"uuid-a": move}, vms, 0.0)["uuid-a"].remaining_bytes / MB

    assert left(first) == pytest.approx(7.0)
    assert left(replace(first, sent_bytes=21 * MB)) == pytest.approx(23 / 4)
    assert left(replace(first, sent_bytes=30 * MB)) == pytest.approx(23.0), "the sample said too little"
    assert left(replace(first, remaining_bytes=2 * MB)) == pytest.approx(2.0)
    assert left(replace(first, round_number=2)) == pytest.approx(23.0), "in later rounds no page is empty"


def eight(*, told_trip: float = _TRIP) -> SiteSummary:
    """Guests of 22 MB on two hosts, who never moved, on a line that one of them fills."""
    return site(
        *(vm(f"v{number}", host=number % 2 + 1, memory=49 * MB, packed_ratio=DEFAULT_PACKED_RATIO)
          for number in range(8)),
        rate=_CARRIED,
        round_trip=told_trip,
    )  # fmt: skip


def simulated(whole: SiteSummary, strategy: str, *, empty: float) -> Simulation:
    pairs = {pair.key: TruePair(pair.key, "uplink", _CARRIED, _CARRIED, _TRIP) for pair in whole.pairs}
    simulation = Simulation(whole, Links({"uplink": _CARRIED}, deepcopy(pairs)), strategy)
    for guest in simulation.vms.values():
        guest.empty_share = empty
    return simulation


@pytest.mark.parametrize("empty", [0.0, 0.5, 1.0])
def test_the_line_does_not_idle_between_moves(empty: float) -> None:
    """However many of the pages that are told of turn out to be empty."""
    took = {name: simulated(eight(), name, empty=empty).run() for name in ("parallel", "feedback")}
    assert took["feedback"].faults == []
    assert took["feedback"].makespan <= 1.052 * took["parallel"].makespan
    assert took["feedback"].mean_individual <= 0.4 * took["parallel"].mean_individual


def test_a_round_trip_that_was_told_wrong_is_corrected() -> None:
    """The least of the last half minute may be that of another path: on the lab 70 s were taken for 46."""
    right, wrong = (simulated(eight(told_trip=trip), "feedback", empty=0.5).run() for trip in (_TRIP, 0.001))
    assert wrong.makespan <= 1.05 * right.makespan


def test_the_last_rounds_of_a_move_are_no_evidence_against_the_others() -> None:
    """They do not fill an interval: as if whoever was let send beside it had taken the rest away."""
    controller = Controller(replace(eight(), uplinks={"uplink": None}))
    rates = {"uuid-v0": 5.9 * MB, "uuid-v1": 0.1 * MB}
    left = {"uuid-v0": 20 * MB, "uuid-v1": 22 * MB}

    def step(now: float) -> None:
        moves = {uuid: Move(uuid, Phase.BULK, Rung.LIVE, left[uuid], rates[uuid]) for uuid in rates}
        views = {
            (f"home{host}", f"backup{host}"): PairView(True, rates[f"uuid-v{host - 1}"], _TRIP)
            for host in (1, 2)
        }
        controller.step(Observation(now, moves, views))

    controller.step(Observation(0.0))
    for number in range(3):
        step(2.0 * (number + 1))
    spare = controller.gates["uplink"].spare
    assert spare > 0
    rates["uuid-v0"], left["uuid-v0"] = 3.5 * MB, 2 * MB
    step(8.0)
    assert controller.gates["uplink"].spare >= spare
    assert controller.gates["uplink"].reason != "no-more-carried"


def test_how_long_lead_ins_take_on_a_busy_line_is_learnt() -> None:
    """Seen on the lab, with no opening made ahead: 8 to 9 s passed while others filled the line."""
    controller = Controller(eight())
    gate = controller.gates["uplink"]
    usual = gate.lead_in_seconds
    controller.step(Observation(0.0))
    for number in range(4):
        controller.step(Observation(2.0 + 2 * number, {"uuid-v0": Move("uuid-v0", Phase.LEAD_IN)}))
    assert gate.lead_in_seconds == usual
    controller.step(Observation(10.0, {"uuid-v0": Move("uuid-v0", Phase.BULK, remaining_bytes=22 * MB)}))
    assert gate.lead_in_seconds == pytest.approx(9.0)
    gate.saw_lead_in(100.0)
    assert gate.lead_in_seconds == pytest.approx(9.0), "that one had much to catch up with"


def wide(whole: SiteSummary, rate: float) -> Links:
    """A line on which one move carries 60 MB a second at most."""
    pairs = {pair.key: TruePair(pair.key, "uplink", rate, 60 * MB, 0.01, cores=16) for pair in whole.pairs}
    return Links({"uplink": rate}, pairs)


def test_a_ping_that_was_late_makes_nobody_begin_sooner() -> None:
    controller = Controller(eight())
    gate = controller.gates["uplink"]
    usual = gate.lead_in_seconds
    late = PairView(True, 0.0, 2.0, least_round_trip_seconds=_TRIP)
    controller.step(Observation(0.0, pairs={("home1", "backup1"): late}))
    assert gate.lead_in_seconds == pytest.approx(usual)


def test_what_was_caught_up_with_is_no_memory() -> None:
    """It goes by the same label: 4 GB of memory were told as five times what they came to."""
    packing = Packing()
    packing.look(600 * MB, {})
    packing.look(601 * MB, progress(4_000_000_000, 10_000_000, 0, 1, 0))
    packing.look(626 * MB, progress(3_900_000_000, 100_000_000, 0, 1, 0))
    assert packing.ratio == pytest.approx(26 / 100)


def test_a_sample_that_said_too_little_stops_no_guest_too_late() -> None:
    """It is believed for whose turn is next; whether a guest must be stopped now is asked of the worst."""
    guest = vm("a", memory=4000 * MB, packed_ratio=0.25, rungs=(Rung.LIVE, Rung.PAUSED, Rung.STAY))
    move = Move(
        "uuid-a", Phase.BULK, remaining_bytes=2000 * MB, sent_bytes=900 * MB, round_number=1,
        bytes_per_second=25 * MB, dirty_bytes_per_second=20 * MB,
    )  # fmt: skip
    told = Rounds().told({"uuid-a": move}, {"uuid-a": guest}, 0.0)["uuid-a"]
    assert told.remaining_bytes == 500 * MB
    fall, plain = (judge(guest, each, 25 * MB, 0.0, 86.0) for each in (told, move))
    assert fall == plain
    assert fall is not None
    assert fall.rung is Rung.PAUSED


def test_nobody_is_given_up_for_pages_that_may_be_empty() -> None:
    """On the lab, 10 Mbit/s: 33 MB as its sample said, 79 MB if no page that is left were empty."""
    guest = vm("a", memory=73 * MB, packed_ratio=0.45, rungs=(Rung.LIVE, Rung.PAUSED, Rung.STAY))
    move = Move(
        "uuid-a", Phase.BULK, remaining_bytes=30 * MB, most_remaining_bytes=79 * MB, sent_bytes=10 * MB,
        round_number=1, bytes_per_second=MB, dirty_bytes_per_second=2 * MB,
    )  # fmt: skip
    fall = judge(guest, move, MB, 0.04, 66.0)
    assert fall is not None
    assert fall.rung is Rung.PAUSED, "not a moment is to be lost"
    restart = judge(replace(guest, rungs=(Rung.LIVE, Rung.PAUSED, Rung.RESTART)), move, MB, 0.04, 66.0)
    assert restart is not None
    assert restart.rung is Rung.RESTART, "where it may, the way that is surely in time"
    only_live = replace(guest, rungs=(Rung.LIVE, Rung.STAY))
    assert judge(only_live, move, MB, 0.04, 66.0) is None
    too_late = judge(only_live, move, MB, 0.04, 24.0)
    assert too_late is not None
    assert (too_late.rung, too_late.reason) == (Rung.STAY, "too-late")


def test_in_the_first_round_a_guest_dirties_what_it_was_seen_to_dirty() -> None:
    """QEMU counts only when a round is over: until then a live move looked as if it made the deadline."""
    guest = vm("a", memory=200 * MB, packed_ratio=0.5, dirty_bytes_per_second=MB,
               rungs=(Rung.LIVE, Rung.PAUSED, Rung.STAY))  # fmt: skip
    move = Move("uuid-a", Phase.BULK, remaining_bytes=60 * MB, round_number=1, bytes_per_second=MB)
    for dirty in (MB, 4 * MB):
        fall = judge(replace(guest, dirty_bytes_per_second=dirty), move, MB, 0.04, 70.0)
        assert fall is not None
        assert (fall.rung, fall.reason) == (Rung.PAUSED, "deadline")
    assert judge(replace(guest, dirty_bytes_per_second=0.0), move, MB, 0.04, 70.0) is None
    later = replace(move, round_number=2)
    assert judge(guest, later, MB, 0.04, 70.0) is None, "from then on QEMU knows"


@pytest.mark.parametrize("rung", [Rung.PAUSED, Rung.RESTART])
def test_without_a_deadline_nobody_is_stopped_for_what_was_seen_before_it_moved(rung: Rung) -> None:
    """QEMU will tell soon enough whether it outruns the line."""
    guest = vm("a", memory=200 * MB, packed_ratio=0.5, dirty_bytes_per_second=4 * MB,
               rungs=(Rung.LIVE, rung, Rung.STAY))  # fmt: skip
    first = Move("uuid-a", Phase.BULK, remaining_bytes=60 * MB, round_number=1, bytes_per_second=MB)
    assert judge(guest, first, MB, 0.04, None) is None
    assert judge(guest, first, MB, 0.04, 1000.0) is None, "nor long before one"
    told = judge(guest, replace(first, round_number=2, dirty_bytes_per_second=2 * MB), MB, 0.04, None)
    assert told is not None
    assert (told.rung, told.reason) == (rung, "does-not-converge")


def pages_that_may_be_empty(rungs: tuple[Rung, ...], left: float, *, dirty: float = 0.0) -> Rung | None:
    """What becomes of one with 100 MB to send by its sample, 400 MB at worst, at 1 MB/s."""
    guest = vm("a", memory=400 * MB, rungs=(Rung.LIVE, *rungs, Rung.STAY))
    move = Move(
        "uuid-a", Phase.BULK, remaining_bytes=100 * MB, most_remaining_bytes=400 * MB, round_number=1,
        bytes_per_second=MB, dirty_bytes_per_second=dirty,
    )  # fmt: skip
    fall = judge(guest, move, MB, 0.0, left, certain=False)
    if fall is not None:
        assert fall.reason == "deadline"
    return fall.rung if fall is not None else None


def test_nobody_is_stopped_while_live_is_likely_in_time() -> None:
    """If the worst were so, a stop would be too late, too; a fall came 200 s before the likely end."""
    stop = (Rung.PAUSED,)
    assert pages_that_may_be_empty(stop, 300.0) is None
    assert pages_that_may_be_empty(stop, 150.0) is None
    assert pages_that_may_be_empty(stop, 125.0) is Rung.PAUSED, "the last moment, if its sample is right"
    assert pages_that_may_be_empty(stop, 102.0) is Rung.PAUSED
    # Its rounds take 200 s by its sample.
    assert pages_that_may_be_empty(stop, 300.0, dirty=0.5 * MB) is None
    assert pages_that_may_be_empty(stop, 195.0, dirty=0.5 * MB) is Rung.PAUSED
    # While even the worst is in time if it stands: the last moment for that.
    assert pages_that_may_be_empty(stop, 600.0, dirty=0.5 * MB) is None
    assert pages_that_may_be_empty(stop, 450.0, dirty=0.5 * MB) is Rung.PAUSED


def test_nobody_is_rebooted_while_live_is_likely_in_time() -> None:
    boot = (Rung.RESTART,)
    for rungs in (boot, (Rung.PAUSED, *boot)):
        assert pages_that_may_be_empty(rungs, 300.0) is None
        assert pages_that_may_be_empty(rungs, 101.0) is Rung.RESTART, "nothing else is surely in time"
        assert pages_that_may_be_empty(rungs, 195.0, dirty=0.5 * MB) is Rung.RESTART
    guest = vm("a", memory=400 * MB, rungs=(Rung.LIVE, *boot, Rung.STAY))
    few = Move("uuid-a", Phase.BULK, remaining_bytes=20 * MB, most_remaining_bytes=60 * MB, round_number=1)
    assert judge(guest, few, MB, 0.0, 50.0) is None
    fall = judge(guest, few, MB, 0.0, 34.0)
    assert fall is not None
    assert fall.rung is Rung.RESTART, "the last moment for one"


def test_one_that_may_not_be_stopped_is_rebooted_while_there_is_time_for_it() -> None:
    """Its memory is in time if it stands, which it may not; its rounds are not, if it dirties as before."""
    guest = vm("a", memory=30 * MB, dirty_bytes_per_second=2 * MB,
               rungs=(Rung.LIVE, Rung.RESTART, Rung.STAY))  # fmt: skip
    move = Move("uuid-a", Phase.BULK, remaining_bytes=25 * MB, round_number=1, bytes_per_second=MB)
    assert judge(guest, move, MB, 0.0, 60.0) is None, "QEMU may tell otherwise until then"
    fall = judge(guest, move, MB, 0.0, 34.0)
    assert fall is not None
    assert (fall.rung, fall.reason) == (Rung.RESTART, "deadline")
    assert judge(guest, replace(move, remaining_bytes=10 * MB), MB, 0.0, 20.0) is None, "no time for it"


@pytest.mark.parametrize(
    ("sizes", "count", "rate", "deadline"),
    [((60, 300, 1500), 20, 1000, 600.0), ((100, 300, 1500), 20, 120, 300.0), ((80,), 40, 60, 300.0)],
)
def test_no_guest_is_rebooted_because_its_move_had_a_trickle(
    sizes: tuple[int, ...], count: int, rate: float, deadline: float
) -> None:
    """The rate of the line is not known; the first ones are through within a look."""
    rungs = (Rung.LIVE, Rung.PAUSED, Rung.RESTART, Rung.STAY)
    whole = site(
        *(vm(f"v{number}", host=number % 2 + 1, memory=sizes[number % len(sizes)] * MB, rungs=rungs)
          for number in range(count)),
        rate=None,
        round_trip=0.01,
    )  # fmt: skip
    links = wide(whole, rate * MB)
    result = Simulation(whole, links, "feedback", deadline_seconds=deadline).run()
    assert [told for told in result.decisions if told[2].startswith("falls")] == []
    assert len(result.out_at) == count


def test_many_small_ones_fill_a_wide_line() -> None:
    whole = site(
        *(vm(f"v{number}", host=number % 2 + 1, memory=30 * MB) for number in range(60)),
        rate=None,
        round_trip=0.01,
    )
    assert Simulation(whole, wide(whole, 60 * MB), "feedback").run().makespan <= 60.0
