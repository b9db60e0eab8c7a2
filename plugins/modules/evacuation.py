#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Evacuate one VM, or end or settle its evacuation."""

from __future__ import annotations

DOCUMENTATION = r"""
module: evacuation
short_description: Evacuate one protected VM to its peer
version_added: 0.1.0
description:
  - Starts the evacuation of a VM on the host that it runs on, and waits for its verdict if told to.
  - The proxies own the job. It goes on when the controller goes away, and starting it again carries on
    with the same job.
extends_documentation_fragment:
  - lifeboat.evacuation.proxy
  - lifeboat.evacuation.proxy.wait
  - lifeboat.evacuation.attributes
  - lifeboat.evacuation.attributes.lifeboat_group
attributes:
  check_mode:
    support: full
    details:
      - In check mode the preflight is run, and what stands in the way fails the task.
  diff_mode:
    support: full
options:
  vm:
    description:
      - Name or UUID of the VM.
    type: str
    required: true
  state:
    description:
      - V(evacuated) starts the evacuation or carries on with it.
      - V(cancelled) cancels one that is under way. The VM stays at its source.
      - V(settled) tells an undecided one what holds, by O(decision).
    type: str
    choices: [evacuated, cancelled, settled]
    default: evacuated
  decision:
    description:
      - The operator's word on an undecided evacuation, required with O(state=settled).
      - V(source-dead), told on the B(destination), starts the VM there. Say so only when the source
        has lost power for good.
      - V(keep-at-source), told on the B(source), keeps the VM there.
    type: str
    choices: [source-dead, keep-at-source]
  bandwidth:
    description:
      - Rate that this evacuation may use, such as V(50Mbit/s), for its blocks and, after a live evacuation's
        freeze, for its migration (in whole MiB/s, at least one). Changes that of one that is under way; one
        that has sent everything goes on as it is.
    type: str
  mode:
    description:
      - V(live) moves the VM while it runs, with its memory.
      - V(restart) shuts the guest down on the source, sends what is left of its disks, and boots it on the
        destination, with its UEFI variables and TPM state. A VM that is shut off is moved so, and stays
        shut off.
      - An evacuation that is under way goes on as it was started; cancel it first to start it otherwise.
    type: str
    choices: [live, restart]
    default: live
  shutdown_seconds:
    description:
      - How long the guest may take to shut down with O(mode=restart).
    type: float
    default: 60
  power_off:
    description:
      - Whether a guest that does not shut down in time is powered off. What it was told to be on its disks
        is there then, what it had not synced is lost.
      - Otherwise the VM stays.
    type: bool
    default: true
  wait:
    description:
      - Whether to wait until the job has ended or is undecided. The task then fails unless the VM is out,
        or for O(state=cancelled) unless it stayed.
    default: true
  wait_timeout:
    description:
      - How many seconds to wait at most. The proxy goes on by itself after that.
    default: 3600
seealso:
  - module: lifeboat.evacuation.evacuation_info
  - module: lifeboat.evacuation.preflight_info
"""

EXAMPLES = r"""
- name: Evacuate a VM and wait for its verdict
  lifeboat.evacuation.evacuation:
    vm: web1

- name: Start an evacuation and let it go on by itself
  lifeboat.evacuation.evacuation:
    vm: web1
    wait: false

- name: Evacuate a VM whose memory is too much for the link, by booting it at its destination
  lifeboat.evacuation.evacuation:
    vm: warehouse
    mode: restart
    shutdown_seconds: 120

- name: The source site has burnt down, so start the VM that arrived paused
  lifeboat.evacuation.evacuation:
    vm: web1
    state: settled
    decision: source-dead
"""

