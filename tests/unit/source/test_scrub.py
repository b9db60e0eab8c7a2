# SPDX-License-Identifier: GPL-3.0-or-later
"""How long a difference that was repaired is an alarm: until everything was compared and found equal."""

from __future__ import annotations

from precache_proxy.blocks.extents import Extents
from precache_proxy.source.passes import GenerationPlan, PassResult
from precache_proxy.source.reader import BLOCK_BYTES
from precache_proxy.source.record import ProtectionRecord
from precache_proxy.source.scrub import note_comparison, recent_differences

VM = "11111111-2222-4333-8444-555555555577"
BLOCKS = 4


def compare(
    record: ProtectionRecord, first: int, end: int, different: int = 0, *, whole: bool = False
) -> None:
    """A pass that compared these blocks and found so many of them different."""
    size_bytes = BLOCKS * BLOCK_BYTES
    plan = GenerationPlan(
        vm_uuid=VM, vm_name="web1", epoch=0, generation=8, leads_from=7, definition_xml="",
        disks={"vda": size_bytes}, since={"vda": "lifeboat-e0-g7"},
        compare={"vda": Extents([(first * BLOCK_BYTES, end * BLOCK_BYTES)])},
    )  # fmt: skip
    result = PassResult(8, different_bytes=different * BLOCK_BYTES, reason="periodic")
    note_comparison(record, result, plan, whole=whole)


def test_an_alarm_lasts_until_a_whole_turn_found_nothing() -> None:
    record = ProtectionRecord(VM, "web1", "backup1", 15.0)
    compare(record, 0, 2)
    compare(record, 2, 4, different=1)
    assert (record.scrub_turns, recent_differences(record)) == (1, 1)
    compare(record, 0, 2)
    assert recent_differences(record) == 1, "half a turn says nothing about the other half"
    compare(record, 2, 4)
    assert (record.scrub_turns, recent_differences(record), record.scrub_differences) == (2, 0, 1)


def test_a_comparison_of_everything_that_finds_nothing_ends_it_at_once() -> None:
    record = ProtectionRecord(VM, "web1", "backup1", 15.0)
    compare(record, 0, 2, different=2)
    assert recent_differences(record) == 2
    compare(record, 0, 4, different=1, whole=True)
    assert recent_differences(record) == 1, "it has found one more, or the same again"
    compare(record, 0, 4, whole=True)
    assert (recent_differences(record), record.scrub_differences) == (0, 3)
