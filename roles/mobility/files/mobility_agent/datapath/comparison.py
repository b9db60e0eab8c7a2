# SPDX-License-Identifier: GPL-3.0-or-later
"""What the kernel has, against what it shall have: looked at a slice at a time, so that nobody waits for it.

With thousands of VMs it takes a quarter of a second in one go, in which no hand-over would be heard. What
changes meanwhile may come out as a difference; so whoever acts on one asks again what is wanted now.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from mobility_agent.datapath import neighbours, routes
from mobility_agent.datapath.neighbours import Neighbour
from mobility_agent.datapath.netlink import RouteSocket
from mobility_agent.datapath.routes import Route
from mobility_agent.datapath.wanted import Wanted
from mobility_agent.homes import Home

T = TypeVar("T")

# About a millisecond's work.
_SLICE = 32


@dataclass(slots=True)
class Differences:
    """``standing``: what does not depend on any VM is not right. ``homes``: of these routes are wrong.

    ``routes``, ``neighbours``: there, and nobody's; ``missing``: neighbours that are not there.
    """

    standing: bool = False
    homes: set[Home] = field(default_factory=set)
    routes: list[Route] = field(default_factory=list)
    neighbours: list[Neighbour] = field(default_factory=list)
    missing: list[Neighbour] = field(default_factory=list)


async def _slowly(items: Iterable[T]) -> AsyncIterator[T]:
    for number, item in enumerate(items, 1):
        yield item
        if number % _SLICE == 0:
            await asyncio.sleep(0)


async def compare(
    wanted: Wanted, neighbours_wanted: Callable[[], list[Neighbour]], has_device: Callable[[str], bool]
) -> Differences:
    """Look at all of it. What needs a device that is not there is not missed. Raises KernelRefused."""
    kernel, found = RouteSocket(), Differences()
    try:
        await _routes(kernel, wanted, has_device, found)
        present = {entry async for entry in _slowly(neighbours.each(kernel)) if entry is not None}
    finally:
        kernel.close()
    there = functools.cache(has_device)
    expected = {entry async for entry in _slowly(neighbours_wanted()) if there(entry.device)}
    found.neighbours = [entry async for entry in _slowly(present) if entry not in expected]
    found.missing = [entry async for entry in _slowly(expected) if entry not in present]
    return found


async def _routes(
    kernel: RouteSocket, wanted: Wanted, has_device: Callable[[str], bool], found: Differences
) -> None:
    present = {route async for route in _slowly(routes.each(kernel)) if route is not None}

    there = functools.cache(has_device)

    def missed(route: Route) -> bool:
        return route not in present and (route.device is None or there(route.device))

    standing = set(wanted.standing_routes())
    places = {(route.destination, route.table) for route in standing}
    found.standing = any(missed(route) for route in standing)
    async for home in _slowly(wanted.homes()):
        if any(missed(route) for route in wanted.home_routes(home)):
            found.homes.add(home)
    known = wanted.homes()
    async for route in _slowly(present):
        if route in standing:
            continue
        if route.former_priority is not None:
            found.routes.append(route)
        elif (route.destination, route.table) in places:
            found.standing = True
        elif route.destination not in known:
            found.routes.append(route)
        elif route not in wanted.home_routes(route.destination):
            found.homes.add(route.destination)
