# SPDX-License-Identifier: GPL-3.0-or-later
"""What every evacuation that leaves this host works with, and whether one may begin."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from precache_proxy.errors import Finding, LifeboatError, NotFound
from precache_proxy.evacuation import addresses, depth, preflight
from precache_proxy.evacuation.arrival_network import ArrivalNetwork
from precache_proxy.evacuation.domains import Domains
from precache_proxy.evacuation.emulator import Emulators
from precache_proxy.evacuation.guard import Guard, hook_findings
from precache_proxy.evacuation.job import Journal
from precache_proxy.evacuation.known_openings import KnownOpenings
from precache_proxy.evacuation.reconcile import Presence
from precache_proxy.evacuation.rooms import SourceRoom, StoreRoom
from precache_proxy.hypervisor.domain_xml import Definition
from precache_proxy.hypervisor.qemu_user import QemuUser

CHECK_TIMEOUT_SECONDS = 60.0


@dataclass(slots=True)
class Surroundings:
    """What every job of this host works with."""

    directory: Path
    run_directory: Path
    domains: Domains
    guard: Guard
    journal: Journal
    links: Any
    source: SourceRoom
    store: StoreRoom
    network: ArrivalNetwork
    qemu_user: QemuUser
    stall_seconds: float
    openings: KnownOpenings = field(default_factory=KnownOpenings)
    emulators: Emulators = field(default_factory=Emulators)

    @property
    def fallback_overlay_directory(self) -> Path:
        """For overlays that have no image file to lie beside."""
        return self.directory / "disks"


@dataclass(frozen=True, slots=True)
class Look:
    """Everything in the way of an evacuation on both sides, and whether the VM is at the peer already.

    Not all ``findings`` end it: see :func:`addresses.stops`.

    ``presumed_dead_after_seconds``: after which silence the peer would run what has arrived, None: never.
    """

    definition: Definition
    findings: list[Finding]
    already_there: bool = False
    presumed_dead_after_seconds: float | None = None


async def look(around: Surroundings, vm: str, peer: str, epoch: int, *, restarts: bool = False) -> Look:
    """See whether an evacuation may begin; changes nothing.

    ``restarts``: it is to be booted there from its persistent definition, instead of moved while it runs.
    """
    definition = await around.domains.definition(vm)
    presence = await around.domains.presence_at_source(vm)
    try:
        status: dict[str, Any] | None = around.source.status(vm)
    except NotFound:
        status = None
    found = preflight.source_findings(definition, presence, status, peer, may_be_off=restarts)
    found += hook_findings("source")
    found += depth.source_findings(
        definition, preflight.covered_disks(definition), further=0 if restarts else depth.FREEZE_LAYERS
    )
    if restarts:
        keeps = await around.domains.is_persistent(vm)
        persistent = await around.domains.definition(vm, inactive=True) if keeps else None
        found += preflight.restart_findings(
            definition, persistent, saved=await around.domains.has_managed_save(vm)
        )
    else:
        found += await asyncio.to_thread(
            preflight.overlay_findings, definition, around.fallback_overlay_directory
        )
    name, xml = definition.name, await around.domains.xml(vm, inactive=restarts)
    if presence is Presence.RUNNING:
        found += await addresses.at_source(around.network, vm, name, xml)
    link = around.links.get(peer)
    if link is None:
        found.append(
            Finding(f"peer {peer}", "it is not configured here", "add it to precache_proxy.toml", "not-found")
        )
        return Look(definition, found)
    try:
        answer = await link.call(
            "evacuation.check",
            {"vm": vm, "name": name, "epoch": epoch, "definition": xml},
            timeout_seconds=CHECK_TIMEOUT_SECONDS,
        )
    except LifeboatError as error:
        found.append(
            Finding(f"peer {peer}", str(error), "see `precache-proxy status` on both hosts", error.cause)
        )
        return Look(definition, found)
    found += [Finding(**finding) for finding in answer["findings"]]
    if not answer.get("already_there"):
        found += addresses.read_answer(answer, around.network, name, peer, xml)
    told = answer.get("presumed_dead_after_seconds")
    limit = None if told is None else float(told)
    if not restarts:
        found += preflight.stall_findings(around.stall_seconds, peer, limit)
    return Look(definition, found, bool(answer.get("already_there")), limit)
