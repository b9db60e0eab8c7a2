# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role's preflight takes for an evacuation under way, by the very answers that a proxy gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

from precache_proxy.control.answers import job_answer
from precache_proxy.evacuation.arrival import Arrival, ArrivalState
from precache_proxy.evacuation.job import Job, Step

PREFLIGHT = Path(__file__).parents[2] / "roles/precache_proxy/tasks/preflight.yml"
UNDER_WAY = "{{ precache_proxy__under_way }}"


def job(name: str, step: Step) -> dict[str, Any]:
    return job_answer(Job(id=name, vm=name, name=name, peer="backup1", epoch=1, step=step))


def arrival(name: str, state: ArrivalState) -> dict[str, Any]:
    return job_answer(Arrival(id=name, vm=name, name=name, peer="home1", epoch=1, generation=1, state=state))


def under_way(evacuations: list[dict[str, Any]], arrivals: list[dict[str, Any]]) -> list[str]:
    """Names that the preflight would tell, its two questions answered so."""
    return names([{"json": {"evacuations": evacuations}}, {"json": {"arrivals": arrivals}}])


def names(answers: list[dict[str, Any]]) -> list[str]:
    tasks = yaml.safe_load(PREFLIGHT.read_text())
    (collect,) = [task for task in tasks if task["name"] == "Collect what is in the way"]
    own = {key: trust_as_template(value) for key, value in collect["vars"].items() if isinstance(value, str)}
    variables = {"precache_proxy__asked": {"results": answers}, **own}
    return list(Templar(loader=DataLoader(), variables=variables).template(trust_as_template(UNDER_WAY)))


def test_nothing_is_under_way_where_nothing_moves() -> None:
    assert under_way([], []) == []
    jobs = [job("left", Step.DONE), job("stayed", Step.STAYED)]
    assert under_way(jobs, [arrival("came", ArrivalState.LANDED)]) == []


def test_every_move_from_here_is_under_way_but_one_that_waits_for_a_word() -> None:
    jobs = [job("first", Step.PREFLIGHT), job("second", Step.MIGRATE), job("third", Step.UNDECIDED)]
    assert under_way(jobs, []) == ["first", "second"]


@pytest.mark.parametrize(
    ("state", "named"),
    [
        (ArrivalState.PREPARED, True),
        (ArrivalState.RELEASED, True),
        (ArrivalState.ABORTING, True),
        # It runs here; what is left is to merge its images, and a proxy that starts again goes on with that.
        (ArrivalState.ACTIVATED, False),
        (ArrivalState.LANDED, False),
        (ArrivalState.ABORTED, False),
    ],
)
def test_an_arrival_is_under_way_until_it_runs_here(state: ArrivalState, *, named: bool) -> None:
    assert under_way([job("goes", Step.FREEZE)], [arrival("comes", state)]) == (
        ["goes", "comes"] if named else ["goes"]
    )


def test_a_proxy_that_did_not_answer_evacuates_nothing() -> None:
    assert names([{"failed": True, "msg": "Connection refused"}] * 2) == []
