# SPDX-License-Identifier: GPL-3.0-or-later
"""Images of shut-off VMs: what they look like from outside, and the bitmaps in them."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from precache_proxy.blocks import images
from precache_proxy.errors import LifeboatError, TrackingLost
from precache_proxy.hypervisor.domain_xml import Disk
from precache_proxy.source.claims import ImageClaims
from precache_proxy.source.tracker import VmReference, parse_checkpoint_name


def path(name: str) -> Path:
    """Libvirt's text for a file as a path."""
    return Path(name)


def inode(name: str) -> int:
    """The inode's number, 0 where there is no such file."""
    try:
        return os.stat(name).st_ino
    except OSError:
        return 0


def allocated_bytes(name: str) -> int | None:
    """What an image takes now: a file's blocks, all of a block device; None: it cannot be looked at."""
    try:
        status = os.stat(name)
        if not stat.S_ISBLK(status.st_mode):
            return status.st_blocks * 512
        with open(name, "rb") as device:
            return device.seek(0, os.SEEK_END)
    except OSError:
        return None


async def first_copy_bytes(disk: Disk, size_bytes: int) -> int:
    """What a first copy takes at most: all that the image and those below it take, and no more than
    ``size_bytes``, which the guest sees."""
    total = 0
    # A shut-off VM's definition does not name the images below.
    for layer in await images.info(path(disk.path), disk.format, in_use=True):
        taken = allocated_bytes(str(layer.path))
        if taken is None:
            return size_bytes
        total += taken
    return min(total, size_bytes)


async def check_bitmaps(vm: VmReference, disks: Mapping[str, Disk], bitmap: str) -> None:
    """Raise TrackingLost where an image does not hold the bitmap, or not a consistent one."""
    for target, disk in disks.items():
        described = (await images.info(path(disk.path), disk.format, in_use=True))[0]
        if not bitmap or bitmap not in described.bitmaps or bitmap in described.inconsistent_bitmaps:
            fact = "inconsistent" if bitmap in described.inconsistent_bitmaps else "not there"
            raise TrackingLost(
                f"{vm} disk {target}: the bitmap {bitmap or '-'} in {disk.path} is {fact}; "
                "what differs is found by digest"
            )


async def replace_bitmaps(claims: ImageClaims, disks: Mapping[str, Disk], bitmap: str | None) -> None:
    """Remove our bitmaps from closed images and begin ``bitmap`` where one is named.

    Raises VmStateChanged where the VM was started meanwhile, Conflict where somebody else has an image open.
    """
    try:
        for disk in disks.values():
            described = (await images.info(path(disk.path), disk.format, in_use=True))[0]
            for name in described.bitmaps:
                if parse_checkpoint_name(name) is not None:
                    await images.remove_bitmap(path(disk.path), name, admit=claims.admit_change)
            if bitmap is not None:
                await images.add_bitmap(path(disk.path), bitmap, admit=claims.admit_change)
    except LifeboatError:
        await claims.blame_start()
        raise
    finally:
        await claims.forget_ended()
