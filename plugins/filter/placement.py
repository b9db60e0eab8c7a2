# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Where replicas go, from what all hypervisors answered, and which VMs have left."""

from __future__ import annotations

import typing as t
from dataclasses import asdict

from ansible_collections.lifeboat.evacuation.plugins.module_utils._placement import place

Result = t.Mapping[str, t.Any]

_EVACUATED = ("evacuated", "already-there")
_OUT = (*_EVACUATED, "restarted-from-replica")


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
    vms: t.Sequence[Result],
    jobs: t.Sequence[Result],
    domains: t.Sequence[Result] | None,
    tombstones: t.Sequence[Result] = (),
) -> list[dict[str, t.Any]]:
    """Listed VMs that an evacuation took away and that are not among a hypervisor's domains, or that may not
    run there any more as they run elsewhere (``tombstones``), whichever way that came about."""
    away = []
    for vm in vms:
        name = vm["name"]
        # Oldest first; a VM that came back is among the domains again.
        newest = next((job for job in reversed(jobs) if name in (job.get("vm"), job.get("name"))), {})
        there = domains is None or any(name in (one.get("uuid"), one.get("name")) for one in domains)
        left = newest.get("verdict") in _OUT and not there
        # One that was made anew by the name of one that left is another VM.
        anew = {one.get("uuid") for one in domains or () if name == one.get("name")}
        tombstone = next(
            (
                one
                for one in tombstones
                if name == one.get("uuid")
                or (name == one.get("name") and (not anew or one.get("uuid") in anew))
            ),
            None,
        )
        if tombstone is not None and not (left and newest["verdict"] in _EVACUATED):
            away.append({"name": name, "peer": tombstone.get("peer"), "sentence": tombstone.get("sentence")})
        elif left:
            peer = newest.get("peer")
            sentence = f"VM {name}: it was evacuated to {peer}, which protects it now."
            away.append({"name": name, "peer": peer, "sentence": sentence})
    return away


def _why(result: Result) -> str:
    return str(result.get("msg") or "was not reached")


class FilterModule:
    """Jinja2 filters."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """The filters by name."""
        return {"placement": placement, "moved_away": moved_away}
