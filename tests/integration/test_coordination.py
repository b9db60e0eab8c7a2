# SPDX-License-Identifier: GPL-3.0-or-later
"""A whole site emptied by the playbook an operator uses: four VMs over two pairs of hosts, there and back.

One story, told in the order of the tests; what takes minutes is told by `make soak`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from integration.playbook_runner import INSTALLED, ROOT, PlaybookResult
from integration.run_watch import none_twice
from lifeboat_lab.errors import LabError
from lifeboat_lab.guests.guests import Guest
from lifeboat_lab.guests.plan import GuestPlan
from lifeboat_lab.lab import Lab
from lifeboat_lab.proxy import Proxy

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

RunPlaybook = Callable[..., PlaybookResult]
PEERS = {"home1": "backup1", "home2": "backup2"}
PLANS = {
    "alpha": ("home1", {"workload": "fsync-log", "records_per_second": 2}),
    "beta": ("home1", {"workload": "idle"}),
    "gamma": ("home2", {"workload": "idle"}),
    "delta": ("home2", {"workload": "fsync-log", "records_per_second": 2}),
}
WISHES: dict[str, dict[str, Any]] = {
    "alpha": {"priority": 80},
    "beta": {"after": ["alpha"], "fallback": ["live", "paused"]},
    "delta": {"group": "shop"},
}
SCHEMA = json.loads((ROOT / "docs" / "evacuation-report.schema.json").read_text())


def wait_until(true: Callable[[], object], what: str, *, timeout_seconds: float = 120) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout_seconds:g} s: {what}"
        time.sleep(0.5)


@dataclass
class Running:
    """An evacuation by ansible-playbook that goes on while the test does something."""

    process: subprocess.Popen[str]
    output: Path

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def end(self, timeout_seconds: float = 420) -> int:
        """Its exit code."""
        return self.process.wait(timeout_seconds)

    def kill(self) -> None:
        """As the kernel does when memory runs out: only the one process, its workers stay for themselves."""
        self.process.kill()
        self.process.wait()

    def clean(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Crowd:
    """The lab, its VMs, and how to empty a site of them."""

    def __init__(self, lab: Lab, playbook: RunPlaybook, guests: dict[str, Guest], work: Path) -> None:
        self.lab, self.guests, self.work = lab, guests, work
        self._playbook = playbook
        self._runs: list[Running] = []
        self._canaries = {name: guest.canary() for name, guest in guests.items()}

    @property
    def variables(self) -> dict[str, Any]:
        listed = {
            host: [
                {"name": name, "rpo": "60s", **WISHES.get(name, {})}
                for name, (home, _how) in PLANS.items()
                if home == host
            ]
            for host in PEERS
        }
        return {"site_vms": listed, "lifeboat_vms": "{{ site_vms[inventory_hostname] | default([]) }}"}

    def play(self, name: str, **variables: Any) -> PlaybookResult:
        return self._playbook(name, variables={**self.variables, **variables})

    def begin(self, site: str, **variables: Any) -> Running:
        """Begin to empty a site; the report goes to ``report``."""
        self.report_path.unlink(missing_ok=True)
        told = {
            "evacuate_site": site,
            "evacuate_report": str(self.report_path),
            **self.variables,
            **variables,
        }
        given = self.work / f"variables-{len(self._runs)}.json"
        given.write_text(json.dumps(told))
        binaries = ROOT / ".venv" / "bin"
        command = self.lab.command(
            "controller",
            [
                str(binaries / "ansible-playbook"), "-i", str(ROOT / "inventories" / "lab"),
                "-e", f"@{given}", "lifeboat.evacuation.evacuate",
            ],
        )  # fmt: skip
        output = self.work / f"run-{len(self._runs)}.txt"
        with output.open("w") as stream:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, text=True,
                start_new_session=True, cwd=self.work,
                env={
                    **os.environ,
                    "ANSIBLE_COLLECTIONS_PATH": str(INSTALLED),
                    "ANSIBLE_HOME": str(self.work / "ansible-home"),
                    "ANSIBLE_NOCOLOR": "1",
                    "PATH": f"{binaries}:{os.environ['PATH']}",
                },
            )  # fmt: skip
        self._runs.append(Running(process, output))
        return self._runs[-1]

    def empty(self, site: str, **variables: Any) -> dict[str, Any]:
        """Empty a site; its report."""
        run = self.begin(site, **variables)
        assert run.end() == 0, run.text[-6000:]
        return self.report()

    def clean(self) -> None:
        for run in self._runs:
            run.clean()

    @property
    def report_path(self) -> Path:
        return self.work / "evacuation-report.json"

    def report(self) -> dict[str, Any]:
        """The report of the last evacuation, as documented."""
        report: dict[str, Any] = json.loads(self.report_path.read_text())
        jsonschema.validate(report, SCHEMA)
        return report

    def ours(self, report: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What a report tells of our VMs; the hosts may remember others, even of the same name."""
        uuids = {guest.plan.uuid for guest in self.guests.values()}
        return [vm for vm in report["vms"] if vm["vm"] in uuids]

    def verdicts(self, report: Mapping[str, Any]) -> dict[str, str]:
        """Verdicts of our VMs by name."""
        return {vm["name"]: vm["verdict"] for vm in self.ours(report)}

    def proxy(self, host: str) -> Proxy:
        return Proxy(self.lab.host(host))

    def jobs(self, *hosts: str) -> list[dict[str, Any]]:
        """Evacuation jobs of our VMs that these hosts remember."""
        told = [job for host in hosts for job in self.proxy(host).get("/evacuations")["evacuations"]]
        ours = {guest.plan.uuid for guest in self.guests.values()}
        return [job for job in told if job["vm"] in ours]

    def protected(self, *hosts: str) -> bool:
        """Every VM of ours is protected on one of these hosts, and its replica is whole."""
        try:
            told = [vm for host in hosts for vm in self.proxy(host).get("/vms")["vms"]]
        except LabError:
            return False
        whole = {vm["uuid"] for vm in told if vm["generation"] and vm["state"] == "protected"}
        return {guest.plan.uuid for guest in self.guests.values()} <= whole

    def settled(self) -> bool:
        """No job is under way, and everybody is protected where it runs now."""
        hosts = (*PEERS, *PEERS.values())
        try:
            return all(job["ended"] for job in self.jobs(*hosts)) and self.protected(*hosts)
        except LabError:
            return False

    def links_up(self, host: str) -> bool:
        """The proxy of a host has its links."""
        try:
            return all(link["state"] == "up" for link in self.proxy(host).get("/links")["links"])
        except LabError:
            return False

    def intact_at(self, site: str) -> None:
        """Every VM runs once, at that site, with its memory as it was, and no two copies ever ran."""
        for name, guest in self.guests.items():
            home = PLANS[name][0]
            assert guest.running_on() == [home if site == "home" else PEERS[home]], name
            assert guest.canary() == self._canaries[name], f"{name}: memory"
            assert guest.told().doubled_beats <= 1, f"{name}: two copies ran"


