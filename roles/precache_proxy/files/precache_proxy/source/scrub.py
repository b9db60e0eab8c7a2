# SPDX-License-Identifier: GPL-3.0-or-later
"""Which ranges of a VM's disks are compared with its replica: all of them, a scrub's next slice, or none.

``replica_sizes``: how large the sealed replica's disks are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from precache_proxy.blocks.extents import Extents
from precache_proxy.source.layout import Layout
from precache_proxy.source.passes import GenerationPlan, PassResult
from precache_proxy.source.reader import BLOCK_BYTES
from precache_proxy.source.record import ProtectionRecord

logger = logging.getLogger(__name__)


def all_ranges(
    layout: Layout, sizes: Mapping[str, int], replica_sizes: Mapping[str, int]
) -> dict[str, Extents]:
    """Everything that the replica has, too."""
    return {
        target: Extents([(0, _held_bytes(sizes[target], replica_sizes.get(target, 0)))])
        for target in layout.tracked
    }


def next_slice(
    record: ProtectionRecord,
    layout: Layout,
    sizes: Mapping[str, int],
    replica_sizes: Mapping[str, int],
    slice_bytes: int,
) -> dict[str, Extents]:
    """Where the scrub goes on, for ``slice_bytes`` in all."""
    compare: dict[str, Extents] = {}
    left = slice_bytes
    for target in sorted(layout.tracked):
        at = record.scrub_offsets.get(target, 0)
        limit = _held_bytes(sizes[target], replica_sizes.get(target, 0))
        if at >= limit or left <= 0:
            continue
        end = min(limit, at + left)
        compare[target] = Extents([(at, end)])
        left -= end - at
    return compare


def beyond_replica(
    layout: Layout, sizes: Mapping[str, int], replica_sizes: Mapping[str, int]
) -> dict[str, Extents]:
    """What a disk has grown by: bitmaps do not count it, and there is nothing to compare it with."""
    grown = {
        target: Extents([(_held_bytes(sizes[target], replica_sizes.get(target, 0)), sizes[target])])
        for target in layout.tracked
    }
    return {target: extents for target, extents in grown.items() if len(extents)}


def _held_bytes(size_bytes: int, replica_bytes: int) -> int:
    """Up to where the sealed replica has a disk, in whole blocks unless that is all of it."""
    return size_bytes if replica_bytes >= size_bytes else replica_bytes - replica_bytes % BLOCK_BYTES


def note_comparison(
    record: ProtectionRecord, result: PassResult, plan: GenerationPlan, *, whole: bool
) -> None:
    """Note in the record what a comparison found and how far the scrub has come."""
    if whole and record.resync_cause:
        record.resync_cause = ""
        return
    found = -(-result.different_bytes // BLOCK_BYTES)
    record.scrub_differences += found
    # A comparison of everything is a turn of its own: what the turn under way had found is repaired.
    record.scrub_turn_differences = found if whole else record.scrub_turn_differences + found
    if result.different_bytes:
        logger.error(
            "VM %s: %d bytes of the replica differed from the disk and were repaired in generation %d",
            record.name, result.different_bytes, result.generation,
        )  # fmt: skip
    for target, extents in plan.compare.items():
        record.scrub_offsets[target] = max(end for _unused, end in extents)
    if all(record.scrub_offsets.get(target, 0) >= plan.disks[target] for target in plan.since):
        record.scrub_offsets = {}
        record.scrub_turns += 1
        record.scrub_last_turn_differences, record.scrub_turn_differences = record.scrub_turn_differences, 0


def recent_differences(record: ProtectionRecord) -> int:
    """Blocks found to differ in the last whole turn, or since: none once a whole turn found none."""
    return record.scrub_last_turn_differences + record.scrub_turn_differences
