#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Give a VM the addresses that it keeps wherever it runs, or take them from it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: home_address
short_description: Give a VM the addresses that it keeps wherever it runs
version_added: 0.1.0
description:
  - Writes a VM's home addresses into the metadata of its definition, where they travel with it.
  - The mobility agent of the host that the VM runs on follows at once.
  - The guest's own configuration is not touched.
  - What is given here takes the place of what the mobility agent may have learnt.
extends_documentation_fragment:
  - lifeboat.evacuation.mobility.libvirt
  - lifeboat.evacuation.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
options:
  vm:
    description:
      - Name or UUID of the VM.
    type: str
    required: true
  addresses:
    description:
      - All home addresses that the VM shall have, and no others. A prefix is one that is all the VM's.
      - Those of IPv4, which only BGP leads to a VM, must be in one of O(prefixes).
      - An empty list takes them away, and keeps the agent from learning any.
    type: list
    elements: str
    required: true
  cards:
    description:
      - Which card addresses are of that are not the first card's, as a MAC, or as the libvirt network or the
        bridge that it is on. The first is that which comes first in the VM's definition on a bridge of the
        mobility agent.
    type: dict
    default: {}
  prefixes:
    description:
      - Home prefixes that there are. An address in none of them is refused. Not asked about if left out.
    type: list
    elements: str
    default: []
seealso:
  - module: lifeboat.evacuation.home_address_info
  - module: lifeboat.evacuation.binding_info
"""

EXAMPLES = r"""
- name: Let web1 keep its address
  lifeboat.evacuation.home_address:
    vm: web1
    addresses: ["2001:db8:100::5"]
    prefixes: "{{ mobility_prefixes | map(attribute='prefix') }}"

- name: Let each of its cards keep its own
  lifeboat.evacuation.home_address:
    vm: web1
    addresses: ["2001:db8:100::5", "2001:db8:200::5"]
    cards: {"2001:db8:200::5": "52:54:00:00:00:02"}
"""

RETURN = r"""
vm:
  description: The VM and its home addresses, as they are or in check mode would be.
  returned: success
  type: dict
  contains:
    name:
      description: Name of the VM.
      type: str
    uuid:
      description: UUID of the VM.
      type: str
    addresses:
      description: Its home addresses, in the order given.
      type: list
      elements: str
    cards:
      description: Which card an address is of, where that was said.
      type: dict
findings:
  description: Everything that is wrong with the addresses; then nothing was changed.
  returned: failure
  type: list
  elements: str
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.lifeboat.evacuation.plugins.module_utils._home_addresses import (
    METADATA_KEY,
    METADATA_URI,
    card_findings,
    cards,
    declared,
    element,
    findings,
    parse,
    read,
    shown,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._libvirt import (
    Hypervisor,
    LibvirtFailed,
    libvirt_arguments,
)


class HomeAddress:
    """The difference between a VM's addresses and those asked for, and the call that closes it."""

    def __init__(self, hypervisor: Hypervisor, parameters: t.Mapping[str, t.Any]) -> None:
        self._hypervisor = hypervisor
        self._parameters = parameters
        self._domain = hypervisor.domain(parameters["vm"])

    def findings(self) -> list[str]:
        """What is wrong with the addresses, those of the host's other VMs beside them."""
        own = (f"VM {self._domain.name()}", self._parameters["addresses"])
        told = findings([own], self._parameters["prefixes"])
        if not told:
            definition = self._hypervisor.definition(self._domain)
            told = [f"{own[0]}: {one}" for one in card_findings(definition, self._shown(), self._cards())]
        if told:
            return told
        others = []
        for domain in self._hypervisor.domains():
            if domain.UUIDString() != self._domain.UUIDString():
                addresses = read(self._hypervisor.definition(domain))
                # Only whose addresses clash matters, not what else may be wrong with somebody else's.
                others += [(f"VM {domain.name()}", [text]) for text in addresses]
        pairs = [findings([other, own], (), ipv4=True) for other in others]
        return [finding for told in pairs for finding in told if own[0] in finding]

    def _shown(self) -> list[str]:
        return [shown(parse(text)) for text in self._parameters["addresses"]]

    def _cards(self) -> dict[str, str]:
        """By the addresses as they are shown; what is no address stays as it was written."""
        told: dict[str, str] = {}
        for text, card in self._parameters["cards"].items():
            try:
                told[shown(parse(text))] = str(card)
            except ValueError:
                told[text] = str(card)
        return told

    def result(self, check_mode: bool) -> dict[str, t.Any]:
        """Bring the addresses about, or in check mode only tell."""
        definition = self._hypervisor.definition(self._domain)
        before, cards_before = read(definition), cards(definition)
        after, cards_after = self._shown(), self._cards()
        # Learnt ones that are right are still to be the inventory's, and "none" is to be said, too.
        changed = (before, cards_before) != (after, cards_after) or not declared(definition)
        if changed and not check_mode:
            self._write(after, cards_after)
        vm: dict[str, t.Any] = {"name": self._domain.name(), "uuid": self._domain.UUIDString()}
        vm |= {"addresses": after, "cards": cards_after}
        diff = {
            "before": _difference(before, cards_before),
            "after": _difference(after, cards_after),
        }
        return {"changed": changed, "vm": vm, "diff": diff}

    def _write(self, addresses: list[str], of_cards: t.Mapping[str, str]) -> None:
        libvirt = self._hypervisor.libvirt
        flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG if self._domain.isPersistent() else 0
        if self._domain.isActive():
            flags |= libvirt.VIR_DOMAIN_AFFECT_LIVE
        kind = libvirt.VIR_DOMAIN_METADATA_ELEMENT
        self._domain.setMetadata(kind, element(addresses, of_cards), METADATA_KEY, METADATA_URI, flags)


def _difference(addresses: list[str], of_cards: dict[str, str]) -> dict[str, t.Any]:
    return {"addresses": addresses, **({"cards": of_cards} if of_cards else {})}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec=dict(
            libvirt_arguments(),
            vm={"type": "str", "required": True},
            addresses={"type": "list", "elements": "str", "required": True},
            cards={"type": "dict", "default": {}},
            prefixes={"type": "list", "elements": "str", "default": []},
        ),
        supports_check_mode=True,
    )
    try:
        hypervisor = Hypervisor(module, read_only=module.check_mode)
        asked = HomeAddress(hypervisor, module.params)
        found = asked.findings()
        if found:
            module.fail_json(msg="; ".join(found), findings=found)
        result = asked.result(module.check_mode)
    except LibvirtFailed as error:
        module.fail_json(msg=str(error), findings=[])
    except hypervisor.libvirt.libvirtError as error:
        module.fail_json(msg=f"VM {module.params['vm']}: libvirt refused: {error}", findings=[])
    module.exit_json(**result)


if __name__ == "__main__":
    main()
