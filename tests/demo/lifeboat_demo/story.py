# SPDX-License-Identifier: GPL-3.0-or-later
"""The acts of the demonstration, in order; each says what it does before it does it."""

import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from lifeboat_bench.memory import measure
from lifeboat_demo.report import Report, VmResult
from lifeboat_lab import mobility, stock
from lifeboat_lab.controller import Controller
from lifeboat_lab.errors import LabError
from lifeboat_lab.guests.guests import Guest
from lifeboat_lab.guests.plan import GuestPlan
from lifeboat_lab.hosts import wait_for
from lifeboat_lab.lab import Lab
from lifeboat_lab.pings import PingWatch
from lifeboat_lab.probes import Seen
from lifeboat_lab.settings import DEFAULT_HOSTS, HOSTS

# Three kinds of VM, on both pairs of hypervisors.
CAST = {
    "log1": ("home1", GuestPlan("log1", workload="fsync-log", content_mib=96, disk_mib=256)),
    "busy1": (
        "home1",
        GuestPlan("busy1", workload="fsync-log,dirty-ram", content_mib=64, disk_mib=512, disks=2,
                  dirty_mib_per_second=1, dirty_mib=16),
    ),
    # One write a second: stock mirroring, which moves an equal of it, never catches up with more here.
    "quiet1": (
        "home2",
        GuestPlan("quiet1", workload="fsync-log", records_per_second=1, content_mib=384, disk_mib=640),
    ),
}  # fmt: skip
COMPARED = "quiet1"
EQUAL = "equal1"
# The internet leads a pair's home prefix to the anchor that is not the pair's own new gateway: every packet
# takes a tunnel, before and after. Both anchors stand at the site that stays.
ANCHORS = {"home1": "backup2", "home2": "backup1"}
BOUND_SECONDS = 60.0
# How long the client goes on after the evacuation: a VM that it has not seen again by then is lost to it.
WATCHED_SECONDS = 3.0
# A slow machine boots three guests under emulation at once.
BOOT_SECONDS = 180.0
BASELINE_SECONDS = 300.0
LAG_SECONDS = 300.0


