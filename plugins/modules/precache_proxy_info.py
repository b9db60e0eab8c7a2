#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Tell how the precache proxy of a host stands."""

from __future__ import annotations

DOCUMENTATION = r"""
module: precache_proxy_info
short_description: Tell how the precache proxy of a host stands, with all its checks
version_added: 0.1.0
description:
  - Returns links, protected VMs, replicas, jobs and space, and the results of the checks that C(precache-
    proxy check) prints.
  - A check that is not well is not a failure of the module.
extends_documentation_fragment:
  - lifeboat.evacuation.proxy
  - lifeboat.evacuation.attributes.info
  - lifeboat.evacuation.attributes.lifeboat_group
seealso:
  - module: lifeboat.evacuation.protected_vm_info
"""

EXAMPLES = r"""
- name: Look at the proxy
  lifeboat.evacuation.precache_proxy_info:
  register: proxy

- name: Refuse to go on without a link
  ansible.builtin.assert:
    that: proxy.status.links | rejectattr('state', 'eq', 'up') | length == 0
"""

RETURN = r"""
status:
  description: The proxy as it tells itself. docs/control-api.md tells every field.
  returned: success
  type: dict
checks:
  description: Results of the checks.
  returned: success
  type: list
  elements: dict
  contains:
    check:
      description: Which check.
      type: str
      sample: rpo
    subject:
      description: Of which thing.
      type: str
    severity:
      description: V(ok), V(warning), V(critical) or V(unknown).
      type: str
    sentence:
      description: What was found, with the way out.
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
    client = ProxyClient(module.params["socket"])
    try:
        status = client.get("/v1/status")
        checks = client.get("/v1/check")["checks"]
    except ProxyError as error:
        fail(module, error)
    module.exit_json(changed=False, status=status, checks=checks)


if __name__ == "__main__":
    main()
