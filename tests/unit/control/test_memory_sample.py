# SPDX-License-Identifier: GPL-3.0-or-later
"""What a guest's memory will be on the wire, from a sample."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precache_proxy.control.memory_sample import (
    PIECE_BYTES,
    Sample,
    long_window_gain,
    offsets,
    without_nothing,
)
from precache_proxy.units import GIB, KIB, MIB


def test_half_nothing_half_noise_is_half_on_the_wire() -> None:
    memory = bytes(32 * MIB) + random.Random(1).randbytes(32 * MIB)
    sample = Sample(len(memory), 32, random.Random(2))
    while sample.take(lambda at, count: memory[at : at + count]):
        pass
    assert sample.wire_bytes == pytest.approx(32 * MIB, rel=0.1)


def test_the_more_places_are_looked_at_the_nearer_it_comes() -> None:
    """Memory that is in use lies in lumps: a sixth of this, of half a MiB each."""
    chance = random.Random(5)
    lumps = [chance.randbytes(512 * KIB) if number % 6 == 0 else bytes(512 * KIB) for number in range(192)]
    chance.shuffle(lumps)
    memory = b"".join(lumps)

    def spread(pieces: int) -> float:
        """What 24 samples are off by, in the mean of squares, of 1."""
        off = []
        for seed in range(24):
            sample = Sample(len(memory), pieces, random.Random(seed))
            while sample.take(lambda at, count: memory[at : at + count]):
                pass
            assert sample.wire_bytes is not None
            off.append(sample.wire_bytes / (16 * MIB) - 1)
        return float((sum(one * one for one in off) / len(off)) ** 0.5)

    few, many = spread(32), spread(160)
    assert many < 0.15
    assert many < few / 2


def test_a_small_memory_is_looked_at_once() -> None:
    seen: list[int] = []
    sample = Sample(16 * PIECE_BYTES, 160, random.Random(1))

    def peek(at: int, count: int) -> bytes:
        seen.append(at)
        return bytes(count)

    while sample.take(peek):
        pass
    assert len(seen) == 16


def test_what_packs_well_alone_packs_better_over_a_long_window() -> None:
    assert long_window_gain(0.49) == pytest.approx(0.89)
    assert long_window_gain(0.86) == long_window_gain(1.0) == 1.0
    assert 0.89 < long_window_gain(0.6) < 1.0
    assert long_window_gain(0.0) == 0.8, "nothing is promised beyond what was seen"


def test_pages_of_nothing_are_left_out() -> None:
    assert without_nothing(bytes(PIECE_BYTES)) == b""
    page = b"x" * 4096
    assert without_nothing(bytes(4096) + page + bytes(8192)) == page


def test_too_little_seen_is_not_known() -> None:
    sample = Sample(64 * MIB, 32, random.Random(3))
    sample.take(lambda _at, count: bytes(count))
    assert sample.wire_bytes is None


@given(st.integers(16 * PIECE_BYTES, 512 * GIB), st.integers())
def test_only_memory_is_looked_at_on_any_machine_type(memory_bytes: int, seed: int) -> None:
    """pc: memory up to 3 or 3.5 GiB, q35: up to 2 or 2.75 GiB, the rest from 4 GiB on."""
    for at in offsets(memory_bytes, 32, random.Random(seed)):
        end = at + PIECE_BYTES
        assert at >= 0
        assert end <= min(memory_bytes, 2 * GIB) or 4 * GIB <= at < end <= 4 * GIB + memory_bytes - 2 * GIB
