# SPDX-License-Identifier: GPL-3.0-or-later
"""How much room a first copy is asked for: all that it reads, and no more than it can write."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from precache_proxy.blocks import images
from precache_proxy.hypervisor.domain_xml import Disk, Image
from precache_proxy.source.offline import allocated_bytes, first_copy_bytes
from precache_proxy.units import KIB, MIB


def disk(path: Path, image_format: str, kind: str = "file") -> Disk:
    return Disk("vda", "disk", "virtio", Image(kind, str(path), image_format))


@pytest.fixture
def block_device(tmp_path: Path) -> Iterator[Path]:
    """A loop device of 8 MiB on a file that takes nothing."""
    below = tmp_path / "device.img"
    below.touch()
    os.truncate(below, 8 * MIB)
    try:
        told = subprocess.run(
            ["losetup", "--find", "--show", below], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no loop device: {error}")
    device = told.stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


async def test_images_below_count_though_the_definition_does_not_name_them(tmp_path: Path) -> None:
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(b"x" * 2 * MIB)
    os.truncate(base, 16 * MIB)
    await images.create(top, 16 * MIB, backing=str(base), backing_format="raw")
    top_bytes = allocated_bytes(str(top))
    assert top_bytes is not None
    assert top_bytes < MIB
    assert await first_copy_bytes(disk(top, "qcow2"), 16 * MIB) == 2 * MIB + top_bytes
    assert await first_copy_bytes(disk(top, "qcow2"), 512 * KIB) == 512 * KIB, "the guest sees no more"


async def test_a_block_device_counts_as_a_whole(block_device: Path) -> None:
    assert allocated_bytes(str(block_device)) == 8 * MIB
    assert await first_copy_bytes(disk(block_device, "raw", "block"), 8 * MIB) == 8 * MIB
    assert allocated_bytes("/nowhere") is None
