# SPDX-License-Identifier: GPL-3.0-or-later
"""How a copy's beginning finds out what a path carries, without a queue that calls would wait in."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precache_proxy.channel.governor import Governor
from precache_proxy.channel.pacer import Pacer
from precache_proxy.channel.path_watch import Sample
from precache_proxy.channel.pulses import PULSE_SECONDS, Pulse, PulseEcho

from .test_scheduling import Line, busy, idle

# What a call may wait beyond the round trip while a copy runs.
_ASKED_SECONDS = 0.05


# Looked at as often as the governor asks for.
press = partial(busy, beat=None)


@pytest.mark.parametrize("trip", [0.01, 0.04, 0.08, 0.18])
@pytest.mark.parametrize("megabits", [30, 50, 90, 160, 280, 400, 900])
def test_a_beginning_leaves_no_longer_queue_than_a_call_may_wait(megabits: float, trip: float) -> None:
    line, governor = Line(megabits * 1e6 / 8, trip), Governor()
    idle(line, governor, 3)
    assert press(line, governor, 4) < _ASKED_SECONDS
    before = line.acknowledged
    assert press(line, governor, 6) < _ASKED_SECONDS
    assert (line.acknowledged - before) / 6 > 0.95 * line.rate


@pytest.mark.parametrize(("rate", "trip"), [(6.25e6, 0.18), (50e6, 0.04), (50e6, 0.18)])
@pytest.mark.parametrize(("beat", "noise"), [(0.025, 0.0), (0.015, 0.005), (0.04, 0.0), (None, 0.01)])
def test_a_host_that_looks_late_or_at_shaky_round_trips_gets_there_as_well(
    rate: float, trip: float, beat: float | None, noise: float
) -> None:
    line, governor = Line(rate, trip), Governor()
    idle(line, governor, 3)
    assert press(line, governor, 5, beat=beat, noise=noise) < 0.13
    before = line.acknowledged
    press(line, governor, 5, beat=beat, noise=noise)
    assert (line.acknowledged - before) / 5 > 0.9 * line.rate


@pytest.mark.parametrize("trip", [0.04, 0.18])
def test_a_path_that_becomes_faster_is_found_out_the_same_way(trip: float) -> None:
    line, governor = Line(10e6, trip), Governor()
    idle(line, governor, 3)
    press(line, governor, 10)
    line.rate = 50e6
    assert press(line, governor, 3) < _ASKED_SECONDS
    before = line.acknowledged
    press(line, governor, 2)
    assert (line.acknowledged - before) / 2 > 0.9 * line.rate


@pytest.mark.parametrize(("always", "most"), [(0.0, 0.01), (0.004, 0.01)])
@pytest.mark.parametrize("seed", range(7))
def test_a_busy_host_finds_out_in_seconds_that_a_path_became_faster(
    seed: int, always: float, most: float
) -> None:
    """As where another host's copy has ended: most round trips are late, or all of them, and beats are
    missed."""
    line, governor, source, tokens = Line(1.27e6, 0.18), Governor(), random.Random(seed), 0.0
    idle(line, governor, 2)

    def press_for(seconds: float) -> float:
        nonlocal tokens
        until, longest = line.now + seconds, 0.0
        while line.now < until:
            step, allowed = governor.beat_seconds, governor.rate_bytes_per_second or 2e6
            tokens = min(allowed * 0.05, tokens + allowed * step)
            stalled = source.random() < 0.2
            sample = line.step(step, 0 if stalled else tokens)
            tokens = tokens if stalled else 0.0
            late = always + (most - always) * source.random()
            late += 0.05 * source.random() if source.random() < 0.2 else 0.0
            governor.sample(replace(sample, round_trip_seconds=sample.round_trip_seconds + late))
            longest = max(longest, line.queue / line.rate)
        return longest

    press_for(10)
    line.rate = 6.25e6
    assert press_for(4.5) < 0.06
    before = line.acknowledged
    press_for(2)
    assert (line.acknowledged - before) / 2 > 0.8 * line.rate


@pytest.mark.parametrize("megabits", [30, 50, 80, 130, 300])
def test_smoothed_round_trips_that_tell_of_a_queue_late_are_waited_for(megabits: float) -> None:
    """As the kernel's are: another pulse on top of one that filled the path is what a call would wait for."""
    line, governor = Line(megabits * 1e6 / 8, 0.18), Governor()
    idle(line, governor, 3)
    smoothed, longest = line.trip, 0.0
    while line.now < 9:
        step = governor.beat_seconds
        sample = line.step(step, (governor.rate_bytes_per_second or 2e6) * step)
        smoothed += (sample.round_trip_seconds - smoothed) * (1 - (7 / 8) ** (step / 0.02))
        governor.sample(replace(sample, round_trip_seconds=smoothed))
        longest = max(longest, line.queue / line.rate)
    assert longest < 0.07


