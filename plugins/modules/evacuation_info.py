#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Tell evacuations, and wait until they have ended."""

from __future__ import annotations

DOCUMENTATION = r"""
module: evacuation_info
short_description: Tell evacuations and arrivals of a host
version_added: 0.1.0
description:
  - Returns the evacuation jobs that the precache proxy of the host remembers, and the arrivals of VMs
    from peers.
extends_documentation_fragment:
  - lifeboat.evacuation.proxy
  - lifeboat.evacuation.proxy.wait
  - lifeboat.evacuation.attributes.info
  - lifeboat.evacuation.attributes.lifeboat_group
options:
  vm:
    description:
      - Name or UUID of a VM. Only its jobs and arrivals are returned.
    type: str
  id:
    description:
      - Identifier of a job. Only that job or arrival is returned.
    type: str
  wait:
    description:
      - Whether to wait until every returned job has ended or is undecided.
  wait_timeout:
    description:
      - How many seconds to wait at most. What holds then is returned; RV(settled) tells whether the
        wait was long enough.
    default: 3600
seealso:
  - module: lifeboat.evacuation.evacuation
"""

EXAMPLES = r"""
- name: Look at all evacuations
  lifeboat.evacuation.evacuation_info:
  register: evacuations

- name: Wait for the evacuation of one VM
  lifeboat.evacuation.evacuation_info:
    vm: web1
    wait: true
"""

RETURN = r"""
evacuations:
  description: Jobs whose source is this host, oldest first. docs/control-api.md tells every field.
  returned: success
  type: list
  elements: dict
  contains:
    outlook:
      description: How a job that has not ended stands; none for one that has, and for what is not known.
      type: dict
      contains:
        share:
          description: Share of memory and disks that has crossed, from 0 to 1.
          type: float
        remaining_bytes:
          description: What is left of them, before packing.
          type: int
        bytes_per_second:
          description: How fast that becomes less, before packing.
          type: float
        seconds_left:
          description: Forecast of what the rest takes; none where no end is in sight.
          type: float
        lag_bytes:
          description: Changed since the last sealed generation.
          type: int
        lag_seconds:
          description: Age of the oldest change that is not yet at the peer.
          type: float
arrivals:
  description: Arrivals whose destination is this host.
  returned: success
  type: list
  elements: dict
settled:
  description: Whether every returned job has ended or is undecided.
  returned: success
  type: bool
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import (
    ProxyClient,
    ProxyError,
    fail,
    proxy_arguments,
    wait_arguments,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._wait import job_settled, wait_for

Told = dict[str, list[dict[str, t.Any]]]


def read(client: ProxyClient, vm: str | None, identifier: str | None) -> Told:
    """The jobs and arrivals of a VM, of one identifier, or all. Raises ProxyError."""

    def wanted(job: t.Mapping[str, t.Any]) -> bool:
        return (vm is None or vm in (job.get("vm"), job.get("name"))) and identifier in (None, job.get("id"))

    return {
        kind: [job for job in client.get(f"/v1/{kind}")[kind] if wanted(job)]
        for kind in ("evacuations", "arrivals")
    }


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec=dict(proxy_arguments(), **wait_arguments(3600), vm={"type": "str"}, id={"type": "str"}),
        supports_check_mode=True,
    )
    parameters = module.params
    client = ProxyClient(parameters["socket"])
    try:
        told, good = wait_for(
            lambda: read(client, parameters["vm"], parameters["id"]),
            lambda told: all(job_settled(job) for job in told["evacuations"]),
            parameters["wait_timeout"] if parameters["wait"] else 0,
            parameters["wait_sleep"],
        )
    except ProxyError as error:
        fail(module, error)
    module.exit_json(changed=False, settled=good, **told)


if __name__ == "__main__":
    main()
