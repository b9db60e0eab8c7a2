# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The uplinks of a site: which gate a VM goes through, and what an interval teaches about each."""

from __future__ import annotations

import typing as t

from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import Move, Phase, live_seconds
from ansible_collections.lifeboat.evacuation.plugins.module_utils._gate import FixedGate, Gate, Served
from ansible_collections.lifeboat.evacuation.plugins.module_utils._interval import Observation, Pair
from ansible_collections.lifeboat.evacuation.plugins.module_utils._shares import INTERVAL_SECONDS, Shares
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import (
    PairSummary,
    Rung,
    SiteSummary,
    VmSummary,
)

# A line that carries more than this share of what it can is busy.
_BUSY_SHARE = 0.3


class Uplinks:
    """The gates by name, and the most that a stream of each pair carried of late (bytes per second).

    ``adaptive``: a gate for each uplink, that finds out how many fill it; else as many as the strategy says.
    ``vms`` are the controller's, by UUID.
    """

    def __init__(self, site: SiteSummary, strategy: str, vms: t.Mapping[str, VmSummary]) -> None:
        self.adaptive = strategy == "feedback"
        self.pairs = {pair.key: pair for pair in site.pairs}
        for vm in site.vms:
            self.pairs.setdefault(vm.pair, PairSummary(vm.source, vm.destination, site.site))
        self.gates: dict[str, Gate] = {}
        self.stream: dict[Pair, float] = {}
        self._vms = vms
        self._sent_before: set[str] = set()
        # Of those that were asked to begin and were not seen yet, and of those that were seen to be in their
        # lead-in: since when.
        self._asked_at: dict[str, float] = {}
        self._leads_in_since: dict[str, float] = {}
        self._begun_beside: set[str] = set()
        # Per gate: how many were in their lead-in within the last interval.
        self._lead_ins: dict[int, int] = {}
        self._make_gates(site, strategy)
        for key, pair in self.pairs.items():
            gate = self.gate_of_pair(key)
            gate.round_trip_seconds = max(gate.round_trip_seconds, pair.round_trip_seconds)
            if pair.expected_bytes_per_second:
                # They share the uplink: it carries what one of them carried, at least.
                gate.expected = max(gate.expected or 0.0, pair.expected_bytes_per_second)

    def _make_gates(self, site: SiteSummary, strategy: str) -> None:
        if self.adaptive:
            for pair in {vm.pair for vm in site.vms}:
                uplink = self.pairs[pair].uplink
                if uplink not in self.gates:
                    self.gates[uplink] = Gate(site.uplinks.get(uplink))
            return
        number = {"sequential": 1, "parallel": 10**9}.get(strategy)
        if number is not None:
            self.gates[""] = FixedGate(number)
            return
        each = int(strategy.partition(":")[2])
        for pair in self.pairs:
            self.gates["|".join(pair)] = FixedGate(each)

    def gate_of(self, vm: VmSummary) -> Gate:
        """The gate that a VM goes through."""
        return self.gate_of_pair(vm.pair)

    def gate_of_pair(self, pair: Pair) -> Gate:
        """The gate that all of a pair go through."""
        if self.adaptive:
            return self.gates[self.pairs[pair].uplink]
        return self.gates.get("") or self.gates["|".join(pair)]

    def observe(self, seen: Observation, shares: Shares, waiting_uuids: t.Iterable[str]) -> None:
        """What was carried since the last look; ``shares`` are those that held meanwhile."""
        served: dict[int, dict[str, Served]] = {}
        most: dict[int, float] = {}
        sent_before, self._sent_before = self._sent_before, set()
        sending = {id(self.gate_of(self._vms[uuid])) for uuid in sent_before}
        waiting_uuids = tuple(waiting_uuids)
        self._press(seen, waiting_uuids)
        self._count_lead_ins(seen)
        for uuid in self._leads_in_since.keys() - seen.moves.keys():
            del self._leads_in_since[uuid]
        for uuid, move in seen.moves.items():
            vm = self._vms.get(uuid)
            if vm is None:
                continue
            self._time_lead_in(vm, move, seen.now, busy=id(self.gate_of(vm)) in sending)
            if move.phase not in {Phase.BULK, Phase.LAST}:
                continue
            key = id(self.gate_of(vm))
            share = shares.given.get(uuid)
            # What one gets that has a trickle of ours says nothing of what one can carry.
            most[key] = max(most.get(key, 0.0), move.bytes_per_second if share is None else 0.0)
            if move.silent:
                continue
            self._sent_before.add(uuid)
            # One that began to send within the interval, or was opened in it, would look slow; and one that
            # had nothing more to send for a part of it, as if the others had taken it away.
            if uuid in sent_before and move.phase is Phase.BULK and not self._drains(vm, move):
                fully = uuid in shares.open_throughout
                told = Served(move.bytes_per_second, fully, share)
                if fully or share is not None:
                    served.setdefault(key, {})[uuid] = told
            # What one got that was held back says nothing of its pair: guests were given up for it.
            free = not self.adaptive or move.phase is Phase.LAST or move.rung is not Rung.LIVE
            if move.bytes_per_second > 0 and (free or uuid in shares.open_throughout):
                known = self.stream.get(vm.pair, 0.0)
                self.stream[vm.pair] = max(move.bytes_per_second, known * 0.95)
        goodput: dict[int, float] = {}
        trips: dict[int, float] = {}
        for pair, view in seen.pairs.items():
            if pair in self.pairs:
                gate = self.gate_of_pair(pair)
                # What was told at the beginning may have been another path's.
                trip = view.least_round_trip_seconds or self.pairs[pair].round_trip_seconds
                trips[id(gate)] = max(trips.get(id(gate), 0.0), trip)
                goodput[id(gate)] = goodput.get(id(gate), 0.0) + view.goodput_bytes_per_second
        gates = {id(gate): gate for gate in self.gates.values()}
        for key, trip in trips.items():
            gates[key].round_trip_seconds = trip
        waiting: set[int] = set()
        for uuid in waiting_uuids:
            waiting.add(id(self.gate_of(self._vms[uuid])))
            if len(waiting) == len(gates):
                break
        for key, gate in gates.items():
            if shares.crowded(gate):
                gate.observe_crowded(goodput.get(key, 0.0), served.get(key, {}), most.get(key, 0.0))
            else:
                carried = goodput.get(key, 0.0)
                # Where only those are seen that were held back, another carried it and is through.
                seen_most = most.get(key, 0.0) or (carried if key in most else 0.0)
                gate.observe(carried, served.get(key, {}), seen_most, more_wait=key in waiting)

    def leads_in_for(self, uuid: str, now: float) -> float:
        """For how many seconds a move that was not seen to send has been in its lead-in."""
        return now - self._leads_in_since.get(uuid, now)

    def _press(self, seen: Observation, waiting_uuids: t.Iterable[str]) -> None:
        """Whether processors are what is short: those of each source that has something to do, for one that
        has time could begin the next one."""
        least: dict[int, float | None] = {}
        hosts: dict[int, set[str]] = {}
        at_work = {self._vms[uuid].pair for uuid in (*seen.moves, *waiting_uuids) if uuid in self._vms}
        for pair in at_work:
            view, key = seen.pairs.get(pair), id(self.gate_of_pair(pair))
            hosts.setdefault(key, set()).add(pair[0])
            told = None if view is None else view.processors_waited
            known = least.get(key, 1.0)
            least[key] = None if told is None or known is None else min(told, known)
        for gate in self.gates.values():
            gate.press(least.get(id(gate)), len(hosts.get(id(gate), ())))

    def _count_lead_ins(self, seen: Observation) -> None:
        self._lead_ins = {}
        for uuid, move in seen.moves.items():
            timed = uuid in self._leads_in_since or uuid in self._asked_at
            if uuid in self._vms and (move.phase is Phase.LEAD_IN or timed):
                key = id(self.gate_of(self._vms[uuid]))
                self._lead_ins[key] = self._lead_ins.get(key, 0) + 1

    def begins(self, vm: VmSummary, now: float) -> None:
        """It is asked to begin now."""
        self._asked_at[vm.uuid] = now
        gate = self.gate_of(vm)
        if gate.goodput > _BUSY_SHARE * (gate.capacity or float("inf")):
            self._begun_beside.add(vm.uuid)
        else:
            self._begun_beside.discard(vm.uuid)

    def _time_lead_in(self, vm: VmSummary, move: Move, now: float, *, busy: bool) -> None:
        """``busy``: others sent at the last look."""
        if move.phase is Phase.LEAD_IN:
            if vm.uuid not in self._leads_in_since:
                # Another's order, or that of a controller before this one: a look before it was seen.
                self._leads_in_since[vm.uuid] = self._asked_at.pop(vm.uuid, now - INTERVAL_SECONDS)
            if busy:
                self._begun_beside.add(vm.uuid)
            return
        since = self._leads_in_since.pop(vm.uuid, None)
        asked_at = self._asked_at.pop(vm.uuid, None)
        since = asked_at if since is None else since
        if since is not None and move.phase is Phase.BULK and not move.silent:
            # Unless it was looked at meanwhile: it ended some time within the interval.
            ended = now - INTERVAL_SECONDS / 2 if move.sends_since is None else move.sends_since
            busy = busy or vm.uuid in self._begun_beside
            gate = self.gate_of(vm)
            at_once = self._lead_ins.get(id(gate), 1)
            gate.saw_lead_in(max(0.0, ended - since), busy=busy, at_once=at_once)
        self._begun_beside.discard(vm.uuid)

    def _drains(self, vm: VmSummary, move: Move) -> bool:
        """Whether it is through before long: its last rounds are short, and do not fill an interval."""
        rate = max(move.bytes_per_second, self.stream.get(vm.pair, 0.0))
        return live_seconds(move, rate) <= INTERVAL_SECONDS