def forget_all(lab: Lab) -> None:
    for host in (*PEERS, *PEERS.values()):
        proxy = Proxy(lab.host(host))
        for vm in proxy.get("/vms")["vms"]:
            proxy.request("DELETE", f"/vms/{vm['uuid']}?keep_replica=true")


@pytest.fixture(scope="module")
def crowd(
    lab: Lab, lab_playbook: RunPlaybook, site_setup: PlaybookResult, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Crowd]:
    """Both sites set up, four VMs running at home, protected, a slow and long way between the sites."""
    assert site_setup.return_code == 0
    if not {*PEERS, *PEERS.values()} <= set(lab.settings.hosts):
        pytest.skip("needs all four hosts of the lab")
    forget_all(lab)
    for left in lab.guests.all():
        left.remove()
    guests = {}
    for name, (home, how) in PLANS.items():
        guests[name] = lab.guests.define(
            home, GuestPlan(name, ram_mib=96, disk_mib=32, content_mib=8, heartbeat_milliseconds=100, **how)
        )
        guests[name].start()
    for guest in guests.values():
        guest.wait_ready()
    crowd = Crowd(lab, lab_playbook, guests, tmp_path_factory.mktemp("crowd"))
    crowd.play("protect", lifeboat_vms_wait=True).require_success()
    lab.wan.set("trans-pacific")
    yield crowd
    crowd.clean()
    lab.wan.set("none")
    lab.wan.heal()
    forget_all(lab)
    for guest in guests.values():
        guest.remove()


