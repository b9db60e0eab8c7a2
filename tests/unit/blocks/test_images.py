# SPDX-License-Identifier: GPL-3.0-or-later
"""qemu-img's jobs on real files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from precache_proxy.blocks import images
from precache_proxy.errors import HypervisorError, InvalidInput, NotFound
from precache_proxy.units import MIB


def write(image: Path, *commands: str) -> None:
    flags = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *flags, str(image)], check=True, capture_output=True)


def commit(image: Path) -> None:
    """As the store does it, what it holds goes into the image below."""
    subprocess.run(["qemu-img", "commit", "-q", "-d", "-f", "qcow2", f"file:{image}"], check=True)


def reads(image: Path, pattern: int, offset: str, length: str) -> bool:
    command = f"read -P {pattern} {offset} {length}"
    done = subprocess.run(
        ["qemu-io", "-r", "-f", "qcow2", "-c", command, str(image)],
        check=False,
        capture_output=True,
        text=True,
    )
    return "verification failed" not in done.stdout and done.returncode == 0


async def test_chain_commit_rebase_and_grown_overlay(tmp_path: Path) -> None:
    base, middle, top = (tmp_path / name for name in ("base", "mid,dle", "t o p"))
    await images.create(base, MIB)
    await images.create(middle, MIB, backing="base")
    await images.create(top, 2 * MIB + 512, backing="mid,dle")
    write(base, "write -P 1 0 128k")
    write(middle, "write -P 2 64k 64k")
    write(top, "write -P 3 1M 64k")
    chain = await images.info(top, "qcow2")
    assert next((entry.path.name, entry.size_bytes, entry.format) for entry in chain) == (
        "t o p",
        2 * MIB + 512,
        "qcow2",
    )
    assert [entry.backing and Path(entry.backing).name for entry in chain] == ["mid,dle", "base", None]
    commit(middle)
    await images.rebase(top, "base", "qcow2")
    middle.unlink()
    assert reads(top, 1, "0", "64k")
    assert reads(top, 2, "64k", "64k")
    assert reads(top, 3, "1M", "64k")
    assert len(await images.info(top, "qcow2", in_use=True)) == 2
    await images.resize(base, "qcow2", 2 * MIB)
    assert (await images.info(base, "qcow2"))[0].size_bytes == 2 * MIB


async def test_bitmaps_and_check(tmp_path: Path) -> None:
    image = tmp_path / "image"
    await images.create(image, MIB)
    await images.add_bitmap(image, "one")
    assert (await images.info(image, "qcow2"))[0].bitmaps == ("one",)
    await images.remove_bitmap(image, "one")
    assert (await images.info(image))[0].bitmaps == ()
    assert (await images.check(image))["check-errors"] == 0
    write(image, "write -P 1 0 64k")
    with image.open("r+b") as file:  # break the reference counts: cluster 1 holds their table
        file.seek(65536)
        file.write(b"\0" * 65536)
    with pytest.raises(HypervisorError, match="check"):
        await images.check(image)


async def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="gone"):
        await images.info(tmp_path / "gone", "qcow2")
    with pytest.raises(NotFound, match="gone"):
        await images.resize(tmp_path / "gone", "qcow2", MIB)
    image = tmp_path / "image"
    await images.create(image, 1000)
    assert (await images.info(image, "qcow2"))[0].size_bytes == 1024
    with pytest.raises(InvalidInput, match="is there already"):
        await images.create(image, MIB)
    with pytest.raises(HypervisorError, match="image"):
        await images.resize(image, "qcow2", 512)
