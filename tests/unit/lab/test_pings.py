# SPDX-License-Identifier: GPL-3.0-or-later
"""Pings of several guests by one process, here of this machine's own loopback addresses."""

from __future__ import annotations

import os
import time
from typing import Any, cast

import pytest

from lifeboat_lab.lab import Lab
from lifeboat_lab.pings import PingWatch
from lifeboat_lab.probes import Seen

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="raw sockets need root")


class Here:
    """A lab whose client is this machine."""

    def command(self, _unused: str, words: list[str]) -> list[str]:
        return words


def watch(addresses: dict[str, str]) -> PingWatch:
    return PingWatch(cast(Lab, cast(Any, Here())), addresses)


def test_each_guest_is_asked_and_told_of_by_name() -> None:
    pings = watch({"one": "::1", "other": "0:0:0:0:0:0:0:1"})
    time.sleep(0.3)
    seen = pings.end()
    assert set(seen) == {"one", "other"}
    for one in seen.values():
        assert one.goes_on
        assert sum(at is not None for _, at in one.probes) > 3
        assert one.lost_since(0.0) == 0


def test_a_guest_that_falls_silent_does_not_go_on() -> None:
    answered = tuple((number * 0.01, number * 0.01 + 0.001) for number in range(200))
    assert Seen(answered, (), "").goes_on
    silent = tuple((2 + number * 0.01, None) for number in range(200))
    assert not Seen(answered + silent, (), "").goes_on
    assert not Seen((), (), "").goes_on
