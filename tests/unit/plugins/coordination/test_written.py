# SPDX-License-Identifier: GPL-3.0-or-later
"""What guests write to their disks while they move has to cross as well, and is forecast."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fallback import Move, Phase, live_seconds
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fixed_plan import fixed_plan
from ansible_collections.lifeboat.evacuation.plugins.module_utils._fleet import HostState, site_summary
from ansible_collections.lifeboat.evacuation.plugins.module_utils._forecast import (
    CONVERGES_BELOW,
    closing_seconds,
    forecast,
    lead_in_seconds,
    residual_bytes,
    usual_shutdown_seconds,
)
from ansible_collections.lifeboat.evacuation.plugins.module_utils._glance import nearly_over
from ansible_collections.lifeboat.evacuation.plugins.module_utils._plan import make_plan
from ansible_collections.lifeboat.evacuation.plugins.module_utils._rounds import Rounds
from ansible_collections.lifeboat.evacuation.plugins.module_utils._schedule import lines
from ansible_collections.lifeboat.evacuation.plugins.module_utils._summaries import Rung, VmSummary
from hypothesis import given
from hypothesis import strategies as st

from unit.plugins.coordination.sites import MB, site, vm

RUNGS = st.sampled_from([Rung.LIVE, Rung.PAUSED, Rung.RESTART])
BYTES = st.floats(0, 4000 * MB)
RATES = st.floats(0.1 * MB, 1000 * MB)
WRITTEN = st.floats(0, 400 * MB)
GUESTS = st.builds(
    lambda memory, lag, dirty, running: vm(
        "a", memory=memory, lag_bytes=lag, dirty_bytes_per_second=dirty, running=running
    ),
    BYTES, BYTES, st.floats(0, 200 * MB), st.booleans(),
)  # fmt: skip


@given(GUESTS, RUNGS, RATES, st.floats(0, 0.6), WRITTEN, WRITTEN)
def test_who_writes_more_is_never_sooner_out(
    guest: VmSummary, rung: Rung, rate: float, trip: float, one: float, other: float
) -> None:
    less, more = (
        forecast(replace(guest, written_bytes_per_second=written), rung, rate, trip)
        for written in sorted([one, other])
    )
    assert less.seconds <= more.seconds * (1 + 1e-9)
    assert less.wire_bytes <= more.wire_bytes * (1 + 1e-9)
    assert more.feasible <= less.feasible or rung is not Rung.LIVE


@given(GUESTS, RUNGS, RATES, st.floats(0, 0.6), WRITTEN)
def test_a_guest_that_writes_nothing_or_does_not_run_costs_what_it_cost(
    guest: VmSummary, rung: Rung, rate: float, trip: float, written: float
) -> None:
    """Closed forms of what was forecast when nobody asked for writes."""
    told = forecast(guest, rung, rate, trip)
    if not guest.running:
        assert told == forecast(replace(guest, written_bytes_per_second=written), rung, rate, trip)
    fixed = lead_in_seconds(trip) + closing_seconds(trip)
    memory = guest.memory_used_bytes if guest.running else 0.0
    if rung is Rung.RESTART:
        assert told.wire_bytes == guest.lag_bytes
    elif rung is Rung.PAUSED or not guest.running:
        assert told.wire_bytes == guest.lag_bytes + memory
        assert told.seconds == pytest.approx(fixed + told.wire_bytes / rate)
    else:
        assert told.wire_bytes >= (guest.lag_bytes + memory) * (1 - 1e-9)
        assert told.seconds == pytest.approx(fixed + told.wire_bytes / rate)


@given(BYTES, BYTES, RATES, st.floats(0, 0.6), st.floats(0, 0.5))
def test_what_is_written_until_it_is_out_crosses_and_no_more(
    memory: float, lag: float, rate: float, trip: float, share: float
) -> None:
    """A guest that dirties no memory: its bytes are what it had and what it wrote in all that time."""
    written = share * rate
    guest = vm("a", memory=memory, lag_bytes=lag, written_bytes_per_second=written)
    told = forecast(guest, Rung.LIVE, rate, trip)
    running = told.seconds - closing_seconds(trip)
    assert told.wire_bytes == pytest.approx(memory + lag + written * running, rel=1e-6, abs=10)


def test_a_busy_disk_makes_memory_converge_later_and_at_last_not() -> None:
    """10 MB/s: 5 MB/s of memory alone converge, not beside a mirror that takes half."""
    guest = vm("a", memory=1000 * MB, dirty_bytes_per_second=5 * MB, longest_stop_seconds=5.0)
    alone = forecast(guest, Rung.LIVE, 10 * MB, 0.0)
    beside = forecast(replace(guest, written_bytes_per_second=2 * MB), Rung.LIVE, 10 * MB, 0.0)
    outrun = forecast(replace(guest, written_bytes_per_second=50 * MB), Rung.LIVE, 10 * MB, 0.0)
    assert (alone.reason, beside.reason, outrun.reason) == ("converges", "converges", "does-not-converge")
    assert beside.seconds > 1.3 * alone.seconds
    # Stopped it writes nothing while its memory crosses.
    paused = forecast(replace(guest, written_bytes_per_second=2 * MB), Rung.PAUSED, 10 * MB, 0.0)
    assert paused.stop_seconds == forecast(guest, Rung.PAUSED, 10 * MB, 0.0).stop_seconds


def test_a_guest_writes_on_until_it_is_shut_down() -> None:
    guest = vm("a", memory=1000 * MB, written_bytes_per_second=1 * MB)
    until = lead_in_seconds(0.0) + usual_shutdown_seconds(guest)
    told = forecast(guest, Rung.RESTART, 10 * MB, 0.0)
    assert told.wire_bytes == pytest.approx(residual_bytes(guest, until) * 1.1)


def test_parallel_is_forecast_with_what_all_write() -> None:
    def makespan(written: float) -> float:
        vms = (vm(name, memory=100 * MB, written_bytes_per_second=written) for name in "abcd")
        whole = site(*vms, rate=10 * MB)
        return fixed_plan(make_plan(whole, None), whole, lines(whole), 4).makespan_seconds

    assert makespan(0.0) == pytest.approx(40 + lead_in_seconds(0.0) + closing_seconds(0.0), rel=0.01)
    # Each writes a fifth of its quarter of the line, and has written for its lead-in.
    assert makespan(0.5 * MB) == pytest.approx(
        (400 + 4 * 0.5 * lead_in_seconds(0.0)) / 8 + lead_in_seconds(0.0) + closing_seconds(0.0), rel=0.01
    )


def test_the_proxy_says_how_fast_and_an_older_one_does_not() -> None:
    told = [
        {"uuid": f"u-{name}", "name": name, "peer": "backup1", **more}
        for name, more in (
            ("a", {"written_bytes_per_second": 2e6}),
            ("b", {}),
            ("c", {"written_bytes_per_second": None}),
        )
    ]
    whole = site_summary("home", [HostState("home1", {"vms": told, "links": []})], {}, {}, None, None)
    assert [item.written_bytes_per_second for item in whole.vms] == [2e6, 0.0, 0.0]


def test_the_mirror_of_a_move_under_way_takes_its_share_until_the_guest_stands() -> None:
    guest = vm("a", memory=400 * MB, written_bytes_per_second=2 * MB)
    move = Move("uuid-a", Phase.BULK, remaining_bytes=60 * MB, bytes_per_second=6 * MB, round_number=1,
                dirty_bytes_per_second=MB)  # fmt: skip
    told = Rounds().told({"uuid-a": move}, {"uuid-a": guest}, 0.0)["uuid-a"]
    # 4 MB/s are left for memory, of which a quarter is dirtied anew each time.
    assert live_seconds(told, 6 * MB) == pytest.approx(60 / 4 / (1 - 1 / 4))
    assert live_seconds(move, 6 * MB) == pytest.approx(60 / 6 / (1 - 1 / 6))
    # Its proxy has its writes wait where they would take more than half.
    assert live_seconds(told, 3 * MB) == pytest.approx(60 / 1.5 / (1 - 1 / 1.5))
    for stands in (replace(told, rung=Rung.PAUSED), replace(told, phase=Phase.LAST)):
        assert live_seconds(stands, 6 * MB) == pytest.approx(60 / 6)


def test_what_was_written_before_makes_no_move_endless() -> None:
    """Nobody measures it while the guest moves: its place would never have been another's."""
    move = Move("uuid-a", Phase.BULK, remaining_bytes=50 * MB, bytes_per_second=MB,
                dirty_bytes_per_second=0.5 * MB)  # fmt: skip
    writes = replace(move, written_bytes_per_second=0.5 * MB)
    assert live_seconds(move, MB) == pytest.approx(100.0)
    assert live_seconds(writes, MB) == pytest.approx(50 / 0.5 / (1 - CONVERGES_BELOW))
    assert not nearly_over(writes, 2.0)
    assert nearly_over(replace(writes, remaining_bytes=0.2 * MB), 2.0)
    assert live_seconds(replace(writes, dirty_bytes_per_second=MB), MB) == float("inf"), "that one is"


@given(st.floats(0, 3), st.floats(0, 3), st.floats(0, 3))
def test_of_moves_under_way_who_writes_more_is_never_sooner_through(
    dirty: float, one: float, other: float
) -> None:
    move = Move("uuid-a", Phase.BULK, remaining_bytes=60 * MB, dirty_bytes_per_second=dirty * MB)
    plain, less, more = (
        live_seconds(replace(move, written_bytes_per_second=written * MB), MB)
        for written in (0.0, *sorted([one, other]))
    )
    assert plain <= less * (1 + 1e-9)
    assert less <= more * (1 + 1e-9)
    assert (more == float("inf")) == (plain == float("inf"))
