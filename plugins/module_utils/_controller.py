# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The control law of a coordinated evacuation: from what was seen in an interval to what is done in the next.

Pure: it is given what proxies say and tells what to ask of them. It keeps nothing that a new one, begun in
the middle, would not find out again.
"""

from __future__ import annotations

import typing as t
from dataclasses import replace

from ansible_collections.lifeboat.evacuation.plugins.module_utils._agenda import Agenda
from ansible_collections.lifeboat.evacuation.plugins.module_utils._destination_memory import DestinationMemory
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import (
    Move,
    Phase,
    judge,
    live_seconds,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._forecast import (
    alternatives,
    choose,
    closing_seconds,
    shutdown_seconds_within,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._gate import Gate
from ansible_collections.lifeboat.evacuation.plugins.module_utils._interval import (
    Decision,
    Observation,
    Orders,
    Pair,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._rounds import Rounds
from ansible_collections.lifeboat.evacuation.plugins.module_utils._schedule import TOO_LATE
from ansible_collections.lifeboat.evacuation.plugins.module_utils._shares import (
    Member,
    Shares,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import (
    Rung,
    SiteSummary,
    VmSummary,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._under_way import UnderWay
from ansible_collections.lifeboat.evacuation.plugins.module_utils._uplinks import Uplinks

_HOLD_AHEAD_SECONDS = 45.0
_ATTEMPTS = 3
# After so many intervals in which a move could take what it can get, what it got says what it can get.
_CERTAIN_INTERVALS = 4
_RETRY_SECONDS = 5.0
# Of what the next one is worth a second: who is worth less is not preferred for coming from an idle pair.
_WORTH_AN_IDLE_PAIR = 0.5
# A start that its host has not answered for so long holds nobody up: as a move of a host that is silent.
_UNHEARD_SECONDS = 10.0
# By so much a deadline must have moved for those that gave way to it to be begun again.
_LATER_SECONDS = 10.0


class Controller:
    """One evacuation of one site."""

    def __init__(self, site: SiteSummary, strategy: str = "feedback") -> None:
        self.strategy = strategy
        self.site = site
        self._adaptive = strategy == "feedback"
        self._vms = {vm.uuid: vm for vm in site.vms}
        self._uuid = {name: vm.uuid for vm in site.vms for name in (vm.name, vm.uuid)}
        self._uplinks = Uplinks(site, strategy, self._vms)
        self._waiting: dict[str, None] = {}
        self._agenda = Agenda(self._uplinks, overlap=strategy != "sequential")
        self._hopeless: set[str] = set()
        self._to_restart: set[str] = set()
        self._attempts: dict[str, int] = {}
        self._retry_at: dict[str, float] = {}
        self._over: dict[str, str] = {}
        # Those that gave way because there was no time for them, and the deadline for which they did.
        self._gave_way: dict[str, float] = {}
        self._memory = DestinationMemory(site.destinations)
        self._told: dict[str, str] = {}
        self._held_before: set[str] = set()
        self._started: set[str] = set()
        # Those that were seen last while they were handed over: where they are may be open.
        self._closing: set[str] = set()
        self._unheard_since: dict[Pair, float] = {}
        # When the last whole interval was over.
        self._looked_at = 0.0
        self._shares = Shares()
        self._rounds = Rounds()

    @property
    def gates(self) -> t.Mapping[str, Gate]:
        """The gates by name, for progress lines and the report."""
        return self._uplinks.gates

    @property
    def processors_short(self) -> bool:
        """Whether the next one waits for hosts that have time, and not for a line."""
        return any(gate.pressed for gate in self._uplinks.gates.values())

    @property
    def opened(self) -> set[str]:
        """Where processors are short: those that may take what they can get and could not all through the
        last interval. What they got in it says nothing of when they are through."""
        return self._shares.opened if self.processors_short else set()

    @property
    def waiting(self) -> tuple[str, ...]:
        """UUIDs of the VMs that wait for their turn, in their order."""
        return self._agenda.in_order(self._waiting)

    def given_up(self) -> dict[str, str]:
        """UUIDs of the VMs that will not leave, with the reason's word."""
        return dict(self._over)

    def source_of(self, uuid: str) -> str:
        """The host that a VM leaves."""
        return self._vms[uuid].source

    def has_retries(self, now: float) -> bool:
        """Whether somebody waits for another try that is still to come."""
        return any(self._retry_at.get(uuid, 0.0) > now - _RETRY_SECONDS for uuid in self._waiting)

    def not_started(self, uuid: str, now: float, *, counts: bool = True) -> None:
        """A start did not reach its proxy, or was refused for a moment: it is tried again.

        ``counts`` False: it is no try, for whoever asks sees to it himself that this has an end.
        """
        self._started.discard(uuid)
        self._memory.give_back(self._vms[uuid])
        if not counts:
            self._attempts[uuid] = max(0, self._attempts.get(uuid, 0) - 1)
        if self._attempts.get(uuid, 0) < _ATTEMPTS:
            self._waiting[uuid] = None
            self._retry_at[uuid] = now + _RETRY_SECONDS
        else:
            self._over[uuid] = "unreachable"

    def waits_because(self, uuid: str) -> str:
        """Why a VM that waits was not started, a word."""
        return self._over.get(uuid) or self._told.get(uuid) or "not-reached-its-turn"

    # -- one interval

    def step(self, seen: Observation, *, between: bool = False) -> Orders:
        """Decide. To be called once an interval; and ``between`` two, when somebody is through: then others
        take the place and the line, and nothing is learnt of what the line carries."""
        orders = Orders()
        seen = replace(seen, moves=self._rounds.told(seen.moves, self._vms, seen.now))
        self._take_in(seen)
        if not between:
            self._looked_at = seen.now
            self._uplinks.observe(seen, self._shares, self._waiting)
        asked_for = self._asked_for(seen)
        under_way = UnderWay(seen, asked_for, self._vms, self._uplinks, self.site.processors)
        left = None if seen.deadline_at is None else seen.deadline_at - seen.now
        if self._agenda.is_old(seen, left):
            self._agenda.renew(self.current_site(), seen, left, under_way)
            self._hopeless.clear()
        if self._adaptive and not between:
            self._fall(seen, left, orders)
        self._start(seen, left, asked_for, under_way, orders)
        if self._adaptive:
            self._share(seen, orders, between=between)
            self._hold(seen, orders)
        return orders

    def _take_in(self, seen: Observation) -> None:
        if self._agenda.plan is None:
            for uuid in self._vms:
                self._waiting[uuid] = None
        for uuid in seen.out:
            self._waiting.pop(uuid, None)
            self._over.pop(uuid, None)
            self._holds_memory(uuid)
        for uuid, move in seen.moves.items():
            self._waiting.pop(uuid, None)
            self._holds_memory(uuid)
            if move.phase is Phase.CLOSING:
                self._closing.add(uuid)
        for pair, view in seen.pairs.items():
            if view.heard:
                self._unheard_since.pop(pair, None)
            else:
                self._unheard_since.setdefault(pair, seen.now)
        for uuid, may_retry in seen.failed.items():
            if uuid in self._waiting and uuid not in self._started:
                continue
            self._started.discard(uuid)
            may_retry = may_retry or uuid in self._to_restart
            if may_retry or self._stands_here(uuid):
                self._gives_memory_back(uuid)
            if may_retry and self._attempts.get(uuid, 0) < _ATTEMPTS and uuid not in self._over:
                self._waiting[uuid] = None
                self._retry_at.setdefault(uuid, seen.now + _RETRY_SECONDS)
            else:
                self._waiting.pop(uuid, None)
        self._take_back(seen)

    def _take_back(self, seen: Observation) -> None:
        """Those that gave way to a deadline that has moved since (a UPS is on line again) have their turn."""
        for uuid, at in list(self._gave_way.items()):
            if uuid in seen.out:
                del self._gave_way[uuid]
            elif seen.deadline_at is not None and seen.deadline_at <= at + _LATER_SECONDS:
                continue
            elif uuid in seen.failed and uuid not in seen.moves:
                # Its cancelled job is no try that failed.
                del self._gave_way[uuid]
                self._over.pop(uuid, None)
                self._attempts[uuid] = max(0, self._attempts.get(uuid, 0) - 1)
                self._waiting[uuid] = None
                self._agenda.expire()

    def _holds_memory(self, uuid: str) -> None:
        # Of those that moved before anybody planned, the destination's own answer speaks.
        if uuid in self._attempts and uuid in self._vms:
            self._memory.reserve(self._vms[uuid])

    def _gives_memory_back(self, uuid: str) -> None:
        if uuid in self._vms:
            self._memory.give_back(self._vms[uuid])

    def _stands_here(self, uuid: str) -> bool:
        """Whether one that failed for good is surely not at its destination.

        Its host may be gone while it goes on, or its handing over undecided: then its memory stays taken.
        """
        vm = self._vms.get(uuid)
        return vm is not None and vm.pair not in self._unheard_since and uuid not in self._closing

    def current_site(self) -> SiteSummary:
        """The site as it is known by now: those that wait, what the uplinks carry, what a stream carries."""
        rates = {
            name: (gate.capacity if self._adaptive else None) or self.site.uplinks.get(name)
            for name, gate in self._uplinks.gates.items()
        }
        if not self._adaptive:
            rates = dict(self.site.uplinks)
        pairs = tuple(
            replace(
                pair, stream_bytes_per_second=self._uplinks.stream.get(pair.key, pair.stream_bytes_per_second)
            )
            for pair in self._uplinks.pairs.values()
        )
        vms = tuple(self._vms[uuid] for uuid in self._waiting)
        free = tuple(
            replace(item, memory_free_bytes=self._memory.free_bytes(item.name))
            for item in self.site.destinations
        )
        return SiteSummary(self.site.site, vms, pairs, free, rates, processors=self.site.processors)

    # -- who starts

    def _start(
        self,
        seen: Observation,
        left: float | None,
        asked_for: t.Sequence[VmSummary],
        under_way: UnderWay,
        orders: Orders,
    ) -> None:
        room, active = under_way.room, under_way.active
        if not any(count > 0 for count in room.values()):
            return
        # Who was asked to start and is not seen yet is awaited as those that move.
        at_work = {*seen.moves, *(vm.uuid for vm in asked_for)}
        in_order = self._agenda.in_turn(self._waiting, self._vms) if self._adaptive else self.waiting
        ahead = self._pairs_ahead(in_order, seen, at_work, under_way) if self._adaptive else {}
        least = {key: min(active.get(pair, 0) for pair in pairs) for key, pairs in ahead.items()}
        for uuid in in_order:
            vm = self._vms[uuid]
            gate = self._uplinks.gate_of(vm)
            if room[id(gate)] <= 0:
                if all(count <= 0 for count in room.values()):
                    break
                continue
            view = seen.pairs.get(vm.pair)
            if view is not None and not (view.up and view.heard):
                self._tell(orders, uuid, "waits", "link-down" if view.heard else "not-heard")
                continue
            if self._told.get(uuid) in {"link-down", "not-heard"}:
                self._told.pop(uuid)
            if self._retry_at.get(uuid, 0.0) > seen.now or not self._may_start(vm, at_work):
                continue
            # Not a third one on a pair while another pair of the same uplink has none; where one at a time
            # fills the uplink it does not matter from where that one comes.
            several = self._adaptive and (gate.window > 1 or gate.pressed)
            if several and active.get(vm.pair, 0) > least.get(id(gate), 0):
                continue
            if self._adaptive and under_way.packs_enough(vm.source):
                continue
            if uuid in self._hopeless:
                continue
            rung, reason = self._rung_at_start(vm, gate, left, seen)
            if rung is None:
                # Looked at again with the next plan: between two plans time only becomes less.
                self._hopeless.add(uuid)
                self._tell(orders, uuid, "waits", reason)
                continue
            stay = gate.window - room[id(gate)] - under_way.leaving.get(id(gate), 0)
            if rung is not Rung.LIVE and stay >= gate.open and self._adaptive:
                continue  # a guest is stopped when its turn has come, not to stand in a queue
            if not self._memory.has_room(vm):
                self._tell(orders, uuid, "waits", "no-memory-at-destination")
                continue
            self._memory.reserve(vm)
            under_way.begins(vm)
            self._agenda.begins(vm)
            self._uplinks.begins(vm, seen.now)
            pairs = ahead.get(id(gate), set())
            if under_way.packs_enough(vm.source):
                pairs -= {pair for pair in pairs if pair[0] == vm.source}
            least[id(gate)] = min(active.get(pair, 0) for pair in pairs or {vm.pair})
            at_work.add(uuid)
            self._attempts[uuid] = self._attempts.get(uuid, 0) + 1
            self._retry_at.pop(uuid, None)
            self._started.add(uuid)
            self._closing.discard(uuid)
            self._told.pop(uuid, None)
            self._waiting.pop(uuid)
            orders.starts.append((uuid, rung))
            if rung is Rung.RESTART and vm.running:
                orders.shutdowns[uuid] = shutdown_seconds_within(vm, left, *self._alone(vm, gate, seen))
            orders.decisions.append(Decision(uuid, "starts", gate.reason))

    def _tell(self, orders: Orders, uuid: str, what: str, reason: str) -> None:
        if self._told.get(uuid) != reason:
            self._told[uuid] = reason
            orders.decisions.append(Decision(uuid, what, reason))

    def _asked_for(self, seen: Observation) -> list[VmSummary]:
        """Asked for and not seen yet: they count, or the next step would start another in their place.

        Not those of a host that owes its answer for long: nobody knows when it will give one.
        """
        return [
            self._vms[uuid]
            for uuid in self._started - set(seen.moves) - set(seen.failed) - set(seen.out)
            if uuid in self._vms
            and seen.now - self._unheard_since.get(self._vms[uuid].pair, seen.now) < _UNHEARD_SECONDS
        ]

    def _could_start(self, vm: VmSummary, seen: Observation, at_work: set[str], under_way: UnderWay) -> bool:
        """Whether nothing but its turn keeps it: what is quickly told of it, for it is asked of many."""
        view = seen.pairs.get(vm.pair)
        return (
            vm.uuid not in self._hopeless
            and (view is None or (view.up and view.heard))
            and self._retry_at.get(vm.uuid, 0.0) <= seen.now
            and not under_way.packs_enough(vm.source)
            and self._memory.has_room(vm)
            and self._may_start(vm, at_work)
        )

    def _may_start(self, vm: VmSummary, at_work: set[str]) -> bool:
        for name in vm.after:
            uuid = self._uuid.get(name)
            # One that stays holds nobody: saving more is worth more than the order among the saved.
            if uuid is not None and uuid != vm.uuid and (uuid in at_work or self._is_to_leave(uuid)):
                return False
        return True

    def _is_to_leave(self, uuid: str) -> bool:
        # A host that is late for a moment keeps its VMs' places in the order.
        return uuid in self._waiting and self._told.get(uuid) in {None, "not-heard"}

    def _pairs_ahead(
        self,
        in_order: t.Iterable[str],
        seen: Observation,
        at_work: set[str],
        under_way: UnderWay,
    ) -> dict[int, set[Pair]]:
        """Per gate: the pairs of those whose turn is next and that could start now.

        Only among them one on an idle pair is preferred: whose turn is far, or who takes much longer than the
        next one, would come before all the others just because nobody else leaves from its host; and for who
        cannot start the others would wait in vain.
        """
        told: dict[int, set[Pair]] = {}
        first: dict[int, float] = {}
        left = {id(gate): max(4, 2 * gate.window) for gate in self._uplinks.gates.values()}
        for uuid in in_order:
            vm = self._vms[uuid]
            key = id(self._uplinks.gate_of(vm))
            if left[key] <= 0:
                if all(count <= 0 for count in left.values()):
                    break
                continue
            if self._could_start(vm, seen, at_work, under_way):
                left[key] -= 1
                worth = self._agenda.worth.get(uuid, 0.0)
                if worth >= _WORTH_AN_IDLE_PAIR * first.setdefault(key, worth):
                    told.setdefault(key, set()).add(vm.pair)
        return told

    def _rung_at_start(
        self, vm: VmSummary, gate: Gate, left: float | None, seen: Observation
    ) -> tuple[Rung | None, str]:
        rate, trip = self._alone(vm, gate, seen)
        told = choose(vm, rate, trip)
        if not self._adaptive:
            # It does not look ahead, but goes by what the operator allows, and not after the end.
            if left is not None and left <= 0:
                return None, TOO_LATE
            allowed = vm.rungs if vm.running else (Rung.RESTART,)
            return (allowed[0] if allowed[0] is not Rung.STAY else None), told.reason
        if told.rung is Rung.STAY:
            return None, told.reason
        if left is None:
            return told.rung, told.reason
        # The quickest that fits, live before paused where both do.
        for choice in alternatives(vm, rate, trip):
            if choice.seconds <= left:
                return choice.rung, choice.reason
        return None, TOO_LATE

    def _alone(self, vm: VmSummary, gate: Gate, seen: Observation) -> tuple[float, float]:
        """The rate that a VM would have alone, and its round trip."""
        pair = self._uplinks.pairs[vm.pair]
        view = seen.pairs.get(vm.pair)
        trip = view.round_trip_seconds if view and view.round_trip_seconds else pair.round_trip_seconds
        stream = self._uplinks.stream.get(vm.pair, pair.stream_bytes_per_second)
        return min([stream, *[rate for rate in (pair.bytes_per_second, gate.capacity) if rate]]), trip

    # -- those under way

    def _fall(self, seen: Observation, left: float | None, orders: Orders) -> None:
        for uuid, move in seen.moves.items():
            vm = self._vms.get(uuid)
            if vm is None or uuid in self._to_restart or move.silent:
                continue
            gate, pair = self._uplinks.gate_of(vm), self._uplinks.pairs[vm.pair]
            # What it could have if it were served first: a trickle says nothing about it.
            stream = self._uplinks.stream.get(vm.pair) or gate.stream or 0.0
            possible = max(move.bytes_per_second, min(stream, gate.capacity or stream))
            told = possible > 0 and (stream or uuid in self._shares.open_throughout)
            if not told and not move.hopeless:
                continue
            fall = judge(
                vm,
                move,
                possible,
                pair.round_trip_seconds,
                left,
                certain=self._shares.intervals_open(uuid) >= _CERTAIN_INTERVALS,
            )
            if fall is None:
                continue
            if fall.rung is Rung.STAY:
                if not self._has_heirs(uuid, seen, orders):
                    continue  # nobody would gain by its giving way
                self._over[uuid] = fall.reason
                if seen.deadline_at is not None:
                    self._gave_way[uuid] = seen.deadline_at
            if fall.rung is Rung.RESTART:
                # Its move is cancelled, and it begins anew as soon as it is seen to run here again.
                self._vms[uuid] = replace(vm, rungs=(Rung.RESTART, Rung.STAY))
                self._to_restart.add(uuid)
                self._retry_at[uuid] = seen.now
            orders.falls[uuid] = fall
            orders.decisions.append(Decision(uuid, f"falls-to-{fall.rung.value}", fall.reason, fall.sentence))

    def _has_heirs(self, uuid: str, seen: Observation, orders: Orders) -> bool:
        """Whether anybody would gain if this one gave way: others that send, or that may yet start."""
        giving_way = {other for other, fall in orders.falls.items() if fall.rung is Rung.STAY}
        return any(
            not move.silent and move.phase is not Phase.CLOSING
            for other, move in seen.moves.items()
            if other != uuid and other not in giving_way
        ) or any(other in self._agenda.starts_at and other not in self._hopeless for other in self._waiting)

    def _share(self, seen: Observation, orders: Orders, *, between: bool) -> None:
        by_gate: dict[int, list[Member]] = {}
        for uuid, move in seen.moves.items():
            vm = self._vms.get(uuid)
            if vm is None or move.phase is Phase.CLOSING or move.silent:
                continue
            if seen.is_up(vm.pair):
                by_gate.setdefault(id(self._uplinks.gate_of(vm)), []).append((vm, move))
        # Those that start now have their share from the first byte on, not from the next look.
        for uuid, rung in orders.starts:
            vm = self._vms[uuid]
            by_gate.setdefault(id(self._uplinks.gate_of(vm)), []).append(
                (vm, Move(uuid, Phase.LEAD_IN, rung))
            )
        served = [(gate, by_gate.get(id(gate), [])) for gate in self._uplinks.gates.values()]
        since = seen.now - self._looked_at
        orders.shares.update(self._shares.share(served, seen.moves, between=between, since_seconds=since))
        orders.ends_in.update(self._shares.ends_in)

    def _hold(self, seen: Observation, orders: Orders) -> None:
        """No periodic passes for those whose turn is near: their catch-up sends the same, once."""
        if not seen.moves and not orders.starts:
            return
        for uuid in self._waiting:
            starts_at = self._agenda.starts_at.get(uuid)
            if starts_at is not None and starts_at - seen.now <= _HOLD_AHEAD_SECONDS:
                orders.held.add(uuid)
                if uuid not in self._held_before:
                    orders.decisions.append(Decision(uuid, "precaching-waits", "turn-is-near"))
        self._held_before |= orders.held


def remaining_seconds(move: Move, round_trip_seconds: float) -> float | None:
    """What a move is forecast to take still, None where nothing says."""
    if move.phase is Phase.LEAD_IN or move.bytes_per_second <= 0:
        return None if move.phase is not Phase.CLOSING else closing_seconds(round_trip_seconds)
    told = live_seconds(move, move.bytes_per_second) + closing_seconds(round_trip_seconds)
    return None if told == float("inf") else told
