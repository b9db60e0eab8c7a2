# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is told of a coordinated evacuation: lines while it goes on, and everything for its report."""

from __future__ import annotations

import typing as t

from ansible_collections.lifeboat.evacuation.plugins.module_utils._batch import OUT, verdict_line, wire_bytes
from ansible_collections.lifeboat.evacuation.plugins.module_utils._controller import (
    Controller,
    remaining_seconds,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import Phase
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fleet import HostState
from ansible_collections.lifeboat.evacuation.plugins.module_utils._interval import Observation, Orders
from ansible_collections.lifeboat.evacuation.plugins.module_utils._outcomes import (
    KEPT,
    iso,
    others,
    runs_at,
    whole_report,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._plan import Plan
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Rung, SiteSummary

__all__ = ["Recorder", "forecast_lines", "forecast_of", "mark_preflights", "progress_line", "verdict_line"]

_SHOWN_MOVES = 6
_SHOWN_STEPS = 8
# What becomes of the guest, by the rung that its move has come to.
_HOW = {Rung.PAUSED: " (stopped)", Rung.RESTART: " (restarts)"}


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second * 8 / 1e6:.1f} Mbit/s"


def _span(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes}:{rest:02d}"


def progress_line(
    site: SiteSummary,
    seen: Observation,
    controller: Controller,
    now: float,
    hosts: t.Mapping[str, HostState],
    trouble: str = "",
    again: str = "",
) -> str:
    """One line on everything: who moves, how far, how fast, until when, with what lag.

    ``again``: how to go on with it, should whoever tells this be killed.
    """
    ahead = {str(job["vm"]): job.get("outlook") or {} for host in hosts.values() for job in host.jobs}
    names = {vm.uuid: vm.name for vm in site.vms}
    goodput = sum(view.goodput_bytes_per_second for view in seen.pairs.values())
    trips = {vm.uuid: site.pair(vm).round_trip_seconds for vm in site.vms if vm.uuid in seen.moves}
    moves = []
    for uuid, move in sorted(seen.moves.items(), key=lambda item: -item[1].bytes_per_second):
        left = remaining_seconds(move, trips.get(uuid, 0.0))
        end = "" if left is None else f", {left:.0f} s left"
        how = _HOW.get(move.rung, "")
        megabytes = f", {move.remaining_bytes / 1e6:.0f} MB" if move.phase is Phase.BULK else ""
        share, lag = ahead.get(uuid, {}).get("share"), ahead.get(uuid, {}).get("lag_bytes")
        moves.append(
            f"{names.get(uuid, uuid)}{how} {move.phase.value}"
            + ("" if share is None else f" {share * 100:.0f} %")
            + f"{megabytes} at {_rate(move.bytes_per_second)}{end}"
            + (f", lag {lag / 1e6:.1f} MB" if lag and move.phase is Phase.LEAD_IN else "")
        )
    more = f" and {len(moves) - _SHOWN_MOVES} more" if len(moves) > _SHOWN_MOVES else ""
    deadline = "" if seen.deadline_at is None else f"; deadline in {_span(seen.deadline_at - now)}"
    waiting = len(controller.waiting)
    return (
        f"{len(seen.out)} of {len(site.vms)} out, {len(seen.moves)} under way, {waiting} waiting; "
        f"{_rate(goodput)}{deadline}"
        + (f" ({trouble})" if trouble else "")
        + ("; " + "; ".join(moves[:_SHOWN_MOVES]) + more if moves else "")
        + again
    )


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
                "start_seconds": _rounded(planned.start_seconds),
                "end_seconds": _rounded(planned.end_seconds),
                "wire_bytes": round(planned.forecast.wire_bytes),
                "stop_seconds": _rounded(planned.forecast.stop_seconds),
                "dirty_bytes_per_second": round(planned.vm.dirty_bytes_per_second),
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
    if forecast["expected_share"] is not None and left:
        known = len(forecast["vms"])
        forecast["expected_share"] = round(forecast["expected_share"] * known / (known + len(left)), 4)
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
            "rate_bytes_per_second": 0,
            "lag_bytes": 0,
        }
        for outcome in left
    ]


