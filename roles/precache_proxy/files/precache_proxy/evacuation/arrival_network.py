# SPDX-License-Identifier: GPL-3.0-or-later
"""The network at the destination, which must stand before the VM runs there."""

from __future__ import annotations

from typing import Protocol

from precache_proxy.evacuation.arrival import Arrival


class ArrivalNetwork(Protocol):
    """Called with a released, still paused VM. ``install`` must be repeatable: a crash may call it twice."""

    async def install(self, definition: str, arrival: Arrival) -> None:
        """Make the VM's addresses lead here, with the arrival's epoch. Raises LifeboatError."""


class NothingToDo:
    """Both sites share the VM's network (or the operator moves it): nothing to install."""

    async def install(self, definition: str, arrival: Arrival) -> None:
        """Do nothing."""
