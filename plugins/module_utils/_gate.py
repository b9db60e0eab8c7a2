# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""How many VMs at a time fill an uplink: found by trying, never assumed.

One move is served first: it may take what it can get. What is left, ``spare``, goes to the next ones in their
order. Spare grows for as long as nobody who is served fully gets less than before (by doubling at first, then
by a tenth: additive increase); as soon as one is hurt it is halved (multiplicative decrease). An uplink that
one VM fills ends with one at a time and a trickle for the others, one that is wider than a single stream with
as many as it takes; and when its rate changes, so does that.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from ansible_collections.lifeboat.evacuation.plugins.module_utils._forecast import (
    LEAD_IN_ROUND_TRIPS,
    LEAD_IN_SECONDS,
    lead_in_seconds,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import (
    DEFAULT_STREAM_BYTES_PER_SECOND,
)

_HURT = 0.9
_FULL = 0.92
_FILLED = 0.85
_USED = 0.6
_FIRST_PROBE = 0.25
_STEP = 0.1
_LEAP = 4.0
_FIRST_REST = 4
_LONGEST_REST = 32
# Below this share of what one move gets, spare is as good as none.
_NOTHING = 0.06
_BLIND_INTERVALS = 2
# So many times as long as on an idle line a lead-in is thought to take beside others that send, until one
# was seen.
_BUSY = 1.6
# A lead-in that takes longer than so many usual ones had much to catch up with: it says nothing of others.
_LONGEST_LEAD_IN = 5.0
# How much the newest lead-in counts where it was shorter than those before; a longer one counts at once, for
# who begins too late leaves the line idle for all.
_NEWEST_LEAD_IN = 0.4
# So many lead-ins of small VMs are begun at once before it was seen what they do to each other; and where
# they lose more than the time of so many in waiting for each other, one less (TCP Vegas counts packets in
# queues so: Brakmo and Peterson, 1995).
_FIRST_LEAD_INS = 2
_QUEUED_LEAD_INS = 1.0
# Where it is known to be processors that they wait for: so few.
_QUEUED_PRESSED = 0.5
# So many moves keep processors busy that are short already, at least.
_KEEP_BUSY = 2
# Processors that are waited for in more than this share of the time are busy for most of it (if what comes
# comes at random, two are for 82 %, sixteen for 92 %: Erlang's C formula).
_PRESSED = 0.6
# What those that are served fully must gain of what is taken from the others; and the uplink of what the
# others take more.
_GAINED = 0.4
# By so much of what was carried the others must take more for that to be told; and an interval that carried
# less than so much of it had a gap.
_TOLD = 0.1
_NO_GAP = 0.75
# Who got so much of what was carried had the uplink for most of the interval.
_MOSTLY = 0.5
# An uplink that carried so many times what one move is known to get, in so many looks on end, is wider.
_WIDER = 1.2
_WIDER_LOOKS = 2
# A guess at an uplink may be too low by so many times.
_BOTH_PRESSED = 2.2
# More that are served fully carry so much more at least, unless the uplink is full.
_MORE = 1.05


@dataclass(frozen=True, slots=True)
class Served:
    """What a move got on the wire over an interval that it sent all through; ``fully``: it had no limit."""

    bytes_per_second: float
    fully: bool
    share: float | None = None


class Gate:
    """One uplink. ``rate`` is what it is known to carry (bytes per second), None: nobody knows.

    ``usual_stream`` is what one move is thought to carry before one was seen.
    """

    def __init__(self, rate: float | None, usual_stream: float = DEFAULT_STREAM_BYTES_PER_SECOND) -> None:
        self.rate = rate
        # What its pairs carried when they were last pressed: good enough for when to begin the next one.
        self.expected: float | None = None
        self._usual = usual_stream
        self.goodput = 0.0
        # The most that it was seen to carry of late, also of moves that were through within a look.
        self.carried = 0.0
        # The longest round trip of its pairs, as far as is known; what the longer lead-ins took of late,
        # on an idle line and beside others that sent.
        self.round_trip_seconds = 0.0
        self._idle_lead_in: float | None = None
        self._busy_lead_in: float | None = None
        self._least_lead_in: float | None = None
        # Whether its hosts' processors were waited for in most of the last interval: they are what is short;
        # and how many hosts have something to do.
        self.pressed = False
        self._hosts = 1
        # So many lead-ins at once gain something: more take longer by as much, for they are work for hosts.
        self.lead_ins_at_once = _FIRST_LEAD_INS
        self.spare = 0.0
        self.stream: float | None = None
        self.reason = "first"
        self._best = 0.0
        self._got: dict[str, float] = {}
        self._starting = True
        self._rest = 0
        self._rest_length = _FIRST_REST
        self._blind = 0
        self._most_blind = 0.0
        self._tried = False
        self._wider = 0
        # How many were served fully when spare was raised last, and what was carried by then.
        self._raised_with: tuple[int, float] | None = None
        # What spare was before it was raised last.
        self._before = 0.0
        # Until it is known what came of that: what was carried before, what the others had of it, and the
        # spare that they have now.
        self._raised: tuple[float, float, float] | None = None
        # While less spare is tried: what it was, and what those that are served fully got with it.
        self._narrowing: tuple[float, float] | None = None

    @property
    def lead_in_seconds(self) -> float:
        """What passes before the memory of one that begins beside others that send begins to cross: as was
        seen of late, else longer than on an idle line."""
        if self._busy_lead_in is not None:
            return self._busy_lead_in
        return max(_BUSY * lead_in_seconds(self.round_trip_seconds), self._idle_lead_in or 0.0)

    @property
    def idle_lead_in_seconds(self) -> float:
        """The same while nobody sends."""
        idle = self._idle_lead_in
        return min(lead_in_seconds(self.round_trip_seconds) if idle is None else idle, self.lead_in_seconds)

    def press(self, waited: float | None, hosts: int = 1) -> None:
        """In what share of the interval the processors of its hosts were waited for; None: nobody tells.
        So many ``hosts`` have somebody to send."""
        # A lead-in that is mostly round trips costs hosts little, and who is begun late leaves the line idle.
        works = LEAD_IN_ROUND_TRIPS * self.round_trip_seconds < LEAD_IN_SECONDS
        self.pressed = waited is not None and waited >= _PRESSED and works
        if self.pressed and self._least_lead_in is None:
            # What one takes alone is to be seen first.
            self.lead_ins_at_once = 1
        self._hosts = hosts

    @property
    def enough(self) -> int:
        """So many of those that fit into a look keep the hosts' processors busy: one of each host, and two
        at least, for a lead-in waits for libvirt and round trips as well."""
        return max(_KEEP_BUSY, self._hosts)

    @property
    def ahead_seconds(self) -> float:
        """How long before the line is free the next one is begun: as long as its lead-in takes. What of that
        is waiting for processors is left out where they are short, for beginning sooner makes it longer."""
        if self.pressed:
            return min(self.idle_lead_in_seconds, self._least_lead_in or self.idle_lead_in_seconds)
        return self.lead_in_seconds

    def saw_lead_in(self, seconds: float, *, busy: bool = True, at_once: int = 1) -> None:
        """A move's memory began to cross so long after it was begun, while others sent (``busy``) or none;
        ``at_once`` were in their lead-ins, it included."""
        if seconds > _LONGEST_LEAD_IN * lead_in_seconds(self.round_trip_seconds):
            return
        self._least_lead_in = min(seconds, self._least_lead_in or seconds)
        queued = _QUEUED_PRESSED if self.pressed else _QUEUED_LEAD_INS
        if at_once * (1.0 - self._least_lead_in / max(seconds, 1e-3)) > queued:
            self.lead_ins_at_once = max(1, at_once - 1)
        else:
            self.lead_ins_at_once = max(at_once + 1, self.lead_ins_at_once)
        if busy:
            self._busy_lead_in = _longer_of_late(self._busy_lead_in, seconds)
        else:
            self._idle_lead_in = _longer_of_late(self._idle_lead_in, seconds)

    @property
    def capacity(self) -> float | None:
        """The best guess at what the uplink carries, None before anything was measured."""
        return self._best or self.rate

    @property
    def full(self) -> bool:
        """Whether it carries what it is known to carry."""
        return self.rate is not None and self.goodput >= _FULL * self.rate

    @property
    def _filled(self) -> bool:
        """Whether it did so of late: between two moves it carries less, and has no more room for that."""
        return self.rate is not None and self._best >= _FILLED * self.rate

    @property
    def _as_guessed(self) -> bool:
        """Whether it carried about what was guessed at an uplink that nobody knows."""
        guess = self.expected if self.rate is None else None
        return guess is not None and _FILLED * guess <= self._best <= _WIDER * guess

    @property
    def open(self) -> int:
        """How many moves are served fully."""
        if not self.stream:
            return 1
        return 1 + int(self.spare / self.stream + 0.05)

    @property
    def window(self) -> int:
        """How many moves may be under way; at first the next ones are got ready before there is room."""
        if self._starting and not self._filled and not self._as_guessed and not self.pressed:
            # Where one is thought to fill it, another would only be kept waiting with its memory begun.
            thought = self.rate or self.expected or 2 * self._usual
            return 1 if self.stream is None and thought <= self._usual else 2 * self.open
        partly = self.stream is not None and self.spare % self.stream > _FIRST_PROBE * self.stream
        return self.open + partly

    @property
    def one_at_a_time(self) -> bool:
        """Whether one move is thought to fill it.

        What a way carried when it was last pressed may have been half of the line, for another was pressed
        beside it: while no more is carried, one at a time goes there as well.
        """
        guessed = self.expected is not None and self._best <= _BOTH_PRESSED * self.expected
        # Where processors are short it is the other hosts' ones that have time.
        alone = self.open == 1 and not self.pressed
        return alone and (self.window == 1 or not self._starting or guessed)

    @property
    def keeps_one_ready(self) -> bool:
        """Whether there is a place for the next one beside the one that is thought to fill it: who is nearly
        over makes room for that one, not for a third."""
        return self.one_at_a_time and self.window > 1 and self.stream is not None

    def observe(
        self, goodput: float, served: t.Mapping[str, Served], most: float = 0.0, *, more_wait: bool
    ) -> None:
        """An interval: goodput in bytes per second, what each move got that sent all through it, and the most
        that any move got at all."""
        self._carries(goodput)
        if self._brought_nothing(served):
            return
        full = {name: move.bytes_per_second for name, move in served.items() if move.fully}
        # Whoever is served fully and gets nothing has a link that is down: that says nothing of the uplink.
        if not any(full.values()) or goodput <= 0:
            self._got = {name: got for name, got in self._got.items() if name in served}
            self._judge_narrower(None)
            self._blind += goodput > 0 and most > 0
            self._most_blind = max(self._most_blind, most)
            if self._starting and self._blind >= _BLIND_INTERVALS and most > 0 and not self.pressed:
                # Moves so short that none fills an interval: whether they hurt each other shows later.
                self._blind = 0
                self._best = max(self._best, goodput)
                self.stream = max(self.stream or 0.0, self._most_blind)
                self._grow(served, self.stream, more_wait)
            return
        most = max(full.values())
        self.stream = most if self.stream is None else max(most, 0.9 * self.stream + 0.1 * most)
        self._best = max(goodput, 0.95 * self._best)
        known = full.keys() & self._got.keys()
        before = sum(self._got[name] for name in known)
        now = sum(full[name] for name in known)
        hurt = bool(known) and now < _HURT * before
        self._got = {name: max(got, 0.0 if hurt else self._got.get(name, 0.0)) for name, got in full.items()}
        if hurt:
            self._hurt(most)
            # Until it has what it had: a halving that was not enough shows as being hurt again.
            if self.spare > _NOTHING * most:
                for name in known:
                    self._got[name] = max(self._got[name], full[name] * before / max(now, 1.0) * _HURT)
            return
        if self._narrowing is not None:
            self._judge_narrower(now if known == full.keys() else None)
            return
        if self._rest > 0:
            self._rest -= 1
            return
        if self.spare > _NOTHING * most and (self.full or not self._starting) and not self._tried:
            # Is what the others take missing to the first? Asked before more is given.
            self._tried = True
            self._narrowing = (self.spare, sum(full.values()))
            self.spare *= 0.5
            return
        self._tried = False
        if self._more_carried_no_more(len(full)):
            return
        self._grow(served, most, more_wait)

    def _more_carried_no_more(self, number: int) -> bool:
        """Whether more are served fully than when spare was raised last, and all of them carry no more."""
        if self._raised_with is None or not self._starting or self.rate is not None:
            return False
        before, carried = self._raised_with
        if number <= max(before, 1) or not _NO_GAP * carried <= self.goodput < _MORE * carried:
            return False
        self.reason = "no-more-carried"
        self.spare = min(self._before, self.spare)
        self._starting = False
        return True

    def observe_crowded(self, goodput: float, served: t.Mapping[str, Served], most: float = 0.0) -> None:
        """An interval in which one took the place of another: only what all of them got tells something, and
        that one can get at least the most that any got."""
        self._carries(goodput)
        # Who began at its end got next to nothing, and says nothing.
        if most >= _MOSTLY * goodput > 0:
            self.stream = max(self.stream or 0.0, most)
        self._best = max(goodput, 0.95 * self._best)
        self._wider = self._wider + 1 if self.stream and goodput > _WIDER * self.stream else 0
        wider = self._wider >= _WIDER_LOOKS and not self.pressed
        if self.stream and self.rate is None and self._starting and wider:
            # Small ones are through within a few looks, and nearly all of these are crowded: that all of them
            # together got more than one can is what shows that there is room.
            if (grown := 2 * (goodput - self.stream)) > self.spare:
                self.reason = "more-carried"
                self._before, self.spare = self.spare, grown
                self._raised = None
                return
        if not self._brought_nothing(served):
            self._judge_narrower(None)

    def _carries(self, goodput: float) -> None:
        self.goodput = goodput
        self.carried = max(goodput, 0.95 * self.carried)

    def _brought_nothing(self, served: t.Mapping[str, Served]) -> bool:
        """Whether spare was raised, the others took it, and all of them together got no more than before.

        Whoever is served fully comes and goes, and small ones fill no two intervals: by what each of them
        gets it would never show.
        """
        if self._raised is None or self.goodput <= 0:
            return False
        carried, had, spare = self._raised
        if spare != self.spare or self.open > 1:
            # Others tell of that: one more is served fully, or it is another spare by now.
            self._raised = None
            return False
        more = _others_got(served) - had
        if more < _TOLD * carried or self.goodput < _NO_GAP * carried:
            return False
        self._raised = None
        if self.goodput - carried >= _GAINED * more:
            return False
        self.reason = "no-more-carried"
        self.spare = self._before
        self._starting = self._tried = False
        self._narrowing = None
        self._rest = self._rest_length
        self._rest_length = min(2 * self._rest_length, _LONGEST_REST)
        return True

    def _judge_narrower(self, now: float | None) -> None:
        if self._narrowing is None:
            return
        spare, before = self._narrowing
        self._narrowing = None
        if now is None:
            self._tried = False  # one came or went: nothing can be said
            self.spare = spare
        elif now - before >= _GAINED * (spare - self.spare):
            self.reason = "fewer-do"
            self._tried = False
            self._starting = False
            if self.spare <= _NOTHING * (self.stream or 0.0):
                # Nothing is left to take: one at a time fills it, and for a while that is not asked again.
                self._rest = self._rest_length
        else:
            self.spare = spare
            hurt_before = self.reason == "no-more-carried"
            self._rest = self._rest_length if self.full or hurt_before else 0

    def _hurt(self, most: float) -> None:
        self._narrowing = None
        if self.spare <= _NOTHING * most:
            # Nobody else took it: the uplink itself carries less.
            self.reason = "link-slower"
            self.spare = 0.0
            self._best = self.goodput
            self.stream = most
            self._rest, self._rest_length = 1, _FIRST_REST
            return
        self.reason = "no-more-carried"
        if self.spare <= 2 * _NOTHING * most:
            self.spare = 0.0
        elif self.spare <= 1.5 * _FIRST_PROBE * most:
            # The first try already: half of it would be missing to the one that fills the uplink.
            self.spare = min(self.spare / 2, self._before)
        else:
            self.spare /= 2
        self._starting = False
        # What is left of it is asked about at once, and only then left alone.
        self._tried = False
        self._rest = self._rest_length if self.spare <= _NOTHING * most else 0
        self._rest_length = min(2 * self._rest_length, _LONGEST_REST)

    def _grow(self, served: t.Mapping[str, Served], most: float, more_wait: bool) -> None:
        offered = [move for move in served.values() if not move.fully and move.share]
        used = sum(move.bytes_per_second for move in offered)
        known = self.rate is not None and self._starting
        if self.full or (known and self._filled) or (not more_wait and not offered):
            return
        if offered and used < _USED * sum(move.share or 0.0 for move in offered):
            return  # they are not held back by us: more for them would bring nothing
        guess = self.expected if self.rate is None else None
        # A guess that is far exceeded was another line's, and nothing is to be held back for it.
        fits = guess is not None and _FILLED * guess <= self.goodput <= _WIDER * guess
        if fits and self.spare >= _FIRST_PROBE * most:
            # Were there more, all of them would carry more than was guessed by now; and where nobody took
            # what was given last, more would only have more of them wait.
            return
        if self.spare < _FIRST_PROBE * most and not known:
            grown = _FIRST_PROBE * most
        elif known and self.rate is not None:
            # Not all at once: what one carries is known from one look, and may have been a part of it.
            grown = max(min(self.rate - self._best, _LEAP * (self.spare + most)), self.spare)
        elif self._starting:
            grown = max(most, 2 * self.spare)
        else:
            grown = self.spare + max(_STEP * (sum(self._got.values()) + used), _FIRST_PROBE * most)
        if grown > self.spare:
            self.reason = "more-carried"
            self._before, self.spare = self.spare, grown
            self._raised = (self.goodput, _others_got(served), self.spare)
            self._raised_with = (sum(move.fully for move in served.values()), self.goodput)


def _longer_of_late(before: float | None, seconds: float) -> float:
    """A figure that follows longer ones at once, and shorter ones by and by."""
    if before is None:
        return seconds
    return max(seconds, (1.0 - _NEWEST_LEAD_IN) * before + _NEWEST_LEAD_IN * seconds)


def _others_got(served: t.Mapping[str, Served]) -> float:
    """What those got that are not served fully."""
    return sum(move.bytes_per_second for move in served.values() if not move.fully)


class FixedGate(Gate):
    """A number that the operator chose."""

    def __init__(self, number: int) -> None:
        super().__init__(None)
        self._number = number
        self.reason = "chosen"

    @property
    def open(self) -> int:
        """That number."""
        return self._number

    @property
    def window(self) -> int:
        """That number."""
        return self._number

    def observe(
        self, goodput: float, served: t.Mapping[str, Served], most: float = 0.0, *, more_wait: bool
    ) -> None:
        """Only remembers the goodput: nothing is tried."""
        del more_wait, served, most
        self.goodput = goodput
        self._best = max(goodput, 0.95 * self._best)
