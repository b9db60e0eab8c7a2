# SPDX-License-Identifier: GPL-3.0-or-later
"""Counters of a VM's passes only grow, also while a backup job is open."""

from __future__ import annotations

import asyncio

import pytest

from precache_proxy.source.totals import PassTotals


class Clock:
    """Seconds that pass when the test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def fail(totals: PassTotals, clock: Clock) -> None:
    with totals.counted(), totals.backup_open():
        clock.now += 3
        raise OSError("gone")


def test_an_open_job_counts_already_and_a_failed_one_still() -> None:
    clock = Clock()
    totals = PassTotals(clock)
    with totals.backup_open():
        clock.now += 2
        assert totals.as_dict()["open_seconds"] == 2
    clock.now += 50
    assert totals.open_seconds == 2
    with pytest.raises(OSError, match="gone"):
        fail(totals, clock)
    assert (totals.open_seconds, totals.failed) == (5, 1)


def test_a_pass_that_is_called_off_has_not_failed() -> None:
    totals = PassTotals()
    with pytest.raises(asyncio.CancelledError), totals.counted():
        raise asyncio.CancelledError
    assert totals.failed == 0
