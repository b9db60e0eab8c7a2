# SPDX-License-Identifier: GPL-3.0-or-later
"""Two hosts, crashes, reboots, partitions and lost replies: the VM never runs twice and is never lost.

The machine below drives the two decision functions as the proxies do, with durable state only: a SIGKILL of a
proxy is
therefore any point between two rules. What libvirt and people do meanwhile are rules, too.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from precache_proxy.evacuation.arrival import RUNS_HERE, ArrivalState
from precache_proxy.evacuation.job import BEFORE_FREEZE, ENDS, Step
from precache_proxy.evacuation.reconcile import (
    ArrivalDecision,
    DestinationView,
    Presence,
    SourceDecision,
    decide_at_destination,
    decide_at_source,
)

HERE = {Presence.RUNNING, Presence.PAUSED}


class TwoHosts(RuleBasedStateMachine):
    """``contact``: the proxies hear each other. Settling by hand is left out: it is a person's word."""

    def __init__(self) -> None:
        super().__init__()
        self.contact = True
        self.step = Step.FREEZE
        self.source = Presence.RUNNING
        self.tombstone = False
        self.owes_abort = False
        self.arrival: ArrivalState | None = None
        self.destination = Presence.ABSENT
        self.called_off = False
        # Its QEMU at the source is halted, and libvirt's order to go on waits there.
        self.halted = self.told_to_go_on = False

    # -- the world

    @rule(contact=st.booleans())
    def link(self, contact: bool) -> None:
        self.contact = contact

    @rule()
    def source_host_reboots(self) -> None:
        if self.source in HERE:
            self.source = Presence.SHUT_OFF
        self.halted = self.told_to_go_on = False
        if self.destination is Presence.INCOMING:
            self.destination = Presence.ABSENT

    @rule()
    def destination_host_reboots(self) -> None:
        if self.destination in {Presence.ARRIVED, Presence.RUNNING}:
            self.destination = Presence.SHUT_OFF
        elif self.destination is Presence.INCOMING:
            self.destination = Presence.ABSENT

    @rule()
    def somebody_starts_it_at_the_source(self) -> None:
        # the hook refuses after the tombstone
        if self.source is Presence.SHUT_OFF and not self.tombstone:
            self.source = Presence.RUNNING

    @rule()
    def somebody_starts_it_at_the_destination(self) -> None:
        guarded = self.arrival in {ArrivalState.PREPARED, ArrivalState.RELEASED, ArrivalState.ABORTING}
        if self.destination is Presence.SHUT_OFF and not guarded and self.arrival in RUNS_HERE:
            self.destination = Presence.RUNNING

    # -- the way forward

    @precondition(lambda self: self.step is Step.FREEZE and self.contact and not self.called_off)
    @rule()
    def prepare(self) -> None:
        self.step, self.owes_abort = Step.PREPARE, True
        self.arrival = ArrivalState.PREPARED

    @precondition(
        lambda self: self.step is Step.PREPARE and self.contact and self.arrival is ArrivalState.PREPARED
    )
    @rule(how=st.sampled_from(["whole", "failed", "reply lost", "cut while copying"]))
    def migrate(self, how: str) -> None:
        self.step = Step.MIGRATE
        if self.source is not Presence.RUNNING:
            return
        if how == "whole":
            self.source, self.destination = Presence.SHUT_OFF, Presence.ARRIVED
        elif how == "reply lost":
            # libvirt at the source resumes the VM although it stands at the destination
            self.destination = Presence.ARRIVED
        elif how == "cut while copying":
            self.destination = Presence.INCOMING

    @precondition(
        lambda self: (
            self.step is Step.PREPARE
            and self.contact
            and self.arrival is ArrivalState.PREPARED
            and self.source is Presence.RUNNING
        )
    )
    @rule(
        finish=st.sampled_from([Presence.ARRIVED, Presence.ABSENT, Presence.INCOMING]),
        killed=st.sampled_from(["", "before the halt", "halted", "released"]),
        cut=st.booleans(),
    )
    def release_ahead(self, finish: Presence, killed: str, cut: bool) -> None:
        """All memory is there; ``finish``: what libvirt there has made of its last call by now."""
        self.step, self.destination = Step.MIGRATE, finish
        if killed == "before the halt":
            # its relay dies with it: libvirt lets the VM go on
            return
        self.source, self.halted, self.step = Presence.PAUSED, True, Step.CONFIRM
        self.tombstone = True
        if killed == "halted":
            self.told_to_go_on = True
            return
        self.step, self.contact = Step.RELEASED, self.contact and not cut
        if killed == "released":
            self.told_to_go_on = True
        else:
            self._release()

    @precondition(lambda self: self.halted)
    @rule()
    def libvirt_tells_it_to_go_on(self) -> None:
        self.told_to_go_on = True

    @precondition(
        lambda self: (
            self.halted
            and not self.told_to_go_on
            and self.destination in {Presence.ARRIVED, Presence.RUNNING}
        )
    )
    @rule()
    def libvirt_hears_the_last_reply(self) -> None:
        self.source, self.halted = Presence.SHUT_OFF, False

    @precondition(lambda self: self.destination is Presence.INCOMING)
    @rule()
    def libvirt_gives_an_incoming_migration_up(self) -> None:
        self.destination = Presence.ABSENT

    # -- the proxies

    @precondition(
        lambda self: self.step in {Step.MIGRATE, Step.CONFIRM, Step.RELEASED, Step.ROLLBACK, Step.FINISH}
    )
    @rule(kill_after_tombstone=st.booleans(), kill_before_telling=st.booleans())
    def source_decides(self, kill_after_tombstone: bool, kill_before_telling: bool) -> None:
        if self.halted and self.step in {Step.MIGRATE, Step.CONFIRM}:
            self._take_back()
        view = DestinationView(self.contact, self.arrival if self.contact else None, self.destination)
        decision = decide_at_source(self.step, self.source, view)
        if decision is SourceDecision.CONFIRM:
            self.step = Step.CONFIRM
            self.tombstone = True
            if kill_after_tombstone:
                return
            if self.source in HERE:
                self.tombstone = False
                return
            self.step = Step.RELEASED
            if not kill_before_telling:
                self._release()
        elif decision is SourceDecision.RELEASE:
            self._release()
        elif decision is SourceDecision.ROLL_BACK:
            self._roll_back(must_be_clean=self.halted or self.source is Presence.SHUT_OFF)
        elif decision is SourceDecision.ROLL_BACK_COLD:
            self._roll_back(must_be_clean=True)
        elif decision is SourceDecision.FINISH:
            self.tombstone = True
            self.source, self.halted = Presence.ABSENT, False
            self.step = Step.DONE

    def _take_back(self) -> None:
        """What it was told while it was halted is done at once."""
        self.halted = False
        if self.told_to_go_on:
            self.source = Presence.RUNNING

    def _release(self) -> None:
        if not self.contact or self.arrival is None:
            return
        if self.arrival is ArrivalState.PREPARED:
            if self.destination not in {Presence.ARRIVED, Presence.RUNNING}:
                return
            self.arrival = ArrivalState.RELEASED
        if self.arrival is ArrivalState.RELEASED:
            self.destination, self.arrival = Presence.RUNNING, ArrivalState.ACTIVATED
        if self.arrival in RUNS_HERE:
            self.step = Step.FINISH

    def _roll_back(self, *, must_be_clean: bool) -> None:
        self.step = Step.ROLLBACK
        if self.owes_abort:
            if self.contact:
                if self.arrival is ArrivalState.RELEASED:
                    self.destination, self.arrival = Presence.RUNNING, ArrivalState.ACTIVATED
                if self.arrival in RUNS_HERE:
                    self.step = Step.FINISH
                    return
                self._clear()
            elif must_be_clean:
                return
        if self.halted:
            self._take_back()
            self.never_runs_twice()
        self.tombstone = False
        self.source = Presence.RUNNING
        self.step = Step.STAYED

    def _clear(self) -> None:
        self.called_off = True
        if self.arrival is not None:
            self.arrival, self.destination = ArrivalState.ABORTED, Presence.ABSENT
        self.owes_abort = False

    @precondition(lambda self: self.step is Step.STAYED and self.owes_abort and self.contact)
    @rule()
    def source_pays_its_debt(self) -> None:
        assert self.arrival not in RUNS_HERE
        self._clear()

    @precondition(lambda self: self.arrival not in {None, ArrivalState.LANDED, ArrivalState.ABORTED})
    @rule(kill_after_released=st.booleans(), kill_after_resume=st.booleans())
    def destination_decides(self, kill_after_released: bool, kill_after_resume: bool) -> None:
        assert self.arrival is not None
        step = self.step if self.contact else None
        decision = decide_at_destination(
            self.arrival, self.destination, step, source_reachable=self.contact, source_presumed_dead=False
        )
        if decision is ArrivalDecision.ABORT:
            assert self.arrival not in RUNS_HERE
            self.arrival, self.destination = ArrivalState.ABORTED, Presence.ABSENT
        elif decision in {ArrivalDecision.ACTIVATE, ArrivalDecision.ACTIVATE_COLD}:
            assert self.arrival is ArrivalState.RELEASED, "only a release, or a person, lets it run"
            if kill_after_released:
                return
            self.destination = Presence.RUNNING
            if not kill_after_resume:
                self.arrival = ArrivalState.ACTIVATED
        elif decision is ArrivalDecision.RECORD_ACTIVATED:
            self.arrival = ArrivalState.ACTIVATED

    # -- what must hold

    @invariant()
    def never_runs_twice(self) -> None:
        assert not (self.source is Presence.RUNNING and self.destination is Presence.RUNNING)

    @invariant()
    def never_forgotten_at_both_ends(self) -> None:
        assert not (self.source is Presence.ABSENT and self.arrival not in RUNS_HERE)

    @invariant()
    def released_means_the_source_cannot_run(self) -> None:
        if self.step in {Step.RELEASED, Step.FINISH, Step.DONE}:
            assert self.tombstone
            assert self.source not in HERE or (self.halted and self.source is Presence.PAUSED)

    def teardown(self) -> None:
        """With contact and without further faults both sides come to an end, and the VM runs once."""
        if self.step in BEFORE_FREEZE or self.step in {Step.FREEZE, Step.PREPARE}:
            return
        self.contact = True
        if self.destination is Presence.INCOMING:
            self.destination = Presence.ABSENT
        for _ in range(6):
            if self.step not in ENDS:
                self.source_decides(kill_after_tombstone=False, kill_before_telling=False)
            if self.arrival not in {None, ArrivalState.LANDED, ArrivalState.ABORTED}:
                self.destination_decides(kill_after_released=False, kill_after_resume=False)
        assert self.step in ENDS
        if self.step is Step.DONE:
            assert self.arrival in RUNS_HERE
        else:
            assert self.arrival in {None, ArrivalState.PREPARED, ArrivalState.ABORTED}


