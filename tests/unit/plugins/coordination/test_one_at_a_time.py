# SPDX-License-Identifier: GPL-3.0-or-later
"""A line that one move fills: who stands ready is few, and who sends has all of it."""

from __future__ import annotations

import statistics
from copy import deepcopy
from dataclasses import replace

import pytest
from ansible_collections.lifeboat.evacuation.plugins.module_utils._controller import Controller
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import Move, Phase
from ansible_collections.lifeboat.evacuation.plugins.module_utils._gate import Gate, Served
from ansible_collections.lifeboat.evacuation.plugins.module_utils._interval import Observation, PairView
from ansible_collections.lifeboat.evacuation.plugins.module_utils._packing import Packing
from ansible_collections.lifeboat.evacuation.plugins.module_utils._shares import Shares
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import (
    DEFAULT_PACKED_RATIO,
    PairSummary,
    Rung,
    SiteSummary,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._under_way import UnderWay
from ansible_collections.lifeboat.evacuation.plugins.module_utils._uplinks import Uplinks

from lifeboat_simulator.model import Links, TruePair
from lifeboat_simulator.run import Result, Simulation
from unit.plugins.coordination.sites import MB, MBIT, site, vm

_TRIP = 0.18
_CARRIED = 47 * MBIT


def eight(expected: float | None) -> SiteSummary:
    """Guests of 22 MB on two hosts, on a line of 50 Mbit/s and 180 ms that nobody knows the rate of."""
    whole = site(
        *(vm(f"v{number}", host=number % 2 + 1, memory=50 * MB, packed_ratio=0.44)
          for number in range(8)),
        rate=None,
        round_trip=_TRIP,
    )  # fmt: skip
    return replace(
        whole, pairs=tuple(replace(pair, expected_bytes_per_second=expected) for pair in whole.pairs)
    )


def emptied(whole: SiteSummary, strategy: str, *, busy_lead_in: float = 1.0) -> Result:
    pairs = {
        pair.key: TruePair(pair.key, "uplink", _CARRIED, _CARRIED, _TRIP, busy_lead_in=busy_lead_in)
        for pair in whole.pairs
    }
    result = Simulation(whole, Links({"uplink": _CARRIED}, deepcopy(pairs)), strategy).run()
    assert result.faults == []
    return result


@pytest.mark.parametrize(
    ("expected", "longest"),
    [(None, 1.6), (_CARRIED, 1.35), (1.16 * _CARRIED, 1.35), (1.36 * _CARRIED, 1.35)],
    ids=["unknown", "known", "guessed too high", "guessed higher still"],
)
def test_a_vm_takes_little_longer_among_eight_than_alone(expected: float | None, longest: float) -> None:
    """With four begun at once on the idle line they took 2.2 times as long as alone."""
    whole = eight(expected)
    ours, alone, all_at_once = (emptied(whole, name) for name in ("feedback", "sequential", "parallel"))
    assert ours.makespan <= 1.06 * all_at_once.makespan
    assert ours.mean_individual <= longest * alone.mean_individual
    spread = [ours.out_at[name] - ours.started_at[name] for name in ours.out_at]
    assert max(spread) <= 1.6 * statistics.mean(spread)


@pytest.mark.parametrize(
    ("expected", "room", "leaving"),
    [(1.36 * _CARRIED, 0, 1), (_CARRIED, 0, 0), (None, 1, 0)],
    ids=["the next one has its place", "it is the next one that makes none", "more may be needed"],
)
def test_one_that_is_nearly_over_makes_room_for_the_next_not_for_a_third(
    expected: float | None, room: int, leaving: int
) -> None:
    whole = eight(expected)
    vms = {vm.uuid: vm for vm in whole.vms}
    uplinks = Uplinks(whole, "feedback", vms)
    (gate,) = uplinks.gates.values()
    gate.stream = 6 * MB
    gate.observe_crowded(6 * MB, {})
    told = {"uuid-v0": sends(2 * MB, 6 * MB), "uuid-v1": sends(60 * MB, 0.1 * MB)}
    moves = {uuid: replace(move, vm=uuid) for uuid, move in told.items()}
    views = {pair.key: PairView(True, 3 * MB, _TRIP) for pair in whole.pairs}
    under_way = UnderWay(Observation(10.0, moves, views), (), vms, uplinks, {})
    assert under_way.room == {id(gate): room}
    assert under_way.leaving.get(id(gate), 0) == leaving


@pytest.mark.parametrize("guessed", [0.5, 1.16])
def test_a_guest_that_is_to_be_stopped_begins_when_one_is_nearly_over(guessed: float) -> None:
    """It is to stand in no queue; but who leaves is none."""
    rate, trip = 50 * MB, 0.02
    names = [vm(f"v{n}", host=n % 2 + 1, memory=22 * MB, rungs=(Rung.PAUSED, Rung.STAY)) for n in range(10)]
    whole = site(*names, rate=None, round_trip=trip)
    pairs = {pair.key: TruePair(pair.key, "uplink", rate, 0.3 * rate, trip) for pair in whole.pairs}
    unguessed = Simulation(whole, Links({"uplink": rate}, deepcopy(pairs)), "feedback").run()
    told = tuple(replace(pair, expected_bytes_per_second=guessed * rate) for pair in whole.pairs)
    took = Simulation(replace(whole, pairs=told), Links({"uplink": rate}, pairs), "feedback").run()
    assert took.makespan <= 1.1 * unguessed.makespan


def test_a_line_that_carries_more_than_it_did_is_found_to() -> None:
    """What a pair carried when it was pressed last is a guess, and holds nobody back."""
    whole = eight(10 * MBIT)
    pairs = {pair.key: TruePair(pair.key, "uplink", 50 * MB, 5 * MB, _TRIP) for pair in whole.pairs}
    took = Simulation(whole, Links({"uplink": 50 * MB}, pairs), "feedback").run()
    unguessed = Simulation(eight(None), Links({"uplink": 50 * MB}, deepcopy(pairs)), "feedback").run()
    assert took.makespan <= 1.25 * unguessed.makespan


def step(gate: Gate, name: str, got: float, others: float) -> None:
    """One sends fully, another has what is spare."""
    served = {name: Served(got, True), "other": Served(others, False, max(gate.spare, others))}
    gate.observe(got + others, served, got, more_wait=True)


def test_spare_that_brings_nothing_is_taken_back_whoever_sends() -> None:
    """Small ones fill no two intervals: by what each of them gets it would never show."""
    gate = Gate(None)
    step(gate, "a", 5.9 * MB, 0.1 * MB)
    assert gate.spare > 0
    step(gate, "b", 6.0 * MB - gate.spare, gate.spare)
    assert gate.spare == 0
    assert gate.reason == "no-more-carried"


def test_spare_that_is_carried_beside_the_first_is_kept() -> None:
    gate = Gate(None)
    step(gate, "a", 5.9 * MB, 0.1 * MB)
    before = gate.spare
    step(gate, "b", 5.9 * MB, before)
    assert gate.spare >= before > 0


def test_an_interval_with_a_gap_is_no_evidence() -> None:
    gate = Gate(None)
    step(gate, "a", 5.9 * MB, 0.1 * MB)
    before = gate.spare
    step(gate, "b", 2.0 * MB, before)
    assert gate.spare >= before > 0


def members(*told: tuple[str, int, Move]) -> list[tuple[object, Move]]:
    return [(vm(name, host=host), replace(move, vm=f"uuid-{name}")) for name, host, move in told]


def sends(left: float, rate: float) -> Move:
    return Move("", Phase.BULK, remaining_bytes=left, bytes_per_second=rate, round_number=1)


def filled() -> Gate:
    """A gate that one move fills, by 6 MB a second at 180 ms."""
    gate = Gate(None)
    gate.round_trip_seconds = _TRIP
    gate.stream = 6 * MB
    gate.observe_crowded(6 * MB, {})
    return gate


def shares_of(shares: Shares, gate: Gate, *told: tuple[str, int, Move]) -> dict[str, float | None]:
    entries = members(*told)
    moves = {move.vm: move for _vm, move in entries}
    given = shares.share([(gate, entries)], moves)  # type: ignore[list-item]
    return {uuid.removeprefix("uuid-"): share for uuid, share in given.items()}


def test_the_next_one_opens_when_the_first_is_through_and_not_at_the_look_before() -> None:
    """Else they share the line until then, and the first one is later by that."""
    shares, gate = Shares(), filled()
    shares_of(shares, gate, ("a", 1, sends(20 * MB, 6 * MB)), ("b", 1, sends(22 * MB, 0.1 * MB)))
    given = shares_of(shares, gate, ("a", 1, sends(14.4 * MB, 6 * MB)), ("b", 1, sends(22 * MB, 0.1 * MB)))
    assert given["a"] is None
    assert given["b"] is not None
    # 2.4 s for the first, five round trips until the other's stream has grown.
    assert shares.ends_in == {"uuid-b": pytest.approx(1.5)}
    assert gate.open == 1
    given = shares_of(shares, gate, ("a", 1, sends(2.4 * MB, 6 * MB)), ("b", 1, sends(20 * MB, 1 * MB)))
    assert given == {"a": None, "b": None}
    assert shares.ends_in == {}


def test_one_that_has_long_to_send_keeps_the_others_out() -> None:
    shares, gate = Shares(), filled()
    for left in (60 * MB, 48 * MB):
        given = shares_of(shares, gate, ("a", 1, sends(left, 6 * MB)), ("b", 1, sends(66 * MB, 0.1 * MB)))
    assert given["a"] is None
    assert given["b"] == pytest.approx(0.05 * 6 * MB)
    assert shares.ends_in == {}


def test_a_lead_in_keeps_no_place_from_one_that_has_something_to_send() -> None:
    shares, gate = Shares(), filled()
    lead = Move("", Phase.LEAD_IN)
    first = shares_of(shares, gate, ("a", 1, lead), ("b", 2, lead))
    assert first["a"] is None, "whoever began first will be the first to send"
    assert first["b"] is not None
    then = shares_of(shares, gate, ("a", 1, lead), ("b", 2, sends(22 * MB, 0.1 * MB)))
    assert then["a"] is not None
    assert then["b"] is None


def test_where_one_at_a_time_sends_the_next_goes_the_same_way() -> None:
    """A way that only trickled took seconds until it carried what the line can."""
    shares, gate = Shares(), filled()
    other, same = sends(21 * MB, 0.1 * MB), sends(22 * MB, 0.1 * MB)
    shares_of(shares, gate, ("a", 1, sends(20 * MB, 6 * MB)), ("b", 2, other), ("c", 1, same))
    given = shares_of(shares, gate, ("a", 1, sends(3 * MB, 6 * MB)), ("b", 2, other), ("c", 1, same))
    assert given["c"] is None
    assert given["b"] is not None
    much = sends(80 * MB, 0.1 * MB)
    shares = Shares()
    shares_of(shares, gate, ("a", 1, sends(20 * MB, 6 * MB)), ("b", 2, other), ("c", 1, much))
    given = shares_of(shares, gate, ("a", 1, sends(3 * MB, 6 * MB)), ("b", 2, other), ("c", 1, much))
    assert given["b"] is None, "one that is through so much sooner comes first"


def test_vms_of_one_pair_are_begun_one_after_the_other() -> None:
    controller = Controller(eight(_CARRIED))
    begun: list[str] = []
    out: set[str] = set()
    moves: dict[str, Move] = {}
    for number in range(12):
        views = {pair.key: PairView(True, 0.0, _TRIP) for pair in controller.site.pairs}
        orders = controller.step(Observation(2.0 * number, dict(moves), views, set(out)))
        for uuid, _rung in orders.starts:
            begun.append(controller.source_of(uuid))
            moves[uuid] = Move(uuid, Phase.LEAD_IN)
        if number > 2 and moves:
            first = next(iter(moves))
            moves.pop(first)
            out.add(first)
    assert len(begun) >= 5
    assert begun[:4] == [begun[0]] * 4


def test_a_group_is_not_parted_for_the_sake_of_a_way() -> None:
    whole = eight(_CARRIED)
    grouped = tuple(replace(item, group="shop") if item.name in {"v0", "v1"} else item for item in whole.vms)
    controller = Controller(replace(whole, vms=grouped))
    begun: list[str] = []
    out: set[str] = set()
    moves: dict[str, Move] = {}
    for number in range(12):
        orders = controller.step(Observation(2.0 * number, dict(moves), out=set(out)))
        begun += [uuid for uuid, _rung in orders.starts]
        moves |= {uuid: Move(uuid, Phase.LEAD_IN) for uuid, _rung in orders.starts}
        if number > 2 and moves:
            first = next(iter(moves))
            moves.pop(first)
            out.add(first)
    places = sorted(begun.index(f"uuid-v{number}") for number in range(2))
    assert places[1] == places[0] + 1


def test_nobody_is_begun_while_the_first_is_about_to_tell_what_the_line_carries() -> None:
    controller = Controller(eight(None))
    first = dict(controller.step(Observation(0.0)).starts)
    assert 2 <= len(first) <= 3, "to try with"
    moves = {uuid: Move(uuid, Phase.BULK, remaining_bytes=20 * MB, round_number=1) for uuid in first}
    assert controller.step(Observation(2.0, moves)).starts == []


def test_lead_ins_beside_others_that_send_are_thought_to_take_longer_until_one_is_seen() -> None:
    gate = Gate(None)
    gate.round_trip_seconds = _TRIP
    usual = gate.lead_in_seconds
    assert gate.idle_lead_in_seconds < usual
    gate.saw_lead_in(1.5, busy=False)
    assert gate.idle_lead_in_seconds == pytest.approx(1.5)
    assert gate.lead_in_seconds == usual
    gate.saw_lead_in(2.5)
    assert gate.lead_in_seconds == pytest.approx(2.5)
    assert usual > 2.5


def test_a_longer_lead_in_counts_at_once_and_a_shorter_one_by_and_by() -> None:
    """Who begins too late leaves the line idle for all; who begins too early waits."""
    gate = Gate(None)
    gate.round_trip_seconds = _TRIP
    seen = []
    for seconds in (3.0, 5.0, 3.0, 3.0):
        gate.saw_lead_in(seconds)
        seen.append(gate.lead_in_seconds)
    assert seen == pytest.approx([3.0, 5.0, 4.2, 3.72])
    gate.saw_lead_in(9.0, busy=False)
    assert gate.idle_lead_in_seconds <= gate.lead_in_seconds


@pytest.mark.parametrize("busy_lead_in", [1.0, 1.6, 2.2])
@pytest.mark.parametrize("expected", [None, _CARRIED])
def test_eight_vms_are_out_soon_and_each_of_them_is_quick(
    expected: float | None, busy_lead_in: float
) -> None:
    """Table `coordination`: makespan against the best fixed number, and J against one at a time."""
    whole = eight(expected)
    names = ("feedback", "sequential", "static:1", "static:2", "parallel")
    took = {name: emptied(whole, name, busy_lead_in=busy_lead_in) for name in names}
    ours, alone = took["feedback"], took["sequential"]
    assert ours.makespan <= 1.08 * min(result.makespan for result in took.values())
    assert ours.makespan * ours.mean_individual <= 1.02 * alone.makespan * alone.mean_individual
    horizon = max(result.makespan for result in took.values())
    best = max(result.expected_share(horizon) for result in took.values())
    assert ours.expected_share(horizon) >= 0.95 * best


def progress(pages: int, left: int) -> dict[str, int]:
    return {
        "memory_total_bytes": 101_457_920, "memory_remaining_bytes": left, "memory_normal_bytes": pages,
        "memory_constant": 100, "memory_iteration": 1, "memory_page_size": 4096,
    }  # fmt: skip


def test_what_a_trickle_has_in_buffers_has_not_crossed() -> None:
    """QEMU counts it as sent: 10 MB were told as left of one that had 21, and others were let in."""
    packing = Packing()
    packing.look(0.0, progress(0, 101_000_000))
    packing.look(0.4 * MB, progress(9_000_000, 92_000_000))
    assert packing.ratio == DEFAULT_PACKED_RATIO
    assert packing.sent_bytes == pytest.approx(0.4 * MB)
    assert packing.left_bytes == pytest.approx(0.45 * 92 * MB, rel=0.05)
    packing.look(8 * MB, progress(30_000_000, 71_000_000))
    assert packing.ratio == pytest.approx(8 / 30)
    packed_well = Packing()
    packed_well.look(0.0, progress(0, 101_000_000))
    packed_well.look(1.6 * MB, progress(40_000_000, 61_000_000))
    assert packed_well.ratio == pytest.approx(0.04)


def test_what_a_way_carried_is_a_guess_at_a_line_that_nobody_knows() -> None:
    pairs = (
        PairSummary("home1", "backup1", "home", expected_bytes_per_second=5 * MB),
        PairSummary("home2", "backup2", "home", expected_bytes_per_second=6 * MB),
    )
    unknown = SiteSummary("home", (), pairs, uplinks={"home": None})
    assert unknown.guessed().uplinks == {"home": 6 * MB}
    known = replace(unknown, uplinks={"home": 50 * MB})
    assert known.guessed().uplinks == {"home": 50 * MB}
    nothing = replace(unknown, pairs=tuple(replace(pair, expected_bytes_per_second=None) for pair in pairs))
    assert nothing.guessed().uplinks == {"home": None}
