# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Where replicas go, from what all hypervisors answered, and which VMs have left."""

from __future__ import annotations

import typing as t
from dataclasses import asdict

from ansible_collections.lifeboat.evacuation.plugins.module_utils._placement import place

Result = t.Mapping[str, t.Any]

_OUT = ("evacuated", "already-there", "restarted-from-replica")


def placement(
    wishes: t.Mapping[str, t.Mapping[str, t.Any]],
    asked: t.Mapping[str, Result],
    asked_beside: t.Sequence[Result] = (),
) -> dict[str, t.Any]:
    """``wishes`` by host; what hypervisor_info returned, by host, and as results of a loop over hosts."""
    results = {str(one["item"]): one for one in asked_beside}
    results.update(asked)
    rooms = {name: result.get("hypervisor") or {"error": _why(result)} for name, result in results.items()}
    return asdict(place(wishes, rooms))


def moved_away(
    vms: t.Sequence[Result], jobs: t.Sequence[Result], domains: t.Sequence[Result] | None
) -> list[dict[str, t.Any]]:
    """Listed VMs that are not among a hypervisor's domains because an evacuation took them away."""
    away = []
    for vm in vms:
        name = vm["name"]
        # Oldest first; a VM that came back is among the domains again.
        newest = next((job for job in reversed(jobs) if name in (job.get("vm"), job.get("name"))), None)
        there = domains is None or any(name in (one.get("uuid"), one.get("name")) for one in domains)
        if newest is not None and newest.get("verdict") in _OUT and not there:
            away.append({"name": name, "peer": newest.get("peer")})
    return away


def _why(result: Result) -> str:
    return str(result.get("msg") or "was not reached")


class FilterModule:
    """Jinja2 filters."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """The filters by name."""
        return {"placement": placement, "moved_away": moved_away}
