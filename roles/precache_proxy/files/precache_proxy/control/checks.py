# SPDX-License-Identifier: GPL-3.0-or-later
"""Named checks of a running proxy: what an operator must know before the day that it counts.

Each check is a method that yields results; all run, all results are told. ``precache-proxy check`` prints
them, GET /v1/check returns them.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path

from precache_proxy.control.answers import Answer, proxy_answer, scratch_files
from precache_proxy.control.parts import Parts
from precache_proxy.durable import read_json
from precache_proxy.errors import LifeboatError
from precache_proxy.evacuation.arrival import NO_CONTACT
from precache_proxy.units import format_bytes, format_seconds

CLOCK_METHOD = "control.clock"
HOOK_PATH = Path("/etc/libvirt/hooks/qemu.d/lifeboat")

_DAY_SECONDS = 86400.0
_CERTIFICATE_WARNING_SECONDS = 30 * _DAY_SECONDS
_CERTIFICATE_CRITICAL_SECONDS = 7 * _DAY_SECONDS
# Deadlines and windows are the sites' own; beyond this the reports of two hosts cannot be laid side by side.
_CLOCK_WARNING_SECONDS = 1.0
_CLOCK_CRITICAL_SECONDS = 60.0
_CLOCK_TIMEOUT_SECONDS = 5.0
# A file this young may belong to a pass that is just opening.
_SCRATCH_AGE_SECONDS = 120.0
# How often an RPO may be missed before it counts as broken rather than late.
_RPO_CRITICAL_FACTOR = 4.0


class Severity(IntEnum):
    """Nagios' exit codes."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


@dataclass(frozen=True)
class CheckResult:
    """One fact: which check, of which thing, how bad, in one sentence with the way out.

    ``seconds`` is how long a peer that was asked for it took to answer; None where nobody was.
    """

    check: str
    subject: str
    severity: Severity
    sentence: str
    seconds: float | None = None


def worst(severities: list[Severity]) -> Severity:
    """The severity that the whole has; a known critical counts above an unknown."""
    if not severities:
        return Severity.UNKNOWN
    rank = (Severity.OK, Severity.UNKNOWN, Severity.WARNING, Severity.CRITICAL)
    return max(severities, key=rank.index)


def _waits_for_contact(arrival: Answer) -> bool:
    """Once it runs here there is nothing left to say about it, whatever cause its record bears."""
    return arrival.get("cause") == NO_CONTACT and arrival.get("state") in {"prepared", "released"}


async def run_checks(parts: Parts, *, hook: Path = HOOK_PATH) -> list[CheckResult]:
    """The results of every check, in the order in which they are written below."""
    checks = Checks(parts, await proxy_answer(parts), hook)
    results: list[CheckResult] = []
    for name in [name for name in vars(Checks) if name.startswith("check_")]:
        try:
            results.extend([result async for result in getattr(checks, name)()])
        except LifeboatError as error:
            results.append(CheckResult(name[6:], "-", Severity.UNKNOWN, error.message))
    return results


