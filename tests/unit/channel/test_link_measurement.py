# SPDX-License-Identifier: GPL-3.0-or-later
"""What a link carries, measured over real sockets."""

from __future__ import annotations

import pytest

from precache_proxy.channel import Stream, StreamReset
from precache_proxy.control.link_measurement import (
    STREAM_KIND,
    is_unsteady,
    measure,
    register,
    steady_rate,
    together,
)

from .conftest import PairFactory


async def test_a_limited_link_is_measured_as_what_it_is(pair: PairFactory) -> None:
    home, backup = await pair()
    register(backup)
    home.links["backup"].set_rate(2_000_000)
    told = await measure(home.links["backup"], 2.0)
    assert told["bytes"] > 1_000_000
    assert told["bytes_per_second"] == pytest.approx(2_000_000, rel=0.3)
    assert len(told["halves_bytes_per_second"]) == 2
    assert sum(told["halves_bytes_per_second"]) / 2 == pytest.approx(told["bytes_per_second"], rel=0.3)


async def test_a_peer_that_does_not_know_this_says_so(pair: PairFactory) -> None:
    home, _backup = await pair()
    with pytest.raises(StreamReset):
        await measure(home.links["backup"], 0.5)


async def test_a_peer_of_an_older_version_tells_the_sum_alone(pair: PairFactory) -> None:
    home, backup = await pair()

    async def older(stream: Stream) -> None:
        taken = 0
        while (message := await stream.receive()) is not None:
            taken += len(message)
        await stream.send(str(taken).encode())
        await stream.close()

    backup.handle_stream(STREAM_KIND, older)
    home.links["backup"].set_rate(2_000_000)
    told = await measure(home.links["backup"], 1.0)
    assert told["bytes_per_second"] == pytest.approx(2_000_000, rel=0.5)


def test_the_ramp_does_not_count() -> None:
    # One second of slow start, then 10 MB/s.
    notes = [(0.1 * step, int(1e6 * (0.1 * step) ** 2)) for step in range(11)]
    notes += [(1.0 + 0.1 * step, int(1e6 + 1e6 * step)) for step in range(1, 21)]
    assert steady_rate(notes, 1.2, 3.0) == pytest.approx(10e6, rel=0.02)
    assert steady_rate(notes[:2], 1.2, 3.0) == pytest.approx(1e5, rel=0.1), "over before: the mean"
    drained = [*notes, (6.0, int(22e6))]
    assert steady_rate(drained, 1.2, 3.0) == pytest.approx(10e6, rel=0.02), "what comes after does not count"


def test_notes_of_several_streams_are_added_up() -> None:
    assert together([[(1.0, 10), (2.0, 30)], [(1.5, 5), (2.5, 6)]]) == [
        (1.0, 10),
        (1.5, 15),
        (2.0, 35),
        (2.5, 36),
    ]


@pytest.mark.parametrize(
    ("halves", "queue", "unsteady"),
    [
        ((5.0e6, 5.9e6), 0.01, False),
        ((5.0e6, 5.9e6), None, False),
        # Still coming up to its rate.
        ((2.0e6, 5.9e6), 0.01, True),
        ((5.9e6, 4.0e6), 0.01, True),
        # Another sender's queue, or a path that has become longer.
        ((5.8e6, 5.9e6), 0.09, True),
        ((0.0, 0.0), None, True),
    ],
)
def test_a_rate_that_is_none_yet_is_told(
    halves: tuple[float, float], queue: float | None, unsteady: bool
) -> None:
    assert is_unsteady(halves, queue) is unsteady
