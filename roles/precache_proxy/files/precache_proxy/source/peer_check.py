# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a peer would keep a VM's replica: asked before the VM is protected, not found out afterwards."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from precache_proxy.blocks import images
from precache_proxy.channel.link import Link
from precache_proxy.errors import Finding, LifeboatError
from precache_proxy.hypervisor.domain_xml import Definition
from precache_proxy.source import offline, raw_overlay
from precache_proxy.source.layout import plan_layout
from precache_proxy.source.request import ProtectSpec

ASK_TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True)
class PeerAnswer:
    """``objections``: what the peer has against it (room, whose replica it is, its epoch, sizes); ``note``:
    why it could not be asked ("": it was); ``status``: of the replica, None where the peer does not tell;
    ``asked_at``: when the question went (monotonic), so that the status is not older than that.
    """

    objections: list[Finding] = field(default_factory=list)
    note: str = ""
    status: dict[str, Any] | None = None
    asked_at: float = 0.0


async def ask_peer(link: Link, spec: ProtectSpec, definition: Definition, epoch: int) -> PeerAnswer:
    """Ask it. Changes nothing there."""
    try:
        if not link.is_up:
            return PeerAnswer(note=_not_asked(spec.peer, link.sentence))
        sizes: dict[str, int] = {}
        needed_bytes = 0
        tracked = list(plan_layout(definition, spec.disks).tracked.values())
        if spec.raw_overlay_consent:
            tracked += raw_overlay.raw_disks(definition, spec.disks)
        for disk in tracked:
            described = await images.info(offline.path(disk.path), disk.format, in_use=True)
            sizes[disk.target] = described[0].size_bytes
            needed_bytes += await offline.first_copy_bytes(disk, described[0].size_bytes)
        asked_at = time.monotonic()
        answer = await link.call(
            "store.prepare",
            {
                "vm": definition.uuid,
                "name": definition.name,
                "epoch": epoch,
                "disks": sizes,
                "needed_bytes": needed_bytes,
                "check": True,
            },
            timeout_seconds=ASK_TIMEOUT_SECONDS,
        )
        findings = [Finding(**told) for told in answer["findings"]]
        return PeerAnswer(findings, status=answer.get("status"), asked_at=asked_at)
    except (LifeboatError, KeyError, TypeError) as error:
        return PeerAnswer(note=_not_asked(spec.peer, str(error)))


def _not_asked(peer: str, why: str) -> str:
    return f"peer {peer} could not be asked whether it takes the replica: {why}"
