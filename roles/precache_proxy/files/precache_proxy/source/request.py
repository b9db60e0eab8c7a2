# SPDX-License-Identifier: GPL-3.0-or-later
"""What an operator asks for when a VM is to be protected, and what stands in the way of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from precache_proxy.errors import Finding
from precache_proxy.hypervisor.domain_xml import Definition
from precache_proxy.hypervisor.features import Features
from precache_proxy.source import raw_overlay
from precache_proxy.source.layout import device_findings, disk_findings


class ProtectSpec(Protocol):
    """What an operator asks for. ``vm`` is a name or a UUID; ``disks`` None means all."""

    @property
    def vm(self) -> str: ...
    @property
    def peer(self) -> str: ...
    @property
    def rpo_seconds(self) -> float: ...
    @property
    def priority(self) -> int: ...
    @property
    def disks(self) -> Sequence[str] | None: ...
    @property
    def raw_overlay_consent(self) -> bool: ...


@dataclass(frozen=True)
class Protect:
    """A plain :class:`ProtectSpec`."""

    vm: str
    peer: str
    rpo_seconds: float = 15.0
    priority: int = 50
    disks: tuple[str, ...] | None = None
    raw_overlay_consent: bool = False


def request_findings(
    spec: ProtectSpec, own_name: str, peers: Sequence[str], features: Features | None
) -> list[Finding]:
    """What is wrong with the request whatever the VM is like."""
    found: list[Finding] = []
    if spec.peer == own_name:
        found.append(
            Finding(f"peer {spec.peer}", "it is this host itself", "name a hypervisor at another site")
        )
    elif spec.peer not in peers:
        known = ", ".join(peers) or "none"
        found.append(
            Finding(
                f"peer {spec.peer}",
                "it is not configured here",
                f"name one of: {known}; or add it to the proxy's peers",
                "not-found",
            )
        )
    if not (math.isfinite(spec.rpo_seconds) and spec.rpo_seconds > 0):
        found.append(
            Finding(
                f"RPO {spec.rpo_seconds} s",
                "changes cannot be at the peer before they were made",
                "ask for some seconds, such as 15",
            )
        )
    if features is not None and not features.backup:
        found += features.findings()
    return found


def vm_findings(spec: ProtectSpec, definition: Definition, present_peer: str | None) -> list[Finding]:
    """What the VM itself has against it. ``present_peer``: where it is protected already."""
    found = disk_findings(definition, spec.disks, raw_overlay_consent=spec.raw_overlay_consent)
    found += device_findings(definition)
    found += raw_overlay.findings(definition, spec)
    if present_peer is not None and spec.peer != present_peer:
        found.append(
            Finding(
                f"VM {definition.name}",
                f"it is protected at {present_peer} already, and one peer holds its replica",
                f"unprotect it first, or keep {present_peer}",
                "conflict",
            )
        )
    return found
