# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The report as one HTML page that needs nothing but itself: figures, pictures, what became of every VM."""

from __future__ import annotations

import datetime
import typing as t
from pathlib import Path

import jinja2

Json = t.Mapping[str, t.Any]

TEMPLATE = (
    Path(__file__).resolve().parents[2] / "roles" / "evacuation" / "templates" / "evacuation-report.html.j2"
)

# The plot area of the pictures, in their own units.
LEFT, RIGHT, TOP, BOTTOM = 56.0, 12.0, 10.0, 30.0
WIDTH, HEIGHT = 720.0, 220.0
ROW = 22.0
NAMES = 130.0
_PHASES = {
    "catch-up": "catch-up",
    "residual": "catch-up",
    "migrate": "memory",
    "confirm": "closing",
    "released": "closing",
    "finish": "closing",
    "rollback": "rollback",
    "undecided": "undecided",
}


def write_page(report: Json, path: Path) -> None:
    """Write the page. Raises OSError where that cannot be done."""
    path.write_text(render(report), encoding="utf-8")


def render(report: Json) -> str:
    """The page's text."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["seconds"] = _seconds
    environment.filters["megabytes"] = lambda value: "–" if value is None else f"{value / 1e6:,.1f} MB"
    environment.filters["percent"] = lambda value: "–" if value is None else f"{value * 100:.0f} %"
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report, view=view(report))


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    if value < 100:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


def _ticks(most: float, count: int = 5) -> list[float]:
    """Round numbers from 0 to about ``most``."""
    if most <= 0:
        return [0.0, 1.0]
    step = 10.0 ** len(str(int(most / count)))
    for part in (100, 50, 20, 10, 5, 2, 1):
        candidate = step * part / 100
        if candidate and most / candidate <= count + 1:
            step = candidate
    number = int(most / step) + 1
    return [index * step for index in range(number + 1)]


class _Plot:
    """Where a point of a picture is."""

    def __init__(
        self,
        most_x: float,
        most_y: float,
        left: float = LEFT,
        height: float = HEIGHT,
        ys: t.Sequence[float] = (),
    ) -> None:
        self.xs, self.ys = _ticks(most_x, 7), list(ys) or _ticks(most_y)
        self.left, self.height = left, height
        # The axis of time ends with the data, not with a round number.
        self._most_x, self._most_y = max(most_x * 1.02, 1e-9), self.ys[-1] or 1.0
        self.xs = [tick for tick in self.xs if tick <= self._most_x]

    def x(self, value: float) -> float:
        """Across."""
        return round(self.left + (WIDTH - self.left - RIGHT) * min(value / self._most_x, 1.0), 1)

    def y(self, value: float) -> float:
        """Upwards."""
        return round(self.height - BOTTOM - (self.height - TOP - BOTTOM) * value / self._most_y, 1)

    def line(self, points: t.Sequence[tuple[float, float]]) -> str:
        """Points of a polyline."""
        return " ".join(f"{self.x(x)},{self.y(y)}" for x, y in points)


def _staircase(ends: t.Sequence[float], count: int, until: float) -> list[tuple[float, float]]:
    """S(t): up by one VM's share at each end."""
    points, out = [(0.0, 0.0)], 0
    for end in sorted(ends):
        points.append((end, out / count))
        out += 1
        points.append((end, out / count))
    points.append((until, out / count))
    return points


