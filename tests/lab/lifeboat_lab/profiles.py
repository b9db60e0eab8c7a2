# SPDX-License-Identifier: GPL-3.0-or-later
"""What the WAN is like: rate, delay and loss, by a name of BENCHMARKS or spelled out."""

import math
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from lifeboat_lab.errors import LabError

MEBI = 1 << 20
MINIMUM_QUEUE_BYTES = 256 << 10
QUEUE_SECONDS = 0.05
_RATE_UNITS = {"": 1, "bit": 1, "kbit": 1_000, "mbit": 1_000_000, "gbit": 1_000_000_000}
_TIME_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Profile:
    """One state of the WAN, the same in both directions and between every two sites.

    `rate_bits_per_second` counts IP bytes with the headers of each packet (0: no limit); `loss` is the chance
    of each packet, each way; `steps` are (seconds, rate) that follow each other for ever, instead of one
    rate.
    """

    name: str = "none"
    rate_bits_per_second: float = 0.0
    round_trip_seconds: float = 0.0
    loss: float = 0.0
    steps: tuple[tuple[float, float], ...] = ()

    @property
    def shaped(self) -> bool:
        """Does this profile need the relay at all?"""
        return bool(self.rate_bits_per_second or self.round_trip_seconds or self.loss or self.steps)

    @property
    def queue_bytes(self) -> int:
        """What may wait for its turn in one direction: one bandwidth-delay product, and 50 ms at least."""
        rate = max([self.rate_bits_per_second, *(rate for _, rate in self.steps)])
        if not rate:
            return 64 * MEBI
        return max(MINIMUM_QUEUE_BYTES, int(rate / 8 * max(self.round_trip_seconds, QUEUE_SECONDS)))

    def at(self, elapsed_seconds: float) -> "Profile":
        """The profile as it is this long after it was set."""
        if not self.steps:
            return self
        left = elapsed_seconds % sum(seconds for seconds, _ in self.steps)
        for seconds, rate in self.steps:
            if left < seconds:
                return replace(self, rate_bits_per_second=rate)
            left -= seconds
        return replace(self, rate_bits_per_second=self.steps[-1][1])

    def seconds_to_next_step(self, elapsed_seconds: float) -> float:
        """How long the profile stays as it is; infinite without steps."""
        if not self.steps:
            return math.inf
        left = elapsed_seconds % sum(seconds for seconds, _ in self.steps)
        for seconds, _ in self.steps:
            if left < seconds:
                return seconds - left
            left -= seconds
        return 0.0

    def to_json(self) -> dict[str, Any]:
        """As it travels to the relay and is shown by status."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Profile":
        """The reverse of to_json."""
        steps = tuple((float(seconds), float(rate)) for seconds, rate in values["steps"])
        return cls(**{**values, "steps": steps})


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("none"),
        Profile("metro", 400e6, 0.010),
        Profile("regional", 400e6, 0.040),
        Profile("trans-pacific", 50e6, 0.180),
        Profile("degraded", 10e6, 0.180),
        Profile("step", 0, 0.180, steps=((60, 50e6), (60, 10e6))),
    )
}


def parse_profile(text: str) -> Profile:
    """A name of PROFILES, or `rate=50mbit,rtt=180ms,loss=0.1%` in any part; `delay=` is one way, half of
    `rtt=`.

    Raises LabError naming the part that cannot be used.
    """
    if text in PROFILES:
        return PROFILES[text]
    if "=" not in text:
        raise LabError(
            f"WAN profile {text!r}: not known; use one of {', '.join(PROFILES)} or rate=..,rtt=..,loss=.."
        )
    profile = Profile(name=text)
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        if key == "rate":
            profile = replace(profile, rate_bits_per_second=_rate(value))
        elif key == "rtt":
            profile = replace(profile, round_trip_seconds=_seconds(part, value))
        elif key == "delay":
            profile = replace(profile, round_trip_seconds=2 * _seconds(part, value))
        elif key == "loss":
            profile = replace(profile, loss=_share(part, value))
        else:
            raise LabError(f"WAN profile: {part!r} is not known; use rate=, rtt=, delay= (one way) or loss=")
    return profile


def _rate(value: str) -> float:
    if value == "unlimited":
        return 0.0
    number, unit = _number(f"rate={value}", value.lower())
    if unit not in _RATE_UNITS or number <= 0:
        raise LabError(
            f"WAN profile: rate={value}: must be above 0, in bit, kbit, mbit or gbit, or `unlimited`"
        )
    return number * _RATE_UNITS[unit]


def _seconds(part: str, value: str) -> float:
    number, unit = _number(part, value)
    if unit not in _TIME_UNITS or not 0 <= number * _TIME_UNITS[unit] <= 5:
        raise LabError(f"WAN profile: {part}: must be 0 to 5 s, in us, ms or s")
    return number * _TIME_UNITS[unit]


def _share(part: str, value: str) -> float:
    number, unit = _number(part, value)
    share = number / 100 if unit == "%" else number
    if unit not in {"", "%"} or not 0 <= share < 1:
        raise LabError(f"WAN profile: {part}: must be 0 to below 1, or 0% to below 100%")
    return share


def _number(part: str, value: str) -> tuple[float, str]:
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-z%]*)", value)
    if match is None:
        raise LabError(f"WAN profile: {part}: is no number with a unit")
    return float(match.group(1)), match.group(2)
