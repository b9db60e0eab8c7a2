#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Tell how protected VMs stand, and wait until their replicas are as fresh as asked for."""

from __future__ import annotations

DOCUMENTATION = r"""
module: protected_vm_info
short_description: Tell protected VMs, their lag and their coverage, and wait for them
version_added: 0.1.0
description:
  - Returns the VMs that the precache proxy of the host protects.
  - Can wait until replicas are sealed and their lag and coverage are as good as asked for.
extends_documentation_fragment:
  - lifeboat.evacuation.proxy
  - lifeboat.evacuation.proxy.wait
  - lifeboat.evacuation.attributes.info
  - lifeboat.evacuation.attributes.lifeboat_group
options:
  vm:
    description:
      - Name or UUID of one protected VM. All of the host if left out.
    type: str
  lag_bytes:
    description:
      - Wait until at most so many bytes changed since the last sealed generation.
    type: int
  lag_seconds:
    description:
      - Wait until the oldest change that is not yet at the peer is at most so old.
    type: float
  coverage:
    description:
      - Wait until at least this share, V(0.0) to V(1.0), of the allocated bytes is held by the replica.
    type: float
  wait:
    description:
      - Whether to wait until every VM has a sealed generation and meets O(lag_bytes), O(lag_seconds)
        and O(coverage).
  wait_timeout:
    description:
      - How many seconds to wait at most. The module fails after that, naming the VMs that are not there yet.
    default: 3600
seealso:
  - module: lifeboat.evacuation.protected_vm
"""

EXAMPLES = r"""
- name: Look at every protected VM
  lifeboat.evacuation.protected_vm_info:
  register: protected

- name: Wait until the first copy is done and hardly anything is left to send
  lifeboat.evacuation.protected_vm_info:
    vm: web1
    wait: true
    coverage: 1.0
    lag_bytes: 16777216
    wait_timeout: 7200
"""

RETURN = r"""
unprotected:
  description: >-
    Running VMs of the host that are not protected, so that an evacuation would leave them behind. None
    where libvirt does not answer, or O(vm) is given.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Name of the VM.
      type: str
    uuid:
      description: UUID of the VM.
      type: str
vms:
  description: The protected VMs by name. docs/control-api.md tells every field.
  returned: success
  type: list
  elements: dict
  contains:
    uuid:
      description: UUID of the VM.
      type: str
    name:
      description: Name of the VM.
      type: str
    peer:
      description: Who keeps the replica.
      type: str
    state:
      description: State of the protection.
      type: str
      sample: protected
    cause:
      description: Word for why it is in this state.
      type: str
    sentence:
      description: The same for people.
      type: str
    generation:
      description: Number of the last sealed generation; none while the first copy runs.
      type: int
    epoch:
      description: How often the VM's home has moved.
      type: int
    coverage:
      description: Share of the allocated bytes that the replica holds.
      type: float
    lag_bytes:
      description: Bytes changed since the last sealed generation.
      type: int
    lag_seconds:
      description: Age of the oldest change that is not yet at the peer.
      type: float
    rpo_seconds:
      description: The lag that was asked for.
      type: float
    rpo_kept:
      description: Whether the lag is within that; none while there is no sealed generation.
      type: bool
    priority:
      description: Order among the VMs of the host.
      type: int
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import (
    ProxyClient,
    ProxyError,
    fail,
    proxy_arguments,
    vm_path,
    wait_arguments,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._wait import replicated, wait_for


def read(client: ProxyClient, vm: str | None) -> dict[str, t.Any]:
    """One protected VM, or all and those that are not protected. Raises ProxyError."""
    if vm is not None:
        return {"vms": [client.get(vm_path(vm))], "unprotected": None}
    told = client.get("/v1/vms")
    return {"vms": told["vms"], "unprotected": told.get("unprotected")}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec=dict(
            proxy_arguments(),
            **wait_arguments(3600),
            vm={"type": "str"},
            lag_bytes={"type": "int"},
            lag_seconds={"type": "float"},
            coverage={"type": "float"},
        ),
        supports_check_mode=True,
    )
    parameters = module.params
    client = ProxyClient(parameters["socket"])
    limits = {key: parameters[key] for key in ("lag_bytes", "lag_seconds", "coverage")}

    def late(vms: list[dict[str, t.Any]]) -> list[dict[str, t.Any]]:
        return [vm for vm in vms if not replicated(vm, **limits)]

    try:
        told, good = wait_for(
            lambda: read(client, parameters["vm"]),
            lambda told: not parameters["wait"] or not late(told["vms"]),
            parameters["wait_timeout"],
            parameters["wait_sleep"],
        )
    except ProxyError as error:
        fail(module, error)
    vms = told["vms"]
    if not good:
        names = "; ".join(
            "{}: {}, {:.0%} covered, lag {} bytes, {} s{}".format(
                vm["name"],
                vm["state"],
                vm.get("coverage") or 0.0,
                vm.get("lag_bytes"),
                vm.get("lag_seconds"),
                " ({})".format(vm["sentence"]) if vm.get("sentence") else "",
            )
            for vm in late(vms)
        )
        module.fail_json(
            msg="not there after {} s: {}; wait longer, or raise the rate".format(
                parameters["wait_timeout"], names
            ),
            cause="timeout",
            findings=[],
            vms=vms,
        )
    module.exit_json(changed=False, **told)


if __name__ == "__main__":
    main()
