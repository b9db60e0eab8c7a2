# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Evacuate a whole site, all its hypervisors at once, from the controller."""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import time
import typing as t
from pathlib import Path

from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import DEFAULT_SOCKET
from ansible_collections.lifeboat.evacuation.plugins.module_utils._deadline import (
    Watch,
    meaning,
    parse,
    parse_duration,
    passed,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._forecast_report import (
    count_others,
    forecast_lines,
    forecast_of,
    mark_preflights,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._inventory import peers_of
from ansible_collections.lifeboat.evacuation.plugins.module_utils._plan_findings import (
    leaving_findings,
    read_rate,
    strategy_findings,
    usual_wish,
    wish_findings,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Finding, SiteSummary
from ansible_collections.lifeboat.evacuation.plugins.module_utils._vm_groups import read_groups, with_group

try:
    import paramiko
except ImportError as error:
    PARAMIKO_ERROR: ImportError | None = error
else:
    PARAMIKO_ERROR = None
    del paramiko
    from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._bridge import Bridge
    from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._coordinator import (
        Abandoned,
        Coordinator,
        Refused,
        TakenOver,
        Wanted,
        told_of,
    )
    from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._given import completed, given
    from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._reach import read as read_reach
    from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._report_page import write_page
    from ansible_collections.lifeboat.evacuation.plugins.plugin_utils._ups import read_runtime

display = Display()


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
                "strategy": {"type": "str"},
                "parallel": {"type": "int"},
                "bandwidth": {"type": "str"},
                "leave_behind": {"type": "list", "elements": "str", "default": []},
                "deadline": {"type": "str"},
                "deadline_reserve": {"type": "str", "default": "0"},
                "uplink": {"type": "str"},
                "progress": {"type": "float", "default": 5.0},
                "take_over": {"type": "bool", "default": False},
                "forecast": {"type": "path"},
                "report": {"type": "path"},
                "page": {"type": "path"},
                "socket": {"type": "path"},
            }
        )
        if PARAMIKO_ERROR is not None:
            result.update(
                failed=True, msg=f"paramiko is missing on the controller ({PARAMIKO_ERROR}); install it"
            )
            return result
        self._arguments = arguments
        self._variables = task_vars or {}
        # Ansible's workers outlive an ansible-playbook that is killed.
        self._parent = os.getppid()
        try:
            coordinator, findings = self._coordinator()
        except _Wrong as error:
            return self._refuse(result, error.findings)
        try:
            if findings:
                return self._refuse(result, findings + self._found_by(coordinator))
            return self._work(result, coordinator)
        except Refused as error:
            return self._refuse(result, error.findings)
        except Abandoned:
            result.update(failed=True, msg="ansible-playbook is gone; what is under way goes on")
            return result
        except TakenOver as error:
            result.update(failed=True, changed=coordinator.changed, msg=str(error))
            return result
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

    def _found_by(self, coordinator: Coordinator) -> list[Finding]:
        """What else is wrong, as the proxies know it: all findings at once."""
        found: list[Finding] = []
        try:
            coordinator.survey()
        except Refused as error:
            found = error.findings
        return found + self._led_by_others(coordinator)

    def _led_by_others(self, coordinator: Coordinator) -> list[Finding]:
        """That another is at work, where this would be a second one."""
        moves = self._arguments["state"] == "evacuated" and not self._task.check_mode
        return coordinator.led_by_others() if moves and not self._arguments["take_over"] else []

    def _survey(self, coordinator: Coordinator) -> SiteSummary:
        try:
            return coordinator.survey(pick_up=self._arguments["state"] == "evacuated")
        except Refused as error:
            raise Refused([*error.findings, *self._led_by_others(coordinator)]) from error

    def _work(self, result: dict[str, t.Any], coordinator: Coordinator) -> dict[str, t.Any]:
        if self._deadline is not None:
            # As it was given, before it became a text: of a time of day without quotes YAML makes a number.
            self._say(meaning(self._deadline, self._task.args.get("deadline"), time.time()))
        site = self._survey(coordinator)
        unreached = {name: host.error for name, host in coordinator.hosts.items() if host.error}
        for name, why in unreached.items():
            self._say(f"{name}: not reached: {why.removeprefix(f'{name}: ')}")
        if self._arguments["state"] == "forecast" or self._task.check_mode:
            for finding in coordinator.led_by_others():
                # Nothing is moved: no reason to refuse, but what the line carries is shared out already.
                self._say(f"{finding.subject} {finding.fact}")
        if self._arguments["state"] == "forecast":
            return self._forecast(result, coordinator, site) | {"unreached": unreached}
        if self._task.check_mode:
            report = self._would(coordinator, site)
            result["changed"] = any(vm["verdict"] == "would-start" for vm in report["vms"])
        else:
            recorder = coordinator.run(site)
            deadline = self._arguments["deadline"] or ""
            report = recorder.report(
                coordinator.wanted.strategy,
                deadline,
                coordinator.hosts,
                self._deadline.instant if self._deadline is not None else "",
            )
            result["changed"] = coordinator.changed
            if self._arguments["page"]:
                write_page(report, Path(self._arguments["page"]))
        if self._arguments["report"]:
            Path(self._arguments["report"]).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        result.update(report=report, vms=report["vms"], unreached=unreached)
        return result

    def _forecast(
        self, result: dict[str, t.Any], coordinator: Coordinator, site: SiteSummary
    ) -> dict[str, t.Any]:
        if self._arguments["uplink"] is None and site.vms:
            site = coordinator.measured(site)
        plan, placement = coordinator.forecast(site)
        told = forecast_of(site, plan, time.time(), placement)
        count_others(told, coordinator.others(told_of(site), check_mode=True))
        stays = mark_preflights(told, coordinator.preflights(site))
        for line in forecast_lines(told):
            self._say(line)
        return result | {"changed": False, "forecast": told, "would_stay": stays}

    def _would(self, coordinator: Coordinator, site: SiteSummary) -> dict[str, t.Any]:
        # Whether all would be out in time is a question of what the link carries.
        if self._arguments["deadline"] and self._arguments["uplink"] is None and site.vms:
            site = coordinator.measured(site)
        plan, _placement = coordinator.forecast(site)
        return coordinator.would(plan, coordinator.preflights(site))

    # -- what was asked for, judged whole

    def _coordinator(self) -> tuple[Coordinator, list[Finding]]:
        """What to ask by, and everything that is wrong with what was asked for. Raises _Wrong.

        With findings it is good for a survey and nothing else: what is wrong is left out of it.
        """
        arguments = self._arguments
        strategy, findings = self._strategy()
        deadline, wrong = parse(arguments["deadline"], time.time())
        self._deadline = deadline
        findings += wrong
        reserve = parse_duration(arguments["deadline_reserve"])
        if reserve is None:
            fact = f"reserve {arguments['deadline_reserve']!r}"
            findings.append(Finding(f"deadline_{fact}", "is no duration", "write one, such as 60s"))
        uplink, wrong = read_rate("uplink", arguments["uplink"])
        findings += wrong
        bandwidth, wrong = read_rate("bandwidth", arguments["bandwidth"])
        findings += wrong
        if arguments["vms"] is not None and not arguments["vms"]:
            # Somebody's computed list that came out empty does not mean everything.
            way_out = f"name VMs, or leave it out to evacuate all of {arguments['site']}"
            findings.append(Finding("vms", "is an empty list", way_out))
        forecast, wrong = _kept_forecast(arguments["forecast"])
        findings += wrong
        for what in ("report", "page"):
            findings += _unwritable(what, arguments[what])
        if arguments["progress"] < 1:
            findings.append(Finding(f"progress {arguments['progress']}", "is below 1 s", "give 1 or more"))
        sources = self._source_hosts(findings)
        hostvars = self._variables.get("hostvars", {})
        bridges: dict[str, Bridge] = {}
        unfollowed: list[Finding] = []
        told_once = given(self._play_context, self._task.remote_user)

        def bridge(name: str) -> Bridge:
            if name not in bridges:
                reach, refused = read_reach(name, completed(hostvars[name], told_once))
                unfollowed.extend(refused)
                told = arguments["socket"] or hostvars[name].get("evacuation_socket") or DEFAULT_SOCKET
                bridges[name] = Bridge(reach, str(told))
            return bridges[name]

        inventory = self._variables.get("groups", {}).get("all", [])
        groups, wrong = read_groups(
            {name: hostvars[name] for name in sources},
            lambda: {str(vm["group"]) for vm in _vms(hostvars, inventory) if vm.get("group")},
        )
        findings += wrong
        usual: dict[str, t.Mapping[str, t.Any]] = {}
        wishes: dict[str, dict[str, t.Mapping[str, t.Any]]] = {}
        expected: dict[str, list[str]] = {}
        destinations: dict[str, Bridge] = {}
        for name in sources:
            bridge(name)
            peers: set[t.Any] = set(peers_of(hostvars[name]))
            told, wrong = usual_wish(name, hostvars[name])
            findings += wrong
            if not wrong:
                usual[name] = told
            for wish in hostvars[name].get("lifeboat_vms") or []:
                wrong = wish_findings(str(wish.get("name")), wish)
                wrong += leaving_findings(str(wish.get("name")), wish)
                findings += wrong
                if not wrong:
                    wishes.setdefault(name, {})[str(wish.get("name"))] = with_group(wish, groups)
                expected.setdefault(name, []).append(str(wish.get("name")))
                peers.add(wish.get("peer"))
            for peer in peers - set(destinations):
                if peer and peer in hostvars:
                    destinations[str(peer)] = bridge(str(peer))
        # A VM that is here now keeps what is said of it where it is listed: on the way home, too.
        for name in sorted(set(inventory) - set(sources)):
            for named, wish in _sound_wishes(hostvars, name):
                wishes.setdefault(name, {})[named] = with_group(wish, groups)
        if unfollowed or not sources:
            # By itself a deadline that has passed is no reason to refuse: what is under way is picked up.
            raise _Wrong(findings + unfollowed + passed(deadline, time.time()))

        def find(name: str) -> tuple[Bridge | None, list[Finding]]:
            """A destination that only the sources know of; None where the inventory has no such host."""
            if name not in hostvars:
                return None, []
            known = len(unfollowed)
            made = bridge(name)
            return (made, []) if len(unfollowed) == known else (None, unfollowed[known:])

        wanted = Wanted(
            arguments["site"],
            tuple(arguments["vms"]) if arguments["vms"] else None,
            strategy if not strategy_findings(strategy) else "feedback",
            arguments["progress"],
            wishes,
            uplink,
            forecast,
            expected,
            tuple(arguments["leave_behind"]),
            bandwidth,
            usual,
            lambda: {str(vm.get("name")) for vm in _vms(hostvars, inventory)},
            self._who(),
            arguments["take_over"],
            # Nobody waits for a rehearsal.
            5 if arguments["state"] == "forecast" else 1,
        )
        watch = Watch(deadline, read_runtime, reserve or 0.0)
        coordinator = Coordinator(
            wanted,
            [bridges[name] for name in sources],
            destinations,
            watch,
            self._say,
            abandoned=lambda: os.getppid() != self._parent,
            find=find,
        )
        return coordinator, findings

    def _who(self) -> str:
        """This run, for people who find it at work."""
        try:
            user = getpass.getuser()
        except (KeyError, OSError):
            # A container's user may have no name.
            user = f"user {os.getuid()}"
        told = f"{user} on {socket.gethostname()} (ansible-playbook, process {self._parent}"
        job = self._variables.get("awx_job_id") or self._variables.get("tower_job_id")
        return told + (f", AWX job {job})" if job else ")")

    def _strategy(self) -> tuple[str, list[Finding]]:
        strategy, parallel = self._arguments["strategy"], self._arguments["parallel"]
        if parallel is None:
            return strategy or "feedback", strategy_findings(strategy or "feedback")
        subject = f"parallel {parallel}"
        if strategy:
            way_out = "give one of them: a number is the strategy static:N"
            return strategy, [Finding(subject, f"and strategy {strategy!r} are given", way_out)]
        if parallel < 1:
            return "feedback", [Finding(subject, "is below 1", "give 1 or more, or leave it out")]
        return f"static:{parallel}", strategy_findings(f"static:{parallel}")

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
    def _say(text: str) -> None:
        display.display("{} {}".format(time.strftime("%H:%M:%S"), text))


def _sound_wishes(
    hostvars: t.Mapping[str, t.Any], host: str
) -> t.Iterator[tuple[str, t.Mapping[str, t.Any]]]:
    """What the inventory says of the VMs of a host that is not to be emptied.

    What is wrong with its variables is found by its own run, and in nobody's way here.
    """
    try:
        listed = list(hostvars[host].get("lifeboat_vms") or [])
        wishes = [
            (str(wish["name"]), wish) for wish in listed if isinstance(wish, t.Mapping) and wish.get("name")
        ]
    except AnsibleError:
        return
    for named, wish in wishes:
        if not (wish_findings(named, wish) or leaving_findings(named, wish)):
            yield named, wish


def _vms(hostvars: t.Mapping[str, t.Any], hosts: t.Iterable[str]) -> t.Iterator[t.Mapping[str, t.Any]]:
    """The VMs that the inventory lists, of whichever host."""
    for host in hosts:
        yield from hostvars[host].get("lifeboat_vms") or []


def _kept_forecast(path: str | None) -> tuple[dict[str, t.Any] | None, list[Finding]]:
    if not path:
        return None, []
    way_out = "name the file that rehearse.yml wrote, or leave it out"
    try:
        told = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return None, [Finding(f"forecast {path}", f"cannot be read ({error})", way_out)]
    if not isinstance(told, dict) or not {"at", "site", "makespan_seconds", "leaving", "vms"} <= set(told):
        return None, [Finding(f"forecast {path}", "is no forecast", way_out)]
    return told, []


def _unwritable(what: str, path: str | None) -> list[Finding]:
    if not path:
        return []
    file = Path(path).resolve()
    if file.is_dir():
        fact = "is a directory"
    elif not (file.parent.is_dir() and os.access(file.parent, os.W_OK)):
        fact = f"cannot be written, {file.parent} is no directory that this user can write to"
    elif file.exists() and not os.access(file, os.W_OK):
        fact = "is there and cannot be written by this user"
    else:
        return []
    return [Finding(f"{what} {path}", fact, "name another file, or '' for none")]
