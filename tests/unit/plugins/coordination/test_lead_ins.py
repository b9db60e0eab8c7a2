# SPDX-License-Identifier: GPL-3.0-or-later
"""Lead-ins are work for hosts: as many at once as gain something, where VMs are through within a look."""

from __future__ import annotations

from copy import deepcopy

import pytest
from ansible_collections.lifeboat.evacuation.plugins.module_utils._gate import Gate

from lifeboat_simulator.model import Links, TruePair
from lifeboat_simulator.run import Result, Simulation
from unit.plugins.coordination.sites import MB, MBIT, site, vm

_TRIP = 0.04
_CARRIED = 380 * MBIT


def emptied(strategy: str, lead_ins: float, number: int = 16) -> Result:
    """Guests of 22 MB, half a second of the line each; their hosts have time for so many lead-ins at once."""
    whole = site(
        *(vm(f"v{index}", host=index % 2 + 1, memory=50 * MB, packed_ratio=0.44) for index in range(number)),
        rate=None,
        round_trip=_TRIP,
    )
    pairs = {pair.key: TruePair(pair.key, "uplink", _CARRIED, _CARRIED, _TRIP) for pair in whole.pairs}
    result = Simulation(whole, Links({"uplink": _CARRIED}, deepcopy(pairs), lead_ins), strategy).run()
    assert result.faults == []
    assert len(result.out_at) == number
    return result


@pytest.mark.parametrize("lead_ins", [1.0, 1.5, 2.0])
def test_hosts_that_have_time_for_few_lead_ins_begin_few(lead_ins: float) -> None:
    """Begun all at once each takes as long as all of them, and nobody is out any sooner."""
    ours, all_at_once = (emptied(name, lead_ins) for name in ("feedback", "parallel"))
    assert ours.makespan <= 1.22 * all_at_once.makespan
    assert ours.mean_individual <= 0.25 * all_at_once.mean_individual


def test_hosts_that_have_time_begin_as_many_as_fill_the_line() -> None:
    ours, alone = (emptied(name, float("inf")) for name in ("feedback", "sequential"))
    assert ours.makespan <= 0.6 * alone.makespan


def test_one_more_is_begun_for_as_long_as_that_costs_no_time() -> None:
    gate = Gate(None)
    gate.round_trip_seconds = _TRIP
    assert gate.lead_ins_at_once == 2
    gate.saw_lead_in(1.0, at_once=1)
    gate.saw_lead_in(1.1, at_once=2)
    gate.saw_lead_in(1.2, at_once=3)
    assert gate.lead_ins_at_once == 4
    gate.saw_lead_in(1.6, at_once=4)
    assert gate.lead_ins_at_once == 3, "of four one and a half waited for the others"


def test_one_that_had_much_to_catch_up_with_says_nothing_of_the_hosts() -> None:
    gate = Gate(None)
    gate.round_trip_seconds = _TRIP
    gate.saw_lead_in(1.0, at_once=2)
    known = gate.lead_ins_at_once
    gate.saw_lead_in(60.0, at_once=3)
    assert gate.lead_ins_at_once == known
