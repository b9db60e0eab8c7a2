# SPDX-License-Identifier: GPL-3.0-or-later
"""Telling every anchor where a VM is, until each has answered.

Pure: the clock comes with each call, messages go out as values from :meth:`Registrar.due`. A claim is sent
at once, again after one round trip and then ever more slowly, for as long as it takes: in a crisis an anchor
that does not answer now may answer in a minute. What merely confirms (refresh, an anchor that restarted)
keeps to a window of messages under way, and to a pace; a claim goes ahead of it and holds it up, so that one
hand-over among thousands of refreshes is as quick as alone.
"""

from __future__ import annotations

import heapq
import secrets
import zlib
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv6Address, IPv6Network

from mobility_agent.gateway.pace import Pace
from mobility_agent.messages.headers import Status
from mobility_agent.messages.options import HandoffIndicator, Timestamp
from mobility_agent.messages.registration import Acknowledgement, Registration

_UNKNOWN_ROUND_TRIP_SECONDS = 0.25
_MARGIN_SECONDS = 0.02
_ROUTINE_SECONDS = 1.0
_BACKOFF = 1.5
_SLOWEST_RETRY_SECONDS = 3.0
_REFUSED_RETRY_SECONDS = 30.0
_WITHDRAWALS = 8
# Routine messages under way to one anchor: enough to keep it busy over the way there, and no more, since a
# claim that comes meanwhile waits behind them.
_LEAST_WINDOW, _UNKNOWN_WINDOW, _MOST_WINDOW = 32, 256, 512
_ROUTINE_PER_SECOND = 2500
# By how much the least round trip is believed to grow with each one measured: the way may become longer, but
# a queue that we made ourselves must not let us make a longer one.
_GROWTH = 1.01
# Clocks nearer than this are left as they are: two gateways then order their claims by true time.
_TOLERATED_OFFSET_SECONDS = 1.0
_CORRECTIONS = 3
# Refreshes begin within this share of half a lifetime before its end: VMs that were registered together, at a
# start, do not all come back together for ever.
_SPREAD = 0.25
_ABOUT_TIME = frozenset({Status.TIMESTAMP_MISMATCH, Status.TIMESTAMP_TOO_LOW})


class Phase(Enum):
    """Where a VM's registration with one anchor stands."""

    CLAIMING = "claiming"
    REGISTERED = "registered"
    REFUSED = "refused"
    WITHDRAWING = "withdrawing"


@dataclass(slots=True)
class _Line:
    """One VM at one anchor."""

    vm: str
    anchor: str
    phase: Phase
    handoff: HandoffIndicator
    # The last ones sent, each with its timestamp: an answer names both (RFC 5213 section 5.5).
    sequences: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=8))
    ticks: int = 0
    attempts: int = 0
    corrections: int = 0
    under_way: bool = False
    awaited: bool = False
    # It was claimed as started here, and this anchor has not accepted that yet.
    started: bool = False
    due_at: float = 0.0
    acknowledged_at: float | None = None
    sentence: str = ""

    @property
    def urgent(self) -> bool:
        """A claim that no answer has come to yet."""
        return self.phase is Phase.CLAIMING and self.handoff is not HandoffIndicator.UNCHANGED


@dataclass(slots=True)
class _Anchor:
    """What is known of one anchor."""

    name: str
    round_trip_seconds: float | None = None
    least_seconds: float | None = None
    clock_offset_seconds: float = 0.0
    # Not the same at every start: else an answer to the one before would fit again.
    sequence: int = field(default_factory=lambda: secrets.randbelow(1 << 16))
    under_way: int = 0
    backlog: deque[_Line] = field(default_factory=deque)

    @property
    def window(self) -> int:
        """How many routine messages may be under way."""
        if self.least_seconds is None:
            return _UNKNOWN_WINDOW
        return min(max(int(_ROUTINE_PER_SECOND * self.least_seconds), _LEAST_WINDOW), _MOST_WINDOW)

    @property
    def may_send(self) -> bool:
        """Whether something routine waits, and the window has room for it."""
        return bool(self.backlog) and self.under_way < self.window


