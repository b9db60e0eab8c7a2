# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Whom to ask between two looks: hosts whose moves may be through before the next one."""

from __future__ import annotations

import typing as t

from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import Move, Phase, live_seconds

# So many hosts are asked between two looks, at most: each time is work for the controller, too.
_GLANCED_HOSTS = 16
# Of a move's memory so many times what crosses in the end may be told as left.
_MOST_TOO_MUCH = 4.0


def nearly_over(move: Move, seconds: float) -> bool:
    """Whether a move is thought to be through, or handed over, within this time."""
    if move.silent or move.phase is Phase.LEAD_IN:
        return False
    rate = move.bytes_per_second
    return move.phase is not Phase.BULK or (rate > 0 and live_seconds(move, rate) <= seconds)


def over_first(
    moves: t.Mapping[str, Move],
    source_of: t.Callable[[str], str],
    seconds: float,
    opened: t.Collection[str] = (),
) -> list[str]:
    """The hosts whose moves may be through, or handed over, within this time: a few, the surest first.

    Of those in their lead-in nobody knows: a small guest is through within a look; nor of those of whom much
    less may be left than is told, for pages that nobody has looked at yet may be empty; nor of those that
    were ``opened`` since their rates were seen.
    """
    ranks: dict[str, int] = {}
    for uuid, move in moves.items():
        over = nearly_over(move, seconds)
        unknown = move.phase is Phase.LEAD_IN or move.bytes_per_second <= 0 or uuid in opened
        unknown = unknown or nearly_over(move, _MOST_TOO_MUCH * seconds)
        if over or (unknown and not move.silent):
            host, rank = source_of(uuid), 1 if over else 2
            ranks[host] = min(rank, ranks.get(host, rank))
    return sorted(ranks, key=lambda host: (ranks[host], host))[:_GLANCED_HOSTS]