class Checks:
    """The checks, on one answer of the proxy about itself."""

    def __init__(self, parts: Parts, status: Answer, hook: Path) -> None:
        self._parts = parts
        self._status = status
        self._hook = hook

    async def check_libvirt(self) -> AsyncIterator[CheckResult]:
        """Libvirt answers."""
        told = self._status["hypervisor"]
        severity = Severity.OK if told["connected"] else Severity.CRITICAL
        way_out = "" if told["connected"] else "; see systemctl status libvirtd"
        yield CheckResult("libvirt", told["uri"], severity, f"{told['sentence']}{way_out}")

    async def check_link(self) -> AsyncIterator[CheckResult]:
        """Every peer is reached."""
        if not self._status["links"]:
            yield CheckResult("link", "-", Severity.WARNING, "no peer is configured; set lifeboat_peers")
        for link in self._status["links"]:
            if link["state"] == "up":
                rtt = link["round_trip_seconds"]
                sentence = "up" if rtt is None else f"up, round trip {format_seconds(rtt)}"
                yield CheckResult("link", link["peer"], Severity.OK, sentence)
            else:
                sentence = f"{link['state']}: {link['sentence'] or link['cause']}"
                yield CheckResult("link", link["peer"], Severity.CRITICAL, sentence)

    async def check_clock(self) -> AsyncIterator[CheckResult]:
        """The peers' clocks show our time."""
        for peer, link in sorted(self._parts.channel.links.items()):
            if link.state != "up":
                continue
            before = time.time()
            try:
                answer = await link.call(CLOCK_METHOD, {}, timeout_seconds=_CLOCK_TIMEOUT_SECONDS)
            except LifeboatError as error:
                yield CheckResult("clock", peer, Severity.UNKNOWN, error.message)
                continue
            after = time.time()
            # The answer was written half a round trip ago, give or take that half.
            offset = abs(answer["time_seconds"] - (before + after) / 2) - (after - before) / 2
            yield replace(self._clock_result(peer, max(offset, 0.0)), seconds=after - before)

    @staticmethod
    def _clock_result(peer: str, offset: float) -> CheckResult:
        if offset < _CLOCK_WARNING_SECONDS:
            return CheckResult("clock", peer, Severity.OK, f"within {format_seconds(max(offset, 0.001))}")
        severity = Severity.CRITICAL if offset >= _CLOCK_CRITICAL_SECONDS else Severity.WARNING
        sentence = f"at least {format_seconds(offset)} apart; see timedatectl on both hosts"
        return CheckResult("clock", peer, severity, sentence)

    async def check_certificate(self) -> AsyncIterator[CheckResult]:
        """Our certificate is good for a while."""
        told = self._status["certificate"]
        left = told["seconds_left"]
        if left is None or left < _CERTIFICATE_CRITICAL_SECONDS:
            severity = Severity.CRITICAL
        else:
            severity = Severity.WARNING if left < _CERTIFICATE_WARNING_SECONDS else Severity.OK
        # What cannot be read says its own way out.
        way_out = "" if severity is Severity.OK or left is None else "; run site_setup to renew it"
        yield CheckResult("certificate", told["path"], severity, f"{told['sentence']}{way_out}")

    async def check_rpo(self) -> AsyncIterator[CheckResult]:
        """Every protected VM's replica is as fresh as was asked for."""
        if not self._status["vms"]:
            yield CheckResult("rpo", "-", Severity.OK, "no VM is protected here")
        for vm in self._status["vms"]:
            yield self._rpo_result(vm)

    @staticmethod
    def _rpo_result(vm: Answer) -> CheckResult:
        lag, rpo = vm.get("lag_seconds") or 0.0, vm["rpo_seconds"]
        why = f": {vm['sentence']}" if vm.get("sentence") else ""
        if vm["rpo_kept"] is None:
            coverage = vm.get("coverage")
            share = "" if coverage is None else f", {coverage:.0%} covered"
            sentence = f"no sealed generation yet ({vm['state']}{share}){why}"
            return CheckResult("rpo", vm["name"], Severity.WARNING, sentence)
        if vm["rpo_kept"]:
            sentence = f"lag {format_seconds(lag)} of {format_seconds(rpo)}"
            return CheckResult("rpo", vm["name"], Severity.OK, sentence)
        severity = Severity.CRITICAL if lag > _RPO_CRITICAL_FACTOR * rpo else Severity.WARNING
        sentence = f"lag {format_seconds(lag)} is over the RPO of {format_seconds(rpo)} ({vm['state']}){why}"
        return CheckResult("rpo", vm["name"], severity, sentence)

    async def check_disks(self) -> AsyncIterator[CheckResult]:
        """Every disk of every protected VM is in its replica."""
        for vm in self._status["vms"]:
            left_out = vm.get("refused_disks")
            if left_out:
                sentence = (
                    f"disk {', '.join(left_out)} cannot be protected as it is and would be left behind, so "
                    "no evacuation begins; the preflight says why: detach it, or protect the VM again with "
                    "raw_overlay_consent"
                )
                yield CheckResult("disks", vm["name"], Severity.CRITICAL, sentence)
            else:
                yield CheckResult("disks", vm["name"], Severity.OK, "all that it has are in the replica")

    async def check_scrub(self) -> AsyncIterator[CheckResult]:
        """No replica was found to differ from its source in the last whole turn, or since."""
        for vm in self._status["vms"]:
            ever, recent = (vm["scrub"][key] for key in ("different_blocks", "recent_different_blocks"))
            if recent:
                sentence = (
                    f"{recent} blocks differed and were sent again; look at the disks of both hosts. "
                    f"`precache-proxy verify {vm['name']}` compares everything now: when nothing differs any "
                    "more, or a whole scrub has found nothing, this ends"
                )
                yield CheckResult("scrub", vm["name"], Severity.CRITICAL, sentence)
            else:
                sentence = "no difference found"
                if ever:
                    sentence = f"no difference in the last whole turn ({ever} blocks before that)"
                yield CheckResult("scrub", vm["name"], Severity.OK, sentence)

    async def check_store_space(self) -> AsyncIterator[CheckResult]:
        """The store has room."""
        store = self._status["store"]
        free, least = store["free_bytes"], store["minimum_free_bytes"]
        if free is None:
            sentence = "is not there; the role lifeboat.evacuation.precache_proxy makes it"
            yield CheckResult("store-space", store["directory"], Severity.CRITICAL, sentence)
            return
        severity = (
            Severity.OK if free >= 2 * least else Severity.WARNING if free >= least else Severity.CRITICAL
        )
        way_out = "" if severity is Severity.OK else f", {format_bytes(least)} must stay; free or add space"
        yield CheckResult("store-space", store["directory"], severity, f"{format_bytes(free)} free{way_out}")

    async def check_scratch(self) -> AsyncIterator[CheckResult]:
        """No pass left its scratch file behind."""
        left = await asyncio.to_thread(self._leftover_scratch)
        directory = str(self._parts.config.source.scratch_directory)
        if left:
            names = ", ".join(path.name for path in left[:3]) + (" and more" if len(left) > 3 else "")
            sentence = f"{len(left)} scratch file(s) of no open pass: {names}; remove them"
            yield CheckResult("scratch", directory, Severity.WARNING, sentence)
        else:
            yield CheckResult("scratch", directory, Severity.OK, "nothing left over")

    def _leftover_scratch(self) -> list[Path]:
        # Ballast belongs to a pass for as long as its record is there.
        named: set[str] = set()
        for record in (self._parts.config.paths.run / "passes").glob("*.json"):
            told = read_json(record)
            named.update(str(path) for path in (told or {}).get("scratch", ()))
            named.add(str(self._parts.config.source.scratch_directory / f".ballast.{record.stem}"))
        left = []
        for path in scratch_files(self._parts):
            try:
                young = time.time() - path.stat().st_mtime < _SCRATCH_AGE_SECONDS
            except FileNotFoundError:
                continue
            if str(path) not in named and not young:
                left.append(path)
        return left

    async def check_hook(self) -> AsyncIterator[CheckResult]:
        """The libvirt hook that refuses a forbidden start is in place."""
        there = self._hook.is_file() and os.access(self._hook, os.X_OK)
        sentence = (
            "in place" if there else "missing or not executable: a VM could start twice; run site_setup"
        )
        yield CheckResult("hook", str(self._hook), Severity.OK if there else Severity.CRITICAL, sentence)

    async def check_starts(self) -> AsyncIterator[CheckResult]:
        """Every protected VM that was to start with this host has done so."""
        waiting = [vm for vm in self._status["vms"] if vm.get("start_waits")]
        for vm in waiting:
            sentence = f"it was to start with this host and does not run yet: {vm['start_waits']}"
            yield CheckResult("starts", vm["name"], Severity.CRITICAL, sentence)
        if not waiting:
            yield CheckResult("starts", "-", Severity.OK, "none waits")

    async def check_evacuations(self) -> AsyncIterator[CheckResult]:
        """No job waits for an operator's word."""
        waiting = [
            job
            for job in [*self._status["evacuations"], *self._status["arrivals"]]
            if "undecided" in (job.get("step"), job.get("verdict")) or _waits_for_contact(job)
        ]
        for job in waiting:
            sentence = f"undecided: {job.get('sentence') or 'no contact'}; see precache-proxy settle --help"
            yield CheckResult("evacuations", str(job.get("name")), Severity.CRITICAL, sentence)
        if not waiting:
            yield CheckResult("evacuations", "-", Severity.OK, "none waits for a decision")
