# SPDX-License-Identifier: GPL-3.0-or-later
"""A proxy that stops ends a move whose memory is still crossing in order, and lets a hand-over through."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from precache_proxy.errors import NotFound, ProxyRestarted
from precache_proxy.evacuation import migrate, stopping
from precache_proxy.evacuation.arrival import Arrival, ArrivalState
from precache_proxy.evacuation.calling_off import CallingOff
from precache_proxy.evacuation.convergence import Convergence
from precache_proxy.evacuation.departures import Departures
from precache_proxy.evacuation.job import EvacuationOptions, Step
from precache_proxy.evacuation.mirroring import MirrorWatch
from unit.evacuation.called_off_ground import RUNNING, Place, soon


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def moved(place: Place) -> None:
    """A move whose guest's writes wait for its mirrors, until libvirt is told to end it."""
    off = CallingOff(place.departure, waits=True)
    try:
        await soon(lambda: ("abort", True) in place.domain.told)
        place.domain.migrates, place.domain.now = False, RUNNING
    finally:
        await off.over()
    place.departure.job.step = Step.ROLLBACK
    place.departure.check_cancelled()


def working(place: Place, work: Coroutine[Any, Any, None]) -> tuple[Departures, asyncio.Task[None]]:
    """The proxy's departures with one that somebody works on."""
    departures = Departures(place.around, cast(Any, None))
    job = place.departure.job
    departures._departures[job.id] = place.departure
    task = departures._tasks[job.id] = asyncio.create_task(work)
    return departures, task


async def test_the_guest_stands_still_before_its_move_ends_with_the_proxy(place: Place) -> None:
    departures, task = working(place, moved(place))
    await asyncio.sleep(0)
    await departures.stop()
    assert [what for what, _ in place.domain.told[:2]] == ["suspend", "abort"]
    error = task.exception()
    assert isinstance(error, ProxyRestarted)
    assert "the proxy of this host is being stopped" in error.message
    assert not place.departure.job.cancelled, "the operator has not said so"


async def test_one_that_does_not_end_is_left_as_by_a_kill(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "STOP_SECONDS", 0.2)
    departures, task = working(place, asyncio.sleep(60))
    async with asyncio.timeout(5):
        await departures.stop()
    assert task.cancelled()


async def handed_over(place: Place) -> None:
    await asyncio.sleep(0.2)
    place.departure.job.step = Step.DONE


@pytest.mark.parametrize("step", [Step.CONFIRM, Step.RELEASED, Step.FINISH])
@pytest.mark.parametrize("link", ["up", "down"])
async def test_a_hand_over_is_let_through_while_the_peer_is_there(
    place: Place, step: Step, link: str
) -> None:
    place.around.links["backup1"] = SimpleNamespace(state=link)
    place.departure.job.step = step
    departures, task = working(place, handed_over(place))
    await departures.stop()
    assert task.cancelled() is (link == "down")
    assert not place.departure.enough.is_set()


async def test_what_a_kill_does_no_harm_is_not_waited_for(place: Place) -> None:
    place.around.links["backup1"] = SimpleNamespace(state="up")
    place.departure.job.step = Step.CATCH_UP
    departures, task = working(place, asyncio.sleep(60))
    async with asyncio.timeout(1):
        await departures.stop()
    assert task.cancelled()


# -- the destination's proxy stops


async def test_a_destination_that_stops_has_it_ended(place: Place) -> None:
    _departures, task = working(place, moved(place))
    told = await stopping.end_asked(place.departure, "backup1")
    assert told == {"known": True, "step": "rollback"}
    with pytest.raises(ProxyRestarted, match="the proxy of backup1 is being stopped"):
        await task
    assert [what for what, _ in place.domain.told[:2]] == ["suspend", "abort"]


async def test_nobody_but_its_destination_may_end_it(place: Place) -> None:
    assert await stopping.end_asked(place.departure, "other1") == {"known": False, "step": None}
    assert await stopping.end_asked(None, "backup1") == {"known": False, "step": None}
    assert not place.departure.enough.is_set()


async def test_one_that_is_out_is_not_ended(place: Place) -> None:
    place.departure.job.step = Step.CONFIRM
    assert (await stopping.end_asked(place.departure, "backup1"))["step"] == "confirm"
    assert not place.departure.enough.is_set()


class Source:
    """The link to the old home, and what it answers."""

    def __init__(self, answer: dict[str, Any] | Exception) -> None:
        self.answer = answer
        self.asked: list[tuple[str, dict[str, Any]]] = []

    async def call(self, method: str, parameters: dict[str, Any], *, timeout_seconds: float) -> Any:
        assert timeout_seconds > 0
        self.asked.append((method, parameters))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def arrival(state: ArrivalState = ArrivalState.PREPARED) -> Arrival:
    return Arrival("aa01", "uuid", "web1", "home1", 1, 1, state)


async def test_an_arrival_that_is_being_handed_over_is_awaited() -> None:
    source, one = Source({"known": True, "step": "confirm"}), arrival()

    async def comes() -> None:
        await asyncio.sleep(0.2)
        one.state = ArrivalState.RELEASED
        await asyncio.sleep(0.2)
        one.state = ArrivalState.ACTIVATED

    coming = asyncio.create_task(comes())
    await stopping.see_arrivals_off([one], lambda _job: ["ram"], {"home1": source})
    assert source.asked == [("evacuation.end", {"job": "aa01"})]
    assert coming.done()


@pytest.mark.parametrize("answer", [{"known": True, "step": "rollback"}, NotFound("no such method")])
async def test_one_whose_source_has_ended_it_or_cannot_is_not(answer: dict[str, Any] | Exception) -> None:
    async with asyncio.timeout(1):
        await stopping.see_arrivals_off([arrival()], lambda _job: ["ram"], {"home1": Source(answer)})


async def test_one_that_nothing_is_carried_for_is_nobodys_business() -> None:
    source = Source({"known": True, "step": "confirm"})
    async with asyncio.timeout(1):
        await stopping.see_arrivals_off([arrival()], lambda _job: [], {"home1": source})
    assert source.asked == []


async def test_one_that_stays_released_is_not_awaited_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "STOP_SECONDS", 0.2)
    async with asyncio.timeout(5):
        await stopping.see_arrivals_off([arrival(ArrivalState.RELEASED)], lambda _job: [], {})


# -- a mirror that does not get on, in a move that is being ended


async def test_no_mirror_is_made_to_wait_between_two_orders_to_end_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its guest was not stopped for the first order: it ran in the background then."""
    mended: list[str] = []

    async def mend(_domains: object, vm: str) -> None:
        mended.append(vm)

    monkeypatch.setattr(migrate, "PROGRESS_SECONDS", 0.01)
    monkeypatch.setattr(migrate, "write_synchronously", mend)
    monkeypatch.setattr(MirrorWatch, "observe", lambda *_unused: True)
    off = CallingOff(place.departure, waits=False)
    place.departure.enough.set()
    options = EvacuationOptions()
    watch = asyncio.create_task(
        migrate._watch(
            place.around.domains, place.departure.job.vm, lambda _progress: None,
            Convergence(options.downtime_limit_seconds, options.downtime_limit_most_seconds),
            MirrorWatch(0.04), off.writes_wait, asyncio.Lock(),
        )
    )  # fmt: skip
    await soon(lambda: [what for what, _ in place.domain.told].count("abort") == 2)
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)
    await off.over()
    assert (mended, off.waits) == ([], False)
    assert "suspend" not in [what for what, _ in place.domain.told]
