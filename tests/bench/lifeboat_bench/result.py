# SPDX-License-Identifier: GPL-3.0-or-later
"""A benchmark's table: rows as measured, the figures that were asked for beside those measured."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Value = str | int | float | bool | None

_COMPARE: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True, slots=True)
class Bar:
    """One figure that was asked for: ``measured`` holds when it stands on the right side of ``asked``."""

    what: str
    relation: str
    asked: float
    measured: float | None
    unit: str = ""

    @property
    def holds(self) -> bool:
        """False too where nothing was measured: a figure that is missing is not a figure that is met."""
        return self.measured is not None and _COMPARE[self.relation](self.measured, self.asked)


@dataclass(slots=True)
class Table:
    """Rows in the order in which they were measured; every row has the same keys."""

    name: str
    rows: list[dict[str, Value]] = field(default_factory=list)
    summary: dict[str, Value] = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)
    circumstances: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether every bar holds; a table without bars shows nothing."""
        return bool(self.bars) and all(bar.holds for bar in self.bars)

    def as_dict(self) -> dict[str, Any]:
        """The documented JSON form."""
        return {
            "table": self.name,
            "rows": self.rows,
            "summary": self.summary,
            "bars": [{**asdict(bar), "holds": bar.holds} for bar in self.bars],
            "holds": self.holds,
            "circumstances": self.circumstances,
        }

    def write(self, directory: Path) -> Path:
        """Write ``NAME.json`` into ``directory`` and return its path."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.name}.json"
        path.write_text(json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    def render(self) -> str:
        """The table as text for a terminal."""
        lines = [f"table {self.name}"]
        if self.rows:
            keys = list(self.rows[0])
            cells = [[_cell(row.get(key)) for key in keys] for row in self.rows]
            lines += _columns([key.replace("_", " ") for key in keys], cells)
        lines += ["", *(f"  {key.replace('_', ' ')}: {_cell(value)}" for key, value in self.summary.items())]
        if self.bars:
            cells = [
                [
                    bar.what,
                    f"{bar.relation} {_cell(bar.asked)} {bar.unit}".strip(),
                    f"{_cell(bar.measured)} {bar.unit}".strip()
                    if bar.measured is not None
                    else "not measured",
                    "holds" if bar.holds else "MISSED",
                ]
                for bar in self.bars
            ]
            lines += ["", *_columns(["figure", "asked", "measured", ""], cells)]
        return "\n".join(lines)


def _cell(value: Value) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def _columns(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[index]) for row in [head, *cells]) for index in range(len(head))]
    rows = [head, ["-" * width for width in widths], *cells]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
