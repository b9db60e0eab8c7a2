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
from ansible_collections.lifeboat.evacuation.plugins.module_utils._forecast_report import (
    SENTENCES,
    forecast_of,
    rate_words,
    rounded,
    span_words,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._interval import Observation, Orders
from ansible_collections.lifeboat.evacuation.plugins.module_utils._outcomes import (
    KEPT,
    others,
    runs_at,
    whole_report,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._plan import Plan
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Rung, SiteSummary
from ansible_collections.lifeboat.evacuation.plugins.module_utils._verdicts import lag_words

__all__ = ["Recorder", "progress_line", "verdict_line"]

_SHOWN_MOVES = 6
_SHOWN_STEPS = 8
# Samples in a report: at most so many, fewer where they have many pairs, but so many at least.
_MOST_SAMPLES = 1200
_LEAST_SAMPLES = 120
_MOST_FIGURES = 60_000
# What becomes of the guest, by the rung that its move has come to.
_HOW = {Rung.PAUSED: " (stopped)", Rung.RESTART: " (restarts)"}


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
            + f"{megabytes} at {rate_words(move.bytes_per_second)}{end}"
            + (f", lag {lag / 1e6:.1f} MB" if lag and move.phase is Phase.LEAD_IN else "")
        )
    more = f" and {len(moves) - _SHOWN_MOVES} more" if len(moves) > _SHOWN_MOVES else ""
    staying = _staying(controller, seen, names, hosts)
    deadline = "" if seen.deadline_at is None else f"; deadline in {span_words(seen.deadline_at - now)}"
    waiting = len(controller.waiting)
    return (
        f"{len(seen.out)} of {len(site.vms)} out, {len(seen.moves)} under way, {waiting} waiting; "
        f"{rate_words(goodput)}{deadline}"
        + (f" ({trouble})" if trouble else "")
        + ("; " + "; ".join(moves[:_SHOWN_MOVES]) + more if moves else "")
        + (f"; stay: {staying}" if staying else "")
        + again
    )


def _staying(
    controller: Controller, seen: Observation, names: t.Mapping[str, str], hosts: t.Mapping[str, HostState]
) -> str:
    """Who was given up, with what its replica lacks as far as its host said."""
    told = [uuid for uuid in controller.given_up() if uuid not in seen.moves]
    lags = {
        str(vm["uuid"]): vm for host in hosts.values() for vm in (host.status.get("vms", []) if told else ())
    }
    words = [names.get(uuid, uuid) + lag_words(lags.get(uuid, {})) for uuid in told]
    more = f" and {len(words) - _SHOWN_MOVES} more" if len(words) > _SHOWN_MOVES else ""
    return ", ".join(words[:_SHOWN_MOVES]) + more


class Recorder:
    """Collects while the evacuation goes on; nothing of it decides anything."""

    def __init__(
        self, site: SiteSummary, began_at: float, plan: Plan, forecast: t.Mapping[str, t.Any] | None
    ) -> None:
        self.site = site
        self.began_at = began_at
        self.ended_at = began_at
        self.samples: list[dict[str, t.Any]] = []
        self._looks, self._every, self._last_is_spare = -1, 1, False
        self._deadlines: list[tuple[float, float]] = []
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
        self,
        seen: Observation,
        orders: Orders,
        hosts: t.Mapping[str, HostState],
        controller: Controller,
        *,
        between: bool = False,
    ) -> None:
        """Take in an interval; or what was seen ``between`` two looks, which is no sample."""
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
        if between:
            return
        self._count(hosts)
        if seen.deadline_at is not None:
            # The first, by which E is taken, and the last, by which S(D) is.
            self._deadlines[1:] = [(at, seen.deadline_at - seen.now)]
        self._keep(
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

    def _keep(self, sample: dict[str, t.Any]) -> None:
        """One a look; of a long one every second, every fourth, ...: a report is to be read and mailed."""
        self._looks += 1
        if self._looks % self._every:
            # The last one is always there.
            self.samples[-1:] = [sample] if self._last_is_spare else [*self.samples[-1:], sample]
            self._last_is_spare = True
            return
        if self._last_is_spare:
            self.samples.pop()
        self.samples.append(sample)
        self._last_is_spare = False
        most = max(_LEAST_SAMPLES, min(_MOST_SAMPLES, _MOST_FIGURES // max(1, len(self.site.pairs))))
        if len(self.samples) > most:
            self.samples = self.samples[::2]
            self._every *= 2

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
            outcome["started_seconds"] = rounded(self._started_at.get(vm.uuid))
            outcome["out_seconds"] = rounded(self._out_at.get(vm.uuid))
            outcome["forecast_end_seconds"] = planned.get(vm.uuid, {}).get("end_seconds")
            self.outcomes.append(outcome)
        self.outcomes += others(hosts, destinations, self.outcomes, self.only, self.expected, self.may_stay)

    def report(
        self, strategy: str, deadline: str, hosts: t.Mapping[str, HostState], deadline_at: str = ""
    ) -> dict[str, t.Any]:
        """The whole report as JSON; docs/evacuation-report.schema.json describes it."""
        outs = sorted(self._out_at.values())
        makespan = outs[-1] if outs else 0.0
        # Those whom no plan moves count, too, unless they were out before.
        others_told = self.outcomes[len(self.site.vms) :]
        count = len(self.site.vms) + sum(told["verdict"] not in OUT for told in others_told)
        deadlines = [at + left for at, left in self._deadlines]
        horizon = next((at for at in deadlines if at > 0), makespan) if count else 0.0
        expected = sum(max(0.0, horizon - out) for out in outs) / (horizon * count) if horizon > 0 else None
        share = sum(out <= deadlines[-1] for out in outs) / count if deadlines and count else None
        classes: dict[str, float] = {}
        for key, carried in self.carried.items():
            name = key.rsplit(" ", 1)[1]
            classes[name] = classes.get(name, 0.0) + carried
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
                "share_at_deadline": None if share is None else round(share, 4),
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
    return f"VM {name} stays: {SENTENCES.get(reason, reason)}; its replica is what survives"