TestTwoHosts = TwoHosts.TestCase
TestTwoHosts.settings = settings(max_examples=120, stateful_step_count=25, deadline=None)


@given(
    step=st.sampled_from(Step),
    vm=st.sampled_from(Presence),
    reachable=st.booleans(),
    state=st.none() | st.sampled_from(ArrivalState),
    there=st.sampled_from(Presence),
)
def test_the_source_never_rolls_back_what_runs_there(
    step: Step, vm: Presence, reachable: bool, state: ArrivalState | None, there: Presence
) -> None:
    decision = decide_at_source(step, vm, DestinationView(reachable, state if reachable else None, there))
    back = decision in {SourceDecision.ROLL_BACK, SourceDecision.ROLL_BACK_COLD}
    if back and step not in BEFORE_FREEZE and reachable:
        assert state not in RUNS_HERE
    if decision is SourceDecision.ROLL_BACK_COLD:
        assert reachable, "an off VM is started here only on the destination's word"
    if step is Step.RELEASED and back:
        lost = state is ArrivalState.PREPARED and there in {
            Presence.ABSENT, Presence.SHUT_OFF, Presence.ENDED
        }  # fmt: skip
        assert lost or state in {ArrivalState.ABORTED, ArrivalState.ABORTING}
    if decision is SourceDecision.FINISH:
        assert step is Step.FINISH or (reachable and state in RUNS_HERE)


