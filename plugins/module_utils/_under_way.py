# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Those under way at one look: what places they leave for others, and what they have still to send."""

from __future__ import annotations

import typing as t
from dataclasses import replace

from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import Move, Phase, live_seconds
from ansible_collections.lifeboat.evacuation.plugins.module_utils._gate import Gate
from ansible_collections.lifeboat.evacuation.plugins.module_utils._interval import Observation, Pair
from ansible_collections.lifeboat.evacuation.plugins.module_utils._shares import INTERVAL_SECONDS, wire_bytes
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Rung, VmSummary
from ansible_collections.lifeboat.evacuation.plugins.module_utils._uplinks import Uplinks

# So much of what is left now is counted as what will cross, at most, of a guest whose rounds do not shrink.
_MOST_ROUNDS = 5.0
# So much of what is said to be left of a first round will surely cross: pages that nobody has looked at yet
# may be empty. Who is begun a little early waits with its memory begun; who is late costs all of them time.
_CERTAIN_SHARE = 0.6
# What a line is thought to carry of which nothing is known yet: of small guests more than two begin on it
# while it is idle anyway.
_UNKNOWN_BYTES_PER_SECOND = 12.5e6
# So many begin at one look because the line runs dry, at most; until something is known of the line, so many
# in all, for as long as they are in their lead-ins.
_MOST_AT_ONCE = 4
# Memory of which nobody has seen what packing makes of it: idle guests came to 0.26 to 0.40 of it. Whoever
# thinks that it is more lets the line run dry.
_LEAST_PACKED_RATIO = 0.25


