# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""How the VMs of a group may leave, where the VMs do not say it themselves: ``lifeboat_vm_groups``.

    lifeboat_vm_groups:
      shop: {fallback: [live, paused, restart], shutdown_seconds: 90}

It is read of all hosts of the site together, for a group may have members on several.
"""

from __future__ import annotations

import difflib
import typing as t

from ansible_collections.lifeboat.evacuation.plugins.module_utils._plan_findings import (
    leaving_findings,
    wish_findings,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Finding

VARIABLE = "lifeboat_vm_groups"
_KEYS = ("fallback", "power_off", "shutdown_seconds")

Json = t.Mapping[str, t.Any]


def read_groups(
    hosts: t.Mapping[str, Json], members: t.Callable[[], t.Collection[str]]
) -> tuple[dict[str, Json], list[Finding]]:
    """What holds for the VMs of each group, and what is wrong with it.

    ``hosts``: variables of each hypervisor that is to be emptied; ``members``: every ``group`` that
    ``lifeboat_vms`` names anywhere in the inventory, asked for only where it matters.
    """
    groups: dict[str, Json] = {}
    said_by: dict[str, str] = {}
    found: dict[str, Finding] = {}

    def note(finding: Finding) -> None:
        # A variable of the site is one of each of its hosts: a fault in it is one.
        found.setdefault(str(finding), finding)

    for host in sorted(hosts):
        told = hosts[host].get(VARIABLE)
        if told is None:
            continue
        if not isinstance(told, t.Mapping):
            way_out = "write group names with what holds for them, such as {shop: {fallback: [live]}}"
            note(Finding(f"{VARIABLE} {told!r}", "is no mapping", way_out))
            continue
        for name, wish in told.items():
            wrong = _wrong(name, wish)
            for finding in wrong:
                note(finding)
            if wrong:
                continue
            before = said_by.setdefault(name, host)
            if groups.setdefault(name, wish) != wish:
                fact = f"is another on {before} than on {host}"
                note(Finding(f"{VARIABLE}: {name}", fact, "say it once, for the site"))
    if groups:
        known = set(members())
        for name in sorted(set(groups) - known):
            near = difflib.get_close_matches(name, known, 1)
            way_out = (
                f"write {near[0]} if that was meant" if near else "give its VMs that group, or take it out"
            )
            note(Finding(f"{VARIABLE}: {name}", "is the group of no VM in lifeboat_vms", way_out))
    return groups, list(found.values())


def with_group(wish: Json, groups: t.Mapping[str, Json]) -> Json:
    """What is said of a VM, with what its group says of it where it says nothing itself."""
    own = {key: value for key, value in wish.items() if value is not None}
    return {**groups.get(str(own.get("group", "")), {}), **own}


def _wrong(name: object, wish: object) -> list[Finding]:
    if not isinstance(name, str) or not name.strip():
        return [Finding(f"{VARIABLE}: {name!r}", "is no name of a group", "write a word")]
    subject = f"{VARIABLE}: {name}"
    if not isinstance(wish, t.Mapping):
        return [Finding(f"{subject} {wish!r}", "is no mapping", f"write {', '.join(_KEYS)} below it")]
    told = {key: wish[key] for key in _KEYS if key in wish}
    found = [
        Finding(f"{subject}: {item.subject.partition(': ')[2]}", item.fact, item.way_out)
        for item in (*wish_findings(name, told), *leaving_findings(name, told))
    ]
    for key in sorted(set(map(str, wish)) - set(_KEYS)):
        near = difflib.get_close_matches(key, _KEYS, 1)
        meant = f"write {near[0]} if that was meant" if near else f"known are {', '.join(_KEYS)}"
        found.append(Finding(f"{subject}: {key}", "is nothing that a group can say", meant))
    return found
