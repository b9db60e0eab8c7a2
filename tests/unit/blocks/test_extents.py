# SPDX-License-Identifier: GPL-3.0-or-later
"""Extents against the plainest model: a set of the offsets that it contains."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from precache_proxy.blocks.extents import Extents

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12)


def model(ranges: list[tuple[int, int]]) -> set[int]:
    return {offset for start, end in ranges for offset in range(start, end)}


def canonical(extents: Extents) -> bool:
    flat = [edge for pair in extents for edge in pair]
    return all(left < right for left, right in itertools.pairwise(flat))


def offsets(extents: Extents) -> set[int]:
    assert canonical(extents), extents
    return model(list(extents))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60), st.integers(0, 60)), max_size=20))
def test_add_and_remove_in_any_order(steps: list[tuple[bool, int, int]]) -> None:
    extents, expected = Extents(), set[int]()
    for add, start, end in steps:
        if add:
            extents.add(start, end)
            expected |= set(range(start, end))
        else:
            extents.remove(start, end)
            expected -= set(range(start, end))
        assert offsets(extents) == expected
    assert extents.total_bytes == len(expected)
    assert all((offset in extents) == (offset in expected) for offset in range(62))


@given(RANGES, RANGES)
def test_algebra(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    one, two = Extents(left), Extents(right)
    assert offsets(one.union(two)) == model(left) | model(right)
    assert offsets(one.intersection(two)) == model(left) & model(right)
    assert offsets(one.difference(two)) == model(left) - model(right)
    assert offsets(one) == model(left), "an operation changed its operand"
    assert (one == two) == (model(left) == model(right))


@given(RANGES, st.integers(1, 20))
def test_pieces_cover_everything_once_in_order(ranges: list[tuple[int, int]], limit: int) -> None:
    extents = Extents(ranges)
    pieces = list(extents.pieces(limit))
    assert all(0 < length <= limit for _, length in pieces)
    covered = [offset + index for offset, length in pieces for index in range(length)]
    assert covered == sorted(model(ranges))


@given(RANGES, st.integers(0, 80))
def test_split_keeps_order_and_content(ranges: list[tuple[int, int]], limit: int) -> None:
    first, rest = Extents(ranges).split_at_bytes(limit)
    together = sorted(model(ranges))
    assert sorted(offsets(first)) == together[:limit]
    assert sorted(offsets(rest)) == together[limit:]


@given(RANGES)
def test_a_copy_is_independent(ranges: list[tuple[int, int]]) -> None:
    extents = Extents(ranges)
    twin = extents.copy()
    twin.remove(0, 100)
    assert offsets(extents) == model(ranges)
    assert len(twin) == 0


@given(RANGES, st.integers(1, 6))
def test_a_coarser_set_holds_all_of_it_in_few_ranges(ranges: list[tuple[int, int]], limit: int) -> None:
    blocks = Extents((start << 16, end << 16) for start, end in ranges)
    coarse = blocks.coarsened(limit)
    assert canonical(coarse)
    assert len(coarse) <= limit
    assert len(blocks.difference(coarse)) == 0
    if len(blocks):
        assert (min(coarse)[0], max(coarse)[1]) == (min(blocks)[0], max(blocks)[1])
    if len(blocks) <= limit:
        assert coarse == blocks
