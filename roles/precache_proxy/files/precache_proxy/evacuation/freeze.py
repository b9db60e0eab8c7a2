# SPDX-License-Identifier: GPL-3.0-or-later
"""The freeze, and its undoing: overlays on all disks of the VM at one instant, and back into the images."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from precache_proxy import durable
from precache_proxy.errors import HypervisorError
from precache_proxy.evacuation import layers
from precache_proxy.evacuation.domains import Domains
from precache_proxy.evacuation.images import image_size_bytes
from precache_proxy.evacuation.job import FrozenDisk
from precache_proxy.evacuation.reconcile import Presence
from precache_proxy.hypervisor.domain_xml import Definition, Disk


def overlay_path(disk: Disk, job_id: str, fallback_directory: Path) -> Path:
    """Where the overlay of a disk goes: beside an image file, so that the same QEMU reaches it and the space
    is known.

    A block device has no room beside it: then ``fallback_directory``.
    """
    path = Path(disk.path)
    if disk.image.kind == "file":
        return path.with_name(f"{path.name}.lifeboat-{job_id}")
    return fallback_directory / f"{path.name}.lifeboat-{job_id}"


async def plan(
    definition: Definition, covered: Iterable[str], job_id: str, fallback_directory: Path
) -> dict[str, FrozenDisk]:
    """What the freeze will make of each covered disk; recorded before anything is done."""
    disks: dict[str, FrozenDisk] = {}
    for key in covered:
        disk = definition.disk(key)
        if disk is None:
            raise HypervisorError(
                f"VM {definition.name}: disk {key} is gone; protect the VM anew and try again"
            )
        overlay = overlay_path(disk, job_id, fallback_directory)
        size_bytes = await image_size_bytes(disk.path, disk.format)
        disks[key] = FrozenDisk(disk.path, disk.format, str(overlay), size_bytes)
    return disks


async def freeze(domains: Domains, vm: str, disks: Mapping[str, FrozenDisk]) -> None:
    """Let the images stand still; the guest goes on in the overlays. Repeating it is no error."""
    definition = await domains.definition(vm)
    missing = {key for key, frozen in disks.items() if _path(definition, key) != frozen.overlay}
    overlays = {key: frozen.overlay for key, frozen in disks.items()}
    if not missing:
        # They may be on since a kill that came before their names were durable.
        await asyncio.to_thread(layers.sync_names, overlays.values())
        return
    await layers.put_overlays(domains, vm, overlays)


def _path(definition: Definition, key: str) -> str:
    disk = definition.disk(key)
    return "" if disk is None else disk.path


async def merge_back(domains: Domains, vm: str, disks: Mapping[str, FrozenDisk], presence: Presence) -> None:
    """Undo the freeze: every write of the overlays goes into the images, and the images are the disks again.

    For a VM that is not active it is started *paused* for that and ended again: only a running QEMU carries
    the dirty
    bitmaps over, and without them the next pass would have to compare everything. Repeating it is no error.
    """
    off = presence not in {Presence.RUNNING, Presence.PAUSED}
    definition = await domains.definition(vm, inactive=off)
    frozen_now = [
        key for key, frozen in disks.items() if frozen.overlay and _path(definition, key) == frozen.overlay
    ]
    if frozen_now:
        # One that runs after all is nobody's to end.
        started_here = off and await domains.start(vm, paused=True)
        try:
            await layers.cancel_block_jobs(domains, vm, _mirrored(definition, frozen_now))
            for key in frozen_now:
                await layers.commit(domains, vm, key, top=None, base=disks[key].image)
                await layers.wait_for_layer(domains, vm, key, disks[key].image)
        finally:
            if started_here:
                await domains.destroy(vm)
    # Before they go: a definition that still names them could start nothing, or a mix of old and new.
    await asyncio.to_thread(layers.sync_definitions)
    await asyncio.to_thread(remove_overlays, disks)


def _mirrored(definition: Definition, keys: Iterable[str]) -> list[str]:
    """Disks on which a copy to the destination was left behind; a commit of ours is carried on with."""
    found = []
    for key in keys:
        disk = definition.disk(key)
        if disk is not None and disk.mirror and disk.mirror != "active-commit":
            found.append(key)
    return found


def remove_overlays(disks: Mapping[str, FrozenDisk]) -> None:
    """Remove the overlay files of a freeze that is over (blocking)."""
    for frozen in disks.values():
        if frozen.overlay:
            durable.remove(Path(frozen.overlay))


def restore_ownership(disks: Mapping[str, FrozenDisk]) -> None:
    """Give each kept image the owner that libvirt gave back to the overlay on it when the VM stopped
    (blocking).

    libvirt moves what it remembers of the owner to a snapshot's overlay and restores only that: the images
    below
    would stay with QEMU's user.
    """
    for frozen in disks.values():
        if not frozen.overlay:
            continue
        try:
            status = os.stat(frozen.overlay)
            os.chown(frozen.image, status.st_uid, status.st_gid)
        except FileNotFoundError:
            continue
