# SPDX-License-Identifier: GPL-3.0-or-later
"""What a guest writes, as seen between passes: known soon, forgotten soon, and never beyond what was seen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precache_proxy.source.written_rate import WrittenRate


def test_nothing_is_known_at_first_and_the_open_interval_counts_already() -> None:
    written = WrittenRate()
    assert written.bytes_per_second(0, None) is None
    assert written.bytes_per_second(5_000_000, 0.2) is None, "too short to say anything"
    assert written.bytes_per_second(5_000_000, 10.0) == 500_000
    written.passed(6_000_000, 12.0)
    assert written.bytes_per_second(0, 0.0) == 500_000
    assert written.bytes_per_second(999, None) == 500_000, "nobody knows since when"


def test_a_guest_that_becomes_idle_is_seen_to() -> None:
    written = WrittenRate()
    written.passed(15_000_000, 15.0)
    rates = []
    for _pass in range(6):
        written.passed(0, 15.0)
        rates.append(written.bytes_per_second(0, 0.0))
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.0, abs=20_000)


@given(
    st.lists(st.tuples(st.integers(0, 10**9), st.floats(1, 3600)), min_size=1, max_size=20),
    st.integers(0, 10**9),
    st.floats(0, 3600),
)
def test_it_is_between_the_least_and_the_most_that_was_seen(
    intervals: list[tuple[int, float]], changed: int, since: float
) -> None:
    written = WrittenRate()
    for changed_bytes, seconds in intervals:
        written.passed(changed_bytes, seconds)
    rates = [changed_bytes / seconds for changed_bytes, seconds in intervals]
    told = written.bytes_per_second(0, None)
    assert told is not None
    assert min(rates) * 0.999 <= told <= max(rates) * 1.001
    now = written.bytes_per_second(changed, since)
    assert now is not None
    if since > 0:
        rates.append(changed / since)
        assert min(rates) * 0.999 <= now <= max(rates) * 1.001
