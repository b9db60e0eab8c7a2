# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs one evacuation in the model: the real controller every interval, the model in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ansible_collections.lifeboat.evacuation.plugins.module_utils._controller import Controller
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import Move, Phase
from ansible_collections.lifeboat.evacuation.plugins.module_utils._glance import over_first
from ansible_collections.lifeboat.evacuation.plugins.module_utils._interval import (
    Observation,
    Orders,
    PairView,
    interval_seconds,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Rung, SiteSummary

from lifeboat_simulator.model import Links, TruePair, TrueVm

_STANDS_STILL_SECONDS = 10.0
_SHARE_LEASE_SECONDS = 20.0


@dataclass(frozen=True)
class Fault:
    """Something that happens.

    ``kind``: ``rate`` (of an uplink, to ``value`` bytes a second), ``pair-down``, ``pair-up`` (``target`` is
    "source destination"), ``proxy-killed`` (a source: its moves fail and may be tried again),
    ``destination-dies``, ``controller-restarts``.
    """

    at: float
    kind: str
    target: str = ""
    value: float = 0.0


@dataclass
class Result:
    """What became of it. ``out_at`` per VM name; those that stayed are missing."""

    vms: int
    out_at: dict[str, float]
    started_at: dict[str, float]
    stopped_seconds: dict[str, float]
    longest_step_seconds: float
    mean_step_seconds: float
    steps: int
    ended_at: float
    most_at_once: int
    decisions: list[tuple[float, str, str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def makespan(self) -> float:
        """When the last one that left was out."""
        return max(self.out_at.values(), default=0.0)

    def share(self, at: float) -> float:
        """S(t): the share of VMs that is safe by then."""
        return sum(out <= at for out in self.out_at.values()) / self.vms if self.vms else 1.0

    def expected_share(self, horizon: float) -> float:
        """E: the share saved if the power fails at a random moment before the horizon."""
        if not self.vms or horizon <= 0:
            return 1.0
        return sum(max(0.0, horizon - out) for out in self.out_at.values()) / (horizon * self.vms)

    @property
    def mean_individual(self) -> float:
        """Mean time from a VM's start to its being out."""
        times = [out - self.started_at[name] for name, out in self.out_at.items()]
        return sum(times) / len(times) if times else 0.0


class Simulation:
    """One evacuation. Everything that is asserted of it is collected in ``broken``, as sentences."""

    def __init__(
        self,
        site: SiteSummary,
        links: Links,
        strategy: str,
        *,
        deadline_seconds: float | None = None,
        faults: Sequence[Fault] = (),
        limit_seconds: float = 6 * 3600.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.site = site
        self.links = links
        self.strategy = strategy
        self.deadline = deadline_seconds
        self.vms = {vm.uuid: TrueVm(vm, vm.lag_bytes) for vm in site.vms}
        self.broken: list[str] = []
        self._faults = sorted(faults, key=lambda fault: fault.at)
        self._limit = limit_seconds
        self._clock = clock
        self._controller = Controller(site, strategy)
        self._dead: set[str] = set()
        self._held: set[str] = set()
        self._memory = {item.name: item.memory_free_bytes for item in site.destinations}
        # Those that have their memory at their destination: they are there, or on their way.
        self._has_memory: set[str] = set()
        self._active: dict[str, TrueVm] = {}
        self._still: dict[str, float] = {}
        self._carried: dict[tuple[str, str], float] = {}
        self._background: dict[str, float] = {}
        # For how long processors were waited for since the last look, seconds.
        self._waited = 0.0

    def run(self) -> Result:
        """To the deadline, or until nothing more happens."""
        interval = interval_seconds(pair.round_trip_seconds for pair in self.links.pairs.values())
        tick = interval / 4
        now, longest, spent, steps, most, idle = 0.0, 0.0, 0.0, 0, 0, 0
        started: dict[str, float] = {}
        decisions: list[tuple[float, str, str, str]] = []
        end = self._limit if self.deadline is None else min(self.deadline, self._limit)
        while now < end:
            self._happen(now)
            began = self._clock()
            seen = self._observe(now, interval)
            orders = self._controller.step(seen)
            took = self._clock() - began
            longest, spent = max(longest, took), spent + took
            steps += 1
            self._obey(orders, seen, now, started)
            names = {uuid: vm.summary.name for uuid, vm in self.vms.items()} if orders.decisions else {}
            decisions += [(now, names[told.vm], told.what, told.reason) for told in orders.decisions]
            for vm in self._active.values():
                vm.sent_before = vm.sent
            self._carried, self._waited = {}, 0.0
            for part in range(4):
                self._advance(min(tick, end - now), now)
                now += tick
                if now >= end:
                    break
                if part < 3 and (later := self._between(seen, now, interval)) is not None:
                    seen = later
                    began = self._clock()
                    between = self._controller.step(seen, between=True)
                    longest = max(longest, self._clock() - began)
                    self._obey(between, seen, now, started)
                    orders.starts += between.starts
            most = max(most, len(self._active))
            self._check_progress(now, interval)
            # Guests that outrun the link go on for ever where nothing stops them: there is no more to see.
            if not orders.starts and all(vm.hopeless for vm in self._active.values()):
                idle += 1
                if idle > 20 and not any(fault.at > now for fault in self._faults):
                    break
            else:
                idle = 0
        return Result(
            len(self.vms),
            {vm.summary.name: vm.out_at for vm in self.vms.values() if vm.out_at is not None},
            started,
            {vm.summary.name: vm.stopped_seconds for vm in self.vms.values()},
            longest,
            spent / max(steps, 1),
            steps,
            now,
            most,
            decisions,
            list(self.broken),
        )

    def _observe(self, now: float, interval: float) -> Observation:
        moves = {uuid: vm.seen(interval) for uuid, vm in self._active.items()}
        pairs = {
            key: PairView(
                pair.up,
                self._carried.get(key, 0.0) / interval,
                pair.round_trip_seconds,
                least_round_trip_seconds=pair.round_trip_seconds,
                processors_waited=self._processors_waited(now, interval),
            )
            for key, pair in self.links.pairs.items()
        }
        out = [uuid for uuid, vm in self.vms.items() if vm.out_at is not None]
        failed = {uuid: vm.may_retry for uuid, vm in self.vms.items() if vm.failed and vm.phase is None}
        return Observation(now, moves, pairs, out, failed, self.deadline)

    def _processors_waited(self, now: float, interval: float) -> float | None:
        if self.links.processors is None:
            return None
        return self._waited / interval if now > 0 else self.links.processors.waited(0.0)

    def _between(self, before: Observation, now: float, interval: float) -> Observation | None:
        """What is seen between two looks, with the rates of the last one; None where of those hosts that are
        asked then, as the coordinator asks them, nobody is through, or has begun to send where processors are
        short."""
        opened, short = self._controller.opened, self._controller.processors_short
        news = {Phase.LAST, Phase.CLOSING, *([Phase.BULK] if short else [])}
        asked = set(over_first(before.moves, lambda uuid: self.vms[uuid].summary.source, interval, opened))
        if not asked:
            return None
        told = self._observe(now, 1.0)
        moves = {
            uuid: move for uuid, move in before.moves.items() if self.vms[uuid].summary.source not in asked
        }
        for uuid, move in told.moves.items():
            if uuid in moves:
                continue
            known = before.moves.get(uuid)
            if move.phase is Phase.LEAD_IN or (known is None and not short):
                moves[uuid] = known or Move(uuid, Phase.LEAD_IN, move.rung)
            elif known is not None and move.phase is Phase.CLOSING:
                moves[uuid] = replace(known, phase=Phase.CLOSING)
            elif known is None or (short and known.phase is Phase.LEAD_IN):
                moves[uuid] = replace(move, phase=Phase.BULK, bytes_per_second=0.0)
            elif move.phase is Phase.LAST and known.phase is Phase.BULK:
                moves[uuid] = replace(known, phase=Phase.LAST, remaining_bytes=move.remaining_bytes)
            else:
                moves[uuid] = known
        through, through_before = (
            {(uuid, move.phase) for uuid, move in each.items() if move.phase in news}
            for each in (moves, before.moves)
        )
        out = [uuid for uuid in told.out if uuid not in moves]
        failed = {uuid: again for uuid, again in told.failed.items() if uuid not in moves}
        if set(out) == set(before.out) and through <= through_before:
            return None
        return replace(told, moves=moves, pairs=before.pairs, out=out, failed=failed)

    def _obey(self, orders: Orders, seen: Observation, now: float, started: dict[str, float]) -> None:
        for uuid, rung in orders.starts:
            vm = self.vms[uuid]
            if vm.out_at is not None or vm.phase is not None:
                self.broken.append(f"{now:.0f} s: {vm.summary.name} was started although it moves or is out")
                continue
            pair = self.links.pairs[vm.summary.pair]
            free = self._memory.get(vm.summary.destination)
            if free is not None and uuid not in self._has_memory:
                self._has_memory.add(uuid)
                self._memory[vm.summary.destination] = free - vm.summary.memory_bytes
                if free < vm.summary.memory_bytes - 1:
                    self.broken.append(
                        f"{now:.0f} s: {vm.summary.destination} has no memory for {vm.summary.name}"
                    )
            sending = any(
                other.sends and self.links.pairs[other.summary.pair].uplink == pair.uplink
                for other in self._active.values()
            )
            vm.begin(rung, pair, beside_others=sending)
            started.setdefault(vm.summary.name, now)
            self._active[uuid] = vm
            if vm.summary.destination in self._dead:
                self._end(vm, may_retry=False)
        for uuid, share in orders.shares.items():
            if share is not None and share <= 0:
                self.broken.append(f"{now:.0f} s: {self.vms[uuid].summary.name} is starved")
            if share is not None and uuid in seen.moves and seen.moves[uuid].phase is Phase.LAST:
                self.broken.append(
                    f"{now:.0f} s: {self.vms[uuid].summary.name} is throttled in its last pass"
                )
            self.vms[uuid].share = share
            self.vms[uuid].share_until = now + orders.ends_in.get(uuid, _SHARE_LEASE_SECONDS)
        for uuid, fall in orders.falls.items():
            vm = self.vms[uuid]
            if fall.rung is Rung.PAUSED:
                vm.pause()
            elif fall.rung is Rung.STAY:
                self._end(vm, may_retry=False)
            elif fall.rung is Rung.RESTART:
                vm.begin(Rung.RESTART, self.links.pairs[vm.summary.pair])
        self._held = orders.held
        self._background = {}
        for uuid, vm in self.vms.items():
            if vm.phase is None and vm.out_at is None and uuid not in self._held:
                uplink = self.links.pairs[vm.summary.pair].uplink
                written = vm.summary.written_bytes_per_second
                self._background[uplink] = self._background.get(uplink, 0.0) + written

    def _end(self, vm: TrueVm, *, may_retry: bool) -> None:
        vm.stop(may_retry=may_retry)
        self._active.pop(vm.summary.uuid, None)
        # It runs on at home: what was kept for it at its destination is free again.
        free = self._memory.get(vm.summary.destination)
        if free is not None and vm.summary.uuid in self._has_memory:
            self._has_memory.discard(vm.summary.uuid)
            self._memory[vm.summary.destination] = free + vm.summary.memory_bytes

    def _advance(self, seconds: float, now: float) -> None:
        for vm in self._active.values():
            if vm.share is not None and now >= vm.share_until:
                vm.share = None
        rates = self.links.rates(self._active.values(), self._background)
        self._check(rates, now)
        leading = sum(vm.phase is Phase.LEAD_IN for vm in self._active.values())
        pace = min(1.0, self.links.lead_ins / max(1, leading))
        if (processors := self.links.processors) is not None:
            wanted = processors.wanted(leading, len(self._active), sum(rates.values()))
            self._waited += seconds * processors.waited(wanted)
            slower = processors.pace(wanted)
            rates = {uuid: rate * slower for uuid, rate in rates.items()}
            pace *= slower
        for uuid, vm in list(self._active.items()):
            pair = self.links.pairs[vm.summary.pair]
            before = vm.sent
            vm.advance(seconds, rates.get(uuid, 0.0), pair, now, lead_in_pace=pace)
            self._carried[pair.key] = self._carried.get(pair.key, 0.0) + vm.sent - before
            if vm.phase is None:
                del self._active[uuid]
        for uuid in self._held:
            vm = self.vms[uuid]
            if vm.phase is None and vm.out_at is None:
                vm.lag += vm.summary.written_bytes_per_second * seconds

    def _check(self, rates: dict[str, float], now: float) -> None:
        uplinks: dict[str, float] = {}
        for uuid, rate in rates.items():
            uplink = self.links.pairs[self.vms[uuid].summary.pair].uplink
            uplinks[uplink] = uplinks.get(uplink, 0.0) + rate
        for uplink, carried in uplinks.items():
            if carried > self.links.uplinks[uplink] * 1.000001:
                self.broken.append(f"{now:.0f} s: uplink {uplink} carries {carried:.0f} bytes per second")

    def _check_progress(self, now: float, interval: float) -> None:
        """A relay without a byte for 10 s is closed: nobody with something to send may be kept so long."""
        for uuid, vm in self._active.items():
            moved = vm.sent > vm.sent_before or not vm.sends or not self.links.pairs[vm.summary.pair].up
            self._still[uuid] = 0.0 if moved else self._still.get(uuid, 0.0) + interval
            if self._still[uuid] >= _STANDS_STILL_SECONDS:
                self.broken.append(
                    f"{now:.0f} s: {vm.summary.name} sends nothing for {self._still[uuid]:.0f} s"
                )

    def _happen(self, now: float) -> None:
        while self._faults and self._faults[0].at <= now:
            self._fault(self._faults.pop(0))

    def _fault(self, fault: Fault) -> None:
        if fault.kind == "rate":
            self.links.uplinks[fault.target] = fault.value
        elif fault.kind in {"pair-down", "pair-up"}:
            self._pair(fault.target).up = fault.kind == "pair-up"
        elif fault.kind == "controller-restarts":
            self._controller = Controller(self._as_found(), self.strategy)
        for vm in list(self._active.values()):
            if fault.kind == "proxy-killed" and vm.summary.source == fault.target:
                self._end(vm, may_retry=True)
            elif fault.kind == "destination-dies" and vm.summary.destination == fault.target:
                self._end(vm, may_retry=False)
        if fault.kind == "destination-dies":
            self._dead.add(fault.target)
            for pair in self.links.pairs.values():
                if pair.key[1] == fault.target:
                    pair.up = False

    def _pair(self, target: str) -> TruePair:
        source, _space, destination = target.partition(" ")
        return self.links.pairs[source, destination]

    def _as_found(self) -> SiteSummary:
        """What a controller that starts anew finds: destinations hold what has come or is on its way."""
        destinations = tuple(
            type(item)(item.name, item.site, self._memory.get(item.name), item.store_free_bytes)
            for item in self.site.destinations
        )
        return SiteSummary(self.site.site, self.site.vms, self.site.pairs, destinations, self.site.uplinks)
