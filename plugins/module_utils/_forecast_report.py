# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A forecast as JSON and for people, and the words in which VMs that stay are told of."""

from __future__ import annotations

import typing as t

from ansible_collections.lifeboat.evacuation.plugins.module_utils._batch import OUT
from ansible_collections.lifeboat.evacuation.plugins.module_utils._outcomes import iso
from ansible_collections.lifeboat.evacuation.plugins.module_utils._plan import Plan
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Rung, SiteSummary


def rate_words(bytes_per_second: float) -> str:
    """A rate for people."""
    return f"{bytes_per_second * 8 / 1e6:.1f} Mbit/s"


def span_words(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes}:{rest:02d}"


def line_known(site: SiteSummary) -> bool:
    """Whether anybody knows what any way out carries. Else every second that is forecast is a guess."""
    return any(site.uplinks.values()) or any(pair.bytes_per_second for pair in site.pairs)


def forecast_of(
    site: SiteSummary, plan: Plan, at: float, placement: t.Sequence[object] = ()
) -> dict[str, t.Any]:
    """A plan as JSON: what rehearsal keeps and what a report sets beside the result."""
    horizon = plan.deadline_seconds or plan.makespan_seconds
    return {
        "at": iso(at),
        "site": site.site,
        "deadline_seconds": plan.deadline_seconds,
        "makespan_seconds": round(plan.makespan_seconds, 2),
        "expected_share": round(plan.expected_share(horizon), 4) if horizon else None,
        "leaving": len(plan.leaving),
        "vms": [
            {
                "name": planned.vm.name,
                "vm": planned.vm.uuid,
                "host": planned.vm.source,
                "peer": planned.vm.destination,
                "rung": planned.rung.value,
                "reason": planned.reason,
                "start_seconds": rounded(planned.start_seconds),
                "end_seconds": rounded(planned.end_seconds),
                "wire_bytes": round(planned.forecast.wire_bytes),
                "stop_seconds": rounded(planned.forecast.stop_seconds),
                "dirty_bytes_per_second": round(planned.vm.dirty_bytes_per_second),
                "written_bytes_per_second": round(planned.vm.written_bytes_per_second),
                "rate_bytes_per_second": round(planned.forecast.bytes_per_second),
                "lag_bytes": round(planned.vm.lag_bytes),
            }
            for planned in plan.vms
        ],
        "uplinks": dict(site.uplinks),
        "line_known": line_known(site),
        "placement": [str(finding) for finding in placement],
    }


def count_others(forecast: dict[str, t.Any], outcomes: t.Sequence[t.Mapping[str, t.Any]]) -> None:
    """Those whom no plan moves count, too: who would be left behind, and who is out already."""
    left = [outcome for outcome in outcomes if outcome["verdict"] not in OUT]
    forecast["already_out"] = len(outcomes) - len(left)
    forecast["vms"] += [
        {
            "name": outcome["name"],
            "vm": outcome.get("vm"),
            "host": outcome.get("host"),
            "peer": outcome.get("peer"),
            "rung": Rung.STAY.value,
            "reason": outcome.get("cause"),
            "sentence": outcome.get("sentence"),
            "start_seconds": None,
            "end_seconds": None,
            "wire_bytes": 0,
            "stop_seconds": 0.0,
            "dirty_bytes_per_second": 0,
            "written_bytes_per_second": 0,
            "rate_bytes_per_second": 0,
            "lag_bytes": 0,
        }
        for outcome in left
    ]
    _figure_again(forecast)


def mark_preflights(forecast: dict[str, t.Any], wrong: t.Mapping[str, str]) -> list[str]:
    """Take those that a preflight refuses out of a forecast; names of all that would stay."""
    for vm in forecast["vms"]:
        if vm["vm"] in wrong:
            vm.update(end_seconds=None, start_seconds=None, rung=Rung.STAY.value, reason="preflight",
                      sentence=wrong[vm["vm"]])  # fmt: skip
    _figure_again(forecast)
    return [vm["name"] for vm in forecast["vms"] if vm["end_seconds"] is None]


def _figure_again(forecast: dict[str, t.Any]) -> None:
    """How many leave, until when, and E of those that are in a forecast now."""
    ends = [float(vm["end_seconds"]) for vm in forecast["vms"] if vm["end_seconds"] is not None]
    forecast["leaving"] = len(ends)
    forecast["makespan_seconds"] = max(ends, default=0.0)
    horizon = forecast.get("deadline_seconds") or forecast["makespan_seconds"]
    saved = sum(max(0.0, horizon - end) for end in ends)
    forecast["expected_share"] = round(saved / (len(forecast["vms"]) * horizon), 4) if horizon > 0 else None


def forecast_lines(forecast: t.Mapping[str, t.Any]) -> list[str]:
    """A forecast for people: how many, until when, and who would stay, with the reason."""
    within = forecast["deadline_seconds"]
    rates = [rate for rate in forecast["uplinks"].values() if rate]
    lines = [
        f"{forecast['leaving']} of {len(forecast['vms'])} VMs would be out"
        + (f" in {span_words(within)}" if within else "")
        + f", the last after {span_words(forecast['makespan_seconds'])}"
        + (
            f"; the link carries {rate_words(sum(rates))}"
            if rates
            else "; what the link carries is not known"
        )
        + (f"; {forecast['already_out']} are out already" if forecast.get("already_out") else "")
    ]
    if not forecast["vms"] and not forecast.get("already_out"):
        lines.append(f"{forecast['site']}: no VM is protected there, listed for it or runs there")
    for vm in forecast["vms"]:
        if vm["end_seconds"] is None:
            lines.append(f"{vm['name']} would stay: {_why(vm)}")
        elif vm["rung"] != Rung.LIVE.value and vm["stop_seconds"]:
            lines.append(f"{vm['name']} would stop for {vm['stop_seconds']:.0f} s: {_why(vm)}")
    return lines + [str(finding) for finding in forecast["placement"]]


def _why(vm: t.Mapping[str, t.Any]) -> str:
    if vm.get("sentence"):
        return str(vm["sentence"])
    if vm["reason"] in {"does-not-converge", "pauses", "dirties-as-fast-as-sent"}:
        return (
            f"dirties {vm['dirty_bytes_per_second'] / 1e6:.0f} MB/s over a link of "
            f"{rate_words(vm['rate_bytes_per_second'])}"
        )
    return SENTENCES.get(str(vm["reason"]), str(vm["reason"]))


def rounded(value: float | None) -> float | None:
    """A figure as reports keep it."""
    return None if value is None else round(value, 2)


SENTENCES = {
    "does-not-fit-before-deadline": "there was no time for it before the deadline",
    "no-memory-at-destination": "its destination has no memory for it",
    "no-space-at-destination": "the store of its destination has no room for what changed since",
    "does-not-converge": "it dirties memory faster than it is sent, and may not be paused",
    "no-rung-allowed": "nothing that leads out is allowed for it",
    "not-reached-its-turn": "its turn did not come",
    "too-late": "it would not have arrived in time, and gave way to others",
    "unreachable": "its host could not be reached",
    "link-down": "there was no link to its destination",
    "not-heard": "its host gave no answer in time",
}


def would_stay_sentence(name: str, reason: str) -> str:
    """Why a VM would not leave by the plan."""
    return f"VM {name} would stay: {SENTENCES.get(reason, reason)}"
