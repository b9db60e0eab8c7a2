# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a VM would keep its addresses if it moved now, seen from either end; changes nothing."""

from __future__ import annotations

from collections.abc import Collection

from mobility_agent.errors import Finding
from mobility_agent.gateway.attachments import HERE
from mobility_agent.gateway.definition import VmNetwork
from mobility_agent.gateway.duty import GatewayDuty

_ANCHORS_WAY_OUT = "see `mobility-agent check` there: they are down, unreachable, or have another key"


def of_arrival(gateway: GatewayDuty, found: VmNetwork, bridges: Collection[str]) -> list[Finding]:
    """It would come here: with these addresses, on these bridges, as far as known, and anchors would hear."""
    findings = gateway.arrivals.findings(found.vm, found.homes, bridges, _subject(found))
    anchors = gateway.status()["anchors"]
    if anchors and all(told["state"] != "up" for told in anchors.values()):
        fact = f"no anchor answers the gateway that it would come to ({', '.join(anchors)})"
        findings.append(Finding(_subject(found), fact, _ANCHORS_WAY_OUT, "unreachable"))
    return findings


def of_departure(gateway: GatewayDuty, found: VmNetwork) -> list[Finding]:
    """It runs here: its addresses are led to it, and some anchor knows so."""
    subject, known = _subject(found), gateway.attachments.get(found.vm)
    told = ", ".join(str(home) for home in found.homes)
    if known is None or known.state != HERE:
        fact = f"the mobility agent here does not lead {told} to it"
        way_out = "see `mobility-agent vms` and `mobility-agent check`; protect it again"
        return [Finding(subject, fact, way_out, "not-found")]
    findings: list[Finding] = []
    if set(known.homes) != set(found.homes):
        led = ", ".join(str(home) for home in known.homes)
        fact = f"its definition says {told}, and the mobility agent here leads {led} to it"
        findings.append(Finding(subject, fact, "protect it again, and see `mobility-agent vms`", "conflict"))
    anchors = gateway.status()["anchors"]
    if anchors and not gateway.registrar.acknowledged(found.vm):
        fact = f"no anchor has acknowledged its addresses here ({', '.join(anchors)})"
        findings.append(Finding(subject, fact, _ANCHORS_WAY_OUT, "unreachable"))
    return findings


def _subject(found: VmNetwork) -> str:
    return f"VM {found.name or found.vm}"
