# SPDX-License-Identifier: GPL-3.0-or-later
"""One coordinator at a time, and none that is gone for long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precache_proxy.control import tables
from precache_proxy.control.coordinator_lease import CoordinatorLease
from precache_proxy.errors import InvalidInput, TakenOver
from small_parts.parts import WEB


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
    told = lease.told()
    assert told is not None
    assert told.pop("epoch") > 0
    assert told == {
        "id": "a", "who": "anna", "held_seconds": 8, "heard_seconds": 3, "renewals": 1, "taken_over": False,
        "seconds_left": 12, "before": None,
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


def epoch_of(lease: CoordinatorLease) -> int:
    told = lease.told()
    assert told is not None
    return int(told["epoch"])


def obeyed(lease: CoordinatorLease, epoch: int | None) -> bool:
    try:
        lease.check(epoch, "home1")
    except TakenOver:
        return False
    return True


def test_what_was_ordered_before_somebody_else_took_over_is_refused_for_ever() -> None:
    clock = Clock()
    lease = CoordinatorLease(clock)
    lease.ask("a", "anna", 15)
    first = epoch_of(lease)
    clock.now += 60
    assert obeyed(lease, first), "it stood still, and nobody has come"
    lease.ask("a", "anna", 15)
    assert epoch_of(lease) == first
    clock.now += 60
    lease.ask("b", "bert", 15)
    with pytest.raises(
        TakenOver, match=rf"home1: taken over by bert since .*; an order of epoch {first} is not"
    ):
        lease.check(first, "home1")
    clock.now += 60
    assert obeyed(lease, epoch_of_last(lease))
    lease.ask("b", "bert", 0)
    assert not obeyed(lease, first)
    lease.ask("a", "anna", 15)
    assert not obeyed(lease, first), "ours again, and still decided by what was true before"
    assert obeyed(lease, epoch_of(lease))
    assert obeyed(lease, None), "an operator's own request"


def epoch_of_last(lease: CoordinatorLease) -> int:
    assert lease._held is not None
    return lease._held.epoch


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.sampled_from([0.0, 1.0, 15.0]),
            st.booleans(),
            st.floats(0, 20),
            st.floats(-3600, 3600),
        )
    )
)
def test_an_order_is_obeyed_only_of_who_was_granted_it_last(
    asked: list[tuple[str, float, bool, float, float]],
) -> None:
    """Whatever the host's clock does meanwhile."""
    clock, wall = Clock(), Clock()
    lease = CoordinatorLease(clock, wall=wall)
    granted: list[tuple[str, int]] = []
    for who, seconds, take_over, passes, set_by in asked:
        if lease.ask(who, who, seconds, take_over=take_over) and seconds > 0:
            granted.append((who, epoch_of(lease)))
        last = granted[-1] if granted else None
        assert [epoch for _who, epoch in granted] == sorted(epoch for _who, epoch in granted)
        for one in granted:
            # One epoch is of one coordinator.
            assert not obeyed(lease, one[1]) or one == last
        clock.now += passes
        wall.now += set_by


async def test_a_proxy_that_was_restarted_knows_whom_it_obeys_and_for_how_long(tmp_path: Path) -> None:
    clock, wall = Clock(), Clock()
    record = tmp_path / "coordinator.json"

    def restarted() -> CoordinatorLease:
        return CoordinatorLease(clock, record, wall)

    def passes(seconds: float) -> None:
        clock.now += seconds
        wall.now += seconds

    async def ask(lease: CoordinatorLease, who: str, seconds: float, *, take_over: bool = False) -> bool:
        granted = lease.ask(who, f"{who} of ops", seconds, take_over=take_over)
        await lease.keep()
        return granted

    lease = restarted()
    assert await ask(lease, "a", 15)
    first = epoch_of(lease)
    assert await ask(lease, "b", 15, take_over=True)
    second = epoch_of(lease)
    passes(5)
    lease = restarted()
    assert (obeyed(lease, first), obeyed(lease, second)) == (False, True)
    told = lease.told()
    assert told is not None
    assert (told["who"], told["taken_over"], told["seconds_left"]) == ("b of ops", True, 10)
    assert not await ask(lease, "a", 15), "the one that was taken over from is not quicker"
    passes(11)
    lease = restarted()
    assert lease.told() is None
    assert not obeyed(lease, first)
    assert await ask(lease, "a", 15)
    told = lease.told()
    assert told is not None
    assert told["before"] == {"id": "b", "who": "b of ops", "epoch": second, "taken_over": True}
    assert await ask(lease, "a", 0)
    lease = restarted()
    assert lease.told() is None
    assert not any(obeyed(lease, epoch) for epoch in (first, second))


