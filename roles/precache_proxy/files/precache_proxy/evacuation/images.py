# SPDX-License-Identifier: GPL-3.0-or-later
"""The overlays of an arrival on a replica's chain, and what an evacuation asks of images."""

from __future__ import annotations

import asyncio
from pathlib import Path

from precache_proxy import durable
from precache_proxy.blocks import images


async def image_size_bytes(path: str, image_format: str) -> int:
    """The size that the guest sees, of an image that may be in use."""
    return (await images.info(Path(path), image_format, in_use=True))[0].size_bytes


async def drop_own_bitmaps(path: str, image_format: str) -> None:
    """Remove the bitmaps of our checkpoints from an image that no VM has open any more."""
    if image_format != "qcow2":
        return
    for description in (await images.info(Path(path), image_format))[:1]:
        for name in description.bitmaps:
            if name.startswith("lifeboat-"):
                await images.remove_bitmap(Path(path), name)


async def create_overlay(path: Path, backing: str, backing_format: str, size_bytes: int) -> None:
    """A new, empty qcow2 on ``backing``, durable when this returns. Replaces what a crash left there."""
    await asyncio.to_thread(durable.remove, path)
    await images.create(path, size_bytes, backing=backing, backing_format=backing_format)

    def sync() -> None:
        path.chmod(0o600)
        durable.sync_file(path)
        durable.sync_directory(path.parent)

    await asyncio.to_thread(sync)
