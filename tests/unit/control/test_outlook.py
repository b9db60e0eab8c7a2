# SPDX-License-Identifier: GPL-3.0-or-later
"""What is ahead of a VM under way, as the proxy tells it."""

from __future__ import annotations

import pytest

from precache_proxy.control import tables
from precache_proxy.control.outlook import outlook

PROGRESS = {
    "memory_total_bytes": 100e6, "memory_remaining_bytes": 30e6, "memory_bytes_per_second": 5e6,
    "disk_total_bytes": 20e6, "disk_remaining_bytes": 0, "memory_dirty_pages_per_second": 610,
    "memory_page_size": 4096,
}  # fmt: skip
JOB = {"name": "web1", "step": "migrate", "ended": False, "progress": PROGRESS}
VM = {"lag_bytes": 2**20, "lag_seconds": 3.0}


def test_share_rate_and_end_of_a_move_under_way() -> None:
    told = outlook(JOB, VM)
    assert told is not None
    assert told["share"] == pytest.approx(0.75)
    assert (told["remaining_bytes"], told["bytes_per_second"]) == (30_000_000, 5e6)
    # It dirties half of what is sent: each round is half as long as the one before.
    assert told["seconds_left"] == pytest.approx(12.0, rel=0.01)
    assert (told["lag_bytes"], told["lag_seconds"]) == (2**20, 3.0)
    (line,) = [line for line in tables.jobs([{**JOB, "outlook": told}], 80) if "%" in line]
    assert line == "  web1: 75.0 %, 28.6 MiB left at 40.0 Mbit/s, 12.0 s to go; lag 1.0 MiB, 3.0 s"


def test_a_guest_that_dirties_what_is_sent_has_no_end_until_it_stops() -> None:
    busy = {**JOB, "progress": {**PROGRESS, "memory_dirty_pages_per_second": 1300}}
    assert outlook(busy, VM)["seconds_left"] is None  # type: ignore[index]
    assert outlook({**busy, "guest_paused": True}, VM)["seconds_left"] == pytest.approx(6.0)  # type: ignore[index]


def test_before_it_sends_and_after_it_ended_nothing_is_made_up() -> None:
    early = outlook({**JOB, "step": "catch-up", "progress": {}}, None)
    assert early is not None
    assert set(early.values()) == {None}
    assert outlook({**JOB, "ended": True}, VM) is None
