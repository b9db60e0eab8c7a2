# SPDX-License-Identifier: GPL-3.0-or-later
"""A VM that leaves by restart, with kills, reboots, partitions, lost replies and people in between.

Two hosts have few states: all of them are looked at, by every way that leads there. What the proxies do is
taken from the decision functions, with durable state only: a SIGKILL is any point between two lines.
Whoever settles by hand is left out: it is a person's word. So is who starts the VM by hand at a home that was
taken for dead and has not heard of it yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

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
SAID, KILLED = "said", "killed"
# Later a cancel is refused.
CANCELLABLE = {Step.CATCH_UP, Step.STOP, Step.RESIDUAL, Step.PREPARE}
SILENT_DECISIONS = {SourceDecision.WAIT, SourceDecision.FINISH, SourceDecision.NOTHING}


@dataclass(frozen=True)
class World:
    """``guarded``: a start at the source is refused. ``asked``: the guest was asked to shut down and has not
    ended since; ``watched``: that was given up, and it may yet obey. ``fenced``: without contact for so long
    that the destination may presume the source dead soon (only where ``presumes``). ``down``: the source's
    host is off, ``rebooted``: it was; ``taken``: it runs at the destination from a generation, on the word
    that the source is dead (only where ``fails_over``); ``taking``: it stands there for that and is not
    released, its command under way (SAID) or interrupted by a kill (KILLED)."""

    presumes: bool = False
    fails_over: bool = False
    down: bool = False
    rebooted: bool = False
    taken: bool = False
    taking: str = ""
    contact: bool = True
    step: Step = Step.CATCH_UP
    source: Presence = Presence.RUNNING
    guarded: bool = False
    asked: bool = False
    watched: bool = False
    cancelled: bool = False
    fenced: bool = False
    was_released: bool = False
    owes_abort: bool = False
    arrival: ArrivalState | None = None
    destination: Presence = Presence.ABSENT
    called_off: bool = False


def what_the_world_does(now: World) -> Iterator[World]:
    if now.down:
        yield replace(now, down=False, rebooted=True)
        yield from the_operator_there(now)
        return
    yield replace(now, contact=not now.contact)
    if now.fails_over:
        off = now.source if now.source is Presence.ABSENT else Presence.SHUT_OFF
        yield replace(now, source=off, asked=False, watched=False, down=True, contact=False)
    if now.source is not Presence.ABSENT:
        # Its host loses power; what was asked of its guest is void.
        yield replace(now, source=Presence.SHUT_OFF, asked=False, watched=False)
    if now.destination is not Presence.ABSENT:
        yield replace(now, destination=Presence.SHUT_OFF)
    if now.source in OFF and not now.guarded and not (now.taken or now.taking):
        yield replace(now, source=Presence.RUNNING, asked=False, watched=False)
    if now.destination in OFF and now.arrival in RUNS_HERE:
        yield replace(now, destination=Presence.RUNNING)
    if (now.asked or now.watched) and now.source is Presence.RUNNING:
        yield replace(now, source=Presence.ENDED, asked=False)
    if now.step in CANCELLABLE and not now.cancelled:
        yield replace(now, cancelled=True)
    if now.presumes and now.owes_abort and not now.contact and not now.fenced:
        still = Presence.PAUSED if now.source is Presence.RUNNING else now.source
        yield replace(now, fenced=True, guarded=True, source=still)


def the_operator_there(now: World) -> Iterator[World]:
    """The home is dead, and that is said where its replica is. What stands there whole is not thrown away."""
    whole = now.destination in {Presence.ARRIVED, Presence.RUNNING}
    if (
        not (now.taken or now.taking)
        and now.arrival in {None, ArrivalState.PREPARED, ArrivalState.ABORTED}
        and not whole
    ):
        aborted = None if now.arrival is None else ArrivalState.ABORTED
        yield replace(now, taking=SAID, arrival=aborted, destination=Presence.ARRIVED)


def the_fail_over(now: World, *, faults: bool) -> Iterator[World]:
    """From its PREPARED on (fail_over.py): the home's word, and without contact the operator's, while it is
    just said: one that was killed may have been refused."""
    if not now.taking:
        return
    if faults:
        yield replace(now, taking=KILLED)
    if now.contact:
        if now.source in {Presence.RUNNING, Presence.PAUSED} or now.step not in ENDED:
            if faults:
                # Killed before the refusal is acted upon.
                yield replace(now, taking=KILLED)
            yield replace(now, taking="", destination=Presence.ABSENT)
            return
        now = replace(now, guarded=True, source=Presence.ABSENT, owes_abort=False, watched=False)
        if faults:
            yield replace(now, taking=KILLED)
    elif now.taking == KILLED and now.source is not Presence.ABSENT:
        return
    yield replace(now, taking="", taken=True, destination=Presence.RUNNING)


def the_home_hears(now: World) -> Iterator[World]:
    """That its VM runs from a generation (giving_up.py)."""
    if now.taken and now.contact and now.source is not Presence.ABSENT:
        told = replace(now, guarded=True)
        yield told
        yield replace(told, source=Presence.ABSENT, step=Step.DONE, owes_abort=False, watched=False)


def the_way_forward(now: World) -> Iterator[World]:
    """Each line of it, with a kill after it."""
    # A job that a reboot found under way goes back, not on.
    if now.cancelled or now.fenced or now.down or now.rebooted:
        return
    if now.step is Step.CATCH_UP and now.source is Presence.RUNNING:
        stopping = replace(now, step=Step.STOP, guarded=True)
        yield stopping
        yield replace(stopping, asked=True)
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
    if now.down:
        return
    if now.step is Step.STAYED:
        yield from after_the_end(now)
    if now.step in ENDED:
        yield from the_home_hears(now)
        return
    if now.contact and now.arrival is not ArrivalState.RELEASED and now.arrival not in RUNS_HERE:
        # Whatever is asked and answered holds off the fence, but for "it was let run here".
        now = replace(now, fenced=False)
    view = DestinationView(now.contact, now.arrival if now.contact else None, now.destination)
    if faults:
        yield from with_a_silent_libvirt(now, view)
    decision = decide(now, now.source, view)
    if decision is SourceDecision.CONFIRM:
        assert not now.cancelled, "it was wanted back, and nothing was lost by that"
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
    yield from the_home_hears(now)


def decide(now: World, source: Presence, view: DestinationView) -> SourceDecision:
    decision = decide_at_source(now.step, source, view, restarts=True, cancelled=now.cancelled)
    goes_to = {
        SourceDecision.CONFIRM: Step.CONFIRM,
        SourceDecision.ROLL_BACK: Step.ROLLBACK,
        SourceDecision.ROLL_BACK_COLD: Step.ROLLBACK,
        SourceDecision.FINISH: Step.FINISH,
    }.get(decision, now.step)
    assert goes_to is now.step or goes_to in FOLLOWING[now.step], (now, decision)
    return decision


def with_a_silent_libvirt(now: World, view: DestinationView) -> Iterator[World]:
    """Here nothing is done upon silence; there it is no word that the VM is not whole, but what was not
    released may be thrown away."""
    if now.step is not Step.CATCH_UP:
        assert decide(now, Presence.UNKNOWN, view) in SILENT_DECISIONS, now
    if now.step in {Step.PREPARE, Step.CONFIRM} and now.source in OFF and not now.cancelled:
        # It fell silent after the decision to confirm: the tombstone is there by now, and stays.
        yield replace(now, step=Step.CONFIRM, guarded=True)
    unsure = replace(view, vm=Presence.UNKNOWN)
    if decide(now, now.source, unsure) is SourceDecision.ROLL_BACK_COLD:
        yield from rolled_back(now, faults=True)


def after_the_end(now: World) -> Iterator[World]:
    """What a job that is over owes."""
    if now.watched and now.source is Presence.ENDED and not now.guarded:
        yield replace(now, source=Presence.RUNNING, watched=False)
    if not (now.owes_abort and now.contact):
        return
    if now.arrival in RUNS_HERE:
        assert now.presumes, "nobody else lets it run there after a rollback"
        yield replace(
            now, owes_abort=False, guarded=True, source=Presence.ABSENT, watched=False, fenced=False
        )
        return
    goes_on = Presence.RUNNING if now.source is Presence.PAUSED else now.source
    lifted = now.guarded and not now.fenced
    yield replace(cleared(now), source=goes_on, guarded=lifted, fenced=False)


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
    if now.step is Step.CATCH_UP and now.source is Presence.ENDED:
        # Its user's own wish.
        yield replace(now, step=Step.STAYED, guarded=False)
        return
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
    elif now.owes_abort and (now.was_released or now.fenced):
        yield now
        return
    is_theirs = now.taken or bool(now.taking)
    if now.source in OFF and ((now.contact and is_theirs) or (not now.contact and now.rebooted)):
        # Asked, its peer runs it; or it cannot be asked, and this host was down.
        yield now
        return
    watched = now.asked and now.source is Presence.RUNNING
    yield replace(now, step=Step.STAYED, guarded=False, source=Presence.RUNNING, asked=False, watched=watched)


def cleared(now: World) -> World:
    if now.arrival is None:
        return replace(now, owes_abort=False, called_off=True)
    if now.taken or now.taking:
        # What stands there now is not that job's.
        return replace(now, owes_abort=False, called_off=True)
    return replace(
        now, owes_abort=False, called_off=True, arrival=ArrivalState.ABORTED, destination=Presence.ABSENT
    )


def the_destination(now: World, *, faults: bool) -> Iterator[World]:
    yield from the_fail_over(now, faults=faults)
    if now.arrival is None or now.arrival in GONE:
        return
    step = now.step if now.contact else None
    # The source has stopped its VM by half of the time after which it is presumed dead.
    presumed = now.fenced and not now.contact
    if faults:
        silent = decide_at_destination(
            now.arrival, Presence.UNKNOWN, step, source_reachable=now.contact, source_presumed_dead=presumed
        )
        assert silent in {ArrivalDecision.WAIT, ArrivalDecision.LAND}, now
    decision = decide_at_destination(
        now.arrival, now.destination, step, source_reachable=now.contact, source_presumed_dead=presumed
    )
    if decision is ArrivalDecision.ABORT:
        assert now.arrival not in RUNS_HERE
        yield replace(now, arrival=ArrivalState.ABORTED, destination=Presence.ABSENT)
    elif decision in {ArrivalDecision.ACTIVATE, ArrivalDecision.ACTIVATE_COLD}:
        assert now.arrival is ArrivalState.RELEASED or presumed, "only a release, or its time, lets it run"
        now = replace(now, arrival=ArrivalState.RELEASED)
        if faults:
            yield now
        now = replace(now, destination=Presence.RUNNING)
        if faults:
            yield now
        yield replace(now, arrival=ArrivalState.ACTIVATED)
    elif decision is ArrivalDecision.RECORD_ACTIVATED:
        yield replace(now, arrival=ArrivalState.ACTIVATED)


def check(now: World) -> None:
    assert not (now.source is Presence.RUNNING and now.destination is Presence.RUNNING), ("twice", now)
    is_there = now.arrival in RUNS_HERE or now.taken or bool(now.taking)
    assert not (now.source is Presence.ABSENT and not is_there), ("nowhere", now)
    if now.step in {Step.RELEASED, Step.FINISH, Step.DONE}:
        assert now.guarded
        assert now.source is not Presence.RUNNING


def settle(now: World) -> World:
    """With contact, both hosts on, and without further faults."""
    now = replace(now, contact=True, down=False, rebooted=now.rebooted or now.down)
    for _round in range(8):
        for side in (the_source, the_destination):
            now = next(reversed([now, *side(now, faults=False)]))
            check(now)
    return now


def reachable(*, presumes: bool, fails_over: bool) -> set[World]:
    first = World(presumes, fails_over)
    found, ahead = {first}, [first]
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


@pytest.mark.parametrize(("presumes", "fails_over"), [(False, False), (True, False), (False, True)])
def test_in_every_state_it_runs_once_at_most_and_comes_to_an_end_in_one_place(
    presumes: bool, fails_over: bool
) -> None:
    found = reachable(presumes=presumes, fails_over=fails_over)
    assert {state.step for state in found} >= {Step.STOP, Step.PREPARE, Step.RELEASED, Step.ROLLBACK, *ENDED}
    assert any(state.cancelled and state.step is Step.PREPARE for state in found)
    assert any(state.watched for state in found)
    assert any(state.taken and state.step is Step.ROLLBACK for state in found) == fails_over
    given_up = any(state.taking == KILLED and state.source is Presence.ABSENT for state in found)
    assert given_up == fails_over
    assert any(state.fenced and state.arrival in RUNS_HERE for state in found) == presumes
    for state in found:
        end = settle(state)
        assert end.step in ENDED, (state, end)
        assert not end.taking, (state, end)
        is_there = end.arrival in RUNS_HERE or end.taken
        assert is_there == (end.step is Step.DONE or end.source is Presence.ABSENT), (state, end)
        if end.step is Step.STAYED and not is_there:
            assert end.arrival in GONE, (state, end)
        is_free = not (state.was_released or state.taken or presumes or state.arrival in RUNS_HERE)
        if state.cancelled and is_free:
            assert end.step is Step.STAYED, (state, end)
        if must_run(state):
            running = [end.source, end.destination].count(Presence.RUNNING)
            assert running == 1, ("it runs nowhere", state, end)


def must_run(state: World) -> bool:
    """Whoever ends it after its hand-off is over, or its user before it was touched, has it off."""
    if state.taken:
        return state.destination is Presence.RUNNING
    if state.taking and state.source is Presence.ABSENT:
        return True
    if state.step is Step.CATCH_UP and state.source is Presence.ENDED:
        return False
    if state.arrival in RUNS_HERE:
        return state.destination is Presence.RUNNING
    return state.step not in ENDED or state.watched or state.source in {Presence.RUNNING, Presence.PAUSED}


def test_a_guest_that_was_ended_runs_again_without_contact_until_it_is_released() -> None:
    alone = DestinationView(reachable=False)
    for step in (Step.STOP, Step.RESIDUAL, Step.PREPARE, Step.CONFIRM, Step.ROLLBACK):
        assert decide_at_source(step, Presence.ENDED, alone, restarts=True) is SourceDecision.ROLL_BACK_COLD
    assert decide_at_source(Step.RELEASED, Presence.ENDED, alone, restarts=True) is SourceDecision.WAIT
    # Of a live one the memory may be there, and one that its user ended is not brought back.
    assert decide_at_source(Step.CONFIRM, Presence.SHUT_OFF, alone) is SourceDecision.WAIT
    assert decide_at_source(Step.CONFIRM, Presence.ENDED, alone) is SourceDecision.ROLL_BACK
