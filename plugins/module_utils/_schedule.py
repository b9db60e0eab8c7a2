# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""When each VM of an order starts and ends, and who does not fit: list scheduling over uplinks and pairs.

An uplink of capacity C serves as many VMs at a time as it takes to fill it; a VM's lead-in overlaps with the
transfer of the one before it, and between two that take turns the line idles for a moment. VMs are told by
their position in the order. It is made for one order, and run for each choice of rungs that is to be tried.
"""

from __future__ import annotations

import heapq
import typing as t
from dataclasses import dataclass

from ansible_collections.lifeboat.evacuation.plugins.module_utils._forecast import (
    Forecast,
    Forecasts,
    closing_seconds,
    lead_in_seconds,
    turn_seconds,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import (
    PairSummary,
    Rung,
    SiteSummary,
    VmSummary,
)

NO_MEMORY = "no-memory-at-destination"
NO_SPACE = "no-space-at-destination"
TOO_LATE = "does-not-fit-before-deadline"
_IN_A_CYCLE = "waits-for-itself"
_ROUNDING_SECONDS = 1e-6


@dataclass(slots=True)
class Times:
    """What came of one run, by position: seconds from now, None for those that do not leave; and why."""

    forecasts: list[Forecast]
    starts: list[float | None]
    ends: list[float | None]
    reasons: list[str]


class Room:
    """What a destination has left; None: not known, and then not judged."""

    __slots__ = ("memory_bytes", "store_bytes")

    def __init__(self, memory_bytes: float | None, store_bytes: float | None) -> None:
        self.memory_bytes = memory_bytes
        self.store_bytes = store_bytes

    def lacks(self, vm: VmSummary) -> str | None:
        """Why a VM does not fit, a word."""
        if self.memory_bytes is not None and vm.memory_bytes > self.memory_bytes:
            return NO_MEMORY
        if self.store_bytes is not None and vm.lag_bytes > max(0.0, self.store_bytes):
            return NO_SPACE
        return None

    def take(self, vm: VmSummary) -> None:
        """It comes there."""
        if self.memory_bytes is not None:
            self.memory_bytes -= vm.memory_bytes
        if self.store_bytes is not None:
            self.store_bytes -= vm.lag_bytes


_UNLIMITED = Room(None, None)


class Line:
    """A pair of proxies as a schedule needs it: what it is, and who waits for a place on it."""

    __slots__ = ("closing", "free", "lead", "pair", "queue", "rate", "room", "trip", "uplink", "width")

    def __init__(self, site: SiteSummary, pair: PairSummary) -> None:
        self.pair = pair
        known = site.uplinks.get(pair.uplink)
        self.trip = pair.round_trip_seconds
        self.lead = lead_in_seconds(self.trip)
        self.closing = closing_seconds(self.trip)
        # What one VM alone would get.
        self.rate = min([pair.stream_bytes_per_second,
                         *[rate for rate in (pair.bytes_per_second, known) if rate]])  # fmt: skip
        width = _wanted(pair.bytes_per_second or known, pair.stream_bytes_per_second)
        # Packing a stream is one processor's work: more streams than that only take from each other.
        self.width = min(width, site.processors.get(pair.source, width))
        self.empty()

    def empty(self) -> None:
        """As before a run."""
        self.free = self.width
        self.queue: list[int] = []
        self.uplink: _Uplink | None = None
        self.room = _UNLIMITED


class _Uplink:
    """Its free places, and of each pair with a free place the first that waits for it (a heap)."""

    __slots__ = ("first", "free")

    def __init__(self, free: int) -> None:
        self.free = free
        self.first: list[int] = []


def lines(site: SiteSummary) -> dict[tuple[str, str], Line]:
    """The pairs that VMs cross; one of unknown quality where none was told of."""
    pairs = {pair.key: pair for pair in site.pairs}
    told: dict[tuple[str, str], Line] = {}
    for vm in site.vms:
        key = vm.pair
        if key not in told:
            told[key] = Line(site, pairs.get(key) or PairSummary(*key, site.site))
    return told


class Schedule:
    """An order of VMs on their lines. ``overlap`` False: one at a time, with nothing behind another.

    ``busy_seconds``: for how long those under way have an uplink to themselves.
    """

    def __init__(
        self,
        site: SiteSummary,
        ordered: t.Sequence[VmSummary],
        by_pair: t.Mapping[tuple[str, str], Line],
        deadline_seconds: float | None,
        known: Forecasts,
        *,
        overlap: bool,
        busy_seconds: t.Mapping[str, float] | None = None,
    ) -> None:
        self._site = site
        self._busy = busy_seconds or {}
        self._vms = ordered
        self._deadline = deadline_seconds
        self._overlap = overlap
        self._by_pair = by_pair
        self._lines = [by_pair[vm.pair] for vm in ordered]
        self._waits = [0] * len(ordered)
        self._followers: dict[int, list[int]] = {}
        self._known = known
        self._uplinks: dict[str, _Uplink] = {}
        if any(vm.after for vm in ordered):
            self._depend()

    def _depend(self) -> None:
        named = {name for vm in self._vms for name in vm.after}
        known = {
            name: position
            for position, vm in enumerate(self._vms)
            for name in (vm.name, vm.uuid)
            if name in named
        }
        for position, vm in enumerate(self._vms):
            if vm.after:
                before = {known[name] for name in vm.after if name in known} - {position}
                self._waits[position] = len(before)
                for other in before:
                    self._followers.setdefault(other, []).append(position)

    def all_rungs(self, position: int) -> tuple[Forecast, ...]:
        """Every rung that leads out, at the rate that the VM would have alone."""
        line = self._lines[position]
        return self._known.all_rungs(self._vms[position], line.rate, line.trip)

    def taken_seconds(self, position: int, first: Forecast) -> float:
        """For how long it keeps a place of its line from others, by the first rung that may be in time."""
        line, deadline = self._lines[position], self._deadline
        seconds = first.seconds if first.rung is not Rung.STAY else float("inf")
        if deadline is not None and seconds > deadline:
            told = (choice.seconds for choice in self.all_rungs(position))
            seconds = next((one for one in told if one <= deadline), float("inf"))
        return seconds if not self._overlap else seconds - line.lead - line.closing + turn_seconds(line.trip)

    def uplink_of(self, position: int) -> str:
        """The uplink by which it leaves; one for all where one at a time goes."""
        return self._lines[position].pair.uplink if self._overlap else ""

    def seconds_of(self, uplink: str, spare_share: float) -> float:
        """The seconds that all places of an uplink have until the deadline, less that share of them."""
        deadline = float("inf") if self._deadline is None else self._deadline * (1.0 - spare_share)
        deadline -= self._busy_seconds(uplink)
        if not self._overlap:
            return deadline
        told = [line for line in self._by_pair.values() if line.pair.uplink == uplink]
        places = min(_places(self._site, told[0].pair), sum(line.width for line in told))
        # Who is last needs not give its place to anybody.
        return places * max(deadline - line.lead - line.closing + turn_seconds(line.trip) for line in told)

    def run(self, forecasts: t.Sequence[Forecast]) -> Times:
        """Who starts when if each goes by its forecast's rung, or by another where only that is in time."""
        count = len(self._vms)
        self._uplinks = {}
        rooms = {item.name: Room(item.memory_free_bytes, item.store_free_bytes)
                 for item in self._site.destinations}  # fmt: skip
        for line in self._by_pair.values():
            line.empty()
            line.room = rooms.get(line.pair.destination, _UNLIMITED)
        waits = list(self._waits)
        told = Times(list(forecasts), [None] * count, [None] * count, [_IN_A_CYCLE] * count)
        ready_at: dict[int, float] = {}
        # (when, number, uplink or None, position): a place that is free again, or a VM that is out.
        events: list[tuple[float, int, _Uplink | None, int]] = []
        now, number = 0.0, 0

        def over(position: int) -> None:
            for follower in self._followers.get(position, ()):
                waits[follower] -= 1
                if not waits[follower]:
                    ready_at[follower] = now
                    self._push(follower)

        for position in range(count):
            if not waits[position]:
                self._push(position)
        while True:
            for uplink in list(self._uplinks.values()):
                while uplink.free > 0:
                    taken = self._pop(uplink)
                    if taken is None:
                        break
                    self._place(taken, now, ready_at.get(taken, 0.0), told)
                    end = told.ends[taken]
                    if end is None:
                        over(taken)
                        continue
                    line = self._lines[taken]
                    uplink.free -= 1
                    line.free -= 1
                    freed = end - line.closing + turn_seconds(line.trip) if self._overlap else end
                    number += 2
                    heapq.heappush(events, (freed, number, uplink, taken))
                    heapq.heappush(events, (end, number + 1, None, taken))
            if not events:
                return told
            now, _number, freed_uplink, position = heapq.heappop(events)
            if freed_uplink is not None:
                self._give_back(freed_uplink, self._lines[position])
            else:
                over(position)

    def _busy_seconds(self, uplink: str) -> float:
        if not self._overlap:
            return max(self._busy.values(), default=0.0)
        return self._busy.get(uplink, 0.0)

    def _push(self, position: int) -> None:
        line = self._lines[position]
        uplink = line.uplink
        if uplink is None:
            name = line.pair.uplink if self._overlap else ""
            uplink = self._uplinks.get(name)
            if uplink is None:
                uplink = self._uplinks[name] = _Uplink(_places(self._site, line.pair) if self._overlap else 1)
            line.uplink = uplink
            if not self._overlap:
                line.free = 1
        heapq.heappush(line.queue, position)
        if line.free > 0 and line.queue[0] == position:
            heapq.heappush(uplink.first, position)

    def _pop(self, uplink: _Uplink) -> int | None:
        """The first in the order whose pair has a place."""
        while uplink.first:
            position = heapq.heappop(uplink.first)
            line = self._lines[position]
            # Its pair may have been filled since, or an earlier one of it become ready.
            if line.free > 0 and line.queue and line.queue[0] == position:
                heapq.heappop(line.queue)
                if line.queue:
                    heapq.heappush(uplink.first, line.queue[0])
                return position
        return None

    @staticmethod
    def _give_back(uplink: _Uplink, line: Line) -> None:
        uplink.free += 1
        line.free += 1
        if line.free == 1 and line.queue:
            heapq.heappush(uplink.first, line.queue[0])

    def _place(self, position: int, now: float, ready: float, told: Times) -> None:
        first = told.forecasts[position]
        vm, line, deadline = self._vms[position], self._lines[position], self._deadline
        reason = first.reason if first.rung is Rung.STAY else line.room.lacks(vm)
        if reason is not None:
            told.reasons[position] = reason
            return
        # What is not bytes: the lead-in may have passed behind another's transfer.
        bulk_from = max(now, ready + line.lead) if self._overlap else now + line.lead
        told.reasons[position] = TOO_LATE
        # The rung that was chosen, then the others; none where nothing could end in time.
        at_best = bulk_from + line.closing
        if deadline is not None and at_best > deadline:
            return
        fixed = line.lead + line.closing
        choice, end = first, bulk_from + (first.seconds - fixed) + line.closing
        if deadline is not None and end > deadline:
            if at_best + _least_seconds(vm, line.rate) > deadline + _ROUNDING_SECONDS:
                return
            for choice in self.all_rungs(position):
                end = bulk_from + (choice.seconds - fixed) + line.closing
                if end <= deadline:
                    break
            else:
                return
        line.room.take(vm)
        told.forecasts[position] = choice
        told.starts[position], told.ends[position] = max(0.0, bulk_from - line.lead), end
        told.reasons[position] = choice.reason


def _places(site: SiteSummary, pair: PairSummary) -> int:
    """How many VMs at a time fill the uplink of a pair."""
    rate = site.uplinks.get(pair.uplink)
    if not rate:
        return sum(1 for other in site.pairs if other.uplink == pair.uplink) or 1
    return _wanted(rate, pair.stream_bytes_per_second)


def _wanted(rate: float | None, stream: float) -> int:
    if not rate or stream <= 0:
        return 1
    return max(1, int(rate / stream + 0.95))


def _least_seconds(vm: VmSummary, rate: float) -> float:
    """What its bytes take at least, by whichever rung: quickly told, for it is asked of many."""
    if rate <= 0 or Rung.RESTART in vm.rungs:
        return 0.0
    memory = vm.memory_used_bytes * vm.packed_ratio if vm.running else 0.0
    return (vm.lag_bytes + memory) / rate
