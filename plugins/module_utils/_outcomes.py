# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What became of the VMs that an evacuation does not move itself, and the report that all outcomes make.

Pure: from what proxies said last.
"""

from __future__ import annotations

import datetime
import typing as t

from ansible_collections.lifeboat.evacuation.plugins.module_utils._batch import left_behind, wire_bytes
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fleet import HostState
from ansible_collections.lifeboat.evacuation.plugins.module_utils._verdicts import JOB_FIGURES, totals
from ansible_collections.lifeboat.evacuation.plugins.module_utils._wait import job_out

Outcome = dict[str, t.Any]
Hosts = t.Mapping[str, HostState]

KEPT = (
    "id",
    "step",
    *JOB_FIGURES,
    "commanded_at",
    "ended_at",
)
# States of an arrival whose VM runs there.
_RUNS_THERE = frozenset({"activated", "landed"})


def silent(hosts: Hosts) -> list[str]:
    """Hosts that never answered: nobody knows what is on them but the inventory."""
    return sorted(name for name, host in hosts.items() if host.error and not host.status)


def runs_at(vm: str, destinations: Hosts) -> str | None:
    """The destination that says of itself that the VM (name or UUID) arrived and runs there."""
    for name, host in destinations.items():
        arrivals = [item for item in host.status.get("arrivals", []) if vm in (item["vm"], item["name"])]
        left = [int(job.get("epoch") or 0) for job in host.jobs
                if job_out(job) and vm in (job["vm"], job["name"])]  # fmt: skip
        newest = max(arrivals, key=lambda item: int(item.get("epoch") or 0), default=None)
        if newest is None or newest.get("state") not in _RUNS_THERE:
            continue
        # It may have gone on from there since.
        if int(newest.get("epoch") or 0) > max(left, default=-1):
            return name
    return None


def others(
    hosts: Hosts,
    destinations: Hosts,
    told: t.Sequence[Outcome],
    only: t.Collection[str] | None,
    expected: t.Mapping[str, t.Sequence[str]],
    may_stay: t.Sequence[str],
    *,
    check_mode: bool = False,
) -> list[Outcome]:
    """Outcomes of everybody who is not in ``told``.

    They are: who was out before; who is on a host that never answered, as far as the inventory (``expected``)
    knows; who runs and is not protected, or may, where libvirt does not say; and whoever of ``only`` is found
    nowhere.
    """
    known = {outcome["vm"] for outcome in told} | {outcome["name"] for outcome in told}
    # Two hosts may have VMs of one name.
    named = {(outcome.get("host"), outcome["name"]) for outcome in told}
    more: list[Outcome] = []

    def add(outcome: Outcome) -> None:
        more.append(outcome)
        known.update({outcome["name"], outcome["vm"]})
        named.add((outcome.get("host"), outcome["name"]))

    def asked_for(name: object, uuid: object = None) -> bool:
        return only is None or name in only or uuid in only

    unprotected = {vm["uuid"] for host in hosts.values() for vm in host.unprotected or ()}
    for host in hosts.values():
        # One that left once may have come home since: what is there now counts, not what a job says.
        home = unprotected | {domain["uuid"] for domain in host.domains or ()}
        for job in host.jobs:
            if job["vm"] in known | home or not job_out(job) or not asked_for(job["name"], job["vm"]):
                continue
            add({"name": job["name"], "vm": job["vm"], "host": host.name, "peer": job["peer"],
                 **{key: job.get(key) for key in KEPT},
                 "verdict": "already-there", "wire_bytes": wire_bytes(job)})  # fmt: skip
    for name in silent(hosts):
        for vm in expected.get(name, ()):
            # Known of another host it is the same VM, moved since, unless that host lists such a name, too.
            elsewhere = {host for host, known_name in named if known_name == vm and host != name}
            moved = any(vm not in expected.get(str(host), ()) for host in elsewhere)
            uuid_known = vm in {outcome["vm"] for outcome in (*told, *more)}
            if (name, vm) not in named and not moved and not uuid_known and asked_for(vm):
                add(_of_silent_host(vm, hosts[name], destinations))
    for host in hosts.values() if only is None else ():
        for outcome in left_behind(host.unprotected or (), may_stay, check_mode=check_mode):
            add({**outcome, "host": host.name})
    for host in hosts.values():
        for outcome in _left_shut_off(host, expected.get(host.name, ()), check_mode=check_mode):
            asked = asked_for(outcome["name"], outcome["vm"])
            if asked and outcome["vm"] not in known and not {outcome["name"], outcome["vm"]} & set(may_stay):
                add(outcome)
    for host in hosts.values():
        for vm in expected.get(host.name, ()) if host.domains is None else ():
            if vm not in known and vm not in may_stay and asked_for(vm):
                add(libvirt_silent(vm, host.name))
        if host.unprotected is None:
            add(libvirt_silent(f"unknown VMs of {host.name}", host.name))
    for name in only or ():
        if name not in known:
            add(_nowhere(name, hosts))
    return more


def _left_shut_off(host: HostState, listed: t.Sequence[str], *, check_mode: bool) -> list[Outcome]:
    """VMs that the inventory lists and that are on a host, shut off and not protected."""
    sentence = (
        "the inventory lists it, it is shut off here and not protected, so nothing of it is at the peer; "
        "protect it (playbooks/protect.yml), or name it in evacuate_leave_behind"
    )
    return [
        {"name": domain["name"], "vm": domain["uuid"], "host": host.name,
         "verdict": "would-fail" if check_mode else "stayed", "cause": "not-protected",
         "sentence": sentence}
        for domain in host.domains or ()
        if not domain.get("running") and not domain.get("peer")
        and (domain["name"] in listed or domain["uuid"] in listed)
    ]  # fmt: skip


def libvirt_silent(name: str, host: str) -> Outcome:
    """Of VMs, or of one that the inventory knows, that only libvirt could tell of, and it does not."""
    sentence = (
        f"libvirt of {host} did not say which VMs are there beside the protected ones; see `virsh list "
        "--all` there, and run the same command again"
    )
    return {"name": name, "vm": None, "host": host, "verdict": "failed", "cause": "hypervisor",
            "sentence": sentence}  # fmt: skip


def _of_silent_host(vm: str, host: HostState, destinations: Hosts) -> Outcome:
    there = runs_at(vm, destinations)
    outcome: Outcome = {"name": vm, "vm": None, "host": host.name, "peer": there}
    if there is not None:
        sentence = f"{there} says that it arrived there; {host.name} was not reached"
        return outcome | {"verdict": "already-there", "cause": "unreachable", "sentence": sentence}
    return outcome | {"verdict": "failed", "cause": "unreachable", "sentence": host.error}


def _nowhere(vm: str, hosts: Hosts) -> Outcome:
    gone = silent(hosts)
    fact = "neither protected on nor evacuated from any hypervisor that answered"
    fact += f"; {', '.join(gone)} did not" if gone else ""
    where = ", ".join(gone or sorted(hosts))
    return {"name": vm, "vm": None, "host": where, "verdict": "failed", "cause": "not-found",
            "sentence": fact}  # fmt: skip


def missing(outcomes: t.Sequence[Outcome]) -> list[str]:
    """Names of those that are found nowhere."""
    return [str(outcome["name"]) for outcome in outcomes if outcome.get("cause") == "not-found"]


def whole_report(
    site: str, hosts: Hosts, outcomes: t.Sequence[Outcome], began: float, ended: float, *, check_mode: bool
) -> dict[str, t.Any]:
    """The report without what the coordination adds; docs/evacuation-report.schema.json describes it."""
    return {
        "schema_version": 1,
        "site": site,
        "check_mode": check_mode,
        "started_at": iso(began),
        "ended_at": iso(ended),
        "hosts": sorted(hosts),
        "hosts_failed": silent(hosts),
        "totals": totals(outcomes),
        "vms": list(outcomes),
    }


def iso(at: float) -> str:
    """An instant as reports have it."""
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="seconds")
