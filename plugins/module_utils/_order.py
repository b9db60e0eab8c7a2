# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Who goes before whom: weighted shortest processing time over groups and start-order dependencies.

Smith's rule (Naval Research Logistics Quarterly, 1956): the highest weight per second first makes the
weighted sum of completion times least. Where one must follow another, a small one that many wait for is
worth what follows it: its index is the best of the composites that it begins (Horn's algorithm on in-trees, a
heuristic beyond).
"""

from __future__ import annotations

import heapq
import typing as t

from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import VmSummary


class _Unit:
    """VMs that move together: a group, or one by itself."""

    __slots__ = ("followers", "index", "members", "seconds", "waits_for", "weight")

    def __init__(self) -> None:
        self.members: list[VmSummary] = []
        self.weight = 0.0
        self.seconds = 0.0
        self.index = 0.0
        self.followers: list[str] = []
        self.waits_for: set[str] = set()


def unit_of(vm: VmSummary) -> str:
    """The name of what moves together with a VM."""
    return f"group {vm.group}" if vm.group else f"vm {vm.uuid}"


def order(vms: t.Sequence[VmSummary], seconds: t.Mapping[str, float]) -> list[VmSummary]:
    """The VMs as they are to go; ``seconds`` per UUID is how long each occupies the link.

    Names in ``after`` that are none of the VMs bind nobody: they are out already or not to leave. What is
    left of a cycle comes last, by its index (:func:`cycles` tells of it beforehand).
    """
    bound = {name for vm in vms for name in vm.after}
    # Those by themselves, whom nothing binds, are nearly all of many: they need no more than to be sorted.
    free: list[tuple[float, str, VmSummary]] = []
    others: list[VmSummary] = []
    for vm in vms:
        if vm.group or vm.after or vm.name in bound or vm.uuid in bound:
            others.append(vm)
        else:
            free.append((-vm.weight / max(seconds[vm.uuid], 1e-6), f"vm {vm.uuid}", vm))
    free.sort(key=lambda entry: entry[:2])
    units = _units(others, seconds)
    _index(units)
    waiting = {name: len(unit.waits_for) for name, unit in units.items()}
    ready = [(-unit.index, name) for name, unit in units.items() if not waiting[name]]
    heapq.heapify(ready)
    told: list[VmSummary] = []
    done: set[str] = set()
    place = 0
    while ready or place < len(free):
        if not ready or (place < len(free) and free[place][:2] < ready[0]):
            told.append(free[place][2])
            place += 1
            continue
        _unused, name = heapq.heappop(ready)
        done.add(name)
        told += _inside(units[name].members, seconds)
        for follower in units[name].followers:
            waiting[follower] -= 1
            if not waiting[follower]:
                heapq.heappush(ready, (-units[follower].index, follower))
    for name in sorted(set(units) - done, key=lambda name: (-units[name].index, name)):
        told += _inside(units[name].members, seconds)
    return told


def _units(vms: t.Sequence[VmSummary], seconds: t.Mapping[str, float]) -> dict[str, _Unit]:
    units: dict[str, _Unit] = {}
    unit_by_vm = {}
    for vm in vms:
        name = unit_of(vm)
        unit = units.get(name)
        if unit is None:
            unit = units[name] = _Unit()
        unit.members.append(vm)
        unit.weight += vm.weight
        unit.seconds += seconds[vm.uuid]
        unit_by_vm[vm.name] = unit_by_vm[vm.uuid] = name
    for name, unit in units.items():
        for vm in unit.members:
            for before in vm.after:
                leader = unit_by_vm.get(before)
                if leader is not None and leader != name and leader not in unit.waits_for:
                    unit.waits_for.add(leader)
                    units[leader].followers.append(name)
    return units


def _index(units: dict[str, _Unit]) -> None:
    """Each unit's index, followers before leaders; a cycle's units get their own ratio."""
    composite: dict[str, tuple[float, float]] = {}
    pending = {name: len(unit.followers) for name, unit in units.items()}
    turn = [name for name, count in pending.items() if not count]
    while turn:
        name = turn.pop()
        unit = units[name]
        weight, length = unit.weight, max(unit.seconds, 1e-6)
        for more_weight, more_length in sorted(
            (composite[follower] for follower in unit.followers), key=lambda pair: -pair[0] / pair[1]
        ):
            if more_weight / more_length <= weight / length:
                break
            weight, length = weight + more_weight, length + more_length
        composite[name] = (weight, length)
        unit.index = weight / length
        for leader in unit.waits_for:
            pending[leader] -= 1
            if not pending[leader]:
                turn.append(leader)
    for name, unit in units.items():
        if name not in composite:
            unit.index = unit.weight / max(unit.seconds, 1e-6)


def _inside(members: list[VmSummary], seconds: t.Mapping[str, float]) -> list[VmSummary]:
    """A group's members: by dependency, then by their own ratio."""
    if len(members) == 1:
        return members
    own = {name for vm in members for name in (vm.name, vm.uuid)}
    left = sorted(members, key=lambda vm: (-vm.weight / max(seconds[vm.uuid], 1e-6), vm.name))
    told: list[VmSummary] = []
    placed: set[str] = set()
    while left:
        for vm in left:
            if all(before in placed or before not in own for before in vm.after):
                break
        else:
            vm = left[0]
        left.remove(vm)
        told.append(vm)
        placed |= {vm.name, vm.uuid}
    return told


def cycles(vms: t.Sequence[VmSummary]) -> list[list[str]]:
    """Rings of VMs (names) that wait for each other, each once; groups count as one for their members."""
    by_name = {name: vm for vm in vms for name in (vm.name, vm.uuid)}
    members: dict[str, list[VmSummary]] = {}
    for vm in vms:
        members.setdefault(unit_of(vm), []).append(vm)
    rings: list[list[str]] = []
    # Among VMs themselves first: that is the ring a person wrote down.
    edges = {
        vm.name: sorted({by_name[before].name for before in vm.after if before in by_name}) for vm in vms
    }
    rings += _rings(edges)
    if not rings:
        between = {
            unit: sorted(
                {
                    unit_of(by_name[before])
                    for vm in inside
                    for before in vm.after
                    if before in by_name and unit_of(by_name[before]) != unit
                }
            )
            for unit, inside in members.items()
        }
        for ring in _rings(between):
            rings.append([_said(unit, members[unit]) for unit in ring])
    return rings


def _said(unit: str, inside: t.Sequence[VmSummary]) -> str:
    return inside[0].name if unit.startswith("vm ") else unit


def _rings(edges: t.Mapping[str, t.Sequence[str]]) -> list[list[str]]:
    """One ring for each knot of the graph, found without recursion: chains may be thousands long."""
    state: dict[str, int] = {}
    rings: list[list[str]] = []
    for start in edges:
        if state.get(start):
            continue
        path: list[str] = [start]
        stack = [iter(edges[start])]
        state[start] = 1
        while stack:
            following = next(stack[-1], None)
            if following is None:
                stack.pop()
                state[path.pop()] = 2
            elif state.get(following) == 1:
                ring = path[path.index(following) :]
                if not any(set(ring) & set(known) for known in rings):
                    rings.append(ring)
            elif not state.get(following):
                state[following] = 1
                path.append(following)
                stack.append(iter(edges[following]))
    return rings
