# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The table at the end of an evacuation, and what is made of its outcomes."""

from __future__ import annotations

import typing as t

from ansible_collections.lifeboat.evacuation.plugins.module_utils._verdicts import (
    check_sentence,
    finding_sentence,
    table,
    totals,
)


class FilterModule:
    """Jinja2 filters."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """The filters by name."""
        return {
            "verdict_table": table,
            "verdict_totals": totals,
            "check_sentence": check_sentence,
            "finding_sentence": finding_sentence,
        }
