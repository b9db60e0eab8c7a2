# SPDX-License-Identifier: GPL-3.0-or-later
"""What a WAN profile says, by name and spelled out."""

import math

import pytest

from lifeboat_lab.errors import LabError
from lifeboat_lab.profiles import PROFILES, Profile, parse_profile


def test_profiles_of_the_benchmarks() -> None:
    named = {name: (p.rate_bits_per_second, p.round_trip_seconds) for name, p in PROFILES.items()}
    assert named["metro"] == (400e6, 0.010)
    assert named["regional"] == (400e6, 0.040)
    assert named["trans-pacific"] == (50e6, 0.180)
    assert named["degraded"] == (10e6, 0.180)
    assert list(PROFILES["step"].steps) == [(60, 50e6), (60, 10e6)]
    assert [name for name, profile in PROFILES.items() if not profile.shaped] == ["none"]


def test_spelled_out_profile() -> None:
    profile = parse_profile("rate=50mbit,rtt=180ms,loss=0.1%")
    assert profile.rate_bits_per_second == 50e6
    assert profile.round_trip_seconds == pytest.approx(0.180)
    assert profile.loss == pytest.approx(0.001)
    assert parse_profile("delay=90ms").round_trip_seconds == pytest.approx(0.180)
    assert parse_profile("rate=unlimited,rtt=1ms").rate_bits_per_second == 0


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("atlantic", "'atlantic': not known; use one of none, metro"),
        ("rate=0", "rate=0: must be above 0"),
        ("rate=5parsec", "must be above 0, in bit, kbit, mbit or gbit"),
        ("rtt=9s", "rtt=9s: must be 0 to 5 s"),
        ("loss=100%", "loss=100%: must be 0 to below 1"),
        ("rtt=soon", "rtt=soon: is no number with a unit"),
        ("colour=blue", "'colour=blue' is not known"),
    ],
)
def test_bad_profile_names_the_part(text: str, fault: str) -> None:
    with pytest.raises(LabError, match=fault.replace("(", r"\(")):
        parse_profile(text)


def test_queue_holds_a_bandwidth_delay_product_and_no_more_than_it_needs() -> None:
    assert PROFILES["regional"].queue_bytes == 400e6 / 8 * 0.05  # 50 ms beat its 40 ms
    assert PROFILES["trans-pacific"].queue_bytes == 50e6 / 8 * 0.180
    assert Profile(rate_bits_per_second=1e6).queue_bytes == 256 << 10
    assert PROFILES["step"].queue_bytes == 50e6 / 8 * 0.180


def test_steps_follow_each_other_for_ever() -> None:
    step = PROFILES["step"]
    rates = [step.at(seconds).rate_bits_per_second for seconds in (0, 59.9, 60, 119.9, 120, 190)]
    assert rates == [50e6, 50e6, 10e6, 10e6, 50e6, 10e6]
    assert step.seconds_to_next_step(45) == pytest.approx(15)
    assert step.seconds_to_next_step(100) == pytest.approx(20)
    assert math.isinf(PROFILES["metro"].seconds_to_next_step(1e6))


def test_profile_survives_its_way_to_the_relay() -> None:
    for profile in PROFILES.values():
        assert Profile.from_json(profile.to_json()) == profile
