# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""In what share of the time the processors of hosts were waited for, from the counters that they tell."""

from __future__ import annotations

import typing as t


class ProcessorWait:
    """Remembers each host's counter from look to look."""

    def __init__(self) -> None:
        # Per host: when it was asked, and its counter by then.
        self._before: dict[str, tuple[float, float]] = {}

    def share(self, host: str, told: t.Mapping[str, t.Any] | None, now: float) -> float | None:
        """Of the time since the host's last look, 0 to 1; at its first one, of some seconds before it.

        ``told`` is the host's ``processor_wait``; None where its kernel, or its proxy, does not tell.
        """
        before = self._before.pop(host, None)
        if not told:
            return None
        total = float(told["total_seconds"])
        self._before[host] = now, total
        if before is None or now <= before[0] or total < before[1]:
            return float(told["recent_share"])
        return min(1.0, (total - before[1]) / (now - before[0]))