@pytest.fixture(autouse=True)
def none_runs_twice(crowd: Crowd) -> Iterator[None]:
    """Whatever a test does, all hosts are asked all the time who runs its VMs."""
    with none_twice(crowd.lab, {guest.plan.uuid for guest in crowd.guests.values()}):
        yield


def test_one_list_of_vms_serves_protection_and_evacuation(crowd: Crowd) -> None:
    assert crowd.play("protect").require_success().changed_tasks == []
    wrong = {"name": "alpha", "fallback": ["teleport"]}
    refused = crowd.play("protect", lifeboat_vms=[wrong])
    assert refused.return_code != 0
    assert "teleport" in refused.messages


def test_a_site_is_emptied_and_the_forecast_stands_beside_the_result(crowd: Crowd) -> None:
    kept = crowd.work / "forecast.json"
    asked = {"evacuate_site": "home", "rehearse_forecast": str(kept)}
    told = crowd.play("rehearse", evacuate_deadline="20m", **asked).require_success()
    assert told.changed_tasks == []
    assert crowd.jobs(*PEERS) == [], "a rehearsal changes nothing"
    late = crowd.play("rehearse", evacuate_deadline="6s", **asked, rehearse_demand="100%")
    assert late.return_code != 0
    assert "0 of 4 VMs would make it" in late.messages
    crowd.play("rehearse", **asked).require_success()
    forecast = json.loads(kept.read_text())

    report = crowd.empty("home", evacuate_deadline="20m", evacuate_forecast=str(kept))
    assert crowd.verdicts(report) == dict.fromkeys(PLANS, "evacuated")
    crowd.intact_at("backup")
    coordination = report["coordination"]
    assert coordination["forecast"] == forecast
    ours = crowd.ours(report)
    ends = {vm["name"]: vm["out_seconds"] for vm in ours}
    assert coordination["makespan_seconds"] == max(ends.values())
    assert ends["alpha"] < ends["beta"], "beta goes after alpha"
    starts = {vm["name"]: vm["started_seconds"] for vm in ours}
    assert starts["beta"] >= ends["alpha"]
    # S(t) grows one by one, and E is what it comes to.
    out = [sample["out"] for sample in coordination["samples"]]
    assert (out[0], out[-1]) == (0, 4)
    assert out == sorted(out)
    assert 0.5 < coordination["expected_share"] < 1
    print(
        f"rehearsed {forecast['makespan_seconds']} s, took {coordination['makespan_seconds']} s; "
        f"uplink measured {sum(forecast['uplinks'].values()) * 8 / 1e6:.1f} Mbit/s"
    )
    planned = {vm["name"]: vm for vm in forecast["vms"]}
    for vm in ours:
        told = planned[vm["name"]]
        print(
            f"{vm['name']}: {told['wire_bytes'] / 1e6:.1f} MB and {told['end_seconds']} s rehearsed, "
            f"{vm['wire_bytes'] / 1e6:.1f} MB and {vm['out_seconds']} s seen"
        )
    # Those who wait behind leave the line to those who move.
    assert "precaching-waits" in {decision["what"] for decision in coordination["decisions"]}
    assert report["totals"]["all_out"]
    assert "<svg" in crowd.report_path.with_suffix(".html").read_text()
    text = crowd._runs[-1].text
    assert "if this ends, jobs go on: run the same command again" in text


