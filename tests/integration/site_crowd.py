# SPDX-License-Identifier: GPL-3.0-or-later
"""VMs on two pairs of hosts, and the playbook that an operator empties a site of them with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from integration.playbook_runner import INSTALLED, ROOT, PlaybookResult
from lifeboat_lab.errors import LabError
from lifeboat_lab.guests.guests import Guest
from lifeboat_lab.guests.plan import GuestPlan
from lifeboat_lab.lab import Lab
from lifeboat_lab.proxy import Proxy

RunPlaybook = Callable[..., PlaybookResult]
PEERS = {"home1": "backup1", "home2": "backup2"}
HOSTS = (*PEERS, *PEERS.values())
GUARD = "/var/lib/lifeboat/guard"
SCHEMA = json.loads((ROOT / "docs" / "evacuation-report.schema.json").read_text())


@dataclass(frozen=True)
class Member:
    """A VM of a crowd: what it is like, the host that it runs on, and what ``lifeboat_vms`` says of it."""

    plan: GuestPlan
    home: str
    wishes: Mapping[str, Any] = field(default_factory=dict)


def wait_until(true: Callable[[], object], what: str, *, timeout_seconds: float = 120) -> None:
    """Look twice a second. Raises AssertionError with ``what`` after the timeout."""
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
        """As the kernel does when memory runs out: only the one process; its workers are to end by
        themselves, which is waited for. Raises AssertionError where they do not."""
        workers = [process for process in _with_children(self.process.pid) if process != self.process.pid]
        assert workers, "nobody would be left for himself"
        self.process.kill()
        self.process.wait()
        wait_until(lambda: not any(_is_alive(worker) for worker in workers), "what was left behind ends")

    def stand_still(self) -> None:
        """As on a machine that is suspended, or that swaps: ansible-playbook and its workers, which have
        sessions of their own."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After :meth:`stand_still`."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for process in _with_children(self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def clean(self) -> None:
        if self.process.poll() is None:
            self.go_on()
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _is_alive(process: int) -> bool:
    """Whether it has not ended; one that nobody has waited for has."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _with_children(process: int) -> Iterator[int]:
    """A process and all that it has begun, itself first: what is stopped begins nothing more."""
    yield process
    for thread in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            for child in thread.read_text().split():
                yield from _with_children(int(child))


class Crowd:
    """The lab, its VMs, and how to empty a site of them."""

    def __init__(
        self,
        lab: Lab,
        playbook: RunPlaybook,
        members: Sequence[Member],
        guests: Mapping[str, Guest],
        work: Path,
    ) -> None:
        self.lab, self.guests, self.work = lab, guests, work
        self.homes = {member.plan.name: member.home for member in members}
        self.runs: list[Running] = []
        self.canaries = {name: guest.canary() for name, guest in guests.items()}
        self._wishes = {member.plan.name: member.wishes for member in members}
        self._playbook = playbook

    @property
    def variables(self) -> dict[str, Any]:
        listed = {
            host: [
                {"name": name, "rpo": "60s", **self._wishes[name]}
                for name, home in self.homes.items()
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
        given = self.work / f"variables-{len(self.runs)}.json"
        given.write_text(json.dumps(told))
        binaries = ROOT / ".venv" / "bin"
        command = self.lab.command(
            "controller",
            [
                str(binaries / "ansible-playbook"), "-i", str(ROOT / "inventories" / "lab"),
                "-e", f"@{given}", "lifeboat.evacuation.evacuate",
            ],
        )  # fmt: skip
        output = self.work / f"run-{len(self.runs)}.txt"
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
        self.runs.append(Running(process, output))
        return self.runs[-1]

    def empty(self, site: str, **variables: Any) -> dict[str, Any]:
        """Empty a site; its report."""
        run = self.begin(site, **variables)
        assert run.end() == 0, run.text[-6000:]
        return self.report()

    def clean(self) -> None:
        for run in self.runs:
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
        try:
            return all(job["ended"] for job in self.jobs(*HOSTS)) and self.protected(*HOSTS)
        except LabError:
            return False

    def links_up(self, host: str) -> bool:
        """The proxy of a host has its links."""
        try:
            return all(link["state"] == "up" for link in self.proxy(host).get("/links")["links"])
        except LabError:
            return False

    def knows_its_line(self, host: str, round_trip_seconds: float) -> bool:
        """The proxy of a host has forgotten the shorter path of before: what a queue is it judges by that."""
        links = self.proxy(host).get("/links")["links"]
        return all((link["least_round_trip_seconds"] or 0.0) >= round_trip_seconds for link in links)

    def intact_at(self, site: str) -> None:
        """Every VM runs once, at that site, with its memory as it was, and no two copies ever ran."""
        for name, guest in self.guests.items():
            home = self.homes[name]
            assert guest.running_on() == [home if site == "home" else PEERS[home]], name
            assert guest.canary() == self.canaries[name], f"{name}: memory"
            assert guest.told().doubled_beats <= 1, f"{name}: two copies ran"

    def verdicts_hold(self, told: Mapping[str, str]) -> None:
        """Each verdict is what one finds: out means that it runs there, else at home, and none runs twice."""
        for name, verdict in told.items():
            home = self.homes[name]
            where = PEERS[home] if verdict in {"evacuated", "already-there"} else home
            assert self.guests[name].running_on() == [where], f"{name}: {verdict}"

    def guarded(self, host: str, name: str) -> bool:
        """Whether a host is forbidden to start a VM: it has a tombstone."""
        path = f"{GUARD}/{self.guests[name].plan.uuid}.json"
        return self.lab.exec(host, "test", "-e", path, check=False).returncode == 0

    def ready_at_home(self) -> None:
        """Wherever the test before left them: all at home, protected, their replicas whole."""
        if not all(guest.running_on() == [self.homes[name]] for name, guest in self.guests.items()):
            wait_until(self.settled, "everybody has landed", timeout_seconds=240)
            assert self.begin("backup").end() == 0, self.runs[-1].text[-6000:]
        wait_until(lambda: self.protected(*PEERS), "protected at home", timeout_seconds=240)


@contextmanager
def crowd_at_home(
    lab: Lab, playbook: RunPlaybook, members: Sequence[Member], work: Path, *, wan: str
) -> Iterator[Crowd]:
    """VMs running at home and protected; between the sites it is ``wan`` from then on.

    For a lab whose both sites are set up. What others left there is removed, and so are these afterwards.
    """
    if not set(HOSTS) <= set(lab.settings.hosts):
        pytest.skip("needs all four hosts of the lab")
    forget_all(lab)
    for left in lab.guests.all():
        left.remove()
    guests = {}
    for member in members:
        guests[member.plan.name] = lab.guests.define(member.home, member.plan)
        guests[member.plan.name].start()
    for guest in guests.values():
        guest.wait_ready()
    crowd = Crowd(lab, playbook, members, guests, work)
    crowd.play("protect", lifeboat_vms_wait=True).require_success()
    lab.wan.set(wan)
    try:
        yield crowd
    finally:
        crowd.clean()
        lab.wan.set("none")
        lab.wan.heal()
        forget_all(lab)
        for guest in guests.values():
            guest.remove()


def forget_all(lab: Lab) -> None:
    """Nothing is protected any more, whoever left it so."""
    for host in HOSTS:
        proxy = Proxy(lab.host(host))
        for vm in proxy.get("/vms")["vms"]:
            proxy.unprotect(vm["uuid"], keep_replica=True)