def view(report: Json) -> dict[str, t.Any]:
    """Everything that the template draws, computed."""
    coordination = report["coordination"]
    samples = coordination["samples"]
    vms = report["vms"]
    count = max(1, len(vms))
    outs = [vm["out_seconds"] for vm in vms if vm.get("out_seconds") is not None]
    planned = [vm["end_seconds"] for vm in coordination["forecast"]["vms"] if vm["end_seconds"] is not None]
    until = max([coordination["seconds"], 1.0, *outs, *planned])
    safe = _Plot(until, 1.0, ys=(0.0, 0.25, 0.5, 0.75, 1.0))
    rates = [sum(sample["goodput_bytes_per_second"].values()) * 8 / 1e6 for sample in samples]
    capacities = [_known(sample["capacity_bytes_per_second"]) for sample in samples]
    rate = _Plot(until, max([1.0, *rates, *(value for value in capacities if value is not None)]))
    times = [sample["at_seconds"] for sample in samples]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "bottom": HEIGHT - BOTTOM,
        "safe": safe,
        "safe_result": safe.line(_staircase(outs, count, until)),
        "safe_forecast": safe.line(_staircase(planned, count, until)),
        "rate": rate,
        "rate_result": rate.line(list(zip(times, rates, strict=True))),
        "rate_capacity": rate.line(
            [(at, value) for at, value in zip(times, capacities, strict=True) if value is not None]
        ),
        "timeline": _timeline(report, until),
        "classes": _classes(coordination["bytes_by_class"]),
        "key_figures": _key_figures(report),
        "worst": [vm for vm in vms if vm["verdict"] not in {"evacuated", "already-there"}],
    }


def _known(capacities: Json) -> float | None:
    values = [value for value in capacities.values() if value]
    return sum(values) * 8 / 1e6 if values else None


def _key_figures(report: Json) -> list[tuple[str, str, str]]:
    coordination, totals = report["coordination"], report["totals"]
    forecast = coordination["forecast"]
    stops = [vm["downtime_seconds"] for vm in report["vms"] if vm.get("downtime_seconds") is not None]
    sent = sum(coordination["bytes_by_class"].values())
    share = coordination["expected_share"]
    guess = "" if forecast.get("line_known", True) else ", a guess: what the line carries was not known"
    return [
        ("out", f"{totals['out']} of {totals['vms']}", f"forecast {forecast['leaving']}"),
        ("last one out after", _seconds(coordination["makespan_seconds"]),
         f"forecast {_seconds(forecast['makespan_seconds'])}{guess}"),
        ("E, the share saved at a random moment", "–" if share is None else f"{share * 100:.0f} %",
         f"forecast {forecast['expected_share'] * 100:.0f} %" if forecast.get("expected_share") else ""),
        *([("safe at the deadline", f"{coordination['share_at_deadline'] * 100:.0f} %", "")]
          if coordination.get("share_at_deadline") is not None else []),
        ("longest stop of a guest", _seconds(max(stops)) if stops else "–", ""),
        ("sent over the WAN", f"{sent / 1e6:,.0f} MB", ""),
    ]  # fmt: skip


def _timeline(report: Json, until: float) -> dict[str, t.Any]:
    began = datetime.datetime.fromisoformat(report["started_at"]).timestamp()
    rows = []
    vms = sorted(
        report["vms"], key=lambda vm: (vm.get("started_seconds") is None, vm.get("started_seconds") or 0.0)
    )
    height = TOP + ROW * len(vms) + BOTTOM
    plot = _Plot(until, 1.0, NAMES, height)
    for number, vm in enumerate(vms):
        bars = []
        for step in vm.get("steps") or []:
            start = float(step["started_at"]) - began
            end = (float(step["ended_at"]) if step.get("ended_at") else began + until) - began
            if end <= 0:
                continue
            left, right = plot.x(max(start, 0.0)), plot.x(max(end, 0.0))
            phase = _PHASES.get(step["step"], "prepare")
            what = f"{vm['name']}: {step['step']}, {end - start:.1f} s"
            bars.append({"x": left, "width": max(right - left, 0.8), "phase": phase, "what": what})
        rows.append({
            "name": vm["name"], "y": TOP + ROW * number, "bars": bars, "verdict": vm["verdict"],
            "end": None if vm.get("out_seconds") is None else plot.x(vm["out_seconds"]),
        })  # fmt: skip
    return {"rows": rows, "height": height, "plot": plot, "row": ROW, "names": NAMES}


def _classes(classes: Json) -> list[dict[str, t.Any]]:
    most = max([1.0, *classes.values()])
    return [
        {"name": name, "bytes": count, "width": round(100 * count / most, 1)}
        for name, count in classes.items()
    ]
