# SPDX-License-Identifier: GPL-3.0-or-later
"""A line of unknown rate: a wide one is found to be wide, and a wrong guess begins no crowd."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from ansible_collections.lifeboat.evacuation.plugins.module_utils._gate import Gate, Served
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import SiteSummary

from lifeboat_simulator.model import Links, TruePair
from lifeboat_simulator.run import Result, Simulation
from unit.plugins.coordination.sites import MB, site, vm

_STREAM = 6 * MB
_HORIZON = 300.0


def small(memory: float, trip: float) -> SiteSummary:
    """40 guests on three pairs that send 0.26 to 0.62 times ``memory``: most are through in some looks."""
    sizes = [memory * (0.6 + 0.8 * random.Random(number).random()) for number in range(40)]
    return site(
        *(vm(f"v{number}", host=number % 3 + 1, memory=size, packed_ratio=0.44)
          for number, size in enumerate(sizes)),
        rate=None,
        round_trip=trip,
    )  # fmt: skip


def alike(memory: float, expected: float | None, *, number: int = 30, dirty: float = 0.5 * MB) -> SiteSummary:
    """Guests on two pairs at 180 ms, of which it is guessed what they carry."""
    whole = site(
        *(vm(f"v{index}", host=index % 2 + 1, memory=memory, packed_ratio=0.44, dirty_bytes_per_second=dirty)
          for index in range(number)),
        rate=None,
        round_trip=0.18,
    )  # fmt: skip
    guessed = tuple(replace(pair, expected_bytes_per_second=expected) for pair in whole.pairs)
    return replace(whole, pairs=guessed)


def emptied(
    whole: SiteSummary, carries: float, strategy: str = "feedback", stream: float = _STREAM
) -> Result:
    pairs = {
        pair.key: TruePair(pair.key, "uplink", carries, min(stream, carries), pair.round_trip_seconds)
        for pair in whole.pairs
    }
    result = Simulation(whole, Links({"uplink": carries}, pairs), strategy).run()
    assert result.faults == []
    assert len(result.out_at) == len(whole.vms)
    return result


@pytest.mark.parametrize("trip", [0.02, 0.18])
@pytest.mark.parametrize("memory", [40 * MB, 60 * MB])
@pytest.mark.parametrize("streams", [2, 4, 8])
def test_a_wide_line_is_found_to_be_wide_by_small_vms(streams: int, memory: float, trip: float) -> None:
    """Nearly every look is one in which one takes the place of another: it stayed with two or three of 8."""
    whole = small(memory, trip)
    ours, all_at_once = (emptied(whole, streams * _STREAM, name) for name in ("feedback", "parallel"))
    assert ours.expected_share(_HORIZON) >= 0.92 * all_at_once.expected_share(_HORIZON)
    assert ours.makespan <= all_at_once.makespan + 36
    assert ours.mean_individual <= 0.65 * all_at_once.mean_individual


@pytest.mark.parametrize(
    ("memory", "trip", "longer"),
    [
        # Two that took turns within their first look seem to be what one can carry, half of it: that is
        # believed for long, and as many are begun as if the line were twice as wide.
        (40 * MB, 0.02, 3.3),
        (40 * MB, 0.18, 1.5),
        (60 * MB, 0.02, 1.5),
        (60 * MB, 0.18, 1.5),
    ],
)
def test_a_line_that_one_fills_is_not_taken_for_a_wide_one(memory: float, trip: float, longer: float) -> None:
    whole = small(memory, trip)
    ours, alone, all_at_once = (
        emptied(whole, _STREAM, name) for name in ("feedback", "sequential", "parallel")
    )
    assert ours.makespan <= 1.06 * all_at_once.makespan
    assert ours.mean_individual <= longer * alone.mean_individual


def crowded(gate: Gate, goodput: float, most: float) -> None:
    gate.observe_crowded(goodput, {}, most)


def test_more_than_one_can_get_twice_on_end_shows_room() -> None:
    gate = Gate(None)
    crowded(gate, 6 * MB, 6 * MB)
    crowded(gate, 9 * MB, 6 * MB)
    assert gate.spare == 0, "one look may have been of moves that overlapped"
    crowded(gate, 9 * MB, 6 * MB)
    assert gate.spare == pytest.approx(6 * MB)
    assert gate.open == 2


def test_more_than_one_can_get_now_and_then_shows_nothing() -> None:
    gate = Gate(None)
    for goodput in (6 * MB, 8 * MB, 6 * MB, 8 * MB, 6.5 * MB):
        crowded(gate, goodput, 6 * MB)
    assert gate.spare == 0


def test_of_a_line_whose_rate_is_known_it_shows_nothing_new() -> None:
    gate = Gate(12 * MB)
    for _look in range(4):
        crowded(gate, 11 * MB, 6 * MB)
    assert gate.spare == 0


def test_more_that_together_carry_no_more_end_the_doubling() -> None:
    """Of those that were open from the start each got less, and nobody saw it: they were through by then."""
    gate = Gate(None)
    for _look in range(3):
        crowded(gate, 12 * MB, 6 * MB)
    gate.observe(12 * MB, served(("a", "b"), 6 * MB), 6 * MB, more_wait=True)
    raised = gate.spare
    assert raised > 12 * MB
    gate.observe(12 * MB, served(("c", "d", "e", "f"), 3 * MB), 3 * MB, more_wait=True)
    assert gate.spare == pytest.approx(12 * MB)
    assert gate.reason == "no-more-carried"


def test_more_that_together_carry_more_are_followed_by_more() -> None:
    gate = Gate(None)
    for _look in range(3):
        crowded(gate, 12 * MB, 6 * MB)
    gate.observe(12 * MB, served(("a", "b"), 6 * MB), 6 * MB, more_wait=True)
    raised = gate.spare
    gate.observe(24 * MB, served(("c", "d", "e", "f"), 6 * MB), 6 * MB, more_wait=True)
    assert gate.spare > raised


def served(names: tuple[str, ...], each: float) -> dict[str, Served]:
    return {name: Served(each, True) for name in names}


@pytest.mark.parametrize("memory", [100 * MB, 400 * MB])
def test_a_right_guess_is_no_worse_than_none(memory: float) -> None:
    """Spare was doubled while nobody was there to take it, and six stood ready on a line that one fills."""
    guessed, unguessed = (emptied(alike(memory, guess), _STREAM) for guess in (_STREAM, None))
    assert guessed.mean_individual <= unguessed.mean_individual
    assert guessed.makespan <= 1.01 * unguessed.makespan
    assert guessed.most_at_once <= 3


def test_what_was_not_taken_is_not_doubled_where_the_guess_is_carried() -> None:
    gate = Gate(None)
    gate.expected = _STREAM
    for _look in range(3):
        gate.observe(_STREAM, {"a": Served(_STREAM, True)}, _STREAM, more_wait=True)
    assert gate.spare <= 0.25 * _STREAM
    assert gate.window == 1, "it carries what was guessed"


def test_a_guess_that_is_far_exceeded_holds_nothing_back() -> None:
    gate = Gate(None)
    gate.expected = _STREAM / 4
    for _look in range(3):
        gate.observe(_STREAM, {"a": Served(_STREAM, True)}, _STREAM, more_wait=True)
    assert gate.spare >= _STREAM


@pytest.mark.parametrize(
    ("memory", "carries", "dirty"), [(50 * MB, _STREAM, 0.5 * MB), (10 * MB, _STREAM / 10, 0.02 * MB)]
)
def test_a_guess_a_hundred_times_too_large_begins_no_crowd(
    memory: float, carries: float, dirty: float
) -> None:
    """Seventeen were begun while the first were in their lead-in, four at each look."""
    guessed, unguessed = (
        emptied(alike(memory, guess, dirty=dirty), carries, stream=60 * MB) for guess in (600 * MB, None)
    )
    assert guessed.most_at_once <= 8
    assert guessed.mean_individual <= 1.5 * unguessed.mean_individual
    assert guessed.makespan <= 1.03 * unguessed.makespan


def test_small_ones_begin_no_crowd_on_a_thin_line_that_nobody_knows() -> None:
    result = emptied(alike(10 * MB, None, dirty=0.02 * MB), _STREAM / 10, stream=60 * MB)
    assert result.most_at_once <= 6
