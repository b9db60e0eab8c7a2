# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What an evacuation asks before anything moves: who is there, who may stay, what would stand in the way."""

from __future__ import annotations

import contextlib
import time
import typing as t
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from urllib.parse import quote

from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import ProxyError, in_words
from ansible_collections.lifeboat.evacuation.plugins.module_utils._deadline import Watch, passed
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fixed_plan import (
    MOST_VMS,
    at_once,
    fixed_plan,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fleet import (
    HostState,
    Wishes,
    site_summary,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._forecast_report import (
    would_stay_sentence,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._outcomes import (
    Outcome,
    missing,
    others,
    silent,
    whole_report,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._plan import Plan, make_plan
from ansible_collections.lifeboat.evacuation.plugins.module_utils._plan_findings import (
    placement_findings,
    site_findings,
    unknown_leaders,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._schedule import lines
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import (
    Finding,
    PairSummary,
    Rung,
    SiteSummary,
    VmSummary,
)

# How often a rate that is none yet is measured, five seconds each.
_MEASUREMENTS = 3
# As the proxies judge a single link (control/link_measurement.py).
_STEADY_SHARE = 0.25
_STEADY_QUEUE_SECONDS = 0.04


class Proxy(t.Protocol):
    """One host's proxy, however it is reached."""

    @property
    def name(self) -> str:
        """The inventory's name of the host."""

    def request(
        self,
        method: str,
        path: str,
        body: t.Mapping[str, object] | None = None,
        timeout_seconds: float = 30.0,
    ) -> t.Any:
        """The JSON answer. Raises ProxyError."""

    def close(self) -> None:
        """Hang up."""


def ask(
    proxy: Proxy,
    method: str,
    path: str,
    body: t.Mapping[str, object] | None = None,
    timeout_seconds: float = 30.0,
) -> t.Any:
    """The JSON answer. Raises ProxyError whatever went wrong: one host's trouble is not all others'."""
    try:
        return proxy.request(method, path, body, timeout_seconds)
    except ProxyError:
        raise
    except Exception as error:
        raise ProxyError("error", f"{proxy.name}: {error!r}") from error


@dataclass(frozen=True)
class Wanted:
    """What the operator asked for."""

    site: str
    vms: tuple[str, ...] | None
    strategy: str
    progress_seconds: float
    wishes: Wishes
    uplink_bytes_per_second: float | None = None
    forecast: t.Mapping[str, t.Any] | None = None
    expected: t.Mapping[str, t.Sequence[str]] = field(default_factory=dict)
    leave_behind: tuple[str, ...] = ()
    bandwidth_bytes_per_second: float | None = None
    # Per host what holds for those of its VMs of whom nothing else is said.
    usual: t.Mapping[str, t.Mapping[str, t.Any]] = field(default_factory=dict)
    # Names of all VMs that the inventory lists anywhere; asked for only where it matters.
    listed: t.Callable[[], t.Collection[str]] = tuple
    # Who asks, for another that comes second; and whether this one takes over from one that was first.
    who: str = "somebody"
    take_over: bool = False
    # For how long VMs are looked at; the longer, the nearer a forecast of what their memories come to.
    workload_seconds: int = 1


# How a destination is reached that only sources name: its proxy, and which of its variables are not followed.
Find = t.Callable[[str], tuple[Proxy | None, list[Finding]]]


def nobody(_name: str) -> tuple[Proxy | None, list[Finding]]:
    """No destination is found beside those that are given."""
    return None, []


class Refused(Exception):
    """Nothing was started: everything that is wrong, at once."""

    def __init__(self, findings: t.Sequence[Finding]) -> None:
        self.findings = list(findings)
        super().__init__("; ".join(str(finding) for finding in findings))


class Surveyor:
    """Asks proxies that are given, with a clock and a way to say things that are given."""

    def __init__(
        self,
        wanted: Wanted,
        sources: t.Sequence[Proxy],
        destinations: t.Mapping[str, Proxy],
        deadline: Watch,
        say: t.Callable[[str], None],
        clock: t.Callable[[], float] = time.time,
        find: Find = nobody,
    ) -> None:
        self.wanted = wanted
        self._find = find
        self._sources = {proxy.name: proxy for proxy in sources}
        self._destinations = dict(destinations)
        self._deadline = deadline
        self._say = say
        self._clock = clock
        self._pool = ThreadPoolExecutor(max_workers=max(8, min(64, 2 * len(self._sources))))
        self.hosts = {name: HostState(name) for name in self._sources}
        self.there = {name: HostState(name) for name in destinations}

    def survey(self, *, pick_up: bool = False) -> SiteSummary:
        """Ask all proxies, sources and destinations. Raises Refused with everything that is wrong.

        ``pick_up``: that the deadline has passed is nothing wrong where VMs are under way, whose end is to be
        told.
        """
        self._ask_all()
        findings = self._ask_whom_sources_name()
        now = self._clock()
        deadline_at = self._deadline.now(now)
        if self._deadline.deadline is not None and deadline_at is None:
            way_out = "give the deadline as a time, or mend the UPS"
            findings.append(Finding("deadline", self._deadline.trouble or "is not known", way_out))
        elif deadline_at is not None and deadline_at <= now and not (pick_up and self._some_are_under_way()):
            text = self._deadline.deadline.text if self._deadline.deadline else ""
            findings += passed(self._deadline.deadline, now) or [
                Finding(f"deadline {text!r}", "has passed, what is held in reserve counted",
                        "name a later one, or less reserve")
            ]  # fmt: skip
        site = site_summary(
            self.wanted.site,
            list(self.hosts.values()),
            self.there,
            self.wanted.wishes,
            self.wanted.vms,
            self.wanted.uplink_bytes_per_second,
            self.wanted.usual,
        )
        findings += site_findings(site)
        # A hypervisor that is out of reach may have it: that keeps no other VM from getting out.
        if not silent(self.hosts):
            findings += unknown_leaders(site, self._known_names, self.wanted.listed)
            findings += [
                Finding(
                    name,
                    f"neither protected on nor evacuated from any hypervisor of {self.wanted.site}",
                    "protect it first, or take it out of evacuate_vms",
                )
                for name in missing(self.others(told_of(site)))
            ]
        if findings:
            raise Refused(findings)
        limit = self.wanted.bandwidth_bytes_per_second
        if limit is None:
            return site
        return replace(site, pairs=tuple(
            replace(pair, stream_bytes_per_second=min(limit, pair.stream_bytes_per_second))
            for pair in site.pairs
        ))  # fmt: skip

    def others(self, told: t.Sequence[Outcome], *, check_mode: bool = False) -> list[Outcome]:
        """Outcomes of everybody who is not in ``told``."""
        wanted = self.wanted
        return others(
            self.hosts,
            self.there,
            told,
            wanted.vms,
            wanted.expected,
            wanted.leave_behind,
            check_mode=check_mode,
        )

    def would(self, plan: Plan, wrong: t.Mapping[str, str]) -> dict[str, t.Any]:
        """The report of a run in check mode, by a plan and what preflights found."""
        now = self._clock()
        outcomes: list[Outcome] = []
        for planned in plan.vms:
            vm = planned.vm
            jobs = [job for job in self.hosts[vm.source].jobs if job["vm"] == vm.uuid]
            outcome: Outcome = {
                "name": vm.name,
                "vm": vm.uuid,
                "host": vm.source,
                "peer": vm.destination,
                "forecast_end_seconds": planned.end_seconds,
            }
            if jobs and jobs[-1].get("step") == "undecided" and not jobs[-1].get("ended"):
                # It waits for somebody who decides, and would at the end of a run.
                outcome |= {key: jobs[-1].get(key) for key in ("id", "step", "sentence")}
                outcome |= {"verdict": "would-fail", "cause": "undecided"}
            elif jobs and not jobs[-1].get("ended"):
                outcome |= {"verdict": "under-way", "id": jobs[-1]["id"], "step": jobs[-1]["step"]}
            elif vm.uuid in wrong:
                outcome |= {"verdict": "would-fail", "cause": "preflight", "sentence": wrong[vm.uuid]}
            elif planned.end_seconds is None:
                sentence = would_stay_sentence(vm.name, planned.reason)
                outcome |= {"verdict": "would-fail", "cause": planned.reason, "sentence": sentence}
            else:
                outcome |= {"verdict": "would-start"}
            outcomes.append(outcome)
        outcomes += self.others(outcomes, check_mode=True)
        return whole_report(self.wanted.site, self.hosts, outcomes, now, now, check_mode=True)

    def measured(self, site: SiteSummary, seconds: float = 5.0) -> SiteSummary:
        """The site with its uplinks measured: all pairs at once, for pairs mostly share them.

        Again where a rate was none yet (its halves differ, or a queue is left), a bounded number of times. An
        uplink of which a pair did not answer is what the others got of it, and that is said.
        """
        rates: dict[str, float] = {}
        wanted = {pair.uplink for pair in site.pairs}
        for attempt in range(_MEASUREMENTS):
            told = self._measure([pair for pair in site.pairs if pair.uplink in wanted], seconds)
            for uplink in sorted(wanted):
                answers = [
                    told[pair.key] for pair in site.pairs if pair.uplink == uplink and pair.key in told
                ]
                if not answers:
                    wanted.discard(uplink)
                    continue
                rates[uplink] = sum(float(answer["bytes_per_second"]) for answer in answers)
                trouble = _unsteady(answers)
                if not trouble:
                    wanted.discard(uplink)
                    continue
                last = attempt == _MEASUREMENTS - 1
                self._say(f"uplink {uplink}: {rates[uplink] * 8 / 1e6:.1f} Mbit/s measured, {trouble}; "
                          + ("do not rely on it: give evacuate_uplink where it is known" if last else
                             "it is measured again"))  # fmt: skip
            if not wanted:
                break
        return replace(site, uplinks={**site.uplinks, **rates})

    def _measure(
        self, pairs: t.Sequence[PairSummary], seconds: float
    ) -> dict[tuple[str, str], t.Mapping[str, t.Any]]:
        def measure(source: str, peer: str) -> t.Mapping[str, t.Any]:
            path = f"/v1/links/{quote(peer, safe='')}/measure"
            return dict(ask(self._sources[source], "POST", path, {"seconds": seconds}, 60.0))

        futures = {pair.key: self._pool.submit(measure, pair.source, pair.destination) for pair in pairs}
        told = {}
        for (source, peer), future in futures.items():
            try:
                told[source, peer] = future.result()
            except ProxyError as error:
                self._say(f"{source}: the link to {peer} was not measured, what the others got of the line "
                          f"counts: {error.message}")  # fmt: skip
        return told

    def preflights(self, site: SiteSummary) -> dict[str, str]:
        """What stands in the way of each VM by its proxy's own preflight, by UUID; the rest is said."""

        def judge(vm: VmSummary) -> tuple[str, str]:
            live = {Rung.LIVE, Rung.PAUSED} & set(vm.rungs)
            body = {"vm": vm.uuid, "mode": "live" if live else "restart"}
            told = ask(self._sources[vm.source], "POST", "/v1/evacuations/check", body, 60.0)
            stops = [finding for finding in told["findings"] if finding.get("stops", True)]
            others = [finding for finding in told["findings"] if finding not in stops]
            return in_words(stops), in_words(others)

        futures = {vm.uuid: self._pool.submit(judge, vm) for vm in site.vms}
        wrong: dict[str, str] = {}
        for uuid, future in futures.items():
            try:
                sentence, aside = future.result()
            except ProxyError as error:
                sentence, aside = error.message, ""
            if sentence:
                wrong[uuid] = sentence
            if aside:
                self._say(f"{aside}; it would go all the same")
        return wrong

    def forecast(self, site: SiteSummary) -> tuple[Plan, list[Finding]]:
        """The plan for now, and what would not fit."""
        now = self._clock()
        at = self._deadline.now(now)
        left, guessed = None if at is None else at - now, site.guessed()
        plan = make_plan(guessed, left, overlap=self.wanted.strategy != "sequential")
        count = at_once(self.wanted.strategy, guessed)
        if count is not None and len(guessed.vms) <= MOST_VMS:
            plan = fixed_plan(plan, guessed, lines(guessed), count)
        return plan, placement_findings(site)

    def close(self) -> None:
        """Hang up everywhere. What is under way goes on."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for proxy in (*self._sources.values(), *self._destinations.values()):
            proxy.close()

    def _ask_all(self) -> None:
        futures = [
            self._pool.submit(self._ask_source, proxy, self.hosts[name])
            for name, proxy in self._sources.items()
        ]
        futures += [
            self._pool.submit(self._ask_destination, proxy, self.there[name])
            for name, proxy in self._destinations.items()
        ]
        for future in futures:
            future.result()

    def _known_names(self) -> set[str]:
        """Names and UUIDs of all VMs that any host has, had, or has a replica of."""
        told: set[str] = set()
        for host in (*self.hosts.values(), *self.there.values()):
            of_host = (*host.status.get("vms", []), *(host.unprotected or ()), *(host.domains or ()))
            told |= {str(vm[key]) for vm in of_host for key in ("name", "uuid")}
            gone = (*host.status.get("evacuations", []), *host.status.get("arrivals", []))
            told |= {str(job[key]) for job in gone for key in ("name", "vm")}
            told |= {
                str(vm[key]) for vm in host.status.get("replicas", []) for key in ("name", "vm") if key in vm
            }
        return told

    def _is_wanted(self, item: t.Mapping[str, t.Any]) -> bool:
        """Whether it is of a VM that was asked for; jobs tell a VM's UUID as `vm`, protections as `uuid`."""
        only = self.wanted.vms
        return only is None or bool({item.get("name"), item.get("vm"), item.get("uuid")} & set(only))

    def _some_are_under_way(self) -> bool:
        return any(
            not job.get("ended") and self._is_wanted(job) for host in self.hosts.values() for job in host.jobs
        )

    def _ask_whom_sources_name(self) -> list[Finding]:
        """Placed by memory and space a replica may be at a peer that the inventory names for no VM."""
        named = {
            str(item["peer"])
            for host in self.hosts.values()
            for item in (
                *host.status.get("vms", []),
                *(job for job in host.jobs if not job.get("ended")),
            )
            if item.get("peer") and self._is_wanted(item)
        }
        findings: list[Finding] = []
        asked = []
        for name in sorted(named - set(self._destinations)):
            proxy, wrong = self._find(name)
            findings += wrong
            if proxy is not None:
                self._destinations[name] = proxy
                self.there[name] = HostState(name)
                asked.append(self._pool.submit(self._ask_destination, proxy, self.there[name]))
        for future in asked:
            future.result()
        return findings

    def _ask_source(self, proxy: Proxy, state: HostState) -> None:
        try:
            state.status = ask(proxy, "GET", "/v1/status")
            if self.wanted.vms is None:
                # All of a host means those as well that nobody thought of.
                state.unprotected = ask(proxy, "GET", "/v1/vms").get("unprotected", [])
            state.error = ""
        except ProxyError as error:
            state.error, state.status = error.message, {}
            return
        known = {
            vm[key]
            for vm in (*state.status.get("vms", []), *(state.unprotected or []))
            for key in ("name", "uuid")
        }
        # One whose job is over may be here all the same: it stayed, or came home and was unprotected since.
        known |= {job[key] for job in state.jobs if not job.get("ended") for key in ("name", "vm")}
        if not known.issuperset([*self.wanted.expected.get(proxy.name, ()), *(self.wanted.vms or ())]):
            # It may be shut off. A proxy of an older version cannot tell that.
            try:
                state.domains = ask(proxy, "GET", "/v1/hypervisor").get("domains", [])
            except ProxyError as error:
                state.domains = [] if error.cause == "not-found" else None
        self._ask_workload(proxy, state)

    def _ask_destination(self, proxy: Proxy, state: HostState) -> None:
        try:
            state.status = ask(proxy, "GET", "/v1/status")
        except ProxyError as error:
            state.error = error.message
            return
        self._ask_workload(proxy, state)

    def _ask_workload(self, proxy: Proxy, state: HostState) -> None:
        # What a proxy of an older version cannot tell is not known, and no reason to leave VMs behind.
        with contextlib.suppress(ProxyError):
            state.workload = ask(proxy, "POST", "/v1/workload", {"seconds": self.wanted.workload_seconds})


def told_of(site: SiteSummary) -> list[Outcome]:
    """The VMs that are planned with, as those of whom an outcome is told already."""
    return [{"name": vm.name, "vm": vm.uuid, "host": vm.source} for vm in site.vms]


def _unsteady(answers: t.Sequence[t.Mapping[str, t.Any]]) -> str:
    """What is wrong with an uplink's measurement, "" for nothing: pairs share it, so their sum is judged."""
    queue = max(float(answer.get("queue_seconds") or 0.0) for answer in answers)
    if queue > _STEADY_QUEUE_SECONDS:
        return f"with a queue of {queue * 1000:.0f} ms before it"
    halves = [answer.get("halves_bytes_per_second") or () for answer in answers]
    if not all(len(both) == 2 for both in halves):
        return ""  # a proxy of an older version
    slow, fast = sorted(sum(float(both[number]) for both in halves) for number in (0, 1))
    if fast - slow > _STEADY_SHARE * fast:
        return f"from {slow * 8 / 1e6:.1f} to {fast * 8 / 1e6:.1f} Mbit/s within it"
    return ""
