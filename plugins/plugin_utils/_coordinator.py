# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""One evacuation of one site: looks at all proxies, lets the controller decide, asks for what it decided.

It holds no state that matters. Killed at any line, the jobs go on; begun again it finds them and goes on.
"""

from __future__ import annotations

import threading
import time
import typing as t
from dataclasses import replace

from ansible_collections.lifeboat.evacuation.plugins.module_utils._batch import OUT
from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import (
    ProxyError,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._controller import Controller
from ansible_collections.lifeboat.evacuation.plugins.module_utils._coordination_report import (
    Recorder,
    progress_line,
    verdict_line,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._deadline import Watch
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import Phase
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fleet import (
    PASSING,
    Eyes,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._forecast_report import line_known
from ansible_collections.lifeboat.evacuation.plugins.module_utils._glance import over_first
from ansible_collections.lifeboat.evacuation.plugins.module_utils._interval import (
    Observation,
    Orders,
    interval_seconds,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._outcomes import silent
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import (
    Finding,
    Rung,
    SiteSummary,
    VmSummary,
)
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._leases import TakenOver, findings_of
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._lookout import Lookout
from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._surveyor import (
    Find,
    Proxy,
    Refused,
    Wanted,
    nobody,
    told_of,
)

__all__ = ["Abandoned", "Coordinator", "Proxy", "Refused", "TakenOver", "Wanted", "told_of"]

# What proxies are asked for takes them milliseconds: nobody waits longer for it within an interval.
_ERRANDS_SECONDS = 1.0
# So long a start is asked for again that its proxy refuses for what may pass: libvirt restarts there.
_REFUSED_PATIENCE_SECONDS = 60.0
# How often those are asked after whose moves are nearly over, between two looks.
_GLANCE_SECONDS = 0.3
# With nothing under way and nothing that may start, after so many looks it is over.
_IDLE_LOOKS = 4
_UNREACHED_PATIENCE_SECONDS = 300.0
# And so long once the deadline has passed: its power is gone, and people wait for the verdicts.
_AFTER_DEADLINE_SECONDS = 60.0
# Where all others are done, so long is waited for a link that is down.
_LINK_PATIENCE_SECONDS = 60.0
# What a start by a rung means for the guest, as it is said.
_HOW = {
    Rung.LIVE: "",
    Rung.PAUSED: ", its guest will stop for its memory to cross once",
    Rung.RESTART: ", by restart",
}


class Abandoned(Exception):
    """Whoever began this is gone: another may be going on with it, and two would be in each other's way."""