def test_a_killed_controller_loses_and_doubles_nothing(crowd: Crowd) -> None:
    """SIGKILL in the middle, on the way home; then the same command again."""
    back = tuple(PEERS.values())
    wait_until(lambda: crowd.protected(*back), "the way back is protected")
    run = crowd.begin("backup")
    wait_until(lambda: any(job["step"] == "migrate" for job in crowd.jobs(*back)), "one is on its way")
    run.kill()
    begun = {job["vm"] for job in crowd.jobs(*back)}
    assert len(begun) < 4, "killed before all had been begun, or this would show nothing"
    # What it left behind ends by itself and starts nothing more.
    time.sleep(5)
    assert {job["vm"] for job in crowd.jobs(*back)} == begun

    report = crowd.empty("backup")
    assert set(crowd.verdicts(report)) == set(PLANS)
    assert set(crowd.verdicts(report).values()) <= {"evacuated", "already-there"}
    crowd.intact_at("home")
    # One that stayed may have been begun again; moved was each of them once.
    moved = [job["vm"] for job in crowd.jobs(*back) if job["verdict"] == "evacuated"]
    assert sorted(moved) == sorted(guest.plan.uuid for guest in crowd.guests.values())
    assert {job["verdict"] for job in crowd.jobs(*back)} <= {"evacuated", "stayed"}
    again = crowd.empty("backup")
    assert crowd.verdicts(again) == dict.fromkeys(PLANS, "already-there")


def test_of_two_controllers_at_once_one_moves_all_and_the_other_says_who(crowd: Crowd) -> None:
    wait_until(lambda: crowd.protected(*PEERS), "protected at home again", timeout_seconds=240)
    before = {job["id"] for job in crowd.jobs(*PEERS)}
    # Two records a second, of which forecasts are told.
    alpha = crowd.guests["alpha"].plan.uuid
    wait_until(lambda: crowd.proxy("home1").vm(alpha)["written_bytes_per_second"], "alpha is seen to write")
    reports = [crowd.work / f"report-of-{name}.json" for name in ("one", "another")]
    runs = [crowd.begin("home", evacuate_report=str(report)) for report in reports]
    codes = [run.end() for run in runs]
    assert sorted(codes) in ([0, 1], [0, 2]), [run.text[-3000:] for run in runs]
    first, second = (0, 1) if codes[0] == 0 else (1, 0)
    assert crowd.verdicts(json.loads(reports[first].read_text())) == dict.fromkeys(PLANS, "evacuated")
    told = runs[second].text
    assert "nothing was started; site home: is being evacuated by " in told, told[-3000:]
    assert "evacuate_take_over=true" in told
    assert not reports[second].exists()
    jobs = [job for job in crowd.jobs(*PEERS) if job["id"] not in before]
    moved = sorted(job["vm"] for job in jobs if job["verdict"] == "evacuated")
    assert moved == sorted(guest.plan.uuid for guest in crowd.guests.values())
    # One that stayed may have been begun again, as ever.
    assert {job["verdict"] for job in jobs} <= {"evacuated", "stayed"}
    crowd.intact_at("backup")
    assert crowd.proxy("home1").get("/status")["coordinator"] is None


# -- what goes wrong on the way; minutes each


def ready_at_home(crowd: Crowd) -> None:
    """Wherever the test before left them: all four at home, protected, their replicas whole."""
    if not all(guest.running_on() == [PLANS[name][0]] for name, guest in crowd.guests.items()):
        wait_until(crowd.settled, "everybody has landed", timeout_seconds=240)
        crowd.begin("backup").end()
    wait_until(lambda: crowd.protected(*PEERS), "protected at home", timeout_seconds=240)


@pytest.mark.soak
def test_the_link_halves_on_the_way(crowd: Crowd) -> None:
    ready_at_home(crowd)
    run = crowd.begin("home", evacuate_deadline="20m")
    wait_until(lambda: any(job["step"] == "migrate" for job in crowd.jobs(*PEERS)), "one is on its way")
    crowd.lab.wan.set("rate=25mbit,rtt=180ms")
    try:
        assert run.end() == 0, run.text[-6000:]
    finally:
        crowd.lab.wan.set("trans-pacific")
    assert set(crowd.verdicts(crowd.report()).values()) == {"evacuated"}
    crowd.intact_at("backup")


