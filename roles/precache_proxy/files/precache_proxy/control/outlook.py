# SPDX-License-Identifier: GPL-3.0-or-later
"""How far a VM under way is, how fast it goes and when it will be over, from what QEMU told last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# A guest that dirties more than this share of what is sent has no end that could be told.
_CONVERGES_BELOW = 0.95


def outlook(job: Mapping[str, Any], vm: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Of a job that has not ended, else None.

    ``share`` (0 to 1) and ``remaining_bytes`` of memory and disks as they are before packing,
    ``bytes_per_second`` of the same, ``seconds_left``, and the VM's ``lag_bytes`` and ``lag_seconds``; None
    for what is not known yet. Pre-copy's rounds are a geometric series (Clark et al., NSDI 2005).
    """
    if job.get("ended"):
        return None
    progress = job.get("progress") or {}
    told: dict[str, Any] = {
        "share": None,
        "remaining_bytes": None,
        "bytes_per_second": None,
        "seconds_left": None,
        "lag_bytes": (vm or {}).get("lag_bytes"),
        "lag_seconds": (vm or {}).get("lag_seconds"),
    }
    total, left = _sum(progress, "total_bytes"), _sum(progress, "remaining_bytes")
    if job.get("step") != "migrate" or not total:
        return told
    rate = _sum(progress, "bytes_per_second")
    told |= {
        "share": min(1.0, max(0.0, 1.0 - left / total)),
        "remaining_bytes": int(left),
        "bytes_per_second": rate,
    }
    dirty = float(progress.get("memory_dirty_pages_per_second") or 0.0)
    dirty *= float(progress.get("memory_page_size") or 4096)
    shrink = 0.0 if job.get("guest_paused") or rate <= 0 else dirty / rate
    # Before memory begins to cross nobody knows how long the rest takes.
    if rate > 0 and shrink < _CONVERGES_BELOW and progress.get("memory_total_bytes"):
        told["seconds_left"] = left / rate / (1.0 - shrink)
    return told


def _sum(progress: Mapping[str, Any], what: str) -> float:
    return float(progress.get(f"memory_{what}") or 0.0) + float(progress.get(f"disk_{what}") or 0.0)
