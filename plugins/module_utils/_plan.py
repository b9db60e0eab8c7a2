# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""From summaries to a plan: who goes when, by which rung, until when, and why; who stays, and why.

Pure. The schedule is list scheduling over uplinks and pairs: an uplink of capacity C serves as many VMs at a
time as it takes to fill it; a VM's lead-in overlaps with the transfer of the one before it, and between two
that take turns the line idles for a moment.
"""

from __future__ import annotations

import heapq
import typing as t
from dataclasses import dataclass, replace

from ansible_collections.lifeboat.evacuation.plugins.module_utils._forecast import (
    Forecast,
    alternatives,
    choose,
    closing_seconds,
    lead_in_seconds,
    turn_seconds,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._order import order
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import (
    PairSummary,
    Rung,
    SiteSummary,
    VmSummary,
)

# Reason words of a plan, beside those of a forecast.
NO_MEMORY = "no-memory-at-destination"
NO_SPACE = "no-space-at-destination"
TOO_LATE = "does-not-fit-before-deadline"
QUICKER_FOR_OTHERS = "quicker-so-that-more-get-out"
_SEARCHED_THOROUGHLY = 2000


@dataclass(frozen=True, slots=True)
class PlannedVm:
    """One VM's place in the plan. Times are seconds from now; ``end_seconds`` None: it does not leave."""

    vm: VmSummary
    position: int
    forecast: Forecast
    start_seconds: float | None
    end_seconds: float | None
    reason: str

    @property
    def rung(self) -> Rung:
        """How it gets out."""
        return self.forecast.rung if self.end_seconds is not None else Rung.STAY


@dataclass(frozen=True)
class Plan:
    """Every VM in its order; those that stay come last."""

    vms: tuple[PlannedVm, ...]
    deadline_seconds: float | None

    @property
    def leaving(self) -> tuple[PlannedVm, ...]:
        """Those that are forecast to get out."""
        return tuple(planned for planned in self.vms if planned.end_seconds is not None)

    @property
    def makespan_seconds(self) -> float:
        """When the last of them is out."""
        return max((planned.end_seconds or 0.0 for planned in self.vms), default=0.0)

    def expected_share(self, horizon_seconds: float) -> float:
        """E: the share saved if the power fails at a random moment before the horizon."""
        if not self.vms or horizon_seconds <= 0:
            return 1.0
        saved = sum(max(0.0, horizon_seconds - (item.end_seconds or 0.0)) for item in self.leaving)
        return saved / (len(self.vms) * horizon_seconds)


def uplink_rate(site: SiteSummary, pair: PairSummary) -> float | None:
    """What the uplink of a pair carries, None where nobody knows."""
    return site.uplinks.get(pair.uplink)


def expected_rate(site: SiteSummary, pair: PairSummary) -> float:
    """What one VM alone would get on that pair."""
    known = [rate for rate in (pair.bytes_per_second, uplink_rate(site, pair)) if rate]
    return min([pair.stream_bytes_per_second, *known])


def slots(site: SiteSummary, pair: PairSummary) -> int:
    """How many VMs at a time fill the uplink."""
    rate = uplink_rate(site, pair)
    if not rate:
        return sum(1 for other in site.pairs if other.uplink == pair.uplink) or 1
    return _wanted(rate, pair.stream_bytes_per_second)


def _wanted(rate: float | None, stream: float) -> int:
    if not rate or stream <= 0:
        return 1
    return max(1, int(rate / stream + 0.95))


def make_plan(site: SiteSummary, deadline_seconds: float | None, *, overlap: bool = True) -> Plan:
    """The plan for now.

    ``deadline_seconds`` counts from now, None: no limit is known. ``overlap`` False: one VM at a time per
    site and no lead-in behind another's transfer, as the strategy ``sequential`` moves them.
    """
    pairs = {pair.key: pair for pair in site.pairs}
    forecasts = {vm.uuid: _first_choice(site, pairs, vm) for vm in site.vms}
    seconds = {uuid: max(told.seconds, 1e-3) for uuid, told in forecasts.items()}
    ordered = order(site.vms, seconds)
    plan = _schedule(site, pairs, ordered, forecasts, deadline_seconds, overlap)
    given_up = [planned for planned in plan.vms if planned.reason == TOO_LATE]
    if not given_up or deadline_seconds is None:
        return plan
    # Just enough guests are stopped for the others' sake; where that is not enough, all that may be.
    enough = [sum(item.forecast.seconds for item in given_up), float("inf")]
    for wanted_seconds in enough if len(site.vms) <= _SEARCHED_THOROUGHLY else enough[:1]:
        hurried = _hurry(site, pairs, plan, forecasts, wanted_seconds)
        if hurried is None:
            break
        other = _schedule(site, pairs, ordered, hurried, deadline_seconds, overlap)
        if _worth(other) > _worth(plan):
            plan = other
        if len(plan.leaving) == len(site.vms):
            break
    return plan


