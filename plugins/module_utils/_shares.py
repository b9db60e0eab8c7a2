# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Who of those under way may take what it can get, and what is left for the others, interval by interval."""

from __future__ import annotations

import typing as t

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
# So many times as urgent is who takes the place of one that is served fully.
_PUSHES_OUT = 4.0

Member = tuple[VmSummary, Move]


class Shares:
    """The shares of all gates. ``given``: the last ones, in bytes per second, None: no limit of ours.

    ``open_throughout``: those that had no limit in the last interval and the one before it; what they got may
    be believed.
    """

    def __init__(self) -> None:
        self.given: dict[str, float | None] = {}
        self.open_throughout: set[str] = set()
        # Per gate: the moves that are served fully, in the order in which they came to be.
        self._open: dict[int, dict[str, None]] = {}
        # Those that came to be served fully in the middle of an interval.
        self._opened_between: set[str] = set()
        self._intervals_open: dict[str, int] = {}
        # Gates at which more were served fully than the gate allows: for one that is nearly over.
        self._crowded: set[int] = set()

    def crowded(self, gate: Gate) -> bool:
        """Whether one took the place of another that was not over: what they got says nothing of the gate."""
        return id(gate) in self._crowded

    def intervals_open(self, uuid: str) -> int:
        """For how many intervals on end a move could take what it can get."""
        return self._intervals_open.get(uuid, 0)

    def share(
        self,
        served: t.Iterable[tuple[Gate, list[Member]]],
        moves: t.Mapping[str, Move],
        *,
        between: bool = False,
    ) -> dict[str, float | None]:
        """The shares of the coming interval, of every gate's members; ``moves`` are those that were seen.

        ``between`` two looks: of the rest of this one. Who is opened then was not open throughout.
        """
        shares: dict[str, float | None] = {}
        before = {uuid for opened in self._open.values() for uuid in opened}
        for gate, members in served:
            self._share_gate(gate, members, shares)
        opened = {uuid for names in self._open.values() for uuid in names}
        self.given = dict(shares)
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
        for uuid in before - opened:
            self._intervals_open.pop(uuid, None)
        return shares

    def _share_gate(self, gate: Gate, members: list[Member], shares: dict[str, float | None]) -> None:
        opened = self._opened(gate, members, self._open.get(id(gate), {}))
        self._open[id(gate)] = opened
        if len(opened) > gate.open:
            self._crowded.add(id(gate))
        else:
            self._crowded.discard(id(gate))
        rest = []
        for vm, move in members:
            if vm.uuid in opened or move.phase is Phase.LAST or move.rung is not Rung.LIVE:
                shares[vm.uuid] = None
            else:
                rest.append((vm, move))
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

    def _opened(self, gate: Gate, members: list[Member], before: t.Mapping[str, None]) -> dict[str, None]:
        """Who may take what it can get: whoever does already, then the most urgent, on idle pairs first.

        A live move that is throttled half way sends again what is dirtied meanwhile; so none is pushed out
        but by the gate's own narrowing, and then the last that came, or by one that is so much sooner through
        that the rest of it is little beside.
        """
        free = gate.open
        opened: dict[str, None] = {}
        candidates = {
            vm.uuid: (vm, move)
            for vm, move in members
            if move.phase is not Phase.LAST and move.rung is Rung.LIVE
        }
        # A guest that stands still has its place, whatever else is said.
        free -= sum(1 for _vm, move in members if move.rung is not Rung.LIVE)
        rate = _full_rate(gate)
        kept = _kept([candidates[uuid] for uuid in before if uuid in candidates],
                     [entry for uuid, entry in candidates.items() if uuid not in before], rate)  # fmt: skip
        busy: dict[tuple[str, str], int] = {}
        for uuid in kept:
            entry = vm, move = candidates.pop(uuid)
            if free <= 0 and opened:
                candidates[uuid] = entry
                continue
            opened[uuid] = None
            busy[vm.pair] = busy.get(vm.pair, 0) + 1
            # Over before the next look: the one after it opens now, or the link would idle meanwhile.
            if not _over_soon(move, gate.round_trip_seconds):
                free -= 1
        waiting = sorted(
            candidates.values(),
            # Who is still in the lead-in has nothing to send yet: an open place would be idle.
            key=lambda entry: (entry[1].phase is Phase.LEAD_IN, -_urgency(entry[0], entry[1], rate)),
        )
        turns: list[tuple[int, int, str]] = []
        for number, (vm, _move) in enumerate(waiting):
            turns.append((busy.get(vm.pair, 0), number, vm.uuid))
            busy[vm.pair] = busy.get(vm.pair, 0) + 1
        for _turn, _number, uuid in sorted(turns):
            if free <= 0 and opened:
                break
            opened[uuid] = None
            free -= 1
        return opened


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


def _over_soon(move: Move, round_trip_seconds: float) -> bool:
    """Whether it is through before one that opens only at the next look would fill the link."""
    rate, until = move.bytes_per_second, INTERVAL_SECONDS + _GROWTH_ROUND_TRIPS * round_trip_seconds
    return move.phase is Phase.BULK and rate > 0 and live_seconds(move, rate) <= until


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
