# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Evacuate VMs of one host, a fixed number at a time, with lines that move while it goes on."""

from __future__ import annotations

import time
import typing as t

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.lifeboat.evacuation.plugins.module_utils._batch import (
    Batch,
    candidates,
    left_behind,
    verdict_line,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import in_words
from ansible_collections.lifeboat.evacuation.plugins.module_utils._outcomes import libvirt_silent

display = Display()

_POLL_SECONDS = 1.0
# The jobs go on without us: a line to the host that comes back within this time costs nothing.
_PATIENCE_SECONDS = 300.0
_RETRY_SECONDS = 5.0


class _Refused(Exception):
    """A module failed: the proxy, or the way to it, refused."""

    def __init__(self, result: t.Mapping[str, t.Any]) -> None:
        self.cause = str(result.get("cause") or "error")
        self.sentence = str(result.get("msg") or "the module gave no reason")
        self.findings = list(result.get("findings") or [])
        super().__init__(self.sentence)


class ActionModule(ActionBase):
    """The action plugin."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Evacuate, and return what became of each VM."""
        result: dict[str, t.Any] = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(
            argument_spec={
                "socket": {"type": "path"},
                "vms": {"type": "list", "elements": "str"},
                "parallel": {"type": "int", "default": 2},
                "progress": {"type": "float", "default": 5.0},
                "bandwidth": {"type": "str"},
                "leave_behind": {"type": "list", "elements": "str", "default": []},
            }
        )
        if arguments["parallel"] < 1 or arguments["progress"] < 1:
            fact = "parallel {}, progress {}".format(arguments["parallel"], arguments["progress"])
            result.update(failed=True, msg=f"{fact}: give 1 or more of each; nothing was started")
            return result
        self._task_vars = task_vars or {}
        self._host = str(self._task_vars.get("inventory_hostname", "?"))
        self._common = {"socket": arguments["socket"]} if arguments["socket"] else {}
        try:
            outcomes, changed = self._evacuate(arguments)
        except _Refused as error:
            result.update(failed=True, msg=error.sentence, cause=error.cause, findings=error.findings)
            return result
        result.update(changed=changed, vms=outcomes)
        return result

    def _evacuate(self, arguments: t.Mapping[str, t.Any]) -> tuple[list[dict[str, t.Any]], bool]:
        here = self._module("protected_vm_info")
        vms = here["vms"]
        jobs = self._module("evacuation_info")["evacuations"]
        names = candidates(vms, jobs, arguments["vms"])
        batch = Batch(names, vms, jobs, arguments["parallel"])
        # All of a host means those as well that nobody thought of.
        unprotected = here.get("unprotected") if arguments["vms"] is None else []
        staying = left_behind(unprotected or [], arguments["leave_behind"], check_mode=self._task.check_mode)
        if unprotected is None:
            staying.append(libvirt_silent(f"unknown VMs of {self._host}", self._host))
        if self._task.check_mode:
            return self._would(batch, names) + staying, bool(batch.starts())
        for outcome in staying:
            self._say(verdict_line(outcome))
        before = {str(job["id"]) for job in jobs}
        said, seen = time.monotonic(), set(batch.outcomes)
        self._say(batch.summary(time.time()))
        while not batch.done:
            for name in batch.starts():
                self._begin(batch, name, arguments["bandwidth"])
            if batch.running:
                time.sleep(_POLL_SECONDS)
                jobs = self._module("evacuation_info", patience=True)["evacuations"]
            lines = batch.update(jobs)
            # Those that were refused, or had ended when we asked for them, have not been told yet.
            told = {line.split(":", 1)[0] for line in lines}
            lines += [
                verdict_line(batch.outcomes[name]) for name in batch.outcomes if name not in seen | told
            ]
            seen = set(batch.outcomes)
            for line in lines:
                self._say(line)
            if lines:
                said = time.monotonic()
            elif time.monotonic() - said >= arguments["progress"]:
                self._say(batch.summary(time.time()))
                said = time.monotonic()
        outcomes = [batch.outcomes[name] for name in names] + staying
        return outcomes, any(outcome["id"] and outcome["id"] not in before for outcome in outcomes)

    def _begin(self, batch: Batch, name: str, bandwidth: str | None) -> None:
        arguments: dict[str, t.Any] = {"vm": name, "wait": False}
        if bandwidth:
            arguments["bandwidth"] = bandwidth
        try:
            job = self._module("evacuation", arguments, patience=True)["evacuation"]
        except _Refused as error:
            batch.refused(name, error.cause, error.sentence, error.findings)
            return
        batch.begun(name, job)
        if name in batch.running:
            self._say("{}: {}, to {}".format(name, job.get("step"), job.get("peer")))

    def _would(self, batch: Batch, names: t.Sequence[str]) -> list[dict[str, t.Any]]:
        waiting = [name for name in names if name not in batch.outcomes and name not in batch.running]
        findings = self._module("preflight_info", {"vms": waiting})["findings"] if waiting else []
        outcomes = list(batch.outcomes.values())
        for name in [*batch.running, *waiting]:
            found = [finding for finding in findings if finding["vm"] == name]
            stops = any(finding["stops"] for finding in found)
            verdict = "would-fail" if stops else "would-start" if name in waiting else "under-way"
            sentence = in_words(found)
            outcomes.append({"name": name, "verdict": verdict, "sentence": sentence, "findings": found})
        return outcomes

    def _module(
        self, name: str, arguments: t.Mapping[str, t.Any] | None = None, *, patience: bool = False
    ) -> dict[str, t.Any]:
        """Run one of our modules on the host; with patience a lost line to it is tried again for a while."""
        until = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                result: dict[str, t.Any] = self._execute_module(
                    module_name=f"lifeboat.evacuation.{name}",
                    module_args={**self._common, **(arguments or {})},
                    task_vars=self._task_vars,
                )
            except AnsibleConnectionFailure as error:
                result = {"unreachable": True, "msg": str(error)}
            if not result.get("unreachable"):
                break
            if not patience or time.monotonic() >= until:
                raise AnsibleConnectionFailure(str(result.get("msg")))
            self._say("no line to the host; its evacuations go on without us; trying again")
            time.sleep(_RETRY_SECONDS)
        if result.get("failed"):
            raise _Refused(result)
        return result

    def _say(self, text: str) -> None:
        display.display("{} [{}] {}".format(time.strftime("%H:%M:%S"), self._host, text))
