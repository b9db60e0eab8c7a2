# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What guests dirtied since their round began: nobody tells it, and it has to cross, too."""

from __future__ import annotations

import typing as t
from dataclasses import replace

from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import Move, Phase
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Rung, VmSummary


class Rounds:
    """Remembers of each move when it was seen last, what its round had left, and what was dirtied in it."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float, float]] = {}

    def told(
        self, moves: t.Mapping[str, Move], vms: t.Mapping[str, VmSummary], now: float
    ) -> dict[str, Move]:
        """The moves with their ``dirtied_bytes``: what is dirtied until the round is over comes on top.

        A round has begun where more is left than before. What QEMU sends anew is told after its first round;
        until then what the guest dirtied beforehand is taken.
        """
        before, self._seen = self._seen, {}
        told: dict[str, Move] = {}
        for uuid, move in moves.items():
            told[uuid] = move
            vm = vms.get(uuid)
            if vm is None or move.phase is not Phase.BULK or move.rung is not Rung.LIVE:
                continue
            at, left, dirtied = before.get(uuid, (now, move.remaining_bytes, 0.0))
            if move.remaining_bytes > left:
                dirtied = 0.0
            else:
                rate = move.dirty_bytes_per_second or vm.dirty_bytes_per_second * vm.packed_ratio
                dirtied = min(dirtied + rate * (now - at), vm.memory_used_bytes * vm.packed_ratio)
            self._seen[uuid] = (now, move.remaining_bytes, dirtied)
            if dirtied:
                told[uuid] = replace(move, dirtied_bytes=dirtied)
        return told
