# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""From summaries to a plan: who goes when, by which rung, until when, and why; who stays, and why. Pure."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, replace

from ansible_collections.lifeboat.evacuation.plugins.module_utils._exchange import Unit, weightiest
from ansible_collections.lifeboat.evacuation.plugins.module_utils._forecast import Forecast, Forecasts
from ansible_collections.lifeboat.evacuation.plugins.module_utils._order import order, unit_of
from ansible_collections.lifeboat.evacuation.plugins.module_utils._schedule import (
    TOO_LATE,
    Schedule,
    Times,
    lines,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import (
    Rung,
    SiteSummary,
    VmSummary,
)

# A reason word of a plan, beside those of a schedule and of a forecast.
QUICKER_FOR_OTHERS = "quicker-so-that-more-get-out"
_SEARCHED_THOROUGHLY = 2000
# One large VM that is a little late has taken the place of many small ones: some time is kept, unless it
# is much that is gained with less.
SPARES = ((0.15, 0.0), (0.05, 0.2))


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


def make_plan(
    site: SiteSummary,
    deadline_seconds: float | None,
    *,
    overlap: bool = True,
    known: Forecasts | None = None,
    busy_seconds: t.Mapping[str, float] | None = None,
    spares: t.Sequence[tuple[float, float]] = SPARES,
) -> Plan:
    """The plan for now.

    ``deadline_seconds`` counts from now, None: no limit is known. ``overlap`` False: one VM at a time per
    site and no lead-in behind another's transfer, as the strategy ``sequential`` moves them.
    ``known``: forecasts of plans before, for who plans again and again. ``busy_seconds``: for how long those
    under way still have an uplink to themselves. ``spares``: the shares of the time that are kept free, and
    what must be gained in weight, where others are chosen than the first that fit.
    """
    known = known if known is not None else Forecasts()
    by_pair = lines(site)
    chosen: dict[str, Forecast] = {}
    for vm in site.vms:
        line = by_pair[vm.pair]
        chosen[vm.uuid] = known.first(vm, line.rate, line.trip)
    ordered = order(site.vms, {uuid: max(told.seconds, 1e-3) for uuid, told in chosen.items()})
    schedule = Schedule(
        site, ordered, by_pair, deadline_seconds, known, overlap=overlap, busy_seconds=busy_seconds
    )
    forecasts = [chosen[vm.uuid] for vm in ordered]
    best = schedule.run(forecasts)
    given_up = [place for place, reason in enumerate(best.reasons) if reason == TOO_LATE]
    if not given_up or deadline_seconds is None:
        return _plan(ordered, best, deadline_seconds)
    # Those that fit in their order may weigh less than others would: those come first instead.
    first, tried = (ordered, schedule, forecasts), [ordered]
    for spare_share, must_gain in spares if len(ordered) <= _SEARCHED_THOROUGHLY else spares[:1]:
        other_order = _exchanged(*first, spare_share)
        if other_order in tried:
            continue
        tried.append(other_order)
        other_schedule = Schedule(
            site, other_order, by_pair, deadline_seconds, known, overlap=overlap, busy_seconds=busy_seconds
        )
        other_forecasts = [chosen[vm.uuid] for vm in other_order]
        other = other_schedule.run(other_forecasts)
        if _worth(other_order, other) > (1.0 + must_gain) * _worth(ordered, best):
            ordered, schedule, forecasts, best = other_order, other_schedule, other_forecasts, other
            given_up = [place for place, reason in enumerate(best.reasons) if reason == TOO_LATE]
    # Just enough guests are stopped for the others' sake; where that is not enough, all that may be.
    enough = [sum(best.forecasts[place].seconds for place in given_up), float("inf")]
    for wanted_seconds in enough if len(ordered) <= _SEARCHED_THOROUGHLY else enough[:1]:
        hurried = _hurry(ordered, schedule, best, forecasts, wanted_seconds)
        if hurried is None:
            break
        other = schedule.run(hurried)
        if _worth(ordered, other) > _worth(ordered, best):
            best = other
        if all(end is not None for end in best.ends):
            break
    return _plan(ordered, best, deadline_seconds)


def _exchanged(
    ordered: list[VmSummary], schedule: Schedule, forecasts: t.Sequence[Forecast], spare_share: float
) -> list[VmSummary]:
    """The order with those first that weigh most together and are out in time; a group counts as one."""
    names = [unit_of(vm) for vm in ordered]
    units: dict[str, Unit] = {}
    by_line: dict[str, list[str]] = {}
    for place, name in enumerate(names):
        seconds, weight = schedule.taken_seconds(place, forecasts[place]), ordered[place].weight
        known = units.get(name)
        if known is None:
            units[name] = Unit(name, seconds, weight)
            by_line.setdefault(schedule.uplink_of(place), []).append(name)
        else:
            units[name] = Unit(name, known.seconds + seconds, known.weight + weight)
    saved: set[str] = set()
    for line, inside in by_line.items():
        of_line = [units[name] for name in inside]
        of_line.sort(key=lambda unit: -unit.weight / max(unit.seconds, 1e-6))
        saved |= weightiest(of_line, schedule.seconds_of(line, spare_share))
    # Sorting keeps the order of those that are alike in this.
    places = sorted(range(len(ordered)), key=lambda place: names[place] not in saved)
    return [ordered[place] for place in places]


def _plan(ordered: t.Sequence[VmSummary], times: Times, deadline_seconds: float | None) -> Plan:
    told = [
        PlannedVm(vm, place, times.forecasts[place], times.starts[place], end, times.reasons[place])
        for place, (vm, end) in enumerate(zip(ordered, times.ends, strict=True))
    ]
    told.sort(key=lambda planned: planned.end_seconds is None)
    return Plan(tuple(told), deadline_seconds)


def _worth(ordered: t.Sequence[VmSummary], times: Times) -> float:
    return sum(vm.weight for vm, end in zip(ordered, times.ends, strict=True) if end is not None)


def _hurry(
    ordered: t.Sequence[VmSummary],
    schedule: Schedule,
    times: Times,
    forecasts: t.Sequence[Forecast],
    wanted_seconds: float,
) -> list[Forecast] | None:
    """Quicker rungs for as many VMs as it takes to make room; None where no rung is quicker."""
    offers: list[tuple[float, str, int, Forecast]] = []
    for place, vm in enumerate(ordered):
        now = forecasts[place]
        # Only who leaves can make room.
        if times.ends[place] is None or now.rung is Rung.STAY:
            continue
        quickest = min(schedule.all_rungs(place), key=lambda told: told.seconds, default=now)
        saved = now.seconds - quickest.seconds
        if saved > 0.05 * now.seconds:
            quicker = replace(quickest, reason=QUICKER_FOR_OTHERS)
            offers.append((-saved / vm.weight, vm.uuid, place, quicker))
    if not offers:
        return None
    changed = list(forecasts)
    for _worth_of_it, _uuid, place, quicker in sorted(offers, key=lambda offer: offer[:2]):
        if wanted_seconds <= 0:
            break
        wanted_seconds -= changed[place].seconds - quicker.seconds
        changed[place] = quicker
    return changed
