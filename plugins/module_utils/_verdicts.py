# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Outcomes of an evacuation as a table for people and as totals for the report."""

from __future__ import annotations

import typing as t
import unicodedata

Outcome = t.Mapping[str, t.Any]

# What a job says of how its VM got out, or why it did not, as outcomes and reports keep it.
JOB_FIGURES = (
    "cause",
    "sentence",
    "findings",
    "eviction_seconds",
    "downtime_seconds",
    "bytes",
    "bound",
    "steps",
)

_HEAD = ("VM", "FROM", "TO", "VERDICT", "EVICTION", "DOWNTIME")


def _cells(text: str) -> int:
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def _seconds(value: object) -> str:
    return f"{value:.2f} s" if isinstance(value, (int, float)) else "-"


def table(outcomes: t.Sequence[Outcome]) -> list[str]:
    """Lines of a table, one VM each, and below it the reason of each VM that is not out, and what is to be
    known of one that is."""
    rows = [
        (
            str(outcome.get("name")),
            str(outcome.get("host") or "-"),
            str(outcome.get("peer") or "-"),
            str(outcome.get("verdict")),
            _seconds(outcome.get("eviction_seconds")),
            _seconds(outcome.get("downtime_seconds")),
        )
        for outcome in outcomes
    ]
    widths = [max(_cells(row[column]) for row in [_HEAD, *rows]) for column in range(len(_HEAD))]
    lines = [
        "  ".join(
            cell + " " * (width - _cells(cell)) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in [_HEAD, *rows]
    ]
    reasons = [
        "{}: {}{}".format(outcome.get("name"), outcome["sentence"], lag_words(outcome))
        for outcome in outcomes
        if outcome.get("sentence")
        and (
            outcome.get("verdict") not in ("evacuated", "already-there") or outcome.get("cause") == "warning"
        )
    ]
    return lines + ([""] if reasons else []) + reasons


def lag_words(told: Outcome) -> str:
    """How old the replica is that survives of a VM, "" where nobody said."""
    if told.get("lag_bytes") is None or told.get("verdict") in ("evacuated", "already-there"):
        return ""
    seconds = told.get("lag_seconds")
    age = "" if seconds is None else f", {seconds:.0f} s old"
    return f" (its replica lacks {told['lag_bytes'] / 1e6:.1f} MB{age})"


def totals(outcomes: t.Sequence[Outcome]) -> dict[str, t.Any]:
    """How many VMs have which verdict, and whether every one is out."""
    verdicts: dict[str, int] = {}
    for outcome in outcomes:
        verdict = str(outcome.get("verdict"))
        verdicts[verdict] = verdicts.get(verdict, 0) + 1
    out = verdicts.get("evacuated", 0) + verdicts.get("already-there", 0)
    return {"vms": len(outcomes), "out": out, "all_out": out == len(outcomes), "verdicts": verdicts}


def check_sentence(result: Outcome) -> str:
    """One result of a proxy's check, in one line."""
    return f"{result['check']} {result['subject']}: {result['sentence']}"


def finding_sentence(finding: Outcome) -> str:
    """One finding of a preflight, in one line."""
    about = f"{finding['subject']}: {finding['fact']}; {finding['way_out']}"
    return about if str(finding["vm"]) in about else f"VM {finding['vm']}: {about}"
