# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a VM's home addresses would follow it, found beforehand.

Nothing of it stops an evacuation: a VM that is out without its addresses is better than one that is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from precache_proxy.errors import Finding
from precache_proxy.evacuation.arrival_network import NETWORK_CAUSE, ArrivalNetwork, home_addresses


def stops(finding: Finding) -> bool:
    """Whether an evacuation ends at this finding."""
    return finding.cause != NETWORK_CAUSE


async def at_source(network: ArrivalNetwork, vm: str, name: str, definition: str) -> list[Finding]:
    """What the agent of the host that it runs on says."""
    return _told(await network.outlook(vm, name, definition, arriving=False), "")


async def at_destination(network: ArrivalNetwork, vm: str, name: str, definition: str) -> dict[str, Any]:
    """What the agent of the host that it would come to says, for the source (:func:`read_answer`)."""
    found = await network.outlook(vm, name, definition, arriving=True)
    told = [{"subject": f.subject, "fact": f.fact, "way_out": f.way_out} for f in found]
    return {"leads_addresses": network.leads_addresses, "address_findings": told}


def read_answer(
    answer: Mapping[str, Any], network: ArrivalNetwork, name: str, peer: str, definition: str
) -> list[Finding]:
    """What :func:`at_destination` said; nothing of a peer whose version does not say."""
    before = f"its addresses would not follow it to {peer}: "
    found = [Finding(**finding) for finding in answer.get("address_findings", ())]
    if network.leads_addresses and not answer.get("leads_addresses", True) and home_addresses(definition):
        way_out = "set one up there (group mobility), or take its home addresses away"
        found.append(Finding(f"VM {name}", "no mobility agent is set up there", way_out))
    return _told(found, before)


def _told(found: Iterable[Finding], before: str) -> list[Finding]:
    return [replace(finding, fact=before + finding.fact, cause=NETWORK_CAUSE) for finding in found]