@pytest.mark.soak
def test_a_source_proxy_is_killed_and_the_others_go_on(crowd: Crowd) -> None:
    ready_at_home(crowd)
    run = crowd.begin("home", evacuate_deadline="20m")
    ours = {crowd.guests[name].plan.uuid for name in ("alpha", "beta")}
    wait_until(
        lambda: any(job["step"] == "migrate" and job["vm"] in ours for job in crowd.jobs("home1")),
        "one of home1 is on its way",
    )
    crowd.lab.exec("home1", "systemctl", "kill", "--signal=SIGKILL", "--kill-whom=main", "precache-proxy")
    run.end()
    told = crowd.verdicts(crowd.report())
    assert {told["gamma"], told["delta"]} == {"evacuated"}
    assert_true(crowd, told)
    # What the kill cost is had by the same command again.
    assert set(crowd.verdicts(crowd.empty("home")).values()) <= {"evacuated", "already-there"}
    crowd.intact_at("backup")


@pytest.mark.soak
def test_a_destination_host_dies_and_the_others_go_on(crowd: Crowd) -> None:
    ready_at_home(crowd)
    run = crowd.begin("home", evacuate_deadline="20m")
    theirs = {crowd.guests[name].plan.uuid for name in ("gamma", "delta")}
    wait_until(
        lambda: any(job["step"] == "migrate" and job["vm"] in theirs for job in crowd.jobs("home2")),
        "one of home2 is on its way",
    )
    crowd.lab.kill_host("backup2")
    assert run.end() != 0, "two VMs have nowhere to go"
    told = crowd.verdicts(crowd.report())
    assert {told["alpha"], told["beta"]} == {"evacuated"}
    assert not {"evacuated", "already-there"} & {told["gamma"], told["delta"]}
    assert_true(crowd, told)
    crowd.lab.start_host("backup2")
    wait_until(lambda: crowd.links_up("home2"), "backup2 is back")
    wait_until(lambda: crowd.protected("home2", "backup1"), "replicas are whole again", timeout_seconds=300)
    assert set(crowd.verdicts(crowd.empty("home")).values()) <= {"evacuated", "already-there"}
    crowd.intact_at("backup")


@pytest.mark.soak
def test_a_guest_that_outruns_its_mirror_gets_out_and_holds_nobody_up(crowd: Crowd) -> None:
    """Twenty synced writes a second over 180 ms: its disk's mirror alone never ends."""
    ready_at_home(crowd)
    plan = GuestPlan("ledger", ram_mib=96, disk_mib=64, content_mib=8, records_per_second=20)
    ledger = crowd.lab.guests.define("home1", plan)
    try:
        ledger.start()
        ledger.wait_ready()
        home = crowd.proxy("home1")
        home.request("PUT", f"/vms/{plan.uuid}", {"peer": "backup1", "rpo_seconds": 30, "priority": 90})
        wait_until(lambda: home.vm(plan.uuid)["generation"], "its replica is whole", timeout_seconds=300)
        canary = ledger.canary()
        report = crowd.empty("home", evacuate_vms=["ledger", "gamma"])
        asked = {plan.uuid, crowd.guests["gamma"].plan.uuid}
        told = {vm["name"]: vm for vm in report["vms"] if vm["vm"] in asked}
        assert {vm["verdict"] for vm in told.values()} == {"evacuated"}
        assert ledger.running_on() == ["backup1"]
        assert ledger.told().doubled_beats <= 1
        # It may have been let wait for the WAN by its proxy, or been stopped: its memory came along.
        assert told["ledger"]["rung"] in {"live", "paused"}
        print(
            f"ledger: {told['ledger']['rung']}, out after {told['ledger']['out_seconds']} s, stopped for "
            f"{told['ledger']['downtime_seconds']:.1f} s; gamma out after {told['gamma']['out_seconds']} s"
        )
        verdict = ledger.verify("backup1", canary=canary)
        assert verdict.intact, verdict.findings
    finally:
        for host in ("home1", "backup1"):
            if any(vm["uuid"] == plan.uuid for vm in crowd.proxy(host).get("/vms")["vms"]):
                crowd.proxy(host).request("DELETE", f"/vms/{plan.uuid}?keep_replica=true")
        ledger.remove()


def assert_true(crowd: Crowd, told: Mapping[str, str]) -> None:
    """Each verdict is what one finds: out means that it runs there, else at home, and nobody runs twice."""
    for name, verdict in told.items():
        home = PLANS[name][0]
        where = PEERS[home] if verdict in {"evacuated", "already-there"} else home
        assert crowd.guests[name].running_on() == [where], f"{name}: {verdict}"