class Story:
    """Tells itself with `say`, one line a step."""

    def __init__(self, lab: Lab, profile: str, say: Callable[[str], None]) -> None:
        self._lab = lab
        self._profile = profile
        self._say = say
        self._controller = Controller(lab)
        self._mobility = self._controller.work / "mobility.json"

    def tell(self) -> Report:
        """Everything from an empty machine to the report. Raises LabError where a step fails."""
        self._build()
        guests = self._start_guests()
        self._set_up()
        self._protect(guests)
        canaries = {name: guest.canary() for name, guest in guests.items()}
        self._lab.wan.set(self._profile)
        lab_profile = self._lab.wan.status()["profile"]
        self._say(f"the WAN is now {_describe(lab_profile)}")
        self._play("replication_status", "lag of every VM")
        outcomes, seen = self._evacuate(guests)
        self._say("checking every VM where it is now: file system, files, acknowledged writes, memory")
        results = [
            self._check(guests[name], outcomes.get(name, {}), canaries[name], seen[name]) for name in guests
        ]
        bound = self._bound(guests[COMPARED], outcomes.get(COMPARED, {}), lab_profile)
        baseline = self._baseline()
        compared = next(result for result in results if result.name == COMPARED)
        return Report(
            vms=tuple(results),
            compared=COMPARED,
            baseline_finished=baseline.finished,
            baseline_seconds=baseline.seconds,
            baseline_bytes=baseline.wire_bytes,
            baseline_downtime_seconds=baseline.downtime_seconds,
            reduction=1 - (compared.eviction_seconds or baseline.seconds) / baseline.seconds,
            bound_seconds=bound,
            makespan_seconds=_makespan_seconds(outcomes.values()),
            wan={**lab_profile, "name": _describe(lab_profile)},
        )

    def _build(self) -> None:
        self._say("building the lab: two sites with two hypervisors each, a WAN, a client, a controller")
        self._lab.up()
        # What an earlier run left would be found by this one.
        for guest in self._lab.guests.all():
            raise LabError(
                f"guest {guest.name}: left by an earlier run; `make lab-down` first, then `make demo` again"
            )
        self._lab.wan.set("none")

    def _start_guests(self) -> dict[str, Guest]:
        guests = {}
        for name, (host, plan) in CAST.items():
            self._say(f"starting {name} on {host}: {plan.workload}, {plan.disks} disk(s), {plan.ram_mib} MiB")
            guests[name] = self._lab.guests.define(host, plan)
            guests[name].start()
        for name, guest in guests.items():
            guest.wait_ready(BOOT_SECONDS)
            self._say(f"{name} is up")
        return guests

    def _set_up(self) -> None:
        prefixes = [HOSTS[host].guest_prefix for host in ANCHORS]
        groups = mobility.inventory(DEFAULT_HOSTS, ANCHORS.values(), prefixes)
        self._mobility.parent.mkdir(parents=True, exist_ok=True)
        self._mobility.write_text(json.dumps(groups))
        mobility.open_settings(self._lab, DEFAULT_HOSTS)
        self._play(
            "site_setup", "setting both sites up: certificates, proxies, libvirt hook, mobility agents"
        )

    def _protect(self, guests: dict[str, Guest]) -> None:
        places: dict[str, dict[str, Any]] = {}
        for guest in guests.values():
            listed = {"name": guest.name, "addresses": [guest.address]}
            places.setdefault(guest.home, {"lifeboat_vms": []})["lifeboat_vms"].append(listed)
        self._controller.set_host_variables(places)
        self._play("protect", "protecting the VMs at their peers, each with an address that it keeps")
        self._lead_prefixes(guests)
        deadline = time.monotonic() + LAG_SECONDS
        told = ""
        while True:
            vms = [vm for host in ("home1", "home2") for vm in self._proxy(host, "status")["vms"]]
            line = "; ".join(
                f"{vm['name']} {vm['state']} {vm['coverage']:.0%}, lag {(vm['lag_seconds'] or 0):.0f} s"
                for vm in vms
            )
            if line != told:
                self._say(line)
                told = line
            if len(vms) == len(guests) and all(vm["state"] == "protected" for vm in vms):
                return
            if time.monotonic() > deadline:
                raise LabError(f"not every VM is protected after {LAG_SECONDS:g} s: {line}")
            time.sleep(2)

    def _lead_prefixes(self, guests: dict[str, Guest]) -> None:
        def all_bound() -> bool:
            return all(
                mobility.holder(self._lab, ANCHORS[guest.home], guest.plan.uuid) == guest.home
                for guest in guests.values()
            )

        wait_for(all_bound, BOUND_SECONDS, 0.5)
        for home, anchor in ANCHORS.items():
            mobility.lead_prefix_to(self._lab, HOSTS[home].guest_prefix, anchor)

    def _evacuate(self, guests: dict[str, Guest]) -> tuple[dict[str, dict[str, Any]], dict[str, Seen]]:
        path = self._controller.work / "evacuation.json"
        self._say("a client at a third place pings every VM each 10 ms from now on")
        client = PingWatch(self._lab, {name: guest.address for name, guest in guests.items()})
        try:
            self._play("evacuate", "THE ALARM: evacuating site home",
                       {"evacuate_site": "home", "evacuate_report": str(path)})  # fmt: skip
            time.sleep(WATCHED_SECONDS)
        except BaseException:
            client.give_up()
            raise
        report = json.loads(path.read_text())
        return {outcome["name"]: outcome for outcome in report["vms"]}, client.end()

    def _check(self, guest: Guest, outcome: dict[str, Any], canary: str, seen: Seen) -> VmResult:
        findings: list[str] = []
        if not seen.goes_on:
            findings.append(f"its home address {guest.address} does not answer the client any more")
        running = guest.running_on()
        if len(running) != 1 or not running[0].startswith("backup"):
            findings.append(
                f"runs on {', '.join(running) or 'no host'}, not on exactly one at the backup site"
            )
        gap = guest.told().longest_gap_seconds()
        if len(running) == 1:
            findings += self._check_at(guest, running[0], canary)
        acknowledged = guest.told().highest_acknowledged
        bytes_told = outcome.get("bytes") or {}
        self._say(f"{guest.name}: {'nothing lost' if not findings else '; '.join(findings)}")
        return VmResult(
            name=guest.name,
            workload=guest.plan.workload,
            verdict=str(outcome.get("verdict", "failed")),
            eviction_seconds=outcome.get("eviction_seconds"),
            downtime_seconds=outcome.get("downtime_seconds"),
            guest_clock_gap_seconds=gap,
            client_gap_seconds=seen.longest_gap_seconds() if seen.goes_on else None,
            wire_bytes=bytes_told.get("channel_sent_wire_bytes"),
            ram_wire_bytes=bytes_told.get("ram_sent_bytes"),
            integrity=not findings,
            acknowledged_writes=acknowledged,
            findings=tuple(findings),
        )

    def _check_at(self, guest: Guest, host: str, canary: str) -> list[str]:
        # Held still for a moment: what is copied must be what the disk holds at one instant.
        self._lab.exec(host, "virsh", "suspend", guest.plan.uuid)
        try:
            findings = list(guest.verify(host).findings)
        finally:
            self._lab.exec(host, "virsh", "resume", guest.plan.uuid)
        if (now := guest.canary(host)) != canary:
            findings.append(f"memory: canary was {canary[:12]}, is {now[:12]}")
        return findings

    def _bound(self, guest: Guest, outcome: dict[str, Any], profile: dict[str, Any]) -> float:
        host = guest.running_on()[0]
        memory = measure(self._lab, guest, host)
        lag = int((outcome.get("bound") or {}).get("lag_bytes_at_command", 0))
        rate = float(profile["rate_bits_per_second"]) / 8
        self._say(
            f"{guest.name}: {memory.distinct_pages} distinct pages of memory, "
            f"{memory.compressed_bytes / 1e6:.1f} MB compressed"
        )
        return (memory.compressed_bytes + lag) / rate + 4 * float(profile["round_trip_seconds"])

    def _baseline(self) -> stock.StockMigration:
        host, plan = CAST[COMPARED]
        self._say(f"for comparison: {EQUAL}, a VM like {COMPARED}, by plain virsh migrate --copy-storage-all")
        equal = self._lab.guests.define(host, replace(plan, name=EQUAL, uuid=GuestPlan(EQUAL).uuid))
        equal.start()
        equal.wait_ready(BOOT_SECONDS)
        peer = self._lab.host(host).plan.peer
        assert peer is not None
        result = stock.migrate(self._lab, equal, host, peer, patience_seconds=BASELINE_SECONDS)
        self._say(
            f"{'that took' if result.finished else 'given up after'} {result.seconds:.1f} s and "
            f"{result.wire_bytes / 1e6:.0f} MB"
        )
        return result

    def _proxy(self, host: str, command: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._lab.exec(host, "precache-proxy", command, "--json").stdout)
        return answer

    def _play(self, playbook: str, what: str, variables: dict[str, Any] | None = None) -> None:
        self._say(f"{what} (ansible-playbook lifeboat.evacuation.{playbook})")
        options = ("-i", str(self._mobility))
        self._controller.playbook(playbook, variables, options=options, say=self._filter).require_success()

    def _filter(self, line: str) -> None:
        """Show what an operator would look at, not every header of a task."""
        if line.strip() and not line.startswith(("ok:", "skipping:", "included:", "PLAY [", "TASK [")):
            self._say(f"    {line.rstrip()[: shutil.get_terminal_size((120, 24)).columns - 14]}")


def _makespan_seconds(outcomes: Iterable[dict[str, Any]]) -> float:
    """From the first job's first step to the last job's last one."""
    steps = [step for outcome in outcomes for step in outcome.get("steps") or ()]
    ended = [float(step["ended_at"]) for step in steps if step["ended_at"] is not None]
    return max(ended, default=0.0) - min((float(step["started_at"]) for step in steps), default=0.0)


def _describe(profile: dict[str, Any]) -> str:
    return (
        f"{profile['name']}: {profile['rate_bits_per_second'] / 1e6:.0f} Mbit/s, "
        f"round trip {profile['round_trip_seconds'] * 1000:.0f} ms"
    )
