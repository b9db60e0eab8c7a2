# SPDX-License-Identifier: GPL-3.0-or-later
"""How many images lie on each other under a disk, and how many libvirt can read.

A move adds layers at both ends that only the landing merges: the overlay of the freeze at the source; at the
destination the generations on what it kept, the arrival's overlay and the one that tracks the way back.
libvirt reads QEMU's description of a chain as JSON that nests once for each image, and refuses what nests too
deep ("failed to parse JSON: nesting too deep"). Seen with libvirt 11.3: a running VM takes snapshots up to 28
images, but one of more than 25 does not *start* any more, neither at home nor as an arrival.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from precache_proxy.errors import Finding
from precache_proxy.hypervisor.domain_xml import Definition

MOST_IMAGES: Final = 25
# The freeze puts one on at the source, which must be able to start from it after a power cut.
FREEZE_LAYERS: Final = 1
# The arrival's overlay and the one that tracks the way back.
ARRIVAL_LAYERS: Final = 2
# Before the passes: those of this job are still to come, the last one of the frozen images among them.
COMING_LAYERS: Final = 2


def source_findings(definition: Definition, disks: Iterable[str], *, further: int) -> list[Finding]:
    """Disks of the VM that would have too many images once ``further`` are put on them here."""
    depths = {key: 1 + len(disk.backing) for key in disks if (disk := definition.disk(key)) is not None}
    return _findings(
        definition.name,
        depths,
        further,
        "",
        "wait until it has landed here (`precache-proxy status` of its arrival), which merges them; merge "
        "snapshots of your own by `virsh blockcommit`",
    )


def destination_findings(name: str, depths: Mapping[str, int], *, further: int) -> list[Finding]:
    """The same of its replica at the destination, whose disks have ``depths`` images."""
    return _findings(
        name,
        depths,
        further,
        " of its replica at the destination",
        "wait until the VM has landed where it is (`precache-proxy status` of its arrival): then the older "
        "layers of its replica are merged, too",
    )


def _findings(name: str, depths: Mapping[str, int], further: int, where: str, way_out: str) -> list[Finding]:
    return [
        Finding(
            f"VM {name}, disk {key}{where}",
            f"{depth} images lie on each other, this move puts {further} more on them, and libvirt starts no "
            f"VM from more than {MOST_IMAGES}",
            way_out,
            "conflict",
        )
        for key, depth in sorted(depths.items())
        if depth + further > MOST_IMAGES
    ]
