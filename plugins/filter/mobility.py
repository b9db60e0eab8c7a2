# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is wrong with the home addresses of VMs, over all sites."""

from __future__ import annotations

import typing as t

from ansible.errors import AnsibleFilterError
from ansible_collections.lifeboat.evacuation.plugins.module_utils._address_plan import (
    NetaddrMissing,
    findings,
)


def home_address_findings(
    vms: t.Iterable[t.Mapping[str, t.Any]], prefixes: t.Iterable[str] = ()
) -> list[str]:
    """A sentence for each address in no prefix, wrong, or wanted by two VMs; a VM told of twice is one."""
    wanted: dict[str, tuple[str, list[str]]] = {}
    for vm in vms:
        wanted[str(vm.get("uuid") or vm["name"])] = (f"VM {vm['name']}", list(vm.get("addresses") or []))
    try:
        return findings(list(wanted.values()), list(dict.fromkeys(prefixes)))
    except NetaddrMissing as error:
        raise AnsibleFilterError(str(error)) from error


class FilterModule:
    """Jinja2 filters."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """The filters by name."""
        return {"home_address_findings": home_address_findings}
