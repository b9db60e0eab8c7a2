# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which VMs of a dead site are started where, and what became of them."""

from __future__ import annotations

import typing as t
from dataclasses import asdict

from ansible_collections.lifeboat.evacuation.plugins.module_utils._fail_over import (
    bad,
    make_plan,
    outcomes,
    table,
)

Json = t.Mapping[str, t.Any]


def fail_over_plan(
    asked: t.Sequence[Json],
    homes: t.Mapping[str, Json],
    vms: t.Sequence[str] | None = None,
    leave_behind: t.Sequence[str] = (),
    neighbours: t.Sequence[str] = (),
) -> dict[str, t.Any]:
    """Results of fail_over_info in a loop over hosts; per dead host how it was tried, and its variables."""
    return asdict(make_plan(asked, homes, vms, leave_behind, neighbours))


def fail_over_outcomes(plan: Json, results: t.Sequence[Json]) -> dict[str, t.Any]:
    """The plan, and results of the module fail_over in loops over its VMs."""
    told = outcomes(plan, results)
    return {"vms": told, "bad": bad(told), "table": table(told)}


class FilterModule:
    """Jinja2 filters."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """The filters by name."""
        return {"fail_over_plan": fail_over_plan, "fail_over_outcomes": fail_over_outcomes}