def _worth(plan: Plan) -> float:
    return sum(planned.vm.weight for planned in plan.leaving)


def _pair_of(pairs: t.Mapping[tuple[str, str], PairSummary], site: SiteSummary, vm: VmSummary) -> PairSummary:
    return pairs.get(vm.pair) or PairSummary(vm.source, vm.destination, site.site)


def _first_choice(
    site: SiteSummary, pairs: t.Mapping[tuple[str, str], PairSummary], vm: VmSummary
) -> Forecast:
    pair = _pair_of(pairs, site, vm)
    return choose(vm, expected_rate(site, pair), pair.round_trip_seconds)


def _hurry(
    site: SiteSummary,
    pairs: t.Mapping[tuple[str, str], PairSummary],
    plan: Plan,
    forecasts: t.Mapping[str, Forecast],
    wanted_seconds: float,
) -> dict[str, Forecast] | None:
    """Quicker rungs for as many VMs as it takes to make room; None where no rung is quicker."""
    offers: list[tuple[float, str, Forecast]] = []
    # Only who leaves can make room.
    for planned in plan.leaving:
        vm = planned.vm
        now = forecasts[vm.uuid]
        if now.rung is Rung.STAY:
            continue
        pair = _pair_of(pairs, site, vm)
        quickest = min(
            alternatives(vm, expected_rate(site, pair), pair.round_trip_seconds),
            key=lambda told: told.seconds,
            default=now,
        )
        saved = now.seconds - quickest.seconds
        if saved > 0.05 * now.seconds:
            offers.append((saved / vm.weight, vm.uuid, replace(quickest, reason=QUICKER_FOR_OTHERS)))
    if not offers:
        return None
    changed = dict(forecasts)
    for _worth_of_it, uuid, quicker in sorted(offers, key=lambda offer: (-offer[0], offer[1])):
        if wanted_seconds <= 0:
            break
        wanted_seconds -= changed[uuid].seconds - quicker.seconds
        changed[uuid] = quicker
    return changed


class _Uplink:
    """List scheduling on one uplink: its slots, and those of the pairs behind it."""

    def __init__(self, slot_count: int) -> None:
        self.free = slot_count
        self.queues: dict[tuple[str, str], list[tuple[int, VmSummary]]] = {}
        self.heads: list[tuple[int, tuple[str, str]]] = []
        self.pair_free: dict[tuple[str, str], int] = {}

    def push(self, position: int, vm: VmSummary, pair_slots: int) -> None:
        queue = self.queues.setdefault(vm.pair, [])
        self.pair_free.setdefault(vm.pair, pair_slots)
        heapq.heappush(queue, (position, vm))
        heapq.heappush(self.heads, (position, vm.pair))

    def pop(self) -> tuple[int, VmSummary] | None:
        """The first in the order whose pair has a slot."""
        blocked: list[tuple[int, tuple[str, str]]] = []
        found = None
        while self.heads:
            position, pair = heapq.heappop(self.heads)
            queue = self.queues[pair]
            if not queue or queue[0][0] != position:
                continue
            if self.pair_free[pair] <= 0:
                blocked.append((position, pair))
                continue
            found = heapq.heappop(queue)
            break
        for entry in blocked:
            heapq.heappush(self.heads, entry)
        return found

    def give_back(self, pair: tuple[str, str]) -> None:
        self.free += 1
        self.pair_free[pair] += 1


