# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Whose memory the destinations have, while VMs come to them and while some do not come after all."""

from __future__ import annotations

import typing as t

from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import (
    DestinationSummary,
    VmSummary,
)


class DestinationMemory:
    """What is free at each destination, less what those take that were started. Bytes; None: nobody knows."""

    def __init__(self, destinations: t.Iterable[DestinationSummary]) -> None:
        self._free = {item.name: item.memory_free_bytes for item in destinations}
        self._reserved: set[str] = set()

    def free_bytes(self, destination: str) -> float | None:
        """What is left for those that come yet."""
        return self._free.get(destination)

    def has_room(self, vm: VmSummary) -> bool:
        """Whether a VM has its memory there already, or may have it."""
        free = self._free.get(vm.destination)
        return free is None or vm.uuid in self._reserved or vm.memory_bytes <= free

    def reserve(self, vm: VmSummary) -> None:
        """It is on its way. Once, however often it is said."""
        free = self._free.get(vm.destination)
        if free is not None and vm.uuid not in self._reserved:
            self._reserved.add(vm.uuid)
            self._free[vm.destination] = free - vm.memory_bytes

    def give_back(self, vm: VmSummary) -> None:
        """It does not come, or not now: others may have it. Nothing where it has none."""
        free = self._free.get(vm.destination)
        if free is not None and vm.uuid in self._reserved:
            self._reserved.discard(vm.uuid)
            self._free[vm.destination] = free + vm.memory_bytes
