# SPDX-License-Identifier: GPL-3.0-or-later
"""Bookkeeping of many evacuations, as pure logic."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st


def job(name: str, step: str = "migrate", verdict: str | None = None, number: int = 1) -> dict[str, Any]:
    return {
        "id": f"{name}-{number}", "vm": f"uuid-{name}", "name": name, "peer": "backup1", "step": step,
        "verdict": verdict, "ended": verdict not in {None, "undecided"},
        "steps": [{"step": step, "started_at": 100.0, "ended_at": None}],
    }  # fmt: skip


def vm(name: str, priority: int = 50) -> dict[str, Any]:
    return {"name": name, "uuid": f"uuid-{name}", "priority": priority}


@pytest.fixture
def batch_module(collection: None) -> Any:
    from ansible_collections.lifeboat.evacuation.plugins.module_utils import _batch

    return _batch


def test_the_higher_priority_goes_first(batch_module: Any) -> None:
    vms = [vm("b"), vm("a"), vm("c", 90)]
    assert batch_module.candidates(vms, [job("gone", "done", "evacuated")], None) == ["c", "a", "b", "gone"]
    assert batch_module.candidates(vms, [], ["uuid-a", "c"]) == ["c", "a"]


def test_what_holds_already_is_not_begun_again(batch_module: Any) -> None:
    jobs = [
        job("there", "done", "evacuated"),
        job("runs"),
        job("back", "done", "evacuated"),
        job("stayed", "stayed", "stayed"),
    ]
    names = ["there", "runs", "back", "stayed"]
    batch = batch_module.Batch(names, [vm("runs"), vm("back"), vm("stayed")], jobs, 3)
    assert batch.outcomes["there"]["verdict"] == "already-there"
    assert batch.running == ["runs"]
    assert batch.starts() == ["back", "stayed"], "came home since, or stayed: evacuated anew"


def test_lines_tell_steps_and_ends(batch_module: Any) -> None:
    batch = batch_module.Batch(["a", "b"], [vm("a"), vm("b")], [], 2)
    batch.begun("a", job("a", "preflight"))
    batch.refused("b", "unsupported", "VM b: has a host device", [])
    assert batch.update([job("a", "preflight")]) == [], "nothing moved"
    assert batch.update([job("a", "migrate")]) == ["a: migrate"]
    assert batch.summary(130.0) == "0 of 2 out; 1 not; under way: a migrate 30 s"
    done = {**job("a", "done", "evacuated"), "eviction_seconds": 4.25, "downtime_seconds": 0.31}
    done["bytes"] = {"channel_sent_wire_bytes": 100, "channel_received_wire_bytes": 20}
    assert batch.update([done]) == ["a: EVACUATED in 4.2 s, guest stopped for 0.31 s"]
    assert (batch.done, batch.outcomes["a"]["wire_bytes"], batch.outcomes["b"]["wire_bytes"]) == (
        True,
        120,
        None,
    )


def test_what_the_operator_should_know_of_one_that_is_out_is_told_with_its_verdict(batch_module: Any) -> None:
    batch = batch_module.Batch(["a"], [vm("a")], [], 1)
    batch.begun("a", job("a", "migrate"))
    told = "VM a runs at backup1. Its addresses may not lead there."
    done = {**job("a", "done", "evacuated"), "cause": "warning", "sentence": told}
    assert batch.update([done]) == [f"a: EVACUATED: {told}"]


def test_undecided_frees_its_place(batch_module: Any) -> None:
    batch = batch_module.Batch(["a", "b"], [vm("a"), vm("b")], [job("a")], 1)
    assert batch.starts() == []
    batch.update([job("a", "undecided", "undecided")])
    assert batch.starts() == ["b"]


@given(
    st.integers(1, 5), st.lists(st.sampled_from(["evacuated", "stayed", "undecided", "refused"]), max_size=12)
)
def test_every_vm_gets_one_outcome_and_never_too_many_run(parallel: int, ends: list[str]) -> None:
    from ansible_collections.lifeboat.evacuation.plugins.module_utils._batch import Batch

    end_of = {f"vm{number}": end for number, end in enumerate(ends)}
    batch = Batch(list(end_of), [vm(name) for name in end_of], [], parallel)
    while not batch.done:
        for name in batch.starts():
            if end_of[name] == "refused":
                batch.refused(name, "invalid", "no", [])
            else:
                batch.begun(name, job(name))
        assert len(batch.running) <= parallel
        for name in batch.running[:1]:
            batch.update([job(name, "undecided" if end_of[name] == "undecided" else "done", end_of[name])])
    assert {name: outcome["verdict"] for name, outcome in batch.outcomes.items()} == {
        name: "failed" if end == "refused" else end for name, end in end_of.items()
    }


def test_a_vm_that_stayed_once_and_is_not_protected_now_is_left_alone_unless_named(batch_module: Any) -> None:
    jobs = [job("out", verdict="evacuated"), job("gone", verdict="stayed"), job("busy")]
    assert batch_module.candidates([], jobs, None) == ["out", "busy"]
    assert batch_module.candidates([], jobs, ["gone"]) == ["gone"]
    back = [job("gone", verdict="stayed"), job("gone", verdict="evacuated", number=2)]
    assert batch_module.candidates([], back, None) == ["gone"], "its newest job counts"


def test_vms_that_nobody_protects_are_told_but_for_those_that_may_stay(batch_module: Any) -> None:
    there = [{"name": "stray", "uuid": "u1"}, {"name": "monitor", "uuid": "u2"}]
    (stayed,) = batch_module.left_behind(there, ["u2"])
    assert (stayed["name"], stayed["verdict"], stayed["cause"]) == ("stray", "stayed", "not-protected")
    assert batch_module.left_behind(there, ["stray", "monitor"]) == []
