#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Tell everything that stands in the way of evacuating VMs."""

from __future__ import annotations

DOCUMENTATION = r"""
module: preflight_info
short_description: Tell everything that stands in the way of an evacuation
version_added: 0.1.0
description:
  - Asks the precache proxy, and through it the peer, what would stop an evacuation of a VM now. Changes
    nothing.
  - All findings are returned at once. Finding something is not a failure of the module.
extends_documentation_fragment:
  - lifeboat.evacuation.proxy
  - lifeboat.evacuation.attributes.info
  - lifeboat.evacuation.attributes.lifeboat_group
options:
  vms:
    description:
      - Names or UUIDs of VMs. All protected VMs of the host if left out.
    type: list
    elements: str
seealso:
  - module: lifeboat.evacuation.evacuation
"""

EXAMPLES = r"""
- name: Could everything be evacuated now?
  lifeboat.evacuation.preflight_info:
  register: preflight
"""

RETURN = r"""
vms:
  description: The VMs that were looked at.
  returned: success
  type: list
  elements: str
findings:
  description: What stands in the way.
  returned: success
  type: list
  elements: dict
  contains:
    vm:
      description: The VM that could not be evacuated.
      type: str
    subject:
      description: The thing that is the matter.
      type: str
    fact:
      description: What is the matter.
      type: str
    way_out:
      description: What to do about it.
      type: str
    cause:
      description: Word for programs.
      type: str
    stops:
      description:
        - Whether an evacuation ends at it. It goes on where only home addresses would not follow the VM.
      type: bool
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import (
    ProxyClient,
    ProxyError,
    fail,
    proxy_arguments,
)


def findings_of(client: ProxyClient, vm: str) -> list[dict[str, t.Any]]:
    """What stands in the way of evacuating a VM; a refusal to even look is a finding as well."""
    try:
        found = client.request("POST", "/v1/evacuations/check", {"vm": vm})["findings"]
    except ProxyError as error:
        if error.cause == "proxy-down":
            raise
        subject = f"VM {vm}"
        fact, _unused, way_out = error.message.partition("; ")
        # An error that carries findings has told the same things in its sentence.
        found = error.findings or [
            {"subject": subject, "fact": fact, "way_out": way_out, "cause": error.cause}
        ]
    return [dict({"stops": True}, **finding, vm=vm) for finding in found]


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec=dict(proxy_arguments(), vms={"type": "list", "elements": "str"}),
        supports_check_mode=True,
    )
    client = ProxyClient(module.params["socket"])
    try:
        vms = module.params["vms"]
        if vms is None:
            vms = [vm["name"] for vm in client.get("/v1/vms")["vms"]]
        found = [finding for vm in vms for finding in findings_of(client, vm)]
    except ProxyError as error:
        fail(module, error)
    module.exit_json(changed=False, vms=vms, findings=found)


if __name__ == "__main__":
    main()
