#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Tell the VMs of a hypervisor and what it has room for."""

from __future__ import annotations

DOCUMENTATION = r"""
module: hypervisor_info
short_description: Tell the VMs of a hypervisor, what they need, and what it has room for
version_added: 0.1.0
description:
  - Returns every VM that libvirt knows on the host, with the memory and the space that it would take at
    a peer, and the memory and the space that the host has left for others' VMs.
  - Playbook C(protect) places replicas by that.
extends_documentation_fragment:
  - lifeboat.evacuation.proxy
  - lifeboat.evacuation.attributes.info
  - lifeboat.evacuation.attributes.lifeboat_group
seealso:
  - module: lifeboat.evacuation.protected_vm
  - module: lifeboat.evacuation.precache_proxy_info
"""

EXAMPLES = r"""
- name: Look at what the host has room for
  lifeboat.evacuation.hypervisor_info:
  register: told

- name: Show it
  ansible.builtin.debug:
    msg: "{{ told.hypervisor.memory_free_bytes }} bytes of memory"
"""

RETURN = r"""
hypervisor:
  description: The hypervisor. docs/control-api.md tells every field.
  returned: success
  type: dict
  contains:
    name:
      description: Name of its proxy.
      type: str
    site:
      description: Site that it stands at.
      type: str
    memory_total_bytes:
      description: All of its memory.
      type: int
    memory_free_bytes:
      description: What a new guest could have of it.
      type: int
    store:
      description: Where replicas are kept, with C(size_bytes), C(free_bytes) and C(minimum_free_bytes).
      type: dict
    peers:
      description: The peers that its proxy has, with C(name) and C(state) of the link.
      type: list
      elements: dict
    domains:
      description: The VMs of the host, running or not; none where libvirt does not answer.
      type: list
      elements: dict
      contains:
        uuid:
          description: UUID of the VM.
          type: str
        name:
          description: Name of the VM.
          type: str
        running:
          description: Whether it runs.
          type: bool
        peer:
          description: Who keeps its replica; none where it is not protected.
          type: str
        coverage:
          description: Share of the allocated bytes that the replica holds.
          type: float
        memory_bytes:
          description: Its memory.
          type: int
        disk_bytes:
          description: What its own disks take now, and so their first copy.
          type: int
    moved_away:
      description: The VMs that may not start on the host any more, as they run elsewhere.
      type: list
      elements: dict
      contains:
        uuid:
          description: UUID of the VM.
          type: str
        name:
          description: Name that it had.
          type: str
        peer:
          description: Where it went.
          type: str
        sentence:
          description: How that came about, and what is left of it on the host.
          type: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import (
    ProxyClient,
    ProxyError,
    fail,
    proxy_arguments,
)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec=proxy_arguments(), supports_check_mode=True)
    try:
        hypervisor = ProxyClient(module.params["socket"]).get("/v1/hypervisor")
    except ProxyError as error:
        fail(module, error)
    module.exit_json(changed=False, hypervisor=hypervisor)


if __name__ == "__main__":
    main()