def test_what_somebody_else_limits_is_not_tried_for_ever() -> None:
    """An operator's limit holds what is sent, the line would carry more: no rate without end, no haste."""
    line, governor, limit = Line(50e6, 0.04), Governor(), 2.5e6
    idle(line, governor, 3)
    for _ in range(2000):
        step = governor.beat_seconds
        governor.sample(line.step(step, min(limit, governor.rate_bytes_per_second or 2e6) * step))
    assert (governor.rate_bytes_per_second or 0) < 3 * limit
    assert governor.beat_seconds == 0.025
    # Once it is lifted.
    before = line.acknowledged
    assert press(line, governor, 3) < _ASKED_SECONDS
    assert (line.acknowledged - before) / 3 > 0.6 * line.rate


@given(
    st.floats(1e5, 1e8),
    st.lists(st.tuples(st.floats(0.008, 0.08), st.floats(0.2, 1.0)), min_size=8, max_size=60),
)
def test_an_echo_is_never_more_than_what_a_bottleneck_let_through(
    rate: float, beats: list[tuple[float, float]]
) -> None:
    echo, at, arrived = PulseEcho(), 0.0, 0.0
    for seconds, share in beats:
        at += seconds
        arrived += rate * share * seconds
        echo.sample(at, int(arrived))
    assert echo.swiftest_bytes_per_second <= rate * 1.001 + 100
    assert echo.is_whole == all(seconds < 0.03 for seconds, _ in beats[1:])


def test_an_echo_shows_a_pulse_between_looks() -> None:
    echo = PulseEcho()
    for beat in range(30):
        echo.sample(beat * 0.01, 10_000 * beat + 12_500 * min(3, max(0, beat - 10)))
    assert echo.swiftest_bytes_per_second == pytest.approx(2.25e6)
    echo.begin()
    for beat in range(30, 40):
        echo.sample(beat * 0.01, 10_000 * beat + 37_500)
    assert echo.swiftest_bytes_per_second == pytest.approx(1e6)


@pytest.mark.parametrize("still_seconds", [0.08, 0.1, 0.12, 0.25, 1.0])
@pytest.mark.parametrize("pressed_seconds", [0.08, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2])
def test_a_path_that_stands_still_for_a_moment_leaves_a_rate(
    still_seconds: float, pressed_seconds: float
) -> None:
    """Nothing arrives, and the round trip of what does comes late: 0 would be no rate, and end all looks."""
    line, governor = Line(6.25e6, 0.04), Governor()
    idle(line, governor, 3)
    press(line, governor, pressed_seconds)
    until, number = line.now + still_seconds, 0
    while line.now < until:
        line.now += governor.beat_seconds
        number += 1
        trip = 0.041 if number < 6 else 0.055
        governor.sample(Sample(line.now, int(line.acknowledged), trip, 0.04, backlog=True))
        assert (governor.rate_bytes_per_second or 0) >= 64_000.0
    press(line, governor, 5)
    before = line.acknowledged
    press(line, governor, 5)
    assert (line.acknowledged - before) / 5 > 0.9 * line.rate


def test_a_pulse_says_when_it_is_on_so_that_the_look_that_ends_it_is_not_late() -> None:
    """Between two small bursts a link looks four times a second: one would have left at twice the rate."""
    line, governor = Line(6.25e6, 0.04), Governor()
    idle(line, governor, 3)
    began, lasted = None, []
    until = line.now + 1.0
    while line.now < until:
        step = governor.beat_seconds
        governor.sample(line.step(step, (governor.rate_bytes_per_second or 2e6) * step))
        if governor.pulse_is_on:
            began = line.now if began is None else began
        elif began is not None:
            lasted.append(line.now - began)
            began = None
    assert len(lasted) >= 2
    assert max(lasted) < 0.031, lasted


async def test_a_pulse_is_over_in_time_whoever_looks_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stalled loop would send twice the rate for as long as it lasts, and that would stand in the queue."""
    now = 100.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
    pacer = Pacer(None, lambda: None)
    pacer.govern(1e6)
    pacer.take(1_000_000)
    pacer.govern(1e6, Pulse(2.25e6, now + PULSE_SECONDS))
    assert pacer.rate_bytes_per_second == 2.25e6
    now += 0.1
    assert not pacer.may_send()
    assert pacer.rate_bytes_per_second == 1e6
    # 30 ms at 2.25 MB/s and 70 ms at 1 MB/s have been paid.
    now += (1_000_000 - 67_500 - 70_000) / 1e6 - 0.001
    assert not pacer.may_send()
    now += 0.002
    assert pacer.may_send()
    pacer.govern(1e6, Pulse(2.25e6, now + PULSE_SECONDS))
    pacer.set_limit(5e5)
    assert pacer.rate_bytes_per_second == 5e5, "the operator's word holds in a pulse, too"
    pacer.stop()


def test_the_governor_says_until_when_a_pulse_lasts() -> None:
    line, governor = Line(6.25e6, 0.04), Governor()
    idle(line, governor, 3)
    seen = []
    until = line.now + 1.0
    while line.now < until:
        step = governor.beat_seconds
        governor.sample(line.step(step, (governor.rate_bytes_per_second or 2e6) * step))
        pulse = governor.pulse
        assert (pulse is not None) == governor.pulse_is_on
        if pulse is not None:
            assert line.now < pulse.until <= line.now + PULSE_SECONDS
            steady = governor.steady_bytes_per_second
            assert steady is not None
            assert pulse.bytes_per_second == pytest.approx(2.25 * steady)
            seen.append(pulse.until)
    assert len(set(seen)) >= 2