@dataclass(slots=True)
class _Claim:
    """What all anchors are to know of a VM."""

    homes: tuple[IPv6Network, ...]
    epoch: int
    link_local: IPv6Address | None
    evident: bool
    # Not here any more, and asked for until every anchor has said who has it.
    released: bool = False
    known_epoch: int | None = None


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to send now."""

    anchor: str
    sequence: int
    registration: Registration


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an answer meant.

    ``kind``: registered (a claim was accepted), refreshed, withdrawn, corrected (sent again with the anchor's
    time), raised (sent again with a newer epoch), adopted (sent again with the anchor's epoch: started here
    where nobody had it, or, with a ``holder``, had by this gateway already), lost (bound elsewhere: withdraw
    locally), nowhere (released, and no anchor has it anywhere; ``epoch`` None: none knows of it at all),
    refused, ignored.
    """

    kind: str
    vm: str
    anchor: str
    sentence: str
    epoch: int | None = None
    holder: IPv6Address | None = None


class Registrar:
    """All registrations of one gateway."""

    def __init__(self, anchors: Iterable[str], care_of: IPv6Address, lifetime_seconds: int) -> None:
        self._anchors = {name: _Anchor(name) for name in anchors}
        self._care_of = care_of
        self._lifetime_seconds = lifetime_seconds
        # The shortest that an anchor has granted.
        self._granted_seconds = lifetime_seconds
        self._claims: dict[str, _Claim] = {}
        self._lines: dict[tuple[str, str], _Line] = {}
        self._queue: list[tuple[float, int, _Line]] = []
        self._order = 0
        self._pace = Pace()
        # Claims that were sent once and may be answered any moment: what is routine gives way to them.
        self._awaited = 0

    def attach(
        self,
        vm: str,
        homes: tuple[IPv6Network, ...],
        epoch: int,
        handoff: HandoffIndicator,
        now: float,
        *,
        link_local: IPv6Address | None = None,
        evident: bool = False,
        started: bool = False,
    ) -> None:
        """Claim ``vm`` at every anchor. ``evident``: it surely runs here, so a newer epoch may be made up.
        ``started``: it was claimed as started here before, and anchors may still have to hear that."""
        self._claims[vm] = _Claim(homes, epoch, link_local, evident)
        for anchor in self._anchors:
            self._start(vm, anchor, Phase.CLAIMING, handoff, now)
            self._lines[vm, anchor].started = started or handoff is HandoffIndicator.NEW_INTERFACE

    def withdraw(self, vm: str, now: float) -> None:
        """Take ``vm`` back from every anchor."""
        if vm not in self._claims:
            return
        for anchor in self._anchors:
            self._start(vm, anchor, Phase.WITHDRAWING, HandoffIndicator.UNCHANGED, now)

    def release(self, vm: str, homes: tuple[IPv6Network, ...], epoch: int, now: float) -> None:
        """``vm`` is not here: take it back from every anchor, for as long as that takes; hear who has it."""
        self._claims[vm] = _Claim(homes, epoch, None, evident=False, released=True)
        for anchor in self._anchors:
            self._start(vm, anchor, Phase.WITHDRAWING, HandoffIndicator.UNCHANGED, now)

    def forget(self, vm: str) -> None:
        """Say no more of ``vm``."""
        self._claims.pop(vm, None)
        for anchor in self._anchors:
            line = self._lines.pop((vm, anchor), None)
            if line is not None:
                self._settle(line)

    def _start(self, vm: str, anchor: str, phase: Phase, handoff: HandoffIndicator, now: float) -> None:
        line = self._lines.get((vm, anchor))
        if line is None:
            line = self._lines[vm, anchor] = _Line(vm, anchor, phase, handoff)
        self._settle(line)
        line.phase, line.handoff = phase, handoff
        # What is withdrawn is not to be claimed again, whatever an anchor refuses.
        line.started = line.started and phase is Phase.CLAIMING
        line.sequences.clear()
        line.attempts = line.corrections = 0
        self._schedule(line, now)

    def _schedule(self, line: _Line, at: float) -> None:
        line.due_at = at
        self._order += 1
        heapq.heappush(self._queue, (at, self._order, line))

    def _settle(self, line: _Line) -> None:
        if line.under_way:
            line.under_way = False
            self._anchors[line.anchor].under_way -= 1
        if line.awaited:
            line.awaited = False
            self._awaited -= 1
            if not self._awaited:
                self._pace.go_on()

    def _current(self, line: _Line) -> bool:
        return self._lines.get((line.vm, line.anchor)) is line

    def due(self, now: float, wall: float) -> list[Outgoing]:
        """What is to be sent now. ``now``: monotonic; ``wall``: seconds since 1970."""
        urgent: list[Outgoing] = []
        again: list[Outgoing] = []
        while self._queue and self._queue[0][0] <= now:
            at, _unused, line = heapq.heappop(self._queue)
            # Scheduled anew since, or forgotten: this entry says nothing any more.
            if at != line.due_at or not self._current(line):
                continue
            anchor = self._anchors[line.anchor]
            if line.urgent:
                urgent += self._send(line, anchor, now, wall)
            elif line.under_way:
                again += self._send(line, anchor, now, wall)
            elif line.phase is Phase.WITHDRAWING:
                # Its packets are lost until the anchors know, or have said who has it.
                anchor.backlog.appendleft(line)
            else:
                anchor.backlog.append(line)
        return urgent + again + self._routine(now, wall)

    def _routine(self, now: float, wall: float) -> list[Outgoing]:
        """As much of what only confirms as the pace and the windows allow, from each anchor's in turn."""
        outgoing: list[Outgoing] = []
        ready = [anchor for anchor in self._anchors.values() if anchor.may_send]
        most = self._pace.allowed(now) if ready else 0
        while ready and len(outgoing) < most:
            for anchor in ready:
                line = anchor.backlog.popleft()
                if self._current(line) and line.due_at <= now and not line.under_way:
                    outgoing += self._send(line, anchor, now, wall)
            ready = [anchor for anchor in ready if anchor.may_send]
        # With twice as many as half a lifetime asks for there is time for a lost one to be sent again.
        self._pace.sent(len(outgoing), now, 4 * len(self._lines) / self._granted_seconds)
        return outgoing

    def _send(self, line: _Line, anchor: _Anchor, now: float, wall: float) -> list[Outgoing]:
        claim = self._claims[line.vm]
        withdrawing = line.phase is Phase.WITHDRAWING
        if withdrawing and line.attempts >= _WITHDRAWALS and not claim.released:
            # Its lifetime ends it there.
            self._drop(line)
            return []
        anchor.sequence = (anchor.sequence + 1) & 0xFFFF
        line.ticks = max(line.ticks + 1, Timestamp.of_seconds(wall + anchor.clock_offset_seconds).ticks)
        line.sequences.append((anchor.sequence, line.ticks))
        if not line.under_way:
            line.under_way = True
            anchor.under_way += 1
        if line.urgent and not line.attempts:
            # Once, also where it is sent as if for the first time because its anchor has returned.
            self._awaited += not line.awaited
            line.awaited = True
            self._pace.hold(now)
        self._schedule(line, now + self._patience(anchor, line))
        line.attempts += 1
        registration = Registration(
            vm=line.vm,
            homes=claim.homes,
            care_of=self._care_of,
            epoch=claim.epoch,
            ticks=line.ticks,
            lifetime_seconds=0 if withdrawing else self._lifetime_seconds,
            handoff=line.handoff,
            link_local=claim.link_local,
        )
        return [Outgoing(anchor.name, anchor.sequence, registration)]

    @staticmethod
    def _patience(anchor: _Anchor, line: _Line) -> float:
        known = anchor.round_trip_seconds
        first = _UNKNOWN_ROUND_TRIP_SECONDS if known is None else known + _MARGIN_SECONDS
        if line.phase is not Phase.WITHDRAWING and line.handoff is HandoffIndicator.UNCHANGED:
            # No packet waits for it, but hundreds of its like may: the anchor's queue is no loss.
            first += _ROUTINE_SECONDS
        # Bounded before it is multiplied: an anchor may be silent for days.
        return min(first * _BACKOFF ** min(line.attempts, 20), max(_SLOWEST_RETRY_SECONDS, first))

    def _drop(self, line: _Line) -> None:
        self._settle(line)
        del self._lines[line.vm, line.anchor]
        if not any((line.vm, anchor) in self._lines for anchor in self._anchors):
            self._claims.pop(line.vm, None)

    def next_due(self) -> float | None:
        """When :meth:`due` will have something to send (monotonic seconds)."""
        times = [self._queue[0][0]] if self._queue else []
        if any(anchor.may_send for anchor in self._anchors.values()):
            times.append(self._pace.next_at)
        return min(times, default=None)

    def give_way(self, now: float) -> None:
        """A hand-over is coming: what is routine waits a moment."""
        self._pace.hold(now)

    def acknowledge(self, anchor_name: str, answer: Acknowledgement, now: float) -> Outcome:
        """Take an anchor's answer, already authenticated."""
        anchor = self._anchors[anchor_name]
        line = self._lines.get((answer.vm, anchor_name))
        asked_at = None if line is None else dict(line.sequences).get(answer.sequence)
        # One about the timestamp carries the anchor's instead.
        fits = asked_at is not None and (answer.status in _ABOUT_TIME or answer.ticks == asked_at)
        if line is None or not fits:
            return Outcome(
                "ignored", answer.vm, anchor_name, f"VM {answer.vm}: answer to nothing that was asked"
            )
        line.sequences.clear()
        self._settle(line)
        line.attempts = 0
        if answer.accepted:
            return self._accepted(line, answer, now)
        if answer.status in _ABOUT_TIME:
            corrected = self._correct(line, anchor, answer, now)
            if corrected is not None:
                return corrected
        claim = self._claims[line.vm]
        held_elsewhere = answer.holder is not None and answer.holder != self._care_of
        if answer.epoch is not None and (answer.epoch > claim.epoch or held_elsewhere):
            return self._held(line, claim, answer, now)
        unbound = answer.epoch == claim.epoch and answer.holder is None
        if unbound and line.started and line.handoff is HandoffIndicator.UNCHANGED:
            # Confirmed, as another anchor had it here: this one has it nowhere, so that it did start here.
            self._start(line.vm, line.anchor, Phase.CLAIMING, HandoffIndicator.NEW_INTERFACE, now)
            sentence = f"VM {line.vm}: {line.anchor} has it nowhere, claimed as started here"
            return Outcome("corrected", line.vm, line.anchor, sentence, answer.epoch)
        return self._refused(line, answer, now)

    def _accepted(self, line: _Line, answer: Acknowledgement, now: float) -> Outcome:
        if line.phase is Phase.WITHDRAWING:
            return self._withdrawn(line, answer, f"VM {line.vm}: withdrawn from {line.anchor}")
        kind = "refreshed" if line.phase is Phase.REGISTERED else "registered"
        line.phase, line.handoff = Phase.REGISTERED, HandoffIndicator.UNCHANGED
        line.corrections, line.started = 0, False
        line.acknowledged_at = now
        line.sentence = f"VM {line.vm}: {kind} with {line.anchor}"
        granted = answer.lifetime_seconds or self._lifetime_seconds
        self._granted_seconds = min(granted, self._granted_seconds)
        share = zlib.crc32(line.vm.encode()) / (1 << 32)
        self._schedule(line, now + granted / 2 * (1 - _SPREAD * share))
        return Outcome(kind, line.vm, line.anchor, line.sentence, answer.epoch, self._care_of)

    def _correct(self, line: _Line, anchor: _Anchor, answer: Acknowledgement, now: float) -> Outcome | None:
        if line.corrections >= _CORRECTIONS:
            return None
        line.corrections += 1
        if answer.status == Status.TIMESTAMP_TOO_LOW:
            # The answer carries the timestamp that is held; ours must come after it.
            line.ticks = max(line.ticks, answer.ticks)
            sentence = f"VM {line.vm}: {anchor.name} holds a later update; sent again with a later timestamp"
        else:
            sent_seconds = line.ticks / Timestamp.TICKS_PER_SECOND
            offset = answer.ticks / Timestamp.TICKS_PER_SECOND - sent_seconds
            anchor.clock_offset_seconds += offset
            # Else the old timestamps would keep us in a future that the anchor does not accept.
            line.ticks = min(line.ticks, answer.ticks)
            sentence = (
                f"clock of this host differs from {anchor.name}'s by {anchor.clock_offset_seconds:.1f} s; "
                f"VM {line.vm} is registered with its time; set both by NTP"
            )
        self._schedule(line, now)
        return Outcome("corrected", line.vm, line.anchor, sentence, answer.epoch, answer.holder)

    def _held(self, line: _Line, claim: _Claim, answer: Acknowledgement, now: float) -> Outcome:
        held = answer.epoch or 0
        if line.phase is Phase.WITHDRAWING:
            return self._withdrawn(line, answer, f"VM {line.vm}: {line.anchor} has it elsewhere")
        came = claim.evident and line.handoff is not HandoffIndicator.UNCHANGED and held >= claim.epoch
        # One that surely came is claimed in a newer epoch than any that an anchor may have it in elsewhere.
        if answer.holder == self._care_of and not came:
            return self._had_already(line, claim, held, now)
        if answer.holder is None and line.handoff is HandoffIndicator.NEW_INTERFACE:
            # It was shut off where it had gone, and starts here: it takes up where that ended.
            claim.epoch = held
            for anchor in self._anchors:
                self._start(line.vm, anchor, Phase.CLAIMING, HandoffIndicator.NEW_INTERFACE, now)
            sentence = f"VM {line.vm}: started here; {line.anchor} knew epoch {held}, claimed as that"
            return Outcome("adopted", line.vm, line.anchor, sentence, held)
        if came:
            claim.epoch = held + 1
            for anchor in self._anchors:
                self._start(line.vm, anchor, Phase.CLAIMING, HandoffIndicator.BETWEEN_GATEWAYS, now)
            sentence = (
                f"VM {line.vm}: arrived by hand; {line.anchor} knew epoch {held}, claimed as {held + 1}"
            )
            return Outcome("raised", line.vm, line.anchor, sentence, claim.epoch, answer.holder)
        sentence = (
            f"VM {line.vm}: {line.anchor} has it at {answer.holder or 'no gateway'} in epoch {held}, "
            f"this gateway claimed epoch {claim.epoch}: withdrawn here"
        )
        lost = Outcome("lost", line.vm, line.anchor, sentence, held, answer.holder)
        self.forget(line.vm)
        return lost

    def _had_already(self, line: _Line, claim: _Claim, held: int, now: float) -> Outcome:
        """The anchor has it here in a newer epoch: this agent was killed before it had recorded that.

        Or the anchor missed that it left since. So this is a confirmation, which takes it from nobody; a
        start, in the same epoch, would, at every anchor that knows better.
        """
        claim.epoch = held
        for anchor in self._anchors:
            self._start(line.vm, anchor, Phase.CLAIMING, HandoffIndicator.UNCHANGED, now)
        sentence = f"VM {line.vm}: {line.anchor} has it here already in epoch {held}, confirmed as that"
        return Outcome("adopted", line.vm, line.anchor, sentence, held, self._care_of)

    def _withdrawn(self, line: _Line, answer: Acknowledgement, sentence: str) -> Outcome:
        claim = self._claims[line.vm]
        if claim.released and answer.holder is not None and answer.holder != self._care_of:
            sentence = f"VM {line.vm}: is not here; {line.anchor} has it at {answer.holder}"
            self.forget(line.vm)
            return Outcome("lost", line.vm, line.anchor, sentence, answer.epoch, answer.holder)
        if answer.epoch is not None:
            claim.known_epoch = max(answer.epoch, claim.known_epoch or 0)
        self._drop(line)
        kind = "nowhere" if claim.released and line.vm not in self._claims else "withdrawn"
        return Outcome(kind, line.vm, line.anchor, sentence, claim.known_epoch)

    def _refused(self, line: _Line, answer: Acknowledgement, now: float) -> Outcome:
        try:
            word = Status(answer.status).name.lower().replace("_", " ")
        except ValueError:
            word = "status not known here"
        line.phase = Phase.REFUSED if line.phase is not Phase.WITHDRAWING else Phase.WITHDRAWING
        line.sentence = f"VM {line.vm}: {line.anchor} refused with {answer.status} ({word}); see its journal"
        passing = answer.status == Status.INSUFFICIENT_RESOURCES
        self._schedule(line, now + (_SLOWEST_RETRY_SECONDS if passing else _REFUSED_RETRY_SECONDS))
        return Outcome("refused", line.vm, line.anchor, line.sentence, answer.epoch, answer.holder)

    def lost(self, anchor_name: str, vm: str, epoch: int, ticks: int) -> bool:
        """An anchor has ``vm`` elsewhere since ``(epoch, ticks)``: if that beats our claim, drop the claim.

        An old message played again does not: our claim came after what it tells of.
        """
        claim, line = self._claims.get(vm), self._lines.get((vm, anchor_name))
        if claim is None or line is None or (epoch, ticks) <= (claim.epoch, line.ticks):
            return False
        self.forget(vm)
        return True

    def epoch(self, vm: str) -> int | None:
        """The epoch in which ``vm`` is claimed here."""
        claim = self._claims.get(vm)
        return None if claim is None else claim.epoch

    def pending(self) -> int:
        """How many claims and withdrawals wait for an answer."""
        waiting = {Phase.CLAIMING, Phase.WITHDRAWING}
        return sum(line.phase in waiting for line in self._lines.values())

    def anchor_restarted(self, anchor_name: str, now: float) -> int:
        """Confirm everything there at once; how many."""
        count = 0
        for (vm, name), line in list(self._lines.items()):
            if name == anchor_name and line.phase in {Phase.REGISTERED, Phase.REFUSED}:
                self._start(vm, name, Phase.CLAIMING, HandoffIndicator.UNCHANGED, now)
                count += 1
        return count

    def anchor_answers(self, anchor_name: str, round_trip_seconds: float, offset_seconds: float) -> None:
        """What a heartbeat measured: how far the anchor is, and how far its clock is from ours."""
        anchor = self._anchors[anchor_name]
        before = anchor.round_trip_seconds
        anchor.round_trip_seconds = (
            round_trip_seconds if before is None else before + (round_trip_seconds - before) / 4
        )
        least = anchor.least_seconds
        anchor.least_seconds = (
            round_trip_seconds if least is None else min(round_trip_seconds, least * _GROWTH)
        )
        anchor.clock_offset_seconds = (
            offset_seconds if abs(offset_seconds) > _TOLERATED_OFFSET_SECONDS else 0.0
        )

    def anchor_returned(self, anchor_name: str, now: float) -> None:
        """An anchor that was silent answers again: what it missed goes out now, not after the backoff."""
        for (_unused, name), line in self._lines.items():
            if (
                name == anchor_name
                and line.phase in {Phase.CLAIMING, Phase.WITHDRAWING}
                and line.due_at > now
            ):
                line.attempts = 0
                self._schedule(line, now)

    def starting(self, vm: str) -> bool:
        """Whether ``vm`` was claimed as started here, and an anchor has not accepted that."""
        return any(
            line.started for anchor in self._anchors if (line := self._lines.get((vm, anchor))) is not None
        )

    def status(self, vm: str) -> Mapping[str, dict[str, str | int | float | None]]:
        """For each anchor: phase, sentence, age of the last acknowledgement's clock reading."""
        return {
            anchor: {
                "phase": line.phase.value,
                "sentence": line.sentence,
                "attempts": line.attempts,
                "acknowledged_at": line.acknowledged_at,
            }
            for anchor in self._anchors
            if (line := self._lines.get((vm, anchor))) is not None
        }

    def acknowledged(self, vm: str) -> list[str]:
        """The anchors that hold the VM's current claim."""
        return [
            anchor
            for anchor in self._anchors
            if (line := self._lines.get((vm, anchor))) is not None and line.phase is Phase.REGISTERED
        ]
