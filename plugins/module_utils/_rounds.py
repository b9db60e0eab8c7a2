# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What moves have still to send, where QEMU does not say it.

Pages that will turn out to be empty do not cross; what guests dirtied since their round began has to, too.
"""

from __future__ import annotations

import typing as t
from dataclasses import replace

from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import Move, Phase
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Rung, VmSummary

# Of what the pages that are left come to, so much is counted at least: a sample says too little now and then.
_LEAST_SHARE = 0.25


class Rounds:
    """Remembers of each move when it was seen last, what its round had left, and what was dirtied in it."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float, int, float]] = {}

    def told(
        self, moves: t.Mapping[str, Move], vms: t.Mapping[str, VmSummary], now: float
    ) -> dict[str, Move]:
        """The moves with their ``dirtied_bytes``: what is dirtied until the round is over comes on top. And
        with what their guests were seen to write before they moved: nobody measures it now.

        A round has begun where its number says so, or, without one, where more is left than before. What QEMU
        sends anew is told after its first round; until then what the guest dirtied beforehand is taken.
        """
        before, self._seen = self._seen, {}
        told: dict[str, Move] = {}
        for uuid, move in moves.items():
            vm = vms.get(uuid)
            told[uuid] = move if vm is None else _less_the_empty(move, vm)
            if vm is None or move.phase is not Phase.BULK or move.rung is not Rung.LIVE:
                continue
            number = move.round_number
            at, left, number_before, dirtied = before.get(uuid, (now, move.remaining_bytes, number, 0.0))
            if number != number_before or (not number and move.remaining_bytes > left):
                dirtied = 0.0
            else:
                rate = move.dirty_bytes_per_second or vm.dirty_bytes_per_second * vm.packed_ratio
                dirtied = min(dirtied + rate * (now - at), vm.memory_used_bytes * vm.packed_ratio)
            self._seen[uuid] = (now, move.remaining_bytes, number, dirtied)
            written = vm.written_bytes_per_second
            if dirtied or written:
                told[uuid] = replace(told[uuid], dirtied_bytes=dirtied, written_bytes_per_second=written)
        return told


def _less_the_empty(move: Move, vm: VmSummary) -> Move:
    """In its first round: QEMU counts pages that are empty, of which a sample of the memory knows."""
    sampled = vm.sampled_memory_bytes
    if sampled is None or move.phase is not Phase.BULK or move.round_number != 1:
        return move
    if move.sent_bytes >= sampled:
        return move  # the sample said too little
    left = max(_LEAST_SHARE * move.remaining_bytes, sampled - move.sent_bytes)
    if left >= move.remaining_bytes:
        return move
    return replace(move, remaining_bytes=left, most_remaining_bytes=move.remaining_bytes)