def test_who_only_tried_is_not_told_as_one_before() -> None:
    clock = Clock()
    lease = CoordinatorLease(clock)
    lease.ask("a", "anna", 15)
    lease.ask("a", "anna", 15)
    clock.now += 16
    lease.ask("b", "bert", 15)
    lease.ask("b", "bert", 0)
    lease.ask("c", "carl", 15)
    told = lease.told()
    assert told is not None
    assert told["before"]["who"] == "anna"


def test_who_took_over_and_was_late_once_is_told_as_such() -> None:
    """Its lease ran out and nobody came: whom it took over from is to hear of it all the same."""
    clock = Clock()
    lease = CoordinatorLease(clock)
    lease.ask("a", "anna", 15)
    lease.ask("a", "anna", 15)
    lease.ask("b", "bert", 15, take_over=True)
    second = epoch_of(lease)
    clock.now += 16
    lease.ask("b", "bert", 15)
    lease.ask("b", "bert", 0)
    lease.ask("a", "anna", 15)
    told = lease.told()
    assert told is not None
    assert told["before"] == {"id": "b", "who": "bert", "epoch": second, "taken_over": True}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"epoch": 1}', b'{"epoch": 1, "before": null, "holder": 3}']
)
async def test_a_record_that_says_nothing_grants_and_obeys_nobody(tmp_path: Path, content: bytes) -> None:
    record = tmp_path / "coordinator.json"
    old = CoordinatorLease(record=record)
    old.ask("a", "anna", 15)
    await old.keep()
    record.write_bytes(content)
    lease = CoordinatorLease(record=record)
    assert lease.told() is None
    assert not obeyed(lease, epoch_of(old))
    assert lease.ask("b", "bert", 15)
    await lease.keep()
    assert epoch_of(lease) > epoch_of(old)
    assert epoch_of(CoordinatorLease(record=record)) == epoch_of(lease)


async def test_a_disk_that_takes_nothing_stops_no_evacuation(tmp_path: Path) -> None:
    lease = CoordinatorLease(record=tmp_path / "nowhere" / "coordinator.json")
    assert lease.ask("a", "anna", 15)
    await lease.keep()
    assert obeyed(lease, epoch_of(lease))
    (tmp_path / "nowhere").mkdir()
    assert lease.ask("a", "anna", 15)
    await lease.keep()
    assert (tmp_path / "nowhere" / "coordinator.json").exists(), "written as soon as it can be"


def test_orders_of_an_older_one_change_nothing(served: Any) -> None:
    def ask(coordinator: str, **body: Any) -> Any:
        asked = {"coordinator": coordinator, "who": f"{coordinator} of ops", "for_seconds": 15, **body}
        return served.client.request("POST", "/v1/coordinator", asked)["coordinator"]["epoch"]

    served.client.request("PUT", "/v1/vms/web1", {"peer": "backup1"})
    old, new = ask("a"), ask("b", take_over=True)
    assert new > old
    with pytest.raises(TakenOver, match="taken over by b of ops"):
        served.client.request("POST", "/v1/evacuations", {"vm": "web1", "epoch": old})
    assert served.client.request("GET", "/v1/evacuations")["evacuations"] == []
    job = served.client.request("POST", "/v1/evacuations", {"vm": "web1", "epoch": new})["id"]
    for path, body in (
        (f"/v1/evacuations/{job}/steer", {"share_bytes_per_second": 16_384}),
        (f"/v1/evacuations/{job}/steer", {"bandwidth_bytes_per_second": "80Mbit/s"}),
        (f"/v1/evacuations/{job}/steer", {"pause_guest": True}),
        (f"/v1/evacuations/{job}/cancel", {}),
        (f"/v1/vms/{WEB}/postpone", {"for_seconds": 30}),
    ):
        before = served.client.request("GET", f"/v1/evacuations/{job}")
        with pytest.raises(TakenOver, match="nothing was changed"):
            served.client.request("POST", path, {**body, "epoch": old})
        assert served.client.request("GET", f"/v1/evacuations/{job}") == before
        with pytest.raises(InvalidInput, match="epoch: is 'x', no whole number"):
            served.client.request("POST", path, {**body, "epoch": "x"})
    assert (
        served.client.request("POST", f"/v1/evacuations/{job}/cancel", {"epoch": new})["verdict"] == "stayed"
    )


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
