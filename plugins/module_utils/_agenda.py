# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The plan for those that wait, as it is kept while they do: who is next, and when his turn comes."""

from __future__ import annotations

import typing as t

from ansible_collections.lifeboat.evacuation.plugins.module_utils._forecast import Forecasts
from ansible_collections.lifeboat.evacuation.plugins.module_utils._interval import Observation, Pair
from ansible_collections.lifeboat.evacuation.plugins.module_utils._plan import Plan, make_plan
from ansible_collections.lifeboat.evacuation.plugins.module_utils._shares import ALIKE
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import SiteSummary, VmSummary
from ansible_collections.lifeboat.evacuation.plugins.module_utils._under_way import UnderWay
from ansible_collections.lifeboat.evacuation.plugins.module_utils._uplinks import Uplinks

_PLAN_EVERY_SECONDS = 30.0
# By so much of it an uplink's rate, or the deadline, must have changed for a new plan before that.
_NEWS_SHARE = 0.2
# Who is worth about as much as the next one may be begun before it, if it is one of so many that are next,
# and not for longer than so many in a row.
_NEXT_ONES = 4
_IN_A_ROW = 4


class Agenda:
    """``plan``: the last one; ``worth``: weight per second in it; ``starts_at``: when whose turn comes."""

    def __init__(self, uplinks: Uplinks, *, overlap: bool) -> None:
        self.plan: Plan | None = None
        self.worth: dict[str, float] = {}
        self.starts_at: dict[str, float] = {}
        self._rank: dict[str, int] = {}
        self._uplinks = uplinks
        self._overlap = overlap
        self._forecasts = Forecasts()
        self._made_at = float("-inf")
        self._made_with: tuple[float | None, ...] = ()
        # Per gate: the pair of the VM that was begun last, and how many of it in a row.
        self._begun_last: dict[int, tuple[Pair, int]] = {}

    def in_order(self, uuids: t.Iterable[str]) -> tuple[str, ...]:
        """As they are to go."""
        return tuple(sorted(uuids, key=lambda uuid: self._rank.get(uuid, 0)))

    def in_turn(self, uuids: t.Iterable[str], vms: t.Mapping[str, VmSummary]) -> tuple[str, ...]:
        """As they are to be begun now: where one at a time fills an uplink, one of the next few that is as
        important as the next one, and goes the way of the one before, comes first.

        A way that only trickled needs seconds until it carries what the line can. That is no reason to have
        anybody wait for whom others wait, nor to give up whom the plan saves.
        """
        in_order = self.in_order(uuids)
        narrow = {id(gate) for gate in self._uplinks.gates.values() if gate.one_at_a_time}
        if not narrow or self.plan is None or any(told.end_seconds is None for told in self.plan.vms):
            return in_order
        next_ones: dict[int, list[VmSummary]] = {}
        for uuid in in_order:
            key = id(self._uplinks.gate_of(vms[uuid]))
            if key in narrow and len(next_ones.setdefault(key, [])) < _NEXT_ONES:
                next_ones[key].append(vms[uuid])
        awaited = {name for uuid in in_order for name in vms[uuid].after}
        first = [told.uuid for key, few in next_ones.items() if (told := self._same_way(key, few, awaited))]
        return (*first, *(uuid for uuid in in_order if uuid not in first))

    def _same_way(self, key: int, few: t.Sequence[VmSummary], awaited: t.Collection[str]) -> VmSummary | None:
        """Who of the next few of a gate comes first because it goes the way of the one before."""
        ahead = few[0]
        pair, in_a_row = self._begun_last.get(key, (ahead.pair, 0))
        waited_for = ahead.name in awaited or ahead.uuid in awaited
        if ahead.pair == pair or ahead.group or waited_for or in_a_row >= _IN_A_ROW:
            return None
        for vm in few[1:]:
            alike = self.worth.get(vm.uuid, 0.0) >= ALIKE * self.worth.get(ahead.uuid, 0.0)
            if vm.pair == pair and not vm.group and vm.weight >= ahead.weight and alike:
                return vm
        return None

    def begins(self, vm: VmSummary) -> None:
        """It is begun now."""
        key = id(self._uplinks.gate_of(vm))
        pair, in_a_row = self._begun_last.get(key, (vm.pair, 0))
        self._begun_last[key] = vm.pair, in_a_row + 1 if pair == vm.pair else 1

    def expire(self) -> None:
        """Somebody waits of whom the plan knows nothing: it is old from now on."""
        self._made_at = float("-inf")

    def is_old(self, seen: Observation, left: float | None) -> bool:
        """Whether a new plan is due; ``left`` is what is left until the deadline, in seconds."""
        if seen.now - self._made_at >= _PLAN_EVERY_SECONDS or self.plan is None:
            return True
        before, now = self._made_with, self._inputs(seen, left)
        return len(before) != len(now) or any(
            (old is None) != (new is None)
            or (old is not None and new is not None and abs(new - old) > _NEWS_SHARE * max(abs(old), 1.0))
            for old, new in zip(before, now, strict=True)
        )

    def _inputs(self, seen: Observation, left: float | None) -> tuple[float | None, ...]:
        # The deadline as an instant: time that simply passes is no news.
        made_at = self._made_at if self.plan is not None else seen.now
        deadline = None if left is None or seen.deadline_at is None else seen.deadline_at - made_at
        gates = self._uplinks.gates
        return (deadline, *(gates[name].capacity for name in sorted(gates)))

    def renew(self, site: SiteSummary, seen: Observation, left: float | None, under_way: UnderWay) -> None:
        """Plan anew; ``site`` has those that wait, and what is known of it by now."""
        gates = self._uplinks.gates if self._uplinks.adaptive else {}
        busy = {name: under_way.busy_seconds(gate) for name, gate in gates.items()}
        self.plan = make_plan(site, left, overlap=self._overlap, known=self._forecasts, busy_seconds=busy)
        self._made_at = seen.now
        self._made_with = self._inputs(seen, left)
        # The next may begin when the first of those under way is through.
        free_in = {id(gate): under_way.free_in_seconds(gate) for gate in gates.values()}
        for planned in self.plan.vms:
            uuid = planned.vm.uuid
            self._rank[uuid] = planned.position
            self.worth[uuid] = planned.vm.weight / max(planned.forecast.seconds, 1e-3)
            if planned.start_seconds is not None:
                key = id(self._uplinks.gate_of(planned.vm))
                starts_in = planned.start_seconds + free_in.get(key, 0.0)
                self.starts_at[uuid] = seen.now + starts_in
            else:
                self.starts_at.pop(uuid, None)
