# SPDX-License-Identifier: GPL-3.0-or-later
"""What a link carries, measured over real sockets."""

from __future__ import annotations

import pytest

from precache_proxy.channel import StreamReset
from precache_proxy.control.link_measurement import measure, register

from .conftest import PairFactory


async def test_a_limited_link_is_measured_as_what_it_is(pair: PairFactory) -> None:
    home, backup = await pair()
    register(backup)
    home.links["backup"].set_rate(2_000_000)
    told = await measure(home.links["backup"], 2.0)
    assert told["bytes"] > 1_000_000
    assert told["bytes_per_second"] == pytest.approx(2_000_000, rel=0.3)


async def test_a_peer_that_does_not_know_this_says_so(pair: PairFactory) -> None:
    home, _backup = await pair()
    with pytest.raises(StreamReset):
        await measure(home.links["backup"], 0.5)
