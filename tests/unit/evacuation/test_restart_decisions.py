# SPDX-License-Identifier: GPL-3.0-or-later
"""A VM that leaves by restart, with kills, reboots, partitions, lost replies and people in between.

Two hosts have few states: all of them are looked at, by every way that leads there. What the proxies do is
taken from the decision functions, with durable state only: a SIGKILL is any point between two lines.
Whoever settles by hand is left out: it is a person's word.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from precache_proxy.evacuation.arrival import RUNS_HERE, ArrivalState
from precache_proxy.evacuation.job import FOLLOWING, Step
from precache_proxy.evacuation.reconcile import (
    ArrivalDecision,
    DestinationView,
    Presence,
    SourceDecision,
    decide_at_destination,
    decide_at_source,
)

OFF = {Presence.SHUT_OFF, Presence.ENDED}
ENDED = {Step.DONE, Step.STAYED}
GONE = {None, ArrivalState.LANDED, ArrivalState.ABORTED}


@dataclass(frozen=True)
class World:
    """``guarded``: a start at the source is refused, from the stop on."""

    contact: bool = True
    step: Step = Step.CATCH_UP
    source: Presence = Presence.RUNNING
    guarded: bool = False
    was_released: bool = False
    owes_abort: bool = False
    arrival: ArrivalState | None = None
    destination: Presence = Presence.ABSENT
    called_off: bool = False


def what_the_world_does(now: World) -> Iterator[World]:
    yield replace(now, contact=not now.contact)
    if now.source is not Presence.ABSENT:
        yield replace(now, source=Presence.SHUT_OFF)
    if now.destination is not Presence.ABSENT:
        yield replace(now, destination=Presence.SHUT_OFF)
    if now.source in OFF and not now.guarded:
        yield replace(now, source=Presence.RUNNING)
    if now.destination in OFF and now.arrival in RUNS_HERE:
        yield replace(now, destination=Presence.RUNNING)


def the_way_forward(now: World) -> Iterator[World]:
    """Each line of it, with a kill after it."""
    if now.step is Step.CATCH_UP:
        yield replace(now, step=Step.STOP, guarded=True)
        yield replace(now, step=Step.STOP, guarded=True, source=Presence.ENDED)
    elif now.step is Step.STOP and now.source in OFF:
        yield replace(now, step=Step.RESIDUAL)
    elif now.step is Step.RESIDUAL and now.source in OFF and not now.called_off:
        asked = replace(now, step=Step.PREPARE, owes_abort=True)
        yield asked
        if now.contact:
            recorded = replace(asked, arrival=ArrivalState.PREPARED)
            yield recorded
            yield replace(recorded, destination=Presence.SHUT_OFF)
            yield replace(recorded, destination=Presence.ARRIVED)


def the_source(now: World, *, faults: bool) -> Iterator[World]:
    """What its proxy does next, from whatever a kill left."""
    if now.step is Step.STAYED and now.owes_abort and now.contact:
        assert now.arrival not in RUNS_HERE
        yield cleared(now)
    if now.step in ENDED or now.step is Step.CATCH_UP:
        return
    view = DestinationView(now.contact, now.arrival if now.contact else None, now.destination)
    decision = decide_at_source(now.step, now.source, view, restarts=True)
    goes_to = {
        SourceDecision.CONFIRM: Step.CONFIRM,
        SourceDecision.ROLL_BACK: Step.ROLLBACK,
        SourceDecision.ROLL_BACK_COLD: Step.ROLLBACK,
        SourceDecision.FINISH: Step.FINISH,
    }.get(decision, now.step)
    assert goes_to is now.step or goes_to in FOLLOWING[now.step], (now, decision)
    if decision is SourceDecision.CONFIRM:
        confirmed = replace(now, step=Step.CONFIRM, guarded=True)
        if faults or now.source not in OFF:
            yield confirmed
        if now.source in OFF:
            released = replace(confirmed, step=Step.RELEASED, was_released=True)
            yield from told(released, faults=faults)
    elif decision is SourceDecision.RELEASE:
        yield from told(now, faults=faults)
    elif decision in {SourceDecision.ROLL_BACK, SourceDecision.ROLL_BACK_COLD}:
        yield from rolled_back(now, faults=faults)
    elif decision is SourceDecision.FINISH:
        yield replace(now, step=Step.DONE, guarded=True, source=Presence.ABSENT)


def told(now: World, *, faults: bool) -> Iterator[World]:
    """The destination hears of the release, or not, or its answer is lost."""
    if faults or not now.contact:
        yield now
    if not now.contact or now.arrival is None:
        return
    whole = now.destination in {Presence.ARRIVED, Presence.RUNNING}
    if now.arrival is ArrivalState.PREPARED and not whole:
        return
    if now.arrival in {ArrivalState.PREPARED, ArrivalState.RELEASED}:
        now = replace(now, arrival=ArrivalState.RELEASED)
        if faults:
            yield now
        now = replace(now, arrival=ArrivalState.ACTIVATED, destination=Presence.RUNNING)
    if faults:
        yield now
    if now.arrival in RUNS_HERE:
        yield replace(now, step=Step.FINISH)


def rolled_back(now: World, *, faults: bool) -> Iterator[World]:
    """As rollback.py does it: the peer's word must come first only after a release."""
    now = replace(now, step=Step.ROLLBACK)
    if faults:
        yield now
    if now.owes_abort and now.contact:
        if now.arrival is ArrivalState.RELEASED:
            now = replace(now, arrival=ArrivalState.ACTIVATED, destination=Presence.RUNNING)
        if now.arrival in RUNS_HERE:
            yield replace(now, step=Step.FINISH)
            return
        now = cleared(now)
        if faults:
            yield now
    elif now.owes_abort and now.was_released:
        yield now
        return
    yield replace(now, step=Step.STAYED, guarded=False, source=Presence.RUNNING)


