# SPDX-License-Identifier: GPL-3.0-or-later
"""A model of QEMU's rounds: the limit is raised where they do not shrink, and only there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from precache_proxy.evacuation.convergence import Convergence

MIB = 1 << 20


def rounds(
    convergence: Convergence, memory: float, rate: float, dirty: float, number: int = 30
) -> int | None:
    """Let QEMU go round by round; the number of the round after which it may stop the guest, or None."""
    left = memory
    for turn in range(1, number + 1):
        seconds = left / rate
        for share in (1.0, 0.5, 0.05):
            convergence.observe(
                {
                    "memory_iteration": turn,
                    "memory_remaining_bytes": int(left * share),
                    "memory_bytes_per_second": rate,
                }
            )
        left = min(memory, dirty * seconds)
        if left / rate <= convergence.limit:
            return turn
    return None


def test_limit_stays_where_rounds_shrink() -> None:
    convergence = Convergence(0.3, 60)
    assert rounds(convergence, 1024 * MIB, 50 * MIB, 10 * MIB) is not None
    assert convergence.limit == 0.3
    assert not convergence.hopeless


def test_limit_is_raised_where_the_guest_dirties_as_fast_as_the_link() -> None:
    convergence = Convergence(0.3, 60)
    assert rounds(convergence, 256 * MIB, 6 * MIB, 6 * MIB) is not None
    assert 0.3 < convergence.limit <= 60


def test_limit_never_exceeds_what_is_allowed_and_says_so() -> None:
    convergence = Convergence(0.3, 2)
    assert rounds(convergence, 256 * MIB, 6 * MIB, 12 * MIB) is None
    assert convergence.limit <= 2
    assert convergence.hopeless


def test_figures_that_are_missing_decide_nothing() -> None:
    convergence = Convergence(0.3, 60)
    assert convergence.observe({}) is None
    assert convergence.observe({"memory_iteration": 9}) is None


@given(
    memory=st.integers(64, 65536),
    rate=st.floats(1, 2000),
    share=st.floats(0, 3),
)
def test_every_guest_that_one_stop_of_the_allowed_length_could_move_is_moved(
    memory: int, rate: float, share: float
) -> None:
    most = 60.0
    convergence = Convergence(0.3, most)
    ended = rounds(convergence, memory * MIB, rate * MIB, rate * share * MIB, number=60)
    # With the guest stopped, what one round dirtied is all that is left.
    whole = memory / rate
    if whole * 1.25 <= most:
        assert ended is not None
    assert convergence.limit <= most
