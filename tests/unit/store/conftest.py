# SPDX-License-Identifier: GPL-3.0-or-later
"""Stores on real files, driven through streams in memory, and a model to compare them with."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from precache_proxy.store.service import Store
from precache_proxy.store.settings import StoreSettings
from unit.channel.conftest import authority, pair  # noqa: F401 - fixtures


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    """An empty store that keeps two generations."""
    store = Store(
        tmp_path / "store", tmp_path / "run", StoreSettings(keep_generations=2, minimum_free_bytes=0)
    )
    await store.start()
    yield store
    await store.stop()
    left = list((tmp_path / "run").glob("nbd/*"))
    assert left == [], "sockets of exports were left behind"
    assert len(asyncio.all_tasks()) <= 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 48 MiB: loop devices are not everywhere."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)
