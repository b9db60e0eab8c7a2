#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Protect a VM: keep a replica of its disks at a peer."""

from __future__ import annotations

DOCUMENTATION = r"""
module: protected_vm
short_description: Protect a running VM by a replica of its disks at a peer
version_added: 0.1.0
description:
  - Lets the precache proxy of the host keep a replica of a VM's disks at a peer, or ends that.
  - The first copy runs in the background. Use M(lifeboat.evacuation.protected_vm_info) to wait for it.
extends_documentation_fragment:
  - lifeboat.evacuation.proxy
  - lifeboat.evacuation.attributes
  - lifeboat.evacuation.attributes.lifeboat_group
attributes:
  check_mode:
    support: full
    details:
      - What the proxy, or the peer that it asks, would refuse is refused in check mode, too. A peer that
        cannot be asked is a warning.
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
      - V(protected) keeps a replica, V(unprotected) ends that.
    type: str
    choices: [protected, unprotected]
    default: protected
  peer:
    description:
      - Name of the peer that keeps the replica. May be left out when the host has one peer, or for a
        VM that is protected already.
    type: str
  rpo:
    description:
      - How old the oldest change that is not yet at the peer may become. Seconds, or a text such as
        V(15s) or V(20m).
      - For a VM that is not yet protected the default is what the proxy is configured with (15
        seconds unless changed).
    type: str
  priority:
    description:
      - Order among the VMs of a host, V(0) to V(100); the higher is served first, and
        weighs more in an evacuation (ten steps double).
      - For a VM that is not yet protected the default is V(50).
    type: int
  disks:
    description:
      - Target names (V(vda)) of the disks to protect. All writable disks if left out.
      - A VM that has a disk which is not protected cannot be evacuated.
    type: list
    elements: str
  raw_overlay_consent:
    description:
      - Raw images cannot hold the bitmaps that tracking needs. With V(true) a qcow2 overlay is put
        upon each raw disk while
        the VM runs; the VM's definition then names that overlay. Without, a VM with a raw disk is refused.
    type: bool
  keep_replica:
    description:
      - With O(state=unprotected), whether the replica stays at the peer as it is.
    type: bool
    default: true
seealso:
  - module: lifeboat.evacuation.protected_vm_info
  - module: lifeboat.evacuation.evacuation
"""

EXAMPLES = r"""
- name: Protect a VM with the host's only peer
  lifeboat.evacuation.protected_vm:
    vm: web1

- name: Protect a database more tightly
  lifeboat.evacuation.protected_vm:
    vm: database
    peer: backup1.example
    rpo: 5s
    priority: 90

- name: End protection and remove the replica
  lifeboat.evacuation.protected_vm:
    vm: web1
    state: unprotected
    keep_replica: false
"""

RETURN = r"""
vm:
  description: >-
    The VM as the proxy tells it, see docs/control-api.md. In check mode what would hold, as far as it
    is known.
  returned: success
  type: dict
  contains:
    uuid:
      description: UUID of the VM.
      type: str
    name:
      description: Name of the VM.
      type: str
    state:
      description: State of the protection, V(unprotected) without one.
      type: str
      sample: seeding
    peer:
      description: Who keeps the replica.
      type: str
    rpo_seconds:
      description: The lag in seconds that was asked for.
      type: float
    priority:
      description: Order among the VMs of the host.
      type: int
    sentence:
      description: Why it is in this state.
      type: str
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import (
    ProxyClient,
    ProxyError,
    fail,
    proxy_arguments,
    vm_path,
)

_ASKED = {
    "peer": "peer",
    "rpo": "rpo_seconds",
    "priority": "priority",
    "disks": "disks",
    "raw_overlay_consent": "raw_overlay_consent",
}


class ProtectedVm:
    """The difference between what holds and what is asked for, and the requests that close it."""

    def __init__(self, client: ProxyClient, parameters: t.Mapping[str, t.Any], check_mode: bool) -> None:
        self._client = client
        self._parameters = parameters
        self._check_mode = check_mode
        self._path = vm_path(parameters["vm"])
        # what the proxy could not find out
        self.notes: list[str] = []

    def result(self) -> dict[str, t.Any]:
        """Bring the state about, or in check mode only tell. Raises ProxyError."""
        if self._parameters["state"] == "protected":
            return self._protected()
        return self._unprotected()

    def _protected(self) -> dict[str, t.Any]:
        asked = {
            field: self._parameters[option]
            for option, field in _ASKED.items()
            if self._parameters[option] is not None
        }
        # The proxy itself judges and fills the gaps: one set of rules, in check mode as without.
        plan = self._client.request("PUT", self._path, asked, {"check_only": True})
        self.notes = list(plan.get("notes", ()))
        before, after = plan["present"] or {"state": "unprotected"}, plan["wanted"]
        changed = before != after
        if changed and not self._check_mode:
            vm = self._client.request("PUT", self._path, asked)
        elif plan["present"]:
            vm = dict(self._client.get(self._path), **(after if changed else {}))
        else:
            vm = dict(after, name=self._parameters["vm"])
        return {"changed": changed, "vm": vm, "diff": {"before": before, "after": after}}

    def _unprotected(self) -> dict[str, t.Any]:
        try:
            present = self._client.get(self._path)
        except ProxyError as error:
            if error.cause != "not-found":
                raise
            vm = {"name": self._parameters["vm"], "state": "unprotected"}
            return {"changed": False, "vm": vm, "diff": {"before": vm, "after": vm}}
        before = {key: present.get(key) for key in ("name", "state", "peer")}
        after = {"name": present.get("name"), "state": "unprotected"}
        vm = dict(after, uuid=present.get("uuid"))
        if not self._check_mode:
            vm = self._client.request(
                "DELETE", self._path, query={"keep_replica": self._parameters["keep_replica"]}
            )
        return {"changed": True, "vm": vm, "diff": {"before": before, "after": after}}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec=dict(
            proxy_arguments(),
            vm={"type": "str", "required": True},
            state={"type": "str", "choices": ["protected", "unprotected"], "default": "protected"},
            peer={"type": "str"},
            rpo={"type": "str"},
            priority={"type": "int"},
            disks={"type": "list", "elements": "str"},
            raw_overlay_consent={"type": "bool"},
            keep_replica={"type": "bool", "default": True},
        ),
        supports_check_mode=True,
    )
    client = ProxyClient(module.params["socket"])
    try:
        protected = ProtectedVm(client, module.params, module.check_mode)
        result = protected.result()
    except ProxyError as error:
        fail(module, error)
    for note in protected.notes:
        module.warn(note)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
