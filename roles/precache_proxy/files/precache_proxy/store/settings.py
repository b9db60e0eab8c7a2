# SPDX-License-Identifier: GPL-3.0-or-later
"""What an operator may set about the store, and the room that it must leave free."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from precache_proxy.errors import NoSpace
from precache_proxy.units import GIB, format_bytes


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """``keep_generations``: how many of the last sealed generations can be restored, the newest included."""

    keep_generations: int = 2
    minimum_free_bytes: int = GIB


def free_bytes(path: Path) -> int:
    """What an unprivileged writer could still write on the file system of ``path``."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def require_space(subject: str, path: Path, needed_bytes: int, minimum_free_bytes: int) -> None:
    """Raises NoSpace when ``needed_bytes`` would leave less than ``minimum_free_bytes`` free."""
    free = free_bytes(path)
    if free - needed_bytes < minimum_free_bytes:
        raise NoSpace(
            f"{subject}: {format_bytes(needed_bytes + minimum_free_bytes)} needed (of which"
            f" {format_bytes(minimum_free_bytes)} stay free), {format_bytes(free)} free on {path};"
            " free space there or set [store] directory"
        )