def mark_preflights(forecast: dict[str, t.Any], wrong: t.Mapping[str, str]) -> list[str]:
    """Take those that a preflight refuses out of a forecast; names of all that would stay."""
    for vm in forecast["vms"]:
        if vm["vm"] in wrong:
            vm.update(end_seconds=None, start_seconds=None, rung=Rung.STAY.value, reason="preflight",
                      sentence=wrong[vm["vm"]])  # fmt: skip
    forecast["leaving"] = sum(vm["end_seconds"] is not None for vm in forecast["vms"])
    return [vm["name"] for vm in forecast["vms"] if vm["end_seconds"] is None]


def forecast_lines(forecast: t.Mapping[str, t.Any]) -> list[str]:
    """A forecast for people: how many, until when, and who would stay, with the reason."""
    within = forecast["deadline_seconds"]
    rates = [rate for rate in forecast["uplinks"].values() if rate]
    lines = [
        f"{forecast['leaving']} of {len(forecast['vms'])} VMs would be out"
        + (f" in {_span(within)}" if within else "")
        + f", the last after {_span(forecast['makespan_seconds'])}"
        + (f"; the link carries {_rate(sum(rates))}" if rates else "; what the link carries is not known")
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
            f"{_rate(vm['rate_bytes_per_second'])}"
        )
    return _SENTENCES.get(str(vm["reason"]), str(vm["reason"]))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


