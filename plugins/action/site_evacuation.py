# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Evacuate a whole site, all its hypervisors at once, from the controller."""

from __future__ import annotations

import json
import re
import time
import typing as t
from pathlib import Path

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import DEFAULT_SOCKET
from ansible_collections.lifeboat.evacuation.plugins.module_utils._coordination_report import (
    forecast_lines,
    forecast_of,
    mark_preflights,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._deadline import (
    Watch,
    parse,
    parse_duration,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._plan_findings import (
    strategy_findings,
    wish_findings,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Finding

try:
    import paramiko
except ImportError as error:
    PARAMIKO_ERROR: ImportError | None = error
else:
    PARAMIKO_ERROR = None
    del paramiko
    from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._bridge import Bridge
    from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._coordinator import (
        Coordinator,
        Refused,
        Wanted,
    )
    from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._reach import read as read_reach
    from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._report_page import write_page
    from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._ups import read_runtime

display = Display()

_RATE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kMG]?)(bit|B)(?:/s|ps)?\s*$")
_FACTORS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}


class _Wrong(Exception):
    def __init__(self, findings: t.Sequence[Finding]) -> None:
        self.findings = list(findings)
        super().__init__("; ".join(map(str, findings)))


class ActionModule(ActionBase):
    """The action plugin; give it ``run_once: true``."""

    TRANSFERS_FILES = False
    BYPASS_HOST_LOOP = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Evacuate or rehearse, and return the report or the forecast."""
        result: dict[str, t.Any] = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(
            argument_spec={
                "site": {"type": "str", "required": True},
                "hosts": {"type": "list", "elements": "str"},
                "vms": {"type": "list", "elements": "str"},
                "state": {"type": "str", "choices": ["evacuated", "forecast"], "default": "evacuated"},
                "strategy": {"type": "str", "default": "feedback"},
                "deadline": {"type": "str"},
                "deadline_reserve": {"type": "str", "default": "0"},
                "uplink": {"type": "str"},
                "progress": {"type": "float", "default": 5.0},
                "forecast": {"type": "dict"},
                "report": {"type": "path"},
                "page": {"type": "path"},
                "socket": {"type": "path", "default": DEFAULT_SOCKET},
            }
        )
        if PARAMIKO_ERROR is not None:
            result.update(
                failed=True, msg=f"paramiko is missing on the controller ({PARAMIKO_ERROR}); install it"
            )
            return result
        self._arguments = arguments
        self._variables = task_vars or {}
        try:
            coordinator = self._coordinator()
        except _Wrong as error:
            return self._refuse(result, error.findings)
        try:
            return self._work(result, coordinator)
        except Refused as error:
            return self._refuse(result, error.findings)
        finally:
            coordinator.close()

    @staticmethod
    def _refuse(result: dict[str, t.Any], findings: t.Sequence[Finding]) -> dict[str, t.Any]:
        told = [str(finding) for finding in findings]
        result.update(
            failed=True,
            msg="nothing was started; " + "; ".join(told),
            findings=[
                {"subject": finding.subject, "fact": finding.fact, "way_out": finding.way_out}
                for finding in findings
            ],
        )
        return result

    def _work(self, result: dict[str, t.Any], coordinator: Coordinator) -> dict[str, t.Any]:
        site = coordinator.survey()
        unreached = {name: host.error for name, host in coordinator.hosts.items() if host.error}
        for name, why in unreached.items():
            self._say(f"{name}: not reached: {why}")
        if self._arguments["state"] == "forecast" or self._task.check_mode:
            if self._arguments["uplink"] is None and site.vms:
                site = coordinator.measured(site)
            plan, placement = coordinator.forecast(site)
            told = forecast_of(site, plan, time.time(), placement)
            stays = mark_preflights(told, coordinator.preflights(site))
            for line in forecast_lines(told):
                self._say(line)
            result.update(changed=False, forecast=told, would_stay=stays, unreached=unreached)
            return result
        recorder = coordinator.run(site)
        report = recorder.report(
            self._arguments["strategy"], self._arguments["deadline"] or "", coordinator.hosts
        )
        if self._arguments["report"]:
            Path(self._arguments["report"]).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if self._arguments["page"]:
            write_page(report, Path(self._arguments["page"]))
        result.update(changed=coordinator.changed, report=report, vms=report["vms"], unreached=unreached)
        return result

    # -- what was asked for, judged whole

    def _coordinator(self) -> Coordinator:
        arguments = self._arguments
        findings = strategy_findings(arguments["strategy"])
        deadline, wrong = parse(arguments["deadline"], time.time())
        findings += wrong
        reserve = parse_duration(arguments["deadline_reserve"])
        if reserve is None:
            fact = f"reserve {arguments['deadline_reserve']!r}"
            findings.append(Finding(f"deadline_{fact}", "is no duration", "write one, such as 60s"))
        uplink = self._rate(arguments["uplink"], findings)
        if arguments["progress"] < 1:
            findings.append(Finding(f"progress {arguments['progress']}", "is below 1 s", "give 1 or more"))
        sources = self._source_hosts(findings)
        hostvars = self._variables.get("hostvars", {})
        bridges: dict[str, Bridge] = {}

        def bridge(name: str) -> Bridge:
            if name not in bridges:
                reach, refused = read_reach(name, hostvars[name])
                findings.extend(refused)
                bridges[name] = Bridge(reach, arguments["socket"])
            return bridges[name]

        wishes: dict[str, t.Mapping[str, t.Any]] = {}
        expected: dict[str, list[str]] = {}
        destinations: dict[str, Bridge] = {}
        for name in sources:
            bridge(name)
            for wish in hostvars[name].get("lifeboat_vms") or []:
                wishes[str(wish.get("name"))] = wish
                findings += wish_findings(str(wish.get("name")), wish)
                expected.setdefault(name, []).append(str(wish.get("name")))
            peer = hostvars[name].get("lifeboat_peer")
            if peer and peer in hostvars and peer not in destinations:
                destinations[str(peer)] = bridge(str(peer))
        if findings:
            raise _Wrong(findings)
        wanted = Wanted(
            arguments["site"],
            tuple(arguments["vms"]) if arguments["vms"] else None,
            arguments["strategy"],
            arguments["progress"],
            wishes,
            uplink,
            arguments["forecast"],
            expected,
        )
        watch = Watch(deadline, read_runtime, reserve or 0.0)
        return Coordinator(wanted, [bridges[name] for name in sources], destinations, watch, self._say)

    def _source_hosts(self, findings: list[Finding]) -> list[str]:
        site, groups = str(self._arguments["site"]), self._variables.get("groups", {})
        if re.search(r"[,:\s]", site):
            way_out = "empty one after the other, or make a group of both"
            findings.append(Finding(f"site {site!r}", "names more than one site", way_out))
            return []
        if site not in groups:
            known = ", ".join(sorted(set(groups) - {"all", "ungrouped"})) or "none"
            findings.append(
                Finding(f"site {site!r}", "is no group of this inventory", f"name one of {known}")
            )
            return []
        hosts = [
            name for name in groups[site] if not self._arguments["hosts"] or name in self._arguments["hosts"]
        ]
        if not hosts:
            findings.append(Finding(f"site {site!r}", "has no host that is left", "see hosts and --limit"))
        return hosts

    @staticmethod
    def _rate(text: str | None, findings: list[Finding]) -> float | None:
        if not text:
            return None
        match = _RATE.match(text)
        if match is None or float(match.group(1)) <= 0:
            findings.append(Finding(f"uplink {text!r}", "is no rate", "write one, such as 400Mbit/s"))
            return None
        return float(match.group(1)) * _FACTORS[match.group(2)] / (8 if match.group(3) == "bit" else 1)

    @staticmethod
    def _say(text: str) -> None:
        display.display("{} {}".format(time.strftime("%H:%M:%S"), text))
