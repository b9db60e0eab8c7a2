#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Tell where an anchor sends the packets of VMs' home addresses."""

from __future__ import annotations

DOCUMENTATION = r"""
module: binding_info
short_description: Tell where an anchor sends the packets for VMs' home addresses
version_added: 0.1.0
description:
  - Reads the bindings of the anchor that the task runs on.
extends_documentation_fragment:
  - lifeboat.evacuation.mobility
  - lifeboat.evacuation.attributes.info
options:
  vm:
    description:
      - UUID of one VM. All that are bound if left out.
    type: str
  withdrawn:
    description:
      - Whether to tell bindings that were withdrawn or ended, too. Their epochs still count.
    type: bool
    default: false
seealso:
  - module: lifeboat.evacuation.home_address_info
"""

EXAMPLES = r"""
- name: See where all VMs are
  lifeboat.evacuation.binding_info:
  delegate_to: anchor1
  register: bindings
"""

RETURN = r"""
bindings:
  description: Bindings by UUID of the VM.
  returned: success
  type: list
  elements: dict
  contains:
    vm:
      description: UUID of the VM.
      type: str
    addresses:
      description: Its home addresses.
      type: list
      elements: str
    care_of:
      description: Address at which the tunnel to its gateway ends.
      type: str
    gateway:
      description: Name of the gateway that registered it.
      type: str
    state:
      description: V(bound) or V(withdrawn).
      type: str
    since_seconds:
      description: Since when it is there, in seconds since 1970.
      type: float
    epoch:
      description: How often the VM's home has moved.
      type: int
    sequence:
      description: Sequence number of the last registration.
      type: int
    expires_in_seconds:
      description: When it ends unless it is refreshed; none for one that was withdrawn.
      type: float
"""

from urllib.parse import quote

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.lifeboat.evacuation.plugins.module_utils._agent import AgentClient, agent_arguments
from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import ProxyError, fail


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec=dict(
            agent_arguments(), vm={"type": "str"}, withdrawn={"type": "bool", "default": False}
        ),
        supports_check_mode=True,
    )
    client, vm = AgentClient(module.params["socket"]), module.params["vm"]
    try:
        if vm is None:
            bindings = client.get("/v1/bindings", all=module.params["withdrawn"])["bindings"]
        else:
            bindings = [client.get("/v1/bindings/{}".format(quote(vm, safe="")))]
    except ProxyError as error:
        fail(module, error)
    module.exit_json(changed=False, bindings=sorted(bindings, key=lambda binding: binding["vm"]))


if __name__ == "__main__":
    main()
