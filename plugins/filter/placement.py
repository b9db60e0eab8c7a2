# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Where replicas go, from what all hypervisors answered."""

from __future__ import annotations

import typing as t
from dataclasses import asdict

from ansible_collections.lifeboat.evacuation.plugins.module_utils._placement import place

Result = t.Mapping[str, t.Any]


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


def _why(result: Result) -> str:
    return str(result.get("msg") or "was not reached")


class FilterModule:
    """Jinja2 filters."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """The filters by name."""
        return {"placement": placement}
