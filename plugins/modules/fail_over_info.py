#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Tell which VMs a host could run from their replicas, should their homes be dead."""

from __future__ import annotations

DOCUMENTATION = r"""
module: fail_over_info
short_description: Tell which VMs a host could run from their replicas, and what is in the way
version_added: 0.1.0
description:
  - Looks at every replica that the host keeps, and at the VMs that came to it and are there. Homes that
    answer are asked what they have against it. Changes nothing.
  - All findings are returned at once. Finding something is not a failure of the module.
extends_documentation_fragment:
  - lifeboat.evacuation.proxy
  - lifeboat.evacuation.attributes.info
  - lifeboat.evacuation.attributes.lifeboat_group
options:
  homes:
    description:
      - Names of hosts. Only VMs whose home is one of them are returned, those whose home cannot be told as
        their record is damaged, and those that came to this host, wherever from. All if left out.
    type: list
    elements: str
seealso:
  - module: lifeboat.evacuation.fail_over
"""

EXAMPLES = r"""
- name: What could run here if home1 were dead?
  lifeboat.evacuation.fail_over_info:
    homes: [home1]
  register: could
"""

RETURN = r"""
memory_free_bytes:
  description: What new guests could have of the host's memory; none if it does not say.
  returned: success
  type: int
running:
  description: >-
    Every VM that runs on the host, however it came there, with C(vm) and C(name); none if its libvirt does
    not answer. One that is just arriving is not among them.
  returned: success
  type: list
  elements: dict
vms:
  description: The VMs, by name.
  returned: success
  type: list
  elements: dict
  contains:
    vm:
      description: UUID of the VM.
      type: str
    name:
      description: Name of the VM.
      type: str
    peer:
      description: Its home.
      type: str
    is_here:
      description: Whether it came to this host and is here, running or not. Then nothing is to be done.
      type: bool
    is_running:
      description: >-
        Whether it runs, or is paused, here; none for one that did not come here, or was shut off when it came
        and still is.
      type: bool
    epoch:
      description: How often its home has moved.
      type: int
    generation:
      description: Which generation it would run from; none if there is none.
      type: int
    sealed_at:
      description: When that was sealed, in seconds since 1970; none if that is not known.
      type: float
    age_seconds:
      description: How long ago.
      type: float
    memory_bytes:
      description: What it would take of the host's memory.
      type: int
    priority:
      description: As its home was asked; none if that is not known.
      type: int
    home_answers:
      description: Whether the proxy of its home answers this host's.
      type: bool
    findings:
      description: What stands in the way, each with C(subject), C(fact), C(way_out) and C(cause).
      type: list
      elements: dict
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import (
    ProxyClient,
    ProxyError,
    fail,
    fail_over_path,
    proxy_arguments,
)

# Arrivals by which a VM came to run here.
_CAME = frozenset({"activated", "landed"})


def candidates(client: ProxyClient, homes: t.Collection[str] | None) -> dict[str, dict[str, t.Any]]:
    """UUID -> name and home of every VM that has a replica here, or came here."""
    found = [one for one in client.get("/v1/replicas")["replicas"] if one.get("state") != "detached"]
    if homes is not None:
        found = [one for one in found if one.get("peer") is None or one["peer"] in homes]
    # From wherever: another host may have an old replica of one that has gone on since.
    found += [one for one in client.get("/v1/arrivals")["arrivals"] if one.get("state") in _CAME]
    return {str(one["vm"]): {"name": one.get("name"), "peer": one.get("peer")} for one in found}


def look(client: ProxyClient, vm: str, known: t.Mapping[str, t.Any]) -> dict[str, t.Any] | None:
    """What could be done with one VM; None: it was here once. A refusal to even look is a finding."""
    try:
        return dict(client.get(fail_over_path(vm)))
    except ProxyError as error:
        if error.cause == "proxy-down":
            raise
        if error.cause == "not-found":
            return None
        subject, _unused, rest = error.message.partition(": ")
        fact, _unused, way_out = rest.partition("; ")
        finding = {"subject": subject, "fact": fact, "way_out": way_out, "cause": error.cause}
        return {"vm": vm, **known, "is_here": False, "findings": [finding]}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec=dict(proxy_arguments(), homes={"type": "list", "elements": "str"}),
        supports_check_mode=True,
    )
    client = ProxyClient(module.params["socket"])
    try:
        known = candidates(client, module.params["homes"])
        looks = [look(client, vm, told) for vm, told in known.items()]
        room = client.get("/v1/hypervisor")
    except ProxyError as error:
        fail(module, error)
    homes = module.params["homes"]
    vms = [
        vm
        for vm in looks
        if vm is not None and (homes is None or vm["is_here"] or vm["peer"] is None or vm["peer"] in homes)
    ]
    domains = room.get("domains")
    running = None
    if domains is not None:
        running = [{"vm": one["uuid"], "name": one["name"]} for one in domains if one["running"]]
    module.exit_json(
        changed=False,
        vms=sorted(vms, key=lambda vm: str(vm["name"])),
        running=running,
        memory_free_bytes=room["memory_free_bytes"],
    )


if __name__ == "__main__":
    main()
