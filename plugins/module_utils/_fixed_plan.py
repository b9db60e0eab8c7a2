# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""How it would go by `parallel` or `static:N`: so many at once, who share their line as it comes.

A fluid: all that send share their uplink evenly, none gets more than a stream or its pair carries, and what a
guest dirties meanwhile is sent again. They do not go down the ladder, and the deadline stops only starts.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, replace

from ansible_collections.lifeboat.evacuation.plugins.module_utils._forecast import (
    BOOT_SECONDS,
    CONVERGES_BELOW,
    ROUNDS_WITHOUT_PROGRESS,
    Forecast,
    closing_seconds,
    forecast,
    lead_in_seconds,
    residual_bytes,
    usual_shutdown_seconds,
    written_share,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._plan import Plan, PlannedVm
from ansible_collections.lifeboat.evacuation.plugins.module_utils._schedule import TOO_LATE, Line, Room
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Rung, SiteSummary

_NO_RUNG = "no-rung-allowed"
_DOES_NOT_CONVERGE = "does-not-converge"
# Of more than these it would take seconds in which nothing is begun: they are forecast as by feedback.
MOST_VMS = 200
# Steps of time that are looked at, at most: events of many VMs are taken together.
_MOST_STEPS = 4000


@dataclass(slots=True)
class _Moving:
    planned: PlannedVm
    line: Line
    rung: Rung
    started: float
    # Until when it sends nothing yet, what it has to send, and what a second of its guest adds.
    sends_from: float
    left_bytes: float
    dirties: float
    sent_bytes: float = 0.0
    # When all has crossed, and when it runs there.
    sent_at: float = 0.0
    over_at: float | None = None

    def net(self, rate: float) -> float:
        """By how much less it has to send after a second at that rate; 0 where it gets nowhere."""
        vm, whole = self.planned.vm, rate
        if self.rung is Rung.LIVE:
            # Its mirror's share of the line; the forecast takes it off by itself.
            rate *= 1.0 - written_share(vm, rate)
        if self.dirties < CONVERGES_BELOW * rate:
            return rate - self.dirties
        if rate <= 0 or not forecast(vm, Rung.LIVE, whole, self.line.trip).feasible:
            return 0.0
        # Some rounds that get no smaller, then QEMU stops it for the last.
        return rate / (1 + (ROUNDS_WITHOUT_PROGRESS + 1) * min(1.0, self.dirties / rate))


def at_once(strategy: str, site: SiteSummary) -> int | None:
    """How many per pair move at the same time by a strategy; None: it is planned otherwise."""
    if strategy == "parallel":
        return max(1, len(site.vms))
    kind, _colon, number = strategy.partition(":")
    return int(number) if kind == "static" and number.isdigit() else None


def fixed_plan(plan: Plan, site: SiteSummary, lines: t.Mapping[tuple[str, str], Line], count: int) -> Plan:
    """The same order with ``count`` at a time per pair; reasons of those that stay are words."""
    rooms = {item.name: Room(item.memory_free_bytes, item.store_free_bytes) for item in site.destinations}
    waiting = sorted(plan.vms, key=lambda planned: planned.position)
    names = {name: item.vm.uuid for item in waiting for name in (item.vm.name, item.vm.uuid)}
    told: dict[str, PlannedVm] = {}
    moving: list[_Moving] = []
    now, steps = 0.0, 0
    while waiting or moving:
        steps += 1
        waiting = _start(waiting, moving, told, names, lines, rooms, count, now, plan.deadline_seconds)
        if not moving:
            if not waiting:
                break
            # Who waits for each other, or for one that gets nowhere.
            for item in waiting:
                told[item.vm.uuid] = _stays(item, item.reason if item.end_seconds is None else TOO_LATE)
            break
        rates = _rates(moving, site, now)
        least = _least_step(moving, now, plan, steps)
        step = _next_event(moving, rates, now)
        if step is None:
            # Those that send get nowhere, and nobody else will ever make room for them.
            for one in moving:
                told[one.planned.vm.uuid] = _stays(one.planned, _DOES_NOT_CONVERGE)
            for item in waiting:
                told[item.vm.uuid] = _stays(item, TOO_LATE)
            break
        step = max(step, least)
        for one in list(moving):
            rate = rates.get(id(one), 0.0)
            # A step may be longer than a lead-in that ends in it: of many, a little is lost by that.
            one.left_bytes -= one.net(rate) * step
            one.sent_bytes += rate * step
            if one.over_at is None and one.left_bytes <= 1.0 and one.sends_from <= now + step:
                boots = one.rung is Rung.RESTART and one.planned.vm.running
                one.sent_at = now + step
                one.over_at = one.sent_at + closing_seconds(one.line.trip) + (BOOT_SECONDS if boots else 0.0)
            elif one.over_at is not None and one.over_at <= now + step + 1e-9:
                moving.remove(one)
                told[one.planned.vm.uuid] = _out(one, one.over_at, plan.deadline_seconds)
        now += step
    ordered = [told[item.vm.uuid] for item in sorted(plan.vms, key=lambda planned: planned.position)]
    ordered.sort(key=lambda planned: planned.end_seconds is None)
    return Plan(tuple(ordered), plan.deadline_seconds)


def _start(
    waiting: list[PlannedVm],
    moving: list[_Moving],
    told: dict[str, PlannedVm],
    names: t.Mapping[str, str],
    lines: t.Mapping[tuple[str, str], Line],
    rooms: t.Mapping[str, Room],
    count: int,
    now: float,
    deadline: float | None,
) -> list[PlannedVm]:
    """Those that still wait when whoever may has begun."""
    busy: dict[tuple[str, str], int] = {}
    for one in moving:
        busy[one.planned.vm.pair] = busy.get(one.planned.vm.pair, 0) + 1
    rest: list[PlannedVm] = []
    for item in waiting:
        vm, line = item.vm, lines[item.vm.pair]
        if busy.get(vm.pair, 0) >= count or any(
            names.get(name) not in {None, vm.uuid} and names[name] not in told for name in vm.after
        ):
            rest.append(item)
            continue
        rung = (vm.rungs[0] if vm.running else Rung.RESTART) if vm.rungs else Rung.STAY
        room = rooms.get(vm.destination)
        reason = _NO_RUNG if rung is Rung.STAY else None if room is None else room.lacks(vm)
        if reason is None and deadline is not None and now >= deadline:
            reason = TOO_LATE
        if reason is not None:
            told[vm.uuid] = _stays(item, reason)
            continue
        if room is not None:
            room.take(vm)
        busy[vm.pair] = busy.get(vm.pair, 0) + 1
        moving.append(_begun(item, line, rung, now))
    return rest


def _begun(item: PlannedVm, line: Line, rung: Rung, now: float) -> _Moving:
    vm = item.vm
    memory = vm.memory_used_bytes * vm.packed_ratio if vm.running and rung is not Rung.RESTART else 0.0
    lead = lead_in_seconds(line.trip)
    if rung is Rung.RESTART and vm.running:
        lead += usual_shutdown_seconds(vm)
    dirties = vm.dirty_bytes_per_second * vm.packed_ratio if rung is Rung.LIVE and vm.running else 0.0
    return _Moving(item, line, rung, now, now + lead, residual_bytes(vm, lead) + memory, dirties)


def _rates(moving: t.Sequence[_Moving], site: SiteSummary, now: float) -> dict[int, float]:
    """What each that sends gets, by the identity of its move: even shares, no more than it can carry."""
    by_uplink: dict[str, list[_Moving]] = {}
    for one in moving:
        if one.over_at is None and one.sends_from <= now + 1e-9:
            by_uplink.setdefault(one.line.pair.uplink, []).append(one)
    told: dict[int, float] = {}
    for uplink, sending in by_uplink.items():
        left = site.uplinks.get(uplink) or float("inf")
        for number, one in enumerate(sorted(sending, key=lambda one: one.line.rate)):
            rate = min(one.line.rate, left / (len(sending) - number))
            told[id(one)] = rate
            left -= rate
        for line in {one.line for one in sending}:
            of_pair = [one for one in sending if one.line is line]
            most, sent = line.pair.bytes_per_second, sum(told[id(one)] for one in of_pair)
            if most is not None and 0 < most < sent:
                told |= {id(one): told[id(one)] * most / sent for one in of_pair}
    return told


def _next_event(moving: t.Sequence[_Moving], rates: t.Mapping[int, float], now: float) -> float | None:
    """In how long something changes; None: never."""
    told: float | None = None
    for one in moving:
        if one.over_at is not None:
            seconds = max(0.0, one.over_at - now)
        elif one.sends_from > now + 1e-9:
            seconds = one.sends_from - now
        else:
            net = one.net(rates.get(id(one), 0.0))
            if net <= 0:
                continue
            seconds = max(0.0, one.left_bytes) / net
        told = seconds if told is None else min(told, seconds)
    return told


def _least_step(moving: t.Sequence[_Moving], now: float, plan: Plan, steps: int) -> float:
    """Nothing for few VMs; with very many events they are taken together."""
    if steps < _MOST_STEPS:
        return 0.0
    return max(plan.makespan_seconds, now) / _MOST_STEPS * (1 + len(moving) / 1000)


def _out(one: _Moving, end: float, deadline: float | None) -> PlannedVm:
    if deadline is not None and end > deadline:
        return _stays(one.planned, TOO_LATE)
    rate = one.sent_bytes / max(1e-3, one.sent_at - one.sends_from)
    told = forecast(one.planned.vm, one.rung, max(1.0, rate), one.line.trip)
    told = replace(told, seconds=end - one.started, wire_bytes=one.sent_bytes)
    return replace(one.planned, forecast=told, start_seconds=one.started, end_seconds=end, reason=told.reason)


def _stays(item: PlannedVm, reason: str) -> PlannedVm:
    stay = Forecast(Rung.STAY, 0.0, 0.0, 0.0, True, reason, item.forecast.bytes_per_second)
    return replace(item, forecast=stay, start_seconds=None, end_seconds=None, reason=reason)
