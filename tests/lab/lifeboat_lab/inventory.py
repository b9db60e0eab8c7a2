# SPDX-License-Identifier: GPL-3.0-or-later
"""What Ansible is told about the lab: the answer of the dynamic inventory `inventories/lab/lab.py`."""

from collections.abc import Sequence
from typing import Any

from lifeboat_lab.keys import Keys
from lifeboat_lab.settings import HostPlan, Settings


def inventory(settings: Settings, plans: Sequence[HostPlan], keys: Keys) -> dict[str, Any]:
    """Groups home, backup, hypervisors and bare, with the addresses and ssh settings of each host.

    A host whose peer was not built gets no `lifeboat_peer`.
    """
    built = {plan.name for plan in plans}
    variables: dict[str, dict[str, Any]] = {}
    for plan in plans:
        variables[plan.name] = {
            "ansible_host": plan.management_address,
            "ansible_user": "root",
            "ansible_python_interpreter": "/usr/bin/python3",
            # Labs use the same addresses, each in namespaces of its own: connections must not be shared.
            "ansible_control_path_dir": str(keys.control_sockets),
            "ansible_ssh_common_args": f"-F {keys.config}",
            "lifeboat_site": plan.site,
            "lifeboat_address": plan.peer_address,
        }
        if plan.peer in built:
            variables[plan.name]["lifeboat_peer"] = plan.peer
    # A CA of each lab's own, removed with it: secrets never lie in the checkout.
    common = {"lifeboat_lab": settings.name, "pki_ca_directory": str(settings.state / "pki")}
    hypervisors = [plan for plan in plans if plan.image == "full"]
    return {
        "_meta": {"hostvars": variables},
        "all": {"children": ["hypervisors", "bare"], "vars": common},
        "hypervisors": {"children": ["home", "backup"]},
        "home": {"hosts": [plan.name for plan in hypervisors if plan.site == "home"]},
        "backup": {"hosts": [plan.name for plan in hypervisors if plan.site == "backup"]},
        "bare": {"hosts": [plan.name for plan in plans if plan.image == "bare"]},
    }
