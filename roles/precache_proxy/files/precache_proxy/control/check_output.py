# SPDX-License-Identifier: GPL-3.0-or-later
"""Results of the checks for a terminal, for programs and for Nagios."""

from __future__ import annotations

from collections.abc import Sequence

from precache_proxy.control.answers import Answer
from precache_proxy.control.checks import Severity, worst
from precache_proxy.control.tables import table

_LINES_IN_NAGIOS = 30


def severity(results: Sequence[Answer]) -> Severity:
    """The severity of all results together."""
    return worst([Severity[result["severity"].upper()] for result in results])


def console(results: Sequence[Answer], width: int) -> list[str]:
    """A table, worst first."""
    rows = [
        (result["check"], result["severity"].upper(), result["subject"], result["sentence"])
        for result in _worst_first(results)
    ]
    # The sentence is what people must read: it is never cut.
    narrow = table(("CHECK", "RESULT", "SUBJECT"), [row[:3] for row in rows], max(width // 2, 40))
    longest = max(len(line) for line in narrow)
    sentences = ["", *(row[3] for row in rows)]
    return [
        f"{line:{longest}}  {sentence}".rstrip() for line, sentence in zip(narrow, sentences, strict=True)
    ]


def nagios(name: str, results: Sequence[Answer]) -> list[str]:
    """One line that a pager can show, the rest below it (Nagios plugin API: long output)."""
    total = severity(results)
    bad = [result for result in _worst_first(results) if result["severity"] != "ok"]
    if bad:
        first = f"{bad[0]['check']} {bad[0]['subject']}: {bad[0]['sentence']}"
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    else:
        first, more = f"{len(results)} results, all good", ""
    # A bar would start performance data.
    lines = [f"LIFEBOAT {total.name} - {name}: {first}{more}"]
    lines += [
        f"{result['severity'].upper()}: {result['check']} {result['subject']}: {result['sentence']}"
        for result in bad[:_LINES_IN_NAGIOS]
    ]
    return [line.replace("|", "/") for line in lines]


def _worst_first(results: Sequence[Answer]) -> list[Answer]:
    order = ("critical", "warning", "unknown", "ok")
    return sorted(results, key=lambda result: order.index(result["severity"]))
