# SPDX-License-Identifier: GPL-3.0-or-later
"""Who runs the VM, and what follows: pure decisions from what both sides say. No I/O here.

Two rules carry everything: the source lets its VM run again only before it released it, or on the
destination's
durable word that it never will; the destination runs it only after the source's durable release. Each side's
decision may be taken again after any crash.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from precache_proxy.evacuation.arrival import RUNS_HERE, ArrivalState
from precache_proxy.evacuation.job import BEFORE_FREEZE, ENDS, Step


class Presence(StrEnum):
    """What libvirt on one host says of the VM. ARRIVED is a complete, paused incoming migration."""

    ABSENT = "absent"
    SHUT_OFF = "shut-off"
    # shut off because the guest, or somebody, wanted it so: nothing to bring back
    ENDED = "ended"
    PAUSED = "paused"
    ARRIVED = "arrived"
    INCOMING = "incoming"
    RUNNING = "running"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Life:
    """Which run of a domain this is (libvirt's number of its QEMU, None: off), and how the last one ended.

    ``in_order``: the guest ended by itself, on whose wish ever; neither destroyed nor saved nor crashed.
    """

    presence: Presence
    number: int | None = None
    in_order: bool = False


_NOT_THERE = frozenset({Presence.ABSENT, Presence.SHUT_OFF, Presence.ENDED})


@dataclass(frozen=True, slots=True)
class DestinationView:
    """What the destination answered; ``reachable`` False: nothing."""

    reachable: bool
    state: ArrivalState | None = None
    vm: Presence = Presence.UNKNOWN


class SourceDecision(StrEnum):
    """What the source does next. COLD: the VM has to be started anew, its memory is lost."""

    NOTHING = "nothing"
    WAIT = "wait"
    ROLL_BACK = "roll-back"
    ROLL_BACK_COLD = "roll-back-cold"
    CONFIRM = "confirm"
    RELEASE = "release"
    FINISH = "finish"


def decide_at_source(
    step: Step,
    vm: Presence,
    destination: DestinationView,
    *,
    restarts: bool = False,
    cancelled: bool = False,
) -> SourceDecision:
    """What a source whose job stands at ``step`` (:attr:`Job.effective_step`) does, after a restart or a
    failed call. ``restarts``: the guest was ended by us, and stands there booted and paused if at all.
    ``cancelled``: the operator wants it back, where nothing is lost by that."""
    if step in ENDS:
        return SourceDecision.NOTHING
    if step is Step.FINISH:
        return SourceDecision.FINISH
    if step in BEFORE_FREEZE:
        return SourceDecision.ROLL_BACK
    if vm is Presence.UNKNOWN:
        return SourceDecision.WAIT
    if destination.reachable and destination.state in RUNS_HERE:
        # Activated: with our release, or on an operator's word that we were dead. The newer epoch is right.
        return SourceDecision.FINISH
    if step is Step.RELEASED:
        return _after_release(destination)
    if vm in {Presence.RUNNING, Presence.PAUSED}:
        # It never stopped here (or libvirt resumed it): whatever arrived there was not released.
        return SourceDecision.ROLL_BACK
    if restarts and (cancelled or step not in {Step.PREPARE, Step.CONFIRM}):
        # Not asked to come there yet, or on the way back already, or wanted back before it was released.
        return SourceDecision.ROLL_BACK_COLD
    if vm is Presence.ENDED and not restarts:
        return SourceDecision.ROLL_BACK
    if not destination.reachable:
        # Its memory may be there, and is worth waiting for; where none is, and nothing was released, the
        # guest is better off here.
        return SourceDecision.ROLL_BACK_COLD if restarts else SourceDecision.WAIT
    # RUNNING: somebody resumed it there by hand. Shut off here, so it may.
    whole = destination.vm in {Presence.ARRIVED, Presence.RUNNING}
    if destination.state in {ArrivalState.PREPARED, ArrivalState.RELEASED} and whole:
        return SourceDecision.CONFIRM
    if whole and destination.state is None:
        # The destination has lost its record, not the VM: a person must look.
        return SourceDecision.WAIT
    if restarts or destination.state in {ArrivalState.ABORTING, ArrivalState.ABORTED}:
        # Not whole there and not released, or refused for good: its libvirt need not be asked.
        return SourceDecision.ROLL_BACK_COLD
    if destination.vm is Presence.INCOMING or destination.vm is Presence.UNKNOWN:
        return SourceDecision.WAIT
    return SourceDecision.ROLL_BACK_COLD


def _after_release(destination: DestinationView) -> SourceDecision:
    if not destination.reachable or destination.state is None:
        # Without its record we cannot know whether it ever ran there: a case for a person.
        return SourceDecision.WAIT
    if destination.state in {ArrivalState.ABORTED, ArrivalState.ABORTING}:
        return SourceDecision.ROLL_BACK_COLD
    if destination.state is ArrivalState.PREPARED and destination.vm in _NOT_THERE:
        # Our word never came there, and what it was for is gone (that host went down): it would be refused
        # for ever. The abort that comes first is durable: no release can be heard after it.
        return SourceDecision.ROLL_BACK_COLD
    return SourceDecision.RELEASE


class ArrivalDecision(StrEnum):
    """What the destination does next."""

    NOTHING = "nothing"
    WAIT = "wait"
    ABORT = "abort"
    ACTIVATE = "activate"
    ACTIVATE_COLD = "activate-cold"
    RECORD_ACTIVATED = "record-activated"
    LAND = "land"


def decide_at_destination(
    state: ArrivalState,
    vm: Presence,
    source_step: Step | None,
    *,
    source_reachable: bool,
    source_presumed_dead: bool = False,
) -> ArrivalDecision:
    """What a destination does with an arrival, after a restart or when contact returns.

    ``source_step`` is the job's effective step at the source, None where it knows no such job.
    ``source_presumed_dead``: the operator said so, or the time that the operator set for it has passed.
    """
    if state in {ArrivalState.LANDED, ArrivalState.ABORTED}:
        return ArrivalDecision.NOTHING
    if state is ArrivalState.ABORTING:
        return ArrivalDecision.ABORT
    if state is ArrivalState.ACTIVATED:
        return ArrivalDecision.LAND
    if vm is Presence.UNKNOWN:
        return ArrivalDecision.WAIT
    if state is ArrivalState.RELEASED:
        if vm is Presence.RUNNING:
            return ArrivalDecision.RECORD_ACTIVATED
        if source_reachable and source_step in {Step.STAYED, Step.ROLLBACK}:
            # The operator settled it for the source, on the word that nothing runs here any more.
            return ArrivalDecision.ABORT
        if vm in {Presence.ARRIVED, Presence.PAUSED}:
            return ArrivalDecision.ACTIVATE
        # Its memory is gone (this host restarted): no haste, so the source is asked first.
        if source_reachable and source_step is Step.RELEASED:
            return ArrivalDecision.ACTIVATE_COLD
        return ArrivalDecision.ACTIVATE_COLD if source_presumed_dead else ArrivalDecision.WAIT
    if source_reachable:
        if source_step in {Step.STAYED, Step.ROLLBACK}:
            return ArrivalDecision.ABORT
        # A source that lost its records cannot tell: what is whole here may be the only copy that has its
        # memory.
        if source_step is None and vm not in {Presence.ARRIVED, Presence.RUNNING}:
            return ArrivalDecision.ABORT
        return ArrivalDecision.WAIT
    if source_presumed_dead and vm is Presence.ARRIVED:
        return ArrivalDecision.ACTIVATE
    return ArrivalDecision.WAIT
