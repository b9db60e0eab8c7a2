# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Who of those under way may take what it can get, and what is left for the others, interval by interval."""

from __future__ import annotations

import typing as t

from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import Move, Phase, live_seconds
from ansible_collections.lifeboat.evacuation.plugins.module_utils._gate import Gate
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Rung, VmSummary

INTERVAL_SECONDS = 2.0
# What those that are not open get at least, together: a relay that stands still for 10 s is closed.
_TRICKLE_SHARE = 0.05
_TRICKLE_BYTES_PER_SECOND = 65_536.0

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
        self._intervals_open: dict[str, int] = {}

    def intervals_open(self, uuid: str) -> int:
        """For how many intervals on end a move could take what it can get."""
        return self._intervals_open.get(uuid, 0)

    def share(
        self, served: t.Iterable[tuple[Gate, list[Member]]], moves: t.Mapping[str, Move]
    ) -> dict[str, float | None]:
        """The shares of the coming interval, of every gate's members; ``moves`` are those that were seen."""
        shares: dict[str, float | None] = {}
        before = {uuid for opened in self._open.values() for uuid in opened}
        for gate, members in served:
            self._share_gate(gate, members, shares)
        opened = {uuid for names in self._open.values() for uuid in names}
        # Served fully over the whole of the coming interval's predecessor: what it gets may be believed.
        self.open_throughout = opened & before
        self.given = dict(shares)
        for uuid in opened:
            if uuid in moves and moves[uuid].phase is Phase.BULK:
                self._intervals_open[uuid] = self._intervals_open.get(uuid, 0) + 1
        for uuid in before - opened:
            self._intervals_open.pop(uuid, None)
        return shares

    def _share_gate(self, gate: Gate, members: list[Member], shares: dict[str, float | None]) -> None:
        opened = self._opened(gate, members, self._open.get(id(gate), {}))
        self._open[id(gate)] = opened
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
        rest.sort(key=lambda entry: (entry[1].phase is Phase.LEAD_IN, -_urgency(*entry)))
        for vm, _move in rest:
            share = max(trickle, min(spare, stream))
            spare = max(0.0, spare - share)
            shares[vm.uuid] = share

    def _opened(self, gate: Gate, members: list[Member], before: t.Mapping[str, None]) -> dict[str, None]:
        """Who may take what it can get: whoever does already, then the most urgent, on idle pairs first.

        A live move that is throttled half way sends again what is dirtied meanwhile; so none is pushed out
        but by the gate's own narrowing, and then the last that came.
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
        busy: dict[tuple[str, str], int] = {}
        for uuid in before:
            entry = candidates.pop(uuid, None)
            if entry is None:
                continue
            vm, move = entry
            if free <= 0 and opened:
                candidates[uuid] = entry
                continue
            opened[uuid] = None
            busy[vm.pair] = busy.get(vm.pair, 0) + 1
            # Over before the next look: the one after it opens now, or the link would idle meanwhile.
            if not _over_soon(move):
                free -= 1
        waiting = sorted(
            candidates.values(),
            # Who is still in the lead-in has nothing to send yet: an open place would be idle.
            key=lambda entry: (entry[1].phase is Phase.LEAD_IN, -_urgency(*entry)),
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


def _over_soon(move: Move) -> bool:
    rate = move.bytes_per_second
    return move.phase is Phase.BULK and rate > 0 and live_seconds(move, rate) <= INTERVAL_SECONDS


def _urgency(vm: VmSummary, move: Move) -> float:
    """Weight per byte that is left: by bytes, for a trickled rate would make the last the last for ever."""
    left = move.remaining_bytes
    if move.phase is Phase.LEAD_IN:
        left = wire_bytes(vm)
    return vm.weight / max(left, 1e4)


def wire_bytes(vm: VmSummary) -> float:
    """What a move that has not begun to send will send at least."""
    return vm.lag_bytes + vm.memory_used_bytes * vm.packed_ratio
