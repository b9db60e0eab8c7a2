# SPDX-License-Identifier: GPL-3.0-or-later
"""Gaps of a probe: where a client's missing time went."""

from __future__ import annotations

import pytest

from lifeboat_lab.probes import Seen


def test_a_gap_tells_when_its_first_answer_had_been_asked_for_and_whether_anybody_asked() -> None:
    # Asked every second; the fourth and fifth are lost, the sixth is asked late and takes half a second.
    probes = ((0.0, 0.1), (1.0, 1.1), (2.0, 2.1), (3.0, None), (4.0, None), (5.5, 6.0), (6.5, 6.6))
    gap = Seen(probes, (), "").longest_gap()
    assert gap is not None
    assert gap.began == 2.1
    assert gap.ended == 6.0
    assert gap.seconds == pytest.approx(3.9)
    assert gap.first_round_trip_seconds == pytest.approx(0.5)
    assert gap.longest_silence_seconds == pytest.approx(1.5)


def test_answers_that_overtake_each_other_are_one_series() -> None:
    seen = Seen(((0.0, 5.0), (1.0, 1.1), (2.0, 2.1)), (), "")
    assert seen.longest_gap_seconds() == pytest.approx(2.9)


@pytest.mark.parametrize("probes", [(), ((0.0, 0.1),), ((0.0, None), (1.0, None))])
def test_without_two_answers_there_is_no_gap(probes: tuple[tuple[float, float | None], ...]) -> None:
    seen = Seen(probes, (), "")
    assert seen.longest_gap() is None
    assert seen.longest_gap_seconds() == 0.0