def cleared(now: World) -> World:
    if now.arrival is None:
        return replace(now, owes_abort=False, called_off=True)
    return replace(
        now, owes_abort=False, called_off=True, arrival=ArrivalState.ABORTED, destination=Presence.ABSENT
    )


def the_destination(now: World, *, faults: bool) -> Iterator[World]:
    if now.arrival is None or now.arrival in GONE:
        return
    step = now.step if now.contact else None
    decision = decide_at_destination(now.arrival, now.destination, step, source_reachable=now.contact)
    if decision is ArrivalDecision.ABORT:
        assert now.arrival not in RUNS_HERE
        yield replace(now, arrival=ArrivalState.ABORTED, destination=Presence.ABSENT)
    elif decision in {ArrivalDecision.ACTIVATE, ArrivalDecision.ACTIVATE_COLD}:
        assert now.arrival is ArrivalState.RELEASED, "only a release, or a person, lets it run"
        now = replace(now, destination=Presence.RUNNING)
        if faults:
            yield now
        yield replace(now, arrival=ArrivalState.ACTIVATED)
    elif decision is ArrivalDecision.RECORD_ACTIVATED:
        yield replace(now, arrival=ArrivalState.ACTIVATED)


def check(now: World) -> None:
    assert not (now.source is Presence.RUNNING and now.destination is Presence.RUNNING), "twice"
    assert not (now.source is Presence.ABSENT and now.arrival not in RUNS_HERE), "nowhere"
    if now.step in {Step.RELEASED, Step.FINISH, Step.DONE}:
        assert now.guarded
        assert now.source is not Presence.RUNNING


def settle(now: World) -> World:
    """With contact and without further faults."""
    now = replace(now, contact=True)
    for _round in range(8):
        for side in (the_source, the_destination):
            now = next(reversed([now, *side(now, faults=False)]))
            check(now)
    return now


def reachable() -> set[World]:
    found, ahead = {World()}, [World()]
    while ahead:
        now = ahead.pop()
        check(now)
        for further in (
            *what_the_world_does(now),
            *the_way_forward(now),
            *the_source(now, faults=True),
            *the_destination(now, faults=True),
        ):
            if further not in found:
                found.add(further)
                ahead.append(further)
    return found


def test_in_every_state_it_runs_once_at_most_and_comes_to_an_end_in_one_place() -> None:
    found = reachable()
    assert {state.step for state in found} >= {Step.STOP, Step.PREPARE, Step.RELEASED, Step.ROLLBACK, *ENDED}
    for state in found:
        if state.step is Step.CATCH_UP:
            continue
        end = settle(state)
        assert end.step in ENDED, (state, end)
        assert (end.arrival in RUNS_HERE) == (end.step is Step.DONE), (state, end)
        if end.step is Step.STAYED:
            assert end.arrival in GONE, (state, end)


def test_a_guest_that_was_ended_runs_again_without_contact_until_it_is_released() -> None:
    alone = DestinationView(reachable=False)
    for step in (Step.STOP, Step.RESIDUAL, Step.PREPARE, Step.CONFIRM, Step.ROLLBACK):
        assert decide_at_source(step, Presence.ENDED, alone, restarts=True) is SourceDecision.ROLL_BACK_COLD
    assert decide_at_source(Step.RELEASED, Presence.ENDED, alone, restarts=True) is SourceDecision.WAIT
    # Of a live one the memory may be there, and one that its user ended is not brought back.
    assert decide_at_source(Step.CONFIRM, Presence.SHUT_OFF, alone) is SourceDecision.WAIT
    assert decide_at_source(Step.CONFIRM, Presence.ENDED, alone) is SourceDecision.ROLL_BACK
