# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Evacuating many VMs of one host, a fixed number at a time: pure bookkeeping, no input or output.

It remembers nothing that the proxy does not know: begun anew at any moment it comes to the same end.
"""

from __future__ import annotations

import typing as t

from ansible_collections.lifeboat.evacuation.plugins.module_utils._verdicts import JOB_FIGURES
from ansible_collections.lifeboat.evacuation.plugins.module_utils._wait import Job, Vm, job_out, job_settled

OUT = ("evacuated", "already-there", "restarted-from-replica")
_KEPT = (
    "name",
    "vm",
    "peer",
    "id",
    "step",
    "verdict",
    *JOB_FIGURES,
)


def candidates(vms: t.Sequence[Vm], jobs: t.Sequence[Job], names: t.Sequence[str] | None) -> list[str]:
    """Names of the VMs to see to: those protected here, higher priority first, then those that jobs had.

    ``names`` picks out of them, by name or UUID; None picks all. A VM that once stayed and is not protected
    any more is nobody's business unless it is named.
    """
    known: dict[str, str] = {}
    for vm in sorted(vms, key=lambda vm: (-int(vm.get("priority") or 0), str(vm["name"]))):
        known[str(vm["uuid"])] = str(vm["name"])
    for uuid, job in {str(job["vm"]): job for job in jobs}.items():
        if names is not None or job_out(job) or not job.get("ended"):
            known.setdefault(uuid, str(job["name"]))
    return [name for uuid, name in known.items() if names is None or name in names or uuid in names]


class Batch:
    """Which VMs are still to be begun, which are on their way, and what became of the others."""

    def __init__(
        self, names: t.Sequence[str], vms: t.Sequence[Vm], jobs: t.Sequence[Job], parallel: int
    ) -> None:
        self._parallel = parallel
        self._waiting: list[str] = []
        self._running: dict[str, dict[str, t.Any]] = {}
        self.outcomes: dict[str, dict[str, t.Any]] = {}
        protected = {str(vm["name"]) for vm in vms}
        latest = {str(job["name"]): job for job in jobs}
        for name in names:
            job = latest.get(name)
            if job is not None and not job.get("ended"):
                self._running[name] = dict(job)
            elif job is not None and job_out(job) and name not in protected:
                self.outcomes[name] = _outcome(dict(job, verdict="already-there"))
            else:
                self._waiting.append(name)

    @property
    def done(self) -> bool:
        """Every VM has its outcome."""
        return not self._waiting and not self._running

    @property
    def running(self) -> list[str]:
        """Names of the VMs that are on their way."""
        return list(self._running)

    def starts(self) -> list[str]:
        """The VMs to begin now."""
        return self._waiting[: max(self._parallel - len(self._running), 0)]

    def begun(self, name: str, job: Job) -> None:
        """The proxy took the job on, or had it."""
        self._waiting.remove(name)
        if job.get("ended") and job_out(job):
            self.outcomes[name] = _outcome(dict(job, verdict="already-there"))
        elif job_settled(job):
            self.outcomes[name] = _outcome(job)
        else:
            self._running[name] = dict(job)

    def refused(
        self, name: str, cause: str, sentence: str, findings: t.Sequence[t.Mapping[str, str]]
    ) -> None:
        """The proxy did not take it on: nothing was changed."""
        self._waiting.remove(name)
        self.outcomes[name] = _outcome(
            {
                "name": name,
                "verdict": "failed",
                "cause": cause,
                "sentence": sentence,
                "findings": list(findings),
            }
        )

    def update(self, jobs: t.Sequence[Job]) -> list[str]:
        """Take the jobs as they are now; a line for each VM whose step or verdict changed."""
        lines = []
        for job in jobs:
            name = str(job["name"])
            before = self._running.get(name)
            if before is None or before["id"] != job["id"]:
                continue
            if job_settled(job):
                del self._running[name]
                self.outcomes[name] = _outcome(job)
                lines.append(verdict_line(self.outcomes[name]))
            else:
                self._running[name] = dict(job)
                if job.get("step") != before.get("step"):
                    lines.append("{}: {}".format(name, job.get("step")))
        return lines

    def summary(self, now: float) -> str:
        """One line on all: what runs and for how long, how many wait, are out, are not."""
        on_the_way = ", ".join(
            "{} {} {:.0f} s".format(name, job.get("step"), max(now - _step_began(job, now), 0.0))
            for name, job in self._running.items()
        )
        out = sum(1 for outcome in self.outcomes.values() if outcome["verdict"] in OUT)
        parts = [
            f"{out} of {len(self.outcomes) + len(self._running) + len(self._waiting)} out",
            f"{len(self.outcomes) - out} not" if len(self.outcomes) > out else "",
            f"{len(self._waiting)} waiting" if self._waiting else "",
            f"under way: {on_the_way}" if on_the_way else "",
        ]
        return "; ".join(part for part in parts if part)


def left_behind(
    unprotected: t.Sequence[Vm], may_stay: t.Sequence[str], *, check_mode: bool = False
) -> list[dict[str, t.Any]]:
    """Outcomes of the VMs that run on a host and are not protected, but for those that may stay there."""
    return [
        _outcome(
            {
                "name": vm["name"],
                "vm": vm["uuid"],
                "verdict": "would-fail" if check_mode else "stayed",
                "cause": "not-protected",
                "sentence": "it runs here and is not protected, so nothing of it is at the peer; protect it "
                "(playbooks/protect.yml), move it by other means, or name it in evacuate_leave_behind",
                "findings": [],
            }
        )
        for vm in unprotected
        if vm["name"] not in may_stay and vm["uuid"] not in may_stay
    ]


def verdict_line(outcome: t.Mapping[str, t.Any]) -> str:
    """What became of a VM, in one line."""
    told = "{}: {}".format(outcome["name"], str(outcome["verdict"]).upper())
    if outcome.get("eviction_seconds") is not None:
        told += " in {:.1f} s".format(outcome["eviction_seconds"])
    if outcome.get("downtime_seconds") is not None:
        told += ", guest stopped for {:.2f} s".format(outcome["downtime_seconds"])
    # Out is out; but somebody may have to do something about it.
    if outcome.get("sentence") and (outcome["verdict"] not in OUT or outcome.get("cause") == "warning"):
        told += ": {}".format(outcome["sentence"])
    return told


def wire_bytes(job: Job) -> int | None:
    """What the job took on the channel, both ways, None where that was not measured."""
    counted = job.get("bytes") or {}
    sent, received = counted.get("channel_sent_wire_bytes"), counted.get("channel_received_wire_bytes")
    return None if sent is None or received is None else int(sent + received)


def _step_began(job: Job, now: float) -> float:
    steps = job.get("steps") or []
    return float(steps[-1].get("started_at") or now) if steps else now


def _outcome(job: Job) -> dict[str, t.Any]:
    told = {key: job.get(key) for key in _KEPT}
    told["wire_bytes"] = wire_bytes(job)
    if not told["verdict"]:
        told["verdict"] = "undecided" if job.get("step") == "undecided" else "failed"
    return told