@pytest.mark.parametrize("there", [Presence.UNKNOWN, Presence.INCOMING, Presence.ABSENT])
@pytest.mark.parametrize("state", [ArrivalState.ABORTING, ArrivalState.ABORTED])
def test_a_durable_no_is_enough_whatever_libvirt_there_says(state: ArrivalState, there: Presence) -> None:
    view = DestinationView(True, state, there)
    assert decide_at_source(Step.CONFIRM, Presence.SHUT_OFF, view) is SourceDecision.ROLL_BACK_COLD


@pytest.mark.parametrize("there", [Presence.UNKNOWN, Presence.INCOMING])
def test_what_is_not_seen_whole_is_waited_for_only_where_it_has_memory(there: Presence) -> None:
    view = DestinationView(True, ArrivalState.PREPARED, there)
    for step in (Step.PREPARE, Step.CONFIRM):
        assert decide_at_source(step, Presence.SHUT_OFF, view) is SourceDecision.WAIT
        booted = decide_at_source(step, Presence.SHUT_OFF, view, restarts=True)
        assert booted is SourceDecision.ROLL_BACK_COLD


def test_a_vm_whole_there_without_a_record_is_a_case_for_a_person() -> None:
    view = DestinationView(True, None, Presence.RUNNING)
    for restarts in (False, True):
        decided = decide_at_source(Step.CONFIRM, Presence.SHUT_OFF, view, restarts=restarts)
        assert decided is SourceDecision.WAIT


