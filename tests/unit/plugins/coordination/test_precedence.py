# SPDX-License-Identifier: GPL-3.0-or-later
"""What a way that carries already may not outweigh: importance, who is waited for, and whom the plan saves;
and what may not hold up others: a guest that shuts down, and a way that is down."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ansible_collections.lifeboat.evacuation.plugins.module_utils._controller import Controller
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import Move, Phase
from ansible_collections.lifeboat.evacuation.plugins.module_utils._interval import Observation, PairView
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import (
    Rung,
    SiteSummary,
    VmSummary,
)

from lifeboat_simulator.model import Links, TruePair
from lifeboat_simulator.run import Result, Simulation
from unit.plugins.coordination.sites import MB, site, vm

_LINE = 6 * MB
_TRIP = 0.02


def emptied(whole: SiteSummary, deadline: float | None = None) -> Result:
    """The site by ``feedback``, over a line that one VM fills."""
    pairs = {pair.key: TruePair(pair.key, "uplink", _LINE, _LINE, _TRIP) for pair in whole.pairs}
    return Simulation(whole, Links({"uplink": _LINE}, pairs), "feedback", deadline_seconds=deadline).run()


def many(count: int = 30, *, host: int = 1, memory: float = 60 * MB, priority: int = 50) -> list[VmSummary]:
    return [vm(f"many{number}", host=host, memory=memory, priority=priority) for number in range(count)]


def test_who_is_more_important_does_not_wait_for_a_way_that_carries_already() -> None:
    first = vm("first", memory=60 * MB, priority=60)
    important = [vm(f"vip{number}", host=2, memory=60 * MB, priority=57) for number in range(5)]
    told = emptied(site(first, *important, *many(), rate=_LINE, round_trip=_TRIP)).out_at
    assert max(told[item.name] for item in important) < min(told[item.name] for item in many())


def test_one_of_the_way_that_carries_comes_first_if_it_is_among_the_next_and_not_for_long() -> None:
    first = vm("first", priority=90)
    others = [vm(f"vm{number:02}", host=number % 2 + 1, memory=(80 + number) * MB) for number in range(12)]
    controller = Controller(site(first, *others, rate=_LINE, round_trip=_TRIP))
    assert [uuid for uuid, _rung in controller.step(Observation(0.0)).starts] == ["uuid-first"]
    agenda, waiting = controller._agenda, {item.uuid: item for item in others}
    begun = []
    while waiting:
        begun.append(waiting.pop(agenda.in_turn(waiting, waiting)[0]))
        agenda.begins(begun[-1])
    # With the first one four of home1, then four of home2, and so on.
    assert [item.source[-1] for item in begun] == list("111222211122")
    ranks = [others.index(item) for item in begun]
    assert max(abs(rank - place) for place, rank in enumerate(ranks)) <= 4


def test_who_is_waited_for_keeps_its_place() -> None:
    first = vm("first", memory=20 * MB, priority=100)
    database = vm("db", host=2, memory=60 * MB)
    followers = [
        vm(f"app{number}", host=2, memory=60 * MB, priority=60, after=("db",)) for number in range(6)
    ]
    told = emptied(site(first, database, *followers, *many(), rate=_LINE, round_trip=_TRIP)).out_at
    assert told["db"] < min(told[item.name] for item in many())


def test_whom_the_plan_saves_before_a_deadline_is_not_put_off() -> None:
    first = vm("first", memory=60 * MB, priority=90)
    large = vm("large", host=2, memory=1500 * MB, priority=80)
    told = emptied(site(first, *many(8, memory=100 * MB), large, rate=_LINE, round_trip=_TRIP), 340.0).out_at
    assert "large" in told


def begun(first: VmSummary, move: Move, *, up: bool, known: float | None) -> list[tuple[float, str]]:
    """Who is begun when, in half a minute in which the first one stays as it is; ``up``: so does its way."""
    others = [vm(f"b{number}", host=2, memory=800 * MB) for number in range(5)]
    whole = site(first, *others, rate=known, round_trip=_TRIP)
    guess = None if known else _LINE
    whole = replace(
        whole, pairs=tuple(replace(pair, expected_bytes_per_second=guess) for pair in whole.pairs)
    )
    controller, moves, told = Controller(whole), dict[str, Move](), list[tuple[float, str]]()
    for look in range(15):
        now = 2.0 * look
        views = {
            pair.key: PairView(up or look < 2 or pair.key[0] == "home2", 0.0, _TRIP) for pair in whole.pairs
        }
        for uuid, _rung in controller.step(Observation(now, dict(moves), views)).starts:
            told.append((now, uuid))
            moves[uuid] = replace(move, vm=uuid) if uuid == first.uuid else Move(uuid, Phase.LEAD_IN)
    return told


@pytest.mark.parametrize("known", [_LINE, None])
@pytest.mark.parametrize(
    "move", [Move("", Phase.LEAD_IN), Move("", Phase.BULK, remaining_bytes=3e9, round_number=1)]
)
def test_a_way_that_is_down_holds_up_nobody_else(move: Move, known: float | None) -> None:
    large = vm("a", memory=4000 * MB, priority=100)
    down = begun(large, move, up=False, known=known)
    assert [uuid for _at, uuid in down[:2]] == ["uuid-a", "uuid-b0"]
    assert down[1][0] == 4.0
    assert [uuid for _at, uuid in begun(large, move, up=True, known=known)] == ["uuid-a"]


@pytest.mark.parametrize("known", [_LINE, None])
def test_a_guest_that_shuts_down_sends_no_memory_and_holds_up_nobody(known: float | None) -> None:
    leaving = vm(
        "a", memory=4000 * MB, lag_bytes=MB, priority=100, rungs=(Rung.RESTART, Rung.STAY), packed_ratio=0.44
    )
    told = begun(leaving, Move("", Phase.LEAD_IN, Rung.RESTART), up=True, known=known)
    assert told[:2] == [(0.0, "uuid-a"), (0.0, "uuid-b0")]