RETURN = r"""
evacuation:
  description: >-
    The job as the proxy tells it, see docs/control-api.md. Empty in check mode when there is none yet.
  returned: success
  type: dict
  contains:
    id:
      description: Identifier of the job.
      type: str
    name:
      description: Name of the VM.
      type: str
    peer:
      description: Where it goes.
      type: str
    step:
      description: Where the job stands.
      type: str
      sample: migrate
    state:
      description: Instead of a step, where an arrival stands; with O(decision=source-dead).
      type: str
      sample: activated
    ended:
      description: Whether the job has ended.
      type: bool
    verdict:
      description: What became of the VM; none while the job runs.
      type: str
      sample: evacuated
    rung:
      description: How it went or goes, V(live), V(paused) or V(restart).
      type: str
      sample: live
    cause:
      description: Word for why.
      type: str
    sentence:
      description: The same for people.
      type: str
    eviction_seconds:
      description: Command to the source may lose power.
      type: float
    downtime_seconds:
      description: How long the guest did not run.
      type: float
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import (
    ProxyClient,
    ProxyError,
    fail,
    in_words,
    job_path,
    proxy_arguments,
    wait_arguments,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._wait import (
    Job,
    job_out,
    job_settled,
    wait_for,
)

_HELD_SECONDS = 20


class Evacuation:
    """One VM's evacuation: what is asked of it, and what came of it."""

    def __init__(self, client: ProxyClient, parameters: t.Mapping[str, t.Any], check_mode: bool) -> None:
        self._client = client
        self._parameters = parameters
        self._check_mode = check_mode

    def result(self) -> dict[str, t.Any]:
        """Do what is asked for. Raises ProxyError, also for a verdict that is not the one asked for."""
        before = self._latest()
        action = {
            "evacuated": self._evacuate,
            "cancelled": self._cancel,
            "settled": self._settle,
        }[self._parameters["state"]]
        changed, job = action(before)
        if self._parameters["wait"] and not self._check_mode and job:
            job = self._wait(job)
            self._judge(job)
        after = job
        if self._check_mode and changed:
            after = dict(job, **{"state" if "state" in job else "step": self._parameters["state"]})
        return {
            "changed": changed,
            "evacuation": job,
            "diff": {"before": _brief(before), "after": _brief(after)},
        }

    def _latest(self) -> dict[str, t.Any]:
        vm = self._parameters["vm"]
        jobs = self._client.get("/v1/evacuations", vm=vm)["evacuations"]
        return dict(jobs[-1]) if jobs else {}

    def _evacuate(self, before: Job) -> tuple[bool, dict[str, t.Any]]:
        running = bool(before) and not before.get("ended")
        if self._check_mode:
            if running:
                return False, dict(before)
            return self._preflight(before)
        body: dict[str, object] = {"vm": self._parameters["vm"], "mode": self._parameters["mode"]}
        if self._parameters["mode"] == "restart":
            body["shutdown_seconds"] = self._parameters["shutdown_seconds"]
            body["power_off"] = self._parameters["power_off"]
        if self._parameters["bandwidth"] is not None:
            body["bandwidth_bytes_per_second"] = self._parameters["bandwidth"]
        job = dict(self._client.request("POST", "/v1/evacuations", body))
        changed = job.get("id") != before.get("id")
        if running and self._parameters["bandwidth"] is not None:
            rate = {"bandwidth_bytes_per_second": self._parameters["bandwidth"]}
            try:
                job = dict(self._client.request("POST", job_path(job["id"], "steer"), rate))
            except ProxyError as error:
                # Refused once everything was sent: then there is nothing left to hold back.
                if error.cause != "conflict":
                    raise
        return changed, job

    def _preflight(self, before: Job) -> tuple[bool, dict[str, t.Any]]:
        vm = self._parameters["vm"]
        if job_out(before) and not self._protected():
            return False, dict(before)
        asked = {"vm": vm, "mode": self._parameters["mode"]}
        told = self._client.request("POST", "/v1/evacuations/check", asked)["findings"]
        findings = [finding for finding in told if finding.get("stops", True)]
        if findings:
            raise ProxyError("preflight", f"VM {vm}: cannot be evacuated: {in_words(findings)}", findings)
        return True, dict(before)

    def _protected(self) -> bool:
        known = self._client.get("/v1/vms")["vms"]
        return any(self._parameters["vm"] in (vm.get("name"), vm.get("uuid")) for vm in known)

    def _cancel(self, before: Job) -> tuple[bool, dict[str, t.Any]]:
        if not before or before.get("ended"):
            return False, dict(before)
        if self._check_mode:
            return True, dict(before)
        return True, dict(self._client.request("POST", job_path(before["id"], "cancel")))

    def _settle(self, before: Job) -> tuple[bool, dict[str, t.Any]]:
        decision = self._parameters["decision"]
        arrivals = self._client.get("/v1/arrivals")["arrivals"]
        here = [
            arrival
            for arrival in arrivals
            if self._parameters["vm"] in (arrival.get("vm"), arrival.get("name"), arrival.get("id"))
        ]
        here.sort(key=lambda arrival: (_is_open(arrival), arrival.get("epoch", 0)))
        job = dict(here[-1] if decision == "source-dead" and here else before)
        if not job:
            raise ProxyError(
                "not-found",
                "VM {}: no evacuation of it is known on this host; {} is told on the {}".format(
                    self._parameters["vm"],
                    decision,
                    "destination" if decision == "source-dead" else "source",
                ),
            )
        if job.get("state") == "prepared" and not _is_open(job):
            raise ProxyError(
                "conflict",
                f"VM {job.get('name')}: it still comes from {job.get('peer')}, which is heard; ask again "
                "once it is not, or cancel the evacuation there",
            )
        if not _is_open(job) and "undecided" not in (job.get("step"), job.get("verdict")):
            return False, job
        if self._check_mode:
            return True, job
        settled = self._client.request("POST", job_path(job["id"], "settle"), {"decision": decision})
        return True, dict(settled)

    def _wait(self, job: Job) -> dict[str, t.Any]:
        identifier = job["id"]
        if job.get("ended") or self._parameters["state"] == "settled":
            return dict(job)
        timeout = self._parameters["wait_timeout"]
        last, good = wait_for(
            lambda: self._client.get(job_path(identifier), wait_seconds=min(_HELD_SECONDS, timeout)),
            job_settled,
            timeout,
            self._parameters["wait_sleep"],
        )
        if not good:
            raise ProxyError(
                "timeout",
                f"VM {self._parameters['vm']}: still in step {last.get('step')} after {timeout} s; "
                "the proxy goes on by itself: look with evacuation_info",
            )
        return dict(last)

    def _judge(self, job: Job) -> None:
        state = self._parameters["state"]
        good = {"evacuated": job_out(job), "cancelled": job.get("verdict") == "stayed", "settled": True}[
            state
        ]
        if not good:
            raise ProxyError(
                str(job.get("cause") or job.get("verdict") or "error"),
                "VM {}: {}: {}".format(
                    job.get("name"), job.get("verdict"), job.get("sentence") or "no reason was given"
                ),
                job.get("findings") or (),
            )


