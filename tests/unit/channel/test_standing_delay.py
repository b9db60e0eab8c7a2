# SPDX-License-Identifier: GPL-3.0-or-later
"""A path that becomes longer under load: its delay is no queue, and a queue is no longer path."""

from __future__ import annotations

import pytest

from precache_proxy.channel.governor import Governor
from precache_proxy.channel.standing_delay import StandingDelay, Word

from .test_scheduling import Line, busy, idle

# What a call may wait beyond the round trip while a copy runs.
_ASKED_SECONDS = 0.05


def share(line: Line, governor: Governor, seconds: float, *, noise: float = 0.0) -> float:
    """What arrives, as a share of the line's rate."""
    before = line.acknowledged
    busy(line, governor, seconds, beat=None, noise=noise)
    return (line.acknowledged - before) / seconds / line.rate


@pytest.mark.parametrize("noise", [0.0, 0.005])
@pytest.mark.parametrize(
    ("rate", "trip", "longer"),
    [
        (rate, trip, longer)
        for rate, trip in [(50e6, 0.01), (50e6, 0.04), (6.25e6, 0.04), (6.25e6, 0.18)]
        for longer in (0.014, 0.02, 0.03, 0.045, 0.12)
    ],
)
def test_a_full_path_that_becomes_longer_is_believed_in_seconds(
    rate: float, trip: float, longer: float, noise: float
) -> None:
    """A failover in the midst of a copy: for half a minute nearly nothing was sent."""
    line, governor = Line(rate, trip), Governor()
    idle(line, governor, 3)
    busy(line, governor, 8, beat=None, noise=noise)
    line.trip += longer
    before = line.acknowledged
    assert busy(line, governor, 15, beat=None, noise=noise) < 0.1, "the rate comes up without a queue"
    assert (line.acknowledged - before) / 15 / line.rate > 0.75
    assert share(line, governor, 10, noise=noise) > 0.85


@pytest.mark.parametrize("factor", [0.2, 0.3, 0.6, 0.85])
@pytest.mark.parametrize(("rate", "trip"), [(50e6, 0.01), (50e6, 0.04), (6.25e6, 0.18), (50e6, 0.18)])
def test_a_path_that_becomes_slower_is_not_taken_for_a_longer_one(
    rate: float, trip: float, factor: float
) -> None:
    """The queue is ours: it goes when less is sent, and the round trip without it stays known."""
    line, governor = Line(rate, trip), Governor()
    idle(line, governor, 3)
    busy(line, governor, 8, beat=None)
    line.rate *= factor
    busy(line, governor, 6, beat=None)
    assert governor._base[0][1] == pytest.approx(trip, abs=0.002)
    assert busy(line, governor, 10, beat=None) < _ASKED_SECONDS
    assert share(line, governor, 5) > 0.9


def test_a_path_that_is_longer_is_not_left_at_the_least_rate() -> None:
    """There no less can be sent to see what becomes of the delay."""
    line, governor = Line(6.25e6, 0.04), Governor()
    idle(line, governor, 3)
    busy(line, governor, 8, beat=None)
    line.queue, line.trip = 0.0, 0.06
    governor._rate = governor._bottleneck = 64e3
    governor._delivered.clear()
    busy(line, governor, 12, beat=None)
    assert share(line, governor, 5) > 0.85


def look(watch: StandingDelay, at: float, queue: float, delivered: float, settle: float = 0.2) -> Word:
    """While the rate could be less."""
    return watch.look(at, queue, delivered, settle, lowest=False)


def test_half_the_rate_tells_a_longer_path_from_a_queue() -> None:
    watch = StandingDelay()
    assert look(watch, 0.0, 0.02, 6e6) is Word.NOTHING
    assert look(watch, 0.5, 0.02, 4e6) is Word.NOTHING, "the rate follows a queue in that time"
    assert look(watch, 0.7, 0.02, 5.5e6) is Word.NOTHING, "what is sent has not become less"
    assert look(watch, 0.9, 0.02, 5e6) is Word.HALVE
    assert look(watch, 1.0, 0.02, 4e6) is Word.WAIT
    assert look(watch, 1.3, 0.017, 2.5e6) is Word.LONGER

    watch.forget()
    assert look(watch, 1.5, 0.02, 6e6) is Word.NOTHING
    assert look(watch, 1.6, 0.04, 4e6) is Word.NOTHING, "it grows: it is a queue"
    assert look(watch, 2.1, 0.04, 3e6) is Word.NOTHING

    watch.forget()
    assert look(watch, 2.0, 0.02, 6e6) is Word.NOTHING
    assert look(watch, 2.7, 0.02, 5e6) is Word.HALVE
    assert look(watch, 2.8, 0.015, 5e6) is Word.NOTHING, "it shrinks: it is a queue"

    watch.forget()
    assert look(watch, 3.0, 0.02, 6e6) is Word.NOTHING
    assert look(watch, 3.7, 0.02, 5e6) is Word.HALVE
    assert look(watch, 4.2, 0.02, 5e6) is Word.HALVE, "as much arrives as before: it is a queue, not gone yet"


def test_a_mild_cut_that_shows_nothing_is_followed_by_a_clear_one() -> None:
    watch = StandingDelay()
    watch.cut(0.0, 0.05, 6e6, 0.46)
    assert look(watch, 0.3, 0.05, 5.6e6, 0.46) is Word.WAIT
    assert look(watch, 0.5, 0.05, 5.6e6, 0.46) is Word.HALVE
    assert look(watch, 0.9, 0.05, 2.8e6, 0.46) is Word.WAIT
    assert look(watch, 1.2, 0.05, 2.8e6, 0.46) is Word.LONGER

    watch.cut(2.0, 0.05, 6e6, 0.46)
    assert look(watch, 2.3, 0.03, 3e6, 0.46) is Word.WAIT, "another cut before that one is seen is too much"
    assert look(watch, 2.5, 0.05, 3e6, 0.46) is Word.LONGER, "that cut was clear enough"


def test_at_the_least_rate_a_delay_that_stands_is_the_paths() -> None:
    watch = StandingDelay()
    assert watch.look(0.0, 0.02, 64e3, 0.2, lowest=True) is Word.NOTHING
    assert watch.look(0.7, 0.02, 64e3, 0.2, lowest=True) is Word.HALVE
    assert watch.look(3.0, 0.02, 64e3, 0.2, lowest=True) is Word.WAIT
    assert watch.look(4.0, 0.02, 64e3, 0.2, lowest=True) is Word.LONGER


def test_a_slow_connection_has_time_to_tell_of_its_round_trip() -> None:
    """The kernel's figure is smoothed over acknowledgements, of which there are few."""
    watch = StandingDelay()
    assert look(watch, 0.0, 0.02, 2e5) is Word.NOTHING
    assert look(watch, 0.7, 0.02, 1.6e5) is Word.HALVE
    assert look(watch, 1.7, 0.02, 8e4) is Word.WAIT
    assert look(watch, 2.2, 0.02, 8e4) is Word.LONGER
