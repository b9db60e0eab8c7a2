# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a VM's home addresses would follow it, found beforehand.

Nothing of it stops an evacuation: a VM that is out without its addresses is better than one that is lost.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from precache_proxy.errors import Finding
from precache_proxy.evacuation.arrival_network import NETWORK_CAUSE, ArrivalNetwork, home_addresses

logger = logging.getLogger(__name__)


def stops(finding: Finding) -> bool:
    """Whether an evacuation ends at this finding."""
    return finding.cause != NETWORK_CAUSE


async def at_source(network: ArrivalNetwork, vm: str, name: str, definition: str) -> list[Finding]:
    """What the agent of the host that it runs on says. Never raises."""
    return _told(await _outlook(network, vm, name, definition, arriving=False), "")


async def at_destination(network: ArrivalNetwork, vm: str, name: str, definition: str) -> dict[str, Any]:
    """What the agent of the host that it would come to says, for the source (:func:`read_answer`).

    Never raises.
    """
    found = await _outlook(network, vm, name, definition, arriving=True)
    told = [{"subject": f.subject, "fact": f.fact, "way_out": f.way_out} for f in found]
    return {"leads_addresses": network.leads_addresses, "address_findings": told}


async def _outlook(
    network: ArrivalNetwork, vm: str, name: str, definition: str, *, arriving: bool
) -> list[Finding]:
    try:
        return await network.outlook(vm, name, definition, arriving=arriving)
    except Exception as error:
        # Whatever it is, a VM is not kept here, where the power may go, for a question about its addresses.
        logger.exception("VM %s: whether its addresses would follow it cannot be found out", name)
        return [_cannot_be_found_out(name, "there" if arriving else "here", error)]


def _cannot_be_found_out(name: str, where: str, error: Exception) -> Finding:
    fact = f"whether its home addresses would follow it cannot be found out {where} ({error!r})"
    return Finding(f"VM {name}", fact, f"see journalctl -u precache-proxy {where}")


def read_answer(
    answer: Mapping[str, Any], network: ArrivalNetwork, name: str, peer: str, definition: str
) -> list[Finding]:
    """What :func:`at_destination` said; nothing of a peer whose version does not say.

    Never raises.
    """
    before = f"its addresses would not follow it to {peer}: "
    try:
        found = _told((Finding(**finding) for finding in answer.get("address_findings", ())), before)
        if network.leads_addresses and not answer.get("leads_addresses", True) and home_addresses(definition):
            way_out = "set one up there (group mobility), or take its home addresses away"
            found += _told([Finding(f"VM {name}", "no mobility agent is set up there", way_out)], before)
    except Exception as error:
        logger.exception("VM %s: what %s says of its addresses is not understood", name, peer)
        return _told([_cannot_be_found_out(name, "here", error)], "")
    return found


def _told(found: Iterable[Finding], before: str) -> list[Finding]:
    return [replace(finding, fact=before + finding.fact, cause=NETWORK_CAUSE) for finding in found]
