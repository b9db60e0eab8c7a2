# SPDX-License-Identifier: GPL-3.0-or-later
"""Small sites for tests: VMs, pairs and uplinks in a line each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import (
    DestinationSummary,
    PairSummary,
    SiteSummary,
    VmSummary,
)

MB = 1e6
MBIT = 1e6 / 8


def vm(name: str, *, host: int = 1, memory: float = 100 * MB, **more: Any) -> VmSummary:
    """A VM of so much memory in use, which does not compress, on home<host>."""
    plain = VmSummary(
        f"uuid-{name}", name, f"home{host}", f"backup{host}", memory_bytes=memory, memory_used_bytes=memory,
        packed_ratio=1.0,
    )  # fmt: skip
    return replace(plain, **more)


def site(
    *vms: VmSummary,
    rate: float | None = 50 * MBIT,
    round_trip: float = 0.0,
    stream: float = 60 * MB,
    free: dict[str, float] | None = None,
) -> SiteSummary:
    """A site whose pairs share one uplink of ``rate`` bytes per second."""
    keys = sorted({item.pair for item in vms})
    return SiteSummary(
        "home",
        tuple(vms),
        tuple(
            PairSummary(*key, "uplink", round_trip_seconds=round_trip, stream_bytes_per_second=stream)
            for key in keys
        ),
        tuple(
            DestinationSummary(name, "backup", memory_free_bytes=(free or {}).get(name))
            for name in sorted({item.destination for item in vms})
        ),
        {"uplink": rate},
    )
