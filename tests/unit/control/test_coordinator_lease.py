# SPDX-License-Identifier: GPL-3.0-or-later
"""One coordinator at a time, and none that is gone for long."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precache_proxy.control import tables
from precache_proxy.control.coordinator_lease import CoordinatorLease
from precache_proxy.errors import InvalidInput


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_another_has_it_until_it_runs_out_or_is_given_back() -> None:
    clock = Clock()
    lease = CoordinatorLease(clock)
    assert lease.told() is None
    assert lease.ask("a", "anna", 15)
    clock.now += 5
    assert not lease.ask("b", "bert", 15)
    assert lease.ask("a", "anna", 15)
    clock.now += 3
    assert lease.told() == {
        "id": "a", "who": "anna", "held_seconds": 8, "heard_seconds": 3, "renewals": 1, "taken_over": False,
        "seconds_left": 12,
    }  # fmt: skip
    clock.now += 12
    assert lease.told() is None, "nobody heard of it since"
    assert lease.ask("b", "bert", 15)
    assert not lease.ask("a", "anna", 0), "what another has it cannot give back"
    assert lease.told()
    assert lease.ask("b", "bert", 0)
    assert lease.told() is None
    assert lease.ask("a", "anna", 15)


def test_it_is_taken_over_on_the_explicit_word_and_the_first_is_told() -> None:
    lease = CoordinatorLease(Clock())
    lease.ask("a", "anna", 15)
    assert lease.ask("b", "bert", 15, take_over=True)
    assert not lease.ask("a", "anna", 15)
    told = lease.told()
    assert told is not None
    assert (told["who"], told["renewals"], told["taken_over"]) == ("bert", 0, True)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from([0.0, 1.0, 15.0]), st.booleans(), st.floats(0, 20))
    )
)
def test_never_two_have_it(asked: list[tuple[str, float, bool, float]]) -> None:
    """Whoever was granted it last has it, and nobody else, until it runs out or somebody takes it over."""
    clock = Clock()
    lease = CoordinatorLease(clock)
    owner, until = "", 0.0
    for who, seconds, take_over, passes in asked:
        held = owner if clock.now < until else ""
        granted = lease.ask(who, who, seconds, take_over=take_over)
        assert granted == (held == who or (seconds > 0 and (not held or take_over)))
        if granted:
            owner, until = who, clock.now + seconds
        told = lease.told()
        assert (told["id"] if told else "") == (owner if clock.now < until else "")
        clock.now += passes


def test_who_coordinates_is_asked_and_told(served: Any) -> None:
    def ask(coordinator: str, **body: Any) -> Any:
        asked = {"coordinator": coordinator, "who": f"{coordinator} of ops", "for_seconds": 15, **body}
        return served.client.request("POST", "/v1/coordinator", asked)

    assert served.client.request("GET", "/v1/status")["coordinator"] is None
    assert ask("a")["granted"]
    refused = ask("b")
    assert (refused["granted"], refused["coordinator"]["who"]) == (False, "a of ops")
    assert served.client.request("GET", "/v1/status")["coordinator"]["id"] == "a"
    shown = tables.status(served.client.request("GET", "/v1/status"))
    assert any(line.startswith("coordinator  a of ops, heard of") for line in shown)
    # One VM by hand needs no lease.
    served.client.request("PUT", "/v1/vms/web1", {"peer": "backup1"})
    assert served.client.request("POST", "/v1/evacuations", {"vm": "web1"})["name"] == "web1"
    assert ask("b", take_over=True)["granted"]
    assert ask("b", for_seconds=0)["coordinator"] is None


def test_what_is_wrong_with_asking_is_told_at_once(served: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        served.client.request("POST", "/v1/coordinator", {"who": "x\ny", "take_over": "yes", "until": 5})
    assert {finding.subject.removeprefix("request: ") for finding in caught.value.findings} == {
        "coordinator", "who", "take_over", "for_seconds", "until",
    }  # fmt: skip
    with pytest.raises(InvalidInput, match="for_seconds"):
        served.client.request("POST", "/v1/coordinator", {"coordinator": "a", "who": "a", "for_seconds": 999})
    assert served.client.request("GET", "/v1/status")["coordinator"] is None
