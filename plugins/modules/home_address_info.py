#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Tell the IPv6 addresses that the VMs of a host keep wherever they run."""

from __future__ import annotations

DOCUMENTATION = r"""
module: home_address_info
short_description: Tell the IPv6 addresses that VMs keep wherever they run
version_added: 0.1.0
description:
  - Reads the home addresses of all VMs of the host, or of one, from their definitions.
extends_documentation_fragment:
  - lifeboat.evacuation.mobility.libvirt
  - lifeboat.evacuation.attributes.info
options:
  vm:
    description:
      - Name or UUID of one VM. All of the host if left out.
    type: str
seealso:
  - module: lifeboat.evacuation.home_address
"""

EXAMPLES = r"""
- name: Read the home addresses of all VMs
  lifeboat.evacuation.home_address_info:
  register: home
"""

RETURN = r"""
vms:
  description: VMs by name, also those without home addresses.
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
    addresses:
      description: Its home addresses.
      type: list
      elements: str
    cards:
      description: Which card (a MAC, a libvirt network or a bridge) an address is of, where that was said.
      type: dict
    learnt:
      description: Whether the mobility agent learnt them; false where somebody gave them.
      type: bool
    running:
      description: Whether the VM is active on this host.
      type: bool
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.lifeboat.evacuation.plugins.module_utils._home_addresses import cards, learnt, read
from ansible_collections.lifeboat.evacuation.plugins.module_utils._libvirt import (
    Hypervisor,
    LibvirtFailed,
    libvirt_arguments,
)


def _read_vm(hypervisor: Hypervisor, domain: t.Any) -> dict[str, t.Any]:
    definition = hypervisor.definition(domain)
    return {
        "name": domain.name(),
        "uuid": domain.UUIDString(),
        "addresses": read(definition),
        "cards": cards(definition),
        "learnt": learnt(definition),
        "running": bool(domain.isActive()),
    }


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec=dict(libvirt_arguments(), vm={"type": "str"}), supports_check_mode=True
    )
    try:
        hypervisor = Hypervisor(module, read_only=True)
        name = module.params["vm"]
        domains = hypervisor.domains() if name is None else [hypervisor.domain(name)]
        vms = []
        for domain in domains:
            try:
                vms.append(_read_vm(hypervisor, domain))
            except hypervisor.libvirt.libvirtError as error:
                # One of many may be undefined, or leave for another host, while they are read.
                if name is not None or error.get_error_code() != hypervisor.libvirt.VIR_ERR_NO_DOMAIN:
                    raise
    except LibvirtFailed as error:
        module.fail_json(msg=str(error))
    except hypervisor.libvirt.libvirtError as error:
        module.fail_json(msg=f"libvirt refused: {error}; try again")
    module.exit_json(changed=False, vms=sorted(vms, key=lambda vm: vm["name"]))


if __name__ == "__main__":
    main()