def test_a_release_that_came_too_late_does_not_leave_the_vm_nowhere() -> None:
    """Released here, the word was lost, and the destination's host went down with the paused VM."""
    run = TwoHosts()
    run.step, run.source, run.tombstone, run.owes_abort = Step.RELEASED, Presence.SHUT_OFF, True, True
    run.arrival, run.destination = ArrivalState.PREPARED, Presence.ARRIVED
    run.destination_host_reboots()
    run.teardown()
    assert run.step is Step.STAYED
    assert run.source is Presence.RUNNING


@pytest.mark.parametrize("finish", [Presence.ABSENT, Presence.INCOMING])
def test_a_vm_that_was_released_ahead_and_cannot_run_there_goes_on_with_its_memory(finish: Presence) -> None:
    run = TwoHosts()
    run.step, run.owes_abort, run.arrival = Step.PREPARE, True, ArrivalState.PREPARED
    run.release_ahead(finish=finish, killed="", cut=False)
    run.libvirt_tells_it_to_go_on()
    assert (run.step, run.source) == (Step.RELEASED, Presence.PAUSED), "until the destination has said so"
    run.teardown()
    assert (run.step, run.source, run.halted) == (Step.STAYED, Presence.RUNNING, False)


@given(
    state=st.sampled_from(ArrivalState),
    vm=st.sampled_from(Presence),
    step=st.none() | st.sampled_from(Step),
    reachable=st.booleans(),
    presumed=st.booleans(),
)
def test_the_destination_runs_nothing_unreleased_on_its_own(
    state: ArrivalState, vm: Presence, step: Step | None, reachable: bool, presumed: bool
) -> None:
    decision = decide_at_destination(
        state, vm, step, source_reachable=reachable, source_presumed_dead=presumed
    )
    if decision in {ArrivalDecision.ACTIVATE, ArrivalDecision.ACTIVATE_COLD}:
        assert state is ArrivalState.RELEASED or (presumed and not reachable and vm is Presence.ARRIVED)
    if decision is ArrivalDecision.ABORT:
        assert state not in RUNS_HERE
        # what is whole here is dropped only when the source says that it goes on there
        if state is not ArrivalState.ABORTING and vm is Presence.ARRIVED:
            assert step in {Step.STAYED, Step.ROLLBACK}
