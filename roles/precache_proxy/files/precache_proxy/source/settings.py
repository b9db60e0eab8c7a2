# SPDX-License-Identifier: GPL-3.0-or-later
"""What the source side is told, with the limits that keep an open pass harmless to the guest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from precache_proxy.units import GIB, MIB

DEFAULT_RPO_SECONDS = 15.0


@dataclass(frozen=True)
class SourceSettings:
    """``name`` is this proxy's own, ``peers`` the names that it may protect to.

    ``scratch_limit_bytes`` is shared by all open backup jobs; ``pass_limit_seconds`` is how long one of them
    stays open; ``slice_bytes`` is how much goes over between two marks of a first copy.
    """

    name: str
    peers: tuple[str, ...]
    rpo_seconds: float = DEFAULT_RPO_SECONDS
    scratch_directory: Path = Path("/var/lib/lifeboat/scratch")
    scratch_limit_bytes: int = 4 * GIB
    pass_limit_seconds: float = 60.0
    slice_bytes: int = 256 * MIB
    open_pass_limit: int = 4
    # what scrub compares within one pass
    scrub_slice_bytes: int = 64 * MIB
    # one scrub slice in so many seconds at most: a whole turn stays in the background
    scrub_interval_seconds: float = 300.0
    qemu_user: str | None = None

    @property
    def open_backup_limit(self) -> int:
        """Backup jobs open at once: those of passes, of long work beside them, and of who goes first."""
        return self.open_pass_limit * 2

    @property
    def pass_scratch_limit_bytes(self) -> int:
        """The share of one backup job in the scratch space: all of them together keep the limit."""
        return self.scratch_limit_bytes // self.open_backup_limit