def _schedule(
    site: SiteSummary,
    pairs: t.Mapping[tuple[str, str], PairSummary],
    ordered: t.Sequence[VmSummary],
    forecasts: t.Mapping[str, Forecast],
    deadline_seconds: float | None,
    overlap: bool,
) -> Plan:
    positions = {vm.uuid: position for position, vm in enumerate(ordered)}
    known = {name: vm.uuid for vm in ordered for name in (vm.name, vm.uuid)}
    memory = {item.name: item.memory_free_bytes for item in site.destinations}
    space = {item.name: item.store_free_bytes for item in site.destinations}
    uplinks: dict[str, _Uplink] = {}
    waits: dict[str, set[str]] = {}
    followers: dict[str, list[VmSummary]] = {}
    told: dict[str, PlannedVm] = {}
    ready_at: dict[str, float] = {}
    now = 0.0

    def push(vm: VmSummary) -> None:
        pair = _pair_of(pairs, site, vm)
        name = pair.uplink if overlap else ""
        uplink = uplinks.get(name)
        if uplink is None:
            uplink = uplinks[name] = _Uplink(slots(site, pair) if overlap else 1)
        width = _wanted(pair.bytes_per_second or uplink_rate(site, pair), pair.stream_bytes_per_second)
        # Packing a stream is one processor's work: more streams than that only take from each other.
        width = min(width, site.processors.get(vm.source, width))
        uplink.push(positions[vm.uuid], vm, width if overlap else 1)

    def over(uuid: str) -> None:
        for follower in followers.pop(uuid, []):
            waits[follower.uuid].discard(uuid)
            if not waits[follower.uuid]:
                ready_at[follower.uuid] = now
                push(follower)

    for vm in ordered:
        before = {known[name] for name in vm.after if name in known} - {vm.uuid}
        if before:
            waits[vm.uuid] = before
            for uuid in before:
                followers.setdefault(uuid, []).append(vm)
        else:
            push(vm)
    # (when, number, uplink, pair whose slot is free again or nothing, VM that is out or nothing)
    events: list[tuple[float, int, str, tuple[str, str] | None, str]] = []
    number = 0
    while True:
        for name, uplink in list(uplinks.items()):
            while uplink.free > 0:
                taken = uplink.pop()
                if taken is None:
                    break
                position, vm = taken
                planned = _place(site, pairs, vm, position, forecasts[vm.uuid], now, ready_at, overlap,
                                 deadline_seconds, memory, space)  # fmt: skip
                told[vm.uuid] = planned
                if planned.end_seconds is None:
                    over(vm.uuid)
                    continue
                pair = _pair_of(pairs, site, vm)
                uplink.free -= 1
                uplink.pair_free[vm.pair] -= 1
                left = planned.end_seconds
                trip = pair.round_trip_seconds
                freed = left - closing_seconds(trip) + turn_seconds(trip) if overlap else left
                number += 2
                heapq.heappush(events, (freed, number, name, vm.pair, ""))
                heapq.heappush(events, (left, number + 1, name, None, vm.uuid))
        if not events:
            break
        now, _number, name, freed_pair, uuid = heapq.heappop(events)
        if freed_pair is not None:
            uplinks[name].give_back(freed_pair)
        if uuid:
            over(uuid)
    for vm in ordered:
        # Left of a cycle: findings told of it, and nobody is forgotten.
        if vm.uuid not in told:
            told[vm.uuid] = PlannedVm(
                vm, positions[vm.uuid], forecasts[vm.uuid], None, None, "waits-for-itself"
            )
    planned_vms = sorted(told.values(), key=lambda item: (item.end_seconds is None, item.position))
    return Plan(tuple(planned_vms), deadline_seconds)


def _place(
    site: SiteSummary,
    pairs: t.Mapping[tuple[str, str], PairSummary],
    vm: VmSummary,
    position: int,
    told: Forecast,
    now: float,
    ready_at: t.Mapping[str, float],
    overlap: bool,
    deadline_seconds: float | None,
    memory: dict[str, float | None],
    space: dict[str, float | None],
) -> PlannedVm:
    if told.rung is Rung.STAY:
        return PlannedVm(vm, position, told, None, None, told.reason)
    free = memory.get(vm.destination)
    if free is not None and vm.memory_bytes > free:
        return PlannedVm(vm, position, told, None, None, NO_MEMORY)
    room = space.get(vm.destination)
    if room is not None and vm.lag_bytes > max(0.0, room):
        return PlannedVm(vm, position, told, None, None, NO_SPACE)
    pair = _pair_of(pairs, site, vm)
    trip = pair.round_trip_seconds
    fixed = lead_in_seconds(trip) + closing_seconds(trip)
    ready = ready_at.get(vm.uuid, 0.0)
    # What is not bytes: the lead-in may have passed behind another's transfer.
    lead = lead_in_seconds(trip)
    bulk_from = max(now, ready + lead) if overlap else now + lead
    closing = closing_seconds(trip)
    for choice in _choices(vm, told, trip, deadline_seconds, bulk_from + closing):
        end = bulk_from + (choice.seconds - fixed) + closing
        if deadline_seconds is None or end <= deadline_seconds:
            if free is not None:
                memory[vm.destination] = free - vm.memory_bytes
            if room is not None:
                space[vm.destination] = room - vm.lag_bytes
            return PlannedVm(vm, position, choice, max(0.0, bulk_from - lead), end, choice.reason)
    return PlannedVm(vm, position, told, None, None, TOO_LATE)


def _choices(
    vm: VmSummary, told: Forecast, trip: float, deadline_seconds: float | None, earliest_end: float
) -> t.Iterator[Forecast]:
    """The rung that was chosen, then the others; none where nothing could end in time."""
    if deadline_seconds is not None and earliest_end > deadline_seconds:
        return
    yield told
    if deadline_seconds is not None:
        yield from alternatives(vm, told.bytes_per_second, trip, other_than=told.rung)