class UnderWay:
    """Made for one look. ``asked_for``: those that were asked to start and are not seen yet.

    ``room``: how many more a gate lets through (by its id), ``active``: how many each pair has, ``packing``:
    how many each source packs; they follow those that begin now. ``leaving``: how many of a gate are nearly
    over and have their places still. ``processors``: how many a source has, where it says so.
    """

    def __init__(
        self,
        seen: Observation,
        asked_for: t.Sequence[VmSummary],
        vms: t.Mapping[str, VmSummary],
        uplinks: Uplinks,
        processors: t.Mapping[str, int],
    ) -> None:
        self._moves = [
            # Whose way is down gets nowhere, whatever its host says.
            (vms[uuid], replace(move, silent=move.silent or not seen.is_up(vms[uuid].pair)))
            for uuid, move in seen.moves.items()
            if uuid in vms
        ]
        # What they send is counted, those that begin now included.
        self._beginning = list(asked_for)
        self._now = seen.now
        self._uplinks = uplinks
        self._processors = processors
        self.room = {id(gate): gate.window for gate in uplinks.gates.values()}
        self.leaving: dict[int, int] = {}
        self._more: dict[int, int] = {}
        self.active: dict[Pair, int] = {}
        self.packing: dict[str, int] = {}
        for vm, move in self._moves:
            if move.phase is not Phase.CLOSING:
                self._packs(vm)
            # One that gets nowhere, or of a host that says nothing, may not keep all others from starting.
            if move.silent or (uplinks.adaptive and (move.hopeless or self._makes_room(vm, move))):
                continue
            self._takes_a_place(vm)
        for vm in asked_for:
            self._packs(vm)
            self._takes_a_place(vm)
        for gate in uplinks.gates.values():
            if not uplinks.adaptive:
                continue
            if gate.pressed and self._hosts_are_busy(gate):
                self.room[id(gate)] = 0
            elif self.room[id(gate)] <= 0 and self._runs_dry(gate):
                self.room[id(gate)] = 1

    def begins(self, vm: VmSummary) -> None:
        """It is one of them from now on."""
        self._packs(vm)
        self._takes_a_place(vm)
        self._beginning.append(vm)
        gate = self._uplinks.gate_of(vm)
        left = self._more.get(id(gate), _MOST_AT_ONCE - 1)
        if self._uplinks.adaptive and left > 0 and self.room[id(gate)] == 0 and self._runs_dry(gate):
            # Small ones are through within a look: one at each look would not fill the line.
            self.room[id(gate)], self._more[id(gate)] = 1, left - 1

    def packs_enough(self, source: str) -> bool:
        """Whether a source has no processor for another, which one getting ready does not need yet.

        Packing a stream is one processor's work: with more they take from each other, and from guests.
        """
        return self.packing.get(source, 0) > self._processors.get(source, 10**9)

    def free_in_seconds(self, gate: Gate) -> float:
        """In how long the first of them is through and its place another's; 0 where nothing says.

        At the latest when the uplink has carried all that is left of them.
        """
        rate = gate.capacity or gate.goodput
        if not rate:
            return 0.0
        told = self._queued_bytes(gate, rate) / rate
        for vm, move in self._moves:
            if move.phase in {Phase.BULK, Phase.LAST} and move.bytes_per_second > 0 and not move.silent:
                if self._uplinks.gate_of(vm) is gate:
                    told = min(told, live_seconds(move, move.bytes_per_second))
        return told

    def busy_seconds(self, gate: Gate) -> float:
        """For how long all that is left of them takes what the uplink carries; 0 where nothing says."""
        rate = gate.capacity or gate.goodput
        return self._queued_bytes(gate, rate) / rate if rate else 0.0

    def _packs(self, vm: VmSummary) -> None:
        self.packing[vm.source] = self.packing.get(vm.source, 0) + 1

    def _takes_a_place(self, vm: VmSummary) -> None:
        self.room[id(self._uplinks.gate_of(vm))] -= 1
        self.active[vm.pair] = self.active.get(vm.pair, 0) + 1

    def _makes_room(self, vm: VmSummary, move: Move) -> bool:
        """It ends while the next one is still in its lead-in: that one may start now."""
        if move.phase is Phase.CLOSING:
            return True
        if move.phase is Phase.LEAD_IN or move.bytes_per_second <= 0:
            return False
        gate = self._uplinks.gate_of(vm)
        if live_seconds(move, move.bytes_per_second) > gate.ahead_seconds:
            return False
        if gate.keeps_one_ready:
            self.leaving[id(gate)] = self.leaving.get(id(gate), 0) + 1
            return False
        return True

    def _runs_dry(self, gate: Gate) -> bool:
        """Whether all that is under way is through before one that started only at the next look could send.

        A lead-in costs an uplink nothing: whoever stands behind it in time keeps the line from idling. Who
        stands there sooner than that waits, with its memory begun.
        """
        if gate.capacity is None and self._leads_in(gate) >= _MOST_AT_ONCE:
            return False
        if self._hosts_are_busy(gate):
            return False
        # What a way carried once may be another line's by now: as much as nobody knows of is thought at most.
        guess = min(gate.expected, _UNKNOWN_BYTES_PER_SECOND) if gate.expected else None
        rate = gate.capacity or guess
        sending = sum(
            move.phase is Phase.BULK and not move.silent and self._uplinks.gate_of(vm) is gate
            for vm, move in self._moves
        )
        ready = sending + self._leads_in(gate)
        idle = self._hosts_idle(gate)
        if sending and not idle and (not rate or (gate.capacity is None and ready > 1)):
            return False  # what it carries is known at the next look
        # Small ones may be through before any of them was seen to send.
        rate = gate.capacity or max(rate or _UNKNOWN_BYTES_PER_SECOND, gate.carried)
        # Processors that are short do not idle if it does: half a look passes in the mean until the next one.
        slack = INTERVAL_SECONDS / 2 if gate.pressed and not idle else INTERVAL_SECONDS
        return self._through_seconds(gate, rate) < gate.ahead_seconds + slack

    def _hosts_are_busy(self, gate: Gate) -> bool:
        """Whether as many as gain something are in their lead-ins. Only where each fits into a look: of
        larger ones the next must stand ready, whatever it takes."""
        if self._hosts_idle(gate) if gate.pressed else self._leads_in(gate) < gate.lead_ins_at_once:
            return False
        if gate.capacity is None:
            return gate.pressed
        larger = INTERVAL_SECONDS * gate.capacity
        return all(least_bytes(vm, move.rung) < larger for vm, move in self._leading(gate)) and all(
            least_bytes(vm) < larger for vm in self._beginning_at(gate)
        )

    def _hosts_idle(self, gate: Gate) -> bool:
        """Whether, where processors are short, fewer are under way than keep them busy."""
        if not gate.pressed:
            return False
        at_work = sum(
            # A guest that shuts down is none of its host's work.
            move.phase is not Phase.CLOSING and (move.phase, move.rung) != (Phase.LEAD_IN, Rung.RESTART)
            for vm, move in self._moves
            if not move.silent and self._uplinks.gate_of(vm) is gate
        )
        return at_work + len(self._beginning_at(gate)) < gate.enough

    def _leads_in(self, gate: Gate) -> int:
        """How many are in their lead-in, those that begin now included: not who takes longer, as a guest does
        that shuts down, for that keeps nobody from the line."""
        led = [self._uplinks.leads_in_for(vm.uuid, self._now) for vm, _move in self._leading(gate)]
        return sum(seconds <= gate.lead_in_seconds for seconds in led) + len(self._beginning_at(gate))

    def _leading(self, gate: Gate) -> list[tuple[VmSummary, Move]]:
        """Those that are in their lead-in."""
        return [
            (vm, move)
            for vm, move in self._moves
            if move.phase is Phase.LEAD_IN and not move.silent and self._uplinks.gate_of(vm) is gate
        ]

    def _beginning_at(self, gate: Gate) -> list[VmSummary]:
        """Those that begin now, or were asked to."""
        return [vm for vm in self._beginning if self._uplinks.gate_of(vm) is gate]

    def _through_seconds(self, gate: Gate, rate: float) -> float:
        """When a gate that carries so much is through with all: none sends before its lead-in is over.

        Small ones count without: of those that fit into a look one at each would not fill the line, and the
        line would look as if it carried no more.
        """
        at = self._sending_bytes(gate, rate) / rate
        lead = gate.lead_in_seconds if at > 0 else gate.idle_lead_in_seconds
        ready = [
            (max(0.0, lead - self._uplinks.leads_in_for(vm.uuid, self._now)), least_bytes(vm, move.rung))
            for vm, move in self._leading(gate)
        ]
        ready += [(lead, least_bytes(vm)) for vm in self._beginning_at(gate)]
        for ends, left in sorted(ready):
            takes = left / rate
            at = takes + (at if gate.capacity and takes < INTERVAL_SECONDS else max(at, ends))
        return at

    def _queued_bytes(self, gate: Gate, rate: float) -> float:
        """What all of them have still to send through a gate that carries so much."""
        leading = sum(least_bytes(vm, move.rung) for vm, move in self._leading(gate))
        beginning = sum(least_bytes(vm) for vm in self._beginning_at(gate))
        return leading + beginning + self._sending_bytes(gate, rate)

    def _sending_bytes(self, gate: Gate, rate: float) -> float:
        """The same of those whose memory crosses."""
        queued = 0.0
        for vm, move in self._moves:
            if move.silent or move.hopeless or self._uplinks.gate_of(vm) is not gate:
                continue
            if move.phase not in {Phase.LEAD_IN, Phase.CLOSING}:
                # With the rounds to come: who starts too early has its memory dirtied while it waits.
                left = min(live_seconds(move, rate) * rate, _MOST_ROUNDS * move.left_bytes)
                unknown = move.round_number == 1 and vm.sampled_memory_bytes is None
                queued += _CERTAIN_SHARE * left if unknown else left
        return queued


def least_bytes(vm: VmSummary, rung: Rung = Rung.LIVE) -> float:
    """What a move that has not begun to send will send, if little; by restart no memory crosses."""
    if rung is Rung.RESTART or not vm.running or vm.rungs[:1] == (Rung.RESTART,):
        return vm.lag_bytes
    sampled = vm.sampled_memory_bytes is not None
    return wire_bytes(vm if sampled else replace(vm, packed_ratio=_LEAST_PACKED_RATIO))