class Recorder:
    """Collects while the evacuation goes on; nothing of it decides anything."""

    def __init__(
        self, site: SiteSummary, began_at: float, plan: Plan, forecast: t.Mapping[str, t.Any] | None
    ) -> None:
        self.site = site
        self.began_at = began_at
        self.ended_at = began_at
        self.samples: list[dict[str, t.Any]] = []
        self.decisions: list[dict[str, t.Any]] = []
        self.outcomes: list[dict[str, t.Any]] = []
        # Names by host as the inventory has them, for hosts that cannot be asked; and what was asked for.
        self.expected: t.Mapping[str, t.Sequence[str]] = {}
        self.only: t.Collection[str] | None = None
        self.may_stay: t.Sequence[str] = ()
        self.forecast = dict(forecast) if forecast else forecast_of(site, plan, began_at)
        self.carried: dict[str, float] = {}
        self._carried_first: dict[str, float] = {}
        self._names = {vm.uuid: vm.name for vm in site.vms}
        self._steps: dict[str, str] = {}
        self._rungs: dict[str, str] = {}
        self._out_at: dict[str, float] = {}
        self._started_at: dict[str, float] = {}

    def name(self, uuid: str) -> str:
        """A VM's name."""
        return self._names.get(uuid, uuid)

    def observe(
        self, seen: Observation, orders: Orders, hosts: t.Mapping[str, HostState], controller: Controller
    ) -> None:
        """Take in an interval."""
        at = seen.now - self.began_at
        for uuid in seen.out:
            if uuid in self._names:
                self._out_at.setdefault(uuid, at)
        for uuid, rung in orders.starts:
            self._started_at[uuid] = at
            self._rungs[uuid] = rung.value
        for uuid, fall in orders.falls.items():
            self._rungs[uuid] = fall.rung.value
        for uuid in seen.moves:
            self._started_at.setdefault(uuid, at)
        self.decisions += [
            {"at_seconds": round(at, 2), "vm": self.name(told.vm), "what": told.what, "reason": told.reason,
             "sentence": told.sentence}
            for told in orders.decisions
        ]  # fmt: skip
        self._count(hosts)
        self.samples.append(
            {
                "at_seconds": round(at, 2),
                "goodput_bytes_per_second": {
                    " ".join(pair): round(view.goodput_bytes_per_second)
                    for pair, view in seen.pairs.items()
                    if pair[0] in hosts
                },
                "capacity_bytes_per_second": {
                    name: round(gate.capacity or 0.0) or None for name, gate in controller.gates.items()
                },
                "out": len(seen.out),
                "under_way": len(seen.moves),
                "waiting": len(controller.waiting),
                "deadline_in_seconds": None
                if seen.deadline_at is None
                else round(seen.deadline_at - seen.now, 1),
            }
        )

    def _count(self, hosts: t.Mapping[str, HostState]) -> None:
        for host in hosts.values():
            for link in host.status.get("links", []):
                for name, figures in ((link.get("counters") or {}).get("classes") or {}).items():
                    key = f"{host.name} {link['peer']} {name}"
                    sent = float(figures.get("sent_wire_bytes") or 0.0)
                    first = self._carried_first.setdefault(key, sent)
                    # A proxy that was restarted counts from nothing again.
                    self.carried[key] = sent - first if sent >= first else sent

    def news(self, hosts: t.Mapping[str, HostState], begun: t.Collection[str]) -> list[str]:
        """What changed since the last look: a verdict has its line, steps of many VMs share one."""
        verdicts: list[str] = []
        steps: list[str] = []
        for host in hosts.values():
            for job in host.jobs:
                if job["id"] not in begun:
                    continue
                step = str(job.get("verdict") or job.get("step"))
                if self._steps.get(str(job["id"])) == step:
                    continue
                self._steps[str(job["id"])] = step
                if job.get("verdict"):
                    verdicts.append(verdict_line(job))
                else:
                    steps.append("{}: {}".format(job["name"], step))
        more = f"; and {len(steps) - _SHOWN_STEPS} more" if len(steps) > _SHOWN_STEPS else ""
        return verdicts + (["; ".join(steps[:_SHOWN_STEPS]) + more] if steps else [])

    def conclude(
        self,
        hosts: t.Mapping[str, HostState],
        begun: t.Mapping[str, str],
        refusals: t.Mapping[str, t.Mapping[str, t.Any]],
        controller: Controller,
        now: float,
        destinations: t.Mapping[str, HostState],
        unanswered: t.Collection[str] = (),
    ) -> None:
        """One outcome for every VM, whatever became of it.

        ``unanswered`` were asked to start, and no answer came.
        """
        self.ended_at = now
        planned = {item["vm"]: item for item in self.forecast.get("vms", [])}
        for vm in self.site.vms:
            host = hosts.get(vm.source)
            lost = host is not None and host.lost
            jobs = [] if host is None else [job for job in host.jobs if job["vm"] == vm.uuid]
            outcome: dict[str, t.Any] = {
                "name": vm.name,
                "vm": vm.uuid,
                "host": vm.source,
                "peer": vm.destination,
            }
            job = jobs[-1] if jobs else None
            ours = job is not None and (begun.get(vm.uuid) == job["id"] or vm.uuid in self._out_at)
            if job is not None and ours:
                outcome |= {key: job.get(key) for key in KEPT}
                outcome["wire_bytes"] = wire_bytes(job)
                outcome["verdict"] = job.get("verdict") or (
                    "undecided" if job.get("step") == "undecided" or not job.get("ended") else "failed"
                )
                there = None
                if not job.get("ended") and lost:
                    there = runs_at(vm.uuid, destinations)
                if there is not None:
                    outcome["verdict"] = "evacuated"
                    outcome["sentence"] = f"{there} says that it runs there; {vm.source} is out of reach"
                elif not job.get("ended") and not outcome.get("sentence"):
                    outcome["sentence"] = (
                        f"it was at step {job.get('step')} when {vm.source} was last heard of"
                    )
                if outcome["verdict"] == "evacuated" and vm.uuid not in begun:
                    outcome["verdict"] = "already-there"
            elif vm.uuid in refusals:
                # Never begun: it runs where it was. `failed` is what was begun and could not be finished.
                outcome |= {"verdict": "stayed", **refusals[vm.uuid]}
            else:
                reason = "unreachable" if lost else controller.waits_because(vm.uuid)
                outcome |= {"verdict": "stayed", "cause": reason, "sentence": _stays(vm.name, reason)}
                if lost and vm.uuid in unanswered:
                    outcome |= _unknown(vm.name, vm.source, runs_at(vm.uuid, destinations))
            if host is not None and outcome["verdict"] not in OUT:
                outcome |= _lag(host, vm.uuid)
            # Of one that was found under way its proxy knows.
            outcome["rung"] = self._rungs.get(vm.uuid) or (job or {}).get("rung")
            outcome["started_seconds"] = _rounded(self._started_at.get(vm.uuid))
            outcome["out_seconds"] = _rounded(self._out_at.get(vm.uuid))
            outcome["forecast_end_seconds"] = planned.get(vm.uuid, {}).get("end_seconds")
            self.outcomes.append(outcome)
        self.outcomes += others(hosts, destinations, self.outcomes, self.only, self.expected, self.may_stay)

    def report(
        self, strategy: str, deadline: str, hosts: t.Mapping[str, HostState], deadline_at: str = ""
    ) -> dict[str, t.Any]:
        """The whole report as JSON; docs/evacuation-report.schema.json describes it."""
        outs = sorted(self._out_at.values())
        makespan = outs[-1] if outs else 0.0
        left = [
            sample["deadline_in_seconds"]
            for sample in self.samples
            if sample["deadline_in_seconds"] is not None
        ]
        horizon = ((left[0] if left else None) or makespan) if self.site.vms else 0.0
        expected = (
            sum(max(0.0, horizon - out) for out in outs) / (horizon * len(self.site.vms)) if horizon else None
        )
        classes: dict[str, float] = {}
        for key, count in self.carried.items():
            name = key.rsplit(" ", 1)[1]
            classes[name] = classes.get(name, 0.0) + count
        return {
            **whole_report(
                self.site.site, hosts, self.outcomes, self.began_at, self.ended_at, check_mode=False
            ),
            "coordination": {
                "strategy": strategy,
                "deadline": deadline or None,
                "deadline_at": deadline_at or None,
                "seconds": round(self.ended_at - self.began_at, 2),
                "makespan_seconds": round(makespan, 2),
                "horizon_seconds": round(horizon, 2) if horizon else None,
                "expected_share": None if expected is None else round(expected, 4),
                "bytes_by_class": {name: round(count) for name, count in sorted(classes.items())},
                "forecast": self.forecast,
                "samples": self.samples,
                "decisions": self.decisions,
            },
        }


def _lag(host: HostState, uuid: str) -> dict[str, t.Any]:
    for vm in host.status.get("vms", []):
        if vm["uuid"] == uuid:
            return {key: vm.get(key) for key in ("lag_bytes", "lag_seconds", "generation")}
    return {}


_SENTENCES = {
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


def _unknown(name: str, host: str, there: str | None) -> dict[str, str]:
    """What is told of a VM that was asked to leave a host that never said whether it did."""
    if there is not None:
        sentence = f"{there} says that it runs there; {host} is out of reach"
        return {"verdict": "evacuated", "cause": "unreachable", "sentence": sentence}
    sentence = (
        f"VM {name}: {host} was asked to move it and gave no answer, so it may be on its way; run the same "
        "command again"
    )
    return {"verdict": "undecided", "cause": "unreachable", "sentence": sentence}


def _stays(name: str, reason: str) -> str:
    return f"VM {name} stays: {_SENTENCES.get(reason, reason)}; its replica is what survives"


def would_stay_sentence(name: str, reason: str) -> str:
    """Why a VM would not leave by the plan."""
    return f"VM {name} would stay: {_SENTENCES.get(reason, reason)}"
