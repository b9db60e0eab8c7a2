# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Who of those under way may take what it can get, and what is left for the others, interval by interval."""

from __future__ import annotations

import typing as t
from heapq import heappop, heappush

from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import Move, Phase, live_seconds
from ansible_collections.lifeboat.evacuation.plugins.module_utils._forecast import (
    CONVERGES_BELOW,
    ROUNDS_WITHOUT_PROGRESS,
    forecast,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._gate import Gate
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import (
    DEFAULT_STREAM_BYTES_PER_SECOND,
    Rung,
    VmSummary,
)

INTERVAL_SECONDS = 2.0
# What those that are not open get at least, together: a relay that stands still for 10 s is closed.
_TRICKLE_SHARE = 0.05
_TRICKLE_BYTES_PER_SECOND = 65_536.0
# What a stream that had a trickle needs until it has what it may take: its window doubles with each.
_GROWTH_ROUND_TRIPS = 5.0
# A share that is lent for less is as good as none: the proxies lend none for less.
_SHORTEST_LEASE_SECONDS = 1.0
# Who is so much as urgent as the most urgent, or worth so much, may have its place first.
ALIKE = 0.6
# So many times as urgent is who takes the place of one that is served fully.
_PUSHES_OUT = 4.0

Member = tuple[VmSummary, Move]


class Shares:
    """The shares of all gates. ``given``: the last ones, in bytes per second, None: no limit of ours.

    ``ends_in``: of shares that are to end before the next look, in how many seconds: then the one before it
    is through, and it may take what it can get.
    ``open_throughout``: those that had no limit in the last interval and the one before it; what they got may
    be believed.
    """

    def __init__(self) -> None:
        self.given: dict[str, float | None] = {}
        self.ends_in: dict[str, float] = {}
        self.open_throughout: set[str] = set()
        # Per gate: the moves that are served fully, in the order in which they came to be.
        self._open: dict[int, dict[str, None]] = {}
        # Those that came to be served fully in the middle of an interval.
        self._opened_between: set[str] = set()
        self._intervals_open: dict[str, int] = {}
        # In which order moves were seen first.
        self._begun: dict[str, int] = {}
        # How old what is told of moves is, seconds.
        self._since = 0.0
        # Gates at which more were served fully than the gate allows: for one that is nearly over.
        self._crowded: set[int] = set()

    def crowded(self, gate: Gate) -> bool:
        """Whether one took the place of another that was not over: what they got says nothing of the gate."""
        return id(gate) in self._crowded

    @property
    def opened(self) -> set[str]:
        """Those without a limit of ours that had one for some of the last interval."""
        return {uuid for uuid, share in self.given.items() if share is None} - self.open_throughout

    def intervals_open(self, uuid: str) -> int:
        """For how many intervals on end a move could take what it can get."""
        return self._intervals_open.get(uuid, 0)

    def share(
        self,
        served: t.Iterable[tuple[Gate, list[Member]]],
        moves: t.Mapping[str, Move],
        *,
        between: bool = False,
        since_seconds: float = 0.0,
    ) -> dict[str, float | None]:
        """The shares of the coming interval, of every gate's members; ``moves`` are those that were seen.

        ``between`` two looks: of the rest of this one. Who is opened then was not open throughout. Figures
        in ``moves`` are ``since_seconds`` old: those of the look.
        """
        self._since = since_seconds
        if not between:
            self._crowded.clear()
        shares: dict[str, float | None] = {}
        self.ends_in = {}
        before = {uuid for opened in self._open.values() for uuid in opened}
        for gate, members in served:
            for vm, _move in members:
                self._begun.setdefault(vm.uuid, len(self._begun))
            self._share_gate(gate, members, shares)
        opened = {uuid for names in self._open.values() for uuid in names}
        self.given = dict(shares)
        for uuid in before - opened:
            self._intervals_open.pop(uuid, None)
        if between:
            self._opened_between |= opened - before
            self.open_throughout &= opened
            return shares
        # Served fully over the whole of the coming interval's predecessor: what it gets may be believed.
        self.open_throughout = (opened & before) - self._opened_between
        self._opened_between = set()
        for uuid in opened:
            if uuid in moves and moves[uuid].phase is Phase.BULK:
                self._intervals_open[uuid] = self._intervals_open.get(uuid, 0) + 1
        return shares

    def _share_gate(self, gate: Gate, members: list[Member], shares: dict[str, float | None]) -> None:
        opened = self._opened(gate, members, self._open.get(id(gate), {}))
        self._open[id(gate)] = dict.fromkeys(opened)
        if len(opened) > gate.open:
            self._crowded.add(id(gate))
        rest = []
        for vm, move in members:
            opens_in = opened.get(vm.uuid, 0.0)
            opens = vm.uuid in opened and opens_in < _SHORTEST_LEASE_SECONDS
            if opens or move.phase is Phase.LAST or move.rung is not Rung.LIVE:
                shares[vm.uuid] = None
                continue
            rest.append((vm, move))
            if vm.uuid in opened:
                self.ends_in[vm.uuid] = opens_in
        if not rest:
            return
        stream = gate.stream or 0.0
        spare = max(0.0, gate.spare - (gate.open - 1) * stream)
        trickle = max(_TRICKLE_BYTES_PER_SECOND, _TRICKLE_SHARE * (gate.capacity or 0.0) / len(rest))
        rate = _full_rate(gate)
        rest.sort(key=lambda entry: (entry[1].phase is Phase.LEAD_IN, -_urgency(entry[0], entry[1], rate)))
        for vm, _move in rest:
            share = max(trickle, min(spare, stream))
            spare = max(0.0, spare - share)
            shares[vm.uuid] = share

    def _opened(self, gate: Gate, members: list[Member], before: t.Mapping[str, None]) -> dict[str, float]:
        """Who may take what it can get, and in how many seconds: whoever does already, then the most urgent.

        A live move that is throttled half way sends again what is dirtied meanwhile; so none is pushed out
        but by the gate's own narrowing, and then the last that came, or by one that is so much sooner through
        that the rest of it is little beside. Where one is over before the next look, the one after it opens
        when it is, some round trips earlier; and so on, for as many as that.
        """
        candidates = {
            vm.uuid: (vm, move)
            for vm, move in members
            if move.phase is not Phase.LAST and move.rung is Rung.LIVE
        }
        # A guest that stands still has its place, whatever else is said.
        free = gate.open - sum(1 for _vm, move in members if move.rung is not Rung.LIVE)
        rate = _full_rate(gate)
        # Who is still in the lead-in has nothing to send yet: an open place would be idle.
        sends = {uuid: entry for uuid, entry in candidates.items() if entry[1].phase is not Phase.LEAD_IN}
        kept = _kept([sends[uuid] for uuid in before if uuid in sends],
                     [entry for uuid, entry in sends.items() if uuid not in before], rate)  # fmt: skip
        growth = _GROWTH_ROUND_TRIPS * gate.round_trip_seconds
        # What one gets that opens now; of one that opened within the last interval its rate says too little.
        seen = rate if gate.stream else 0.0
        alone = seen if gate.open == 1 else 0.0
        opened: dict[str, float] = {}
        # When places are free: of those who are through before another that opens then could fill the link.
        places: list[float] = []
        known = False
        busy: dict[tuple[str, str], int] = {}
        for uuid in kept:
            entry = vm, move = candidates.pop(uuid)
            if free <= 0 and opened:
                candidates[uuid] = entry
                continue
            opened[uuid] = 0.0
            busy[vm.pair] = busy.get(vm.pair, 0) + 1
            free -= 1
            through = _through_seconds(move, max(move.bytes_per_second, alone)) - self._since
            # Of one that was open for less than an interval its rate says too little: it may be through any
            # moment. And where several go the others take up what one leaves: no need to know when.
            known = known or (gate.open == 1 and self.intervals_open(uuid) > 0)
            if through <= INTERVAL_SECONDS + growth:
                heappush(places, max(0.0, through - growth) if known else 0.0)
        for _place in range(min(len(candidates), max(free, 0 if opened else 1))):
            heappush(places, 0.0)
        waiting = [entry for entry in candidates.values() if entry[1].phase is not Phase.LEAD_IN]
        # Of those in their lead-in whoever began first will be the first to send.
        leading = [entry for entry in candidates.values() if entry[1].phase is Phase.LEAD_IN]
        leading.sort(key=lambda entry: self._begun[entry[0].uuid])
        in_turn = _by_pairs_in_turn if gate.open > 1 else _by_pairs
        for vm, move in [*in_turn(waiting, busy, rate), *leading]:
            if not places:
                break
            opens_in = heappop(places)
            opened[vm.uuid] = opens_in
            through = opens_in + _through_seconds(move, seen)
            if known and through <= INTERVAL_SECONDS + growth:
                heappush(places, max(0.0, through - growth))
        return opened


def _by_pairs(waiting: list[Member], busy: t.Mapping[tuple[str, str], int], rate: float) -> list[Member]:
    """Those that wait for the only place: the most urgent first, of those about as urgent one of the pair
    that sends: another's way needs seconds until it carries what the line can."""
    alike = ALIKE * max((_urgency(entry[0], entry[1], rate) for entry in waiting), default=0.0)

    def turn(entry: Member) -> tuple[bool, float]:
        urgency = _urgency(entry[0], entry[1], rate)
        return entry[0].pair not in busy or urgency < alike, -urgency

    return sorted(waiting, key=turn)


def _by_pairs_in_turn(
    waiting: list[Member], busy: t.Mapping[tuple[str, str], int], rate: float
) -> list[Member]:
    """Those that wait for one of several places: the most urgent first, on idle pairs before others."""
    waiting.sort(key=lambda entry: -_urgency(entry[0], entry[1], rate))
    count = dict(busy)
    turns: list[tuple[int, int]] = []
    for number, (vm, _move) in enumerate(waiting):
        turns.append((count.get(vm.pair, 0), number))
        count[vm.pair] = count.get(vm.pair, 0) + 1
    return [waiting[number] for _turn, number in sorted(turns)]


def _kept(opened: list[Member], waiting: list[Member], rate: float) -> list[str]:
    """Who of those that were served fully stays so: all but those that a far more urgent one pushes out."""
    pushing = sorted(
        (_urgency(vm, move, rate) for vm, move in waiting if move.phase is Phase.BULK), reverse=True
    )
    out: set[str] = set()
    for urgency, uuid in sorted((_urgency(vm, move, rate), vm.uuid) for vm, move in opened):
        if not pushing or pushing[0] < _PUSHES_OUT * urgency:
            break
        pushing.pop(0)
        out.add(uuid)
    return [vm.uuid for vm, _move in opened if vm.uuid not in out]


def _through_seconds(move: Move, rate: float) -> float:
    """When it will have sent all, at that rate; infinite where nothing says."""
    return live_seconds(move, rate) if move.phase is Phase.BULK and rate > 0 else float("inf")


def _full_rate(gate: Gate) -> float:
    """What a move gets that is served fully, as far as is known."""
    stream = gate.stream or DEFAULT_STREAM_BYTES_PER_SECOND
    return min(stream, gate.capacity or stream)


def _urgency(vm: VmSummary, move: Move, rate: float) -> float:
    """Weight per byte that will still cross if it is served fully, at that rate.

    By bytes, for a trickled rate would make the last the last for ever; with the rounds to come, for a guest
    that dirties as fast as can be sent has several times its memory before it, and others would wait for it.
    """
    if move.phase is Phase.LEAD_IN:
        left = forecast(vm, Rung.LIVE, rate, 0.0).wire_bytes
        return vm.weight / max(left, 1e4)
    left, shrink = move.left_bytes, move.dirty_bytes_per_second / rate
    if shrink < CONVERGES_BELOW:
        left /= 1.0 - shrink
    else:
        left += (ROUNDS_WITHOUT_PROGRESS + 1) * min(1.0, shrink) * vm.memory_used_bytes * vm.packed_ratio
    return vm.weight / max(left, 1e4)


def wire_bytes(vm: VmSummary) -> float:
    """What a move that has not begun to send will send at least."""
    return vm.lag_bytes + vm.memory_used_bytes * vm.packed_ratio