class Coordinator(Lookout):
    """Works on proxies that are given, with a clock and a way to say things that are given."""

    def __init__(
        self,
        wanted: Wanted,
        sources: t.Sequence[Proxy],
        destinations: t.Mapping[str, Proxy],
        deadline: Watch,
        say: t.Callable[[str], None],
        clock: t.Callable[[], float] = time.time,
        sleep: t.Callable[[float], None] = time.sleep,
        abandoned: t.Callable[[], bool] = lambda: False,
        find: Find = nobody,
    ) -> None:
        super().__init__(wanted, sources, destinations, deadline, say, clock, sleep, find)
        self._abandoned = abandoned
        # Asked to start: no answer yet; and those whose answer was lost.
        self._starting: set[str] = set()
        self._unanswered: set[str] = set()
        # The newest job that was known of each when it was last asked to start, "" for none.
        self._job_before: dict[str, str] = {}
        # Jobs that were under way at the first look were begun before; those that appear later, beside us.
        self._looked = False
        self._refusals: dict[str, dict[str, t.Any]] = {}
        # Refused for what may pass: since when, and what was said last.
        self._put_off: dict[str, tuple[float, dict[str, t.Any]]] = {}
        # By VM: jobs that are to be cancelled, of which no answer came.
        self._to_cancel: dict[str, str] = {}
        self._down_since: dict[tuple[str, str], float] = {}
        self.changed = False

    @property
    def _again(self) -> str:
        """How this is gone on with should it end, for the lines that people see last."""
        deadline = self._deadline.deadline
        how = deadline.how_again if deadline is not None else ""
        return "; if this ends, jobs go on: run the same command again" + (f" with {how}" if how else "")

    # -- moving

    def led_by_others(self) -> list[Finding]:
        """Who coordinates hosts of this site by what they said at the survey; findings for a second one."""
        holders = {
            name: host.status["coordinator"]
            for name, host in self.hosts.items()
            if host.status.get("coordinator")
        }
        return findings_of(self.wanted.site, holders, self._clock())

    def close(self) -> None:
        """Give the leases back and hang up everywhere. What is under way goes on."""
        self._leases.give_back()
        super().close()

    def run(self, site: SiteSummary) -> Recorder:
        """Evacuate; what became of everything is in the recorder that is returned.

        Raises Refused where another coordinator is at work, TakenOver by one, Abandoned.
        """
        interval = interval_seconds(pair.round_trip_seconds for pair in site.pairs)
        answering = [name for name, host in self.hosts.items() if not host.error]
        findings = self._leases.claim(answering, interval, take_over=self.wanted.take_over)
        if findings:
            raise Refused(findings)
        began = self._clock()
        # A UPS that does not answer takes seconds to say so, and all hosts would wait.
        self._deadline.aside = lambda ask: threading.Thread(target=ask, daemon=True).start()
        plan, _placement = self.forecast(site)
        recorder = Recorder(site, began, plan, self.wanted.forecast)
        recorder.expected, recorder.only = self.wanted.expected, self.wanted.vms
        recorder.may_stay = self.wanted.leave_behind
        controller = Controller(site, self.wanted.strategy)
        eyes = Eyes()
        self._silent = frozenset(silent(self.hosts))
        self._adopt(site)
        said_at, idle = began, 0
        guess = "" if line_known(site) else ", a guess: nobody knows yet what the line carries"
        self._say(f"{len(site.vms)} VMs to leave {self.wanted.site} by strategy {self.wanted.strategy}; "
                  f"forecast {plan.makespan_seconds:.0f} s{guess}{self._again}")  # fmt: skip
        # Of those that are under way their proxies tell, whatever a plan thinks of them.
        for planned in plan.vms:
            if planned.end_seconds is None and planned.vm.uuid not in self._begun:
                self._say(f"{planned.vm.name}: would stay ({planned.reason})")
        besides = self.others(told_of(site))
        for outcome in besides:
            self._say(verdict_line(outcome))
        while True:
            if self._abandoned():
                raise Abandoned
            looked_at = self._clock()
            self._look(interval)
            if self._clock() - looked_at > self._leases.seconds:
                # This process stood still for so long that another may have become the coordinator.
                continue
            self._errands.settle(0.0)
            self._adopt(site)
            self._looked = True
            seen, orders = self._decide(controller, eyes, recorder)
            # At a steady pace, whatever else was told: it says how to go on with it.
            if self._clock() - said_at >= self.wanted.progress_seconds:
                trouble = self._deadline.trouble
                self._say(progress_line(site, seen, controller, self._clock(), self.hosts, trouble,
                                        self._again))  # fmt: skip
                said_at = self._clock()
                self._ask_for_lags(controller, seen)
            # Those that start now are seen at the next look.
            idle = 0 if seen.moves or orders.starts or self._starting else idle + 1
            if idle and all(vm.uuid in seen.out for vm in site.vms):
                break
            if idle >= _IDLE_LOOKS and not self._may_still_start(controller, seen):
                break
            self._rest(looked_at, interval, seen, controller, eyes, recorder)
        self._look(interval, patient=True)
        self._errands.settle(_ERRANDS_SECONDS)
        self._adopt(site)
        if any(host.lost for host in self.hosts.values()):
            # Of a source that is gone its peer knows more by now.
            self._ask_destinations_again()
        recorder.conclude(
            self.hosts,
            self._begun,
            {uuid: told for uuid, (_since, told) in self._put_off.items()} | self._refusals,
            controller,
            self._clock(),
            self.there,
            self._unanswered | self._starting,
        )
        said = {outcome["name"] for outcome in besides}
        for outcome in recorder.outcomes:
            if outcome["verdict"] not in OUT and outcome["name"] not in said:
                self._say(verdict_line(outcome))
        return recorder

    def _decide(
        self, controller: Controller, eyes: Eyes, recorder: Recorder, slow: t.Collection[str] | None = None
    ) -> tuple[Observation, Orders]:
        """Have the controller decide by what the hosts said, ask for that, and say what is new.

        ``slow`` is told between two looks: hosts whose answers are not waited for.
        """
        between = slow is not None
        deadline_at = self._deadline.now(self._clock())
        begun = set(self._begun.values())
        seen = eyes.look(self.hosts, self._clock(), begun, deadline_at, between=between)
        seen = self._with_refusals(seen)
        # Hosts remember others, who left long ago: they are told at the end, and not counted here.
        seen = replace(seen, out={vm.uuid for vm in controller.site.vms}.intersection(seen.out))
        orders = controller.step(seen, between=between)
        eyes.processors_short = controller.processors_short
        self._obey(orders, seen, controller, eyes, slow or ())
        recorder.observe(seen, orders, self.hosts, controller, between=between)
        for line in recorder.news(self.hosts, self._begun.values()):
            self._say(line)
        for decision in orders.decisions:
            if decision.what not in {"starts", "precaching-waits"}:
                self._say(f"{recorder.name(decision.vm)}: {decision.what} ({decision.reason})"
                          + (f": {decision.sentence}" if decision.sentence else ""))  # fmt: skip
        return seen, orders

    def _rest(
        self,
        looked_at: float,
        interval: float,
        seen: Observation,
        controller: Controller,
        eyes: Eyes,
        recorder: Recorder,
    ) -> None:
        """Until the next look. Whose move may soon be over is asked after meanwhile: who comes next has its
        place, and the line, as soon as it is through and not up to an interval later."""
        until = looked_at + interval
        # Who owes an answer is not asked again before the look.
        slow = set(self._pending)
        while until - self._clock() > 2 * _GLANCE_SECONDS:
            ours = {uuid: move for uuid, move in seen.moves.items() if uuid in self._begun}
            nearly = set(over_first(ours, controller.source_of, interval, controller.opened)) - slow
            if not nearly or self._abandoned():
                break
            self._sleep(_GLANCE_SECONDS)
            news, late = self._glance(nearly, eyes)
            slow |= late
            if self._abandoned() or self._clock() - looked_at > self._leases.seconds:
                # Or it stood still meanwhile, and another may have become the coordinator: the look says.
                return
            if news:
                self._errands.settle(0.0)
                seen, _orders = self._decide(controller, eyes, recorder, slow)
        self._sleep(max(0.1, until - self._clock()))

    def _adopt(self, site: SiteSummary) -> None:
        """Jobs that are under way count as ours: begun before, or by a request whose answer was lost."""
        names = {vm.uuid for vm in site.vms}
        for host in self.hosts.values():
            for job in host.jobs if not host.error else ():
                uuid, identifier = str(job["vm"]), str(job["id"])
                if uuid not in names or self._begun.get(uuid) == identifier:
                    continue
                if job.get("ended"):
                    # Another than the one before a start whose answer was lost is what that start began.
                    if uuid not in self._unanswered or self._job_before.get(uuid) == identifier:
                        continue
                    self.changed = True
                elif self._looked and uuid not in self._starting | self._unanswered:
                    self._say(f"{job['name']}: was begun by somebody else, by hand or for one host; it "
                              "counts as ours from now on")  # fmt: skip
                self._begun[uuid] = identifier
                self._unanswered.discard(uuid)
                self._refusals.pop(uuid, None)
                if self.wanted.bandwidth_bytes_per_second is not None and not job.get("ended"):
                    body = {"bandwidth_bytes_per_second": self.wanted.bandwidth_bytes_per_second}
                    self._steer(host.name, identifier, "steer", body, key="bandwidth")

    def _with_refusals(self, seen: Observation) -> Observation:
        # Of one that was asked to start again its job of before says nothing any more.
        failed = {uuid: again for uuid, again in seen.failed.items() if uuid not in self._starting}
        for uuid in self._refusals:
            failed[uuid] = False
        now = self._clock()
        for name, since in self._lost_at.items():
            # Its proxy goes on by itself; we do not wait for ever to hear of it.
            waited = now - since >= _UNREACHED_PATIENCE_SECONDS
            if seen.deadline_at is not None:
                waited = waited or now - max(since, seen.deadline_at) >= _AFTER_DEADLINE_SECONDS
            if not waited:
                continue
            for vm in self.hosts[name].status.get("vms", []):
                failed.setdefault(str(vm["uuid"]), False)
        moves = {
            uuid: move
            for uuid, move in seen.moves.items()
            if uuid not in failed or seen.failed.get(uuid) is not None
        }
        return replace(seen, failed=failed, moves=moves)

    def _may_still_start(self, controller: Controller, seen: Observation) -> bool:
        if seen.deadline_at is not None and seen.deadline_at <= seen.now:
            return False
        for pair, view in seen.pairs.items():
            if view.up:
                self._down_since.pop(pair, None)
            else:
                self._down_since.setdefault(pair, seen.now)
        patience = seen.now - _LINK_PATIENCE_SECONDS
        link_may_come_back = any(
            self._down_since.get(vm.pair, patience) > patience
            for vm in controller.site.vms
            if vm.uuid in controller.waiting
        )
        return (
            controller.has_retries(seen.now)
            or link_may_come_back
            or bool(self._lost_waiting(controller, seen))
        )

    def _lost_waiting(self, controller: Controller, seen: Observation) -> list[str]:
        lost = {
            name for name in self._lost_at if seen.now - self._lost_at[name] < _UNREACHED_PATIENCE_SECONDS
        }
        return [uuid for uuid in controller.waiting if controller.source_of(uuid) in lost]

    # -- asking the proxies for what was decided

    def _obey(
        self,
        orders: Orders,
        seen: Observation,
        controller: Controller,
        eyes: Eyes,
        slow: t.Collection[str],
    ) -> None:
        for uuid, rung in orders.starts:
            self._start(controller, uuid, rung, orders.shutdowns.get(uuid))
        self._cancel_again(controller, seen)
        for uuid, fall in orders.falls.items():
            if fall.rung is Rung.PAUSED:
                self._to_pause.add(uuid)
            else:
                # One that is to be restarted there begins anew once it is back. That is decided once; of one
                # that gives way it is judged anew at each look.
                self._cancel(controller, uuid, again=fall.rung is Rung.RESTART)
        for uuid in list(self._to_pause):
            move = seen.moves.get(uuid)
            if move is None or move.phase is Phase.LEAD_IN or move.silent:
                continue
            self._to_pause.discard(uuid)
            self._pause(controller, uuid, eyes)
        for uuid, share in orders.shares.items():
            self._share(controller, uuid, share, orders.ends_in.get(uuid), seen.now)
        self._postpone(controller, orders.held, seen.now)
        # What is answered by then counts now; a host that is late is heard of at a later look.
        late = {name for name, host in self.hosts.items() if host.lost}
        self._errands.settle(_ERRANDS_SECONDS, late.union(slow))

    def _cancel(self, controller: Controller, uuid: str, *, again: bool) -> None:
        job = self._begun.get(uuid, uuid)

        def told(_job: t.Any, error: ProxyError | None) -> None:
            if again and error is not None and error.cause in {"unreachable", "taken-over"}:
                self._to_cancel[uuid] = job

        self._ask(controller, uuid, "cancel", None, told)

    def _cancel_again(self, controller: Controller, seen: Observation) -> None:
        """Those that are to be restarted and whose proxy may not have heard of it."""
        for uuid, job in list(self._to_cancel.items()):
            move = seen.moves.get(uuid)
            if move is not None and (move.silent or move.phase is Phase.CLOSING):
                continue
            del self._to_cancel[uuid]
            # Not what has begun anew since.
            if move is not None and self._begun.get(uuid, uuid) == job:
                self._cancel(controller, uuid, again=True)

    def _start(self, controller: Controller, uuid: str, rung: Rung, shutdown_seconds: float | None) -> None:
        host = controller.source_of(uuid)
        vm = next(vm for vm in controller.site.vms if vm.uuid == uuid)
        name, body = vm.name, self._order(host, self._begin_body(vm, rung, shutdown_seconds))
        self._starting.add(uuid)
        if uuid not in self._unanswered:
            jobs = self.hosts[host].jobs
            self._job_before[uuid] = next((str(job["id"]) for job in jobs if job["vm"] == uuid), "")

        def told(job: t.Any, error: ProxyError | None) -> None:
            self._starting.discard(uuid)
            if error is None:
                if self._begun.get(uuid) != job["id"]:
                    self.changed = True
                self._begun[uuid] = str(job["id"])
                self._unanswered.discard(uuid)
                self._put_off.pop(uuid, None)
                if rung is Rung.PAUSED:
                    self._to_pause.add(uuid)
                self._say(f"{name}: starts, to {job.get('peer')}{_HOW[rung]}")
            elif error.cause == "taken-over":
                # Nothing was begun; who has the host now, and whether we go on, the next look says.
                controller.not_started(uuid, self._clock(), counts=False)
            elif error.cause == "unreachable":
                # The answer may be what was lost: should it be under way, the next look finds it.
                self._unanswered.add(uuid)
                controller.not_started(uuid, self._clock())
                self._say(f"{name}: not started now: {error}")
            else:
                refusal = {"cause": error.cause, "sentence": str(error), "findings": error.findings}
                now = self._clock()
                since, _before = self._put_off.get(uuid, (now, {}))
                if error.cause in PASSING and now - since < _REFUSED_PATIENCE_SECONDS:
                    if uuid not in self._put_off:
                        self._say(f"{name}: not started now, it is asked for again: {error}")
                    self._put_off[uuid] = since, refusal
                    controller.not_started(uuid, now, counts=False)
                else:
                    self._refusals[uuid] = refusal

        self._errands.send(host, f"start {uuid}", lambda: self._begin(host, body), told)

    def _begin_body(self, vm: VmSummary, rung: Rung, shutdown_seconds: float | None) -> dict[str, object]:
        body: dict[str, object] = {"vm": vm.uuid}
        if rung is Rung.RESTART:
            body |= {"mode": "restart", "power_off": vm.power_off}
            if shutdown_seconds is not None:
                # A proxy waits for a minute if nobody says what time there is.
                body["shutdown_seconds"] = round(shutdown_seconds, 1)
        if self.wanted.bandwidth_bytes_per_second is not None:
            body["bandwidth_bytes_per_second"] = self.wanted.bandwidth_bytes_per_second
        return body

    def _begin(self, host: str, body: t.Mapping[str, object] | None) -> dict[str, t.Any]:
        return dict(self._sources[host].request("POST", "/v1/evacuations", body))
