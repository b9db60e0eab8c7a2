# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a VM may be here, judged before anything is changed."""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import IPv4Network

from mobility_agent.config import Config
from mobility_agent.datapath.path import DataPath
from mobility_agent.errors import Conflict, Finding, InvalidInput
from mobility_agent.gateway.attachments import HERE, Attachments
from mobility_agent.homes import Home, within

IS_IPV4 = "is IPv4, which tunnels do not carry"
INSTEAD_OF_IPV4 = "give it IPv6 addresses, or let routing follow it (mobility_bgp_as)"


class Arrivals:
    """What stands in the way of a VM's arrival, all of it at once."""

    def __init__(
        self,
        config: Config,
        path: DataPath,
        attachments: Attachments,
        bridges: Collection[str],
        kept_off: Collection[str] = (),
    ) -> None:
        self._config = config
        self._path = path
        self._attachments = attachments
        self._bridges = bridges
        self._kept_off = kept_off

    def judge(
        self, vm: str, homes: tuple[Home, ...], bridges: Collection[str], epoch: int, *, evident: bool
    ) -> None:
        """Raises InvalidInput with everything that is wrong, Conflict for an epoch that is over."""
        subject = f"VM {vm}"
        findings = self.findings(vm, homes, bridges, subject)
        if findings:
            raise InvalidInput("; ".join(str(finding) for finding in findings), findings)
        known_before = self._attachments.get(vm)
        if known_before is not None and epoch < known_before.epoch and not evident:
            raise Conflict(
                f"{subject}: epoch {epoch} is older than epoch {known_before.epoch}, which is known here; "
                "hand it off with a newer one"
            )

    def findings(
        self, vm: str, homes: tuple[Home, ...], bridges: Collection[str], subject: str
    ) -> list[Finding]:
        """What stands in the way. ``bridges``: those that are known; ``subject``: how the VM is named."""
        findings: list[Finding] = []
        for home in homes:
            if isinstance(home, IPv4Network) and not self._config.announce:
                findings.append(Finding(subject, f"{home} {IS_IPV4}", INSTEAD_OF_IPV4))
            elif not any(within(home, prefix) for prefix in self._config.networks):
                way_out = "correct its home addresses, or add the prefix to mobility_prefixes"
                findings.append(Finding(subject, f"{home} is in no home prefix", way_out))
            elif any(prefix.router in home for prefix in self._config.ipv4_prefixes):
                way_out = "give the VM another, or the router (mobility_prefixes)"
                findings.append(Finding(subject, f"{home} is the router's address", way_out))
            owner = self._attachments.owner(home)
            if owner is not None and owner.vm != vm and owner.state == HERE:
                fact = f"{home} is the address of VM {owner.vm}, which is here"
                findings.append(Finding(subject, fact, "give each VM addresses of its own"))
        for bridge in dict.fromkeys(bridges):
            findings += self._of_bridge(bridge, subject)
        return findings

    def _of_bridge(self, bridge: str, subject: str) -> list[Finding]:
        if bridge not in self._bridges:
            known = ", ".join(self._bridges)
            return [Finding(subject, f"no gateway on bridge {bridge}", f"use one of {known}")]
        if not self._path.has_device(bridge):
            way_out = "start its network, or make it; see `ip link`"
            return [Finding(subject, f"bridge {bridge} is not there", way_out)]
        if bridge in self._kept_off:
            fact = f"bridge {bridge} is not the VMs' alone, so that this gateway is not its first hop"
            return [Finding(subject, fact, "see `mobility-agent check`")]
        return []
