#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Tell how the mobility agent of a host stands."""

from __future__ import annotations

DOCUMENTATION = r"""
module: mobility_agent_info
short_description: Tell how the mobility agent of a host stands
version_added: 0.1.0
description:
  - Reads the agent's status, everything that stands in its way, and on a gateway its VMs.
extends_documentation_fragment:
  - lifeboat.evacuation.mobility
  - lifeboat.evacuation.attributes.info
seealso:
  - module: lifeboat.evacuation.binding_info
"""

EXAMPLES = r"""
- name: Ask the agent how it stands
  lifeboat.evacuation.mobility_agent_info:
  register: mobility
"""

RETURN = r"""
status:
  description: The agent's status; docs/mobility.md tells every field.
  returned: success
  type: dict
findings:
  description: >-
    What stands in the way, such as an anchor that does not answer, a clock that is off, a kernel setting.
  returned: success
  type: list
  elements: dict
  contains:
    subject:
      description: Of what.
      type: str
    fact:
      description: What is the matter.
      type: str
    way_out:
      description: How to get out.
      type: str
    cause:
      description: A word for programs.
      type: str
    sentence:
      description: All of it for people.
      type: str
vms:
  description: On a gateway the VMs that are here or went from here, else empty.
  returned: success
  type: list
  elements: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.lifeboat.evacuation.plugins.module_utils._agent import AgentClient, agent_arguments
from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import ProxyError, fail


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec=agent_arguments(), supports_check_mode=True)
    client = AgentClient(module.params["socket"])
    try:
        status = client.get("/v1/status")
        findings = [
            dict(finding, sentence="{subject}: {fact}; {way_out}".format(**finding))
            for finding in client.get("/v1/check")["findings"]
        ]
        vms = client.get("/v1/vms")["vms"] if status["gateway"] else []
    except ProxyError as error:
        fail(module, error)
    module.exit_json(changed=False, status=status, findings=findings, vms=vms)


if __name__ == "__main__":
    main()