def _is_open(job: Job) -> bool:
    """Whether it is an arrival whose VM waits for a word: arrivals have a state, jobs a step.

    One that is still coming waits for its source, and for an operator only once that is not heard any more.
    """
    return job.get("state") == "released" or (
        job.get("state") == "prepared" and job.get("cause") == "no-contact"
    )


def _brief(job: Job) -> dict[str, t.Any]:
    keys = ("id", "name", "peer", *(("state",) if "state" in job else ("step", "verdict")))
    return {key: job.get(key) for key in keys} if job else {}


def main() -> None:
    """Run the module."""
    waiting = wait_arguments(3600)
    waiting["wait"]["default"] = True
    module = AnsibleModule(
        argument_spec=dict(
            proxy_arguments(),
            **waiting,
            vm={"type": "str", "required": True},
            state={"type": "str", "choices": ["evacuated", "cancelled", "settled"], "default": "evacuated"},
            decision={"type": "str", "choices": ["source-dead", "keep-at-source"]},
            bandwidth={"type": "str"},
            mode={"type": "str", "choices": ["live", "restart"], "default": "live"},
            shutdown_seconds={"type": "float", "default": 60},
            power_off={"type": "bool", "default": True},
        ),
        required_if=[("state", "settled", ["decision"])],
        supports_check_mode=True,
    )
    client = ProxyClient(module.params["socket"])
    try:
        result = Evacuation(client, module.params, module.check_mode).result()
    except ProxyError as error:
        fail(module, error)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
